"""Prepare a data set for training: python tools/prepare_data.py NAME [--data_dir=DIR].

    python tools/prepare_data.py fine_shapes                      # embedded: offline, in seconds
    python tools/prepare_data.py cifar100                         # from TFDS, by its name
    python tools/prepare_data.py my_photos --from_folder=photos   # photos/train/cat/1.jpg ...
    python tools/prepare_data.py tiny_imagenet --from_archive=tiny-imagenet-200.zip

Sets of TFDS need the network, and mostly TensorFlow to be unpacked; training needs neither.
tiny_imagenet, cub200, stanford_cars, fgvc_aircraft and flickr30k are read from the archive that
their makers publish (.zip, .tar, .tar.gz, .tgz), or from the folder that it unpacks to; without
--from_archive it is said which one. What is prepared already is left as it is.
"""

import argparse
import contextlib
import functools
import importlib.util
import logging as logging_of_python
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import requests
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import downloader
from tqdm import tqdm

from attnzoom_jax.data import source
from attnzoom_jax.data.datasets import archive, image_folder
from attnzoom_jax.errors import unknown_name

RETRIES = 3
TIMEOUT_S = (10, 60)  # to connect, and between two packets


def prepare(
    name: str,
    *,
    data_dir: str = "",
    from_folder: str = "",
    from_archive: str = "",
    skip_broken: bool = False,
) -> None:
    """Prepare a data set unless it stands there, and say so.

    Args:
        name: of the data set, with or without a config.
        data_dir: folder of prepared sets; "" for $TFDS_DATA_DIR, else ~/tensorflow_datasets.
        from_folder: local images, <split>/<class>/*.png or *.jpg; "" for a set with a known name.
        from_archive: official archive of one of `source.ARCHIVES`, or the folder it unpacks to.
        skip_broken: leave unreadable images of from_folder out.

    Raises:
        ValueError: what a person can mend, in one message.
    """
    root = source.data_root(data_dir)
    is_embedded = name in source.embedded_names()
    if from_folder and from_archive:
        raise ValueError("--from_folder and --from_archive exclude each other")
    if from_folder and (is_embedded or name in source.ARCHIVES):
        kind = "an embedded data set" if is_embedded else "a data set with an official archive"
        raise ValueError(f"{name} is the name of {kind}; take another one")
    if from_archive and name not in source.ARCHIVES:
        raise unknown_name("data set with an official archive", name, source.ARCHIVES)
    if from_archive and skip_broken:
        raise ValueError("--skip_broken goes with --from_folder; an official archive must be whole")
    if is_embedded:
        builder = source.embedded_builder(name, root)
        folder = builder.data_path if builder.is_prepared() else None
    else:
        folder = source.find_prepared(name, root)
    if folder is not None:
        print(f"{name} is already prepared: {folder}")
        if from_folder:
            print(f"nothing was read from {from_folder}; take another name, or move that set away")
        if from_archive:
            print(f"nothing was read from {from_archive}; move that set away to read it anew")
    elif from_folder:
        _from_folder(name, root, from_folder, skip_broken=skip_broken)
    elif from_archive:
        _from_archive(name, root, from_archive)
    elif is_embedded:
        source.build_embedded(name, root)
    else:
        _from_tfds(name, root)
    _show(name, root)


def _from_folder(name: str, root: pathlib.Path, from_folder: str, *, skip_broken: bool) -> None:
    folder = image_folder.scan(from_folder)
    broken: list[str] = []

    def leave_out(problem: str) -> None:
        broken.append(problem)
        tqdm.write(f"left out: {problem}", file=sys.stdout)

    for split, paths in folder.splits.items():
        print(f"{split}: {len(paths)} files", flush=True)
        missing = set(folder.class_names) - {
            path.relative_to(folder.root).parts[1] for path in paths
        }
        if missing:
            print(f"note: {split} has no image of {', '.join(sorted(missing))}")
    if folder.others:
        print(f"left out: {len(folder.others)} other files, the first is {folder.others[0]}")
    image_folder.build(folder, name, data_dir=root, on_broken=leave_out if skip_broken else None)
    if skip_broken:
        print(f"left out: {len(broken)} unreadable images")


def _from_archive(name: str, root: pathlib.Path, from_archive: str) -> None:
    archive_set = source.ARCHIVES[name]
    opened = archive.open_archive(from_archive, lists=archive_set.lists)
    contents = archive_set.scan(opened)
    for split, images in contents.splits.items():
        print(f"{split}: {len(images)} images", flush=True)
    for note in contents.notes:
        print(f"note: {note}", flush=True)
    archive.build(name, archive_set, opened, contents, data_dir=root)


def _from_tfds(name: str, root: pathlib.Path) -> None:
    base = name.partition("/")[0]
    if name in source.ARCHIVES or base in source.EMBEDDED or base not in source.tfds_names():
        raise source.not_prepared(name, root)
    if importlib.util.find_spec("tensorflow") is None:
        print(
            "note: TensorFlow is not installed; TFDS needs it to unpack most archives", flush=True
        )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with _bounded_waiting():
            builder: Any = tfds.builder(name, data_dir=root, file_format="array_record")
            builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(
            f"preparing {name} needs a module that is not installed ({_one_line(error)}); in an "
            f"environment that has it, run: tfds build {name} --file_format=array_record "
            f"--data_dir={shlex.quote(str(root))}"
        ) from error
    except Exception as error:  # of the network, the disk, or any of the hundreds of builders
        raise ValueError(f"preparing {name} failed: {_one_line(error)}") from error


@contextlib.contextmanager
def _bounded_waiting() -> Iterator[None]:
    """TFDS tries ten times, for minutes, and waits for ever on a connection that is silent."""
    request, retries = requests.Session.request, downloader.MAX_RETRIES
    timeout: Any = functools.partialmethod(request, timeout=TIMEOUT_S)
    requests.Session.request, downloader.MAX_RETRIES = timeout, RETRIES
    try:
        yield
    finally:
        requests.Session.request, downloader.MAX_RETRIES = request, retries


def _show(name: str, root: pathlib.Path) -> None:
    """Open every split, as training will, and say what is there."""
    builder = source.open_builder(name, root)
    splits = [
        source.open_source(name, split=split, data_dir=str(root), fields=())
        for split in builder.info.splits
    ]
    counts = ", ".join(f"{len(split)} {split.name.rpartition(':')[2]}" for split in splits)
    print(f"ready: {name} with {counts} examples, {len(splits[0].class_names)} classes, in {root}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and prepare; the return value is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="data set, with a config where it has several: NAME/CONFIG")
    parser.add_argument("--data_dir", default="", help="folder of prepared sets")
    parser.add_argument("--from_folder", default="", help="local images: <split>/<class>/*.png|jpg")
    parser.add_argument("--from_archive", default="", help="official archive, or its folder")
    parser.add_argument("--skip_broken", action="store_true", help="leave unreadable images out")
    logging.set_verbosity(logging.ERROR)
    logging_of_python.getLogger("urllib3").setLevel("ERROR")  # it tells of every new attempt
    try:
        prepare(**vars(parser.parse_args(argv)))
    except (ValueError, OSError) as error:
        if os.environ.get("ATTNZOOM_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

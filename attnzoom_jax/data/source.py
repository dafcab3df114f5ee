"""Prepared TFDS data sets as random-access sources, without TensorFlow and without the network.

A data set is looked up as files, `DIR/name/[config/]version/`, before TFDS is asked anything: TFDS
itself would try the network for minutes. The embedded data sets build themselves in seconds.

Images come out as uint8 RGB: grey ones get three equal channels, alpha is dropped.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from attnzoom_jax.data.datasets import fine_shapes
from attnzoom_jax.data.datasets.archive import ArchiveSet
from attnzoom_jax.data.datasets.cub200 import CUB200
from attnzoom_jax.data.datasets.fgvc_aircraft import FGVC_AIRCRAFT
from attnzoom_jax.data.datasets.flickr30k import FLICKR30K
from attnzoom_jax.data.datasets.stanford_cars import STANFORD_CARS
from attnzoom_jax.data.datasets.tiny_imagenet import TINY_IMAGENET
from attnzoom_jax.errors import unknown_name

FileFormat = tfds.core.FileFormat
EMBEDDED = {"fine_shapes": fine_shapes.FineShapes}
# Built from an archive that a person has, by tools/prepare_data.py.
ARCHIVES: dict[str, ArchiveSet] = {
    "cub200": CUB200,
    "fgvc_aircraft": FGVC_AIRCRAFT,
    "flickr30k": FLICKR30K,
    "stanford_cars": STANFORD_CARS,
    "tiny_imagenet": TINY_IMAGENET,
}


@dataclasses.dataclass(frozen=True)
class Source(Sequence[dict[str, Any]]):
    """One split of a prepared data set.

    Attributes:
        name: data set and split, for messages.
        class_names: one per class, in the order of the labels, or per attribute; empty without.
        image_shape: [h, w, 3]; h and w are None where they differ from image to image.
        examples: random access to dictionaries of NumPy arrays: `image` uint8 [h, w, 3], `label`,
            and the further fields that were asked for.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, ...]
    examples: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self.examples[index]


def data_root(data_dir: str) -> pathlib.Path:
    """Where prepared data sets are: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(root).expanduser()


def open_source(
    name: str, *, split: str, data_dir: str = "", fields: Sequence[str] = ("image", "label")
) -> Source:
    """Open one split of a prepared data set; the newest version that is there.

    Args:
        name: TFDS name: "cifar100", or with a config: "fine_shapes/tiny". Without one, the set's
            default config.
        split: "train", a slice such as "train[:90%]", or a sum of those, "train+test[:10]".
        data_dir: folder of prepared sets, see `data_root`.
        fields: features to decode; the others cost nothing.

    Returns:
        The source.

    Raises:
        ValueError: unknown name; the set is not prepared (with the command that prepares it), has
            no random access, no such split or field; the split is empty; files are damaged.
    """
    root = data_root(data_dir)
    builder = open_builder(name, root)
    all_features: Any = builder.info.features
    features: dict[str, Any] = dict(all_features.items())
    for field in fields:
        if field not in features:
            raise unknown_name(f"field of {name}", field, features)
    image, label = features.get("image"), features.get("label")
    if image is not None and (len(image.shape) != 3 or image.np_dtype != np.uint8):
        raise ValueError(f"the images of {name} are {image}; expected uint8 [h, w, c]")
    has_classes = isinstance(label, tfds.features.ClassLabel)
    if "label" in fields and not has_classes:
        raise ValueError(f"the label of {name} is {label}; expected a ClassLabel")
    records = _open_records(builder, name, split, root)
    wanted = tfds.features.FeaturesDict({field: features[field] for field in fields})
    return Source(
        name=f"{name}:{split}",
        class_names=tuple(label.names) if has_classes else (),
        image_shape=(*image.shape[:2], 3) if image is not None else (),
        examples=_Examples(records, wanted, f"{name}:{split} in {builder.data_path}"),
    )


@dataclasses.dataclass(frozen=True)
class _Examples(Sequence[dict[str, Any]]):
    """Records, decoded when they are asked for."""

    records: Any
    features: Any
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        position = range(len(self))[index]
        try:
            example = self.features.deserialize_example_np(self.records[position])
        except Exception as error:  # of array_record, protobuf or OpenCV, each with its own class
            raise ValueError(
                f"example {position} of {self.name} cannot be read, the file may be damaged "
                f"({_one_line(error)})"
            ) from error
        if "image" in example:
            example["image"] = _to_rgb(example["image"])
        return example


def _to_rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]


def prepare_command(name: str, root: pathlib.Path) -> str:
    """The command that prepares a data set."""
    command = f"python tools/prepare_data.py {shlex.quote(name or 'NAME')}"
    command += f" --data_dir={shlex.quote(str(root))}"
    if name in ARCHIVES:
        return f"{command} --from_archive={ARCHIVES[name].archive}"
    base = name.partition("/")[0]
    return command if base in [*EMBEDDED, *tfds_names()] else f"{command} --from_folder=FOLDER"


def tfds_names() -> list[str]:
    """The data sets that TFDS can prepare by name."""
    # Without the community's sets: their list would come over the network.
    return tfds.list_builders(with_community_datasets=False)


def find_prepared(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """Look a prepared data set up.

    Args:
        name: of the data set, with or without a config.
        root: folder of prepared sets.

    Returns:
        The folder of its newest version; None where there is none.

    Raises:
        ValueError: the name lacks a config, and the default one is not prepared though others are.
    """
    if not re.fullmatch(r"\w[\w-]*(/\w[^/]*)?", name):  # it must not lead out of the root
        return None
    base, _, config = name.partition("/")
    versions = _versions(root / base / config)
    if versions or config:
        return versions[-1] if versions else None
    configs = _configs(root / base)
    if not configs:
        return None
    recorded = root / base / ".config" / "metadata.json"  # TFDS's own note
    default = json.loads(recorded.read_text())["default_config_name"] if recorded.exists() else None
    if default not in configs:
        known = ", ".join(f"{base}/{config}" for config in configs)
        raise ValueError(f"{name!r} has several configs; of these, prepared in {root}: {known}")
    return _versions(root / base / default)[-1]


def build_embedded(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
    """Build an embedded data set under `root`, unless it stands there, and return its builder."""
    builder = embedded_builder(name, root)
    if builder.is_prepared():
        return builder
    print(f"building the embedded data set {name} in {root} ...", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of a download there is not
            builder.download_and_prepare()
    except OSError:
        # TFDS moves a finished folder into place: another process may have been quicker.
        builder = embedded_builder(name, root)
        if not builder.is_prepared():
            raise
    return builder


def embedded_builder(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of an embedded data set, prepared or not."""
    base, _, config = name.partition("/")
    try:
        return EMBEDDED[base](data_dir=root, config=config or None, file_format="array_record")
    except ValueError:
        raise
    except Exception as error:  # TFDS reads what stands there already
        raise _unreadable(root / name, _one_line(error), name, root) from error


def embedded_names() -> list[str]:
    """The names of the embedded data sets, and of each of their configs."""
    configs = {base: [c.name for c in cls.BUILDER_CONFIGS] for base, cls in EMBEDDED.items()}
    return [*configs, *(f"{base}/{name}" for base, names in configs.items() for name in names)]


def not_prepared(name: str, root: pathlib.Path) -> ValueError:
    """The error for a data set that is not there: how to prepare it, or what its name may be."""
    if name in ARCHIVES:
        return ValueError(
            f"the data set {name!r} is not prepared in {root}; it is read from "
            f"{ARCHIVES[name].needs}; with that, run: {prepare_command(name, root)}"
        )
    base = name.partition("/")[0]
    if base in tfds_names() and base not in EMBEDDED:
        return ValueError(
            f"the data set {name!r} is not prepared in {root}; with network, and TensorFlow just "
            f"for this, run: {prepare_command(name, root)}"
        )
    # Both lists hold the embedded ones; the first names are those that are shown.
    ours = [*embedded_names(), *ARCHIVES]
    names = dict.fromkeys([*ours, *_prepared_names(root), *tfds_names()])
    error = unknown_name("data set", name, names)
    if base in EMBEDDED or base in ARCHIVES:
        return error
    return ValueError(f"{error} (to make one of images: {prepare_command(name, root)})")


def open_builder(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared or embedded data set; ValueErrors as in `open_source`."""
    # Not through the files: an embedded set of an older version, or of other settings, is not it.
    if name in embedded_names():
        return build_embedded(name, root)
    folder = find_prepared(name, root)
    if folder is None:
        raise not_prepared(name, root)
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        raise _unreadable(folder, _one_line(error), name, root) from error


def _open_records(builder: Any, name: str, split: str, root: pathlib.Path) -> Sequence[bytes]:
    """Serialized examples; TFDS's data source itself would decode every field of them."""
    splits = builder.info.splits
    bases = [part.partition("[")[0].strip() for part in split.split("+")]
    for base in bases:
        if base not in splits and base != "all":
            raise unknown_name(f"split of {name}", base, splits)
    try:
        files = splits[split].file_instructions
    except ValueError as error:
        raise ValueError(f"split {split!r} of {name}: {_one_line(error)}") from error
    if splits[split].num_examples < 1:
        raise ValueError(f"split {split!r} of {name} holds no example")
    stored = builder.info.file_format
    if stored not in (FileFormat.ARRAY_RECORD, FileFormat.PARQUET):
        problem = f"it is stored as {stored and stored.value}, without random access"
        raise _unreadable(builder.data_path, problem, name, root)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        if stored is FileFormat.ARRAY_RECORD:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                list(pool.map(_check_file, files))
            return builder.as_data_source(split=split, deserialize_method=raw)
        # TFDS reads Parquet files from end to end, whatever the slice.
        whole = "+".join(dict.fromkeys(bases))
        records = builder.as_data_source(split=whole, deserialize_method=raw)
    except Exception as error:
        raise _unreadable(builder.data_path, _one_line(error), name, root) from error
    start, rows = 0, {}
    for file in splits[whole].file_instructions:
        rows[file.filename] = start + np.arange(file.examples_in_shard)
        start += file.examples_in_shard
    chosen = [rows[file.filename][file.skip : file.skip + file.take] for file in files]
    return Rows(records, np.concatenate(chosen))


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[Any]):
    """Some rows of a sequence, in an order of their own.

    Attributes:
        records: the sequence.
        rows: int [n], places in it.
    """

    records: Any
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.records[int(self.rows[index])]


def _check_file(file: Any) -> None:
    """Find a missing or truncated file now: array_record opens it at its first example."""
    path = str(file.filename)
    try:
        reader = array_record_module.ArrayRecordReader(path)
        found = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{path} is missing or damaged ({_one_line(error)})") from error
    if found != file.examples_in_shard:
        raise ValueError(f"{path} holds {found} examples, not {file.examples_in_shard}")


def _unreadable(folder: Any, problem: str, name: str, root: pathlib.Path) -> ValueError:
    return ValueError(
        f"{folder} cannot be read: {problem}; move it away and run: {prepare_command(name, root)}"
    )


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders of versions, the newest last; what TFDS left half-written is called otherwise."""
    found = [
        info.parent
        for info in folder.glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    ]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def _configs(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if _versions(path))


def _prepared_names(root: pathlib.Path) -> list[str]:
    names = []
    for folder in sorted(root.glob("*")):
        names += [folder.name] if _versions(folder) else []
        names += [f"{folder.name}/{config}" for config in _configs(folder)]
    return names


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def as_array(value: Any) -> np.ndarray:
    """A decoded field as an array that batches well: integers become int32."""
    array = np.asarray(value)
    return array.astype(np.int32) if array.dtype.kind in "iu" and array.ndim == 0 else array

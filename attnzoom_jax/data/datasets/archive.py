"""Official archives of data sets that TFDS lacks, read in place, as prepared sets (array_record).

An archive (.zip, .tar, .tar.gz, .tgz), or the folder that it unpacks to, is read from its beginning
to its end and nothing of it is unpacked: once for the paths and the small lists, once more for the
images of each split. A data set says in a file of its own what its lists mean; see tiny_imagenet.
"""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from attnzoom_jax.data.datasets import image_folder

VERSION = "1.0.0"
SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclasses.dataclass(frozen=True)
class Archive:
    """What lies in an archive or folder.

    Attributes:
        path: of the archive or folder.
        names: paths of the files in it.
        links: paths of links and special files, which are not read.
        lists: contents of the files that were kept, by their paths.
    """

    path: pathlib.Path
    names: frozenset[str]
    links: frozenset[str]
    lists: dict[str, bytes]

    def find(self, ending: str) -> str | None:
        """The path that is `ending`, or ends with it after a slash; the shortest of several."""
        found = [name for name in self.names if f"/{name}".endswith(f"/{ending}")]
        return min(found, key=lambda name: (name.count("/"), name), default=None)

    def root(self, name: str) -> str:
        """What stands before `name` in the path that ends with it: "" or a folder with its slash.

        Raises:
            ValueError: there is no such file.
        """
        found = self.find(name)
        if found is None:
            raise self._missing(name)
        return found.removesuffix(name)

    def has(self, folder: str) -> bool:
        """Whether any file lies below a folder."""
        return any(name.startswith(f"{folder}/") for name in self.names)

    def require(self, name: str) -> None:
        """Raise a ValueError if there is no such file."""
        if name not in self.names:
            raise self._missing(name)

    def text(self, name: str) -> str:
        """A list that was kept; a ValueError if it is not there, or not UTF-8."""
        self.require(name)
        try:
            return self.lists[name].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {name} is no text ({error})") from error

    def table(self, name: str, *kinds: Callable[[str], Any]) -> list[tuple]:
        """The lines of a list, cut into columns at white space.

        Args:
            name: of a list that was kept.
            kinds: what makes each column's value of its text, such as int; the last column is the
                whole rest of the line.

        Returns:
            One tuple of values per line that is not blank.

        Raises:
            ValueError: there is no such list, or a line that is not of this kind.
        """
        rows = []
        for number, line in enumerate(self.text(name).splitlines(), start=1):
            words = line.strip().split(None, len(kinds) - 1)
            if not words:
                continue
            try:
                rows.append(tuple(kind(word) for kind, word in zip(kinds, words, strict=True)))
            except ValueError as error:
                columns = ", ".join(kind.__name__ for kind in kinds)
                raise ValueError(
                    f"{self.path}: line {number} of {name} is {line[:60]!r}; expected the columns "
                    f"{columns}"
                ) from error
        return rows

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """The paths and contents of these files, in the order of the archive.

        Raises:
            ValueError: the archive cannot be read to its end.
        """
        wanted = set(names)
        with _readable(self.path):
            for name, content in _walk(self.path):
                name = posixpath.normpath(name)
                if name in wanted and content is not None:
                    wanted.remove(name)  # a path that comes twice counts once
                    yield name, content()

    def _missing(self, name: str) -> ValueError:
        link = next((link for link in self.links if f"{name}/".startswith(f"{link}/")), None)
        if link is not None:
            return ValueError(
                f"{self.path}: {link} is a link or a special file, which is not read; put what it "
                "stands for there"
            )
        return ValueError(
            f"{self.path} holds no {name}; is it complete, and is its layout the official one?"
        )


@dataclasses.dataclass(frozen=True)
class Contents:
    """The examples of a data set, as its lists tell.

    Attributes:
        splits: {split: {path of the image in the archive: fields beside the image}}. The field
            `file_name` must be unique in its split: it decides the stored order, which is random.
        features: of these fields, with `label`.
        image_shape: [h, w, 3]; h and w are None where they differ from image to image.
        notes: what a person should know, a line each.
        metadata: what belongs to all examples, such as the names of parts.
        encode: makes the stored file of an image's file; raises anything for a broken one. By
            default pixels stay as they are: whoever drew the boxes saw no EXIF tags.
    """

    splits: dict[str, dict[str, dict[str, Any]]]
    features: dict[str, Any]
    image_shape: tuple[int | None, ...] = (None, None, 3)
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    encode: Callable[[bytes], bytes] = lambda data: image_folder.encode(data, upright=False)


@dataclasses.dataclass(frozen=True)
class ArchiveSet:
    """A data set that is read from its official archive.

    Attributes:
        archive: file name of the archive, or "FOLDER" where there are several.
        needs: what a person must have, and who publishes it, for messages.
        description: one or two sentences, with the source and the terms.
        lists: endings of the files that `scan` reads; they must be small.
        scan: finds the examples; a ValueError says what is missing.
    """

    archive: str
    needs: str
    description: str
    lists: tuple[str, ...]
    scan: Callable[[Archive], Contents]


def open_archive(path: str | pathlib.Path, *, lists: tuple[str, ...]) -> Archive:
    """Read the paths in an archive or folder, and its lists.

    Args:
        path: of the archive or folder.
        lists: endings of the files whose contents are kept.

    Returns:
        What lies in it.

    Raises:
        ValueError: there is no such archive, it is of another kind, cannot be read to its end, or
            has a member that leads outside.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"there is no archive or folder {path}")
    if not path.is_dir() and not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} is neither a folder nor an archive ({', '.join(SUFFIXES)})")
    names, links, kept = set(), set(), {}
    with _readable(path):
        files = tqdm(_walk(path), desc=f"looking at {path.name}", unit="file", disable=None)
        for name, content in files:
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
                raise ValueError(f"{path} has the member {name!r}, which leads outside; not read")
            name = posixpath.normpath(name)
            if content is None:
                links.add(name)
                continue
            names.add(name)
            if name.endswith(lists):
                kept[name] = content()
    return Archive(path, frozenset(names), frozenset(links - names), kept)


def build(
    name: str,
    archive_set: ArchiveSet,
    archive: Archive,
    contents: Contents,
    *,
    data_dir: str | pathlib.Path,
) -> tfds.core.DatasetBuilder:
    """Write the examples of an archive as a TFDS set; nothing is left behind when it fails.

    Args:
        name: of the data set.
        archive_set: what it is.
        archive: from `open_archive`.
        contents: what `archive_set.scan` found in it.
        data_dir: folder of prepared sets.

    Returns:
        The builder of the prepared set. Its features are `image`, in the file's own encoding, and
        those of the contents; boxes are clipped to the image.

    Raises:
        ValueError: an image is missing, broken or of another size, or the archive cannot be read.
    """
    for images in contents.splits.values():
        for image in images:
            archive.require(image)
    tfds.disable_progress_bar()  # ours knows how many there are
    builder = _Builder(
        name, archive_set, archive, contents, data_dir=data_dir, file_format="array_record"
    )
    builder.download_and_prepare()
    return builder


def half_open(x0: int, y0: int, x1: int, y1: int, *, first: int) -> tuple[int, int, int, int]:
    """A box by its first and last pixels, counted from `first`, as half-open [y0, x0, y1, x1]."""
    return y0 - first, x0 - first, y1 - first + 1, x1 - first + 1


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self, name: str, archive_set: ArchiveSet, archive: Archive, contents: Contents, **kwargs
    ):
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]  # TFDS's own ad-hoc way
        self._set, self._archive, self._contents = archive_set, archive, contents
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=self._contents.image_shape)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._set.description,
            features=tfds.features.FeaturesDict({"image": image, **self._contents.features}),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(self._contents.metadata),
        )

    def _log_download_bytes(self) -> None:
        """Nothing: TFDS would tell of a download of unknown size."""

    def _log_download_done(self) -> None:
        """Nothing, for the same reason."""

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self._contents.splits}

    def _generate_examples(self, split) -> Iterator[tuple[str, dict]]:
        images = self._contents.splits[split]
        files = self._archive.read(images)
        bar = tqdm(files, desc=f"writing {split}", total=len(images), unit="image", disable=None)
        for name, data in bar:
            fields = images[name]
            try:
                data = self._contents.encode(data)
                with Image.open(io.BytesIO(data)) as image:
                    width, height = image.size
            except Exception as error:  # Pillow raises many kinds
                problem = " ".join(str(error).split())
                raise ValueError(
                    f"{self._archive.path}: {name} is no readable image ({problem})"
                ) from error
            if any(
                size not in (None, found)
                for size, found in zip(self._contents.image_shape, (height, width), strict=False)
            ):
                raise ValueError(
                    f"{self._archive.path}: {name} has {height} x {width} pixels; expected "
                    f"{' x '.join(map(str, self._contents.image_shape[:2]))}"
                )
            if "box" in fields:
                box = np.clip(fields["box"], 0, (height, width, height, width))
                dtype = self._contents.features["box"].np_dtype
                fields = {**fields, "box": box.astype(dtype)}
            # Bytes in a file go through TFDS without TensorFlow.
            yield fields["file_name"], {"image": io.BytesIO(data), **fields}


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Say which archive it is that cannot be read."""
    try:
        yield
    # RuntimeError: a zip file with a password, or packed in a way that Python does not know.
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        OSError,
        RuntimeError,
    ) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} cannot be read; is it complete? ({problem})") from error


def _walk(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    """Each file's path, with what reads it before the next one; None for what is no plain file."""
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            folders.sort()
            for file in sorted(pathlib.Path(folder, name) for name in [*files, *folders]):
                is_plain = file.is_file() and not file.is_symlink()
                if is_plain or file.is_symlink() or not file.is_dir():
                    name = file.relative_to(path).as_posix()
                    yield name, file.read_bytes if is_plain else None
    elif path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    is_link = stat.S_ISLNK(info.external_attr >> 16)  # the upper half: Unix's mode
                    read = None if is_link else functools.partial(archive.read, info)
                    yield info.filename, read
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isdir():
                    file = archive.extractfile(member) if member.isreg() else None
                    yield member.name, file and file.read

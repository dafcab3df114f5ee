"""Small archives in official layouts, for the tests of data sets that are read from one."""

import pathlib
import shutil

import numpy as np
from PIL import Image

from attnzoom_jax.data import source
from attnzoom_jax.data.datasets import archive

KINDS = ("folder", "zip", "tar", "gztar")


def photo(path: pathlib.Path, *, size=(64, 64), seed=0, mode="RGB", **options) -> None:
    """Write a smooth random JPEG of this height and width."""
    shape = (4, 4, 3) if mode == "RGB" else (4, 4)
    coarse = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path, **options)


def write(path: pathlib.Path, lines) -> None:
    """Write a list, one line per item; tuples become columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [" ".join(map(str, line)) if isinstance(line, tuple) else line for line in lines]
    path.write_text("".join(f"{row}\n" for row in rows))


def pack(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The folder itself, or an archive of it beside it."""
    if kind == "folder":
        return folder
    return pathlib.Path(shutil.make_archive(str(folder), kind, folder.parent, folder.name))


def build(name: str, path, data_dir) -> archive.Contents:
    """Prepare a data set of `source.ARCHIVES`; returns what was found in the archive."""
    archive_set = source.ARCHIVES[name]
    opened = archive.open_archive(path, lists=archive_set.lists)
    contents = archive_set.scan(opened)
    archive.build(name, archive_set, opened, contents, data_dir=data_dir)
    return contents


def read(name: str, split: str, data_dir, fields) -> dict[str, dict]:
    """The examples of a split by their file names."""
    opened = source.open_source(
        name, split=split, data_dir=str(data_dir), fields=("file_name", *fields)
    )
    examples = {example["file_name"].decode(): example for example in opened.examples}
    assert len(examples) == len(opened)
    return examples


def pixels(path: pathlib.Path) -> np.ndarray:
    """An image as RGB, by Pillow."""
    return np.asarray(Image.open(path).convert("RGB"))

"""A local folder of images and their boxes, read image by image; voc_folder and coco_folder."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnzoom_jax.data.image_file import read_image

BLACK = np.zeros((1, 1, 3), np.uint8)

Problem = tuple[str, str]  # its kind, and a line that names the image


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is annotated on one image, as it is written there: not clipped, not checked.

    Attributes:
        labels: int [p].
        boxes: [p, 4], [y0, x0, y1, x1], half-open, in pixels of the image as it is stored.
        is_hard: bool [p].
        masks: bool [p, h, w]; None where there are none.
        problems: what could not be read.
    """

    labels: Any = ()
    boxes: Any = ()
    is_hard: Any = ()
    masks: np.ndarray | None = None
    problems: tuple[Problem, ...] = ()


@dataclasses.dataclass(frozen=True)
class AnnotatedFolder(Sequence[tuple[np.ndarray, str, Objects]]):
    """Images with their names and objects, read when they are asked for.

    Attributes:
        class_names: in the order of the labels.
        files: of the images.
        read_objects: what is annotated on image i, of (height, width) pixels.
    """

    class_names: tuple[str, ...]
    files: Sequence[pathlib.Path]
    read_objects: Callable[[int, tuple[int, int]], Objects]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> tuple[np.ndarray, str, Objects]:
        position = range(len(self))[index]
        path = self.files[position]
        try:
            image = read_image(path, upright=False)  # whoever drew the boxes saw no EXIF tags
        except ValueError as error:
            return BLACK, path.name, unreadable(error)
        return image, path.name, self.read_objects(position, image.shape[:2])


def unreadable(error: Exception) -> Objects:
    """What stands for the objects of an image that cannot be read; `BLACK` stands for the image."""
    return Objects(problems=(("unreadable_image", str(error)),))


def size_problem(name: str, told: tuple[Any, Any], size: tuple[int, int]) -> Problem | None:
    """The problem of an annotation that was made on an image of another size, if it was."""
    if told == size:
        return None
    text = f"{name} has {size[0]} x {size[1]} pixels, its annotation is of {told[0]} x {told[1]}"
    return "other_size", f"{text}; it is left out"


def rows_of_split(split: str, count: int) -> slice:
    """The examples of a slice such as "val[:100]" or "val[10%:]", as TFDS counts them.

    Args:
        split: as given.
        count: how many examples the whole split has.

    Returns:
        The slice, not empty.

    Raises:
        ValueError: a slice of another form, or without any example.
    """
    whole = dataclasses.make_dataclass("Whole", ["num_examples"])(count)
    _, bracket, rest = split.partition("[")
    try:  # by another name: "all" means something of its own to TFDS
        wanted = tfds.core.ReadInstruction.from_spec(f"split{bracket}{rest}")
        (part,) = wanted.to_absolute({"split": whole})
    except ValueError as error:
        raise ValueError(f"split {split!r}: {' '.join(str(error).split())}") from error
    rows = slice(*slice(part.from_, part.to).indices(count))
    if rows.start >= rows.stop:
        raise ValueError(f"split {split!r} holds no image")
    return rows


def split_name(split: str) -> str:
    """The name in front of a slice; a ValueError for a sum of splits."""
    if "+" in split:
        raise ValueError(f"split {split!r}: a folder is read one split at a time")
    return split.partition("[")[0].strip()

"""Precomputed patch boxes, in the layout of Focus Longer's authors, as a field of the examples.

A folder holds `<split>_patches.npy`, [images, p, 5], each row (y0, y1, x0, x1, label), half-open,
in pixels of the image squashed to 448 x 448. Row i belongs to image i of a folder of classes, with
the files sorted by their paths. A prepared set keeps another order, so rows are found by the name
of the file, the field `file_name` (TFDS: `image/filename`); the label says whether rightly.

Source: Shroff, Chen, Wei, Wang, "Focus Longer to See Better", CVPR Workshops 2020; layout as in the
authors' published arrays.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnzoom_jax.data.source import Source, data_root, open_builder, open_source

SIDE = 448  # of the image in which the boxes are given
FILE_NAMES = ("file_name", "image/filename")  # the field, of our sets and of TFDS's


def add_boxes(source: Source, data: Any, *, split: str) -> Source:
    """Give the examples of a split their boxes.

    Args:
        source: the split.
        data: the config's `data` section, with `data.patches`.
        split: what was opened, such as "train" or "train[:90%]".

    Returns:
        The source with the field `boxes`, float32 [p, 4], (y0, x0, y1, x1) in pixels of the
        squashed image.

    Raises:
        ValueError: images that are not squashed or have no file names, a sum of splits, a file of
            boxes that is missing, of another layout or of another set, or a box that leaves the
            image.
    """
    if data.resize != "squash" or data.crop_size:
        raise ValueError(
            f"data.patches are boxes in squashed images; set data.resize to squash (it is "
            f"{data.resize!r}) and data.crop_size to 0 (it is {data.crop_size})"
        )
    base = split.partition("[")[0]
    if "+" in split:
        raise ValueError(f"data.patches: expected one split or a slice of one, not {split!r}")
    features: Any = open_builder(data.name, data_root(data.dir)).info.features
    field = next((field for field in FILE_NAMES if field in features), None)
    if field is None:
        raise ValueError(
            f"data.patches: images of {data.name} have no file names, by which boxes are found; "
            f"expected a field {' or '.join(FILE_NAMES)}, there is: {', '.join(sorted(features))}"
        )

    def names_of(split: str) -> list[tuple[str, int]]:
        names = open_source(data.name, split=split, data_dir=data.dir, fields=(field, "label"))
        return [(_text(example[field]), int(example["label"])) for example in names]

    file = pathlib.Path(data.patches).expanduser() / f"{base}_patches.npy"
    names = names_of(split)
    whole = names if split == base else names_of(base)
    boxes = read_boxes(file, sorted(whole, key=lambda name: name[0].split("/")))
    rows = [boxes[name] * np.float32(data.image_size / SIDE) for name, _ in names]
    return dataclasses.replace(source, examples=_WithBoxes(source.examples, rows))


def extra_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with beside the images: `boxes`, where the batch has them."""
    return {"boxes": batch["boxes"]} if "boxes" in batch else {}


def read_boxes(file: pathlib.Path, examples: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
    """The boxes of every image.

    Args:
        file: .npy, [n, p, 5] as the top of this file says.
        examples: (path, label) of all images of the split, sorted.

    Returns:
        {path: float32 [p, 4]}, (y0, x0, y1, x1) in pixels of the image at 448 x 448.

    Raises:
        ValueError: no such file, or one of another layout, set, or with a box outside of the image.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as an array of boxes: {error}") from error
    if array.ndim != 3 or array.shape[2] != 5 or array.shape[1] < 1:
        raise ValueError(
            f"{file} has shape {list(array.shape)}; expected [images, boxes, 5] with the columns "
            "y0, y1, x0, x1, label"
        )
    if len(array) != len(examples):
        raise ValueError(f"{file} has boxes of {len(array)} images, the split has {len(examples)}")
    labels = np.array([label for _, label in examples])
    wrong = np.flatnonzero((array[:, :, 4] != labels[:, None]).any(axis=1))
    if len(wrong):
        path, label = examples[wrong[0]]
        raise ValueError(
            f"{file}: row {wrong[0]} has the label {array[wrong[0], 0, 4]:g}, its image {path} the "
            f"label {label}; the boxes are of another set, or in another order"
        )
    y0, y1, x0, x1 = (array[:, :, column] for column in range(4))
    is_inside = (y0 >= 0) & (x0 >= 0) & (y0 < y1) & (x0 < x1) & (y1 <= SIDE) & (x1 <= SIDE)
    outside = np.argwhere(~is_inside)
    if len(outside):
        row, box = outside[0]
        raise ValueError(
            f"{file}: box {box} of row {row} ({examples[row][0]}) is "
            f"{[float(value) for value in array[row, box, :4]]}, expected "
            f"0 <= y0 < y1 <= {SIDE} and 0 <= x0 < x1 <= {SIDE}"
        )
    boxes = np.stack([y0, x0, y1, x1], axis=-1).astype(np.float32)
    return {path: row for (path, _), row in zip(examples, boxes, strict=True)}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class _WithBoxes(Sequence[dict[str, Any]]):
    examples: Sequence[dict[str, Any]]
    boxes: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {**self.examples[index], "boxes": self.boxes[index]}

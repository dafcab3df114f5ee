"""Cues, pairs of an image and a class that is annotated on it, in batches that a network takes.

Images keep their own sizes: each is resized whole, never cropped, and the truth stays in pixels of
the image as it is stored. Images of one input size form batches, the last one of them padded.
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from attnzoom_jax.data.pipeline import resize_image
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.metrics import pointing_game
from attnzoom_jax.ops import boxes as ops_boxes

MODES = ("none", "squash", "short_side")
CANVAS = 64  # canvases and numbers of boxes are rounded up, so that few programs are compiled
BOXES = 8

Batch = dict[str, np.ndarray]
Problem = tuple[str, str]  # kind, what and where


@dataclasses.dataclass(frozen=True)
class InputSize:
    """The size at which a network sees an image, whole.

    Attributes:
        mode: "none", as it is; "squash" to [size, size] whatever the aspect; "short_side": the
            shorter side to `size`, for networks that take any size.
        size: in pixels.
        multiple: with "short_side", the longer side is rounded to a multiple of this, so that few
            programs are compiled; 1 keeps the aspect to the pixel.
    """

    mode: str = "none"
    size: int = 0
    multiple: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("resize mode", self.mode, MODES)
        if self.mode != "none" and self.size < 1:
            raise ValueError(f"resize mode {self.mode!r} needs a size in pixels, not {self.size}")
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}; expected 1 or more pixels")

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the input for an image of this size."""
        if self.mode == "none":
            return height, width
        if self.mode == "squash":
            return self.size, self.size
        sides = []
        for side in (height, width):
            exact = side * self.size / min(height, width)
            rounded = self.multiple * round(exact / self.multiple)
            sides.append(self.size if side == min(height, width) else max(self.size, rounded))
        return sides[0], sides[1]


@dataclasses.dataclass(frozen=True)
class Cue:
    """A class to be found in an image.

    Attributes:
        place: of the image in the split.
        name: of the image.
        image: uint8 [h, w, 3], as large as the network sees it.
        size: (height, width) of the image as it is stored, in pixels.
        class_id: of the data set.
        outputs: of the network that stand for the class, int [m].
        boxes: float32 [p, 4], of the class, in pixels of the stored image.
        mask: bool, of the stored image, where the class lies; None where the boxes say it.
        is_difficult: whether the cue belongs to the difficult subset.
    """

    place: int
    name: str
    image: np.ndarray
    size: tuple[int, int]
    class_id: int
    outputs: np.ndarray
    boxes: np.ndarray
    mask: np.ndarray | None
    is_difficult: bool


def read_cues(
    source: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    *,
    class_names: Sequence[str],
    outputs: Sequence[np.ndarray],
    input_size: InputSize,
    difficult: Mapping[str, np.ndarray] | None = None,
    num_threads: int = 4,
) -> tuple[list[Cue], list[Problem]]:
    """The cues of some images, and what is wrong with the images.

    Args:
        source: examples as of `data.annotated.open_annotated`.
        places: of the images in it.
        class_names: of the data set.
        outputs: per class of the data set, the outputs of the network that stand for it.
        input_size: at which the network sees them.
        difficult: {name of an image, or that without its ending: bool [k]}, of a published list;
            None: by the rule.
        num_threads: that read and decode.

    Returns:
        The cues, in the order of the images and then of the classes; (kind, text) for everything
        that was cut, left out or not asked about.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
        examples = list(pool.map(source.__getitem__, places))
    cues, problems = [], []
    for place, example in zip(places, examples, strict=True):
        found, wrong = _cues_of(place, example, class_names, outputs, input_size, difficult)
        cues += found
        problems += wrong
    return cues, problems


def _cues_of(
    place: int,
    example: Mapping[str, Any],
    class_names: Sequence[str],
    outputs: Sequence[np.ndarray],
    input_size: InputSize,
    difficult: Mapping[str, np.ndarray] | None,
) -> tuple[list[Cue], list[Problem]]:
    name, labels = str(example["name"]), np.asarray(example["labels"])
    problems = [(kind, text) for kind, text in example["problems"]]
    if not len(labels):
        return [], [*problems, ("no_cue", f"{name}: no class is annotated")]
    image = example["image"]
    size = image.shape[:2]
    of_class = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
    masks = {c: _union(example, rows, size) for c, rows in of_class.items()}
    if difficult is None:
        is_difficult = pointing_game.difficult_cues(masks)
    else:  # published lists leave the ending out
        flags = difficult.get(name, difficult.get(name.rpartition(".")[0]))
        if flags is None:
            problems.append(("not_in_the_list", f"{name}: all its classes count as difficult"))
            flags = np.ones(len(class_names), bool)  # as in TorchRay
        is_difficult = {c: bool(flags[c]) for c in masks}
    asked = pointing_game.cued_classes(labels, np.asarray(example["is_hard"]))
    problems += [
        ("hard_class", f"{name}: every {class_names[c]} is marked as difficult")
        for c in masks
        if c not in asked
    ]
    cues, seen = [], None
    for c in asked.tolist():
        if not len(outputs[c]):
            problems.append(("class_without_output", f"{name}: {class_names[c]}"))
            continue
        seen = resize_image(image, input_size(*size)) if seen is None else seen
        cues.append(
            Cue(
                place=place,
                name=name,
                image=seen,
                size=(size[0], size[1]),
                class_id=c,
                outputs=outputs[c],
                boxes=np.asarray(example["boxes"], np.float32)[of_class[c]],
                mask=masks[c] if "masks" in example else None,
                is_difficult=is_difficult[c],
            )
        )
    return cues, problems


def _union(example: Mapping[str, Any], rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where the annotations of one class lie, bool [h, w]."""
    if "masks" in example:
        return np.any(example["masks"][rows], axis=0)
    return ops_boxes.to_mask(np.asarray(example["boxes"], np.float32)[rows], size)


def cue_batches(cues: Sequence[Cue], *, batch_size: int, num_outputs: int) -> Iterator[Batch]:
    """Cues in batches of one input size each.

    Args:
        cues: of any sizes.
        batch_size: of all batches.
        num_outputs: k, of the network.

    Yields:
        `cue` int [n], places in `cues`; `mask` [n], 0 for padding, which repeats a cue; `image`
        uint8 [n, h, w, 3]; `place` int [n], of the image in the split; `outputs` bool [n, k];
        `size` int [n, 2]; `boxes` float32 [n, p, 4] with empty ones behind; and, where the cues
        have masks, `truth` bool [n, H, W], H and W at least the largest of the sizes.
    """
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, cue in enumerate(cues):
        shapes.setdefault(cue.image.shape, []).append(i)
    for rows in shapes.values():
        for start in range(0, len(rows), batch_size):
            own = rows[start : start + batch_size]
            padded = np.array(own + own[-1:] * (batch_size - len(own)))
            yield {
                "cue": padded,
                "mask": (np.arange(batch_size) < len(own)).astype(np.float32),
                **_stack([cues[i] for i in padded], num_outputs),
            }


def _stack(cues: Sequence[Cue], num_outputs: int) -> Batch:
    most = max(len(cue.boxes) for cue in cues)
    boxes = np.zeros((len(cues), BOXES * -(-most // BOXES), 4), np.float32)
    outputs = np.zeros((len(cues), num_outputs), bool)
    for i, cue in enumerate(cues):
        boxes[i, : len(cue.boxes)] = cue.boxes
        outputs[i, cue.outputs] = True
    batch = {
        "place": np.array([cue.place for cue in cues], np.int32),
        "image": np.stack([cue.image for cue in cues]),
        "outputs": outputs,
        "size": np.array([cue.size for cue in cues], np.int32),
        "boxes": boxes,
    }
    if cues[0].mask is not None:
        batch["truth"] = np.zeros((len(cues), *canvas_of(batch["size"])), bool)
        for own, cue in zip(batch["truth"], cues, strict=True):
            assert cue.mask is not None
            own[: cue.size[0], : cue.size[1]] = cue.mask
    return batch


def canvas_of(sizes: np.ndarray) -> tuple[int, int]:
    """(height, width) of an array that holds images of these sizes [n, 2]."""
    height, width = (CANVAS * -(-int(side) // CANVAS) for side in sizes.max(axis=0))
    return height, width

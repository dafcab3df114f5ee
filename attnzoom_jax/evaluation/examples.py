"""Images to explain: the first of a split, chosen ones, chunks of a whole split, or files."""

import dataclasses
import glob
import itertools
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from attnzoom_jax.data.augment import center_crop
from attnzoom_jax.data.image_file import read_image
from attnzoom_jax.data.pipeline import Resize
from attnzoom_jax.data.source import data_root, open_builder
from attnzoom_jax.data.split import LABELS, labels_of
from attnzoom_jax.evaluation.maps import map_function, say_progress
from attnzoom_jax.evaluation.restore import TrainedModel

BOXES = ("box", "bbox")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images to explain.

    Attributes:
        names: one per image, for files.
        images: uint8 [n, h, w, 3], as the model takes them.
        labels: class ids, -1 where unknown; or attributes, float [n, a], 0 or 1.
        rejected: files that are no images.
        masks: {field of the data set: bool [n, h, w]}, true inside; only where asked for.
    """

    names: list[str]
    images: np.ndarray
    labels: np.ndarray
    rejected: list[str]
    masks: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int]) -> "Examples":
        """Some of them, in the order of the indices."""
        rows = np.asarray(indices, int)
        return Examples(
            names=[self.names[i] for i in rows],
            images=self.images[rows],
            labels=self.labels[rows],
            rejected=self.rejected,
            masks={name: mask[rows] for name, mask in self.masks.items()},
        )


def in_chunks(examples: Examples, chunk_size: int = 32) -> Iterator[Examples]:
    """All of them, some at a time."""
    for start in range(0, len(examples), chunk_size):
        yield examples.take(range(len(examples))[start : start + chunk_size])


def join(parts: Sequence[Examples]) -> Examples:
    """Several lots as one; at least one lot, all with the same masks."""
    return Examples(
        names=[name for part in parts for name in part.names],
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        rejected=list(dict.fromkeys(path for part in parts for path in part.rejected)),
        masks={name: np.concatenate([p.masks[name] for p in parts]) for name in parts[0].masks},
    )


def from_split(trained: TrainedModel, split: str, count: int) -> Examples:
    """The first images of a split, cropped as evaluation crops them."""
    return next(chunks_of_split(trained, split, chunk_size=count)[1])


def chunks_of_split(
    trained: TrainedModel,
    split: str,
    *,
    chunk_size: int = 32,
    masks: Sequence[str] = (),
    most: int = 0,
) -> tuple[int, Iterator[Examples]]:
    """A split in chunks, cropped as evaluation crops it.

    Args:
        trained: the model, with its data set.
        split: of the data set.
        chunk_size: images per chunk; the last one may be smaller.
        masks: fields from `mask_fields`.
        most: images, at even distances in a split that has more; 0: all of it.

    Returns:
        The number of images, and the chunks; each is read when it is asked for.

    Raises:
        ValueError: data set not prepared, unknown split or field.
    """
    data = trained.config.data
    fields = ("image", "label", *masks)
    open_labelled = LABELS[labels_of(data)]
    source = open_labelled(data.name, split=split, data_dir=data.dir, fields=fields)
    resize = Resize(data.resize, data.image_size)

    def read(indices: Sequence[int]) -> Examples:
        examples = [source[i] for i in indices]
        inside = {
            name: [resize(_inside(name, e[name], e["image"]), is_mask=True) for e in examples]
            for name in masks
        }
        images = np.stack([resize(example["image"]) for example in examples])
        size = data.crop_size or None
        return Examples(
            names=[f"{split}_{i:05d}" for i in indices],
            images=center_crop(images, size=size),
            labels=np.array([example["label"] for example in examples]),
            rejected=[],
            masks={k: center_crop(np.stack(v), size=size)[..., 0] > 0 for k, v in inside.items()},
        )

    count = min(most or len(source), len(source))
    whole = [i * len(source) // count for i in range(count)]
    starts = range(0, count, chunk_size)
    return count, (read(whole[start : start + chunk_size]) for start in starts)


def mask_fields(trained: TrainedModel) -> list[str]:
    """The fields of the run's data set that say where the object is.

    Masks are those called `..._mask` of shape [h, w, 1], above 0 inside; boxes those called `box`
    ([y0, x0, y1, x1] half-open, in pixels) or `bbox` (TFDS's, as shares of the image).
    """
    data = trained.config.data
    features: Any = open_builder(data.name, data_root(data.dir)).info.features
    return [
        name
        for name, feature in features.items()
        if (name.endswith("_mask") and len(feature.shape) == 3 and feature.shape[2] == 1)
        or (name in BOXES and tuple(feature.shape) == (4,))
    ]


def _inside(field: str, value: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A mask, or a box as one: uint8 [h, w, 1], above 0 inside."""
    if value.ndim == 3:
        return value
    h, w, _ = image.shape
    y0, x0, y1, x1 = value * np.array([h, w, h, w]) if field == "bbox" else value
    # A pixel is inside where its centre is.
    rows, columns = np.arange(h)[:, None] + 0.5, np.arange(w) + 0.5
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    return inside[..., None].astype(np.uint8)


def from_files(
    trained: TrainedModel, pattern: str, *, reserved: Collection[str] = ("contact_sheet",)
) -> Examples:
    """Image files, resized as the run resizes images; a file that is no image is named.

    A run that does not resize has images of one size: there the files are squashed to it.

    Args:
        trained: the model.
        pattern: of paths.
        reserved: names that no image may have.

    Returns:
        The images, without labels.

    Raises:
        ValueError: no file, or none that is an image.
    """
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise ValueError(f"--images={pattern!r} matches no file")
    data, (h, w, _) = trained.config.data, trained.image_shape
    resize = Resize(data.resize, data.image_size)
    names, images, rejected = [], [], []
    for path in paths:
        try:
            image = read_image(path)
        except ValueError as error:
            print(f"left out: {error}", flush=True)
            rejected.append(path)
            continue
        if data.resize == "none":
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        else:
            image = center_crop(resize(image)[None], size=data.crop_size or None)[0]
        stem = pathlib.Path(path).stem
        names.append(_unused(stem, {*names, *reserved}))
        images.append(image)
    if not images:
        raise ValueError(f"none of the {len(paths)} files of --images={pattern!r} is an image")
    return Examples(names, np.stack(images), np.full(len(images), -1), rejected)


def _unused(name: str, used: set[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is not used."""
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in used)


def target_ids(target: str, examples: Examples, class_names: Sequence[str]) -> np.ndarray:
    """Ids of classes or attributes to explain; -1 stands for the predicted, strongest one.

    Args:
        target: "predicted", "label", a name or an id.
        examples: the images.
        class_names: of the model.

    Returns:
        int [n].

    Raises:
        ValueError: something else, or labels where there are none, or several per image.
    """
    if target == "predicted":
        return np.full(len(examples), -1)
    if target == "label" and examples.labels.ndim == 2:
        raise ValueError(
            f"--class=label: an image has several attributes; name one, such as {class_names[0]}"
        )
    if target == "label":
        if (examples.labels < 0).any():
            raise ValueError("--class=label needs labelled images; files have none")
        return examples.labels
    if not target.isdigit() and target in class_names:  # a number is always an id
        return np.full(len(examples), class_names.index(target))
    if not target.isdigit() or int(target) >= len(class_names):
        raise ValueError(
            f"--class={target!r}: expected predicted, label, or a class id below "
            f"{len(class_names)}, or a name, such as {class_names[0]}"
        )
    return np.full(len(examples), int(target))


def right_and_wrong(
    trained: TrainedModel, split: str, count: int, *, chunk_size: int = 32
) -> Examples:
    """The first images of a split that a model gets right, then the first that it gets wrong.

    Args:
        trained: the model.
        split: of the data set.
        count: of each kind, at most; the split is read until both are found.
        chunk_size: images per call of the program.

    Returns:
        The images; prints how many of the split were looked at.

    Raises:
        ValueError: as `chunks_of_split`.
    """
    predictions_of = map_function(trained, methods=(), chunk_size=chunk_size)
    found: dict[bool, list[Examples]] = {True: [], False: []}
    total, chunks = chunks_of_split(trained, split, chunk_size=chunk_size)
    looked_at = 0
    for chunk in say_progress(chunks, total, chunk_size):
        predicted = predictions_of(chunk.images, chunk.labels, looked_at)["predicted"]
        looked_at += len(chunk)
        for i, is_right in enumerate(predicted == chunk.labels):
            if len(found[is_right]) < count:
                found[is_right].append(chunk.take([i]))
        if all(len(lot) == count for lot in found.values()):
            break
    right, wrong = found[True], found[False]
    print(f"{len(right)} right and {len(wrong)} wrong of the first {looked_at} images of {split}")
    return join([*right, *wrong])

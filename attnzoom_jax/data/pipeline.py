"""Batches on the host: the global batch is a pure function of (seed, step).

One order of the examples, a new permutation for each epoch, is cut into global batches; process r
of P holds the r-th of P equal parts of each. So the parts of all processes, one after the other,
are the batch that one process alone would see, and a run resumes from its step alone. Grain reads
ahead in threads. Images stay uint8: augmentation and normalisation run on the device (augment.py).
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import grain
import numpy as np

from attnzoom_jax.data.source import Source, as_array
from attnzoom_jax.errors import unknown_name

RESIZE_MODES = ("none", "squash", "crop")
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Resize:
    """How images become one size on the host.

    Attributes:
        mode: "none"; "squash" to [size, size] whatever the aspect; "crop": the shorter side to
            `size`, then the central square.
        size: in pixels.
    """

    mode: str = "none"
    size: int = 0

    def __post_init__(self) -> None:
        if self.mode not in RESIZE_MODES:
            raise unknown_name("resize mode", self.mode, RESIZE_MODES)
        if self.mode != "none" and self.size < 1:
            raise ValueError(f"resize mode {self.mode!r} needs a size in pixels, not {self.size}")

    def __call__(self, image: np.ndarray, *, is_mask: bool = False) -> np.ndarray:
        """Resize one image or mask.

        Args:
            image: uint8 [h, w, c], or for masks also uint16.
            is_mask: see `resize_image`.

        Returns:
            [size, size, c], the dtype of image; in mode "none" the image itself.
        """
        if self.mode == "none":
            return image
        h, w, _ = image.shape
        rows = columns = self.size
        if self.mode == "crop":
            scale = self.size / min(h, w)
            rows, columns = max(self.size, round(h * scale)), max(self.size, round(w * scale))
        image = resize_image(image, (rows, columns), is_mask=is_mask)
        top, left = (rows - self.size) // 2, (columns - self.size) // 2
        return image[top : top + self.size, left : left + self.size]


def resize_image(image: np.ndarray, size: tuple[int, int], *, is_mask: bool = False) -> np.ndarray:
    """Resize one image or mask on the host.

    Args:
        image: uint8 [h, w, c], or for masks also uint16.
        size: (height, width) of the result, in pixels.
        is_mask: take the nearest pixel, so that no new values arise. Else: pixel areas along an
            axis that shrinks, linear interpolation along one that grows.

    Returns:
        [height, width, c], the dtype of image.
    """
    h, w, c = image.shape
    rows, columns = size
    if is_mask:  # _EXACT: cv2.INTER_NEAREST itself is half a pixel off
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_NEAREST_EXACT)
    else:
        smaller = (min(w, columns), min(h, rows))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    return image.reshape(rows, columns, c)  # OpenCV drops a single channel


def example_order(positions: np.ndarray, *, num_examples: int, seed: int) -> np.ndarray:
    """What stands at these positions of the endless order of training examples.

    Args:
        positions: int [p], from 0; epoch e is positions e * num_examples and following.
        num_examples: of the split.
        seed: of the order, 0 or more.

    Returns:
        Indices of examples, int32 [p]. Each epoch is another permutation.

    Raises:
        ValueError: negative seed.
    """
    epochs = positions // num_examples
    indices = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        permutation = _permutation(num_examples, seed, int(epoch))
        indices[here] = permutation[positions[here] % num_examples]
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    if seed < 0:
        raise ValueError(f"seed {seed} must be 0 or more")
    # NumPy promises these raw numbers for ever, unlike the results of Generator.permutation: a run
    # that resumes with another NumPy sees the same order.
    numbers = np.random.PCG64([seed, epoch]).random_raw(num_examples)
    return np.argsort(numbers, kind="stable").astype(np.int32)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    resize: Resize | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[Batch]:
    """This process's parts of the training batches from `start_step` on, without end.

    A batch may reach over the end of an epoch: no example is dropped.

    Args:
        source: training split.
        batch_size: examples of a global batch; a multiple of process_count.
        seed: of the order, 0 or more.
        start_step: number of global batches that were already used.
        resize: how images become one size; None leaves them.
        process_index: rank of this process.
        process_count: number of processes.
        num_threads: reading and decoding threads; 0 reads when a batch is asked for.

    Returns:
        Iterator of {field: array [batch_size / process_count, ...]}.

    Raises:
        ValueError: batch_size is not divisible by process_count, or larger than the split; negative
            seed; images of several sizes and no resize. While iterating: an unreadable example.
    """
    part = _part_size(batch_size, process_count)
    check_train_batch(len(source), batch_size=batch_size, seed=seed, name=source.name)
    load = _Loader(source, resize or Resize())

    def load_batch(step: int) -> Batch:
        positions = step * batch_size + process_index * part + np.arange(part)
        indices = example_order(positions, num_examples=len(source), seed=seed)
        return _stack([load(int(index)) for index in indices])

    return _read_ahead(load_batch, start_step, sys.maxsize, num_threads)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    resize: Resize | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[Batch]:
    """This process's parts of the evaluation batches: every example once, the last batch padded.

    Args:
        source: evaluation split.
        batch_size: examples of a global batch; a multiple of process_count.
        resize: how images become one size; None leaves them.
        process_index: rank of this process.
        process_count: number of processes.
        num_threads: reading and decoding threads; 0 reads when a batch is asked for.

    Returns:
        Iterator of {field: array [batch_size / process_count, ...]} with the further field `mask`,
        float32: 1 for a real example, 0 for padding, where every other field is 0 as well.

    Raises:
        ValueError: batch_size is not divisible by process_count; images of several sizes and no
            resize. While iterating: an unreadable example.
    """
    part = _part_size(batch_size, process_count)
    load = _Loader(source, resize or Resize())
    num_batches = -(-len(source) // batch_size)
    blank: dict[str, np.ndarray] = {}
    if len(source) % batch_size:
        blank = {name: np.zeros_like(value) for name, value in load(0).items()}

    def load_batch(step: int) -> Batch:
        start = step * batch_size + process_index * part
        is_real = np.arange(start, start + part) < len(source)
        examples = [load(start + i) if real else blank for i, real in enumerate(is_real)]
        return {**_stack(examples), "mask": is_real.astype(np.float32)}

    return _read_ahead(load_batch, 0, num_batches, num_threads)


def check_train_batch(num_examples: int, *, batch_size: int, seed: int, name: str) -> None:
    """Raise a ValueError for a batch larger than the split, or a negative seed."""
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"batch_size {batch_size} is not in 1..{num_examples}, what {name} holds")
    if seed < 0:
        raise ValueError(f"seed {seed} must be 0 or more")


def check_one_size(source: Source, resize: Resize) -> None:
    """Raise a ValueError for images that differ in size and are not resized."""
    if resize.mode == "none" and None in source.image_shape:
        raise ValueError(
            f"the images of {source.name} differ in size; set data.resize to squash or crop, and "
            "data.image_size"
        )


@dataclasses.dataclass(frozen=True)
class _Loader:
    source: Source
    resize: Resize

    def __post_init__(self) -> None:
        check_one_size(self.source, self.resize)

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        example: Mapping[str, Any] = self.source[index]
        return {name: self._field(name, as_array(value)) for name, value in example.items()}

    def _field(self, name: str, value: np.ndarray) -> np.ndarray:
        # Beside the image, [h, w, c] is a mask, or ids that must not be mixed.
        return self.resize(value, is_mask=name != "image") if value.ndim == 3 else value


def _stack(examples: list[dict[str, np.ndarray]]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _read_ahead(
    load_batch: Callable[[int], Batch], start: int, stop: int, num_threads: int
) -> Iterator[Batch]:
    """The batches start..stop-1, in order, made in threads before they are asked for."""
    # One batch more per thread than it works on: enough, and little memory for large images.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(grain.MapDataset.range(start, stop).map(load_batch).to_iter_dataset(options))


def _part_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
        )
    return batch_size // process_count

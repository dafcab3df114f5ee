"""Batches on the host: the global batch is a pure function of (seed, step).

Grain shuffles each epoch by the seed; process r of P takes the examples r, r + P, r + 2P, ... of
that one order, so any number of processes sees the same global batches, and a run resumes from its
step alone. Images stay uint8: augmentation and normalisation run on the device (augment.py).
"""

import dataclasses
from collections.abc import Iterator, Mapping
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
        """Resize one image or mask [h, w, c] (masks by nearest neighbour)."""
        if self.mode == "none":
            return image
        h, w = image.shape[:2]
        scale = self.size / min(h, w)
        size = (self.size, self.size)
        if self.mode == "crop":
            size = (max(self.size, round(w * scale)), max(self.size, round(h * scale)))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if is_mask else method)
        top, left = (resized.shape[0] - self.size) // 2, (resized.shape[1] - self.size) // 2
        return resized[top : top + self.size, left : left + self.size].reshape(
            self.size, self.size, image.shape[2]
        )


def example_order(num_examples: int, seed: int) -> grain.MapDataset:
    """The endless order of training examples: each epoch a new permutation, by the seed."""
    return grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat()


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
    """This process's slices of the training batches from `start_step` on, without end.

    Args:
      source: training split.
      batch_size: examples of a global batch; a multiple of process_count.
      seed: of the order.
      start_step: number of global batches that were already used.
      resize: how images become one size; None leaves them.
      process_index: rank of this process.
      process_count: number of processes.
      num_threads: reading and decoding threads.

    Returns:
      Iterator of {field: array [batch_size / process_count, ...]}.

    Raises:
      ValueError: batch_size is not divisible by process_count, or larger than the split.
    """
    _check_divisible(batch_size, process_count)
    if batch_size > len(source):
        raise ValueError(
            f"batch_size {batch_size} exceeds the {len(source)} examples of {source.name}"
        )
    order = example_order(len(source), seed)[
        start_step * batch_size + process_index :: process_count
    ]
    load = _Loader(source, resize or Resize())
    batches = order.map(lambda index: load(int(index))).batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(_read_options(num_threads)))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    resize: Resize | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[Batch]:
    """This process's slices of the evaluation batches: every example once, the last batch padded.

    Args:
      source: evaluation split.
      batch_size: examples of a global batch; a multiple of process_count.
      resize: how images become one size; None leaves them.
      process_index: rank of this process.
      process_count: number of processes.
      num_threads: reading and decoding threads.

    Returns:
      Iterator of {field: array [batch_size / process_count, ...]} with the further field `mask`,
      1.0 for a real example and 0.0 for padding.

    Raises:
      ValueError: batch_size is not divisible by process_count.
    """
    _check_divisible(batch_size, process_count)
    padded = -(-len(source) // batch_size) * batch_size
    load = _Loader(source, resize or Resize())

    def load_or_pad(index: int) -> dict[str, np.ndarray]:
        is_real = index < len(source)
        example = load(int(index) if is_real else 0)
        return {**example, "mask": np.float32(is_real)}

    order = grain.MapDataset.range(padded)[process_index::process_count]
    batches = order.map(load_or_pad).batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(_read_options(num_threads)))


@dataclasses.dataclass(frozen=True)
class _Loader:
    source: Source
    resize: Resize

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        example: Mapping[str, Any] = self.source[index]
        return {name: self._field(name, as_array(value)) for name, value in example.items()}

    def _field(self, name: str, value: np.ndarray) -> np.ndarray:
        if value.ndim != 3:
            return value
        return self.resize(value, is_mask=name.endswith("_mask"))


def _read_options(num_threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * max(1, num_threads))


def _check_divisible(batch_size: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
        )

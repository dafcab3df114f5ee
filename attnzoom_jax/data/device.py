"""The second data path: a whole split on the device as uint8, for sets that fit there.

Batches are gathered inside the jitted program by the indices of `pipeline.example_order`, the order
that the host path follows: both paths see the same batches.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from attnzoom_jax.data.pipeline import (
    Batch,
    Resize,
    check_train_batch,
    eval_batches,
    example_order,
)
from attnzoom_jax.data.source import Source


def load_split(source: Source, *, resize: Resize | None = None, num_threads: int = 4) -> Batch:
    """Read a whole split into memory.

    Args:
        source: the split.
        resize: how images become one size; None leaves them.
        num_threads: reading threads.

    Returns:
        {field: array [number of examples, ...]} in the stored order.

    Raises:
        ValueError: images of several sizes and no resize, or an unreadable example.
    """
    size = min(256, len(source))
    batches = eval_batches(source, batch_size=size, resize=resize, num_threads=num_threads)
    split: Batch = {}
    for start, batch in zip(range(0, len(source), size), batches, strict=True):
        del batch["mask"]
        if not split:
            # Filled in place: kept until the end, the batches of a large set would double it.
            shapes = {name: (len(source), *column.shape[1:]) for name, column in batch.items()}
            split = {name: np.empty(shapes[name], batch[name].dtype) for name in batch}
        for name, column in batch.items():
            split[name][start : start + size] = column[: len(source) - start]
    return split


def index_batches(
    num_examples: int, *, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """The indices of the global training batches from `start_step` on, without end.

    Args:
        num_examples: of the split.
        batch_size: examples of a global batch, at most num_examples.
        seed: of the order, 0 or more.
        start_step: number of global batches that were already used.

    Returns:
        Iterator of int32 [batch_size].

    Raises:
        ValueError: batch_size larger than the split, or negative seed.
    """
    check_train_batch(num_examples, batch_size=batch_size, seed=seed, name="the split")
    return (
        example_order(
            step * batch_size + np.arange(batch_size), num_examples=num_examples, seed=seed
        )
        for step in itertools.count(start_step)
    )

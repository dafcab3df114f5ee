"""The second data path: a whole split on the device as uint8, for sets that fit there.

Batches are gathered inside the jitted program by the indices of `pipeline.example_order`, the order
that the host path follows: both paths see the same batches.
"""

from collections.abc import Iterator

import grain
import numpy as np

from attnzoom_jax.data.pipeline import Batch, Resize, eval_batches, example_order
from attnzoom_jax.data.source import Source


def load_split(source: Source, *, resize: Resize | None = None, num_threads: int = 4) -> Batch:
    """Read a whole split into memory.

    Args:
      source: the split.
      resize: how images become one size; None leaves them.
      num_threads: reading threads.

    Returns:
      {field: array [number of examples, ...]} in the stored order.
    """
    batches = list(eval_batches(source, batch_size=512, resize=resize, num_threads=num_threads))
    return {
        name: np.concatenate([batch[name] for batch in batches])[: len(source)]
        for name in batches[0]
        if name != "mask"
    }


def index_batches(
    num_examples: int, *, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """The indices of the global training batches from `start_step` on, without end.

    Args:
      num_examples: of the split.
      batch_size: examples of a global batch.
      seed: of the order.
      start_step: number of global batches that were already used.

    Returns:
      Iterator of int32 [batch_size].
    """
    batches = example_order(num_examples, seed)[start_step * batch_size :].batch(batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)
    return (np.asarray(batch, np.int32) for batch in batches.to_iter_dataset(options))

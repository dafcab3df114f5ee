"""A split as every evaluator needs it: each example once, as the model takes it, summed up."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax.data.augment import center_crop, normalize
from attnzoom_jax.data.patches import open_split
from attnzoom_jax.data.pipeline import Resize, eval_batches
from attnzoom_jax.training.sharding import check_batch_size, prefetch

Sums = dict[str, jax.Array]


class EvalSplit:
    """Runs a function over the batches of a split and adds up what it returns.

    Args:
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        fields: of the data set, `image` among them.
        batch_sums: (variables, batch) -> {name: sum over the batch}; a pure function, jitted here.
            `batch["mask"]` is 1 for real examples and 0 for padding, which must count nothing.

    Raises:
        ValueError: data set not prepared, unknown split or field, a batch size that does not fit.
    """

    def __init__(
        self,
        *,
        data: Any,
        split: str,
        mesh: Mesh,
        fields: Sequence[str],
        batch_sums: Callable[[Any, dict[str, jax.Array]], Sums],
    ) -> None:
        check_batch_size(data.eval_batch_size, mesh, key="data.eval_batch_size")
        self._data, self._mesh = data, mesh
        self._source = open_split(data, split=split, fields=fields)

        def add(sums: Sums, variables: Any, batch: dict[str, jax.Array]) -> Sums:
            return jax.tree.map(jnp.add, sums, batch_sums(variables, batch))

        self._batch_sums, self._add = batch_sums, jax.jit(add)

    def run(self, variables: Any) -> dict[str, Any]:
        """The sums over the whole split, on the host."""
        batches = eval_batches(
            self._source,
            batch_size=self._data.eval_batch_size,
            resize=Resize(self._data.resize, self._data.image_size),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self._data.num_threads,
        )
        sums = None
        for batch in prefetch(batches, self._mesh):
            if sums is None:  # zeros, so that one compiled program serves every batch
                shapes = jax.eval_shape(self._batch_sums, variables, batch)
                sums = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            sums = self._add(sums, variables, batch)
        return jax.device_get(sums)


def to_input(images: jax.Array, data: Any) -> jax.Array:
    """Images as the model takes them outside of training: the central crop, normalised.

    Args:
        images: uint8 [n, h, w, c].
        data: the config's `data` section.

    Returns:
        float32 [n, h', w', c].
    """
    images = center_crop(images, size=data.crop_size or None)
    return normalize(images, mean=data.mean, std=data.std)

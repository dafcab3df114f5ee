"""A split as evaluators need it: each example once, as the model takes it, summed up or kept."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax.data.augment import center_crop, normalize
from attnzoom_jax.data.pipeline import Resize, eval_batches
from attnzoom_jax.data.source import Rows, Source
from attnzoom_jax.data.split import open_split
from attnzoom_jax.training.sharding import check_batch_size, prefetch, replicated

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
Change = Callable[[Source], Source] | None


class EvalSplit:
    """Runs a function over the batches of a split and adds up what it returns.

    Args:
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        fields: of the data set, `image` among them.
        batch_sums: (variables, batch) -> {name: sum over the batch}; a pure function, jitted here.
            `batch["mask"]` is 1 for real examples and 0 for padding, which must count nothing.

    Attributes:
        source: the split.
        batches: what goes once through the split, or through what a change makes of it.

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
        batch_sums: Callable[[Any, Batch], Sums],
    ) -> None:
        self.source, self.batches = open_batches(data, split, mesh, fields)

        def add(sums: Sums, variables: Any, batch: Batch) -> Sums:
            return jax.tree.map(jnp.add, sums, batch_sums(variables, batch))

        self._batch_sums = batch_sums
        self._add = jax.jit(add, out_shardings=replicated(mesh))  # each process reads them

    def run(self, variables: Any, change: Change = None) -> dict[str, Any]:
        """The sums over the whole split, on the host.

        Args:
            variables: of the model.
            change: of the split, such as a corruption of its images; None: as it is.

        Returns:
            {name: sum}.
        """
        sums = None
        for batch in self.batches(change):
            if sums is None:  # zeros, so that one compiled program serves every batch
                shapes = jax.eval_shape(self._batch_sums, variables, batch)
                sums = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            sums = self._add(sums, variables, batch)
        return jax.device_get(sums)


class EvalExamples:
    """Runs a function over the batches of a split and keeps what it returns of each example.

    For what is no sum, such as a ranking of all examples. The values of the whole split lie in
    memory, on every process: they should be few per example.

    Args:
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        fields: of the data set, `image` among them.
        outputs: (variables, batch) -> {name: [n, ...]}; a pure function, jitted here.

    Attributes:
        source: the split.

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
        outputs: Callable[[Any, Batch], dict[str, jax.Array]],
    ) -> None:
        self.source, self._batches = open_batches(data, split, mesh, fields)

        def with_mask(variables: Any, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
            return outputs(variables, batch), batch["mask"]

        # Whole on every device: a process could not read what lies on those of another one.
        self._outputs = jax.jit(with_mask, out_shardings=replicated(mesh))

    def run(self, variables: Any) -> dict[str, np.ndarray]:
        """{name: [number of examples, ...]}, on the host, in the order of the split."""
        parts = []
        for batch in self._batches():
            values, mask = jax.device_get(self._outputs(variables, batch))
            parts.append({name: value[mask > 0] for name, value in values.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def open_batches(
    data: Any, split: str, mesh: Mesh, fields: Sequence[str]
) -> tuple[Source, Callable[..., Iterator[Batch]]]:
    """A split, and what goes once through it or through what a change makes of it, in batches.

    Args:
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        fields: of the data set, `image` among them.

    Returns:
        The split, and `batches(change=None)` -> batches with `mask`, 0 for padding.

    Raises:
        ValueError: data set not prepared, unknown split or field, a batch size that does not fit.
    """
    check_batch_size(data.eval_batch_size, mesh, key="data.eval_batch_size")
    source = open_split(data, split=split, fields=fields)

    def batches(change: Change = None) -> Iterator[Batch]:
        local = eval_batches(
            change(source) if change else source,
            batch_size=data.eval_batch_size,
            resize=Resize(data.resize, data.image_size),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=data.num_threads,
        )
        return prefetch(local, mesh)

    return source, batches


def choose(source: Source, rows: np.ndarray) -> Source:
    """The examples of a split at some places."""
    return dataclasses.replace(source, examples=Rows(source.examples, rows))


def spread(size: int, count: int, key: str, name: str) -> np.ndarray:
    """Places at even distances, as the examples of a split may be sorted by class.

    Args:
        size: of the split.
        count: how many; 0 for all.
        key: of the config, for the error.
        name: of the split, for the error.

    Returns:
        int [count], rising.

    Raises:
        ValueError: a count below 0 or above the size.
    """
    if not 0 <= count <= size:
        raise ValueError(f"{key} is {count}; expected 0, for all, up to the {size} of {name}")
    count = count or size
    return np.arange(count) * size // count


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

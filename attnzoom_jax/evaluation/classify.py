"""Classification: top-1, top-5, cross-entropy and calibration error of a split."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from attnzoom_jax.data.augment import normalize
from attnzoom_jax.data.pipeline import Resize, eval_batches
from attnzoom_jax.data.source import open_source
from attnzoom_jax.metrics.classification import classification_metrics, classification_sums
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.training.sharding import prefetch


class Classify:
    """Evaluates a classifier on a split: every example counts exactly once.

    Args:
        model: images float [n, h, w, c] -> logits [n, k].
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
    """

    def __init__(self, model: nn.Module, *, data: Any, split: str, mesh: Mesh) -> None:
        self.split = split
        self._mesh, self._data = mesh, data
        self._source = open_source(data.name, split=split, data_dir=data.dir)

        def add_batch(sums: Any, variables: Any, batch: dict[str, jax.Array]) -> Any:
            images = normalize(batch["image"], mean=data.mean, std=data.std)
            logits = model.apply(variables, images, **train_argument(model, False))
            new = classification_sums(logits, batch["label"], batch["mask"])
            return new if sums is None else jax.tree.map(jnp.add, sums, new)

        self._add_batch = jax.jit(add_batch)

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate.

        Args:
            variables: of the model.

        Returns:
            {"<split>/top1", "<split>/top5", "<split>/calibration_error"} in [0, 1],
            {"<split>/cross_entropy"} in nats, {"<split>/count"}.
        """
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
            sums = self._add_batch(sums, variables, batch)
        metrics = classification_metrics(jax.device_get(sums))
        return {f"{self.split}/{name}": value for name, value in metrics.items()}

"""Classification: top-1, top-5, cross-entropy and calibration error of a split."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from attnzoom_jax.attribution.targets import class_scores
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.evaluation.split import EvalSplit, Sums, to_input
from attnzoom_jax.metrics.classification import classification_metrics, classification_sums
from attnzoom_jax.models.insert import train_argument

METRICS = ("top1", "top5", "cross_entropy", "calibration_error", "count")


class Classify:
    """Evaluates a classifier on a split: every example counts exactly once.

    Args:
        model: images float [n, h, w, c] -> logits [n, k], or [n, h', w', k] of every place, of
            which `attribution.targets.class_scores` makes one per class.
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        prefix: of the metrics' names; "" for the split.
    """

    def __init__(
        self, model: nn.Module, *, data: Any, split: str, mesh: Mesh, prefix: str = ""
    ) -> None:
        self.prefix = prefix or split
        self.metric_names = [f"{self.prefix}/{name}" for name in METRICS]

        def batch_sums(variables: Any, batch: dict[str, jax.Array]) -> Sums:
            images = to_input(batch["image"], data)
            inputs = {**extra_inputs(batch), **train_argument(model, False)}
            logits: Any = model.apply(variables, images, **inputs)
            return classification_sums(class_scores(logits), batch["label"], batch["mask"])

        self._split = EvalSplit(
            data=data, split=split, mesh=mesh, fields=("image", "label"), batch_sums=batch_sums
        )

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate.

        Args:
            variables: of the model.

        Returns:
            "<prefix>/top1", "<prefix>/top5", "<prefix>/calibration_error" in [0, 1],
            "<prefix>/cross_entropy" in nats, "<prefix>/count".
        """
        metrics = classification_metrics(self._split.run(variables))
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}

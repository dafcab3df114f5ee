"""Evaluators: each has `run(variables) -> {"split/metric": value}` and `metric_names`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from attnzoom_jax.data.split import labels_of
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.attributes import Attributes
from attnzoom_jax.evaluation.classify import Classify
from attnzoom_jax.evaluation.localize import Localize
from attnzoom_jax.evaluation.robustness import Robustness
from attnzoom_jax.models import with_transform
from attnzoom_jax.training.workdir import to_plain

_EVALUATORS = {
    "attributes": Attributes,
    "classify": Classify,
    "localize": Localize,
    "robustness": Robustness,
}
# What the labels must be, where an evaluator takes one kind only.
_LABELS = {"attributes": "attributes", "classify": "label", "localize": "label"}


def create_evaluator(name: str, model: nn.Module, *, data: Any, mesh: Mesh, **options: Any) -> Any:
    """Build an evaluator by name.

    Args:
        name: "attributes", "classify", "localize" or "robustness".
        model: what it evaluates.
        data: the config's `data` section.
        mesh: batches are split over it.
        **options: arguments of the evaluator, `split` among them; and `transform`, to evaluate a
            model with masks for each attribute with these transformed, see `ops.masks`.

    Returns:
        The evaluator.

    Raises:
        ValueError: unknown name or option, with near matches; an evaluator of attributes where the
            labels are classes, or the other way round.
    """
    if name not in _EVALUATORS:
        raise unknown_name("evaluator", name, _EVALUATORS)
    if "transform" in options:
        # Plain: a config holds a ConfigDict, which is no Mapping.
        model = with_transform(model, to_plain(options.pop("transform")))
    known = [p for p in inspect.signature(_EVALUATORS[name]).parameters if p not in ("model",)]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known)
    expected = _LABELS.get(name)
    if expected and labels_of(data) != expected:
        raise ValueError(
            f"the evaluator {name} needs data.labels={expected}, and it is "
            f"{labels_of(data)}; attributes are scored by the evaluator attributes"
        )
    return _EVALUATORS[name](model, data=data, mesh=mesh, **options)


def check_watched(watched: Mapping[str, str | None], evaluators: Sequence[Any]) -> None:
    """Raise a ValueError for a watched metric that none of the evaluators gives.

    Args:
        watched: {config key: name of a metric, or nothing}.
        evaluators: as `create_evaluator` returns them. What a layer's mask scores, `gate_...`, is
            known only when the model runs and passes.
    """
    names = [name for evaluator in evaluators for name in evaluator.metric_names]
    for key, metric in watched.items():
        if metric and metric not in names and "/gate_" not in metric:
            raise unknown_name(f"metric in {key}", metric, names)

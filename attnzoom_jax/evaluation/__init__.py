"""Evaluators: each has `run(variables) -> {"split/metric": value}` and `metric_names`."""

import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from attnzoom_jax.data.split import labels_of, open_split
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.attributes import Attributes
from attnzoom_jax.evaluation.attribution_table import AttributionTable
from attnzoom_jax.evaluation.classify import Classify
from attnzoom_jax.evaluation.localize import Localize
from attnzoom_jax.evaluation.phrases import Phrases
from attnzoom_jax.evaluation.robustness import Robustness
from attnzoom_jax.evaluation.sanity import Sanity
from attnzoom_jax.models import with_transform
from attnzoom_jax.training.workdir import to_plain

_EVALUATORS = {
    "attributes": Attributes,
    "attribution_table": AttributionTable,
    "classify": Classify,
    "localize": Localize,
    "phrases": Phrases,
    "robustness": Robustness,
    "sanity": Sanity,
}
# What the labels must be, where an evaluator takes one kind only.
_LABELS = {"attributes": "attributes", "classify": "label", "localize": "label"}
# Those that take a label for the index of an output.
_BY_INDEX = (*_LABELS, "robustness")


def create_evaluator(
    name: str,
    model: nn.Module,
    *,
    data: Any,
    mesh: Mesh,
    class_names: Sequence[str] | None = None,
    folder: str | pathlib.Path | None = None,
    **options: Any,
) -> Any:
    """Build an evaluator by name.

    Args:
        name: "attributes", "attribution_table", "classify", "localize", "phrases", "robustness" or
            "sanity".
        model: what it evaluates.
        data: the config's `data` section.
        mesh: batches are split over it.
        class_names: of the model's outputs, for evaluators that ask for them. Given, one that takes
            a label for the index of an output needs a data set with as many classes.
        folder: for evaluators that write tables and figures; need not exist yet.
        **options: arguments of the evaluator, `split` among them; and `transform`, to evaluate a
            model with masks for each attribute with these transformed, see `ops.masks`.

    Returns:
        The evaluator.

    Raises:
        ValueError: unknown name or option, with near matches; an evaluator of attributes where the
            labels are classes, or the other way round; another number of classes than of outputs.
    """
    if name not in _EVALUATORS:
        raise unknown_name("evaluator", name, _EVALUATORS)
    if "transform" in options:
        # Plain: a config holds a ConfigDict, which is no Mapping.
        model = with_transform(model, to_plain(options.pop("transform")))
    parameters = inspect.signature(_EVALUATORS[name]).parameters
    known = [p for p in parameters if p not in ("model",)]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known)
    expected = _LABELS.get(name)
    if expected and labels_of(data) != expected:
        raise ValueError(
            f"the evaluator {name} needs data.labels={expected}, and it is "
            f"{labels_of(data)}; attributes are scored by the evaluator attributes"
        )
    if class_names is not None and name in _BY_INDEX:
        _check_classes(name, len(class_names), data, options.get("split", ""))
    given = {"folder": folder and pathlib.Path(folder), "class_names": class_names}
    options = {k: v for k, v in given.items() if k in parameters and v is not None} | options
    return _EVALUATORS[name](model, data=data, mesh=mesh, **options)


def _check_classes(name: str, num_outputs: int, data: Any, split: str) -> None:
    """Raise a ValueError unless a split has as many classes as a model has outputs."""
    source = open_split(data, split=split, fields=("label",))
    if len(source.class_names) != num_outputs:
        raise ValueError(
            f"the evaluator {name} takes a label for the index of an output: {source.name} has "
            f"{len(source.class_names)} classes, and the model {num_outputs} outputs"
        )


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

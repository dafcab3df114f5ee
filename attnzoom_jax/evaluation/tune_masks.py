"""Which intentional transformation of its masks serves each attribute best, on validation images.

Candidates are the transforms of ops/masks.py over a grid of their parameters. An attribute's masks
act on its own logit alone, so that all attributes are scored in one pass per candidate, and each
takes its own. With a single label the classes' logits compete, and all take the same; so they do
where there is a single mask for all attributes.

    score_k = (balanced accuracy of k on clean images + mean of it over the corruptions) / 2

With a single label the accuracy takes its place, with a single mask the mean over all k. Of equal
scores the identity is taken, then the first of the grid.

A weaker mask also lowers a logit, and so moves the line between yes and no, which a balanced
accuracy may like for that alone. The control leaves the masks as they are and adds to each logit
what serves it best: a transform that does no better has found a threshold, not a better mask.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax import attribution
from attnzoom_jax.attribution.program import Known
from attnzoom_jax.data.corruptions import CORRUPTIONS, Corrupted
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.data.split import labels_of
from attnzoom_jax.evaluation.attributes import gate_of
from attnzoom_jax.evaluation.maps import say_progress
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.robustness import corrupted
from attnzoom_jax.evaluation.split import Batch, EvalSplit, Sums, to_input
from attnzoom_jax.metrics.attributes import attribute_sums, balanced_accuracy
from attnzoom_jax.metrics.classification import classification_sums
from attnzoom_jax.models import bind, with_transform
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.ops.masks import transform_masks

GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "power": {"exponent": (0.5, 1.5, 2.0, 4.0)},
    "contrast": {"slope": (4.0, 10.0), "center": (0.4, 0.6)},
    "soft_threshold": {"threshold": (0.1, 0.2, 0.4, 0.6)},
    "hard_threshold": {"threshold": (0.2, 0.4, 0.5, 0.6)},
    "gain": {"amount": (0.5, 1.0)},
    "saturation": {"threshold": (0.4, 0.5, 0.6, 0.8)},
}
IDENTITY = {"name": "identity"}
SHIFTS = (-3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def tune_masks(
    trained: TrainedModel,
    *,
    split: str,
    mesh: Mesh,
    corruptions: Sequence[str],
    level: int = 3,
    seed: int = 0,
    grid: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> dict[str, Any]:
    """Score every candidate on a split, and choose.

    Args:
        trained: a model with masks for each attribute, without a transform.
        split: of validation images.
        mesh: batches are split over it.
        corruptions: names in data.corruptions.CORRUPTIONS, at least one.
        level: of the corruptions, 1..5.
        seed: of the corruptions.
        grid: {transform: {parameter: values}}; None: GRID.

    Returns:
        The study, as JSON takes it: "split", "conditions", "attributes" (one name, "all", where all
        take the same), "identity" [a], the scores without a transform, and "transforms", {name:
        {"candidates": [transform], "scores": [candidates][a], "chosen": [transform of each
        attribute], "score": mean over the attributes}}, with "best" for the best of all of them;
        "controls", likewise, {} with a single label, else {"shift": ...}, for `shift_logits`.

    Raises:
        ValueError: a model without masks, or with a transform already; no corruption or an unknown
            one; unknown split, or a split in which no attribute is both there and not.
    """
    if with_transform(trained.model, None) != trained.model:
        raise ValueError("the model has a transform already; train with model.transform=None")
    if not corruptions:
        raise ValueError(f"no corruptions; expected at least one of {', '.join(CORRUPTIONS)}")
    for name in corruptions:  # before anything is read
        Corrupted((), name, level, seed=seed)
    data = trained.config.data
    has_attributes = labels_of(data) == "attributes"
    candidates = [IDENTITY, *_candidates(GRID if grid is None else grid)]
    shifts = [IDENTITY, *({"name": "shift", "amount": x} for x in SHIFTS if has_attributes)]

    def batch_sums(variables: Any, batch: Batch) -> Sums:
        images = to_input(batch["image"], data)
        inputs = {**extra_inputs(batch), **train_argument(trained.model, False)}
        fn = bind(trained.model, variables, **inputs)
        gate = gate_of(attribution.list_taps(fn, images))
        plain, taps = attribution.read_taps(fn, images, [gate])
        score = attribute_sums if has_attributes else classification_sums
        sums = {}
        for i, candidate in enumerate(candidates):
            masks = transform_masks(taps[gate], candidate)
            logits, _ = attribution.read_taps(Known(fn, {gate: masks}), images, [])
            sums[str(i)] = score(logits, batch["label"], batch["mask"])
        for i, shift in enumerate(shifts[1:], start=len(candidates)):
            sums[str(i)] = score(plain + shift["amount"], batch["label"], batch["mask"])
        return sums

    evaluated = EvalSplit(
        data=data, split=split, mesh=mesh, fields=("image", "label"), batch_sums=batch_sums
    )
    count, conditions = len(evaluated.source), ["clean", *corruptions]
    scores = []
    for name in say_progress(conditions, count * len(conditions), count):

        def change(source: Any, name: str = name) -> Any:
            return source if name == "clean" else corrupted(source, data, name, level, seed=seed)

        sums: Any = evaluated.run(trained.variables, change)
        scores.append([_accuracy(sums[str(i)]) for i in range(len(sums))])
    clean, rest = np.array(scores[0]), np.array(scores[1:])  # [candidates, a or 1]
    score = (clean + rest.mean(axis=0)) / 2
    if np.isnan(score).all():
        raise ValueError(
            f"none of the {len(trained.class_names)} attributes can be scored in {split}; take a "
            "larger split"
        )
    of_shifts = score[[0, *range(len(candidates), len(score))]]  # every logit has its own
    score = score[: len(candidates)]
    takes_own = has_attributes and trained.config.model.get("granularity") != "single"
    if not takes_own:
        score = np.nanmean(score, axis=1, keepdims=True)
    return {
        "split": split,
        "conditions": ["clean", *(f"{name}_{level}" for name in corruptions)],
        "attributes": list(trained.class_names) if takes_own else ["all"],
        "identity": [v if np.isfinite(v) else None for v in score[0].tolist()],
        "transforms": _choose(candidates, score, best=True),
        "controls": _choose(shifts, of_shifts),
    }


def shift_logits(variables: Any, chosen: Sequence[Mapping[str, Any]]) -> Any:
    """Variables of an `AttributeModel` with other biases of its heads.

    Args:
        variables: of the model, or of one around it.
        chosen: of each attribute, the identity or {"name": "shift", "amount": what is added}.

    Returns:
        The variables.
    """
    amounts = jnp.array([shift.get("amount", 0.0) for shift in chosen])

    def shift(path: Any, leaf: jax.Array) -> jax.Array:
        is_bias = [key.key for key in path][-2:] == ["heads", "bias"]
        return leaf + amounts if is_bias else leaf

    return jax.tree_util.tree_map_with_path(shift, variables)


def _candidates(grid: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    return [
        {"name": name, **dict(zip(values, point, strict=True))}
        for name, values in grid.items()
        for point in itertools.product(*values.values())
    ]


def _accuracy(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """Balanced accuracy [a], NaN where all examples or none have the attribute; accuracy [1]."""
    if "top1" in sums:
        return np.array([sums["top1"] / sums["count"]])
    return balanced_accuracy(sums)


def _choose(
    candidates: Sequence[Mapping[str, Any]], score: np.ndarray, *, best: bool = False
) -> dict[str, Any]:
    """The best candidate of every attribute, within each name and, as "best", among all."""
    found = {}
    names = list(dict.fromkeys(candidate["name"] for candidate in candidates[1:]))
    for name in [*names, *(["best"] if best else [])]:
        rows = [0, *(i for i, c in enumerate(candidates) if i and name in (c["name"], "best"))]
        own = np.where(np.isnan(score[rows]), -np.inf, score[rows])  # the identity comes first
        chosen = own.argmax(axis=0)
        highest = own.max(axis=0)
        found[name] = {
            "candidates": [dict(candidates[i]) for i in rows],
            "scores": [[v if np.isfinite(v) else None for v in row] for row in own.tolist()],
            "chosen": [dict(candidates[rows[k]]) for k in chosen],
            "score": float(highest[np.isfinite(highest)].mean()),
        }
    if best:
        del found["best"]["candidates"], found["best"]["scores"]  # those of all the others
    return found

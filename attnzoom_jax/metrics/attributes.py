"""How well attributes, each there or not, are told, and how much their masks differ.

    sums = jax.tree.map(operator.add, attribute_sums(...), attribute_sums(...))
    attribute_metrics(sums, names)   # divides once, so every example counts exactly once

An attribute is predicted where its logit is above 0, that is, where its sigmoid is above 1/2. With
TP and TN the examples that are rightly predicted, of P with the attribute and N without it,

    accuracy = (TP + TN) / (P + N),    balanced accuracy = (TP / P + TN / N) / 2

and with precision and recall of the examples that score at least t, for each score t that occurs,
from the highest to the lowest,

    average precision = sum_t (recall_t - recall_{t-1}) precision_t

An attribute that all examples have, or none, has neither balanced accuracy nor average precision:
it is left out of their means.
"""

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


def attribute_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the real examples of one batch; the sums of batches add up.

    Args:
        logits: [n, a].
        labels: [n, a], 1 where the attribute is there and 0 where not.
        mask: [n], 1 = real example, 0 = padding, which counts nothing whatever its logits hold.

    Returns:
        float32 [a]: "true_positives", "true_negatives", "positives", "negatives". A logit that is
        NaN is wrong. Exact up to 2**24 examples; beyond, add up in float64.
    """
    chex.assert_rank([logits, labels, mask], [2, 2, 1])
    chex.assert_equal_shape([logits, labels])
    real, is_there = (mask > 0)[:, None], labels > 0.5
    counted = {
        "true_positives": is_there & (logits > 0),
        "true_negatives": ~is_there & (logits <= 0),
        "positives": is_there,
        "negatives": ~is_there,
    }
    return {
        name: jnp.sum(real & value, axis=0, dtype=jnp.float32) for name, value in counted.items()
    }


def attribute_metrics(
    sums: Mapping[str, jax.Array | np.ndarray], names: Sequence[str]
) -> dict[str, float]:
    """The metrics of all examples behind some sums; runs on the host, once.

    Args:
        sums: what `attribute_sums` returns, or several of them added up.
        names: of the a attributes.

    Returns:
        "accuracy" and "balanced_accuracy", the means over the attributes, and
        "accuracy_<name>", "balanced_accuracy_<name>" of each, in [0, 1]; "attributes_scored", the
        number of attributes that some examples have and some have not: the others have no balanced
        accuracy; "count", of examples.

    Raises:
        ValueError: no example was counted, or no attribute has both kinds of examples.
    """
    total = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    positives, negatives = total["positives"], total["negatives"]
    count = positives + negatives  # [a], all alike
    if not count.all():
        raise ValueError("no example was counted; expected sums over at least one, check the split")
    is_scored = (positives > 0) & (negatives > 0)
    accuracy = (total["true_positives"] + total["true_negatives"]) / count
    return {
        **mean_and_each("accuracy", accuracy, names),
        **mean_and_each("balanced_accuracy", balanced_accuracy(total), names),
        "attributes_scored": int(is_scored.sum()),
        "count": int(count[0]),
    }


def balanced_accuracy(sums: Mapping[str, jax.Array | np.ndarray]) -> np.ndarray:
    """The balanced accuracy of each attribute; runs on the host.

    Args:
        sums: what `attribute_sums` returns, or several of them added up.

    Returns:
        float64 [a] in [0, 1]; NaN for an attribute that all examples have, or none.
    """
    total = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    positives, negatives = total["positives"], total["negatives"]
    recalls = total["true_positives"] / np.maximum(positives, 1)
    balanced = (recalls + total["true_negatives"] / np.maximum(negatives, 1)) / 2
    return np.where((positives > 0) & (negatives > 0), balanced, np.nan)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision of each attribute, exact; runs on the host.

    Examples of equal score come in together, so that their order does not matter.

    Args:
        scores: [n, a], of any scale: only their order counts. NaN ranks last.
        labels: [n, a], 1 where the attribute is there and 0 where not.

    Returns:
        float64 [a] in [0, 1]; NaN for an attribute that all examples have, or none.
    """
    values = np.full(scores.shape[1], np.nan)
    for k, is_there in enumerate((np.asarray(labels) > 0.5).T):
        positives = is_there.sum()
        if not 0 < positives < len(is_there):
            continue
        score = np.where(np.isnan(scores[:, k]), -np.inf, scores[:, k])
        order = np.argsort(-score)
        score, hits = score[order], np.cumsum(is_there[order])
        ends = np.append(np.flatnonzero(score[1:] != score[:-1]), len(score) - 1)
        precision, recall = hits[ends] / (ends + 1), hits[ends] / positives
        values[k] = (np.diff(recall, prepend=0.0) * precision).sum()
    return values


def mean_and_each(metric: str, values: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """A metric of attributes by name, and its mean over them.

    Args:
        metric: its name.
        values: [a]; NaN where an attribute has none.
        names: of the a attributes.

    Returns:
        {"<metric>": mean, "<metric>_<name>": value}, without the attributes that have no value.

    Raises:
        ValueError: no attribute has a value.
    """
    each = {
        f"{metric}_{name}": float(value)
        for name, value in zip(names, values, strict=True)
        if not np.isnan(value)
    }
    if not each:
        raise ValueError(
            f"{metric}: none of the {len(names)} attributes can be scored in this split; take a "
            "larger one"
        )
    return {metric: float(np.mean(list(each.values()))), **each}


def mean_difference(values: jax.Array, axis: int) -> jax.Array:
    """The mean absolute difference of all pairs along an axis.

    Args:
        values: any shape, m values along the axis.
        axis: which one.

    Returns:
        At least float32, the shape without the axis; 0 where m is 1.
    """
    # Sorted, the i-th of m values is the larger one in i - 1 pairs, the smaller one in m - i.
    m = values.shape[axis]
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    ordered = jnp.moveaxis(jnp.sort(values, axis=axis), axis, -1)
    pairs = max(1, m * (m - 1) // 2)
    return (ordered * jnp.asarray(2 * np.arange(m) - m + 1, values.dtype)).sum(-1) / pairs

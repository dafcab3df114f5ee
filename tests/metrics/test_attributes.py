"""The metrics of attributes against loops over examples, in float64."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.metrics import attributes

NAMES = ("red", "round", "large", "always", "never")


def answers(n=23, seed=0):
    """Logits with ties, and labels; the last two attributes have no score."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 2, (n, 5)))
    labels = (rng.random((n, 5)) < 0.4).astype(np.float64)
    labels[:, 3], labels[:, 4] = 1, 0
    return logits, labels


def slow_metrics(logits, labels):
    metrics: dict[str, float] = {}
    for k, name in enumerate(NAMES):
        hits: dict[bool, list[bool]] = {True: [], False: []}
        for logit, label in zip(logits[:, k], labels[:, k], strict=True):
            hits[bool(label)].append((logit > 0) == bool(label))
        metrics[f"accuracy_{name}"] = float(np.mean(hits[True] + hits[False]))
        if hits[True] and hits[False]:
            balanced = (np.mean(hits[True]) + np.mean(hits[False])) / 2
            metrics[f"balanced_accuracy_{name}"] = float(balanced)
    for metric in ("accuracy", "balanced_accuracy"):
        each = [v for name, v in metrics.items() if name.startswith(f"{metric}_")]
        metrics[metric] = float(np.mean(each))
    return {**metrics, "attributes_scored": 3, "count": len(logits)}


def slow_average_precision(scores, labels):
    """Precision and recall at every threshold, one after the other."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        recall = sum(chosen) / sum(labels)
        area += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return area


@pytest.mark.parametrize("size", [23, 6, 4])
def test_equals_a_loop_whatever_the_batches(size):
    logits, labels = answers()
    sums = None
    for start in range(0, 23, size):
        part = slice(start, start + size)
        padding = ((0, size - len(logits[part])), (0, 0))
        # Padding counts nothing, whatever the model says of it.
        batch = np.pad(logits[part], padding, constant_values=np.nan)
        mask = np.pad(np.ones(len(logits[part])), padding[0])
        new = jax.jit(attributes.attribute_sums)(batch, np.pad(labels[part], padding), mask)
        sums = new if sums is None else jax.tree.map(operator.add, sums, new)
    assert sums is not None
    metrics = attributes.attribute_metrics(sums, NAMES)
    assert metrics == pytest.approx(slow_metrics(logits, labels), rel=1e-12)
    assert type(metrics["count"]) is type(metrics["attributes_scored"]) is int


def test_a_logit_that_is_no_number_is_wrong():
    sums = attributes.attribute_sums(
        jnp.full((2, 1), jnp.nan), jnp.array([[0.0], [1.0]]), jnp.ones(2)
    )
    assert attributes.attribute_metrics(sums, ["red"])["accuracy"] == 0


def test_nothing_to_score_is_said():
    sums = attributes.attribute_sums(jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.ones(2))
    with pytest.raises(ValueError, match="balanced_accuracy: none of the 1 attributes can be scor"):
        attributes.attribute_metrics(sums, ["red"])
    sums = attributes.attribute_sums(jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.zeros(2))
    with pytest.raises(ValueError, match="no example was counted"):
        attributes.attribute_metrics(sums, ["red"])


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_all_thresholds(seed):
    logits, labels = answers(seed=seed)
    found = attributes.average_precision(logits, labels)
    expected = [slow_average_precision(logits[:, k], labels[:, k]) for k in range(3)]
    np.testing.assert_allclose(found[:3], expected, rtol=1e-12)
    assert np.isnan(found[3:]).all()
    assert len(set(logits[:, 0])) < 12  # there were ties
    # Their order cannot matter, nor the scale of the scores.
    order = np.random.default_rng(seed).permutation(len(logits))
    again = attributes.average_precision(np.exp(logits[order] / 3), labels[order])
    np.testing.assert_allclose(again, found, rtol=1e-12)


def test_average_precision_of_known_rankings():
    labels = np.array([1, 1, 0, 0])[:, None]
    of = lambda *scores: attributes.average_precision(np.array(scores)[:, None], labels)[0]  # noqa: E731
    assert of(4, 3, 2, 1) == 1
    assert of(1, 2, 3, 4) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert of(0, 0, 0, 0) == 0.5
    assert of(np.inf, np.nan, 0, -3) == pytest.approx((1 + 1 / 2) / 2)  # NaN is last
    assert of(-1, -np.inf, -2, -3) == of(np.inf, np.nan, 0, -3)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_the_mean_difference_is_that_of_all_pairs(axis):
    values = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    parts = list(np.moveaxis(values.astype(np.float64), axis, 0))
    pairs = [abs(a - b) for i, a in enumerate(parts) for b in parts[:i]]
    found = attributes.mean_difference(jnp.asarray(values), axis)
    np.testing.assert_allclose(found, np.mean(pairs, axis=0), rtol=1e-5)
    np.testing.assert_array_equal(attributes.mean_difference(jnp.ones((2, 1)), 1), [0, 0])

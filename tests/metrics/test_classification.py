import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.metrics import classification

jitted_sums = jax.jit(classification.classification_sums, static_argnames="num_bins")


def slow_metrics(logits, labels, mask, num_bins=15):
    """One example at a time, in float64."""
    bins = [[] for _ in range(num_bins)]
    top1 = top5 = cross_entropy = count = 0
    for z, label, real in zip(np.asarray(logits, np.float64), labels, mask, strict=True):
        if not real:
            continue
        count += 1
        order = np.argsort(-z, kind="stable")
        top1 += order[0] == label
        top5 += label in order[: min(5, len(z))]
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        cross_entropy -= np.log(p[label])
        for m in range(num_bins):
            if m / num_bins < p.max() <= (m + 1) / num_bins:
                bins[m].append((p.max(), order[0] == label))
    gap = 0
    for members in filter(None, bins):
        confidence, hit = np.mean(members, axis=0)
        gap += len(members) / count * abs(hit - confidence)
    return {
        "top1": top1 / count,
        "top5": top5 / count,
        "cross_entropy": cross_entropy / count,
        "calibration_error": gap,
        "count": count,
    }


def example(n=200, k=7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(0, 2, (n, k)).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    mask = rng.random(n) < 0.8
    return logits, labels, mask


@pytest.mark.parametrize("k", [2, 5, 7])
@pytest.mark.parametrize("num_bins", [1, 15])
def test_equals_one_example_at_a_time(k, num_bins):
    logits, labels, mask = example(k=k)
    got = classification.classification_metrics(
        jitted_sums(logits, labels, mask, num_bins=num_bins)
    )
    want = slow_metrics(logits, labels, mask, num_bins)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=2e-6), name


def test_batches_with_padding_add_up_to_the_whole():
    logits, labels, mask = example(n=50)
    whole = classification.classification_metrics(jitted_sums(logits, labels, mask))
    padded_logits = np.full((64, 7), np.nan, np.float32)
    padded_labels, padded_mask = np.full(64, -1), np.zeros(64)
    padded_logits[:50], padded_labels[:50], padded_mask[:50] = logits, labels, mask
    parts = [
        jitted_sums(padded_logits[i : i + 16], padded_labels[i : i + 16], padded_mask[i : i + 16])
        for i in range(0, 64, 16)
    ]
    added = functools.reduce(functools.partial(jax.tree.map, operator.add), parts)
    got = classification.classification_metrics(added)
    assert got == pytest.approx(whole, abs=1e-6)
    assert got["count"] == mask.sum()


def test_masked_examples_count_nothing_even_when_nan():
    logits, labels, _ = example(n=6)
    mask = np.array([1, 0, 1, 0, 1, 0])
    broken = logits.copy()
    broken[1], broken[3], broken[5] = np.nan, np.inf, -np.inf
    jax.tree.map(
        np.testing.assert_array_equal,
        jitted_sums(broken, labels, mask),
        jitted_sums(logits, labels, mask),
    )


def test_ties_fall_to_the_first_class_as_argmax_has_it():
    logits = np.zeros((8, 8), np.float32)
    sums = jitted_sums(logits, np.arange(8), np.ones(8))
    assert sums["top1"] == 1  # class 0 alone
    assert sums["top5"] == 5  # classes 0 to 4


def test_a_real_example_with_nan_or_without_a_class_is_wrong_and_loud():
    logits = np.array([[0, np.nan, 0], [np.nan] * 3, [2, 1, 0], [2, 1, 0]], np.float32)
    for i, label in enumerate([0, 0, 3, -1]):
        sums = jitted_sums(logits[i : i + 1], np.array([label]), np.ones(1))
        assert (sums["top1"], sums["top5"], sums["count"]) == (0, 0, 1)
        assert np.isnan(sums["cross_entropy"])


def test_calibration_by_hand():
    # Confidences 0.5 (upper edge of the first of two bins), 0.75 and 0.75; right, right, wrong.
    logits = np.log(np.array([[0.5, 0.5], [0.75, 0.25], [0.75, 0.25]], np.float32))
    sums = jitted_sums(logits, np.array([0, 0, 1]), np.ones(3), num_bins=2)
    np.testing.assert_array_equal(sums["bin_count"], [1, 2])
    metrics = classification.classification_metrics(sums)
    assert metrics["calibration_error"] == pytest.approx((0.5 + 0.5) / 3, abs=1e-6)


def test_certain_and_right_is_perfect():
    sums = jitted_sums(1e4 * np.eye(4, dtype=np.float32), np.arange(4), np.ones(4))
    metrics = classification.classification_metrics(sums)
    want = {"top1": 1, "top5": 1, "cross_entropy": 0, "calibration_error": 0, "count": 4}
    assert metrics == want


def test_low_precision_logits():
    logits, labels, mask = example()
    rounded = jnp.asarray(logits, jnp.bfloat16)
    got = classification.classification_metrics(jitted_sums(rounded, labels, mask))
    want = slow_metrics(np.asarray(rounded, np.float64), labels, mask)
    assert got["cross_entropy"] == pytest.approx(want["cross_entropy"], abs=2e-6)
    assert got["top1"] == pytest.approx(want["top1"])


def test_nothing_counted_is_an_error():
    logits, labels, _ = example(n=3)
    with pytest.raises(ValueError, match="no example was counted"):
        classification.classification_metrics(jitted_sums(logits, labels, np.zeros(3)))


def test_the_same_on_one_device_and_on_four():
    logits, labels, mask = example(n=64)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = jax.device_put((logits, labels, mask), sharding)
    for name, value in jitted_sums(logits, labels, mask).items():
        np.testing.assert_allclose(jitted_sums(*spread)[name], value, rtol=1e-6, err_msg=name)

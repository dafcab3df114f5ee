import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops.masks import TRANSFORMS, saturated_sigmoid, transform_masks

LOGITS = jnp.float32(np.random.default_rng(0).normal(0.0, 3.0, (2, 5, 7, 1)))
SIGMOID = 1.0 / (1.0 + np.exp(-np.float64(LOGITS)))


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.2, 0.5, 0.9, 1.5])
def test_equals_algorithm_1(threshold):
    above = (SIGMOID >= threshold).astype(np.float64)
    expected = above + SIGMOID * (1.0 - above)
    np.testing.assert_allclose(saturated_sigmoid(LOGITS, threshold=threshold), expected, rtol=1e-5)


def test_values_lie_below_the_threshold_or_are_one():
    mask = np.asarray(saturated_sigmoid(LOGITS, threshold=0.6))
    below = mask < 1.0
    assert 0 < below.sum() < mask.size
    assert (mask[below] > 0.0).all() and (mask[below] < 0.6).all()
    assert (mask[~below] == 1.0).all()


def test_the_threshold_itself_saturates():
    mask = saturated_sigmoid(jnp.array([0.0, -1e-3]), threshold=0.5)
    assert mask[0] == 1.0 and mask[1] < 0.5


def test_threshold_at_zero_gives_ones_and_above_one_the_sigmoid():
    assert (saturated_sigmoid(LOGITS, threshold=0.0) == 1.0).all()
    np.testing.assert_allclose(saturated_sigmoid(LOGITS, threshold=1.1), SIGMOID, rtol=1e-5)


def test_gradient_is_that_of_the_sigmoid_below_and_zero_above():
    grad = jax.grad(lambda a: saturated_sigmoid(a, threshold=0.5).sum())(LOGITS)
    expected = np.where(SIGMOID >= 0.5, 0.0, SIGMOID * (1.0 - SIGMOID))
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)


def test_bfloat16_logits_give_a_float32_mask():
    mask = saturated_sigmoid(LOGITS.astype(jnp.bfloat16), threshold=0.5)
    assert mask.dtype == jnp.float32


def test_straight_through_has_the_same_values_and_the_gradient_of_the_sigmoid():
    mask = saturated_sigmoid(LOGITS, threshold=0.5, straight_through=True)
    np.testing.assert_array_equal(mask, saturated_sigmoid(LOGITS, threshold=0.5))
    grad = jax.grad(lambda a: saturated_sigmoid(a, threshold=0.5, straight_through=True).sum())
    np.testing.assert_allclose(grad(LOGITS), SIGMOID * (1.0 - SIGMOID), rtol=1e-4, atol=1e-7)


# name: parameters, a slow formula of one weight m given the mean of its mask
CASES = {
    "identity": ({}, lambda m, mean: m),
    "power": ({"exponent": 2.5}, lambda m, mean: m**2.5),
    "power_below_1": ({"exponent": 0.5}, lambda m, mean: math.sqrt(m)),
    "contrast": (
        {"slope": 8.0, "center": 0.4},
        lambda m, mean: (sigmoid(8 * (m - 0.4)) - sigmoid(-3.2)) / (sigmoid(4.8) - sigmoid(-3.2)),
    ),
    "soft_threshold": ({"threshold": 0.3}, lambda m, mean: max(m - 0.3, 0) / 0.7),
    "hard_threshold": ({"threshold": 0.3}, lambda m, mean: m if m >= 0.3 else 0.0),
    "gain": ({"amount": 0.8}, lambda m, mean: m * (1 + 0.8 * (m - mean))),
    "saturation": ({"threshold": 0.6}, lambda m, mean: 1.0 if m >= 0.6 else m),
}
# The derivative that the table of the module states.
SLOPES = {
    "identity": lambda m, mean: 1.0,
    "power": lambda m, mean: 2.5 * m**1.5,
    "power_below_1": lambda m, mean: 0.5 / math.sqrt(m),
    "contrast": lambda m, mean: (
        8 * sigmoid(8 * (m - 0.4)) * sigmoid(-8 * (m - 0.4)) / (sigmoid(4.8) - sigmoid(-3.2))
    ),
    "soft_threshold": lambda m, mean: 1 / 0.7 if m > 0.3 else 0.0,
    "hard_threshold": lambda m, mean: float(m >= 0.3),
    "gain": lambda m, mean: 1 + 0.8 * (2 * m - mean),
    "saturation": lambda m, mean: float(m < 0.6),
}
MASKS = np.random.default_rng(1).uniform(0.001, 0.999, (2, 3, 4, 5, 6)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def case(name):
    kind = name.removesuffix("_below_1")
    parameters, slow = CASES[name]
    return {"name": kind, **parameters}, slow


def each(function, masks):
    """A function of one weight and the mean of its mask over places and channels, in float64."""
    masks = np.float64(masks)
    means = np.broadcast_to(masks.mean((1, 2, 4), keepdims=True), masks.shape)
    return np.vectorize(function)(masks, means)


@pytest.mark.parametrize("name", CASES)
def test_transform_equals_its_formula(name):
    transform, slow = case(name)
    found = transform_masks(MASKS, transform)
    np.testing.assert_allclose(found, each(slow, MASKS), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_transform_has_the_gradient_that_is_stated(name):
    transform, _ = case(name)
    slopes = jax.grad(lambda m: transform_masks(m, transform).sum())(jnp.asarray(MASKS))
    np.testing.assert_allclose(slopes, each(SLOPES[name], MASKS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_transform_is_monotone_and_in_range(name):
    transform, _ = case(name)
    # One channel's weights rise along the axis of the width; the mean is the same for all of them.
    masks = jnp.broadcast_to(jnp.linspace(0, 1, 501)[None, None, :, None, None], (1, 2, 501, 1, 3))
    found = np.asarray(transform_masks(masks, transform))
    assert (np.diff(found, axis=2) >= -1e-6).all()
    high = 1 + transform.get("amount", 0)
    assert found.min() >= 0 and found.max() <= high + 1e-6
    assert np.isfinite(jax.grad(lambda m: transform_masks(m, transform).sum())(masks)).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_defaults_are_the_identity(name):
    np.testing.assert_array_equal(transform_masks(MASKS, {"name": name}), MASKS)


def test_each_attribute_may_have_its_own():
    names = ["power", "identity", "power_below_1", "saturation", "gain"]
    transforms = [case(name)[0] for name in names]
    found = transform_masks(MASKS, transforms)
    for k, name in enumerate(names):
        alone = transform_masks(MASKS[:, :, :, k : k + 1], case(name)[0])
        np.testing.assert_allclose(found[:, :, :, k : k + 1], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ({"name": "powr"}, "unknown transform 'powr'.*power"),
        ({"exponent": 2.0}, "expected its name"),
        ({"name": "power", "exponnt": 2.0}, "unknown parameter of power 'exponnt'.*exponent"),
        ({"name": "power", "exponent": 0.0}, "exponent=0.0 of power: expected a number above 0"),
        ({"name": "power", "exponent": float("nan")}, "expected a number"),
        ({"name": "gain", "amount": 1.5}, "of at least 0 and at most 1"),
        ({"name": "soft_threshold", "threshold": 1.0}, "of at least 0 and below 1"),
        # Ends of the range that float32 does not tell from what lies outside.
        ({"name": "soft_threshold", "threshold": 1 - 1e-9}, "of at least 0 and below 1"),
        ({"name": "power", "exponent": 1e39}, "exponent=1e\\+39 of power"),
        ([{"name": "identity"}] * 3, "3 transforms for 5 masks"),
    ],
)
def test_bad_transform(transforms, words):
    with pytest.raises(ValueError, match=words):
        transform_masks(MASKS, transforms)

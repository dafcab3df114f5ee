import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops.masks import saturated_sigmoid

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

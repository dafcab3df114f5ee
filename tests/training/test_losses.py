import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.training import losses


def slow_cross_entropy(logits, weights, smoothing):
    n, k = logits.shape
    values = np.zeros(n)
    for i in range(n):
        log_sum = np.log(sum(np.exp(logits[i, j] - logits[i].max()) for j in range(k)))
        for j in range(k):
            q = (1 - smoothing) * weights[i, j] + smoothing / k
            values[i] -= q * (logits[i, j] - logits[i].max() - log_sum)
    return values


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["ids", "weights"])
def test_equals_the_sum_written_out(kind, smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (6, 4))
    ids = rng.integers(0, 4, 6)
    weights = np.eye(4)[ids] if kind == "ids" else rng.dirichlet(np.ones(4), 6)
    targets = jnp.asarray(ids) if kind == "ids" else jnp.asarray(weights, jnp.float32)
    loss = jax.jit(losses.softmax_cross_entropy, static_argnames="label_smoothing")(
        jnp.asarray(logits, jnp.float32), targets, label_smoothing=smoothing
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, slow_cross_entropy(logits, weights, smoothing), rtol=2e-6)


def test_gradient_is_softmax_minus_target():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(0, 2, (3, 5)), jnp.float32)
    ids = jnp.array([0, 4, 2])
    grad = jax.grad(lambda z: losses.softmax_cross_entropy(z, ids).sum())(logits)
    np.testing.assert_allclose(grad, jax.nn.softmax(logits) - np.eye(5)[ids], atol=1e-6)


def test_low_precision_logits_are_summed_in_float32():
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 1, (2, 1000)), jnp.bfloat16)
    loss = losses.softmax_cross_entropy(logits, jnp.array([3, 5]))
    exact = slow_cross_entropy(np.asarray(logits, np.float64), np.eye(1000)[[3, 5]], 0.0)
    np.testing.assert_allclose(loss, exact, rtol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_outside_the_classes_is_nan_and_only_there(smoothing):
    logits = jnp.zeros((4, 3))
    loss = losses.softmax_cross_entropy(logits, jnp.array([-1, 0, 2, 3]), label_smoothing=smoothing)
    np.testing.assert_array_equal(np.isnan(loss), [True, False, False, True])


def test_bad_arguments_are_refused():
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        losses.softmax_cross_entropy(logits, jnp.array([0, 1]), label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"\(2, 3\) and targets \(3,\)"):
        losses.softmax_cross_entropy(logits, jnp.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"float \[n, 3\]"):
        losses.softmax_cross_entropy(logits, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"class ids, int \[n\]"):
        losses.softmax_cross_entropy(logits, jnp.zeros(2))

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


# Sigmoid cross-entropy.


def slow_sigmoid_cross_entropy(logits, targets, weights, smoothing):
    n, a = logits.shape
    values = np.zeros(n)
    for i in range(n):
        for k in range(a):
            p = 1 / (1 + np.exp(-logits[i, k]))
            y = (1 - smoothing) * targets[i, k] + smoothing / 2
            values[i] -= (weights[k] * y * np.log(p) + (1 - y) * np.log(1 - p)) / a
    return values


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [1.0, 2.5, (1.0, 0.5, 3.0, 20.0)])
def test_of_attributes_equals_the_sum_written_out(weights, smoothing):
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(0, 3, (6, 4)))
    targets = rng.integers(0, 2, (6, 4)) * rng.choice([1.0, 0.3], (6, 4))  # some of them mixed
    loss = jax.jit(
        losses.sigmoid_cross_entropy, static_argnames=("label_smoothing", "positive_weight")
    )(logits, jnp.asarray(targets), positive_weight=weights, label_smoothing=smoothing)
    each = np.broadcast_to(weights, 4)
    expected = slow_sigmoid_cross_entropy(logits.astype(np.float64), targets, each, smoothing)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_of_attributes_is_the_softmax_of_there_and_not(smoothing):
    logits = jnp.array([[-3.0], [0.5], [20.0]])
    targets = jnp.array([[0.0], [1.0], [0.0]])
    both = losses.softmax_cross_entropy(
        jnp.hstack([logits, jnp.zeros((3, 1))]),
        jnp.hstack([targets, 1 - targets]),
        label_smoothing=smoothing,
    )
    found = losses.sigmoid_cross_entropy(logits, targets, label_smoothing=smoothing)
    np.testing.assert_allclose(found, both, rtol=1e-6)


def test_of_attributes_is_finite_at_large_logits_and_in_low_precision():
    logits = jnp.array([[300.0, -300.0]], jnp.bfloat16)
    of = lambda z, *y: losses.sigmoid_cross_entropy(z, jnp.array([y]))[0]  # noqa: E731
    assert of(logits, 1.0, 0.0) == 0 and of(logits, 0.0, 1.0) == 300
    grad = jax.grad(lambda z: of(z, 0.0, 1.0))(logits.astype(jnp.float32))
    np.testing.assert_allclose(grad, [[0.5, -0.5]])  # of the mean over two attributes


def test_bad_arguments_of_attributes_are_refused():
    logits, targets = jnp.zeros((2, 3)), jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        losses.sigmoid_cross_entropy(logits, targets, label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"\(2, 3\) and targets \(2,\); expected \[n, a\]"):
        losses.sigmoid_cross_entropy(logits, jnp.zeros(2))
    with pytest.raises(ValueError, match="positive_weight holds 2 numbers and there are 3 attrib"):
        losses.sigmoid_cross_entropy(logits, targets, positive_weight=(1.0, 2.0))

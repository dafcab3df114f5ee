import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name as mark

from attnzoom_jax.attribution import gradient, guided_backprop

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(3, 5, 4, 2)), jnp.float32)
W1 = jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)
W2 = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(6, 7)), jnp.float32)
TARGETS = jnp.array([0, 6, 2])


@jax.custom_vjp
def guided_relu(x):
    """The definition: a ReLU whose derivative is the guided one."""
    return jax.nn.relu(x)


guided_relu.defvjp(
    lambda x: (jax.nn.relu(x), x), lambda x, g: (jnp.where(x >= 0, jax.nn.relu(g), 0),)
)


@jax.custom_vjp
def reversed_gradient(x):
    return x * 1.0


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def network(relu, images):
    x = relu(images @ W1)
    mask = mark(jax.nn.sigmoid(x[..., :1]), "gate")
    x = relu(x * mask @ W2 - 0.5) + jax.nn.silu(x)
    x = reversed_gradient(x)
    return x.mean((1, 2)) @ HEAD


def in_scan(relu, images):
    x, _ = jax.lax.scan(lambda x, w: (relu(x @ w), None), images @ W1, jnp.stack([W2, -W2]))
    return x.mean((1, 2)) @ HEAD


RELUS = {
    "jax.nn.relu": jax.nn.relu,
    "jnp.maximum": lambda x: jnp.maximum(x, 0),
    "constant first": lambda x: jnp.maximum(0, x),
    "jit": jax.jit(jax.nn.relu),
    "remat": jax.checkpoint(jax.nn.relu),
}


@pytest.mark.parametrize("body", [network, in_scan])
@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS.keys())
def test_equals_the_gradient_of_a_network_with_guided_relus(relu, body):
    guided = guided_backprop(lambda x: body(relu, x), IMAGES, TARGETS, reduce="sum")
    expected = gradient(lambda x: body(guided_relu, x), IMAGES, TARGETS, reduce="sum")
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(guided, expected, atol=1e-6)
    ordinary = gradient(lambda x: body(relu, x), IMAGES, TARGETS, reduce="sum")
    assert np.abs(ordinary - expected).max() > 1e-3


def test_the_relu_within_relu6_is_guided_and_its_upper_end_stops():
    def fn(relu, images):
        return jnp.minimum(relu(20 * images @ W1), 6).mean((1, 2)) @ HEAD

    def relu6(images):
        return jax.nn.relu6(20 * images @ W1).mean((1, 2)) @ HEAD

    expected = gradient(lambda x: fn(guided_relu, x), IMAGES, TARGETS)
    np.testing.assert_allclose(guided_backprop(relu6, IMAGES, TARGETS), expected, atol=1e-5)


def test_without_relus_it_is_the_gradient():
    def fn(images):
        return jnp.tanh(images @ W1).mean((1, 2)) @ HEAD

    expected = gradient(fn, IMAGES, TARGETS)
    np.testing.assert_allclose(guided_backprop(fn, IMAGES, TARGETS), expected, atol=1e-6)


def test_jit_vmap_and_chunks_give_the_same_maps():
    def maps(targets, chunk_size=None):
        fn = lambda x: network(jax.nn.relu, x)  # noqa: E731
        return guided_backprop(fn, IMAGES, targets, chunk_size=chunk_size)

    expected = maps(TARGETS)
    np.testing.assert_allclose(jax.jit(maps)(TARGETS), expected, atol=1e-6)
    np.testing.assert_allclose(maps(TARGETS, chunk_size=2), expected, atol=1e-6)
    several = jax.vmap(maps)(jnp.stack([TARGETS, TARGETS[::-1]]))
    np.testing.assert_allclose(several[0], expected, atol=1e-6)


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="float"):
        guided_backprop(lambda x: x, jnp.ones((1, 2, 2, 3), jnp.int32), TARGETS[:1])

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnzoom_jax.training import sharding
from attnzoom_jax.training.state import create_state, init_variables

IMAGE_SHAPE = (6, 5, 3)


class WithNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Conv(4, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(2)(x.mean((1, 2)))


class Plain(nn.Module):
    """Knows neither `train` nor BatchNorm."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.mean((1, 2)))


def create(model: Any = None, *, seed=3, devices=4, use_ema=False):
    return create_state(
        model or WithNorm(),
        optax.adam(1e-3),
        image_shape=IMAGE_SHAPE,
        seed=seed,
        mesh=sharding.create_mesh(jax.devices()[:devices]),
        use_ema=use_ema,
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_holds_what_the_model_and_the_optimiser_initialise():
    state = create()
    variables = WithNorm().init(jax.random.key(3), jnp.zeros((1, *IMAGE_SHAPE)), train=False)
    # Compiled and not: the initialisers round differently.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(close, state.params, variables["params"])
    assert_equal(state.batch_stats, variables["batch_stats"])
    assert_equal(state.opt_state, optax.adam(1e-3).init(variables["params"]))
    assert int(state.step) == 0 and state.step.dtype == jnp.int32
    assert state.ema_params is None and len(jax.tree.leaves(state.batch_stats)) == 2


def test_the_seed_alone_decides_the_parameters():
    assert_equal(create(devices=4), create(devices=1))
    kernels = [create(seed=seed).params["Conv_0"]["kernel"] for seed in (3, 4)]
    assert not np.array_equal(*kernels)


def test_every_array_lies_on_every_device():
    for leaf in jax.tree.leaves(create(use_ema=True)):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 4


def test_averaged_parameters_start_as_a_copy_and_serve_evaluation():
    state = create(use_ema=True)
    assert_equal(state.ema_params, state.params)
    # Two leaves of one buffer cannot be donated; this raises if they share one.
    twice = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)(state)
    ema = jax.tree.map(lambda x: x + 1, twice.params)
    state = twice.replace(ema_params=ema)
    assert_equal(state.variables(), {"params": ema, "batch_stats": state.batch_stats})
    assert_equal(state.replace(ema_params=None).variables()["params"], state.params)


@pytest.mark.parametrize("model", [WithNorm(), Plain()], ids=["norm", "plain"])
def test_variables_can_be_shaped_without_any_array(model):
    shapes = jax.eval_shape(lambda: init_variables(model, IMAGE_SHAPE, 0))
    variables = init_variables(model, IMAGE_SHAPE, 0)
    shape = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert jax.tree.map(shape, shapes) == jax.tree.map(shape, variables)
    assert set(variables) == {"params", "batch_stats"}
    assert bool(variables["batch_stats"]) == isinstance(model, WithNorm)

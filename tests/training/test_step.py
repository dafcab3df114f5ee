import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnzoom_jax.models import create_model
from attnzoom_jax.training import sharding, step
from attnzoom_jax.training.state import TrainState, create_state

RECIPE = step.Recipe(seed=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
MESH = sharding.create_mesh(jax.devices()[:1])


def batch(n=6, size=4, classes=3, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8),
        "label": rng.integers(0, classes, n).astype(np.int32),
    }


class Linear(nn.Module):
    """Softmax regression: it knows neither `train` nor BatchNorm."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(3, name="head")(x)


def start(model, optimizer, *, size=4, use_ema=False) -> TrainState:
    return create_state(
        model, optimizer, image_shape=(size, size, 3), seed=1, mesh=MESH, use_ema=use_ema
    )


def create(model, optimizer: Any = None, recipe=RECIPE, **state):
    """A jitted step and the state before it; nothing is donated."""
    optimizer = optimizer or optax.sgd(0.1)
    train_step = step.make_train_step(model, optimizer, recipe, num_classes=3)
    return jax.jit(train_step), start(model, optimizer, **state)


def slow_loss_and_gradient(kernel, bias, images, targets):
    """Softmax regression in NumPy, float64."""
    x = (images / 255 - RECIPE.mean) / RECIPE.std
    x = x.reshape(len(x), -1)
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -(targets * np.log(p)).sum(1).mean()
    error = (p - targets) / len(x)  # targets sum to 1
    return loss, x.T @ error, error.sum(0), logits


# One update, against NumPy.


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_sgd_steps_equal_numpy(label_smoothing):
    recipe = step.Recipe(**{**vars(RECIPE), "label_smoothing": label_smoothing, "ema_decay": 0.8})
    train_step, state = create(Linear(), recipe=recipe, use_ema=True)
    kernel, bias = (np.float64(state.params["head"][name]) for name in ("kernel", "bias"))
    ema_kernel = kernel
    for i in range(3):
        examples = batch(seed=i)
        hot = np.eye(3)[examples["label"]]
        targets = hot * (1 - label_smoothing) + label_smoothing / 3
        loss, d_kernel, d_bias, logits = slow_loss_and_gradient(
            kernel, bias, examples["image"], targets
        )
        state, metrics = train_step(state, examples)
        kernel, bias = kernel - 0.1 * d_kernel, bias - 0.1 * d_bias
        ema_kernel = 0.8 * ema_kernel + 0.2 * kernel
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(metrics["top1"]) == pytest.approx(
            np.mean(logits.argmax(1) == examples["label"]), abs=1e-6
        )
        norm = np.sqrt((d_kernel**2).sum() + (d_bias**2).sum())
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
        assert int(metrics["steps"]) == 1 and int(metrics["bad_step"]) == step.NO_STEP
        assert int(state.step) == i + 1
    np.testing.assert_allclose(state.params["head"]["kernel"], kernel, atol=1e-5)
    np.testing.assert_allclose(state.params["head"]["bias"], bias, atol=1e-5)
    np.testing.assert_allclose(state.ema_params["head"]["kernel"], ema_kernel, atol=1e-5)
    assert state.batch_stats == {}


def test_batch_norm_statistics_move_towards_those_of_the_batch():
    train_step, state = create(Normed())
    examples = batch()
    x = (examples["image"] / 255 - RECIPE.mean) / RECIPE.std
    after, _ = train_step(state, examples)
    stats = after.batch_stats["norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-4)


def test_an_update_is_pure_and_its_randomness_is_of_seed_and_step():
    train_step, state = create(Dropped(), optax.sgd(0.0))
    examples = batch()
    loss = lambda state: float(train_step(state, examples)[1]["loss"])  # noqa: E731
    assert loss(state) == loss(state)
    # At learning rate 0 only dropout, drawn anew at each step, changes the loss.
    later = [state.replace(step=jnp.int32(i)) for i in range(4)]
    assert len({loss(s) for s in later}) == 4
    reseeded = step.Recipe(**{**vars(RECIPE), "seed": 6})
    assert float(create(Dropped(), recipe=reseeded)[0](state, examples)[1]["loss"]) != loss(state)


# Augmentation and mixing.


def losses(recipe: dict[str, Any], steps=8):
    train_step, state = create(Linear(), recipe=step.Recipe(**{**vars(RECIPE), **recipe}))
    at = lambda i: state.replace(step=jnp.int32(i))  # noqa: E731
    return [float(train_step(at(i), batch())[1]["loss"]) for i in range(steps)]


def test_with_mixup_and_cutmix_each_step_takes_one_of_them():
    mixup, cutmix = losses({"mixup": 0.4}), losses({"cutmix": 1.0})
    both = losses({"mixup": 0.4, "cutmix": 1.0})
    took_mixup = [b == pytest.approx(m, rel=1e-5) for b, m in zip(both, mixup, strict=True)]
    took_cutmix = [b == pytest.approx(c, rel=1e-5) for b, c in zip(both, cutmix, strict=True)]
    assert [m != c for m, c in zip(took_mixup, took_cutmix, strict=True)] == [True] * 8
    assert 0 < sum(took_mixup) < 8
    assert len(set(mixup)) == 8 and not set(mixup) & set(losses({}))


@pytest.mark.parametrize("name", ["crop_padding", "flip", "auto_augment"])
def test_each_augmentation_reaches_the_images(name):
    value = {"crop_padding": 2, "flip": True, "auto_augment": "cifar10"}[name]
    plain = losses({}, steps=3)
    assert plain[0] == plain[1] == plain[2]
    # A step may happen to mirror no image.
    assert len(set(losses({name: value}, steps=3)) - set(plain)) >= 2


def test_a_crop_sets_the_size_that_the_model_sees():
    recipe = step.Recipe(**{**vars(RECIPE), "crop_size": 2})
    train_step, state = create(Linear(), recipe=recipe, size=2)
    state, metrics = train_step(state, batch(size=4))
    assert state.params["head"]["kernel"].shape == (12, 3) and np.isfinite(metrics["loss"])


# Precision, and numbers that are none.


def test_bfloat16_compute_keeps_float32_parameters():
    model = create_model(
        "resnet", num_classes=3, stem="small", width=4, stage_sizes=(1,), dtype="bfloat16"
    )
    recipe = step.Recipe(**{**vars(RECIPE), "ema_decay": 0.9})
    train_step, state = create(model, optax.adam(1e-2), recipe=recipe, size=8, use_ema=True)
    after, metrics = train_step(state, batch(size=8))
    types = {leaf.dtype for leaf in jax.tree.leaves(after)}
    assert types == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert metrics["loss"].dtype == jnp.float32
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    assert all(jax.tree.leaves(moved))


class InfiniteGradient(nn.Module):
    """A finite output whose derivative at 0 is not."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, ())
        return nn.Dense(3)(x.mean((1, 2))) + jnp.sqrt(scale)


def test_the_first_step_that_is_not_finite_is_named():
    train_step, state = create(Linear())
    nan = jax.tree.map(lambda x: x * jnp.nan, state.params)
    bad = state.replace(params=nan, step=jnp.int32(7))
    assert int(train_step(bad, batch())[1]["bad_step"]) == 8
    sums = step.zero_metrics()
    for bad_step in (step.NO_STEP, 9, 8, step.NO_STEP):
        sums = step.add_metrics(sums, {**step.zero_metrics(), "bad_step": jnp.int32(bad_step)})
    assert int(sums["bad_step"]) == 8
    train_step, state = create(InfiniteGradient())
    _, metrics = train_step(state, batch())
    assert np.isfinite(metrics["loss"]) and int(metrics["bad_step"]) == 1


# Compiled: one trace, donated, many steps in one call.


def test_one_trace_serves_many_steps_and_the_state_is_donated():
    optimizer = optax.sgd(0.1, momentum=0.9)
    train_step = step.make_train_step(Normed(), optimizer, RECIPE, num_classes=3)
    traced = chex.assert_max_traces(train_step, n=1)
    compiled = step.jit_train_step(traced, MESH)
    state = start(Normed(), optimizer)
    first = state
    for i in range(4):
        examples = sharding.to_global(batch(seed=i), MESH)
        state, _ = compiled(state, examples)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


@pytest.mark.parametrize("devices", [1, 4])
def test_steps_on_the_device_equal_steps_from_the_host(devices):
    optimizer = optax.sgd(0.1, momentum=0.9)
    mesh = sharding.create_mesh(jax.devices()[:devices])
    recipe = step.Recipe(**{**vars(RECIPE), "flip": True, "mixup": 0.3})
    train_step = step.make_train_step(Normed(), optimizer, recipe, num_classes=3)
    split = batch(20)
    indices = np.random.default_rng(1).integers(0, 20, (5, 8)).astype(np.int32)
    traces = []

    def counted(state, examples):
        traces.append(1)
        return train_step(state, examples)

    create = functools.partial(create_state, Normed(), optimizer, image_shape=(4, 4, 3), seed=1)
    host, host_sums = create(mesh=mesh), step.zero_metrics()
    one = step.jit_train_step(train_step, mesh)
    for row in indices:
        examples = {name: column[row] for name, column in split.items()}
        host, metrics = one(host, sharding.to_global(examples, mesh))
        host_sums = step.add_metrics(host_sums, metrics)

    device, device_sums = create(mesh=mesh), step.zero_metrics()
    several = step.jit_steps_on_device(counted, mesh)
    split = jax.device_put(split, sharding.replicated(mesh))
    for rows in (indices[:4], indices[4:]):
        table = np.zeros((4, 8), np.int32)  # a new one: the device may read it in place, later
        table[: len(rows)] = rows
        device, metrics = several(device, split, table, np.int32(len(rows)))
        device_sums = step.add_metrics(device_sums, metrics)
    assert len(traces) == 1
    assert int(device.step) == 5 and int(device_sums["steps"]) == 5
    jax.tree.map(np.testing.assert_array_equal, device, host)
    jax.tree.map(np.testing.assert_array_equal, device_sums, host_sums)

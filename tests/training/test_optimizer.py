import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from attnzoom_jax.training import optimizer as opt
from attnzoom_jax.training import schedule as sched


def config(optimizer=None, schedule=None):
    return ml_collections.ConfigDict(
        {
            "optimizer": {"name": "sgd", "learning_rate": 0.1, **(optimizer or {})},
            "schedule": {"name": "constant", **(schedule or {})},
        }
    )


def create(params, optimizer=None, schedule=None):
    settings = config(optimizer, schedule)
    rate = sched.create_schedule(settings, total_steps=100, steps_per_epoch=10)
    return opt.create_optimizer(settings, params, schedule=rate)


def some_params(dtype: Any = np.float32, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "stem": {"conv": {"kernel": rng.normal(size=(3, 2)).astype(dtype)}},
        "norm1": {"scale": np.ones(2, dtype), "bias": rng.normal(size=2).astype(dtype)},
        "head": {
            "kernel": rng.normal(size=(2, 4)).astype(dtype),
            "bias": rng.normal(size=4).astype(dtype),
        },
    }


def gradients(params, steps, seed=1) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda p: rng.normal(size=p.shape).astype(p.dtype)  # noqa: E731
    return [jax.tree.map(draw, params) for _ in range(steps)]


def run(optimizer, params, grads):
    """The parameters after each step, and the last state."""
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


# Optimisers against NumPy, in float64.


def slow_sgd(p, grads, decayed, lr, wd=0.0, momentum=0.0, nesterov=False):
    v = np.zeros_like(p)
    for grad in grads:
        g = grad + wd * decayed * p
        v = momentum * v + g
        p = p - lr * (g + momentum * v if nesterov else v)
    return p


def slow_adam(p, grads, decayed, lr, wd=0.0, b1=0.9, b2=0.999, eps=1e-8, name="adam"):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, grad in enumerate(grads, 1):
        g = grad + wd * decayed * p if name == "adam" else grad
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        direction = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        if name != "adam":
            direction = direction + wd * decayed * p
        if name == "lamb":
            direction = direction * np.linalg.norm(p) / np.linalg.norm(direction)
        p = p - lr * direction
    return p


CASES = {
    "sgd": ({}, slow_sgd),
    "sgd momentum": ({"momentum": 0.9}, slow_sgd),
    "sgd nesterov": ({"momentum": 0.8, "nesterov": True}, slow_sgd),
    "adam": ({}, slow_adam),
    "adam betas": ({"b1": 0.5, "b2": 0.9, "eps": 1e-3}, slow_adam),
    "adamw": ({}, functools.partial(slow_adam, name="adamw")),
    "lamb": ({}, functools.partial(slow_adam, name="lamb", eps=1e-6)),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_equals_numpy_in_float64(case, weight_decay):
    settings, slow = CASES[case]
    settings = {"name": case.split()[0], **settings}
    with jax.enable_x64(True):
        params = some_params(np.float64)
        grads = gradients(params, 5)
        optimizer = create(params, {**settings, "weight_decay": weight_decay})
        got = run(optimizer, params, grads)[0][-1]
    del settings["name"]
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        of_leaf = [dict(jax.tree_util.tree_leaves_with_path(grad))[keys] for grad in grads]
        decayed = keys[-1].key == "kernel"
        want = slow(leaf, of_leaf, decayed, 0.1, weight_decay, **settings)
        got_leaf = dict(jax.tree_util.tree_leaves_with_path(got))[keys]
        assert got_leaf.dtype == np.float64
        np.testing.assert_allclose(got_leaf, want, rtol=1e-6, err_msg=str(keys))


def test_the_schedule_sets_the_size_of_each_step():
    params = some_params()
    settings = config({"learning_rate": 0.5}, {"name": "cosine", "warmup_steps": 2})
    schedule: Any = sched.create_schedule(settings, total_steps=6, steps_per_epoch=1)
    grads = [jax.tree.map(np.ones_like, params)] * 6
    seen, _ = run(opt.create_optimizer(settings, params, schedule=schedule), params, grads)
    kernels = [params["head"]["kernel"], *(p["head"]["kernel"] for p in seen)]
    moved = [float(np.mean(a - b)) for a, b in itertools.pairwise(kernels)]
    np.testing.assert_allclose(moved, [schedule(s) for s in range(6)], rtol=1e-4, atol=1e-6)


def test_clipping_is_by_the_norm_of_all_gradients_and_before_decay():
    params = some_params()
    grads = gradients(params, 1)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads[0])))
    for clip_norm in (0, 0.5 * norm, 2 * norm):
        settings = {"clip_norm": clip_norm, "weight_decay": 0.2}
        got = run(create(params, settings), params, grads)[0][-1]
        share = min(1, clip_norm / norm) if clip_norm else 1
        for layer in ("stem/conv/kernel", "norm1/scale"):
            p, g, after = (
                functools.reduce(lambda tree, key: tree[key], layer.split("/"), tree)
                for tree in (params, grads[0], got)
            )
            decay = 0.2 * p * (layer == "stem/conv/kernel")
            np.testing.assert_allclose(after, p - 0.1 * (share * g + decay), rtol=1e-5, atol=1e-6)


# Masks and multipliers: what moves and what does not.


def moved(optimizer, params, grads):
    """How far each path moves in the run, by its path."""
    after = run(optimizer, params, grads)[0][-1]
    moves = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after, params)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): move
        for keys, move in jax.tree_util.tree_leaves_with_path(moves)
    }


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, {"stem/conv/kernel", "head/kernel"}),
        ("head/.*", {"head/kernel", "head/bias"}),
        (".*", {"stem/conv/kernel", "head/kernel", "head/bias", "norm1/scale", "norm1/bias"}),
    ],
)
def test_weight_decay_mask(mask, expected):
    params = some_params()
    nothing = [jax.tree.map(np.zeros_like, params)]
    settings = {"weight_decay": 0.1, "weight_decay_mask": mask}
    moves = moved(create(params, settings), params, nothing)
    assert {path for path, move in moves.items() if move > 0} == expected


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_multipliers_scale_the_update_of_the_first_match(name):
    params = some_params()
    grads = gradients(params, 1)
    decay = {"name": name, "weight_decay": 0.1}
    plain = moved(create(params, decay), params, grads)
    pairs = (("head/bias", 3.0), ("head/.*", 0.5), (".*", 1))
    scaled_moves = moved(
        create(params, {**decay, "learning_rate_multipliers": pairs}), params, grads
    )
    factors = {"head/bias": 3.0, "head/kernel": 0.5}
    want = {path: factors.get(path, 1.0) * move for path, move in plain.items()}
    assert scaled_moves == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"), [("sgd", {}), ("lamb", {}), ("adamw", {"name": "plateau", "mode": "min"})]
)
def test_factor_zero_freezes(name, schedule):
    params = some_params()
    grads = gradients(params, 3)
    # Frozen gradients have no part in the norm, even when they are not finite.
    for grad in grads:
        grad["stem"]["conv"]["kernel"] = np.full((3, 2), np.nan, np.float32)
    pairs = (("stem/.*", 0), (".*", 1.0))
    settings = {"name": name, "weight_decay": 0.1, "clip_norm": 0.5}
    frozen = create(params, {**settings, "learning_rate_multipliers": pairs}, schedule)
    seen, state = run(frozen, params, grads)
    np.testing.assert_array_equal(
        seen[-1]["stem"]["conv"]["kernel"], params["stem"]["conv"]["kernel"]
    )
    assert all(leaf.shape != (3, 2) for leaf in jax.tree.leaves(state))  # and keep no moments
    # The others move as if the frozen ones were not there.
    rest = {key: value for key, value in params.items() if key != "stem"}
    rest_grads = [{key: value for key, value in g.items() if key != "stem"} for g in grads]
    alone = run(create(rest, settings, schedule), rest, rest_grads)[0][-1]
    for key, layer in alone.items():
        jax.tree.map(np.testing.assert_array_equal, layer, seen[-1][key])


def test_shapes_are_enough_to_create_one():
    params = some_params()
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    settings = {
        "weight_decay": 0.1,
        "learning_rate_multipliers": [["stem/.*", 0.0], [".*", 2.0]],  # as JSON gives them back
    }
    grads = gradients(params, 1)
    from_shapes, from_params = (
        run(create(tree, settings), params, grads)[0][-1] for tree in (shapes, params)
    )
    jax.tree.map(np.testing.assert_array_equal, from_shapes, from_params)


# Bad configs, each one clear line.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ({"name": None}, "optimizer.name is missing; there is: sgd, adam"),
        ({"momentun": 0.9}, "'sgd': 'momentun'; did you mean 'momentum'"),
        ({"name": "adam", "momentum": 0.9}, "unknown key for optimizer 'adam': 'momentum'"),
        ({"learning_rate": None}, "learning_rate is missing"),
        ({"learning_rate": -1}, "learning_rate is -1; expected a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clip_norm": -1}, "clip_norm is -1"),
        ({"nesterov": True}, "nesterov is True without momentum"),
        ({"weight_decay": 0.1, "weight_decay_mask": "kernel"}, "'kernel' matches no parameter"),
        ({"weight_decay": 0.1, "weight_decay_mask": "head"}, "'head' matches no parameter"),
        ({"weight_decay": 0.1, "weight_decay_mask": "*"}, "is no regular expression"),
        ({"learning_rate_multipliers": (("head/.*", -1.0),)}, "factor of 'head/.*' is -1.0"),
    ],
)
def test_bad_optimizer(settings, message):
    with pytest.raises(ValueError) as error:
        create(some_params(), settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("pairs", "messages"),
    [
        (
            (("head/.*", 1.0), ("norm1/.*", 0.5)),
            ["no pattern matches stem/conv/kernel", "'head/.*', 'norm1/.*'"],
        ),
        ((("haed/.*", 1.0), (".*", 1.0)), ["'haed/.*' matches no parameter", "head/bias"]),
        (((".*", 1.0), ("head/.*", 10.0)), ["earlier patterns take", "'head/.*'"]),
    ],
)
def test_multipliers_that_miss(pairs, messages):
    with pytest.raises(ValueError) as error:
        create(some_params(), {"learning_rate_multipliers": pairs})
    for message in messages:
        assert message in str(error.value)


# The plateau schedule, whose state is a part of the optimiser's.


def test_plateau_scales_the_update_and_survives_as_arrays():
    params = some_params()
    grad = gradients(params, 1)[0]
    settings = {"name": "plateau", "mode": "min", "patience": 0}
    optimizer = create(params, {"momentum": 0.9}, settings)
    state = optimizer.init(params)
    before, _ = optimizer.update(grad, state, params)
    lowered = sched.plateau_update(sched.plateau_update(state, 1.0), 1.0)
    # Through a file and back: nothing but arrays.
    leaves, treedef = jax.tree.flatten(lowered)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    restored = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    after, restored = optimizer.update(grad, restored, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), after, scaled(before))
    third = sched.plateau_update(restored, 1.0)
    assert float(sched.plateau_scale(third)) == pytest.approx(0.01)


def scaled(tree):
    return jax.tree.map(lambda leaf: 0.1 * leaf, tree)


def test_plateau_state_may_be_donated():
    params = jax.tree.map(jnp.asarray, some_params())
    optimizer = create(params, {"momentum": 0.9}, {"name": "plateau", "mode": "max"})
    step = jax.jit(lambda g, s, p: optimizer.update(g, s, p)[1], donate_argnums=1)
    state = optimizer.init(params)
    for _ in range(2):
        state = sched.plateau_update(step(params, state, params), 0.5)
    assert float(sched.plateau_scale(state)) == 1


def test_without_a_plateau():
    state = create(some_params()).init(some_params())
    assert float(sched.plateau_scale(state)) == 1
    with pytest.raises(ValueError, match="holds no plateau"):
        sched.plateau_update(state, 1.0)

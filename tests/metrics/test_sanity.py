from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.metrics.sanity import class_sensitivity, other_classes, randomized
from attnzoom_jax.metrics.similarity import spearman, ssim

RNG = np.random.default_rng(0)
KEY = jax.random.key(2)
ORDER = ["head", "stage2", "stage1"]


def tree() -> Any:
    def conv(*shape):
        return {"conv": {"kernel": jnp.asarray(RNG.normal(1, 3, shape)), "bias": jnp.arange(5.0)}}

    return {
        "stage1": conv(3, 3, 2, 5),
        "stage10": conv(3, 3, 5, 5),  # its name begins with that of another
        "stage2": conv(3, 3, 5, 5),
        "head": {"kernel": jnp.asarray(RNG.normal(size=(5, 7)))},
    }


def changed(params, others):
    """The top-level names whose leaves differ."""
    return {
        name
        for name in params
        if any(
            not np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(params[name]), jax.tree.leaves(others[name]), strict=True
            )
        )
    }


def test_cascading_draws_one_more_each_time_and_independent_one_alone():
    params = tree()
    cascade = list(randomized(params, ORDER, key=KEY))
    alone = list(randomized(params, ORDER, key=KEY, mode="independent"))
    assert [name for name, _ in cascade] == [name for name, _ in alone] == ORDER
    for i, name in enumerate(ORDER):
        assert changed(params, cascade[i][1]) == set(ORDER[: i + 1])
        assert changed(params, alone[i][1]) == {name}
        # The same draw in both modes.
        jax.tree.map(np.testing.assert_array_equal, cascade[-1][1][name], alone[i][1][name])
    other = list(randomized(params, ORDER, key=jax.random.key(3)))
    assert changed(other[-1][1], cascade[-1][1]) == set(ORDER)


def test_permuting_keeps_the_values_and_normal_their_mean_and_deviation():
    params = {"block": {"kernel": jnp.asarray(RNG.normal(2, 3, (40, 50))), "var": jnp.arange(9.0)}}
    (_, permuted), *_ = randomized(params, ["block"], key=KEY)
    (_, drawn), *_ = randomized(params, ["block"], key=KEY, redraw="normal")
    for name, leaf in params["block"].items():
        assert sorted(permuted["block"][name].ravel()) == sorted(leaf.ravel())
        assert (permuted["block"][name] != leaf).any()
    kernel = drawn["block"]["kernel"]
    assert kernel.mean() == pytest.approx(2, abs=0.3) and kernel.std() == pytest.approx(3, abs=0.3)
    assert not np.isin(kernel, params["block"]["kernel"]).any()
    assert sorted(drawn["block"]["var"]) == list(range(9))  # a variance must not become negative


def test_any_tree_and_any_depth_of_names():
    params = {"trunk": (jnp.arange(9.0), {"w": jnp.arange(8.0)}), "bias": jnp.arange(7.0)}
    steps = list(randomized(params, ["bias", "trunk/1", "trunk/0"], key=KEY))
    got = [
        [
            bool((leaf != old).any())
            for leaf, old in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True)
        ]
        for _, new in steps
    ]
    assert got == [[True, False, False], [True, False, True], [True, True, True]]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for name in ("stage1", "stage2"):
            x = nn.Conv(4, (3, 3), name=f"{name}_conv")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=name)(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_flax_variables_are_drawn_with_their_statistics():
    net, images = Net(), jnp.asarray(RNG.normal(size=(2, 5, 5, 2)), jnp.float32)
    variables = net.init(KEY, images)
    spread = jnp.arange(1.0, 5.0)
    variables["batch_stats"]["stage2"] = {"mean": -spread, "var": spread}
    (name, random), (_, more) = randomized(variables, ["head", "stage2"], key=KEY)
    assert name == "head"
    assert changed(variables["params"], random["params"]) == {"head"}
    assert changed(variables["batch_stats"], random["batch_stats"]) == set()
    assert changed(variables["batch_stats"], more["batch_stats"]) == {"stage2"}
    assert (net.apply(variables, images) != net.apply(random, images)).all()  # pyright: ignore

    def init(key):
        return net.init(key, images)

    *_, (_, fresh) = randomized(variables, ["head", "stage2", "stage2_conv"], key=KEY, redraw=init)
    want = net.init(KEY, images)
    for name in ("head", "stage2_conv"):
        jax.tree.map(np.testing.assert_array_equal, fresh["params"][name], want["params"][name])
    np.testing.assert_array_equal(fresh["batch_stats"]["stage2"]["var"], np.ones(4))


def test_a_map_of_the_image_alone_stays_and_one_of_the_weights_does_not():
    params = {"kernel": jnp.asarray(RNG.normal(size=(12, 13)), jnp.float32)}
    images = jnp.asarray(RNG.normal(size=(2, 12, 13, 1)), jnp.float32)
    ((_, random),) = randomized(params, ["kernel"], key=KEY)

    def explain(params):
        return images[..., 0] * params["kernel"]

    assert (jnp.abs(spearman(explain(params), explain(random))) < 0.5).all()
    np.testing.assert_allclose(spearman(images[..., 0], images[..., 0]), 1, atol=1e-6)


def test_class_sensitivity_is_the_similarity_of_two_classes():
    images = jnp.asarray(RNG.normal(size=(3, 12, 11, 1)), jnp.float32)
    weights = jnp.asarray(RNG.normal(size=(4, 12, 11)), jnp.float32)

    def explain(images, targets):
        return images[..., 0] * weights[targets]

    targets, others = jnp.array([0, 1, 2]), jnp.array([3, 1, 0])
    got = class_sensitivity(explain, images, targets, others)
    maps, other_maps = explain(images, targets), explain(images, others)
    np.testing.assert_allclose(got["spearman"], spearman(maps, other_maps), rtol=1e-6)
    np.testing.assert_allclose(
        got["spearman_abs"], spearman(jnp.abs(maps), jnp.abs(other_maps)), rtol=1e-6
    )
    np.testing.assert_allclose(got["ssim"], ssim(maps, other_maps), rtol=1e-6)
    for values in got.values():
        assert values[1] == pytest.approx(1, abs=1e-5) and values[0] < 0.9 and values[2] < 0.9


def test_other_classes_are_all_others_equally_and_follow_ids():
    targets = jnp.asarray(RNG.integers(0, 4, 4000))
    others = other_classes(targets, 4, key=KEY)
    steps = np.bincount((others - targets) % 4, minlength=4)
    assert steps[0] == 0 and (np.abs(steps[1:] - 4000 / 3) < 150).all()
    ids = jnp.array([5, 9])
    np.testing.assert_array_equal(other_classes(targets[ids], 4, key=KEY, ids=ids), others[ids])
    np.testing.assert_array_equal(other_classes(jnp.array([0, 1]), 2, key=KEY), [1, 0])


def test_bad_arguments_are_refused_at_once():
    params = tree()
    wrong: Any = [
        (["stage3"], {}, "unknown layer 'stage3'; did you mean 'stage2' or"),
        ([], {}, "expected names of layers from the output down"),
        ("head", {}, "expected names of layers from the output down"),
        (ORDER, {"mode": "cascade"}, "did you mean 'cascading'"),
        (ORDER, {"redraw": "permutation"}, "did you mean 'permute'"),
        (ORDER, {"redraw": lambda key: {"head": params["head"]}}, "other branches or shapes"),
    ]
    for order, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            randomized(params, order, key=KEY, **options)  # not iterated
    with pytest.raises(ValueError, match="num_classes is 1"):
        other_classes(jnp.array([0]), 1, key=KEY)

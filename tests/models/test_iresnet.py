"""Improved residual networks against a slow NumPy forward pass; the promises of their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models import Insert
from attnzoom_jax.models.iresnet import IResNet
from tests.models.backbone_checks import relevance_at
from tests.models.test_resnet import (
    random_images,
    random_variables,
    relu,
    slow_conv,
    slow_max_pool,
    slow_norm,
    tap_shapes,
)


def slow_forward(variables, images, *, stem, stage_sizes):
    params, stats = variables["params"], variables["batch_stats"]
    kernel = params["stem"]["conv1"]["kernel"]
    x = slow_conv(images, kernel, stride=1 if stem == "cifar" else 2, pad=kernel.shape[0] // 2)
    x = relu(slow_norm(x, params["stem"]["norm1"], stats["stem"]["norm1"]))
    for stage, size in enumerate(stage_sizes, start=1):
        for b in range(1, size + 1):
            p = params[f"stage{stage}"][f"block{b}"]
            s = stats[f"stage{stage}"][f"block{b}"]

            def norm(x, name, p=p, s=s):
                return slow_norm(x, p[name], s[name])

            def conv(x, name, stride=1, p=p):
                kernel = p[name]["kernel"]
                return slow_conv(x, kernel, stride=stride, pad=kernel.shape[0] // 2)

            halves = b == 1 and (stage > 1 or stem == "imagenet")
            y = x
            if b > 2:
                y = norm(y, "norm0")
            if b > 1:
                y = relu(y)
            y = relu(norm(conv(y, "conv1"), "norm1"))
            y = relu(norm(conv(y, "conv2", 2 if halves else 1), "norm2"))
            y = conv(y, "conv3")
            if b == 1:
                y = norm(y, "norm3")
                x = slow_max_pool(x) if halves else x
                x = norm(conv(x, "shortcut_conv"), "shortcut_norm")
            x = x + y
            if b == size:
                x = relu(norm(x, "norm3"))
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(
    ("stem", "stage_sizes"), [("imagenet", (2, 2)), ("cifar", (4, 2)), ("small", (3,))]
)
def test_equals_slow_forward_pass(stem, stage_sizes):
    model = IResNet(5, stem=stem, stage_sizes=stage_sizes, width=4)
    images = random_images()
    variables = random_variables(model, images)
    expected = slow_forward(
        jax.tree.map(np.float64, variables),
        images.astype(np.float64),
        stem=stem,
        stage_sizes=stage_sizes,
    )
    assert expected.std() > 0.1
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, images), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("stem", "sizes"),
    [
        ("imagenet", [(16, 12), (8, 6), (4, 3), (2, 2), (1, 1)]),
        ("small", [(16, 12), (16, 12), (8, 6), (4, 3), (2, 2)]),
        ("cifar", [(32, 24), (32, 24), (16, 12), (8, 6), (4, 3)]),
    ],
)
def test_maps_of_every_stage(stem, sizes):
    model = IResNet(7, stem=stem, stage_sizes=(2, 2, 2, 2), width=4)
    taps = tap_shapes(model, (2, 32, 24, 3))
    assert taps["head"].shape == (2, 7)
    assert taps["stem"].shape == (2, *sizes[0], 4)
    for i, size in enumerate(sizes[1:]):
        assert taps[f"stage{i + 1}"].shape == (2, *size, 16 * 2**i)


def test_tap_names_and_types():
    model = IResNet(3, stem="cifar", stage_sizes=(4,), width=4, dtype="bfloat16")
    taps = tap_shapes(model, (1, 8, 8, 3))
    inside = {"conv1", "norm1", "relu1", "conv2", "norm2", "relu2", "conv3"}
    blocks = {
        "block1": inside | {"norm3", "shortcut_conv", "shortcut_norm"},
        "block2": inside | {"relu0"},
        "block3": inside | {"norm0", "relu0"},
        "block4": inside | {"norm0", "relu0", "norm3", "relu3"},
    }
    expected = {"", "head", "stem", "stem/conv1", "stem/norm1", "stem/relu1", "stage1"}
    for block, parts in blocks.items():
        expected |= {f"stage1/{block}"} | {f"stage1/{block}/{part}" for part in parts}
    assert set(taps) == expected
    inner = {path for path, leaf in taps.items() if leaf.dtype == jnp.bfloat16}
    assert inner == expected - {"", "head"}
    assert taps[""].dtype == jnp.float32


def test_training_updates_every_statistic_and_reaches_every_parameter():
    model = IResNet(3, stem="cifar", stage_sizes=(3,), width=2)
    images = random_images(n=4, h=6, w=6)
    variables = random_variables(model, images)

    @jax.jit
    def step(params):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return (logits[:, 0] ** 2).sum(), updates["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    grads, stats = step(variables["params"])
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))
    same = jax.tree.map(lambda a, b: bool(np.any(a == b)), variables["batch_stats"], stats)
    assert not any(jax.tree.leaves(same))


@pytest.mark.parametrize("path", ["stem", "stage1/block2", "stage2"])
def test_a_zoom_inside_changes_no_parameter_of_the_network(path):
    def shapes(model):
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9, 9, 3)))["params"]

    plain = IResNet(3, stage_sizes=(3, 2), width=4)
    assert shapes(Insert(plain, {path: AttentionZoom()}))["backbone"] == shapes(plain)


def test_excitation_backprop_accounts_for_all_relevance():
    model = IResNet(3, stem="cifar", stage_sizes=(2, 2), width=4)
    images = jnp.abs(random_images(n=1, h=8, w=8))
    variables = random_variables(model, images)

    measure = relevance_at("stage1", model=model, images=images, negative="clamp", targets=[1])
    (at_tap,), (absolute,), (dropped,) = measure(variables)
    np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-5)
    np.testing.assert_allclose(at_tap, absolute, rtol=1e-5)
    assert at_tap > 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "cfar"}, "stem 'cfar'.*did you mean 'cifar'"),
        ({"stage_sizes": (3, 1)}, "stage_sizes=.*each at least 2"),
        ({"stage_sizes": ()}, "stage_sizes"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        IResNet(**{"num_classes": 3, **fields})

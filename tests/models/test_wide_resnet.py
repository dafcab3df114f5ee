"""Wide residual networks against a slow NumPy forward pass, and the promises of their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models import Insert
from attnzoom_jax.models.wide_resnet import WideResNet
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
    if stem == "imagenet":
        x = slow_max_pool(x)
    for stage, size in enumerate(stage_sizes, start=1):
        p, s = params[f"stage{stage}"], stats[f"stage{stage}"]
        for b in range(1, size + 1):
            block, of_block = p[f"block{b}"], s[f"block{b}"]
            stride = 2 if stage > 1 and b == 1 else 1
            a = relu(slow_norm(x, block["norm1"], of_block["norm1"]))
            y = slow_conv(a, block["conv1"]["kernel"], stride=stride, pad=1)
            y = relu(slow_norm(y, block["norm2"], of_block["norm2"]))
            y = slow_conv(y, block["conv2"]["kernel"], stride=1, pad=1)
            if "shortcut_conv" in block:
                x = slow_conv(a, block["shortcut_conv"]["kernel"], stride=stride, pad=0)
            x = x + y
        if stage == len(stage_sizes):
            x = relu(slow_norm(x, p["norm1"], s["norm1"]))
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(
    ("stem", "stage_sizes", "widen", "projections"),
    [("cifar", (2, 1), 2, 2), ("imagenet", (1, 2), 1, 1), ("small", (1, 1, 1), 1, 2)],
)
def test_equals_slow_forward_pass(stem, stage_sizes, widen, projections):
    model = WideResNet(5, stem=stem, stage_sizes=stage_sizes, widen=widen, width=4)
    images = random_images()
    variables = random_variables(model, images)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    ]
    # With widen 1 the first block keeps its channels, and its shortcut is the identity.
    assert sum("shortcut_conv" in path for path in paths) == projections
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
        ("imagenet", [(8, 6), (8, 6), (4, 3), (2, 2)]),
        ("small", [(16, 12), (16, 12), (8, 6), (4, 3)]),
        ("cifar", [(32, 24), (32, 24), (16, 12), (8, 6)]),
    ],
)
def test_maps_of_every_stage(stem, sizes):
    model = WideResNet(7, stem=stem, stage_sizes=(1, 1, 1), widen=3, width=4)
    taps = tap_shapes(model, (2, 32, 24, 3))
    assert taps["head"].shape == (2, 7)
    assert taps["stem"].shape == (2, *sizes[0], 4)
    for i, size in enumerate(sizes[1:]):
        assert taps[f"stage{i + 1}"].shape == (2, *size, 12 * 2**i)


def test_tap_names_and_types():
    model = WideResNet(3, stage_sizes=(1, 2), widen=2, width=4, dtype="bfloat16")
    taps = tap_shapes(model, (1, 8, 8, 3))
    parts = [f"{kind}{i}" for i in (1, 2) for kind in ("norm", "relu", "conv")] + ["dropout1"]
    expected = {"", "head", "stem", "stem/conv1", "stage1", "stage2", "stage2/norm1"}
    expected |= {"stage2/relu1", "stage1/block1/shortcut_conv", "stage2/block1/shortcut_conv"}
    for block in ("stage1/block1", "stage2/block1", "stage2/block2"):
        expected |= {block} | {f"{block}/{part}" for part in parts}
    assert set(taps) == expected
    inner = {path for path, leaf in taps.items() if leaf.dtype == jnp.bfloat16}
    assert inner == expected - {"", "head"}
    assert taps[""].dtype == jnp.float32


def test_training_updates_every_statistic_and_reaches_every_parameter():
    model = WideResNet(3, stage_sizes=(1, 1), widen=2, width=2, dropout=0.5)
    images = random_images(n=4, h=8, w=8)
    variables = random_variables(model, images)

    @jax.jit
    def step(params, key):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return (logits[:, 0] ** 2).sum(), updates["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, stats), grads = step(variables["params"], jax.random.key(0, impl="rbg"))
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))
    same = jax.tree.map(lambda a, b: bool(np.any(a == b)), variables["batch_stats"], stats)
    assert not any(jax.tree.leaves(same))
    (other, _), _ = step(variables["params"], jax.random.key(1, impl="rbg"))
    assert loss != other  # other units were dropped


@pytest.mark.parametrize("path", ["stem", "stage1/block1", "stage2"])
def test_a_zoom_inside_changes_no_parameter_of_the_network(path):
    def shapes(model):
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9, 9, 3)))["params"]

    plain = WideResNet(3, stage_sizes=(2, 1), widen=2, width=4)
    assert shapes(Insert(plain, {path: AttentionZoom()}))["backbone"] == shapes(plain)


def test_excitation_backprop_accounts_for_all_relevance():
    model = WideResNet(3, stage_sizes=(1, 1), widen=1, width=4)
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
        ({"widen": 0}, "widen=0"),
        ({"stage_sizes": (4, 0)}, "stage_sizes=.*each at least 1"),
        ({"dropout": 1.5}, "dropout=1.5.*fraction"),
        ({"width": 0}, "width=0"),
    ],
)
def test_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        WideResNet(**{"num_classes": 3, **fields})

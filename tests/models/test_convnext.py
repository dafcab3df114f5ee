"""ConvNeXt against a slow NumPy forward pass, its names, training and relevance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.models.convnext import ConvNeXt
from tests.models.backbone_checks import every_value_is_reached, relevance_at, training_step
from tests.models.test_resnet import (
    fast_key,
    flat_taps,
    random_images,
    random_variables,
    slow_conv,
    tap_shapes,
)

# ---- the oracle: float64, one output pixel at a time, nothing taken from the package


def slow_layer_norm(x, p):
    y = x - x.mean(axis=-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-6)
    return y * p["scale"] + p["bias"]


gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)


def slow_forward(variables, images, *, stem, stage_sizes):
    params = variables["params"]

    def conv(x, p, *, stride, pad):
        return slow_conv(x, p["kernel"], stride=stride, pad=pad) + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    stride, pad = {"imagenet": (4, 0), "small": (2, 0), "cifar": (1, 1)}[stem]
    x = conv(images, params["stem"]["conv1"], stride=stride, pad=pad)
    x = slow_layer_norm(x, params["stem"]["norm1"])
    for stage, size in enumerate(stage_sizes, start=1):
        p = params[f"stage{stage}"]
        if stage > 1:
            x = slow_layer_norm(x, p["downsample"]["norm1"])
            x = conv(x, p["downsample"]["conv1"], stride=2, pad=0)
        for b in range(1, size + 1):
            of = p[f"block{b}"]
            y = slow_layer_norm(conv(x, of["conv1"], stride=1, pad=3), of["norm1"])
            y = dense(gelu(dense(y, of["dense1"])), of["dense2"])
            x = x + y * of["layer_scale"]["scale"]
    return dense(slow_layer_norm(x.mean(axis=(1, 2)), params["head_norm"]), params["head"])


# ---- values


@pytest.mark.parametrize(
    ("stem", "stage_sizes"), [("imagenet", (1, 2)), ("small", (2, 1)), ("cifar", (1, 1, 1))]
)
def test_equals_slow_forward_pass(stem, stage_sizes):
    model = ConvNeXt(5, stem=stem, stage_sizes=stage_sizes, width=6)
    images = random_images()
    variables = random_variables(model, images)
    logits = jax.jit(model.apply)(variables, images)
    expected = slow_forward(
        jax.tree.map(np.float64, variables),
        images.astype(np.float64),
        stem=stem,
        stage_sizes=stage_sizes,
    )
    assert expected.std() > 0.1  # a network that has died would agree with anything
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# ---- names and sizes


def test_tap_names():
    taps = tap_shapes(ConvNeXt(3, stage_sizes=(2, 1), width=4), (1, 16, 16, 3))
    parts = ["conv1", "norm1", "dense1", "gelu1", "dense2", "layer_scale", "drop_path"]
    expected = {"", "head", "head_norm", "stem", "stem/conv1", "stem/norm1", "stage1", "stage2"}
    expected |= {f"stage2/downsample{end}" for end in ("", "/norm1", "/conv1")}
    for block in ("stage1/block1", "stage1/block2", "stage2/block1"):
        expected |= {block} | {f"{block}/{part}" for part in parts}
    assert set(taps) == expected
    assert taps["stage1/block1/dense1"].shape == (1, 4, 4, 16)


def test_a_depthwise_kernel_sees_one_channel():
    shapes = jax.eval_shape(ConvNeXt(3).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert shapes["params"]["stage1"]["block1"]["conv1"]["kernel"].shape == (7, 7, 1, 96)


# ---- initialisation and training


def test_blocks_start_near_the_identity():
    model = ConvNeXt(3, stem="cifar", stage_sizes=(2, 1), width=16)
    images = random_images(n=1, h=8, w=8)
    variables = jax.jit(model.init)(fast_key(), images)
    _, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))(
        variables, images
    )
    taps = flat_taps(state)
    np.testing.assert_allclose(taps["stage1"], taps["stem"], atol=1e-4)
    block = variables["params"]["stage2"]["block1"]
    np.testing.assert_allclose(block["layer_scale"]["scale"], 1e-6)
    assert np.std(block["dense1"]["kernel"]) == pytest.approx(0.02, rel=0.05)


def test_training_reaches_every_parameter():
    model = ConvNeXt(3, stem="cifar", stage_sizes=(1, 1), width=4)
    images = random_images(n=2, h=8, w=8)
    variables = random_variables(model, images)
    assert set(variables) == {"params"}
    (loss, stats), grads = training_step(model, variables, images)(0)
    assert stats == {}
    assert every_value_is_reached(grads)
    expected = jax.jit(model.apply)(variables, images)  # nothing is random by default
    weights = np.cos(np.arange(expected.size)).reshape(expected.shape)
    np.testing.assert_allclose(loss, (weights * expected).sum(), rtol=1e-4, atol=1e-4)


def test_drop_path_rises_from_block_to_block_and_drops_whole_images():
    model = ConvNeXt(3, stem="cifar", stage_sizes=(2, 1), width=4, drop_path=0.5)
    images = random_images(n=64, h=4, w=4)
    variables = random_variables(model, images)

    kinds = ("layer_scale", "drop_path")

    def branches(train):
        rngs = {"dropout": jax.random.key(0)}
        _, state = model.apply(
            variables, images, train=train, rngs=rngs, capture_intermediates=True
        )
        taps = flat_taps(state)
        return {path: taps[path] for path in taps if path.split("/")[-1] in kinds}

    taps = jax.jit(branches, static_argnums=0)(True)
    for block, rate in (("stage1/block1", 0), ("stage1/block2", 0.25), ("stage2/block1", 0.5)):
        before, after = taps[f"{block}/layer_scale"], taps[f"{block}/drop_path"]
        kept = np.any(after != 0, axis=(1, 2, 3))
        assert 1 - kept.mean() == pytest.approx(rate, abs=0.15)
        expected = np.where(kept[:, None, None, None], before / (1 - rate), 0)
        np.testing.assert_allclose(after, expected, rtol=1e-5)

    taps = jax.jit(branches, static_argnums=0)(False)
    np.testing.assert_array_equal(
        taps["stage2/block1/drop_path"], taps["stage2/block1/layer_scale"]
    )


# ---- relevance


def test_excitation_backprop_accounts_for_all_relevance():
    model = ConvNeXt(5, stem="cifar", stage_sizes=(1, 1, 1), width=8)
    images = np.abs(random_images(h=32, w=32))
    measure = relevance_at("stage1", model=model, images=images, negative="clamp")
    at_tap, absolute, dropped = measure(random_variables(model, images))
    np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-5)
    np.testing.assert_allclose(absolute, at_tap, atol=1e-5)
    assert np.all(at_tap > 0.3)

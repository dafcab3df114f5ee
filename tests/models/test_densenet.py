"""DenseNet against a slow NumPy forward pass, its names, training and relevance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.models.densenet import DenseNet
from tests.models.backbone_checks import (
    every_value_changed,
    every_value_is_reached,
    plain_variables,
    relevance_at,
    training_step,
)
from tests.models.test_resnet import (
    flat_taps,
    random_images,
    random_variables,
    relu,
    slow_conv,
    slow_max_pool,
    slow_norm,
)

# ---- the oracle: float64, the paper's order of operations, nothing taken from the package


def slow_average_pool(x):
    h, w = x.shape[1] // 2, x.shape[2] // 2
    y = np.zeros((x.shape[0], h, w, x.shape[-1]))
    for i in range(h):
        for j in range(w):
            y[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(1, 2))
    return y


def slow_forward(variables, images, *, stem, stage_sizes):
    params, stats = variables["params"], variables["batch_stats"]
    kernel = params["stem"]["conv1"]["kernel"]
    x = slow_conv(images, kernel, stride=1 if stem == "cifar" else 2, pad=kernel.shape[0] // 2)
    x = relu(slow_norm(x, params["stem"]["norm1"], stats["stem"]["norm1"]))
    if stem == "imagenet":
        x = slow_max_pool(x)
    for stage, size in enumerate(stage_sizes, start=1):
        p, s = params[f"stage{stage}"], stats[f"stage{stage}"]
        if stage > 1:
            of, to = p["transition"], s["transition"]
            x = relu(slow_norm(x, of["norm1"], to["norm1"]))
            x = slow_average_pool(slow_conv(x, of["conv1"]["kernel"], stride=1, pad=0))
        features = [x]
        for b in range(1, size + 1):
            of, to = p[f"block{b}"], s[f"block{b}"]
            y = np.concatenate(features, axis=-1)
            y = relu(slow_norm(y, of["norm1"], to["norm1"]))
            y = slow_conv(y, of["conv1"]["kernel"], stride=1, pad=0)
            y = relu(slow_norm(y, of["norm2"], to["norm2"]))
            features.append(slow_conv(y, of["conv2"]["kernel"], stride=1, pad=1))
        x = np.concatenate(features, axis=-1)
    last = f"stage{len(stage_sizes)}"
    x = relu(slow_norm(x, params[last]["norm1"], stats[last]["norm1"]))
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


# ---- values


@pytest.mark.parametrize(
    ("stem", "stage_sizes"), [("imagenet", (2, 1)), ("cifar", (1, 2, 1)), ("small", (3, 1))]
)
def test_equals_slow_forward_pass(stem, stage_sizes):
    model = DenseNet(5, stem=stem, stage_sizes=stage_sizes, width=6)
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


# ---- names


def test_tap_names_and_what_a_block_adds():
    model = DenseNet(3, stem="cifar", stage_sizes=(2, 1), width=4)
    images = random_images(n=1, h=8, w=8)
    variables = random_variables(model, images)
    _, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))(
        variables, images
    )
    taps = flat_taps(state)
    parts = [f"{kind}{i}" for i in (1, 2) for kind in ("norm", "relu", "conv")]
    expected = {"", "head", "stem", "stem/conv1", "stem/norm1", "stem/relu1", "stage1", "stage2"}
    expected |= {f"stage2/transition{end}" for end in ("", "/norm1", "/relu1", "/conv1")}
    expected |= {"stage2/norm1", "stage2/relu1"}
    for block in ("stage1/block1", "stage1/block2", "stage2/block1"):
        expected |= {block} | {f"{block}/{part}" for part in parts}
    assert set(taps) == expected
    np.testing.assert_array_equal(taps["stage1/block1"][..., :4], taps["stem"])
    for block, before in (("block1", 4), ("block2", 6)):
        np.testing.assert_array_equal(
            taps[f"stage1/{block}"][..., before:], taps[f"stage1/{block}/conv2"]
        )
    np.testing.assert_array_equal(taps["stage1"], taps["stage1/block2"])
    assert taps["stage1"].min() < 0 == taps["stage2"].min()  # only the last stage is normalised


# ---- training


def test_training_updates_every_statistic_and_reaches_every_parameter():
    model = DenseNet(3, stem="cifar", stage_sizes=(1, 1), width=4)
    images = random_images(n=4, h=8, w=8)
    variables = random_variables(model, images)
    (_, stats), grads = training_step(model, variables, images)(0)
    assert every_value_is_reached(grads)
    assert every_value_changed(variables["batch_stats"], stats)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}


# ---- relevance


def test_excitation_backprop_loses_next_to_nothing():
    """Though stages end with values of either sign, each linear map sees those of a ReLU."""
    model = DenseNet(5, stem="cifar", stage_sizes=(2, 1, 1), width=8)
    images = np.abs(random_images(h=32, w=32))
    measure = relevance_at("stage1", model=model, images=images)
    for variables, lost in (
        (plain_variables(model, images), 0.001),
        (random_variables(model, images), 0.1),  # norms have lifted units that nothing excites
    ):
        at_tap, absolute, dropped = measure(variables)
        np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-5)
        np.testing.assert_allclose(absolute, at_tap, atol=1e-5)
        assert np.all(dropped < lost)

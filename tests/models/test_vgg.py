"""VGG against a slow NumPy forward pass, its names, training and relevance."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models import Insert, bind, create_model
from attnzoom_jax.models.taps import default_tap
from attnzoom_jax.models.vgg import VGG, adaptive_average_pool
from tests.models.backbone_checks import (
    every_value_changed,
    every_value_is_reached,
    plain_variables,
    relevance_at,
    training_step,
)
from tests.models.test_resnet import (
    fast_key,
    random_images,
    random_variables,
    relu,
    slow_conv,
    slow_norm,
    tap_shapes,
)

# ---- the oracle: float64, one output pixel at a time, nothing taken from the package


def slow_halve(x):
    h, w = x.shape[1] // 2, x.shape[2] // 2
    y = np.zeros((x.shape[0], h, w, x.shape[-1]))
    for i in range(h):
        for j in range(w):
            y[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2))
    return y


def slow_adaptive_pool(x, size):
    n, h, w, c = x.shape
    y = np.zeros((n, size, size, c))
    for i in range(size):
        rows = slice(int(np.floor(i * h / size)), int(np.ceil((i + 1) * h / size)))
        for j in range(size):
            columns = slice(int(np.floor(j * w / size)), int(np.ceil((j + 1) * w / size)))
            y[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return y


def slow_forward(variables, images, *, stem, stage_sizes, norm):
    params, stats = variables["params"], variables.get("batch_stats")
    x = images
    for stage, size in enumerate(stage_sizes, start=1):
        p = params[f"stage{stage}"]
        for i in range(1, size + 1):
            x = slow_conv(x, p[f"conv{i}"]["kernel"], stride=1, pad=1) + p[f"conv{i}"]["bias"]
            if norm == "batch":
                x = slow_norm(x, p[f"norm{i}"], stats[f"stage{stage}"][f"norm{i}"])
            x = relu(x)
        x = slow_halve(x)
    if stem == "imagenet":
        x = slow_adaptive_pool(x, 7)
        x = np.moveaxis(x, -1, 1).reshape(len(x), -1)  # channels first, as torch
        for fc in ("fc1", "fc2"):
            p = params["classifier"][fc]
            x = relu(x @ p["kernel"] + p["bias"])
    else:
        x = x.mean(axis=(1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


# ---- values


@pytest.mark.parametrize(
    ("stem", "stage_sizes", "norm"),
    [("imagenet", (1, 2), "none"), ("imagenet", (2, 1), "batch"), ("cifar", (1, 1, 1), "batch")],
)
def test_equals_slow_forward_pass(stem, stage_sizes, norm):
    model = VGG(5, stem=stem, stage_sizes=stage_sizes, norm=norm, width=4)
    images = random_images()
    variables = random_variables(model, images)
    logits = jax.jit(model.apply)(variables, images)
    expected = slow_forward(
        jax.tree.map(np.float64, variables),
        images.astype(np.float64),
        stem=stem,
        stage_sizes=stage_sizes,
        norm=norm,
    )
    assert expected.std() > 0.1  # a network that has died would agree with anything
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [(1, 2), (3, 5), (7, 7), (8, 14), (13, 6), (21, 20)])
def test_adaptive_pool_equals_slow_one(sides):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3))
    pooled = adaptive_average_pool(jnp.asarray(x, jnp.float32), size=7)
    np.testing.assert_allclose(pooled, slow_adaptive_pool(x, 7), rtol=1e-5, atol=1e-6)


def test_adaptive_pool_averages_in_float32():
    x = jnp.full((1, 9, 9, 1), 1 / 3, jnp.bfloat16)
    pooled = adaptive_average_pool(x, size=7)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, float(x[0, 0, 0, 0]), rtol=1e-6)


# ---- names and sizes


def test_tap_names():
    taps = tap_shapes(VGG(3, stage_sizes=(1, 2), norm="batch", width=4), (1, 8, 8, 3))
    expected = {"", "head", "classifier", "stage1", "stage2"}
    expected |= {f"stage1/{kind}1" for kind in ("conv", "norm", "relu")}
    expected |= {f"stage2/{kind}{i}" for kind in ("conv", "norm", "relu") for i in (1, 2)}
    expected |= {f"classifier/{kind}{i}" for kind in ("fc", "relu", "dropout") for i in (1, 2)}
    assert set(taps) == expected
    assert taps["classifier/fc1"].shape == taps["classifier"].shape == (1, 64 * 4)


def test_cifar_count_by_arithmetic():
    """The 14.7 million of VGG-16 with batch norm and a linear head, as CIFAR knows it."""
    model = VGG(10, stem="cifar", norm="batch")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    channels = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    convs = sum(9 * a * b + b for a, b in itertools.pairwise(channels))
    norms = 2 * sum(channels[1:])
    found = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found == convs + norms + 512 * 10 + 10 == 14_728_266


# ---- training


def test_training_reaches_every_parameter_and_drops_units():
    model = VGG(3, stage_sizes=(1, 1), width=4)
    images = random_images(n=4, h=8, w=8)
    step = training_step(model, random_variables(model, images), images)
    (loss, _), grads = step(0)
    assert every_value_is_reached(grads)
    (other, _), _ = step(1)
    assert loss != other


def test_training_updates_every_statistic():
    model = VGG(3, stem="cifar", stage_sizes=(1, 2), norm="batch", width=4)
    images = random_images(n=4, h=8, w=8)
    variables = random_variables(model, images)
    (_, stats), _ = training_step(model, variables, images)(0)
    assert every_value_changed(variables["batch_stats"], stats)


def test_linear_layers_start_narrow_and_convolutions_he_normal():
    model = VGG(50, stage_sizes=(1, 1), width=16)
    params = jax.jit(model.init)(fast_key(), jnp.zeros((1, 8, 8, 3)))["params"]
    for layer in (params["classifier"]["fc1"], params["head"]):
        assert np.std(layer["kernel"]) == pytest.approx(0.01, rel=0.05)
        assert not np.any(layer["bias"])
    kernel = params["stage2"]["conv1"]["kernel"]  # from 16 to 32 channels
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.05)
    assert not np.any(params["stage2"]["conv1"]["bias"])


# ---- relevance


def test_excitation_backprop_loses_next_to_nothing():
    """What reaches stage1 has passed every stage, and none of it was negative."""
    model = VGG(5, stage_sizes=(1,) * 5, norm="batch", width=8)
    images = np.abs(random_images(h=32, w=32))
    measure = relevance_at("stage1", model=model, images=images)
    for variables in (plain_variables(model, images), random_variables(model, images)):
        at_tap, absolute, dropped = measure(variables)
        np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-5)
        np.testing.assert_allclose(absolute, at_tap, atol=1e-5)
        assert np.all(dropped < 0.05)


# ---- fully convolutional


def slow_slide(variables, images, *, stage_sizes):
    """The classifier at every 7x7 window of the map, one after the other; float64."""
    p, x = variables["params"], images
    for stage, size in enumerate(stage_sizes, start=1):
        for i in range(1, size + 1):
            conv = p[f"stage{stage}"][f"conv{i}"]
            x = relu(slow_conv(x, conv["kernel"], stride=1, pad=1) + conv["bias"])
        x = slow_halve(x)
    n, h, w, _ = x.shape
    y = np.zeros((n, h - 6, w - 6, p["head"]["bias"].size))
    for i in range(h - 6):
        for j in range(w - 6):
            z = np.moveaxis(x[:, i : i + 7, j : j + 7], -1, 1).reshape(n, -1)
            for fc in ("fc1", "fc2"):
                z = relu(z @ p["classifier"][fc]["kernel"] + p["classifier"][fc]["bias"])
            y[:, i, j] = z @ p["head"]["kernel"] + p["head"]["bias"]
    return y


def sliding(**fields):
    return VGG(5, stage_sizes=(1, 1), width=4, fully_convolutional=True, **fields)


def test_slides_over_a_larger_map():
    model, images = sliding(), random_images(h=33, w=38)
    variables = random_variables(model, images)
    logits = jax.jit(model.apply)(variables, images)
    expected = slow_slide(
        jax.tree.map(np.float64, variables), images.astype(np.float64), stage_sizes=(1, 1)
    )
    assert expected.shape == (len(images), 2, 3, 5) and expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_is_the_ordinary_network_at_the_size_of_its_training():
    model, images = sliding(), random_images(h=28, w=28)
    ordinary = VGG(5, stage_sizes=(1, 1), width=4)
    variables = random_variables(ordinary, images)
    one_place = jax.jit(model.apply)(variables, images)
    assert one_place.shape == (len(images), 1, 1, 5)
    expected = jax.jit(ordinary.apply)(variables, images)
    np.testing.assert_allclose(one_place[:, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_those_of_the_ordinary_network():
    def parameters(**fields):
        model = VGG(1000, **fields)  # VGG-16, whose tree is in a golden file
        images = jnp.zeros((1, 224, 224, 3))
        return jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    assert parameters(fully_convolutional=True) == parameters()


@pytest.mark.parametrize(
    "method",
    [
        attribution.grad_cam,
        attribution.excitation_backprop,
        attribution.contrastive_excitation_backprop,
    ],
)
def test_maps_start_at_every_place(method):
    """At 28 pixels they are the ordinary network's; beyond, a spatial softmax of the class."""
    model, ordinary = sliding(), VGG(5, stage_sizes=(1, 1), width=4)
    images = np.abs(random_images(h=28, w=28))
    variables = random_variables(ordinary, images)
    targets = jnp.arange(len(images))

    @functools.partial(jax.jit, static_argnums=0)
    def maps(model, variables, images):
        return method(bind(model, variables), images, targets, tap="stage2")

    expected = maps(ordinary, variables, images)
    assert np.abs(expected).max() > 0
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(maps(model, variables, images), expected, atol=tolerance)
    larger = np.abs(random_images(h=36, w=32))
    found = maps(model, variables, larger)
    assert found.shape == (len(images), 9, 8) and np.abs(found).max() > 0
    if method is attribution.excitation_backprop:
        logits = model.apply(variables, larger)
        weights = jax.nn.softmax(logits, axis=(1, 2))[jnp.arange(len(images)), ..., targets]
        by_window = sum(
            weights[:, i, j, None, None]
            * jnp.pad(
                method(
                    lambda x: tail(variables, x),
                    stage2(model, variables, larger)[:, i : i + 7, j : j + 7],
                    targets,
                    tap="input",
                ),
                ((0, 0), (i, 2 - i), (j, 1 - j)),
            )
            for i in range(3)
            for j in range(2)
        )
        np.testing.assert_allclose(found, by_window, atol=1e-5 * float(found.max()))


def stage2(model, variables, images):
    """The map before the classifier."""
    return attribution.read_taps(bind(model, variables), images, ["stage2"])[1]["stage2"]


def tail(variables, features):
    """The classifier of the ordinary network on maps of 7x7."""
    p = variables["params"]
    x = features.transpose(0, 3, 1, 2).reshape(len(features), -1)
    for fc in ("fc1", "fc2"):
        x = jax.nn.relu(x @ p["classifier"][fc]["kernel"] + p["classifier"][fc]["bias"])
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def test_maps_are_taken_before_the_classifier_that_slides():
    model = sliding()
    images = jax.ShapeDtypeStruct((1, 40, 40, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    assert default_tap(model, bind(model, zeros), images) == "stage2"
    around = Insert(model, {"stage1": AttentionZoom()})
    assert around.default_tap == "backbone/stage2"


def test_what_cannot_slide_is_named():
    with pytest.raises(ValueError, match=r"leave less than 7x7 of them; .* at least 28"):
        sliding().init(jax.random.key(0), jnp.zeros((1, 27, 40, 3)))
    with pytest.raises(ValueError, match="fully_convolutional with stem='cifar'"):
        sliding(stem="cifar")
    model = create_model("vgg16", num_classes=3, width=8, fully_convolutional=True)
    assert model.fully_convolutional

"""MobileNets against a slow NumPy forward pass, and the second with its published weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from attnzoom_jax.models import mobilenet
from attnzoom_jax.models.mobilenet import MobileNetV1, MobileNetV2
from tests.attribution import imported_networks
from tests.models.backbone_checks import (
    every_value_changed,
    every_value_is_reached,
    plain_variables,
    relevance_at,
    training_step,
)
from tests.models.test_resnet import (
    fast_key,
    flat_taps,
    random_images,
    random_variables,
    slow_conv,
    slow_norm,
    tap_shapes,
)

# A few blocks of each kind, so that compiling takes little.
STAGES = ("stage1", "stage2")
SHORT_V1 = (((2, 1), (4, 2)), ((8, 2), (8, 1)))
SHORT_V2 = (((1, 2, 1), (6, 3, 2)), ((6, 4, 2), (6, 4, 1)))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(mobilenet, "SEPARABLE_STAGES", SHORT_V1)
    monkeypatch.setattr(mobilenet, "INVERTED_STAGES", SHORT_V2)


# ---- the oracle: float64, one output pixel at a time, nothing taken from the package


def relu6(x):
    return np.minimum(np.where(x > 0, x, 0), 6)


def slow_forward(variables, images, *, version, stem):
    params, stats = variables["params"], variables["batch_stats"]
    strides = {"imagenet": (2, 2), "small": (2, 1), "cifar": (1, 1)}[stem]

    def conv_norm(x, p, s, i, stride=1):
        kernel = p[f"conv{i}"]["kernel"]
        x = slow_conv(x, kernel, stride=stride, pad=kernel.shape[0] // 2)
        return slow_norm(x, p[f"norm{i}"], s[f"norm{i}"])

    x = relu6(conv_norm(images, params["stem"], stats["stem"], 1, strides[0]))
    for stage in STAGES:
        blocks = [name for name in sorted(params[stage]) if name.startswith("block")]
        for block in blocks:
            p, s = params[stage][block], stats[stage][block]
            # The second block of stage1, and the first of every other stage.
            halves = block == ("block2" if stage == "stage1" else "block1")
            stride = (strides[1] if stage == "stage1" else 2) if halves else 1
            if version == 1:
                y = relu6(conv_norm(x, p, s, 1, stride))
                x = relu6(conv_norm(y, p, s, 2))
                continue
            y = relu6(conv_norm(x, p, s, 1)) if "conv1" in p else x
            y = relu6(conv_norm(y, p, s, 2, stride))
            y = conv_norm(y, p, s, 3)
            x = y + x if stride == 1 and y.shape == x.shape else y
    if version == 2:
        x = relu6(conv_norm(x, params[stage], stats[stage], 1))
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


# ---- values


@pytest.mark.parametrize(
    ("version", "stem"), [(1, "imagenet"), (1, "cifar"), (2, "imagenet"), (2, "small")]
)
def test_equals_slow_forward_pass(version, stem, short):
    model = {1: MobileNetV1, 2: MobileNetV2}[version](5, stem=stem, width=4)
    images = 3 * random_images(h=9, w=12)  # large enough for the upper bound of ReLU6
    variables = random_variables(model, images)
    logits = jax.jit(model.apply)(variables, images)
    expected = slow_forward(
        jax.tree.map(np.float64, variables),
        images.astype(np.float64),
        version=version,
        stem=stem,
    )
    assert expected.std() > 0.1  # a network that has died would agree with anything
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("h", "w"), [(8, 6), (7, 9), (7, 6)])
def test_padding_of_tensorflow(stride, h, w):
    """A map that the stride divides gets its margin at the bottom and right alone."""
    images = random_images(h=h, w=w)
    stem = mobilenet.Stem(4, stride, padding="tf")
    variables = random_variables(stem, images)
    kernel = variables["params"]["conv1"]["kernel"].astype(np.float64)
    margins = [(0, 1) if stride == 2 and side % 2 == 0 else (1, 1) for side in (h, w)]
    padded = np.pad(images.astype(np.float64), [(0, 0), *margins, (0, 0)])
    x = slow_conv(padded, kernel, stride=stride, pad=0)
    x = slow_norm(x, variables["params"]["norm1"], variables["batch_stats"]["norm1"])
    np.testing.assert_allclose(stem.apply(variables, images), relu6(x), rtol=1e-4, atol=1e-4)
    assert x.shape[1:3] == (-(-h // stride), -(-w // stride))


@pytest.mark.parametrize("create", [MobileNetV1, MobileNetV2])
def test_padding_and_activation_reach_every_block(create, short):
    """On images this bright every ReLU6 is at its bound somewhere, and every pad is seen."""
    images = 30 * np.abs(random_images(h=32, w=32))
    variables = random_variables(create(5, width=4), images)

    def blocks(**options):
        model = create(5, width=4, **options)
        _, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))(
            variables, images
        )
        return flat_taps(state)

    plain, tf, relu = blocks(), blocks(padding="tf"), blocks(activation="relu")
    assert np.max(plain["stage1/block1/relu2"]) == 6
    for path, value in relu.items():
        if path.rpartition("/")[2].startswith("relu"):
            assert np.max(value) > 6
    for path, value in tf.items():
        assert value.shape == plain[path].shape
    assert not np.allclose(tf["head"], plain["head"])
    for options, message in (
        ({"padding": "same"}, "unknown padding 'same'"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
    ):
        with pytest.raises(ValueError, match=message):
            create(5, **options)


@pytest.mark.data
@pytest.mark.skipif(
    not (imported_networks.DATA / "weights_imagenet").is_dir(),
    reason=f"no weights_imagenet in {imported_networks.DATA} (ATTNZOOM_DATA)",
)
def test_published_weights_of_v2_give_what_the_published_graph_gives():
    """On 65 pixels maps are odd before every stride, where TensorFlow pads both sides alike."""
    fn, _, class_names = imported_networks.load("mobilenet_v2")
    weights = {name: np.asarray(a) for name, a in flatten_dict(fn.args[0], sep="/").items()}
    model = MobileNetV2(len(class_names))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 65, 65, 3)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), images),
    )

    paths = sorted(p for p in tap_shapes(model, images.shape) if "conv" in p.split("/")[-1])
    paths = ["stem/conv1", *(path for path in paths if path.startswith("stage"))]
    *convs, classifier = sorted({name.split("/")[0] for name in weights})
    for path, name in zip(paths, convs, strict=True):
        *parents, conv = path.split("/")
        params, stats = variables["params"], variables["batch_stats"]
        for parent in parents:
            params, stats = params[parent], stats[parent]
        norm = conv.replace("conv", "norm")
        params[conv]["kernel"] = weights[f"{name}/kernel"]
        params[norm]["bias"] = weights[f"{name}/bias"]
        params[norm]["scale"] += 1
        stats[norm]["var"] += 1 - 1e-5  # the norms are part of the kernels
    variables["params"]["head"] = {
        "kernel": weights[f"{classifier}/kernel"][0, 0],
        "bias": weights[f"{classifier}/bias"],
    }

    logits = jax.jit(model.apply)(variables, images)
    expected = jax.jit(lambda fn, images: fn(images))(fn, images)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


# ---- names and sizes


def test_tap_names(short):
    def kinds(*numbers):
        return [f"{kind}{i}" for i in numbers for kind in ("conv", "norm", "relu")]

    common = {"", "head", "dropout", "stem", *STAGES} | {f"stem/{part}" for part in kinds(1)}
    blocks = [f"{stage}/block{b}" for stage in STAGES for b in (1, 2)]
    separable = common.union(blocks)
    inverted = common.union(blocks, (f"stage2/{part}" for part in kinds(1)))
    for block in blocks:
        separable |= {f"{block}/{part}" for part in kinds(1, 2)}
        inverted |= {f"{block}/{part}" for part in kinds(1, 2, 3)} - {f"{block}/relu3"}
    inverted -= {f"stage1/block1/{part}" for part in kinds(1)}  # not expanded
    assert set(tap_shapes(MobileNetV1(3, width=4), (1, 32, 32, 3))) == separable
    assert set(tap_shapes(MobileNetV2(3, width=4), (1, 32, 32, 3))) == inverted


def blocks_of(model):
    """(side of its map, channels inside, channels) of every block, for images of 224 pixels."""
    taps = tap_shapes(model, (1, 224, 224, 3))
    blocks = sorted(path for path in taps if path.split("/")[-1].startswith("block"))
    inside = "conv1" if isinstance(model, MobileNetV1) else "conv2"
    return [
        (taps[path].shape[1], taps[f"{path}/{inside}"].shape[-1], taps[path].shape[-1])
        for path in blocks
    ]


def test_blocks_of_v1_are_those_of_table_1():
    channels = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    sides = [112, 56, 56, 28, 28, *[14] * 6, 7, 7]
    expected = list(zip(sides, channels, channels[1:], strict=False))
    assert blocks_of(MobileNetV1(1000)) == expected


def test_blocks_of_v2_are_those_of_table_2():
    table = [  # t, c, n, s
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    expected, side, before = [], 112, 32
    for t, c, n, s in table:
        side //= s
        for _ in range(n):
            expected.append((side, t * before, c))
            before = c
    assert blocks_of(MobileNetV2(1000)) == expected


def test_a_depthwise_kernel_sees_one_channel():
    for model, path in ((MobileNetV1(3), "conv1"), (MobileNetV2(3), "conv2")):
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        kernel = shapes["params"]["stage1"]["block1"][path]["kernel"]
        assert kernel.shape == (3, 3, 1, 32)


def test_convolutions_start_as_published():
    def std(block, conv):
        variables = jax.jit(block.init)(fast_key(), jnp.zeros((1, 8, 8, 64)))
        return np.std(variables["params"][conv]["kernel"])

    separable = mobilenet.SeparableBlock(128)
    assert std(separable, "conv1") == pytest.approx(np.sqrt(2 / 9), rel=0.15)
    assert std(separable, "conv2") == pytest.approx(np.sqrt(2 / 128), rel=0.05)
    inverted = mobilenet.InvertedResidual(1, 32)
    assert std(inverted, "conv2") == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.15)
    assert std(inverted, "conv3") == pytest.approx(np.sqrt(2 / 32), rel=0.1)


# ---- training


@pytest.mark.parametrize("create", [MobileNetV1, MobileNetV2])
def test_training_updates_every_statistic_reaches_every_parameter_and_drops(create, short):
    model = create(3, stem="cifar", width=4, dropout=0.5)
    images = random_images(n=4, h=16, w=16)
    variables = random_variables(model, images)
    step = training_step(model, variables, images)
    (loss, stats), grads = step(0)
    assert every_value_is_reached(grads)
    assert every_value_changed(variables["batch_stats"], stats)
    (other, _), _ = step(1)
    assert loss != other


# ---- relevance


@pytest.mark.parametrize(
    ("create", "negative", "lost"), [(MobileNetV1, "raw", 0.001), (MobileNetV2, "clamp", 0.4)]
)
def test_excitation_backprop_accounts_for_all_relevance(create, negative, lost, short):
    """A depthwise unit has nine inputs: where a norm lifted it, often none of them excites it."""
    model = create(5, width=8)
    images = np.abs(random_images(h=32, w=32))
    measure = relevance_at("stage1", model=model, images=images, negative=negative)
    for variables, most in (
        (plain_variables(model, images), lost),
        (random_variables(model, images), 0.8),
    ):
        at_tap, absolute, dropped = measure(variables)
        np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-5)
        np.testing.assert_allclose(absolute, at_tap, atol=1e-5)
        assert np.all(dropped < most)

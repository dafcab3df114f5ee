"""Real networks on real photographs: the arithmetic of their last layers, and where maps peak.

The photographs with two objects were chosen because the tested methods find both in them: they show
that maps can tell classes apart, not how often. The pointing game takes every photograph, at a tap
that was chosen among several.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.metrics.localization import pointing_hit
from attnzoom_jax.ops import maps as ops_maps
from configs.networks.imagenet import INPUTS
from tests.attribution import imported_networks
from tests.attribution.imported_networks import box_mask, load, photograph

pytestmark = pytest.mark.data
if not all((imported_networks.DATA / name).is_dir() for name in ("weights_imagenet", "coco256")):
    pytest.skip(
        f"no weights_imagenet and coco256 in {imported_networks.DATA} (ATTNZOOM_DATA)",
        allow_module_level=True,
    )

METHODS = {
    "grad_cam": attribution.grad_cam,
    "eb": attribution.excitation_backprop,
    "contrastive eb": attribution.contrastive_excitation_backprop,
}

# What both networks call the one large object of a photograph.
PREDICTIONS = {
    "000000000030": "vase",
    "000000000034": "zebra",
    "000000000036": "umbrella",
    "000000000081": "airliner",
    "000000000201": "ski",
    "000000000263": "Indian elephant",
    "000000000283": "wine bottle",
    "000000000285": "brown bear",
    "000000000321": "hotdog",
    "000000000599": "tiger cat",
}

# Two objects: {photograph: ((class, whose boxes), (class, whose boxes))}.
CAT_AND_KEYBOARD = {"000000001675": (("Persian cat", "cat"), ("computer keyboard", "keyboard"))}
OF_SQUEEZENET = {
    "000000000599": (("tiger cat", "cat"), ("remote control", "remote")),
    "000000000632": (("quilt", "bed"), ("library", "book")),
    "000000001503": (("computer keyboard", "keyboard"), ("screen", "tv")),
    "000000002592": (("coffee mug", "cup"), ("letter opener", "knife")),
}
OF_MOBILENET_V2 = {
    "000000000074": (("Labrador retriever", "dog"), ("unicycle", "bicycle")),
    "000000002592": (("coffee mug", "cup"), ("cleaver", "knife")),
    "000000004795": (("Persian cat", "cat"), ("notebook", "laptop")),
}


def class_ids(class_names):
    """{first name of a class: its number}, the first of two of the same name."""
    firsts = [name.split(", ")[0] for name in class_names]
    return {name: i for i, name in reversed(list(enumerate(firsts)))}


@functools.cache
def compiled(method, tap, **options):
    """The method with the network as an argument: its weights are no constants to be folded."""
    return jax.jit(functools.partial(METHODS[method], tap=tap, **options))


def resized(maps, size):
    """The positive part of the maps, at the size of the images."""
    return ops_maps.positive(ops_maps.resize(maps, (size, size)))


def explain(network, method, tap, pairs):
    """Maps [p, 2, h, w] of both classes of each photograph, and the masks of their boxes."""
    (fn, preprocess, class_names), size = load(network), INPUTS[network].size
    ids = class_ids(class_names)
    images, targets, masks = [], [], []
    for name, both in pairs.items():
        image, boxes = photograph(name, size)
        for class_name, kind in both:
            images.append(image)
            targets.append(ids[class_name])
            masks.append(box_mask(boxes[kind], size))
    maps = compiled(method, tap)(fn, preprocess(np.stack(images)), jnp.array(targets))
    maps = resized(maps, size)
    return maps.reshape(-1, 2, size, size), np.stack(masks).reshape(-1, 2, size, size)


def flat(x):
    return jnp.asarray(x).reshape(-1, *x.shape[2:])  # [p, 2, ...] to [2p, ...]


def distances(maps):
    """Between the peaks of both classes, in pixels [p]."""
    peaks = np.asarray(ops_maps.peak(flat(maps))).reshape(-1, 2, 2)
    return np.linalg.norm(peaks[:, 0] - peaks[:, 1], axis=1)


# The networks


@pytest.mark.parametrize("network", ["squeezenet", "mobilenet_v2"])
def test_predictions(network):
    (fn, preprocess, class_names), size = load(network), INPUTS[network].size
    images = np.stack([photograph(name, size)[0] for name in PREDICTIONS])
    logits = jax.jit(lambda fn, images: fn(images))(fn, preprocess(images))
    found = [class_names[k].split(", ")[0] for k in np.argmax(logits, axis=1)]
    assert found == list(PREDICTIONS.values())


def test_the_linear_head_is_the_published_one_without_its_relu():
    (fn, preprocess, _), (linear, _, _) = load("squeezenet"), load("squeezenet_linear")
    images = preprocess(photograph("000000000599", 227)[0][None])
    _, taps = attribution.read_taps(fn, images, ["conv_final"])
    expected = np.asarray(taps["conv_final"], np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(linear(images), expected, atol=1e-4 * np.abs(expected).max())


# The arithmetic of the last layers, in float64


def divide(p, z):
    return np.divide(p, z, out=np.zeros_like(p), where=z != 0)


def hand_down(p, x, kernel):
    """p [..., k] through a 1x1 convolution of x [..., c] by its positive weights [c, k]."""
    positive = np.maximum(kernel, 0)
    return x * (divide(p, x @ positive) @ positive.T)


def hand_down_depthwise(p, x, kernel):
    """p [h, w, c] through a 3x3 convolution of each channel, zeros around."""
    h, w, _ = x.shape
    positive = np.maximum(kernel, 0)  # [3, 3, c]
    windows = [(np.s_[i : i + h, j : j + w], positive[i, j]) for i in range(3) for j in range(3)]
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    q = divide(p, sum(padded[window] * weight for window, weight in windows))
    back = np.zeros_like(padded)
    for window, weight in windows:
        back[window] += q * weight
    return x * back[1:-1, 1:-1]


def in_float64(arrays, names):
    return {name: np.asarray(arrays[name], np.float64) for name in names}


def classify(p, x, kernel, method):
    """p through the classifier; contrastive: less that of the negated weights."""
    relevance = hand_down(p, x, kernel)
    return relevance - hand_down(p, x, -kernel) if method == "contrastive eb" else relevance


@pytest.mark.parametrize("method", ["eb", "contrastive eb"])
def test_last_layers_of_mobilenet_v2(method):
    (_, (class_name, _)) = CAT_AND_KEYBOARD["000000001675"]
    fn, preprocess, class_names = load("mobilenet_v2")
    target = class_ids(class_names)[class_name]
    images = preprocess(photograph("000000001675", 224)[0][None])
    taps = ["conv48", "conv49", "conv50", "conv51", "gap"]
    values = in_float64(attribution.read_taps(fn, images, taps)[1], taps)
    x = {tap: value[0] for tap, value in values.items()}
    kernels = {f"conv{i}": fn.args[0][f"conv{i}"]["kernel"] for i in (49, 50, 51, 52)}
    depthwise, project, expand, head = in_float64(kernels, kernels).values()

    p = classify(np.eye(1000)[target], x["gap"][0, 0], head[0, 0], method)
    expected = {"conv51": x["conv51"] * divide(p, x["gap"][0, 0]) / 49}
    expected["conv50"] = hand_down(expected["conv51"], x["conv50"], expand[0, 0])
    expected["conv49"] = hand_down(expected["conv50"], x["conv49"], project[0, 0])
    expected["conv48"] = hand_down_depthwise(expected["conv49"], x["conv48"], depthwise[:, :, 0])

    maps = compiled(method, tuple(expected))(fn, images, jnp.array([target]))
    for tap, relevance in expected.items():
        by_hand = relevance.sum(axis=-1)
        # conv50 is a linear bottleneck: its terms cancel, and with them digits.
        tolerance = 1e-5 if tap == "conv51" else 1e-3
        np.testing.assert_allclose(maps[tap][0], by_hand, atol=tolerance * np.abs(by_hand).max())
    if method == "eb":
        at_tap, dropped = balance(fn, images, jnp.array([target]), tap="conv48")
        np.testing.assert_allclose(dropped, 1 - expected["conv48"].sum(), atol=1e-3)
        np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-4)
        # More than half: channels of the depthwise convolution that nothing but a bias switches on.
        assert 0.5 < dropped < 0.7


@functools.partial(jax.jit, static_argnames="tap")
def balance(fn, images, targets, tap):
    """Sum of the relevance at the tap and the dropped share, of one image."""
    found = attribution.relevance_balance(fn, images, targets, tap=tap)
    return found.at_tap[0], found.dropped[0]


@pytest.mark.parametrize("method", ["eb", "contrastive eb"])
def test_last_layers_of_squeezenet(method):
    fn, preprocess, class_names = load("squeezenet")
    target = class_ids(class_names)["remote control"]
    images = preprocess(photograph("000000000599", 227)[0][None])
    taps = ["fire9/concat", "relu_conv_final"]
    values = in_float64(attribution.read_taps(fn, images, taps)[1], taps)
    features, scores = (value[0] for value in values.values())
    kernel = np.asarray(fn.args[0]["conv_final"]["kernel"], np.float64)[
        0, 0, :, [target]
    ].T  # [c, 1]

    p = scores[..., [target]] / scores[..., target].sum()  # [15, 15, 1]
    padded = np.pad(features, ((1, 1), (1, 1), (0, 0)))
    expected = classify(p, padded, kernel, method)[1:-1, 1:-1].sum(axis=-1)

    maps = compiled(method, "fire9/concat")(fn, images, jnp.array([target]))
    np.testing.assert_allclose(maps[0], expected, atol=1e-6 * p.max())
    if method == "contrastive eb":
        # The classifier acts at every position, and so does the contrast: for and against hand the
        # same p down to that position, and nothing is left but where one of them has no support.
        # Maps of this head say little; hence the linear head below.
        assert np.mean(np.abs(maps[0]) > 1e-6 * p.max()) < 0.02


def test_squeezenet_drops_next_to_nothing():
    fn, preprocess, class_names = load("squeezenet")
    target = jnp.array([class_ids(class_names)["remote control"]])
    images = preprocess(photograph("000000000599", 227)[0][None])
    at_tap, dropped = balance(fn, images, target, tap="pool4")
    np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-5)
    assert 0 <= dropped < 0.01


# Where the maps peak


@pytest.mark.parametrize(
    ("network", "method", "tap", "pairs"),
    [
        ("squeezenet", "grad_cam", "fire9/concat", OF_SQUEEZENET),
        ("squeezenet", "eb", "pool4", OF_SQUEEZENET),
        ("squeezenet_linear", "contrastive eb", "pool4", OF_SQUEEZENET),
        ("mobilenet_v2", "grad_cam", "conv51", OF_MOBILENET_V2 | CAT_AND_KEYBOARD),
        ("mobilenet_v2", "eb", "conv51", OF_MOBILENET_V2),
        ("mobilenet_v2", "contrastive eb", "conv51", OF_MOBILENET_V2 | CAT_AND_KEYBOARD),
    ],
)
def test_the_peak_moves_to_the_box_of_the_class(network, method, tap, pairs):
    maps, masks = explain(network, method, tap, pairs)
    in_own_box = np.asarray(pointing_hit(flat(maps), flat(masks), tolerance=15)).reshape(-1, 2)
    in_other_box = np.asarray(pointing_hit(flat(maps), flat(masks[:, ::-1]))).reshape(-1, 2)
    assert dict(zip(pairs, in_own_box.tolist(), strict=True)) == {
        name: [True, True] for name in pairs
    }
    assert not in_other_box.any()
    assert (distances(maps) > 50).all()


def test_only_the_contrast_tells_the_keyboard_from_the_cat():
    """Excitation Backprop of both classes peaks at the same place, on the cat."""
    plain, masks = explain("mobilenet_v2", "eb", "conv51", CAT_AND_KEYBOARD)
    assert distances(plain) < 2
    assert pointing_hit(flat(plain), flat(masks[:, [0, 0]])).all()
    contrastive, _ = explain("mobilenet_v2", "contrastive eb", "conv51", CAT_AND_KEYBOARD)
    assert distances(contrastive) > 100


@pytest.mark.slow
def test_pointing_game():
    """Small objects among others: the contrast beats the plain map, which beats the centre.

    Cued is every class of the boxes that ImageNet knows by the same name, whatever the prediction.
    """
    (fn, preprocess, class_names), size = load("squeezenet_linear"), INPUTS["squeezenet"].size
    ids = {name: i for i, names in enumerate(class_names) for name in names.split(", ")}
    del ids["kite"]  # a bird
    images, targets, masks = [], [], []
    for name, kinds in imported_networks.annotations().items():
        known = [kind for kind in kinds if kind in ids]
        if not known or len(kinds) < 2:
            continue
        image, boxes = photograph(name, size)
        for kind in known:
            mask = box_mask(boxes[kind], size)
            if mask.mean() < 0.25:
                images.append(image)
                targets.append(ids[kind])
                masks.append(mask)
    images, targets, masks = preprocess(np.stack(images)), jnp.array(targets), jnp.array(masks)
    centre = np.zeros(masks.shape, np.float32)
    centre[:, size // 2, size // 2] = 1
    maps = {"centre": centre}
    for method in ("eb", "contrastive eb"):
        maps[method] = compiled(method, "fire6/concat", chunk_size=16)(fn, images, targets)
    rates = {
        method: float(pointing_hit(resized(of_method, size), masks, tolerance=15).mean())
        for method, of_method in maps.items()
    }
    assert rates["contrastive eb"] > rates["eb"] + 0.02
    assert rates["eb"] > rates["centre"] + 0.05

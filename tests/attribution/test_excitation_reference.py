"""Excitation Backprop of plain JAX functions equals the slow one in NumPy float64."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax import attribution
from tests.attribution import reference_excitation as reference
from tests.attribution.reference_excitation import IMAGES, NETWORKS, PIECES, Layer, Network

RNG = np.random.default_rng(0)
PICTURES = {
    "non-negative": RNG.uniform(size=reference.SHAPE),
    "signed": RNG.normal(size=reference.SHAPE),
}
TARGETS = [0, 2, 4]
EVERYTHING = {**NETWORKS, **PIECES}
METHODS = ("excitation_backprop", "contrastive_excitation_backprop")
WITH_NORMS = [
    name
    for name, network in EVERYTHING.items()
    if any(layer.kind == "batch_norm" for layer in network)
]
GAP_NETWORKS = [name for name, network in NETWORKS.items() if network[-2].name == "pooled"]


# ---------------------------------------------------------------- the reference by itself


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", EVERYTHING)
def test_reference_equals_the_absorbing_walk_written_as_matrices(name, pictures):
    """Every layer as a matrix of transition probabilities, found by moving one input at a time."""
    network, image = EVERYTHING[name], PICTURES[pictures][:1]
    values = reference.forward(network, image)
    for contrastive in (False, True):
        method = METHODS[contrastive]
        walk = getattr(reference, method)(network, image, TARGETS[:1])
        mass = {key: np.zeros(value.size) for key, value in values.items()}
        mass["logits"] = start_signal(values["logits"][0], TARGETS[0]).ravel()
        for layer in reversed(network):
            xs = [values[source] for source in layer.sources]
            matrices = transitions(layer, xs)
            is_classifier = layer.name == classifier(network)
            if contrastive and is_classifier:
                matrices = [matrices[0] - transitions(layer, xs, sign=-1.0)[0]]
            for source, matrix in zip(layer.sources, matrices, strict=True):
                mass[source] += mass[layer.name] @ matrix
        for key, p in walk.mass.items():
            np.testing.assert_allclose(p.ravel(), mass[key], atol=1e-9 * np.abs(p).max() + 1e-15)


def test_reference_max_pool_gives_everything_to_the_first_of_equal_values():
    x = np.array([[1.0, 3.0, 3.0], [3.0, -2.0, -2.0], [0.0, -2.0, -2.0]])[None, :, :, None]
    layer = Layer(
        "pool", "max_pool", ("x",), settings={"window": (2, 2), "padding": ((0, 1), (0, 1))}
    )
    (p,), dropped = reference.step(layer, [x], np.arange(1.0, 10.0).reshape(1, 3, 3, 1))
    # Windows row by row: (0, 1), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2).
    np.testing.assert_array_equal(p[0, :, :, 0], [[0, 3, 3], [4, 5, 6], [7, 8, 9]])
    assert not dropped.any()


def test_reference_by_hand():
    """Two pixels, two features, a sum with a negative branch, evidence against a class."""
    network = [
        Layer("sum", "sum", (IMAGES, "branch")),
        Layer("relu", "relu", ("sum",)),
        Layer("pooled", "global_average_pool", ("relu",)),
        Layer(
            "logits",
            "dense",
            ("pooled",),
            {"kernel": np.array([[1.0, -1.0], [2.0, 3.0]]), "bias": np.array([9.0, 9.0])},
        ),
    ]
    branch = {"kernel": np.zeros((1, 1, 2, 2)), "bias": np.array([-1.0, 1.0])}
    network = [Layer("branch", "conv", (IMAGES,), branch), *network]
    images = np.array([[3.0, 1.0], [0.5, 2.0]]).reshape(1, 1, 2, 2)
    # After the sum [[2, 2], [-0.5, 3]], after the ReLU [[2, 2], [0, 3]], pooled [1, 2.5].
    walk = reference.excitation_backprop(network, images, [0])
    np.testing.assert_allclose(walk.mass["pooled"], [[1 / 6, 5 / 6]])
    at_sum = [[1 / 6, 5 / 6 * 2 / 5], [0, 5 / 6 * 3 / 5]]
    np.testing.assert_allclose(walk.mass["sum"][0, 0], at_sum)
    # The direct branch has the shares 3/2 and 1/2 of the first pixel, 2/3 of the second.
    at_images = [[1 / 6 * 3 / 2, 1 / 3 * 1 / 2], [0, 1 / 2 * 2 / 3]]
    np.testing.assert_allclose(walk.mass[IMAGES][0, 0], at_images)
    contrast = reference.contrastive_excitation_backprop(network, images, [1])
    np.testing.assert_allclose(contrast.mass["pooled"], [[-1, 1]])
    np.testing.assert_allclose(contrast.mass["sum"][0, 0], [[-1, 2 / 5], [0, 3 / 5]])


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", EVERYTHING)
def test_reference_accounts_for_all_mass(name, pictures):
    network = EVERYTHING[name]
    walk = reference.excitation_backprop(network, PICTURES[pictures], TARGETS)
    contrast = reference.contrastive_excitation_backprop(network, PICTURES[pictures], TARGETS)
    # An empty map would be equal to another empty one.
    assert np.abs(walk.maps(IMAGES)).max() > 1e-3 and np.abs(contrast.maps(IMAGES)).max() > 1e-3
    for cut in cuts(network):
        total = walk.mass[cut].reshape(len(TARGETS), -1).sum(axis=1)
        np.testing.assert_allclose(total + lost_above(network, walk, cut), 1, atol=1e-10)
        if cut in contrast.mass:
            total = contrast.mass[cut].reshape(len(TARGETS), -1).sum(axis=1)
            np.testing.assert_allclose(total + lost_above(network, contrast, cut), 0, atol=1e-10)


def test_reference_changes_no_value_when_it_makes_scales_positive():
    network = NETWORKS["resnet, negative scales"]
    flipped = reference.positive_scales(network)
    assert any((layer.weights["scale"] < 0).any() for layer in norms(network))
    assert all((layer.weights["scale"] > 0).all() for layer in norms(flipped))
    values, same = (reference.forward(n, PICTURES["signed"]) for n in (network, flipped))
    for layer in network:
        if layer.kind != "conv":
            np.testing.assert_allclose(same[layer.name], values[layer.name], atol=1e-12)


def test_reference_on_positive_scales_is_that_of_norms_folded_into_convolutions():
    network = reference.positive_scales(NETWORKS["resnet, negative scales"])
    folded = {layer.name: layer for layer in network}
    for norm in norms(network):
        conv, w = folded[norm.sources[0]], norm.weights
        factor = w["scale"] / np.sqrt(w["variance"] + reference.EPSILON)
        kernel = conv.weights["kernel"] * factor
        bias = (conv.weights["bias"] - w["mean"]) * factor + w["bias"]
        folded[norm.name] = Layer(
            norm.name, "conv", conv.sources, {"kernel": kernel, "bias": bias}, conv.settings
        )
        del folded[conv.name]
    walks = [
        reference.contrastive_excitation_backprop(n, PICTURES["non-negative"], TARGETS)
        for n in (network, list(folded.values()))
    ]
    for tap in ("block1", "relu0", IMAGES):
        maps, same = (walk.maps(tap) for walk in walks)
        np.testing.assert_allclose(same, maps, atol=1e-12)
    ignored = reference.contrastive_excitation_backprop(
        NETWORKS["resnet, negative scales"], PICTURES["non-negative"], TARGETS
    )
    difference = np.abs(ignored.maps("block1") - walks[0].maps("block1")).max()
    assert difference > 0.1 * np.abs(ignored.maps("block1")).max()


@pytest.mark.parametrize("name", GAP_NETWORKS)
def test_reference_has_the_closed_form_of_gap_networks(name):
    network = NETWORKS[name]
    walk = reference.contrastive_excitation_backprop(network, PICTURES["signed"], TARGETS)
    expected = closed_form(network, PICTURES["signed"])
    np.testing.assert_allclose(walk.maps(network[-2].sources[0]), expected, atol=1e-13)


# --------------------------------------------------------------------- against JAX functions


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", EVERYTHING)
def test_function_has_the_values_of_the_reference(name, pictures):
    """Without this a difference of maps could be one of networks."""
    expected = reference.forward(EVERYTHING[name], PICTURES[pictures])
    with jax.enable_x64(True):
        images = jnp.asarray(PICTURES[pictures])
        fn = as_function(EVERYTHING[name], jnp.float64, marked=expected)
        logits, values = jax.jit(lambda x: attribution.read_taps(fn, x, list(expected)))(images)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-12)
    for tap, value in values.items():
        np.testing.assert_allclose(value, expected[tap], atol=1e-12)


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_maps_equal_the_reference_in_float64(name, method, pictures):
    """At every layer with spatial axes, the images among them."""
    network = EVERYTHING[name]
    walk = getattr(reference, method)(network, PICTURES[pictures], TARGETS)
    maps = maps_of(network, method, PICTURES[pictures], spatial(walk), jnp.float64)
    assert_equal_maps(maps, walk, 1e-10)


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_the_reference_in_float32(name, method, pictures):
    """At ReLUs and joins, where people take maps; signed images are ill conditioned."""
    network = EVERYTHING[name]
    walk = getattr(reference, method)(network, PICTURES[pictures], TARGETS)
    taps = usual_taps(network, walk)
    maps = maps_of(network, method, PICTURES[pictures], taps, jnp.float32)
    assert all(value.dtype == np.float32 for value in maps.values())
    assert_equal_maps(maps, walk, 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WITH_NORMS)
def test_maps_with_positive_scales_equal_the_reference(name, method):
    network, pictures = EVERYTHING[name], PICTURES["non-negative"]
    walk = getattr(reference, method)(network, pictures, TARGETS, scales="positive")
    maps = maps_of(network, method, pictures, spatial(walk), jnp.float64, scales="positive")
    assert_equal_maps(maps, walk, 1e-10)
    maps = maps_of(
        network, method, pictures, usual_taps(network, walk), jnp.float32, scales="positive"
    )
    assert_equal_maps(maps, walk, 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vgg", "resnet, negative scales", "squeezenet"])
def test_several_taps_equal_one_by_one_and_jitted_equals_unjitted(name, method):
    """One by one only that tap is marked: a mark in the network changes nothing."""
    network, pictures = NETWORKS[name], PICTURES["non-negative"]
    walk = getattr(reference, method)(network, pictures, TARGETS)
    taps = usual_taps(network, walk)
    together = maps_of(network, method, pictures, taps, jnp.float32)
    jitted = maps_of(network, method, pictures, taps, jnp.float32, wrapper=jax.jit)
    alone = {}
    for tap in (taps[0], taps[-2]):
        fn = as_function(network, jnp.float32, marked=[tap])
        excitation = getattr(attribution, method)
        with jax.default_matmul_precision("highest"):
            alone[tap] = excitation(
                fn, jnp.asarray(pictures, jnp.float32), jnp.array(TARGETS), tap=tap
            )
    for maps in (jitted, alone):
        for tap, value in maps.items():
            scale = np.abs(together[tap]).max()
            np.testing.assert_allclose(value, together[tap], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_map_sums_to_one_less_what_is_dropped(name, pictures):
    network = NETWORKS[name]
    walk = reference.excitation_backprop(network, PICTURES[pictures], TARGETS)
    taps = [tap for tap in cuts(network) if tap in spatial(walk)]
    maps = maps_of(network, "excitation_backprop", PICTURES[pictures], taps, jnp.float64)
    for tap in taps:
        kept = 1 - lost_above(network, walk, tap)
        np.testing.assert_allclose(maps[tap].sum(axis=(1, 2)), kept, atol=1e-9)


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", GAP_NETWORKS)
def test_contrastive_map_of_a_gap_network_has_the_closed_form_and_sums_to_zero(name, pictures):
    network = NETWORKS[name]
    tap = network[-2].sources[0]
    maps = maps_of(network, METHODS[1], PICTURES[pictures], [tap], jnp.float32)[tap]
    np.testing.assert_allclose(maps, closed_form(network, PICTURES[pictures]), atol=1e-6)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_equal_values_in_a_max_pool_give_everything_to_the_first(method):
    """Integers from 0 to 2 leave hardly a window without two equal maxima."""
    pictures = np.random.default_rng(1).integers(0, 3, reference.SHAPE).astype(float)
    for name in ("max pool", "max pool, padding"):
        walk = getattr(reference, method)(PIECES[name], pictures, TARGETS)
        maps = maps_of(PIECES[name], method, pictures, [IMAGES], jnp.float64)
        assert_equal_maps(maps, walk, 1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_images_of_zeros_give_the_reference_and_no_nan(name, method):
    """0/0 in every layer that divides, wherever no bias reaches."""
    pictures = np.zeros(reference.SHAPE)
    pictures[1, 3:6, 2:5] = PICTURES["signed"][1, 3:6, 2:5]
    walk = getattr(reference, method)(EVERYTHING[name], pictures, TARGETS)
    maps = maps_of(EVERYTHING[name], method, pictures, spatial(walk), jnp.float64)
    assert_equal_maps(maps, walk, 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_any_score_behind_its_relu_has_an_empty_map(method):
    network, zeros = NETWORKS["squeezenet"], np.zeros((3, 5, 4))
    pictures = PICTURES["signed"]
    assert not reference.forward(network, pictures)["logits"][:, 3].any()
    for dtype in (jnp.float32, jnp.float64):
        fire = maps_of(network, method, pictures, ["fire"], dtype, targets=[3, 3, 3])["fire"]
        np.testing.assert_array_equal(fire, zeros)


SPELLINGS: dict[str, dict[str, Callable[..., Any]]] = {
    "batch norm as in Flax": {
        "batch_norm": lambda x, w, s: (
            (x - w["mean"]) * (jax.lax.rsqrt(w["variance"] + reference.EPSILON) * w["scale"])
            + w["bias"]
        )
    },
    "batch norm as one factor and one summand": {
        "batch_norm": lambda x, w, s: x * factor_of(w) + (w["bias"] - w["mean"] * factor_of(w))
    },
    "batch norm with the factor in front": {
        "batch_norm": lambda x, w, s: factor_of(w) * (x - w["mean"]) + w["bias"]
    },
    "maximum": {"relu": lambda x, w, s: jnp.maximum(x, 0)},
    "maximum, swapped": {"relu": lambda x, w, s: jnp.maximum(0.0, x)},
    "clip": {"relu": lambda x, w, s: jnp.clip(x, min=0)},
    "where": {"relu": lambda x, w, s: jnp.where(x > 0, x, 0)},
    "product with a mask": {"relu": lambda x, w, s: x * (x > 0)},
    "half the sum with the absolute value": {"relu": lambda x, w, s: (x + jnp.abs(x)) / 2},
    "dense by einsum": {
        "dense": lambda x, w, s: jnp.einsum("nc,ck->nk", x, w["kernel"]) + w["bias"]
    },
    "dense with the transposed kernel in front": {
        "dense": lambda x, w, s: (w["kernel"].T @ x.T).T + w["bias"]
    },
    "convolution behind a padding": {
        "conv": lambda x, w, s: convolve_padded(x, w["kernel"], s) + w["bias"]
    },
    "1x1 convolution as a product": {
        "conv": lambda x, w, s: (
            x[:, :: s["stride"][0], :: s["stride"][1]] @ w["kernel"][0, 0] + w["bias"]
            if w["kernel"].shape[:2] == (1, 1)
            else convolve(x, w["kernel"], s) + w["bias"]
        )
    },
    "convolution, its bias in its own jit": {
        "conv": lambda x, w, s: jax.jit(jnp.add)(
            jax.jit(lambda x, w: convolve(x, w, s))(x, w["kernel"]), w["bias"]
        )
    },
    "convolution of channels first": {
        "conv": lambda x, w, s: convolve_channels_first(x, w["kernel"], s) + w["bias"]
    },
    "batch norm in its own jit": {
        "batch_norm": lambda x, w, s: jax.jit(LAYERS["batch_norm"], static_argnums=2)(x, w, None)
    },
    "rematerialised": {
        kind: lambda *xs, kind=kind: jax.checkpoint(lambda *ys: LAYERS[kind](*ys, xs[-1]))(*xs[:-1])
        for kind in ("conv", "batch_norm", "sum", "global_average_pool")
    },
    "one image at a time": {
        kind: lambda *xs, kind=kind: jax.vmap(
            lambda *ys: LAYERS[kind](*(y[None] for y in ys), *xs[-2:])[0]
        )(*xs[:-2])
        for kind in ("conv", "batch_norm", "sum", "relu", "global_average_pool", "dense")
    },
    "global average pool as sum": {
        "global_average_pool": lambda x, w, s: x.sum(axis=(1, 2)) / (x.shape[1] * x.shape[2])
    },
    "global average pool in two steps": {
        "global_average_pool": lambda x, w, s: x.mean(axis=1, keepdims=True).mean(axis=(1, 2))
    },
    "global average pool as window": {
        "global_average_pool": lambda x, w, s: (
            sum_windows(x, {"window": x.shape[1:3]})[:, 0, 0] / (x.shape[1] * x.shape[2])
        )
    },
    "sum of swapped branches": {"sum": lambda x, y, w, s: y + x},
    "sum of a stack": {"sum": lambda x, y, w, s: jnp.stack([x, y]).sum(axis=0)},
}


@pytest.mark.parametrize("scales", ["ignore", "positive"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_of_a_layer_makes_no_difference(spelling, scales):
    network, pictures = NETWORKS["resnet, negative scales"], PICTURES["non-negative"]
    walk = reference.contrastive_excitation_backprop(network, pictures, TARGETS, scales=scales)
    kinds, taps = LAYERS | SPELLINGS[spelling], usual_taps(network, walk)
    maps = maps_of(network, METHODS[1], pictures, taps, jnp.float64, kinds=kinds, scales=scales)
    assert_equal_maps(maps, walk, 1e-10)


# ------------------------------------------------------------------- networks as JAX functions


def factor_of(w: dict[str, jax.Array]) -> jax.Array:
    return w["scale"] / jnp.sqrt(w["variance"] + reference.EPSILON)


def convolve(x: jax.Array, kernel: jax.Array, settings: dict[str, Any]) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        settings.get("stride", (1, 1)),
        settings.get("padding", "VALID"),
        rhs_dilation=settings.get("dilation", (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=settings.get("groups", 1),
    )


def convolve_channels_first(x: jax.Array, kernel: jax.Array, settings: dict[str, Any]) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2),
        kernel.transpose(3, 2, 0, 1),
        settings.get("stride", (1, 1)),
        settings.get("padding", "VALID"),
    )
    return y.transpose(0, 2, 3, 1)


def convolve_padded(x: jax.Array, kernel: jax.Array, settings: dict[str, Any]) -> jax.Array:
    """As `convolve`, the padding of the images an operation of its own."""
    margins = jax.lax.padtype_to_pads(
        x.shape[1:3],
        kernel.shape[:2],
        settings.get("stride", (1, 1)),
        settings.get("padding", "VALID"),
    )
    x = jnp.pad(x, ((0, 0), *margins, (0, 0)))
    return convolve(x, kernel, {**settings, "padding": "VALID"})


def sum_windows(x: jax.Array, settings: dict[str, Any], operation: Any = jax.lax.add) -> jax.Array:
    """The sums of windows, or their maxima."""
    start = -jnp.inf if operation is jax.lax.max else 0.0
    padding = settings.get("padding", "VALID")
    if not isinstance(padding, str):
        padding = ((0, 0), *padding, (0, 0))
    window, stride = settings["window"], settings.get("stride", (1, 1))
    return jax.lax.reduce_window(x, start, operation, (1, *window, 1), (1, *stride, 1), padding)


LAYERS: dict[str, Callable[..., Any]] = {
    "conv": lambda x, w, s: convolve(x, w["kernel"], s) + w["bias"],
    "dense": lambda x, w, s: x @ w["kernel"] + w["bias"],
    "relu": lambda x, w, s: jax.nn.relu(x),
    "max_pool": lambda x, w, s: sum_windows(x, s, jax.lax.max),
    "average_pool": lambda x, w, s: sum_windows(x, s) / sum_windows(jnp.ones_like(x), s),
    "global_average_pool": lambda x, w, s: x.mean(axis=(1, 2)),
    "batch_norm": lambda x, w, s: (
        (x - w["mean"]) / jnp.sqrt(w["variance"] + reference.EPSILON) * w["scale"] + w["bias"]
    ),
    "sum": lambda x, *rest: sum(rest[:-2], start=x),
    "concat": lambda *xs: jnp.concatenate(xs[:-2], axis=-1),
    "flatten": lambda x, w, s: x.reshape(x.shape[0], -1),
}


def as_function(
    network: Network,
    dtype: Any,
    *,
    marked: Collection[str],
    kinds: dict[str, Callable[..., Any]] = LAYERS,
) -> Callable[[jax.Array], jax.Array]:
    """The network as a function of images, its weights closed over, the results `marked` taps."""
    weights = {
        layer.name: {name: jnp.asarray(w, dtype) for name, w in layer.weights.items()}
        for layer in network
    }

    def mark(x: jax.Array, name: str) -> jax.Array:
        return checkpoint_name(x, name) if name in marked else x

    def fn(images: jax.Array) -> jax.Array:
        values = {IMAGES: mark(images, IMAGES)}
        for layer in network:
            xs = [values[source] for source in layer.sources]
            y = kinds[layer.kind](*xs, weights[layer.name], layer.settings)
            values[layer.name] = mark(y, layer.name)
        return values[network[-1].name]

    return fn


def maps_of(
    network: Network,
    method: str,
    pictures: np.ndarray,
    taps: Sequence[str],
    dtype: Any,
    *,
    targets: Sequence[int] = TARGETS,
    kinds: dict[str, Callable[..., Any]] = LAYERS,
    wrapper: Callable[[Any], Any] = lambda method: method,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Maps at all taps in one pass; without jit tests share compiled operations, much faster."""
    with jax.enable_x64(dtype == jnp.float64), jax.default_matmul_precision("highest"):
        fn = as_function(network, dtype, marked=taps, kinds=kinds)
        excitation = getattr(attribution, method)
        maps = wrapper(lambda x, t: excitation(fn, x, t, tap=list(taps), **settings))(
            jnp.asarray(pictures, dtype), jnp.array(targets)
        )
        assert sorted(maps) == sorted(taps)
        return {tap: np.asarray(value) for tap, value in maps.items()}


# ------------------------------------------------------------------------ what is expected


def assert_equal_maps(maps: dict[str, np.ndarray], walk: reference.Walk, tolerance: float) -> None:
    """The largest difference is at most `tolerance` of the largest value of the tap's maps."""
    for tap, value in maps.items():
        expected = walk.maps(tap)
        assert value.shape == expected.shape
        atol = tolerance * np.abs(expected).max() + 1e-30
        np.testing.assert_allclose(value, expected, rtol=0, atol=atol, err_msg=tap)


def spatial(walk: reference.Walk) -> list[str]:
    return [name for name, p in walk.mass.items() if p.ndim == 4]


def usual_taps(network: Network, walk: reference.Walk) -> list[str]:
    """Layers [n, h, w, c] whose values are at least 0 if the images are."""
    kinds = ("relu", "concat", "max_pool", "average_pool")
    usual = [layer.name for layer in network if layer.kind in kinds]
    return [name for name in usual if name in spatial(walk)]


def norms(network: Network) -> Network:
    return [layer for layer in network if layer.kind == "batch_norm"]


def classifier(network: Network) -> str:
    return [layer.name for layer in network if "kernel" in layer.weights][-1]


def cuts(network: Network) -> list[str]:
    """The images and the layers that everything from the images to the logits passes."""
    names = [IMAGES, *(layer.name for layer in network)]
    return [
        name
        for i, name in enumerate(names)
        if all(set(layer.sources) <= set(names[i:]) for layer in network[i:])
    ]


def lost_above(network: Network, walk: reference.Walk, cut: str) -> Any:
    """What the layers between a cut and the logits dropped, [n]."""
    names = [IMAGES, *(layer.name for layer in network)]
    return sum(walk.dropped.get(name, 0.0) for name in names[names.index(cut) + 1 :])


def closed_form(network: Network, pictures: np.ndarray) -> np.ndarray:
    """Contrastive map under a global average pool and a dense layer.

    (1 / hw) sum_k x_k (w_k+ / S+ - w_k- / S-), where S+- = sum_k w_k+- mean(x_k).
    """
    x = reference.forward(network, pictures)[network[-2].sources[0]]  # [n, h, w, c]
    w = network[-1].weights["kernel"].T[TARGETS]  # [n, c]
    mean = x.mean(axis=(1, 2))
    up, down = np.maximum(w, 0), np.maximum(-w, 0)
    up, down = (v / (v * mean).sum(axis=1, keepdims=True) for v in (up, down))
    return np.einsum("nhwc,nc->nhw", x, up - down) / (x.shape[1] * x.shape[2])


def start_signal(logits: np.ndarray, target: int) -> np.ndarray:
    """Of one image, [k] or [h, w, k]."""
    score = np.exp(logits) * (np.arange(logits.shape[-1]) == target)
    return score / score.sum()


def transitions(layer: Layer, xs: list[np.ndarray], sign: float = 1.0) -> list[np.ndarray]:
    """For each input of a layer the probabilities of a step there, [results, inputs].

    Args:
        layer: the layer.
        xs: its inputs, of one image.
        sign: factor of its kernel.
    """
    x = xs[0]
    if layer.kind == "batch_norm":
        return [np.eye(x.size)]
    if layer.kind == "sum":
        z = sum(xs[1:], start=x).ravel()
        return [np.diag(np.divide(b.ravel(), z, out=0 * z, where=z != 0)) for b in xs]
    if layer.kind == "relu":
        return [np.diag((x > 0).ravel().astype(float))]
    # The others are linear, or as a max pool nearly so: their columns, one input at a time.
    step = 1e-9 if layer.kind == "max_pool" else 1.0
    matrices = []
    for i, branch in enumerate(xs):
        units = step * np.eye(branch.size).reshape(-1, *branch.shape[1:])
        base = [b if layer.kind == "max_pool" else 0 * b for b in xs]
        moved = [np.repeat(b, branch.size, axis=0) for b in base]
        moved[i] = moved[i] + units
        change = reference.result(layer, moved) - reference.result(layer, base)
        matrix = sign * change.reshape(branch.size, -1).T / step
        if layer.kind in ("max_pool", "concat", "flatten"):
            matrices.append(np.round(matrix))
            continue
        weight = np.maximum(matrix, 0) * branch.ravel()
        z = weight.sum(axis=1, keepdims=True)
        matrices.append(np.divide(weight, z, out=0 * weight, where=z != 0))
    return matrices

"""Excitation Backprop of whole networks: what it leaves alone, what it refuses, what adds up.

The maps themselves are compared to a slow version in test_excitation_reference and test_rules.
"""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution import read_taps
from attnzoom_jax.attribution.excitation import (
    contrastive_excitation_backprop,
    excitation_backprop,
    relevance_balance,
)
from attnzoom_jax.attribution.relevance import Share
from attnzoom_jax.attribution.rules import linear, vector_jacobian
from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models import Insert, bind, create_model
from attnzoom_jax.ops.zoom import zoom_conv

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(size=(4, 6, 6, 3)), jnp.float32)
TARGETS = jnp.array([0, 4, 2, 2])
METHODS = [excitation_backprop, contrastive_excitation_backprop]
CHANNELS = 6


def weights(*shape):
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)


STEM, NECK = weights(3, 3, 3, CHANNELS), weights(3, 3, CHANNELS, CHANNELS)
HEAD = weights(CHANNELS, 5)
QUERY, KEY, VALUE = (weights(CHANNELS, CHANNELS) for _ in range(3))


def conv(x, kernel, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = jnp.asarray(kernel, x.dtype)
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)


def network(middle=lambda x: x, head=lambda x: x.mean((1, 2)) @ jnp.asarray(HEAD, x.dtype)):
    """Convolution, ReLU, the tap `features`, whatever is looked at, convolution, ReLU, a head."""

    def fn(images):
        x = jax.nn.relu(conv(images, STEM))
        x = middle(checkpoint_name(x, "features"))
        return head(jax.nn.relu(conv(x, NECK)))

    return fn


def assert_conserved(fn, images=IMAGES, tap="features", atol=1e-5, **options):
    """What is at a tap that all paths cross, and what was dropped, are together 1."""
    balance = relevance_balance(fn, images, TARGETS, tap=tap, **options)
    np.testing.assert_allclose(balance.at_tap + balance.dropped, 1, atol=atol)
    return balance


def assert_same_maps(fn, other, images=IMAGES, tap="features", atol=1e-6, **options):
    for method in METHODS:
        maps = method(fn, images, TARGETS, tap=tap, **options)
        expected = method(other, images, TARGETS, tap=tap, **options)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(maps, expected, atol=atol)


# --------------------------------------------- gates and statistics, which count as constants


def alive(value):
    return value


def marked(value):
    return checkpoint_name(value, "layer/gate")


def frozen(middle):
    """The network with what `middle` holds replaced by constants, found by running it once."""
    held: list[Any] = []

    def record(value):
        held.append(np.asarray(value))
        return value

    network(functools.partial(middle, hold=record))(IMAGES)
    return network(lambda x: middle(x, hold=iter_of(held)))


def iter_of(values):
    position = iter(values)
    return lambda _: jnp.asarray(next(position))


def squeeze_and_excitation(x, hold):
    mask = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ QUERY) @ KEY)
    return x * hold(mask)[:, None, None, :]


def spatial_gate(x, hold):
    """Of the largest and the mean response at a pixel, as in CBAM."""
    summary = jnp.stack([x.max(-1), x.mean(-1)], -1)
    return x * hold(jax.nn.sigmoid(conv(summary, NECK[:, :, :2, :1])))


def normalised(axes, groups=1):
    def middle(x, hold):
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, groups, c // groups)
        mean = hold(x.mean(axes, keepdims=True))
        variance = hold(((x - mean) ** 2).mean(axes, keepdims=True))
        x = (x - mean) * lax.rsqrt(variance + 1e-3)
        return (x.reshape(n, h, w, c) * HEAD[:, 0] + 1.0) * 2.0

    return middle


def response_norm(x, hold):
    """Local response normalisation over three channels."""
    window = (1, 1, 1, 3)
    near = lax.reduce_window(x * x, 0.0, lax.add, window, (1, 1, 1, 1), "SAME")
    return x / hold((1 + 0.5 * near) ** 0.75)


def response_norm_of_slices(x, hold):
    padded = jnp.pad(x * x, ((0, 0), (0, 0), (0, 0), (1, 1)))
    near = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
    return x / hold((1 + 0.5 * near) ** 0.75)


def attention_pooling(x, hold):
    mask = jax.nn.softmax((x @ QUERY[:, :1]).reshape(len(x), -1)).reshape(*x.shape[:3], 1)
    return (x * hold(mask)).sum((1, 2), keepdims=True) + jnp.zeros(x.shape)


UNMARKED = {
    "squeeze and excitation": squeeze_and_excitation,
    "spatial gate": spatial_gate,
    "layer norm": normalised((3, 4)),
    "instance norm": normalised((1, 2)),
    "group norm": normalised((1, 2, 4), groups=2),
    "batch norm": normalised((0, 1, 2)),
    "response norm": response_norm,
    "length": lambda x, hold: x / hold(jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-3),
    "root mean square": lambda x, hold: (
        x * hold(lax.rsqrt((x**2).mean((1, 2, 3), keepdims=True) + 1e-3))
    ),
    "attention pooling": attention_pooling,
}


@pytest.mark.parametrize("name", UNMARKED)
def test_gates_and_statistics_count_as_constants(name):
    middle = UNMARKED[name]
    live = network(functools.partial(middle, hold=alive))
    assert_same_maps(live, frozen(middle))
    if name != "batch norm":  # of one image alone it is another function
        assert_conserved(live)


def gated_linear_unit(x, hold):
    return (x @ VALUE) * hold(jax.nn.silu(x @ QUERY))


def self_attention(x, hold):
    n, h, w, c = x.shape
    x = x.reshape(n, h * w, c)
    scores = jnp.einsum("nic,njc->nij", x @ QUERY, x @ KEY)
    return jnp.einsum("nij,njc->nic", hold(jax.nn.softmax(scores)), x @ VALUE).reshape(n, h, w, c)


def dynamic_filter(x, hold):
    kernels = hold(jax.nn.softmax(x.mean((1, 2)) @ QUERY[:, :4]) - 0.2).reshape(-1, 2, 2, 1, 1)

    def depthwise(x, kernel):
        channels = x.transpose(2, 0, 1)[..., None]  # [c, h, w, 1]
        return conv(channels, kernel)[..., 0].transpose(1, 2, 0)

    return jax.vmap(depthwise)(x, kernels)


def conv_gate(x, hold):
    """A mask of its own for every channel and pixel: nothing tells it from the signal."""
    return x * hold(jax.nn.sigmoid(conv(x, NECK)))


MARKED = {
    "gated linear unit": gated_linear_unit,
    "self-attention": self_attention,
    "dynamic filter": dynamic_filter,
    "gate from a convolution": conv_gate,
    "response norm of slices": response_norm_of_slices,
}


@pytest.mark.parametrize("name", MARKED)
def test_products_of_two_signals_want_a_mark_and_work_with_it(name):
    middle = MARKED[name]
    with pytest.raises(ValueError, match=r"mark the mask.*checkpoint_name.*rules="):
        excitation_backprop(
            network(functools.partial(middle, hold=alive)), IMAGES, TARGETS, tap="features"
        )
    with_mark = network(functools.partial(middle, hold=marked))
    assert_same_maps(with_mark, frozen(middle), atol=1e-5)
    assert_conserved(with_mark, atol=1e-4)


@pytest.mark.parametrize("zoom_init", ["bilinear", "lecun_normal"])
@pytest.mark.parametrize("threshold", [0.5, 1.1])
def test_attention_zoom_is_its_frozen_mask_and_its_zoom(threshold, zoom_init):
    layer = AttentionZoom(threshold=threshold, zoom_init=zoom_init)
    features = jax.nn.relu(conv(IMAGES, STEM))
    variables: Any = layer.init(jax.random.key(0), features)
    kernel = variables["params"]["zoom"]["kernel"]

    def live(x):
        return layer.apply(variables, x)

    mask = read_taps(live, features, ["gate"])[1]["gate"]

    assert_same_maps(network(live), network(lambda x: zoom_conv(x * mask, kernel)))
    assert_conserved(network(live))
    with pytest.raises(ValueError, match="no relevance reaches tap 'gate'"):
        excitation_backprop(network(live), IMAGES, TARGETS, tap="gate")


# -------------------------------------------------------------------------------- activations

ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu, erf": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "hard_swish": jax.nn.hard_swish,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "tanh": jnp.tanh,
    "clipped": lambda x: jnp.clip(x, -0.1, 0.1),
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "soft_sign": jax.nn.soft_sign,
    "leaky_relu": jax.nn.leaky_relu,
    "square": lambda x: x * x,
    "power": lambda x: jnp.abs(x) ** 1.5,
    "softmax of channels": jax.nn.softmax,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_hands_all_of_it_to_its_argument(name):
    """A saturated unit is no less active."""

    def middle(x):
        x = checkpoint_name(conv(x, NECK), "before")
        return checkpoint_name(ACTIVATIONS[name](x), "after")

    for method in METHODS:
        maps = method(network(middle), IMAGES, TARGETS, tap=["before", "after"])
        np.testing.assert_allclose(maps["before"], maps["after"], atol=1e-6)
        assert np.abs(maps["after"]).max() > 1e-3


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_a_rectifier_hands_on_what_is_on(name):
    def middle(x):
        x = checkpoint_name(conv(x, NECK), "before")
        return checkpoint_name(getattr(jax.nn, name)(x), "after")

    maps = excitation_backprop(network(middle), IMAGES, TARGETS, tap=["before", "after"])
    np.testing.assert_allclose(maps["before"], maps["after"], atol=1e-7)


# ------------------------------------------------------------------------------------ refusals


def cumulative(x):
    return lax.cumprod(x, 3)


def sorted_channels(x):
    return lax.sort(x)


def looped(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]


@pytest.mark.parametrize(
    ("middle", "primitive"),
    [(sorted_channels, "sort"), (cumulative, "cumprod"), (looped, "while")],
)
def test_a_primitive_without_a_rule_is_named_with_its_place_and_the_way_out(middle, primitive):
    line = middle.__code__.co_firstlineno + 1
    with pytest.raises(ValueError) as raised:
        excitation_backprop(network(middle), IMAGES, TARGETS, tap="features")
    message = str(raised.value)
    assert f"{primitive!r}" in message
    assert f"test_excitation.py:{line}" in message and middle.__name__ in message
    assert re.search(rf"rules={{'{primitive}': \w+}}", message)


@pytest.mark.parametrize("middle", [sorted_channels, cumulative, looped])
def test_a_primitive_without_a_rule_does_no_harm_off_the_way(middle):
    """Below the tap, in a gate, or where no relevance arrives."""

    def below(images):
        return network()(jax.nn.relu(middle(images)))

    for fn in (
        below,
        network(lambda x: x * marked(middle(x))),
        network(lambda x: x + 0 * middle(lax.stop_gradient(jnp.ones(x.shape)))),
    ):
        assert_conserved(fn)


def unused(images):
    return jnp.ones((len(images), 5))


ANSWER = jnp.ones((4, 5))


@pytest.mark.parametrize(
    ("fn", "tap", "message"),
    [
        (network(), "feature", "did you mean 'features'"),
        (network(), "features/gate", "unknown tap|no tap"),
        (lambda x: network()(x) * checkpoint_name(ANSWER[:, :1], "c")[:, 0:1], "c", r"\[4, 1\]"),
        (
            network(lambda x: x * checkpoint_name(jnp.ones(x.shape), "ones")),
            "ones",
            "does not depend on the images",
        ),
        (network(lambda x: x * marked(jax.nn.sigmoid(x))), "layer/gate", "no relevance reaches"),
        (
            network(
                functools.partial(squeeze_and_excitation, hold=lambda m: checkpoint_name(m, "se"))
            ),
            "se",
            r"\[4, 6\]; a map needs",
        ),
        (
            network(lambda x: x / (1 + checkpoint_name(x.mean((1, 2), keepdims=True), "m"))),
            "m",
            "no relevance reaches tap 'm'",
        ),
        (
            lambda x: (checkpoint_name(2 * x, "unused"), network()(x))[1],
            "unused",
            "no relevance reaches tap 'unused'",
        ),
        (lambda x: checkpoint_name(network()(x), "logits"), "logits", r"\[4, 5\]; a map"),
        (lambda x: {"logits": network()(x)}, "features", "not dict"),
        (lambda x: (network()(x),), "features", "not tuple"),
        (lambda x: network()(x)[0], "features", r"not \[5\]"),
        (lambda x: network()(x)[:, None], "features", r"not \[4, 1, 5\]"),
        (lambda x: network()(x).argmax(-1), "features", "int32"),
        (lambda x: network()(x).astype(jnp.int32), "features", "int32"),
        (unused, "input", "no relevance reaches tap 'input'"),
        (lambda x: ANSWER, "input", "no relevance reaches tap 'input'"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_requests_are_one_clear_error(method, fn, tap, message):
    with pytest.raises(ValueError, match=message):
        method(fn, IMAGES, TARGETS, tap=tap)


def test_the_contrast_wants_a_linear_map_above_the_tap():
    def fn(images):
        x = checkpoint_name(jax.nn.relu(conv(images, STEM)), "features")
        return checkpoint_name(jnp.einsum("nhwc,ck->nhwk", x, HEAD), "classes").mean((1, 2))

    assert contrastive_excitation_backprop(fn, IMAGES, TARGETS, tap="features").shape == (4, 6, 6)
    assert excitation_backprop(fn, IMAGES, TARGETS, tap="classes").shape == (4, 6, 6)
    with pytest.raises(ValueError, match="no linear map"):
        contrastive_excitation_backprop(fn, IMAGES, TARGETS, tap="classes")

    def with_shortcut(images):
        x = checkpoint_name(conv(images, STEM), "features")
        return (x + conv(x, NECK)).mean((1, 2))

    with pytest.raises(ValueError, match="on some path"):
        contrastive_excitation_backprop(with_shortcut, IMAGES, TARGETS, tap="features")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sums", "Positive", "did you mean 'positive'"),
        ("scales", "positve", "did you mean 'positive'"),
        ("negative", "clip", "clamp"),
    ],
)
@pytest.mark.parametrize("method", [*METHODS, relevance_balance])
def test_an_unknown_option_names_the_known_ones(method, option, value, message):
    with pytest.raises(ValueError, match=message):
        method(network(), IMAGES, TARGETS, tap="features", **{option: value})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (jnp.array([0, 1, 2, 5]), "5 is out of range for 5 classes"),
        (jnp.array([0, -1, 2, 3]), "-1 is out of range"),
        (jnp.array([0, 1]), r"class ids int \[4\]"),
        (jnp.ones((4, 4)), r"float \[4, 5\]"),
    ],
)
@pytest.mark.parametrize("method", [*METHODS, relevance_balance])
def test_bad_targets_are_one_clear_error(method, targets, message):
    with pytest.raises(ValueError, match=message):
        method(network(), IMAGES, targets, tap="features")


@pytest.mark.parametrize("method", METHODS)
def test_under_jit_a_class_that_is_not_there_gives_a_map_of_nan(method):
    jitted = jax.jit(lambda t: method(network(), IMAGES, t, tap="features"))
    maps = jitted(jnp.array([0, 5, -1, 2]))
    assert np.isnan(maps[1:3]).all() and np.isfinite(maps[jnp.array([0, 3])]).all()


# ------------------------------------------------------------------------------ rules of one's own


def test_a_rule_of_ones_own_for_a_primitive():
    def rule(visit):
        """To the places that the values came from."""
        (x,), (p,) = visit.inputs, visit.relevance
        order = jnp.argsort(x, axis=-1)
        return [Share(visit.step.inputs[0], jnp.take_along_axis(p, jnp.argsort(order, -1), -1))]

    def taken(x):
        return jnp.take_along_axis(x, lax.stop_gradient(x).argsort(-1), -1)

    with pytest.raises(ValueError, match="'sort'"):
        excitation_backprop(network(sorted_channels), IMAGES, TARGETS, tap="features")
    for method in METHODS:
        maps = method(
            network(sorted_channels), IMAGES, TARGETS, tap="features", rules={"sort": rule}
        )
        expected = method(network(taken), IMAGES, TARGETS, tap="features")
        np.testing.assert_allclose(maps, expected, atol=1e-6)


def test_a_rule_of_ones_own_goes_before_ours():
    def nothing(visit):
        return []

    balance = relevance_balance(
        network(), IMAGES, TARGETS, tap="features", rules={"conv_general_dilated": vector_jacobian}
    )
    assert np.abs(balance.at_tap - 1).max() > 0.01  # a gradient, and not a probability
    maps = excitation_backprop(
        network(), IMAGES, TARGETS, tap="input", rules={"conv_general_dilated": linear}
    )
    expected = excitation_backprop(network(), IMAGES, TARGETS, tap="input")
    np.testing.assert_array_equal(maps, expected)
    with pytest.raises(ValueError, match="no relevance reaches"):
        excitation_backprop(
            network(), IMAGES, TARGETS, tap="features", rules={"reduce_sum": nothing}
        )


@jax.jit
def mixed_channels(x, weights):
    """A linear map that is made of products and sums of single channels."""
    channels = [
        sum((x[..., i] * weights[i, j] for i in range(CHANNELS)), jnp.zeros(x.shape[:-1]))
        for j in range(CHANNELS)
    ]
    return jnp.stack(channels, -1)


def test_a_rule_for_a_call_takes_it_as_one_step():
    """Also inside of other calls, and where a scan is unrolled."""

    def mixed(x):
        return mixed_channels(x, QUERY)

    as_product = network(lambda x: x @ QUERY)
    expected = excitation_backprop(as_product, IMAGES, TARGETS, tap="features")
    opened = excitation_backprop(network(mixed), IMAGES, TARGETS, tap="features")
    assert np.abs(opened - expected).max() > 1e-3
    for wrap in (lambda f: f, jax.jit, jax.checkpoint, jax.vmap, scanned_over_images):
        fn, rules = network(wrap(mixed)), {"jit:mixed_channels": linear}
        maps = excitation_backprop(fn, IMAGES, TARGETS, tap="features", rules=rules)
        np.testing.assert_allclose(maps, expected, atol=1e-5)


def scanned_over_images(fn):
    def scanned(x):
        return lax.scan(lambda _, one: (None, fn(one)), None, x)[1]

    return scanned


# -------------------------------------------------------------- the same function otherwise put


@jax.custom_jvp
def as_it_is(x):
    return conv(x, NECK)


as_it_is.defjvp(lambda primals, tangents: (as_it_is(primals[0]), conv(tangents[0], NECK)))


@jax.custom_vjp
def as_it_was(x):
    return conv(x, NECK)


as_it_was.defvjp(lambda x: (as_it_was(x), None), lambda _, g: (g,))

SAME = {
    "jit": jax.jit(lambda x: conv(x, NECK)),
    "nested jit": jax.jit(lambda x: jax.jit(conv)(x, NECK)),
    "remat": jax.checkpoint(lambda x: conv(x, NECK)),
    "remat in jit": jax.jit(jax.checkpoint(lambda x: conv(x, NECK))),
    "custom_jvp": as_it_is,
    "custom_vjp": as_it_was,
    "vmap": jax.vmap(lambda x: conv(x[None], NECK)[0]),
    "vmap of custom_jvp": jax.vmap(lambda x: as_it_is(x[None])[0]),
    "scan": scanned_over_images(lambda x: conv(x[None], NECK)[0]),
    "map": lambda x: lax.map(lambda x: conv(x[None], NECK)[0], x),
    "columns": lambda x: jnp.stack([conv(x, NECK[..., i : i + 1])[..., 0] for i in range(6)], -1),
    "channels first": lambda x: lax.conv(
        x.transpose(0, 3, 1, 2), NECK.transpose(3, 2, 0, 1), (1, 1), "SAME"
    ).transpose(0, 2, 3, 1),
    "padded beforehand": lambda x: lax.conv_general_dilated(
        jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))),
        NECK,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "sum of shifted products": lambda x: sum_of_shifted(x),
}


def sum_of_shifted(x):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, -1) @ NECK.reshape(-1, CHANNELS)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_maps_do_not_depend_on_how_a_function_is_wrapped_or_written(name, activation):
    if name in ("padded beforehand", "sum of shifted products") and activation is jnp.tanh:
        pytest.skip("with a pad of its own, what lies outside counts as a response of the minimum")
    layer = SAME[name]
    assert_same_maps(
        network(lambda x: activation(layer(activation(x - 0.3)))),
        network(lambda x: activation(conv(activation(x - 0.3), NECK))),
        atol=1e-5,
    )


def test_a_rematerialised_module_gives_the_maps_of_the_module():
    class Net(nn.Module):
        remat: bool

        @nn.compact
        def __call__(self, x):
            block = nn.remat(nn.Conv) if self.remat else nn.Conv
            x = nn.relu(block(4, (3, 3), name="conv1")(x))
            x = nn.relu(block(4, (3, 3), name="conv2")(x))
            return nn.Dense(5, name="head")(x.mean((1, 2)))

    variables = Net(remat=False).init(jax.random.key(0), IMAGES)
    assert_same_maps(
        bind(Net(remat=True), variables), bind(Net(remat=False), variables), tap="conv1"
    )


def recurrent(step):
    def head(x):
        rows = x.mean(2).transpose(1, 0, 2)  # [h, n, c]
        state, _ = lax.scan(step, jnp.zeros((len(x), CHANNELS)), rows)
        return state @ HEAD

    def unrolled(x):
        state = jnp.zeros((len(x), CHANNELS))
        for row in x.mean(2).transpose(1, 0, 2):
            state, _ = step(state, row)
        return state @ HEAD

    return network(head=head), network(head=unrolled)


def test_a_scan_is_walked_through_as_the_loop_that_it_is():
    def step(state, row):
        return jax.nn.relu(state @ QUERY + row @ KEY + 0.1), None

    scanned, unrolled = recurrent(step)
    assert_same_maps(scanned, unrolled)


def test_a_long_short_term_memory_wants_its_gates_marked():
    def cell(mark):
        def step(carry, row):
            c, h = carry[:, :3], carry[:, 3:]
            i, f, o, g = jnp.split(row @ weights_of_cell[0] + h @ weights_of_cell[1], 4, 1)
            i, f, o = (mark(jax.nn.sigmoid(gate)) for gate in (i, f, o))
            c = f * c + i * jax.nn.relu(g)
            return jnp.concatenate([c, o * jnp.tanh(c)], 1), None

        return step

    weights_of_cell = weights(CHANNELS, 12), weights(3, 12)
    with pytest.raises(ValueError, match="mark the mask"):
        excitation_backprop(recurrent(cell(alive))[0], IMAGES, TARGETS, tap="features")
    scanned, unrolled = recurrent(cell(marked))
    assert_same_maps(scanned, unrolled)
    assert_conserved(scanned)


@pytest.mark.parametrize(
    "twice",
    [
        lambda x: x + x,
        lambda x: x * x / jnp.maximum(lax.stop_gradient(x), 1e-9),
        lambda x: jnp.concatenate([x, x], -1)[..., :CHANNELS],
        lambda x: jnp.maximum(x, x),
        lambda x: jnp.stack([x, x]).sum(0),
        lambda x: 3 * x - x,
        lambda x: jnp.where(NECK[0, 0, 0] > 0, x, x),
    ],
)
def test_a_value_used_twice_takes_both_shares(twice):
    assert_conserved(network(twice))
    assert_same_maps(network(twice), network(), atol=1e-5)


@pytest.mark.parametrize(
    "scale",
    [
        lambda x: lax.mul_p.bind(x, jnp.full((1, 1, 1, CHANNELS), 2.0)),
        lambda x: lax.mul_p.bind(jnp.full((1, 1, 1, CHANNELS), -2.0), x) * -1,
        lambda x: lax.add_p.bind(x, jnp.zeros((1, 1, 1, CHANNELS))),
        lambda x: jnp.full((1, 1, 1, CHANNELS), 2.0) * x,
        lambda x: x * jnp.full((CHANNELS,), 2.0),
        lambda x: lax.max_p.bind(x, jnp.zeros((1, 1, 1, CHANNELS))),
        lambda x: lax.div_p.bind(x, jnp.full((1, 1, 1, 1), 2.0)),
    ],
)
def test_operands_of_size_one_are_spread_without_a_word(scale):
    assert_same_maps(network(scale), network(), atol=1e-5)


def test_integer_images_are_converted_inside():
    integers = jnp.asarray(RNG.integers(0, 256, size=IMAGES.shape), jnp.uint8)

    def fn(images):
        return network()(images[:, ::-1].transpose(0, 2, 1, 3).astype(jnp.float32) / 255)

    for method in METHODS:
        maps = method(fn, integers, TARGETS, tap="features")
        expected = method(fn, integers.astype(jnp.float32), TARGETS, tap="features")
        np.testing.assert_allclose(maps, expected, atol=1e-7)
        with pytest.raises(ValueError, match="uint8"):
            method(fn, integers, TARGETS, tap="input")


# --------------------------------------------------------------------------------------- taps


def test_the_images_are_the_tap_input():
    def fn(images):
        return network()(checkpoint_name(images, "images"))

    for method in METHODS:
        maps = method(fn, IMAGES, TARGETS, tap=["input", "images", "features"])
        np.testing.assert_array_equal(maps["input"], maps["images"])
        assert list(maps) == ["input", "images", "features"]
        for tap, several in maps.items():
            np.testing.assert_allclose(several, method(fn, IMAGES, TARGETS, tap=tap), atol=1e-6)

    def taken(images):
        return network()(checkpoint_name(2 * images, "input"))

    np.testing.assert_array_equal(
        excitation_backprop(taken, IMAGES, TARGETS, tap="input"),
        excitation_backprop(network(), 2 * IMAGES, TARGETS, tap="input"),
    )


def test_a_tap_on_one_branch_has_that_branch_s_share():
    def middle(x):
        left = checkpoint_name(jax.nn.relu(conv(x, NECK)), "left")
        right = checkpoint_name(jax.nn.relu(x @ QUERY), "right")
        return left + right

    taps = ["features", "left", "right"]
    maps = excitation_backprop(network(middle), IMAGES, TARGETS, tap=taps)
    shares = [relevance_balance(network(middle), IMAGES, TARGETS, tap=t).at_tap for t in taps]
    for tap, share in zip(taps, shares, strict=True):
        np.testing.assert_allclose(maps[tap].sum((1, 2)), share, atol=1e-5)
        alone = excitation_backprop(network(middle), IMAGES, TARGETS, tap=tap)
        np.testing.assert_allclose(maps[tap], alone, atol=1e-6)
    assert (np.asarray(shares[1:]) > 0.01).all() and (np.asarray(shares[1:]) < 0.99).all()
    np.testing.assert_allclose(shares[1] + shares[2], shares[0], atol=0.05)


def test_the_balance_is_of_any_tap():
    def fn(images):
        return checkpoint_name(network()(images), "logits")

    balance = relevance_balance(fn, IMAGES, TARGETS, tap="logits")
    for value, expected in zip(dataclasses.astuple(balance), (1, 1, 0), strict=True):
        np.testing.assert_allclose(value, np.full(4, expected), atol=1e-6)


# ------------------------------------------------------------------------------------ targets


def test_maps_are_linear_in_float_targets():
    mix = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)
    for method in METHODS:
        maps = method(network(), IMAGES, mix, tap="features")
        single = [method(network(), IMAGES, jnp.full(4, k), tap="features") for k in range(5)]
        expected = sum(mix[:, k, None, None] * single[k] for k in range(5))
        np.testing.assert_allclose(maps, expected, atol=1e-5)


def test_spatial_logits_start_from_the_softmax_of_the_class_s_map():
    def fn(images):
        x = checkpoint_name(jax.nn.relu(conv(images, STEM)), "features")
        return x @ HEAD

    x = np.maximum(np.asarray(conv(IMAGES, STEM), np.float64), 0)
    head = np.asarray(HEAD, np.float64)
    for method, signs in ((excitation_backprop, (1,)), (contrastive_excitation_backprop, (1, -1))):
        maps = method(fn, IMAGES, TARGETS, tap="features")
        for n, k in enumerate(np.asarray(TARGETS)):
            logit = x[n] @ head[:, k]
            p = np.exp(logit - logit.max())
            p /= p.sum()
            supports = [sign * (x[n] @ np.maximum(sign * head[:, k], 0) > 0) for sign in signs]
            expected = p * sum(supports)
            np.testing.assert_allclose(maps[n], expected, atol=1e-6)


# ------------------------------------------------------------------------- JAX transformations


@pytest.mark.parametrize("method", METHODS)
def test_jit_and_vmap_over_classes_and_images_give_the_same_maps(method):
    fn = network(functools.partial(squeeze_and_excitation, hold=alive))
    expected = method(fn, IMAGES, TARGETS, tap="features")
    jitted = jax.jit(lambda x, t: method(fn, x, t, tap="features"))
    np.testing.assert_allclose(jitted(IMAGES, TARGETS), expected, atol=1e-6)
    of_classes = jax.vmap(lambda k: jitted(IMAGES, jnp.full(4, k)))(jnp.arange(5))
    np.testing.assert_allclose(of_classes[TARGETS, jnp.arange(4)], expected, atol=1e-6)
    of_images = jax.vmap(lambda x, t: method(fn, x[None], t[None], tap="features")[0])
    np.testing.assert_allclose(of_images(IMAGES, TARGETS), expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_sharded_images_give_the_same_maps(method):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = [jax.device_put(value, sharding) for value in (IMAGES, TARGETS)]
    jitted = jax.jit(lambda x, t: method(network(), x, t, tap="features"))
    maps = jitted(*sharded)
    assert len(maps.sharding.device_set) == 4
    np.testing.assert_allclose(maps, jitted(IMAGES, TARGETS), atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("method", METHODS)
def test_any_chunk_size_gives_the_same_maps(method, chunk_size):
    maps = method(network(), IMAGES, TARGETS, tap=["features", "input"], chunk_size=chunk_size)
    expected = method(network(), IMAGES, TARGETS, tap=["features", "input"])
    for tap in expected:
        np.testing.assert_allclose(maps[tap], expected[tap], atol=1e-6)


def test_a_bad_chunk_size_raises():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        excitation_backprop(network(), IMAGES, TARGETS, tap="features", chunk_size=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_on_a_map_has_the_gradient_of_finite_differences(method):
    cost = np.random.default_rng(3).normal(size=(2, 3, 3))

    def middle(x):
        x = x * jax.nn.sigmoid(x.mean((1, 2), keepdims=True))
        pooled = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jax.nn.silu(checkpoint_name(pooled, "pooled") - 0.2)

    def loss(images):
        maps = method(network(middle), images, TARGETS[:2], tap="pooled")
        return (cost * maps).sum() + (maps**2).sum()

    with jax.enable_x64(True):
        images = jnp.asarray(IMAGES[:2], jnp.float64)
        loss = jax.jit(loss)
        grad = np.asarray(jax.grad(loss)(images))
        directions = np.random.default_rng(4).normal(size=(5, *images.shape))
        for direction in directions:
            step = 1e-6 * direction
            slope = (loss(images + step) - loss(images - step)) / 2e-6
            assert slope == pytest.approx((grad * direction).sum(), rel=1e-5, abs=1e-8)


def test_a_loss_on_a_map_keeps_derivatives_that_functions_bring_along():
    @jax.custom_jvp
    def bent(x):
        return jnp.exp(x)

    bent.defjvp(lambda primals, tangents: (jnp.exp(primals[0]), 5 * tangents[0]))
    cost = np.random.default_rng(3).normal(size=IMAGES.shape[:3])

    def loss(x, before=lambda x: x):
        def fn(images):
            return jnp.einsum("nhwc,ck->nk", checkpoint_name(before(images), "t"), HEAD[:3])

        return (cost * excitation_backprop(fn, x, TARGETS, tap="t")).sum()

    plain = jax.grad(loss)(jnp.exp(IMAGES))
    for wrap in (lambda f: f, jax.jit, jax.vmap, jax.checkpoint):
        grad = jax.grad(lambda x, wrap=wrap: loss(x, wrap(bent)))(IMAGES)
        np.testing.assert_allclose(grad, 5 * plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "elu", "tanh"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_network_gives_float32_maps_near_those_of_float32(method, activation):
    fn = network(lambda x: getattr(jax.nn, activation)(conv(x, NECK)))
    expected = method(fn, IMAGES, TARGETS, tap="features")
    maps = method(fn, IMAGES.astype(jnp.bfloat16), TARGETS, tap="features")
    assert maps.dtype == jnp.float32
    np.testing.assert_allclose(maps, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_float64_stays_and_float32_too_where_float64_is_enabled(dtype):
    expected = excitation_backprop(network(), IMAGES, TARGETS, tap="features")
    with jax.enable_x64(True):
        for method in METHODS:
            maps = method(network(), jnp.asarray(IMAGES, dtype), TARGETS, tap="features")
            assert maps.dtype == dtype
            if method is excitation_backprop:
                np.testing.assert_allclose(maps, expected, atol=1e-6)


# ------------------------------------------------------------------------------- conservation


class Relu(nn.Module):
    """As a module, after which a layer can be inserted."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


class Vgg(nn.Module):
    """Convolutions, max pools, a head of two dense layers."""

    @nn.compact
    def __call__(self, x):
        for i, channels in enumerate((8, 8, 16)):
            x = Relu(name=f"relu{i}")(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class SqueezeNet(nn.Module):
    """Fire modules, whose branches are joined, and a convolution as the head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        for i in range(2):
            x = nn.max_pool(x, (3, 3), (2, 2))
            squeezed = Relu(name=f"squeeze{i}")(nn.Conv(8, (1, 1))(x))
            one = nn.relu(nn.Conv(12, (1, 1))(squeezed))
            three = nn.relu(nn.Conv(12, (3, 3))(squeezed))
            x = jnp.concatenate([one, three], -1)
        return nn.relu(nn.Conv(10, (1, 1))(x)).mean((1, 2))


tiny_resnet = functools.partial(
    create_model, "resnet", stage_sizes=(1, 1), block="basic", stem="cifar", width=8
)
# What creates it, where a layer is inserted and relevance looked at, how branches share.
RELU_NETWORKS: dict[str, tuple[Any, str, str]] = {
    "vgg": (Vgg, "relu1", "raw"),
    "squeezenet": (SqueezeNet, "squeeze0", "raw"),
    "resnet": (functools.partial(tiny_resnet, num_classes=10), "stage1", "positive"),
    "resnet, raw sums": (functools.partial(tiny_resnet, num_classes=10), "stage1", "raw"),
    "cifar_resnet20": (
        functools.partial(create_model, "cifar_resnet20", num_classes=10, width=4),
        "stage1",
        "positive",
    ),
}
INSERTED = {
    "nothing": None,
    "zoom from bilinear": AttentionZoom(zoom_init="bilinear", threshold=0.6),
    "zoom from random": AttentionZoom(threshold=0.6),
}


def balance_of(name, inserted, seed=0):
    """At the place of the inserted layer, of the classes that the network predicts."""
    create, tap, sums = RELU_NETWORKS[name]
    model, images = create(), np.random.default_rng(seed).uniform(size=(4, 32, 32, 3))
    call: dict[str, Any] = {"train": False} if "resnet" in name else {}
    if INSERTED[inserted] is not None:
        model, tap = Insert(model, layers={tap: INSERTED[inserted]}), f"backbone/{tap}/before"
    key = jax.random.key(seed)

    @jax.jit
    def balance(images):
        fn = bind(model, model.init(key, images[:1], **call), **call)
        targets = fn(images).argmax(-1)
        return dataclasses.astuple(relevance_balance(fn, images, targets, tap=tap, sums=sums))

    return map(np.asarray, balance(jnp.asarray(images, jnp.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("inserted", INSERTED)
@pytest.mark.parametrize("name", RELU_NETWORKS)
def test_relu_networks_conserve_the_probability_and_drop_little(name, inserted):
    """Raw shares of a sum that meet a unit without support may drop more, or less than nothing."""
    if name == "cifar_resnet20" and inserted != "nothing":
        pytest.skip("the layer is tried in the smaller network")
    at_tap, absolute, dropped = balance_of(name, inserted)
    print(f"{name}, {inserted}: at tap {at_tap}, absolute {absolute}, dropped {dropped}")
    np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-4)
    if "raw sums" not in name:
        assert (np.abs(dropped) < 0.05).all()

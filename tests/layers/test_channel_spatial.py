"""Channel and spatial gates against slow float64 versions, and what they promise at step 0."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attnzoom_jax.attribution import list_taps, relevance_balance
from attnzoom_jax.layers import CBAM, ECA, SqueezeExcite
from attnzoom_jax.layers.channel_spatial import eca_kernel
from attnzoom_jax.layers.factory import create_layer
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.models.resnet import ResNet

IMAGES = np.random.default_rng(0).normal(size=(3, 5, 4, 8))
LAYERS = (SqueezeExcite, ECA, CBAM)


def init(layer, x=IMAGES):
    return jax.jit(layer.init)(jax.random.key(0), jnp.float32(x))


def shapes_of(layer):
    return jax.eval_shape(layer.init, jax.random.key(0), IMAGES)


def moved(variables, *, seed=0):
    """Variables of those shapes with no value at its default, so that each one matters."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        is_var = path[-1].key == "var"
        return np.float32(
            rng.uniform(0.5, 1.5, leaf.shape) if is_var else rng.normal(0, 0.5, leaf.shape)
        )

    return jax.tree_util.tree_map_with_path(draw, variables)


# ---- the oracle: plain loops in float64


def sigmoid(a):
    return 1 / (1 + math.exp(-a))


def slow_mlp(z, params):
    """W2 ReLU(W1 z + b1) + b2 of one vector."""
    fc1, fc2 = params["fc1"], params["fc2"]
    hidden = [max(0.0, z @ w + b) for w, b in zip(fc1["kernel"].T, fc1["bias"], strict=True)]
    return np.array([hidden @ w + b for w, b in zip(fc2["kernel"].T, fc2["bias"], strict=True)])


def slow_squeeze_excite(x, variables, top, layer):
    out = np.zeros_like(x)
    for i, image in enumerate(x):
        logits = slow_mlp(image.mean(axis=(0, 1)), variables["params"])
        for c in range(x.shape[-1]):
            out[i, :, :, c] = image[:, :, c] * top * sigmoid(logits[c])
    return out


def slow_eca(x, variables, top, layer):
    kernel = variables["params"]["conv"]["kernel"][:, 0, 0]
    out = np.zeros_like(x)
    for i, c in itertools.product(range(x.shape[0]), range(x.shape[-1])):
        logit = 0.0
        for j, weight in enumerate(kernel):
            neighbour = c + j - len(kernel) // 2
            if 0 <= neighbour < x.shape[-1]:
                logit += weight * x[i, :, :, neighbour].mean()
        out[i, :, :, c] = x[i, :, :, c] * top * sigmoid(logit)
    return out


def slow_spatial_logits(x, kernel):
    size = kernel.shape[0]
    half = size // 2
    n, h, w, _ = x.shape
    logits = np.zeros((n, h, w))
    for i, y, z, a, b in itertools.product(*map(range, (n, h, w, size, size))):
        v, u = y + a - half, z + b - half
        if 0 <= v < h and 0 <= u < w:
            pixel = x[i, v, u]
            logits[i, y, z] += kernel[a, b, 0, 0] * pixel.max() + kernel[a, b, 1, 0] * pixel.mean()
    return logits


def slow_cbam(x, variables, top, layer, *, train=False):
    params, stats = variables["params"], variables["batch_stats"]["spatial"]["norm"]
    weighted = np.zeros_like(x)
    for i, image in enumerate(x):
        flat = image.reshape(-1, x.shape[-1])
        logits = slow_mlp(flat.mean(0), params["channel"]) + slow_mlp(
            flat.max(0), params["channel"]
        )
        weighted[i] = image * [top * sigmoid(a) for a in logits]
    logits = slow_spatial_logits(weighted, params["spatial"]["conv"]["kernel"])
    mean, var = (logits.mean(), logits.var()) if train else (stats["mean"], stats["var"])
    norm = params["spatial"]["norm"]
    logits = (logits - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return weighted * top * np.vectorize(sigmoid)(logits)[..., None]


SLOW = {SqueezeExcite: slow_squeeze_excite, ECA: slow_eca, CBAM: slow_cbam}


def in_float64(variables):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), variables)


@pytest.mark.parametrize(
    "layer",
    [
        SqueezeExcite(reduction=4),
        SqueezeExcite(reduction=2, identity_init=True),
        ECA(),
        ECA(kernel=5, identity_init=True),
        CBAM(reduction=4),
        CBAM(reduction=3, kernel=3, identity_init=True),
    ],
)
def test_equals_the_slow_version(layer):
    variables = moved(shapes_of(layer))
    out = jax.jit(layer.apply)(variables, jnp.float32(IMAGES))
    top = 2 if layer.identity_init else 1
    expected = SLOW[type(layer)](IMAGES, in_float64(variables), top, layer)
    assert out.shape == IMAGES.shape
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_cbam_in_training_normalises_by_the_batch():
    layer = CBAM(reduction=4)
    variables = moved(shapes_of(layer))
    apply = functools.partial(layer.apply, train=True, mutable=["batch_stats"])
    out, updates = jax.jit(apply)(variables, jnp.float32(IMAGES))
    known = in_float64(variables)
    expected = slow_cbam(IMAGES, known, 1, layer, train=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)

    weighted = IMAGES * np.asarray(channel_gate(layer, variables), np.float64)
    logits = slow_spatial_logits(weighted, known["params"]["spatial"]["conv"]["kernel"])
    before = known["batch_stats"]["spatial"]["norm"]
    after = updates["batch_stats"]["spatial"]["norm"]
    for name, batch in (("mean", logits.mean()), ("var", logits.var())):
        np.testing.assert_allclose(after[name], 0.99 * before[name] + 0.01 * batch, rtol=1e-4)


def channel_gate(layer, variables):
    capture = functools.partial(layer.apply, capture_intermediates=True, mutable=["intermediates"])
    _, state = capture(variables, jnp.float32(IMAGES))
    return state["intermediates"]["channel"]["gate"]["__call__"][0]


# ---- the start


def call(layer, variables, x, train):
    if train:
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    return layer.apply(variables, x)


@pytest.mark.parametrize(
    ("kind", "train"), [(SqueezeExcite, False), (ECA, False), (CBAM, False), (CBAM, True)]
)
def test_identity_init_changes_nothing_at_first_and_then_everything_learns(kind, train):
    layer, x = kind(identity_init=True), jnp.float32(IMAGES)
    variables = init(layer)
    np.testing.assert_array_equal(call(layer, variables, x, train), x)

    @jax.jit
    def gradient(variables):
        def loss(params):
            return (call(layer, {**variables, "params": params}, x, train) ** 3).sum()

        return jax.grad(loss)(variables["params"])

    first = gradient(variables)
    params = jax.tree.map(lambda p, g: p - 1e-2 * g, variables["params"], first)
    second = gradient({**variables, "params": params})
    assert any(jnp.any(g != 0) for g in jax.tree.leaves(first))
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(second))
    assert not np.array_equal(call(layer, {**variables, "params": params}, x, train), x)


def test_weights_start_as_torch_starts_a_linear_layer():
    x = np.zeros((1, 2, 2, 64))
    for params in (
        init(SqueezeExcite(reduction=2), x)["params"],
        init(CBAM(reduction=2), x)["params"]["channel"],
    ):
        for name, fan_in in (("fc1", 64), ("fc2", 32)):
            largest = np.abs(params[name]["kernel"]).max() * np.sqrt(fan_in)
            assert 0.95 < largest <= 1
            assert not np.any(params[name]["bias"])


@pytest.mark.parametrize("kind", LAYERS)
def test_the_published_form_only_fades(kind):
    variables = init(kind())
    out = np.asarray(kind().apply(variables, jnp.float32(IMAGES)))
    ratio = out / np.float32(IMAGES)
    assert 0 < ratio.min() <= ratio.max() < 1


def test_the_spatial_gate_starts_at_one_half():
    layer = CBAM(reduction=2)
    variables = init(layer)
    out = layer.apply(variables, jnp.float32(IMAGES))
    np.testing.assert_allclose(
        out, IMAGES * np.asarray(channel_gate(layer, variables)) / 2, rtol=1e-5
    )


def test_inserted_with_identity_init_a_network_keeps_its_logits():
    backbone = ResNet(3, stem="cifar", stage_sizes=(1,), width=4)
    images = jnp.float32(np.random.default_rng(1).uniform(size=(2, 8, 8, 3)))
    names = {"stem": "squeeze_excite", "stage1/block1/norm2": "eca", "stage1": "cbam"}
    layers = {path: create_layer(name, identity_init=True) for path, name in names.items()}
    model = Insert(backbone, layers)
    variables = jax.jit(model.init)(jax.random.key(1, impl="rbg"), images)
    alone = {collection: tree["backbone"] for collection, tree in variables.items()}
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, images), jax.jit(backbone.apply)(alone, images), rtol=1e-6
    )


# ---- sizes, types, names


def test_eca_kernel_is_the_nearest_odd_number():
    for channels in range(1, 5000):
        wanted = (math.log2(channels) + 1) / 2
        # max: of two that are equally near the larger one.
        nearest = max(range(1, 20, 2), key=lambda k: (-abs(k - wanted), k))
        assert eca_kernel(channels) == nearest
    assert [eca_kernel(c) for c in (64, 128, 256, 512, 1024, 2048)] == [3, 5, 5, 5, 5, 7]


def test_parameter_trees():
    def shapes(layer):
        return jax.tree.map(jnp.shape, shapes_of(layer))

    def excite(hidden):
        return {
            "fc1": {"kernel": (8, hidden), "bias": (hidden,)},
            "fc2": {"kernel": (hidden, 8), "bias": (8,)},
        }

    assert shapes(SqueezeExcite(reduction=4)) == {"params": excite(2)}
    assert shapes(SqueezeExcite()) == {"params": excite(1)}  # 8 channels make half a unit
    assert shapes(ECA()) == {"params": {"conv": {"kernel": (3, 1, 1)}}}
    assert shapes(CBAM()) == {
        "params": {
            "channel": excite(1),
            "spatial": {
                "conv": {"kernel": (7, 7, 2, 1)},
                "norm": {"scale": (1,), "bias": (1,)},
            },
        },
        "batch_stats": {"spatial": {"norm": {"mean": (1,), "var": (1,)}}},
    }


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_of_the_asked_type_and_masks_in_float32(kind, dtype):
    layer, x = kind(dtype=dtype), jnp.asarray(IMAGES, jnp.bfloat16)
    variables = moved(shapes_of(layer))
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    capture = functools.partial(layer.apply, capture_intermediates=True, mutable=["intermediates"])
    out, state = jax.jit(capture)(variables, x)
    assert out.dtype == jnp.dtype(dtype or "bfloat16")
    leaves = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    gates = [leaf for path, leaf in leaves if "gate" in jax.tree_util.keystr(path)]
    assert {gate.dtype for gate in gates} == {jnp.dtype("float32")}
    expected = SLOW[kind](np.float64(x), in_float64(variables), 1, layer)
    np.testing.assert_allclose(np.float64(out), expected, rtol=0.02, atol=0.02)


def test_masks_are_taps_and_relevance_follows_the_signal():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for kind in LAYERS:
                x = kind(name=kind.__name__)(nn.relu(nn.Conv(4, (3, 3))(x)))
            return nn.Dense(3)(x.mean((1, 2)))

    images = jnp.float32(np.random.default_rng(1).uniform(size=(1, 6, 6, 3)))
    variables = moved(jax.eval_shape(Network().init, jax.random.key(0), images))
    taps = list_taps(bind(Network(), variables), images)
    assert {path: shape for path, shape in taps.items() if path.endswith("gate")} == {
        "SqueezeExcite/gate": (1, 1, 1, 4),
        "ECA/gate": (1, 1, 1, 4),
        "CBAM/channel/gate": (1, 1, 1, 4),
        "CBAM/spatial/gate": (1, 6, 6, 1),
    }

    @jax.jit
    def balance(variables):
        fn = bind(Network(), variables)
        found = relevance_balance(fn, images, jnp.array([0]), tap="SqueezeExcite")
        return found.at_tap[0], found.dropped[0]

    at_tap, dropped = balance(variables)
    np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-5)
    assert 0 <= dropped < 0.05


# ---- bad input


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SqueezeExcite(reduction=0), "SqueezeExcite.reduction is 0, .*at least 1; try 16"),
        (CBAM(reduction=1.5), "CBAM.reduction is 1.5"),
        (CBAM(kernel=4), "CBAM.kernel is 4, expected an odd number; try 7"),
        (ECA(kernel=0), "ECA.kernel is 0, expected an odd number; try None"),
        (ECA(kernel=True), "ECA.kernel is True"),
    ],
)
def test_bad_fields(layer, message):
    with pytest.raises(ValueError, match=message):
        init(layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_input_without_batch_axis(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__} takes .*got shape \(5, 4, 8\)"):
        init(kind(), IMAGES[0])


def test_names_of_the_factory():
    assert create_layer("squeeze_excite", reduction=8) == SqueezeExcite(reduction=8)
    assert create_layer("eca", kernel=3) == ECA(kernel=3)
    assert create_layer("cbam", kernel=3) == CBAM(kernel=3)
    with pytest.raises(ValueError, match="unknown option of eca 'kernal'; did you mean 'kernel'"):
        create_layer("eca", kernal=3)

"""CamGuidedAttention against a slow float64 version, its size, and what it shows of itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.attribution import list_taps, read_taps, relevance_balance
from attnzoom_jax.layers import CamGuidedAttention
from attnzoom_jax.layers.factory import create_layer
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.models.resnet import ResNet

X = np.random.default_rng(0).normal(size=(3, 5, 4, 8))


def moved(layer, *, seed=0):
    """Variables with no value at its default, so that each one matters."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.7, leaf.shape)), shapes)


# ---- the oracle: plain loops in float64


def slow(x, params, spatial):
    """(output, attention, mask) of one image, place by place."""
    h, w, c = x.shape
    fc1, fc2 = params["channel_attention"]["fc1"], params["channel_attention"]["fc2"]
    g = [sum(x[i, j, k] for i in range(h) for j in range(w)) / (h * w) for k in range(c)]
    hidden = [max(0.0, np.dot(g, u) + b) for u, b in zip(fc1["kernel"].T, fc1["bias"], strict=True)]
    q = [np.dot(hidden, u) + b for u, b in zip(fc2["kernel"].T, fc2["bias"], strict=True)]
    a = [math.exp(v) / sum(math.exp(u) for u in q) for v in q]
    m = [[sum(a[k] * x[i, j, k] for k in range(c)) for j in range(w)] for i in range(h)]
    if spatial == "sigmoid":
        s = [[1 / (1 + math.exp(-v)) for v in row] for row in m]
    else:
        total = sum(math.exp(v) for row in m for v in row)
        s = [[math.exp(v) / total for v in row] for row in m]
    s = np.array(s)[..., None]
    return x * s, np.array(a), s


@pytest.mark.parametrize("spatial", ["sigmoid", "softmax"])
@pytest.mark.parametrize("reduction", [2, 16])
def test_it_equals_the_slow_version(spatial, reduction):
    layer = CamGuidedAttention(reduction=reduction, spatial=spatial)
    variables = moved(layer)
    fn = bind(layer, variables)
    found, taps = read_taps(fn, jnp.float32(X), ["channel_attention", "gate", "input"])
    params = jax.tree.map(np.float64, variables["params"])
    for n, x in enumerate(X):
        y, a, s = slow(x, params, spatial)
        np.testing.assert_allclose(found[n], y, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(taps["channel_attention"][n], a, rtol=2e-5)
        np.testing.assert_allclose(taps["gate"][n], s, rtol=2e-5)
    np.testing.assert_array_equal(taps["input"], np.float32(X))


def test_what_the_scales_are():
    """What the docstring says: at least half after a ReLU, or about 1 / hw."""
    x = jnp.float32(np.maximum(X, 0))
    for spatial, low, total in (("sigmoid", 0.5, None), ("softmax", 0, 1)):
        layer = CamGuidedAttention(spatial=spatial)
        _, taps = read_taps(bind(layer, moved(layer)), x, ["gate"])
        mask = np.asarray(taps["gate"])
        assert mask.shape == (3, 5, 4, 1) and mask.min() >= low and mask.max() < 1
        if total is not None:
            np.testing.assert_allclose(mask.sum(axis=(1, 2, 3)), total, rtol=1e-6)


def test_it_has_as_many_parameters_as_the_published_one():
    layer = CamGuidedAttention()
    x = jax.ShapeDtypeStruct((1, 14, 14, 2048), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert set(variables) == {"params"}
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    assert {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves} == {
        "channel_attention/fc1/kernel": (2048, 128),
        "channel_attention/fc1/bias": (128,),
        "channel_attention/fc2/kernel": (128, 2048),
        "channel_attention/fc2/bias": (2048,),
    }
    assert sum(leaf.size for _, leaf in leaves) == 526_464


def test_inserted_it_is_seen_at_its_taps_and_relevance_goes_to_the_signal():
    model = Insert(
        ResNet(num_classes=3, stage_sizes=(1,), block="basic", stem="small", width=8),
        layers={"stage1": create_layer("cam_guided", reduction=2)},
    )
    images = jnp.float32(np.random.default_rng(1).uniform(size=(2, 16, 16, 3)))
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images)
    fn = bind(model, variables, train=False)
    taps = list_taps(fn, images)
    assert taps["inserted/stage1/channel_attention"] == (2, 8)
    assert taps["inserted/stage1/gate"][-1] == 1
    shape = taps["backbone/stage1"]
    assert taps["inserted/stage1"] == taps["inserted/stage1/input"] == shape and len(shape) == 4
    targets = jnp.array([0, 2])
    after, before = (
        relevance_balance(fn, images, targets, tap=tap).at_tap
        for tap in ("inserted/stage1", "inserted/stage1/input")
    )
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert (np.asarray(after) > 0.5).all()


def test_half_precision_keeps_the_attention_in_float32():
    layer = CamGuidedAttention()
    variables, x = moved(layer), jnp.asarray(X, jnp.bfloat16)
    shapes = {}
    for dtype in (None, jnp.float32):
        fn = bind(CamGuidedAttention(dtype=dtype), variables)
        output, taps = jax.eval_shape(lambda x, fn=fn: read_taps(fn, x, ["gate"]), x)
        shapes[dtype] = output.dtype, taps["gate"].dtype
    assert shapes == {None: (jnp.bfloat16, jnp.float32), jnp.float32: (jnp.float32, jnp.float32)}


@pytest.mark.parametrize(
    ("fields", "x", "message"),
    [
        ({"spatial": "softmx"}, X, "unknown CamGuidedAttention.spatial 'softmx'; did you mean 'so"),
        ({"reduction": 0}, X, "CamGuidedAttention.reduction is 0, expected a whole number"),
        ({}, X[0], r"CamGuidedAttention takes features \[n, h, w, c\], got shape \(5, 4, 8\)"),
    ],
)
def test_bad_input_is_one_line(fields, x, message):
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(CamGuidedAttention(**fields).init, jax.random.key(0), x)
    assert "\n" not in str(error.value)

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attnzoom_jax.layers import AttentionZoom, Gate

IMAGES = np.random.default_rng(0).normal(size=(2, 5, 6, 3))


def init(layer, x=IMAGES):
    return jax.jit(layer.init)(jax.random.key(0), jnp.float32(x))


def apply(layer, variables):
    return jax.jit(layer.apply)(variables, jnp.float32(IMAGES))


def logits_of(x, kernel, bias=0.0):
    """The C -> 1 convolution with zero padding, in plain float64 loops."""
    n, h, w, _ = x.shape
    kh, kw = kernel.shape[:2]
    pads = ((0, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2), (0, 0))
    padded = np.pad(x, pads)
    logits = np.zeros((n, h, w, 1))
    for i, j in itertools.product(range(h), range(w)):
        logits[:, i, j] = np.tensordot(padded[:, i : i + kh, j : j + kw], kernel, 3) + bias
    return logits


def slow_mask(x, params, layer):
    params = jax.tree.map(np.float64, params["attention_conv"])
    sigmoid = 1.0 / (1.0 + np.exp(-logits_of(x, params["kernel"], params.get("bias", 0.0))))
    return np.where(sigmoid >= layer.threshold, 1.0, sigmoid)


def slow_layer(x, params, layer):
    """The paper's five equations in float64; the zoom as a scatter, unlike the other oracles."""
    zoom = jax.tree.map(np.float64, params["zoom"])
    weighted = x * slow_mask(x, params, layer)
    n, h, w, c = x.shape
    s, size = layer.factor, layer.zoom_kernel
    centre = (size - 1) // 2
    out = np.zeros((n, s * h, s * w, c)) + zoom.get("bias", 0.0)
    for i, j, a, b in itertools.product(range(h), range(w), range(size), range(size)):
        y, x = s * i + centre - a, s * j + centre - b
        if 0 <= y < s * h and 0 <= x < s * w:
            tap = zoom["kernel"][a, b]
            pixel = weighted[:, i, j]
            out[:, y, x] += pixel * tap[0] if layer.zoom_conv == "depthwise" else pixel @ tap
    return out


def names_in(jaxpr):
    """Names given by `checkpoint_name`, at any depth."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            found.append(eqn.params["name"])
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: v is None):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += names_in(inner)
    return found


@pytest.mark.parametrize(
    "layer",
    [
        AttentionZoom(),
        AttentionZoom(zoom_conv="full", use_bias=True),
        AttentionZoom(threshold=0.7, attention_kernel=5, zoom_kernel=4, use_bias=True),
        AttentionZoom(threshold=0.3, factor=3, attention_kernel=2, zoom_conv="full"),
        AttentionZoom(threshold=2.0, factor=1, attention_kernel=1, zoom_kernel=2),
    ],
)
def test_equals_the_papers_equations(layer):
    params = init(layer)["params"]
    # Biases start at zero: move everything, or a forgotten bias would pass.
    keys = iter(jax.random.split(jax.random.key(1), 8))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)
    out = apply(layer, {"params": params})
    expected = slow_layer(IMAGES, params, layer)
    assert out.shape == (2, 5 * layer.factor, 6 * layer.factor, 3)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_parameter_tree():
    shapes = jax.tree.map(jnp.shape, init(AttentionZoom(zoom_kernel=5, use_bias=True))["params"])
    assert shapes == {
        "attention_conv": {"kernel": (3, 3, 3, 1), "bias": (1,)},
        "zoom": {"kernel": (5, 5, 1, 3), "bias": (3,)},
    }
    full = init(AttentionZoom(zoom_conv="full"))["params"]
    assert jax.tree.map(jnp.shape, full) == {
        "attention_conv": {"kernel": (3, 3, 3, 1)},
        "zoom": {"kernel": (3, 3, 3, 3)},
    }


@pytest.mark.parametrize("zoom_conv", ["depthwise", "full"])
def test_bilinear_start_is_a_bilinear_zoom_of_the_masked_map(zoom_conv):
    layer = AttentionZoom(threshold=0.0, zoom_conv=zoom_conv, zoom_init="bilinear")  # mask 1
    out = apply(layer, init(layer))
    np.testing.assert_allclose(out[:, ::2, ::2], IMAGES, rtol=1e-6)
    between = (IMAGES[:, :, :-1] + IMAGES[:, :, 1:]) / 2
    np.testing.assert_allclose(out[:, ::2, 1:-1:2], between, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[:, -1, ::2], IMAGES[:, -1] / 2, rtol=1e-6)


def attention_gradient(layer, variables):
    def loss(variables):
        return (apply(layer, variables) ** 2).sum()

    grads = jax.grad(loss)(variables)["params"]
    assert jnp.abs(grads["zoom"]["kernel"]).max() > 0.0
    return jnp.abs(grads["attention_conv"]["kernel"]).max()


def test_random_start_learns_to_attend():
    layer = AttentionZoom()
    assert attention_gradient(layer, init(layer)) > 0.01


def test_saturated_mask_is_dead():
    layer = AttentionZoom(threshold=0.0)
    assert attention_gradient(layer, init(layer)) == 0.0


@pytest.mark.parametrize(("threshold", "dead"), [(0.5, True), (0.51, False)])
def test_zero_start_is_dead_at_the_default_threshold(threshold, dead):
    layer = AttentionZoom(threshold=threshold)
    variables = init(layer)
    variables["params"]["attention_conv"]["kernel"] = jnp.zeros((3, 3, 3, 1))
    assert bool(attention_gradient(layer, variables) == 0.0) == dead


def test_bfloat16_computes_in_bfloat16_with_a_float32_mask():
    layer = AttentionZoom(dtype=jnp.bfloat16, use_bias=True)
    x = jnp.asarray(IMAGES, jnp.bfloat16)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    capture = functools.partial(layer.apply, capture_intermediates=True, mutable=["intermediates"])
    out, state = jax.jit(capture)(variables, x)
    assert out.dtype == jnp.bfloat16
    (mask,) = state["intermediates"]["gate"]["__call__"]
    assert mask.dtype == jnp.float32
    # Tighter than bfloat16 logits could be.
    np.testing.assert_allclose(mask, slow_mask(np.float64(x), variables["params"], layer), 1e-5)
    expected = slow_layer(np.float64(x), variables["params"], layer)
    np.testing.assert_allclose(np.float64(out), expected, rtol=0.03, atol=0.03)


def test_jit_equals_eager():
    layer = AttentionZoom(zoom_conv="full")
    variables = init(layer)
    eager = jnp.asarray(layer.apply(variables, jnp.float32(IMAGES)))
    np.testing.assert_allclose(apply(layer, variables), eager, rtol=1e-5, atol=1e-6)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return AttentionZoom(name="stage1")(x) + AttentionZoom(name="stage2")(x)


@pytest.mark.parametrize(
    ("module", "names"), [(AttentionZoom(), {"gate"}), (Nested(), {"stage1/gate", "stage2/gate"})]
)
def test_mask_is_named_by_its_path(module, names):
    variables, x = init(module), jnp.float32(IMAGES)

    def loss(variables, x):
        return module.apply(variables, x).sum()

    for fn in (loss, jax.jit(loss)):
        assert sorted(names_in(jax.make_jaxpr(fn)(variables, x).jaxpr)) == sorted(names)
    assert set(names_in(jax.make_jaxpr(jax.grad(loss))(variables, x).jaxpr)) == names


def test_gate_outside_a_layer_is_called_gate():
    mask = jnp.linspace(0.0, 1.0, 4)
    for fn in (Gate(), lambda m: Gate().apply({}, m)):
        assert names_in(jax.make_jaxpr(fn)(mask).jaxpr) == ["gate"]
        np.testing.assert_array_equal(fn(mask), mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 0}, "factor is 0.*try 2"),
        ({"factor": 1.5}, "factor is 1.5"),
        ({"attention_kernel": -1}, "attention_kernel is -1.*try 3"),
        ({"zoom_kernel": True}, "zoom_kernel is True"),
        ({"threshold": "half"}, "threshold is 'half'.*try 0.5"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"zoom_conv": "depth"}, "zoom_conv 'depth'; did you mean 'depthwise'"),
        ({"zoom_init": "bilinaer"}, "zoom_init 'bilinaer'; did you mean 'bilinear'"),
        ({"zoom_init": "bilinear", "factor": 3}, "needs size >= 5, got 3"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        init(AttentionZoom(**fields))


def test_input_without_batch_axis():
    with pytest.raises(ValueError, match=r"\[n, h, w, c\], got shape \(5, 6, 3\)"):
        init(AttentionZoom(), IMAGES[0])


def parameters(layer):
    return sorted(
        "/".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(init(layer).get("params", {}))
    )


BOTH = ["attention_conv/kernel", "zoom/kernel"]
CONTROLS = {
    "the layer": ({}, BOTH, (10, 12)),
    "straight through": ({"mask": "straight_through"}, BOTH, (10, 12)),
    "zoom without attention": ({"mask": "ones"}, ["zoom/kernel"], (10, 12)),
    "attention without zoom": ({"factor": 1}, BOTH, (5, 6)),
    "bilinear": ({"mask": "ones", "zoom_conv": "bilinear"}, [], (10, 12)),
    "attention, bilinear": ({"zoom_conv": "bilinear"}, ["attention_conv/kernel"], (10, 12)),
}


@pytest.mark.parametrize(("fields", "expected", "size"), CONTROLS.values(), ids=CONTROLS)
def test_controls_differ_in_what_they_leave_out(fields, expected, size):
    layer = AttentionZoom(**fields)
    assert parameters(layer) == expected
    assert apply(layer, init(layer)).shape == (2, *size, 3)


def test_controls_equal_the_layer_where_they_leave_nothing_out():
    """At a threshold of 0 the mask is 1, and W_E that starts as a triangle is the bilinear zoom."""
    layer = AttentionZoom(threshold=0.0, zoom_init="bilinear")
    expected = apply(layer, variables := init(layer))
    zoom = {"params": {"zoom": variables["params"]["zoom"]}}
    np.testing.assert_array_equal(apply(AttentionZoom(mask="ones"), zoom), expected)
    bilinear = AttentionZoom(mask="ones", zoom_conv="bilinear")
    np.testing.assert_allclose(apply(bilinear, {}), expected, rtol=1e-6)


def test_straight_through_gives_the_same_values_and_lets_a_dead_mask_learn():
    layer = AttentionZoom(threshold=0.0, mask="straight_through")
    variables = init(layer)
    np.testing.assert_array_equal(
        apply(layer, variables), apply(AttentionZoom(threshold=0.0), variables)
    )
    assert np.abs(attention_gradient(layer, variables)).max() > 1e-4

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution import excitation_backprop, list_taps
from attnzoom_jax.layers import ZoomWarp
from attnzoom_jax.layers.factory import create_layer
from attnzoom_jax.models import bind
from attnzoom_jax.ops.warp import dense_grid, saliency_grid, sample, separable_grid, to_saliency
from attnzoom_jax.ops.warp_points import warp_points

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
FEATURES = jnp.float32(RNG.normal(size=(2, 9, 7, 3)))
ATTENTION = jnp.float32(RNG.uniform(size=(2, 4, 5, 2)))
GRIDS = ("saliency", "separable")


def apply(layer, variables, *args):
    return jax.jit(layer.apply)(variables, *args)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_as_the_identity_bit_for_bit(grid, dtype):
    layer, x = ZoomWarp(grid=grid), FEATURES.astype(dtype)
    variables = jax.jit(layer.init)(KEY, x)
    assert jax.tree.map(lambda p: (p.shape, p.dtype.name), variables) == {
        "params": {"saliency_conv": {"kernel": ((3, 3, 3, 1), "float32")}}
    }
    out = apply(layer, variables, x)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.float32(out), np.float32(x))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_constant_attention_is_the_identity_bit_for_bit(grid, value):
    layer = ZoomWarp(grid=grid, cells=11, reads="stage1/gate")
    out = apply(layer, {}, FEATURES, jnp.full((2, 4, 3, 1), value))
    np.testing.assert_array_equal(out, FEATURES)


@pytest.mark.parametrize("grid", GRIDS)
def test_learns_where_to_look(grid):
    # A bright spot off the middle: the layer is to fill its output with it.
    y, x = np.mgrid[:16, :16]
    spot = np.exp(-((y - 4) ** 2 + (x - 10) ** 2) / 6.0)
    images = jnp.float32(spot)[None, ..., None]
    layer = ZoomWarp(grid=grid, cells=16, fwhm=5.0)
    params = jax.jit(layer.init)(KEY, images)

    @jax.jit
    def step(params):
        light, grads = jax.value_and_grad(lambda p: layer.apply(p, images).mean())(params)
        return light, jax.tree.map(lambda p, g: p + 100.0 * g, params, grads)

    lights = []
    for _ in range(20):
        light, params = step(params)
        lights.append(float(light))
    assert lights[1] > lights[0]
    assert lights[-1] > 1.5 * lights[0]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [None, (5, 12)])
def test_equals_its_parts(grid, size):
    fields = dict(cells=8, temperature=0.3, floor=0.1, strength=0.9, weighting="power")
    layer = ZoomWarp(grid=grid, size=size, fwhm=3.0, marginal="sum", max_zoom=3.0, **fields)
    second = ATTENTION[:, :3, ::-1, 0] ** 2  # [n, h', w']
    out = apply(layer, {}, FEATURES, ATTENTION, second)

    options = dict(weighting="power", temperature=0.3, floor=0.1)
    first = to_saliency(ATTENTION.mean(-1), (8, 8), **options)
    saliency = (first + to_saliency(second, (8, 8), **options)) / 2
    sizes = dict(size=size or (9, 7), image_size=(9, 7), strength=0.9)
    places = (
        saliency_grid(saliency, **sizes, fwhm=3.0)
        if grid == "saliency"
        else separable_grid(saliency, **sizes, marginal="sum", max_zoom=3.0)
    )
    assert out.shape == (2, *(size or (9, 7)), 3)
    np.testing.assert_allclose(out, sample(FEATURES, places), atol=1e-5)
    found = dense_grid(layer.grid_of(saliency[..., None], (9, 7)))
    np.testing.assert_allclose(found, dense_grid(places), atol=1e-5)
    assert np.abs(found[:, 1:] - found[:, :-1]).std() > 0.05  # it does warp


def test_what_is_attended_grows_and_points_move_along():
    y, x = np.mgrid[:32, :32]
    spot = np.exp(-((y - 9) ** 2 + (x - 21) ** 2) / 8.0)[None, ..., None]
    layer = ZoomWarp(reads="gate", weighting="power", floor=0.02)
    out = apply(layer, {}, jnp.float32(spot), jnp.float32(spot))
    assert (out > 0.5).sum() > 2 * (spot > 0.5).sum()
    saliency = to_saliency(jnp.float32(spot[..., 0]), (31, 31), weighting="power", floor=0.02)
    grid = layer.grid_of(saliency[..., None], (32, 32))
    place = warp_points(jnp.float32([[[9, 21]]]), grid)[0, 0]
    peak = np.unravel_index(np.argmax(out[0, ..., 0]), (32, 32))
    np.testing.assert_allclose(place, peak, atol=1.0)


class Between(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x, *attention):
        x = checkpoint_name(nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), "features")
        x = self.layer.clone(parent=self, name="warp")(x, *attention)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("grid", GRIDS)
def test_relevance_goes_through_to_the_pixels_that_were_sampled(grid):
    layer = ZoomWarp(grid=grid, cells=8, fwhm=3.0, size=(6, 6))
    model, images = Between(layer), jnp.abs(FEATURES)
    params = jax.jit(model.init)(KEY, images)["params"]
    params["warp"]["saliency_conv"]["kernel"] += 0.5
    params["head"]["kernel"] = jnp.abs(params["head"]["kernel"])
    fn = bind(model, {"params": params})
    taps = list_taps(fn, images)
    assert taps["warp/gate"] == (2, 8, 8, 1)
    assert taps["warp"] == (2, 6, 6, 4)
    maps = excitation_backprop(fn, images, jnp.array([0, 2]), tap=["warp", "features"])
    for name in ("warp", "features"):
        np.testing.assert_allclose(maps[name].sum((1, 2)), 1.0, rtol=1e-4)
    # The transpose of bilinear sampling, written out.
    _, state = model.apply({"params": params}, images, capture_intermediates=True)
    gate = state["intermediates"]["warp"]["gate"]["__call__"][0]
    np.testing.assert_allclose(gate.sum((1, 2, 3)), 1.0, rtol=1e-5)
    features = nn.relu(state["intermediates"]["conv"]["__call__"][0])
    places = dense_grid(layer.grid_of(gate, (9, 7)))
    out = state["intermediates"]["warp"]["__call__"][0]
    weights = params["head"]["kernel"][:, jnp.array([0, 2])].T  # [n, c]
    share = out * weights[:, None, None]
    share /= share.sum((1, 2, 3), keepdims=True)
    _, pull = jax.vjp(lambda x: sample(x, places), features)
    np.testing.assert_allclose(maps["features"], pull(share)[0].sum(-1), atol=1e-6)


def test_jit_equals_eager():
    layer = ZoomWarp(cells=8)
    expected = apply(layer, {}, FEATURES, ATTENTION)
    np.testing.assert_allclose(layer.apply({}, FEATURES, ATTENTION), expected, atol=1e-5)


def test_by_name_with_lists_from_a_config():
    layer = create_layer(
        "zoom_warp", reads=["stage1/gate", "stage2"], size=[4, 6], grid="separable"
    )
    assert apply(layer, {}, FEATURES, ATTENTION, ATTENTION).shape == (2, 4, 6, 3)
    with pytest.raises(ValueError, match="did you mean 'fwhm'"):
        create_layer("zoom_warp", fwmh=3.0)


@pytest.mark.parametrize(
    ("fields", "args", "message"),
    [
        ({"grid": "separabel"}, (), "ZoomWarp.grid 'separabel'; did you mean 'separable'"),
        ({"cells": 0}, (), "cells is 0.*try 31"),
        ({"head_kernel": 2.5}, (), "head_kernel is 2.5"),
        ({"temperature": 0.0}, (), "temperature is 0.0"),
        ({"fwhm": 0.5}, (), "fwhm is 0.5"),
        ({"size": (4, 0)}, (), r"size is \(4, 0\)"),
        ({"reads": "stage2/gate"}, (), "reads 'stage2/gate' and was called without attention"),
        ({}, (ATTENTION[:1],), r"n = 2 .*got shape \(1, 4, 5, 2\)"),
        ({}, (ATTENTION[:, :1, :1],), "gates over channels have no places"),
        ({}, (ATTENTION[0, 0],), "takes attention"),
    ],
)
def test_bad_fields_and_attention(fields, args, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(ZoomWarp(**fields).init, KEY, FEATURES), *args)


def test_input_without_batch_axis():
    with pytest.raises(ValueError, match=r"\[n, h, w, c\], got shape \(9, 7, 3\)"):
        ZoomWarp().init(KEY, FEATURES[0])

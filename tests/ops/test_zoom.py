import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from attnzoom_jax.ops.zoom import bilinear_kernel, zoom_conv

KINDS = ("depthwise", "full")
# Eagerly every slice would be compiled on its own.
jit_zoom = jax.jit(zoom_conv, static_argnames="factor")


def random_inputs(kind, size, *, shape=(2, 5, 4, 3), out=2, seed=0):
    """Features, kernel and bias in float64; `size` is one number or (kh, kw)."""
    rng = np.random.default_rng(seed)
    kh, kw = (size, size) if isinstance(size, int) else size
    c = shape[-1]
    kernel = rng.normal(size=(kh, kw, 1, c) if kind == "depthwise" else (kh, kw, c, out))
    return rng.normal(size=shape), kernel, rng.normal(size=kernel.shape[-1])


def slow_zoom(features, kernel, factor):
    """Zero insertion, zero padding, and a convolution in plain float64 loops."""
    n, h, w, c = features.shape
    kh, kw, depth, out = kernel.shape
    up = np.zeros((n, factor * h, factor * w, c))
    up[:, ::factor, ::factor] = features
    before_h, before_w = (kh - 1) // 2, (kw - 1) // 2
    padded = np.pad(up, ((0, 0), (before_h, kh // 2), (before_w, kw // 2), (0, 0)))
    result = np.zeros((n, factor * h, factor * w, out))
    for y, x in itertools.product(range(factor * h), range(factor * w)):
        window = padded[:, y : y + kh, x : x + kw]  # [n, kh, kw, c]
        if depth == 1:
            result[:, y, x] = (window * kernel[:, :, 0]).sum((1, 2))
        else:
            result[:, y, x] = np.tensordot(window, kernel, 3)
    return result


def dilated_zoom(features, kernel, factor):
    """The same through XLA's input dilation."""
    pads = [((k - 1) // 2, k // 2 + factor - 1) for k in kernel.shape[:2]]
    return lax.conv_general_dilated(
        features,
        kernel,
        (1, 1),
        pads,
        lhs_dilation=(factor, factor),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=features.shape[-1] if kernel.shape[2] == 1 else 1,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_equals_zero_insertion_and_convolution(kind, factor, size):
    check_against_slow_zoom(kind, factor, size)


@pytest.mark.parametrize(("kind", "size"), [("depthwise", (1, 6)), ("full", (3, 2))])
def test_kernel_need_not_be_square(kind, size):
    check_against_slow_zoom(kind, 2, size)


def check_against_slow_zoom(kind, factor, size):
    features, kernel, bias = random_inputs(kind, size)
    zoomed = jit_zoom(*map(jnp.float32, (features, kernel, bias)), factor=factor)
    expected = slow_zoom(features, kernel, factor) + bias
    assert zoomed.dtype == jnp.float32
    np.testing.assert_allclose(zoomed, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("factor", "size"), [(2, 2), (2, 3), (3, 4), (4, 3)])
def test_equals_dilated_convolution_with_its_gradients(kind, factor, size):
    features, kernel, _ = map(jnp.float32, random_inputs(kind, size))
    weights = jnp.float32(np.random.default_rng(1).normal(size=(20, 20, 3)))

    def loss(zoom, features, kernel):
        zoomed = zoom(features, kernel)
        _, h, w, c = zoomed.shape
        return (weights[:h, :w, :c] * jnp.sin(zoomed)).sum()

    def fast(features, kernel):
        return jit_zoom(features, kernel, factor=factor)

    def slow(features, kernel):
        return dilated_zoom(features, kernel, factor)

    np.testing.assert_allclose(fast(features, kernel), slow(features, kernel), atol=1e-5)
    grads = [
        jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)(zoom, features, kernel)
        for zoom in (fast, slow)
    ]
    for got, expected in zip(*grads, strict=True):
        assert jnp.abs(expected).max() > 0.1
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_equals_flax_conv_transpose():
    features, kernel, bias = map(jnp.float32, random_inputs("full", 3, shape=(2, 5, 7, 3), out=4))
    module = nn.ConvTranspose(4, (3, 3), strides=(2, 2), padding=((1, 2), (1, 2)))
    expected = jnp.asarray(module.apply({"params": {"kernel": kernel, "bias": bias}}, features))
    np.testing.assert_allclose(jit_zoom(features, kernel, bias), expected, atol=1e-5)


def test_one_channel_to_many_is_full():
    features, kernel, _ = random_inputs("full", 3, shape=(1, 4, 3, 1), out=5)
    zoomed = jit_zoom(jnp.float32(features), jnp.float32(kernel))
    np.testing.assert_allclose(zoomed, slow_zoom(features, kernel, 2), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_its_type_and_its_kernel_gradient(kind):
    # All ones: the gradient of the middle tap counts the pixels, 8 * 16 * 16 = 2048, where a sum
    # kept in bfloat16 stops at 256.
    features = jnp.ones((8, 16, 16, 2), jnp.bfloat16)
    _, kernel, _ = random_inputs(kind, 3, shape=features.shape)
    kernel = jnp.asarray(kernel, jnp.bfloat16)
    zoomed = jit_zoom(features, kernel)
    assert zoomed.dtype == jnp.bfloat16
    expected = slow_zoom(np.float64(features), np.float64(kernel), 2)
    np.testing.assert_allclose(np.float64(zoomed), expected, rtol=0.02, atol=0.02)
    _, pull = jax.vjp(lambda k: jit_zoom(features, k), kernel)
    (grad,) = pull(jnp.ones_like(zoomed))
    np.testing.assert_allclose(np.float64(grad[1, 1]), 2048.0)


def test_jit_equals_eager():
    features, kernel, bias = map(jnp.float32, random_inputs("depthwise", 4))
    eager = zoom_conv(features, kernel, bias, factor=3)
    jitted = jit_zoom(features, kernel, bias, factor=3)
    np.testing.assert_allclose(jitted, eager, rtol=1e-6, atol=1e-6)


def test_bilinear_kernel_of_the_paper_note():
    np.testing.assert_array_equal(bilinear_kernel(2, 3), np.outer([0.5, 1, 0.5], [0.5, 1, 0.5]))


@pytest.mark.parametrize(("factor", "size"), [(1, 1), (2, 3), (2, 4), (3, 5), (3, 8)])
def test_bilinear_kernel_interpolates(factor, size):
    features = np.random.default_rng(2).normal(size=(2, 5, 4, 3))
    kernel = jnp.tile(bilinear_kernel(factor, size)[:, :, None, None], (1, 1, 1, 3))
    zoomed = jit_zoom(jnp.float32(features), kernel, factor=factor)

    expected = features
    for axis in (1, 2):  # separable; beyond the last pixel the map counts as zero
        line = np.moveaxis(expected, axis, 0)
        line = np.concatenate([line, np.zeros_like(line[:1])])
        positions = np.arange(factor * (len(line) - 1)) / factor
        left = positions.astype(int)
        share = (positions - left).reshape(-1, 1, 1, 1)
        expected = np.moveaxis(line[left] * (1 - share) + line[left + 1] * share, 0, axis)
    np.testing.assert_allclose(zoomed, expected, atol=1e-5)
    np.testing.assert_array_equal(zoomed[:, ::factor, ::factor], jnp.float32(features))


def test_bilinear_kernel_too_small():
    with pytest.raises(ValueError, match="needs size >= 5, got 4"):
        bilinear_kernel(3, 4)


@pytest.mark.parametrize(
    ("features", "kernel", "bias", "factor", "message"),
    [
        ((2, 4, 4, 3), (3, 3, 2, 3), None, 2, r"depthwise\) or \[kh, kw, 3, c'\]"),
        ((2, 4, 4, 3), (3, 3, 1, 6), None, 2, r"depthwise\) or \[kh, kw, 3, c'\]"),
        ((4, 4, 3), (3, 3, 1, 3), None, 2, r"features \[n, h, w, c\]"),
        ((2, 4, 4, 3), (3, 3), None, 2, r"kernel \[kh, kw"),
        ((2, 4, 4, 3), (0, 3, 1, 3), None, 2, "at least one tap"),
        ((2, 4, 4, 3), (3, 3, 1, 3), (1,), 2, r"expected \(3,\)"),
        ((2, 4, 4, 3), (3, 3, 1, 3), None, 0, "factor is 0"),
        ((2, 4, 4, 3), (3, 3, 1, 3), None, 1.5, "factor is 1.5"),
    ],
)
def test_bad_input(features, kernel, bias, factor, message):
    bias = None if bias is None else jnp.zeros(bias)
    with pytest.raises(ValueError, match=message):
        zoom_conv(jnp.zeros(features), jnp.zeros(kernel), bias, factor=factor)

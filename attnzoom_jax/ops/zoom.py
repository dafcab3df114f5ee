"""The zoom of AttZoom: zero insertion, then a convolution, without ever touching the zeros.

With factor s, an input x of h pixels, a kernel W of K taps and P = (K - 1) // 2 (one axis shown):

    up[s i] = x[i], all other up[o] = 0                   o in [0, s h)
    out[o]  = sum_k W[k] up[o + k - P]                    SAME convolution, up = 0 outside

Only taps that meet a multiple of s count. Output o = s i + p (phase p in [0, s)) meets x[i + d]
with tap k = s d + P - p, so every phase is a small convolution of x itself (polyphase form):

    out[s i + p] = sum_d W[s d + P - p] x[i + d]

An even kernel has no middle: it reaches (K - 1) // 2 pixels back and K // 2 ahead, the alignment
of "SAME" in XLA. The result is s h pixels long, whatever K.

Source: AttZoom (arXiv 2508.03625), zoom module, equations of the zero insertion and of W_E.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def zoom_conv(
    features: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, factor: int = 2
) -> jax.Array:
    """Zero insertion by `factor`, then a SAME convolution, as a polyphase sum.

    Args:
        features: [n, h, w, c].
        kernel: [kh, kw, 1, c] (depthwise) or [kh, kw, c, c'] (full), any size from 1, even too.
        bias: [c'] or None, added to every output pixel.
        factor: pixels out per pixel in along each axis, at least 1.

    Returns:
        [n, factor * h, factor * w, c'], in the type that features and kernel promote to.

    Raises:
        ValueError: shapes that do not fit each other, or a factor below 1.

    Source: AttZoom (arXiv 2508.03625), zoom module.
    """
    _check_whole(factor, "factor")
    if features.ndim != 4 or kernel.ndim != 4 or 0 in kernel.shape[:2]:
        raise ValueError(
            "zoom_conv takes features [n, h, w, c] and a kernel [kh, kw, 1 or c, c'] of at least "
            f"one tap; got {features.shape} and {kernel.shape}. Add the missing axes."
        )
    c = features.shape[-1]
    depthwise = kernel.shape[2:] == (1, c)
    if not depthwise and kernel.shape[2] != c:
        raise ValueError(
            f"kernel {kernel.shape} does not fit features of {c} channels: try [kh, kw, 1, {c}] "
            f"(depthwise) or [kh, kw, {c}, c'] (full)."
        )
    if bias is not None and bias.shape != kernel.shape[3:]:
        raise ValueError(f"bias has shape {bias.shape}, expected {kernel.shape[3:]}.")
    zoomed = linear_zoom(features, kernel, factor=factor)
    return zoomed if bias is None else zoomed + bias.astype(zoomed.dtype)


@functools.partial(jax.jit, static_argnames="factor")
def linear_zoom(features: jax.Array, kernel: jax.Array, *, factor: int) -> jax.Array:
    """The part of `zoom_conv` that is linear, one call whatever it is made of.

    Attribution knows the call by its name, and treats it as the convolution that it is.

    Args:
        features: [n, h, w, c].
        kernel: [kh, kw, 1 or c, c'].
        factor: at least 1.

    Returns:
        [n, factor * h, factor * w, c'].
    """
    c = features.shape[-1]
    depthwise = kernel.shape[2:] == (1, c)
    dtype = jnp.result_type(features, kernel)
    kernel, zero = kernel.astype(dtype), jnp.zeros((), dtype)
    _, h, w, _ = features.shape
    edges_y, phases_y = _phases(kernel.shape[0], factor)
    edges_x, phases_x = _phases(kernel.shape[1], factor)
    padded = jnp.pad(features.astype(dtype), ((0, 0), edges_y, edges_x, (0, 0)))
    convolve = _depthwise if depthwise else _full
    zoomed = zero
    for p, first_y, y in phases_y:
        for q, first_x, x in phases_x:
            taps = kernel[first_y::factor, first_x::factor]
            seen = padded[:, y : y + h + taps.shape[0] - 1, x : x + w + taps.shape[1] - 1]
            # Spread with zeros between and added: XLA fuses this, where interleaving would copy.
            rows, columns = (p, factor - 1 - p, factor - 1), (q, factor - 1 - q, factor - 1)
            phase = convolve(seen, taps)  # [n, h, w, c']
            zoomed += lax.pad(phase, zero, ((0, 0, 0), rows, columns, (0, 0, 0)))
    return zoomed


def bilinear_kernel(factor: int, size: int) -> jax.Array:
    """Kernel with which `zoom_conv` interpolates bilinearly.

    Outer product of the triangle max(0, 1 - |k - P| / factor), P = (size - 1) // 2, with itself:
    [.5, 1, .5] x [.5, 1, .5] for factor 2 and size 3. Output pixel factor * i is input pixel i;
    beyond the last one the map counts as zero, so the last factor - 1 rows and columns fade.

    Args:
        factor: zoom factor, at least 1.
        size: taps per axis, at least 2 * factor - 1; further taps are zero.

    Returns:
        [size, size] float32.

    Raises:
        ValueError: a size that cannot hold the triangle.
    """
    _check_whole(factor, "factor")
    _check_whole(size, "size")
    if size < 2 * factor - 1:
        raise ValueError(
            f"a bilinear kernel for factor {factor} needs size >= {2 * factor - 1}, got {size}: "
            "try a larger kernel or another initialisation."
        )
    distance = jnp.abs(jnp.arange(size) - (size - 1) // 2)
    triangle = jnp.maximum(0.0, 1.0 - distance / factor).astype(jnp.float32)
    return jnp.outer(triangle, triangle)


def _phases(size: int, s: int) -> tuple[tuple[int, int], list[tuple[int, int, int]]]:
    """Padding (low, high) of one axis, and (p, k, i) of every phase that has taps.

    Output phase p is the correlation of the taps k, k + s, ... with the padded input from i on.
    """
    centre = (size - 1) // 2
    low, high = centre // s, (size - 1 + s - 1 - centre) // s
    first = [(p, (centre - p) % s) for p in range(s)]
    return (low, high), [(p, k, (k + p - centre) // s + low) for p, k in first if k < size]


def _depthwise(padded: jax.Array, taps: jax.Array) -> jax.Array:
    """Correlates every channel with its own taps, as a sum of shifted slices."""
    h, w = padded.shape[1] - taps.shape[0] + 1, padded.shape[2] - taps.shape[1] + 1
    # Sums run in float32 at least: in bfloat16 the kernel's gradient, a sum over every pixel of
    # the batch, would stop growing after a few hundred terms.
    wide = jnp.promote_types(padded.dtype, jnp.float32)
    terms = [
        padded[:, i : i + h, j : j + w].astype(wide) * taps[i, j, 0].astype(wide)
        for i in range(taps.shape[0])
        for j in range(taps.shape[1])
    ]
    return sum(terms[1:], terms[0]).astype(padded.dtype)


def _full(padded: jax.Array, taps: jax.Array) -> jax.Array:
    """The same with taps that mix the channels."""
    # Padded and cropped beforehand, since a phase may start past the first pixel: the gradient of
    # a convolution with negative padding reads beyond its array on the CPU (JAX 0.10.2).
    return lax.conv_general_dilated(
        padded, taps, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _check_whole(value: int, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1; try 2.")

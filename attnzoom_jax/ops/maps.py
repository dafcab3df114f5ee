"""Maps [n, h, w]: resize, normalise, take the positive part, find the peak, box what is high.

Images of different sizes share one canvas [n, h, w], each in its upper left corner; `sizes` [n, 2]
says how much of the canvas is image.

Attribution returns raw maps; whoever shows or scores one calls these with a named mode. NaN is
never repaired: it stays in what `resize`, `normalize` and `positive` return, and `peak` points
at it.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops.maximum import first_max

RESIZE_METHODS = ("bilinear", "nearest")
NORMALIZE_MODES = ("none", "max", "min_max")
NORMALIZE_OVER = ("image", "batch")


def resize(maps: jax.Array, size: tuple[int, int], *, method: str = "bilinear") -> jax.Array:
    """Maps at another size; pixel centres lie at half pixels, borders repeat.

    Args:
        maps: [n, h, w].
        size: (height, width) of the result, in pixels.
        method: "bilinear" (no anti-aliasing when shrinking) or "nearest".

    Returns:
        float32 [n, height, width]. A NaN pixel spreads to the rows and columns that it touches.

    Raises:
        ValueError: unknown method, or a size below 1.
    """
    chex.assert_rank(maps, 3)
    if method not in RESIZE_METHODS:
        raise unknown_name("resize method", method, RESIZE_METHODS)
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size is {tuple(size)}; expected (height, width) of at least 1 pixel")
    shape = (maps.shape[0], height, width)
    maps = jnp.asarray(maps, jnp.float32)
    kernel = "linear" if method == "bilinear" else "nearest"
    return jax.image.resize(maps, shape, kernel, antialias=False)


def resize_each(
    maps: jax.Array, sizes: jax.Array | np.ndarray, canvas: tuple[int, int]
) -> jax.Array:
    """Maps at the sizes of their images, bilinear as `resize`, with 0 beyond.

    Equal values stay equal to the last bit, so that a constant stays one, and pixels at the same
    distance to both sides of a peak are equal: which one is the first maximum is not left to
    rounding.

    Args:
        maps: [n, h, w].
        sizes: int [n, 2], (height, width) of each image, from 1 to the canvas.
        canvas: (height, width) of the result, in pixels.

    Returns:
        float32 [n, height, width]. A NaN pixel spreads as in `resize`.

    Raises:
        ValueError: see `is_inside`.
    """
    chex.assert_rank(maps, 3)
    inside = is_inside(sizes, (len(maps), *canvas))
    resized = _resize_each(jnp.asarray(maps, jnp.float32), jnp.asarray(sizes, jnp.int32), canvas)
    return jnp.where(inside, resized, 0.0)


@functools.partial(jax.jit, static_argnums=2)
def _resize_each(maps: jax.Array, sizes: jax.Array, canvas: tuple[int, int]) -> jax.Array:
    """Maps at the sizes of their images, with their borders repeated beyond."""
    for axis, pixels in enumerate(canvas):
        length = maps.shape[1 + axis]
        size = sizes[:, axis, None]  # [n, 1]
        # Pixel i lies at (i + 0.5) length / size - 0.5, here times 2 size: whole numbers.
        place = (2 * jnp.arange(pixels, dtype=jnp.int32) + 1) * length - size  # [n, pixels]
        place = jnp.clip(place, 0, 2 * size * (length - 1))
        near = (place + size) // (2 * size)
        rest = place - near * 2 * size  # to the nearest, in [-size, size)
        shape = (-1, pixels, 1) if axis == 0 else (-1, 1, pixels)
        value, other = (
            jnp.take_along_axis(maps, index.reshape(shape), axis=1 + axis)
            for index in (near, near + jnp.sign(rest))
        )
        weight = (jnp.abs(rest) / (2 * size)).reshape(shape)  # in [0, 1/2]
        maps = value + (other - value) * weight
    return maps


def is_inside(sizes: jax.Array | np.ndarray | None, shape: tuple[int, ...]) -> jax.Array:
    """Which pixels of a canvas belong to the image.

    Args:
        sizes: int [n, 2], (height, width) of each image; None where all fill the canvas.
        shape: of the canvas, (n, height, width).

    Returns:
        bool [n, height, width].

    Raises:
        ValueError: another shape of sizes, and, where they are known, a size below 1 or above
            the canvas.
    """
    n, height, width = shape
    if sizes is None:
        return jnp.ones(shape, bool)
    if sizes.shape != (n, 2):
        raise ValueError(f"sizes have shape {sizes.shape}; expected ({n}, 2), one for each map")
    if not isinstance(sizes, Tracer):
        wrong = ((np.asarray(sizes) < 1) | (np.asarray(sizes) > (height, width))).any(axis=1)
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"size {i} is {np.asarray(sizes)[i].tolist()}; expected (height, width) from 1 to "
                f"the canvas of {height} x {width} pixels"
            )
    sizes = jnp.asarray(sizes)
    rows = jnp.arange(height) < sizes[:, :1]  # [n, height]
    columns = jnp.arange(width) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def normalize(maps: jax.Array, mode: str = "none", *, over: str = "image") -> jax.Array:
    """Maps scaled to a common range.

    Args:
        maps: [n, h, w], any sign.
        mode: "none" leaves the values; "max" divides by the largest absolute value, so zero and
            the signs stay, range [-1, 1]; "min_max" maps the smallest value to 0, the largest to 1.
        over: "image" takes the extremes of each map, "batch" those of all maps together.

    Returns:
        float32 [n, h, w]. Without contrast nothing is divided by zero: an all-zero map under
        "max" and a constant one under "min_max" become zeros. A map that holds NaN is NaN
        throughout (with over="batch", all maps are); "none" keeps it where it is.

    Raises:
        ValueError: unknown mode or `over`.
    """
    chex.assert_rank(maps, 3)
    if mode not in NORMALIZE_MODES:
        raise unknown_name("normalisation mode", mode, NORMALIZE_MODES)
    if over not in NORMALIZE_OVER:
        raise unknown_name("normalisation over", over, NORMALIZE_OVER)
    maps = jnp.asarray(maps, jnp.float32)
    if mode == "none":
        return maps
    axes = (1, 2) if over == "image" else (0, 1, 2)
    if mode == "min_max":
        maps = maps + first_max(-maps, axis=axes, keepdims=True)
    top = first_max(jnp.abs(maps), axis=axes, keepdims=True)
    flat = top == 0
    return jnp.where(flat, 0.0, maps / jnp.where(flat, 1.0, top))


def positive(maps: jax.Array) -> jax.Array:
    """The positive part, max(map, 0): the final ReLU of CAMs and of contrastive maps.

    Args:
        maps: [n, h, w], signed.

    Returns:
        float32 [n, h, w]; NaN stays NaN.
    """
    return jax.nn.relu(jnp.asarray(maps, jnp.float32))


def peak(maps: jax.Array) -> jax.Array:
    """The pixel of the largest value, the first one in row-major order when several tie.

    Args:
        maps: [n, h, w].

    Returns:
        int32 [n, 2], (y, x) in pixels of the map. The first NaN where a map holds one; (0, 0)
        for a constant map.
    """
    chex.assert_rank(maps, 3)
    n, h, w = maps.shape
    first = jnp.argmax(maps.reshape(n, h * w), axis=1)  # [n]
    return jnp.stack([first // w, first % w], axis=1).astype(jnp.int32)


def threshold_box(maps: jax.Array, threshold: float) -> jax.Array:
    """The smallest box around all pixels that reach a share of the map's maximum.

    Args:
        maps: [n, h, w].
        threshold: share of the maximum in [0, 1]; a pixel counts if value >= threshold * maximum.

    Returns:
        int32 [n, 4], [y0, x0, y1, x1] half-open, in pixels of the map. The whole image where no
        pixel is positive, and where a map holds NaN. Separate blobs share one box.

    Raises:
        ValueError: `threshold` outside [0, 1].

    Source: Zhou et al. 2016 (arXiv 1512.04150), boxes from maps, without their choice of
    the largest connected component.
    """
    chex.assert_rank(maps, 3)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a share of the maximum in [0, 1]")
    maps = jnp.asarray(maps, jnp.float32)
    top = first_max(maps, axis=(1, 2), keepdims=True)  # [n, 1, 1]
    high = (maps >= threshold * top) | ~(top > 0)  # [n, h, w]
    y0, y1 = _extent(high.any(axis=2))
    x0, x1 = _extent(high.any(axis=1))
    return jnp.stack([y0, x0, y1, x1], axis=1).astype(jnp.int32)


def _extent(hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First true position of each row of [n, m], and one past the last."""
    return hit.argmax(axis=1), hit.shape[1] - hit[:, ::-1].argmax(axis=1)

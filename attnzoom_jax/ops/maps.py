"""Maps [n, h, w]: resize, normalise, take the positive part, find the peak, box what is high.

Attribution returns raw maps; whoever shows or scores one calls these with a named mode. NaN is
never repaired: it stays in what `resize`, `normalize` and `positive` return, and `peak` points
at it.
"""

import chex
import jax
import jax.numpy as jnp

from attnzoom_jax.errors import unknown_name

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
        maps = maps - maps.min(axis=axes, keepdims=True)
    top = jnp.abs(maps).max(axis=axes, keepdims=True)  # NaN if there is one
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
    top = maps.max(axis=(1, 2), keepdims=True)  # [n, 1, 1]
    high = (maps >= threshold * top) | ~(top > 0)  # [n, h, w]
    y0, y1 = _extent(high.any(axis=2))
    x0, x1 = _extent(high.any(axis=1))
    return jnp.stack([y0, x0, y1, x1], axis=1).astype(jnp.int32)


def _extent(hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First true position of each row of [n, m], and one past the last."""
    return hit.argmax(axis=1), hit.shape[1] - hit[:, ::-1].argmax(axis=1)

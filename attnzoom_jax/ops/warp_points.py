"""Points, boxes and maps that move with a warp, in both directions.

A grid (see `warp`) says where in the input an output pixel lies: that is the way back, and reading
it between its pixels is `unwarp_points`. The way forward, from input to output, is its inverse.
Coordinates are (y, x) in pixels, centres of pixels at whole numbers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from attnzoom_jax.ops.warp import Grid, Size, check_grid, dense_grid, neighbours


def unwarp_points(points: jax.Array, grid: Grid) -> jax.Array:
    """From output to input: where points of the warped picture come from.

    Args:
        points: [n, p, 2], (y, x) in pixels of the output.
        grid: dense or separable, at least 2 x 2.

    Returns:
        [n, p, 2], (y, x) in pixels of the input. Beyond the output the grid goes on evenly.

    Raises:
        ValueError: what is no grid, or one of fewer than 2 rows or columns.
    """
    _check_invertible(grid)
    if isinstance(grid, tuple):
        return jnp.stack([_read_axis(c, points[..., i]) for i, c in enumerate(grid)], axis=-1)
    return jax.vmap(lambda g, q: _surface(g, q)[0])(grid, points)


def warp_points(points: jax.Array, grid: Grid) -> jax.Array:
    """From input to output: where points go when the picture is warped.

    A dense grid is inverted by Newton's method, led there from the grid's mean slope in small
    steps. In grids that do not fold, such as `saliency_grid`'s, that found every place to 1e-4
    pixels, up to magnifications of a thousand.

    Args:
        points: [n, p, 2], (y, x) in pixels of the input.
        grid: dense or separable, at least 2 x 2, rising along its axes.

    Returns:
        [n, p, 2], (y, x) in pixels of the output. What the output does not show lies outside of
        it: there the grid goes on evenly, a dense one with its mean slope, a separable one with
        that of its border.
    """
    _check_invertible(grid)
    if isinstance(grid, tuple):
        return jnp.stack([_invert_axis(c, points[..., i]) for i, c in enumerate(grid)], axis=-1)
    return jax.vmap(_newton)(grid, points)


def warp_boxes(boxes: jax.Array, grid: Grid) -> jax.Array:
    """The smallest upright boxes around what becomes of boxes when the picture is warped.

    Args:
        boxes: [n, p, 4], [y0, x0, y1, x1] half-open, in pixels of the input.
        grid: dense or separable, at least 2 x 2, rising along its axes.

    Returns:
        float [n, p, 4], half-open, in pixels of the output, not rounded and not clipped to it.
        Taken from 9 x 9 points of each box.
    """
    t = jnp.linspace(0.0, 1.0, 9)
    n, p, _ = boxes.shape
    low, high = boxes[..., None, :2], boxes[..., None, 2:]  # [n, p, 1, 2]
    edges = low - 0.5 + t[:, None] * (high - low)  # [n, p, 9, 2]; half-open: edges of pixels
    y, x = jnp.broadcast_arrays(edges[..., :, None, 0], edges[..., None, :, 1])
    lattice = jnp.stack([y, x], axis=-1).reshape(n, p * t.size**2, 2)
    moved = warp_points(lattice, grid).reshape(n, p, t.size**2, 2) + 0.5
    return jnp.concatenate([moved.min(axis=2), moved.max(axis=2)], axis=-1)


def invert(grid: Grid, image_size: Size) -> Grid:
    """The grid that undoes a warp: where each pixel of the input went.

    `sample(warped, invert(grid, image_size))` lays a warped picture, or a map of it, back over the
    original.

    Args:
        grid: dense or separable, at least 2 x 2, rising along its axes.
        image_size: (h, w) of the input.

    Returns:
        Dense [n, h, w, 2] or separable (y [n, h], x [n, w]), as `grid` is, in pixels of the output.
    """
    _check_invertible(grid)
    lines = [jnp.arange(m, dtype=jnp.float32) for m in image_size]
    if isinstance(grid, tuple):
        n = grid[0].shape[0]
        y, x = (
            _invert_axis(c, jnp.broadcast_to(line, (n, line.size)))
            for c, line in zip(grid, lines, strict=True)
        )
        return y, x
    pixels = jnp.stack(jnp.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)  # [hw, 2]
    moved = jax.vmap(_newton, in_axes=(0, None))(grid, pixels)
    return moved.reshape(grid.shape[0], *image_size, 2)


def _surface(grid: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A grid [height, width, 2] at points [p, 2], and its slopes along y and x, [p, 2] each."""
    inside = jnp.clip(points, 0, jnp.asarray(grid.shape[:2], points.dtype) - 1)
    top, bottom, down = neighbours(inside[:, 0], grid.shape[0])
    left, right, across = neighbours(inside[:, 1], grid.shape[1])
    down, across = down[:, None], across[:, None]
    a, b, c, d = grid[top, left], grid[top, right], grid[bottom, left], grid[bottom, right]
    value = (a * (1 - across) + b * across) * (1 - down) + (c * (1 - across) + d * across) * down
    along_y = (c - a) * (1 - across) + (d - b) * across
    along_x = (b - a) * (1 - down) + (d - c) * down
    # Beyond the border the mean slope: that of the border may be nearly 0.
    beyond, mean = points - inside, _mean_slopes(grid)
    along_y = jnp.where(beyond[:, :1] == 0, along_y, mean * jnp.array([1, 0]))
    along_x = jnp.where(beyond[:, 1:] == 0, along_x, mean * jnp.array([0, 1]))
    return value + beyond * mean, along_y, along_x


def _mean_slopes(grid: jax.Array) -> jax.Array:
    """Of y along y, and of x along x, over a whole grid [height, width, 2]."""
    height, width, _ = grid.shape
    y, x = (grid[-1, :, 0] - grid[0, :, 0]).mean(), (grid[:, -1, 1] - grid[:, 0, 1]).mean()
    return jnp.stack([y / (height - 1), x / (width - 1)])


def _newton(grid: jax.Array, points: jax.Array) -> jax.Array:
    """Where a grid [height, width, 2] takes the values [p, 2]."""
    middle, mean = (jnp.asarray(grid.shape[:2]) - 1) / 2, grid.mean(axis=(0, 1))
    slopes = _mean_slopes(grid)
    slow, steps, longest = 16, 28, max(grid.shape[:2]) / 16

    def step(k: jax.Array, q: jax.Array) -> jax.Array:
        # From the mean slope (t = 0), which is solved at once, to the grid itself (t = 1).
        t = jnp.minimum((k + 1) / slow, 1.0)
        value, along_y, along_x = _surface(grid, q)
        error = (1 - t) * (mean + slopes * (q - middle)) + t * value - points
        yy, xy = (1 - t) * slopes[0] + t * along_y[:, 0], t * along_y[:, 1]
        yx, xx = t * along_x[:, 0], (1 - t) * slopes[1] + t * along_x[:, 1]
        area = yy * xx - yx * xy
        area = jnp.where(jnp.abs(area) < 1e-6, 1e-6, area)
        y = (xx * error[:, 0] - yx * error[:, 1]) / area
        x = (yy * error[:, 1] - xy * error[:, 0]) / area
        length = jnp.maximum(jnp.abs(y), jnp.abs(x))
        shorter = longest / jnp.maximum(length, longest)
        return q - shorter[:, None] * jnp.stack([y, x], axis=-1)

    start = middle + (points - mean) / slopes
    return lax.fori_loop(0, steps, step, start.astype(grid.dtype))


def _read_axis(coordinates: jax.Array, places: jax.Array) -> jax.Array:
    """Coordinates [n, size] at places [n, p] between their pixels, and evenly beyond them."""
    return jax.vmap(_line, in_axes=(0, None, 0))(places, _pixels(coordinates), coordinates)


def _invert_axis(coordinates: jax.Array, values: jax.Array) -> jax.Array:
    """Where rising coordinates [n, size], read in that way, take the values [n, p]."""
    return jax.vmap(_line, in_axes=(0, 0, None))(values, coordinates, _pixels(coordinates))


def _pixels(coordinates: jax.Array) -> jax.Array:
    return jnp.arange(coordinates.shape[1], dtype=coordinates.dtype)


_line: Callable[..., jax.Array] = functools.partial(
    jnp.interp, left="extrapolate", right="extrapolate"
)


def _check_invertible(grid: Grid) -> None:
    check_grid(grid)
    _, height, width, _ = jax.eval_shape(dense_grid, grid).shape
    if min(height, width) < 2:
        raise ValueError(
            f"a grid of {height} x {width} pixels has no slope to follow; expected at least 2 x 2"
        )

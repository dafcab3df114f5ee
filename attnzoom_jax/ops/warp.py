"""Warps: where the pixels of a picture are taken from, and taking them from there.

A grid says for every pixel of the output where in the input it lies: (y, x) in pixels, centres of
pixels at whole numbers, so that a picture of h x w pixels covers [-0.5, h - 0.5] x [-0.5, w - 0.5].
There are two forms, and `sample` takes both:

    dense        [n, height, width, 2]
    separable    (y [n, height], x [n, width]): rows and columns stay straight

Saliency lives on cells [n, a, b] that divide the picture evenly; cell i, counted from 0, has its
centre at i in units of cells, which is (i + 0.5) h / a - 0.5 in pixels.

Saliency sampler (Recasens et al. 2018, arXiv 1809.03355, eq. 2 and 3), for the output place o in
cells, with a Gaussian k, over all cells j; beyond the border S repeats and j counts on:

    u(o) = sum_j S(j) k(j - o) j / sum_j S(j) k(j - o)
         = o + sum_j (S(j) - s) k(j - o) (j - o) / sum_j S(j) k(j - o)       for any constant s

since k(d) d sums to 0. With s = min S, a uniform S gives the identity to the last bit. k(d) is a
product of one factor per axis, so that each sum is S between two small constant matrices. du/do is
the covariance of the cells under S k over the variance of k: positive definite, so nothing folds.

Inverse distribution (TASN, Zheng et al. 2019, arXiv 1903.06150, attention-based sampler), per axis:
the marginal m of the attention is the density of output pixels along the axis, and output o lies
where its distribution function reaches (o + 0.5) / height. Here, other than in the paper, it is
differentiable in m, and the largest density is bounded by mixing with the uniform one.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops.maps import resize
from attnzoom_jax.ops.maximum import first_max

IMPLS = ("auto", "matmul", "gather", "loop")
MARGINALS = ("max", "sum")
WEIGHTINGS = ("softmax", "power")

Size = tuple[int, int]
Grid = jax.Array | tuple[jax.Array, jax.Array]


def to_saliency(
    maps: jax.Array,
    size: Size,
    *,
    weighting: str = "softmax",
    temperature: float = 1.0,
    floor: float = 0.0,
) -> jax.Array:
    """Any map as saliency: resized to cells, tempered, floored, summing to 1.

    With the largest value of an image as 1, a place weighs

        softmax    exp((a - max a) / temperature)           a of any sign
        power      (max(a, 0) / max a)^(1 / temperature)    negative values count as 0

    and then floor + (1 - floor) times that.

    Args:
        maps: [n, h, w]: a mask, logits, an attribution.
        size: (rows, columns) of cells.
        weighting: "softmax" or "power".
        temperature: above 0; a lower one sharpens.
        floor: share of the largest weight that every place has at least, in [0, 1]; 1 is uniform.

    Returns:
        float32 [n, rows, columns], at least 0, of sum 1 per image. Exactly uniform for a constant
        map, and under "power" for one without a positive value. A map that holds NaN is NaN.

    Raises:
        ValueError: unknown weighting, or a number out of range.
    """
    chex.assert_rank(maps, 3)
    if weighting not in WEIGHTINGS:
        raise unknown_name("weighting", weighting, WEIGHTINGS)
    _check("temperature", temperature, temperature > 0, "a number above 0; try 1.0")
    _check("floor", floor, 0 <= floor <= 1, "a share in [0, 1]; try 0.0")
    maps = jnp.asarray(maps, jnp.float32)
    # Resizing a constant rounds it, unless that constant is 0.
    lowest = lax.stop_gradient(maps.min(axis=(1, 2), keepdims=True))
    maps = resize(maps - lowest, size) + lowest
    if weighting == "softmax":
        weights = jnp.exp((maps - first_max(maps, axis=(1, 2), keepdims=True)) / temperature)
    else:
        top = first_max(maps, axis=(1, 2), keepdims=True)
        is_flat = top <= 0
        share = jnp.where(is_flat, 1.0, maps / jnp.where(is_flat, 1.0, top))
        # A power has no finite gradient at 0.
        is_off = share <= 0
        weights = jnp.where(is_off, 0.0, jnp.where(is_off, 1.0, share) ** (1 / temperature))
    weights = floor + (1 - floor) * weights
    return weights / weights.sum(axis=(1, 2), keepdims=True)


def saliency_grid(
    saliency: jax.Array,
    size: Size,
    *,
    image_size: Size | None = None,
    fwhm: float = 13.0,
    strength: float = 1.0,
) -> jax.Array:
    """The saliency sampler: every output pixel is drawn towards the saliency near it.

    Where the authors evaluate the sums at 31 x 31 cells and interpolate, this evaluates them at
    every output pixel.

    Args:
        saliency: [n, a, b], at least 0, of any scale.
        size: (height, width) of the output, in pixels.
        image_size: (h, w) of the picture to be sampled; None: as `size`.
        fwhm: full width at half maximum of the Gaussian, in cells, at least 2 (the paper: 13 of
            31). A wider one magnifies wider areas, and more of the border is cropped.
        strength: 1 is the paper's; 0 the identity; between them the shift is scaled.

    Returns:
        Dense grid, float32 [n, height, width, 2], not clipped to the picture. Exactly the identity
        (for another size, the plain resize) where saliency is uniform. Differentiable in saliency.

    Raises:
        ValueError: a size below 1, or a number out of range.
    """
    chex.assert_rank(saliency, 3)
    _check("fwhm", fwhm, 2 <= fwhm < math.inf, "at least 2 cells; try 13.0 with 31 x 31 cells")
    _check_strength(strength)
    image_size = _check_sizes(size, image_size)
    saliency = saliency.astype(_at_least_float32(saliency))
    (near_y, pull_y), (near_x, pull_x) = (
        [jnp.asarray(matrix, saliency.dtype) for matrix in _kernel_sums(cells, pixels, fwhm)]
        for cells, pixels in zip(saliency.shape[1:], size, strict=True)
    )

    def sum_of(s: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return jnp.einsum("ya,nab,xb->nyx", rows, s, columns, precision="highest")

    excess = saliency - lax.stop_gradient(saliency.min(axis=(1, 2), keepdims=True))
    mass = sum_of(saliency, near_y, near_x)
    mass = jnp.where(mass == 0, 1.0, mass)
    shift = jnp.stack([sum_of(excess, pull_y, near_x), sum_of(excess, near_y, pull_x)], axis=-1)
    pixels = jnp.asarray(image_size, shift.dtype) / jnp.asarray(saliency.shape[1:], shift.dtype)
    identity = [_resize_axis(*axis) for axis in zip(size, image_size, strict=True)]
    start = jnp.stack(jnp.meshgrid(*identity, indexing="ij"), axis=-1)  # [height, width, 2]
    return start + strength * pixels * shift / mass[..., None]


def separable_grid(
    attention: jax.Array,
    size: Size,
    *,
    image_size: Size | None = None,
    marginal: str = "max",
    strength: float = 1.0,
    max_zoom: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """TASN's sampler: attended rows and columns get more pixels, straight lines stay straight.

    Args:
        attention: [n, a, b], at least 0, of any scale.
        size: (height, width) of the output, in pixels.
        image_size: (h, w) of the picture to be sampled; None: as `size`.
        marginal: over the other axis, "max" (the paper's) or "sum".
        strength: share of the attention in the density, the rest is uniform; in [0, 1].
        max_zoom: no row or column is magnified by more, in proportion to a plain resize; above 1,
            None for no bound. Where one would be, `strength` is lowered (the paper clips, at 4, and
            spreads the rest).

    Returns:
        Separable grid, float32 (y [n, height], x [n, width]), rising. Exactly the identity (for
        another size, the plain resize) where attention is uniform. Differentiable in attention.

    Raises:
        ValueError: unknown marginal, a size below 1, or a number out of range.
    """
    chex.assert_rank(attention, 3)
    if marginal not in MARGINALS:
        raise unknown_name("marginal", marginal, MARGINALS)
    _check_strength(strength)
    is_bound = max_zoom is None or max_zoom > 1
    _check("max_zoom", max_zoom, is_bound, "a number above 1, or None; try 4.0")
    image_size = _check_sizes(size, image_size)
    attention = attention.astype(_at_least_float32(attention))
    reduce = first_max if marginal == "max" else jnp.sum
    y, x = (
        _inverse_distribution(reduce(attention, axis=other), pixels, length, strength, max_zoom)
        for other, pixels, length in zip((2, 1), size, image_size, strict=True)
    )
    return y, x


def dense_grid(grid: Grid) -> jax.Array:
    """A grid of either form as [n, height, width, 2]."""
    if not isinstance(grid, tuple):
        return grid
    y, x = grid
    return jnp.stack(jnp.broadcast_arrays(y[:, :, None], x[:, None, :]), axis=-1)


def sample(images: jax.Array, grid: Grid, *, impl: str = "auto") -> jax.Array:
    """The picture at the places that a grid names, bilinear, borders repeated.

    Differentiable in images and grid. At whole coordinates the gradient by the grid is the
    difference to the next pixel, at the last one that to the pixel before; beyond the border it
    is 0.

    Args:
        images: [n, h, w, c], pictures or features.
        grid: dense [n, height, width, 2] or separable (y [n, height], x [n, width]), in pixels;
            float32 whatever the images are: bfloat16 cannot tell pixels apart from 256 on.
        impl: how, not what. "gather" takes the four neighbours of all pixels at once; "loop" does
            so image by image, which suits the caches of a CPU; "matmul" multiplies a separable
            grid's rows and columns with matrices of two weights per row. "auto": "loop" on a CPU,
            elsewhere "matmul" for separable and "gather" for dense grids. On a CPU, by
            results/bench/warp.json, training is faster otherwise for separable grids on three
            channels alone ("matmul"), inference with "gather".

    Returns:
        [n, height, width, c] in the type of the images, float32 for integers; sums run in float32
        at least. NaN where the grid is NaN.

    Raises:
        ValueError: unknown `impl`, shapes that do not fit, or "matmul" with a dense grid.
    """
    check_grid(grid)
    n = grid[0].shape[0] if isinstance(grid, tuple) else grid.shape[0]
    if images.ndim != 4 or images.shape[0] != n:
        raise ValueError(
            f"sample takes images [n, h, w, c] and a grid of as many images; got images "
            f"{images.shape} and a grid of n = {n}; add or repeat the batch axis"
        )
    if impl not in IMPLS:
        raise unknown_name("impl of sample", impl, IMPLS)
    if impl == "matmul" and not isinstance(grid, tuple):
        raise ValueError("impl 'matmul' needs a separable grid (y, x), got a dense one; try 'auto'")
    if impl == "auto" and jax.default_backend() == "cpu":
        impl = "loop"
    elif impl == "auto":
        impl = "matmul" if isinstance(grid, tuple) else "gather"
    return resample(images, grid, impl=impl)


@functools.partial(jax.jit, static_argnames="impl")
def resample(images: jax.Array, grid: Grid, *, impl: str) -> jax.Array:
    """`sample` without its checks, one call whatever it is made of.

    Attribution knows the call by its name, and hands relevance to the images by its transpose.

    Args:
        images: [n, h, w, c].
        grid: dense or separable.
        impl: "matmul", "gather" or "loop".

    Returns:
        [n, height, width, c].
    """
    pixels = images.astype(_at_least_float32(images))
    grid = jax.tree.map(lambda axis: axis.astype(_at_least_float32(axis)), grid)
    if impl == "matmul":
        y, x = (_interpolation(c, m) for c, m in zip(grid, images.shape[1:3], strict=True))
        rows = jnp.einsum("nYy,nyxc->nYxc", y, pixels, precision="highest")
        taken = jnp.einsum("nXx,nYxc->nYXc", x, rows, precision="highest")
    # Recomputing the neighbours is cheaper than keeping four more pictures for the gradient.
    elif impl == "gather":
        taken = jax.vmap(jax.checkpoint(_take))(pixels, dense_grid(grid))
    else:
        one = jax.checkpoint(lambda pair: _take(*pair), prevent_cse=False)
        taken = lax.map(one, (pixels, dense_grid(grid)))
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    return taken.astype(images.dtype) if is_float else taken


def neighbours(coordinates: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pixels before and after each coordinate, and the second one's weight.

    Args:
        coordinates: any shape, in pixels.
        length: of the axis, in pixels.

    Returns:
        int32 before and after, in [0, length - 1], and the weight in [0, 1], each of the shape of
        the coordinates. Beyond the border the last pixel has all the weight.
    """
    is_inside = (coordinates >= 0) & (coordinates <= length - 1)
    # Not a clip alone, which at the border itself, where the identity has pixels, halves the
    # gradient.
    clipped = jnp.clip(lax.stop_gradient(coordinates), 0, length - 1)
    inside = jnp.where(is_inside, coordinates, clipped)
    # The second bound is for NaN, which is no whole number.
    before = jnp.clip(jnp.floor(inside).astype(jnp.int32), 0, max(length - 2, 0))
    return before, jnp.minimum(before + 1, length - 1), inside - before


def check_grid(grid: Grid) -> None:
    """Raise a ValueError for what has the shape of neither a dense nor a separable grid."""
    if isinstance(grid, tuple):
        shapes = [axis.shape for axis in grid]
        is_right = [len(shape) for shape in shapes] == [2, 2]
    else:
        shapes = grid.shape
        is_right = len(shapes) == 4 and shapes[-1] == 2
    if not is_right:
        raise ValueError(
            "a grid is dense [n, height, width, 2] or separable ([n, height], [n, width]); got "
            f"{shapes}"
        )


def _resize_axis(size: int, length: int) -> jax.Array:
    """Where `size` pixels lie on a line of `length` in a plain resize: the identity if equal."""
    return jnp.asarray((np.arange(size) + 0.5) * length / size - 0.5, jnp.float32)


def _kernel_sums(cells: int, size: int, fwhm: float) -> tuple[np.ndarray, np.ndarray]:
    """The sums of k and of k(d) d along one axis, as matrices [size, cells] on the saliency."""
    reach = math.ceil(3 * fwhm)
    j = np.arange(-reach, cells + reach)
    distance = j - ((np.arange(size)[:, None] + 0.5) * cells / size - 0.5)
    kernel = np.exp(-4 * math.log(2) * (distance / fwhm) ** 2)
    # Beyond the border the saliency of the last cell counts.
    owner = np.eye(cells)[np.clip(j, 0, cells - 1)]  # [j, cells]
    return kernel @ owner, (kernel * distance) @ owner


def _inverse_distribution(
    weights: jax.Array, size: int, length: int, strength: float, max_zoom: float | None
) -> jax.Array:
    """Where a distribution over cells [n, cells] reaches (o + 0.5) / size, in pixels [n, size]."""
    cells = weights.shape[1]
    total = weights.sum(axis=1, keepdims=True)
    excess = weights - lax.stop_gradient(weights.min(axis=1, keepdims=True))
    excess -= excess.mean(axis=1, keepdims=True)
    # Density 1 + d per cell, d = 0 to the last bit where all weights are equal.
    d = cells * excess / jnp.where(total == 0, 1.0, total)
    share = jnp.asarray(strength, d.dtype)
    if max_zoom is not None:
        peak = first_max(d, axis=1, keepdims=True)
        share = jnp.minimum(share, (max_zoom - 1) / jnp.where(peak > 0, peak, 1.0))
    d *= share
    # Cell i begins where the distribution, in cells, is i + before[i].
    before = jnp.cumsum(d, axis=1) - d
    o = jnp.asarray((np.arange(size) + 0.5) * cells / size, d.dtype)
    begins = jnp.arange(1, cells) + before[:, 1:]
    i = (begins[:, None, :] <= o[:, None]).sum(axis=2)  # [n, size]
    slope, before = (jnp.take_along_axis(values, i, axis=1) for values in (d, before))
    # i + (o - i - before) / (1 + slope), written as a shift of o. No pixel lies in a cell of
    # density 0 but by rounding.
    shift = ((i - o) * slope - before) / jnp.maximum(1 + slope, 1e-4)
    return _resize_axis(size, length) + shift * (length / cells)


def _take(image: jax.Array, grid: jax.Array) -> jax.Array:
    """Bilinear interpolation of an image [h, w, c] at [height, width, 2]."""
    h, w, c = image.shape
    top, bottom, down = neighbours(grid[..., 0], h)
    left, right, across = neighbours(grid[..., 1], w)
    pixels = image.reshape(h * w, c)
    # A weight is spread over the channels by a product with ones: its transpose, a sum over the
    # channels, then is a matrix product too, on a CPU twice as fast as a reduction.
    ones = jnp.ones((1, c), image.dtype)
    taken = jnp.zeros((grid[..., 0].size, c), image.dtype)
    for y, weight_y in ((top, 1 - down), (bottom, down)):
        for x, weight_x in ((left, 1 - across), (right, across)):
            neighbour = pixels.at[(y * w + x).ravel()].get(mode="promise_in_bounds")
            weight = (weight_y * weight_x).reshape(-1, 1).astype(image.dtype)
            taken += neighbour * jnp.dot(weight, ones, precision="highest")
    return taken.reshape(*grid.shape[:2], c)


def _interpolation(coordinates: jax.Array, length: int) -> jax.Array:
    """The same along one axis as matrices: [n, size] -> [n, size, length], two weights a row."""
    before, after, share = (part[..., None] for part in neighbours(coordinates, length))
    place = jnp.arange(length)
    return jnp.where(place == before, 1 - share, 0) + jnp.where(place == after, share, 0)


def _at_least_float32(values: jax.Array) -> jnp.dtype:
    return jnp.promote_types(values.dtype, jnp.float32)


def _check(name: str, value: object, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _check_strength(strength: float) -> None:
    _check("strength", strength, 0 <= strength <= 1, "a share in [0, 1]; try 1.0")


def _check_sizes(size: Size, image_size: Size | None) -> Size:
    image_size = size if image_size is None else image_size
    for name, pair in (("size", size), ("image_size", image_size)):
        is_right = len(pair) == 2 and min(pair) >= 1
        _check(name, tuple(pair), is_right, "(height, width) of at least 1 pixel")
    return image_size

"""Maps of a function that can only be called: hide parts of the image, watch the score.

RISE (Petsiuk et al. 2018, eq. 6), with random masks m in [0, 1] whose mean is `keep`:

    map = sum over masks of score(image * m) m / (masks * keep)

Occlusion (Zeiler and Fergus 2014): a window slides over the image; the map at a pixel is the drop
of the score, score(image) - score(image with the window occluded), averaged over the windows that
cover it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.attribution.cam import Fn
from attnzoom_jax.attribution.chunks import map_chunks
from attnzoom_jax.attribution.targets import (
    check_count,
    check_images,
    check_score,
    check_targets,
    target_score,
)


def rise(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    key: jax.Array,
    masks: int = 4000,
    cells: int = 7,
    keep: float = 0.5,
    score: str = "probability",
    chunk_size: int | None = 32,
) -> jax.Array:
    """RISE: the mean of random masks, weighted by the score of the image under each.

    A mask is a grid of cells that are 1 with probability `keep`, else 0, enlarged bilinearly to one
    cell more than the image needs and cropped at a random place; a pixel is multiplied by it, so
    what is hidden becomes 0.

    Args:
        fn: images [n, h, w, c] -> logits [n, k] or [n, h, w, k]; it is only called, with up to
            chunk_size images. Each image's logits depend on that image alone.
        images: float [n, h, w, c], normalised so that 0 means nothing.
        targets: class ids int [n], or weights of the scores float [n, k].
        key: PRNG key; mask i depends on it and i alone and is the same for all images.
        masks: number of masks. Those that are alive at a time are as many as chunk_size allows.
        cells: cells per side of the grid.
        keep: probability that a cell is seen, in (0, 1].
        score: "probability" (softmax over the classes), "logit" or "sigmoid".
        chunk_size: images per call of fn, at most; None for all masks of all images in one call.

    Returns:
        Raw maps [n, h, w], at least float32, the same for any chunk_size but for rounding. Their
        zero means nothing: a pixel without influence gets about the mean score under the masks.
        Under jit NaN for a class id out of range.

    Raises:
        ValueError: images that are no floats, logits or targets of a wrong shape, class id out of
            range, unknown score, `masks`, `cells` or chunk_size below 1, `keep` outside (0, 1].

    Source: Petsiuk et al. 2018 (arXiv 1806.07421); grid and crop as in the authors' code. TorchRay
    takes the sigmoid and does not divide by `keep`: keep * rise(..., score="sigmoid").
    """
    check_images(images)
    check_count("masks", masks)
    check_count("cells", cells)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; expected a probability in (0, 1]")
    size = jnp.shape(images)[1:3]

    def mask_of(index: jax.Array) -> jax.Array:
        return _random_mask(jax.random.fold_in(key, index), size, cells, keep)

    def hide(images: jax.Array, mask: jax.Array) -> jax.Array:
        return images * mask[..., None]

    def maps_of(images: jax.Array, targets: jax.Array) -> jax.Array:
        def scores_of(hidden: jax.Array) -> jax.Array:  # [n, p, h, w, c] -> [n, p]
            return _scores(fn, hidden, targets, score)

        sums = _sum_over_masks(scores_of, mask_of, hide, images, masks, chunk_size)
        return sums / (masks * keep)

    return _map(maps_of, fn, images, targets, score=score, chunk_size=chunk_size)


def occlusion(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    value: Any = 0.0,
    score: str = "logit",
    chunk_size: int | None = 32,
) -> jax.Array:
    """Occlusion: how much the score drops while a window over the pixel is hidden.

    Args:
        fn: as for `rise`.
        images: float [n, h, w, c].
        targets: class ids int [n], or weights of the scores float [n, k].
        window: (height, width) of the window in pixels, or one number for both; None for a quarter
            of each side.
        stride: pixels between windows, (down, right) or one number, at most the window; None for
            half of the window. The last window of a row or column is moved back to the border, so
            that every pixel is covered.
        value: what an occluded pixel becomes, in the units of `images`: a number, or one per
            channel [c].
        score: "logit", "probability" or "sigmoid".
        chunk_size: images per call of fn, at most; None for all windows of all images in one call.

    Returns:
        Raw maps [n, h, w], at least float32, signed, the same for any chunk_size but for rounding.
        Under jit NaN for a class id out of range.

    Raises:
        ValueError: as `rise`; a window larger than the image, a stride larger than the window, a
            value of another shape.

    Source: Zeiler and Fergus 2014 (arXiv 1311.2901), section 4.2.
    """
    check_images(images)
    _, h, w, c = jnp.shape(images)
    height, width = _pair("window", (-(-h // 4), -(-w // 4)) if window is None else window)
    down, right = _pair("stride", (-(-height // 2), -(-width // 2)) if stride is None else stride)
    if height > h or width > w:
        raise ValueError(f"window is {(height, width)}, larger than the images of {(h, w)} pixels")
    if down > height or right > width:
        raise ValueError(
            f"stride is {(down, right)}; at more than the window, {(height, width)}, pixels would "
            "be left out"
        )
    if jnp.shape(value) not in ((), (c,)):
        raise ValueError(
            f"value has the shape {list(jnp.shape(value))}; expected one number, or one for each "
            f"of the {c} channels"
        )
    rows, columns = _starts(h, height, down), _starts(w, width, right)
    corners = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    covers = np.outer(_cover(rows, height, h), _cover(columns, width, w))  # windows per pixel

    def mask_of(index: jax.Array) -> jax.Array:
        top, left = jnp.asarray(corners)[index]
        y, x = jnp.arange(h)[:, None] - top, jnp.arange(w) - left
        return jnp.where((y >= 0) & (y < height) & (x >= 0) & (x < width), 1.0, 0.0)

    def hide(images: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask[..., None] > 0, jnp.asarray(value, images.dtype), images)

    def maps_of(images: jax.Array, targets: jax.Array) -> jax.Array:
        seen = _scores(fn, images[:, None], targets, score)  # [n, 1]

        def drops_of(hidden: jax.Array) -> jax.Array:  # [n, p, h, w, c] -> [n, p]
            return seen - _scores(fn, hidden, targets, score)

        sums = _sum_over_masks(drops_of, mask_of, hide, images, len(corners), chunk_size)
        return sums / jnp.asarray(covers, sums.dtype)

    return _map(maps_of, fn, images, targets, score=score, chunk_size=chunk_size)


def _map(
    maps_of: Callable[[jax.Array, jax.Array], jax.Array],
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    score: str,
    chunk_size: int | None,
) -> jax.Array:
    check_score(score)
    check_targets(fn, images, targets)  # within the loops their values cannot be looked at
    return map_chunks(maps_of, images, targets, chunk_size=chunk_size)


def _sum_over_masks(
    values_of: Callable[[jax.Array], jax.Array],
    mask_of: Callable[[jax.Array], jax.Array],
    hide: Callable[[jax.Array, jax.Array], jax.Array],
    images: jax.Array,
    count: int,
    chunk_size: int | None,
) -> jax.Array:
    """The sum over masks of the value of each image under the mask, times the mask: [n, h, w].

    Mask i of `count` is mask_of(i) [h, w], `hide` applies it to images [..., h, w, c]. As many
    masks are treated at a time as give at most chunk_size hidden images.
    """
    n = len(images)
    at_once = count if chunk_size is None else min(count, max(1, chunk_size // max(1, n)))
    steps = -(-count // at_once)
    wide = jnp.promote_types(images.dtype, jnp.float32)

    # Images outermost: where they are spread over devices, each device hides its own.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # nothing of a step is kept
    def step(sums: jax.Array, indices: jax.Array) -> tuple[jax.Array, None]:
        masks = jax.vmap(mask_of)(jnp.minimum(indices, count - 1)).astype(wide)  # [p, h, w]
        hidden = hide(images[:, None], masks[None]).astype(images.dtype)  # [n, p, h, w, c]
        values = jnp.where(indices < count, values_of(hidden), 0).astype(wide)
        return sums + jnp.einsum("np,phw->nhw", values, masks, precision="highest"), None

    indices = jnp.arange(steps * at_once).reshape(steps, at_once)
    return jax.lax.scan(step, jnp.zeros(images.shape[:3], wide), indices)[0]


def _scores(fn: Fn, hidden: jax.Array, targets: jax.Array, score: str) -> jax.Array:
    n, p, *rest = hidden.shape
    logits = fn(hidden.reshape(n * p, *rest))
    return target_score(logits, jnp.repeat(targets, p, axis=0), score=score).reshape(n, p)


def _random_mask(key: jax.Array, size: tuple[int, ...], cells: int, keep: float) -> jax.Array:
    """One mask [h, w] of RISE."""
    cell = [-(-length // cells) for length in size]  # height and width, rounded up
    draws = jax.random.uniform(key, (2 + cells * cells,), jnp.float32)
    start = jnp.floor(draws[:2] * jnp.array(cell)).astype(int)  # less than a cell
    grid = (draws[2:] < keep).astype(float).reshape(cells, cells)
    enlarged = [(cells + 1) * length for length in cell]
    mask = jax.image.resize(grid, enlarged, "linear", antialias=False)
    return jax.lax.dynamic_slice(mask, start, size)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} is {value!r}; expected one number or two")
    for length in pair:
        check_count(name, length)
    return pair


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one axis; the last one ends at the border."""
    last = length - window
    return sorted({*range(0, last, stride), last})


def _cover(starts: list[int], window: int, length: int) -> np.ndarray:
    """How many windows cover each position along one axis."""
    at = np.arange(length)
    return np.sum([(at >= start) & (at < start + window) for start in starts], axis=0)

"""ROAD: remove the pixels that a map orders, fill the holes with what their neighbours say.

A removed pixel p is the weighted mean of its neighbours q in the image, up to a little noise:

    x_p = sum_q w_q x_q / sum_q w_q + noise,    w = 1/6 beside, above and below, 1/12 on a diagonal

so that, unlike zeros, what is filled in does not tell the network which pixels were removed (Rong
et al. 2022). A neighbour may be removed as well: the means of one image are one sparse system of
equations, symmetric and positive definite, solved directly by SciPy. Hence this metric runs on the
host and is not to be jitted; `fn` is.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.metrics.faithfulness import (
    Curve,
    Fn,
    check_request,
    class_score,
    has_nan,
    ranks,
)

ORDERS = ("morf", "lerf")
# Half of the neighbours: with the other half the weights are symmetric.
_NEIGHBOURS = (((0, 1), 1 / 6), ((1, 0), 1 / 6), ((1, 1), 1 / 12), ((1, -1), 1 / 12))


def road(
    fn: Fn,
    images: jax.Array,
    maps: jax.Array,
    targets: jax.Array,
    *,
    key: jax.Array,
    ids: Any = None,
    order: str = "morf",
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    noise: float = 0.01,
    score: str = "probability",
) -> Curve:
    """The score while pixels are removed in the order of the map, and imputed.

    Args:
        fn: images [n, h, w, c] -> logits [n, k], called once per share, with all n images on one
            device: jit it, and spread them over devices there.
        images: float [n, h, w, c].
        maps: [n, h, w], any sign; only their order counts. Equal values go in row-major order.
        targets: class ids int [n].
        key: PRNG key of the noise.
        ids: int [n], by which the images draw; None for 0, 1, ...
        order: "morf", the most relevant pixels are removed first, or "lerf", the least relevant.
        shares: of the pixels to remove, rising, in (0, 1); every image keeps at least one pixel.
        noise: standard deviation of what is added to each removed value, in units of `images`.
        score: "probability", "logit" or "correct", as for `faithfulness.deletion`; the paper
            reports the accuracy, the mean of "correct".

    Returns:
        One point per share. The smaller `mean` is for "morf", and the larger for "lerf", the better
        the map; (lerf - morf) / 2 joins both. NaN where the map holds NaN or the class id is out of
        range.

    Raises:
        ValueError: as `faithfulness.deletion`; unknown order, shares out of range or not rising,
            negative noise, a call under jit.

    Source: Rong et al. 2022 (arXiv 2202.00449), with the weights and the noise of the
    authors' code; the joined figure is that of pytorch-grad-cam.
    """
    if isinstance(images, Tracer) or isinstance(maps, Tracer):
        raise ValueError("road solves sparse systems on the host; jit the function, not road")
    check_request(images, maps, targets, score)
    if order not in ORDERS:
        raise unknown_name("order", order, ORDERS)
    if not 0 <= noise < np.inf:
        raise ValueError(f"noise is {noise}; expected a standard deviation, 0 or more")
    n, h, w, _ = images.shape
    counts = _counts(shares, h * w)
    places = np.asarray(ranks(maps if order == "morf" else -maps))
    ids = jnp.arange(n) if ids is None else jnp.asarray(ids)
    host_images, scores = np.asarray(images), []
    for i, count in enumerate(counts):
        removed = places < count
        draws = _normal(jax.random.fold_in(key, i), ids, images.shape[1:])
        added = np.where(removed[..., None], noise * np.asarray(draws), 0)
        seen = (impute(host_images, removed) + added).astype(host_images.dtype)
        scores.append(class_score(fn(jnp.asarray(seen)), jnp.asarray(targets), score))
    values = jnp.where(has_nan(maps)[:, None], jnp.nan, jnp.stack(scores, axis=1))
    return Curve(jnp.asarray(np.divide(counts, h * w), jnp.float32), values)


def impute(images: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Images whose removed pixels are the weighted means of their neighbours, without noise.

    Args:
        images: float [n, h, w, c].
        removed: bool [n, h, w]; what the images hold there does not count.

    Returns:
        float64 [n, h, w, c].

    Raises:
        ValueError: an image of which every pixel is removed.
    """
    filled = np.array(images, np.float64)
    for i, hole in enumerate(removed):
        if hole.all():
            raise ValueError(f"every pixel of image {i} is removed; expected one that stays")
        if hole.any():
            filled[i][hole] = _solve(filled[i], hole)
    return filled


def _solve(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The values [m, c] of the m pixels of a hole, in row-major order."""
    # SciPy's sparse solvers take a while to import, and few programmes impute.
    from scipy import sparse
    from scipy.sparse.linalg import splu

    m = np.count_nonzero(hole)
    numbers = np.full(hole.shape, -1)
    numbers[hole] = np.arange(m)  # the unknowns
    diagonal, right_side = np.zeros(m), np.zeros((m, image.shape[-1]))
    rows, columns, entries = [np.arange(m)], [np.arange(m)], [diagonal]
    for (down, right), weight in _NEIGHBOURS:
        here, there = _pairs(hole.shape, down, right)
        for own, other in ((here, there), (there, here)):
            p, q = numbers[own], numbers[other]
            diagonal += weight * np.bincount(p[p >= 0], minlength=m)  # its neighbours in the image
            is_known = (p >= 0) & (q < 0)
            # No pixel has two neighbours in one direction, so nothing is added twice.
            right_side[p[is_known]] += weight * image[other][is_known]
            is_unknown = (p >= 0) & (q >= 0)
            rows.append(p[is_unknown])
            columns.append(q[is_unknown])
            entries.append(np.full(np.count_nonzero(is_unknown), -weight))
    places = np.concatenate(rows), np.concatenate(columns)
    matrix = sparse.csc_matrix((np.concatenate(entries), places), shape=(m, m))
    # Symmetric positive definite: no pivots, and an order made for such ones, twice as fast.
    factors = splu(matrix, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return factors.solve(right_side)


def _pairs(size: tuple[int, ...], down: int, right: int) -> tuple[Any, Any]:
    """Slices of all pixels that have a neighbour (down, right) in the image, and of these."""
    (h, w), left = size, max(0, -right)
    here = slice(0, h - down), slice(left, w - max(0, right))
    there = slice(down, h), slice(left + right, w - max(0, right) + right)
    return here, there


def _counts(shares: Sequence[float], pixels: int) -> list[int]:
    """How many pixels are removed at each share."""
    values = np.asarray(shares, np.float64)
    is_rising = values.ndim == 1 and values.size > 0 and (np.diff(values) > 0).all()
    if not is_rising or not (values[0] > 0 and values[-1] < 1):
        raise ValueError(f"shares are {shares}; expected rising numbers between 0 and 1")
    return [min(round(share * pixels), pixels - 1) for share in values.tolist()]


@jax.jit(static_argnames="shape")
def _normal(key: jax.Array, ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    draws = jax.vmap(lambda id: jax.random.normal(jax.random.fold_in(key, id), shape))
    return draws(ids)

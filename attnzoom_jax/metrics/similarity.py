"""How alike two maps of an image are: Spearman's rank correlation, and SSIM.

Spearman's: Pearson's correlation of the ranks, where equal values share the mean of their ranks.
It knows no scale, and neither sign nor place in the image beyond the pixel.

SSIM (Wang et al. 2004, eq. 13) of maps scaled to [0, 1], with the means m, variances v and the
covariance v_xy in a Gaussian window of 11 pixels, sigma 1.5, averaged over all windows that lie in
the image:

    SSIM = (2 m_x m_y + C1) (2 v_xy + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2))

with C1 = 0.01^2 and C2 = 0.03^2: scikit-image's `structural_similarity` with gaussian_weights=True,
use_sample_covariance=False and data_range=1.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.ops.smooth import smooth

MEASURES = ("spearman", "spearman_abs", "ssim")
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def similarity(maps: jax.Array, others: jax.Array, *, measure: str = "spearman") -> jax.Array:
    """How alike two maps of each image are, by name.

    Args:
        maps: [n, h, w], any sign.
        others: [n, h, w].
        measure: "spearman", "spearman_abs" (of the absolute values) or "ssim".

    Returns:
        [n] in [-1, 1], as the function of that name.

    Raises:
        ValueError: unknown measure; as the function of that name.

    Source: the three measures of Adebayo et al. 2018 (arXiv 1810.03292), without that of HOG.
    """
    if measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    if measure == "ssim":
        return ssim(maps, others)
    if measure == "spearman_abs":
        maps, others = jnp.abs(maps), jnp.abs(others)
    return spearman(maps, others)


def spearman(maps: jax.Array, others: jax.Array) -> jax.Array:
    """Spearman's rank correlation of two maps of each image.

    Args:
        maps: [n, h, w].
        others: [n, h, w].

    Returns:
        [n] in [-1, 1], at least float32; 0 where one of the two is constant and so has no order,
        NaN where one holds NaN.

    Raises:
        ValueError: maps of different shapes.
    """
    _check_shapes(maps, others)
    x, y = _mean_ranks(maps), _mean_ranks(others)  # [n, hw]
    spread = jnp.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    values = (x * y).sum(axis=1) / jnp.where(spread == 0, 1, spread)
    return jnp.where(_has_nan(maps, others), jnp.nan, values)


def ssim(maps: jax.Array, others: jax.Array) -> jax.Array:
    """Structural similarity of two maps of each image, each scaled to [0, 1] beforehand.

    Args:
        maps: [n, h, w], any sign, h and w at least 11; a constant map is scaled to zeros.
        others: [n, h, w].

    Returns:
        float32 [n] in [-1, 1], 1 for equal maps; NaN where one of the two holds NaN.

    Raises:
        ValueError: maps of different shapes, or smaller than the window.

    Source: Wang et al. 2004, Image quality assessment, IEEE TIP 13(4); scaled maps as in Adebayo et
    al. 2018 (arXiv 1810.03292).
    """
    _check_shapes(maps, others)
    if min(maps.shape[1:]) < WINDOW:
        raise ValueError(
            f"maps of {maps.shape[1:]} pixels are smaller than the window of SSIM, {WINDOW}; "
            "resize them to the image with ops.maps.resize"
        )
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights /= weights.sum()
    x, y = (ops_maps.normalize(values, "min_max") for values in (maps, others))
    mean_x, mean_y = smooth(x, weights), smooth(y, weights)
    var_x = smooth(x * x, weights) - mean_x**2
    var_y = smooth(y * y, weights) - mean_y**2
    covariance = smooth(x * y, weights) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return (alike / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean(axis=(1, 2))


def _mean_ranks(maps: jax.Array) -> jax.Array:
    """Ranks [n, hw] from -1 to 1, their mean 0; equal values share the mean of their ranks."""
    values = maps.reshape(len(maps), -1)
    ordered = jnp.sort(values, axis=1)
    below = jax.vmap(lambda row, v: jnp.searchsorted(row, v, side="left"))(ordered, values)
    up_to = jax.vmap(lambda row, v: jnp.searchsorted(row, v, side="right"))(ordered, values)
    m = values.shape[1]
    return (below + up_to - m).astype(jnp.promote_types(values.dtype, jnp.float32)) / m


def _has_nan(maps: jax.Array, others: jax.Array) -> jax.Array:
    return jnp.isnan(maps).any(axis=(1, 2)) | jnp.isnan(others).any(axis=(1, 2))


def _check_shapes(maps: jax.Array, others: jax.Array) -> None:
    if maps.ndim != 3 or maps.shape != others.shape:
        raise ValueError(
            f"the maps have shapes {maps.shape} and {others.shape}; expected [n, h, w] for both"
        )

"""How well a map agrees with the object's mask: energy inside, and the pointing hit.

Maps come at the size of the masks (`ops.maps.resize`); a mask pixel above 0 is inside.

    energy inside = sum_{pixels in mask} max(map, 0) / sum_{pixels} max(map, 0)

A map that ignores the image scores `mask_share` on average; read one against the other.
"""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.ops import maps as ops_maps

_FAR_AWAY = 46_340


def energy_inside(maps: jax.Array, masks: jax.Array) -> jax.Array:
    """Share of the map's positive energy that lies inside the mask.

    Args:
        maps: [n, h, w], any sign; only the positive part counts.
        masks: [n, h, w], bool or numbers; inside where above 0.

    Returns:
        float32 [n] in [0, 1]; 0 where the map has no positive energy, NaN where it holds NaN.

    Raises:
        ValueError: maps and masks of different shapes.

    Source: Wang et al. 2020 (Score-CAM, arXiv 1910.01279), energy-based pointing game.
    """
    _check_shapes(maps, masks)
    energy = ops_maps.positive(maps)
    inside = jnp.where(masks > 0, energy, 0.0).sum(axis=(1, 2))  # [n]
    total = energy.sum(axis=(1, 2))
    nothing = total == 0
    return jnp.where(nothing, 0.0, inside / jnp.where(nothing, 1.0, total))


def mask_share(masks: jax.Array) -> jax.Array:
    """The mask's share of the image: the energy inside of a uniform map.

    Args:
        masks: [n, h, w], bool or numbers; inside where above 0.

    Returns:
        float32 [n] in [0, 1].
    """
    return jnp.mean(masks > 0, axis=(1, 2), dtype=jnp.float32)


def pointing_hit(
    maps: jax.Array, masks: jax.Array, *, tolerance: float = 0.0, inclusive: bool = False
) -> jax.Array:
    """Whether the map's peak lies on the mask, or near enough to it.

    Args:
        maps: [n, h, w]; the peak is the first maximum in row-major order.
        masks: [n, h, w], bool or numbers; inside where above 0.
        tolerance: pixels. 0 asks for a peak on the mask; t > 0 for a mask pixel at a Euclidean
            distance strictly below t, as the reference implementation counts.
        inclusive: a distance of exactly t is a hit too, as the protocol's text has it.

    Returns:
        bool [n]; False for an empty mask and for a map that holds NaN.

    Raises:
        ValueError: maps and masks of different shapes, a negative or infinite tolerance.

    Source: Zhang et al. 2016 (arXiv 1608.00507), pointing game.
    """
    _check_shapes(maps, masks)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance}; expected a distance in pixels, 0 or more")
    # Squared distances are integers: the largest that hits, found here, leaves the device no
    # rounding to do. Squares of more than _FAR_AWAY pixels would overflow int32.
    near_enough = operator.le if inclusive else operator.lt
    limit = math.floor(min(tolerance, _FAR_AWAY) ** 2) + 1
    while limit > 0 and not near_enough(math.sqrt(limit), tolerance):
        limit -= 1
    peaks = ops_maps.peak(maps)  # [n, 2]
    _, h, w = maps.shape
    dy = jnp.arange(h)[None, :] - peaks[:, :1]  # [n, h]
    dx = jnp.arange(w)[None, :] - peaks[:, 1:]  # [n, w]
    squares = dy[:, :, None] ** 2 + dx[:, None, :] ** 2  # [n, h, w]
    nearest = jnp.where(masks > 0, squares, np.iinfo(np.int32).max).min(axis=(1, 2))  # [n]
    return (nearest <= limit) & ~jnp.isnan(maps).any(axis=(1, 2))


def _check_shapes(maps: jax.Array, masks: jax.Array) -> None:
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"maps have shape {maps.shape} and masks {masks.shape}; expected [n, h, w] for both, "
            "resize the maps to the masks with ops.maps.resize"
        )

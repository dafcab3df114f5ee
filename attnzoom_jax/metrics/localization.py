"""How well a map agrees with the object's mask: energy inside, rank accuracy, the pointing hit.

Maps come at the size of the masks (`ops.maps.resize`); a mask pixel above 0 is inside.

    energy inside = sum_{pixels in mask} max(map, 0) / sum_{pixels} max(map, 0)
    rank accuracy = |the K pixels of largest max(map, 0), that lie in the mask| / K,  K = |mask|

A map that ignores the image scores `mask_share` on average; read one against the other. Arras et
al. 2020 (arXiv 2003.07258) call the two relevance mass accuracy and relevance rank
accuracy.

Images of different sizes share a canvas (`ops.maps.resize_each`), maps and masks 0 beyond them;
what depends on the size of the image takes `sizes`. Boxes become masks by `ops.boxes.to_mask`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.metrics import pointing_game
from attnzoom_jax.ops import maps as ops_maps


def energy_inside(maps: jax.Array, masks: jax.Array) -> jax.Array:
    """Share of the map's positive energy that lies inside the mask.

    Args:
        maps: [n, h, w], any sign; only the positive part counts.
        masks: [n, h, w], bool or numbers; inside where above 0.

    Returns:
        float32 [n] in [0, 1]; 0 where the map has no positive energy, NaN where it holds NaN.

    Raises:
        ValueError: maps and masks of different shapes.

    Source: Wang et al. 2020 (Score-CAM, arXiv 1910.01279), energy-based pointing game; the same
    as relevance mass accuracy, Arras et al. 2020 (arXiv 2003.07258).
    """
    _check_shapes(maps, masks)
    energy = ops_maps.positive(maps)
    inside = jnp.where(masks > 0, energy, 0.0).sum(axis=(1, 2))  # [n]
    total = energy.sum(axis=(1, 2))
    nothing = total == 0
    return jnp.where(nothing, 0.0, inside / jnp.where(nothing, 1.0, total))


relevance_mass_accuracy = energy_inside


def relevance_rank_accuracy(
    maps: jax.Array, masks: jax.Array, *, sizes: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """Share of the map's K highest pixels that lie inside the mask, which has K pixels.

    Of pixels that tie for the last places each counts for its chance to get one, so that a map
    without positive values scores the mask's share of the image.

    Args:
        maps: [n, h, w], any sign; only the positive part counts.
        masks: [n, h, w], bool or numbers; inside where above 0.
        sizes: int [n, 2], (height, width) of each image; None where all fill the canvas.

    Returns:
        float32 [n] in [0, 1]; 0 for an empty mask, NaN where the map holds NaN.

    Raises:
        ValueError: maps and masks of different shapes, sizes that do not fit.

    Source: Arras et al. 2020 (arXiv 2003.07258), where the order of ties is left open.
    """
    _check_shapes(maps, masks)
    n, h, w = maps.shape
    in_image = ops_maps.is_inside(sizes, maps.shape)
    energy = jnp.where(in_image, ops_maps.positive(maps), -1.0)  # ranks behind all of the image
    inside = (masks > 0) & in_image
    k = inside.sum(axis=(1, 2))  # [n]
    falling = jnp.sort(energy.reshape(n, h * w), axis=1)[:, ::-1]
    last = jnp.take_along_axis(falling, jnp.maximum(k - 1, 0)[:, None], axis=1)  # [n, 1]
    is_above, is_tied = energy > last[:, :, None], energy == last[:, :, None]
    above, tied, hit, chance = (
        which.sum(axis=(1, 2)).astype(jnp.float32)
        for which in (is_above, is_tied, is_above & inside, is_tied & inside)
    )
    hit += chance * (k - above) / jnp.maximum(tied, 1)
    accuracy = jnp.where(k > 0, hit / jnp.maximum(k, 1), 0.0)
    return jnp.where(jnp.isnan(energy).any(axis=(1, 2)), jnp.nan, accuracy)


def mask_share(masks: jax.Array, *, sizes: jax.Array | np.ndarray | None = None) -> jax.Array:
    """The mask's share of the image: the energy inside of a uniform map.

    Args:
        masks: [n, h, w], bool or numbers; inside where above 0.
        sizes: int [n, 2], (height, width) of each image; None where all fill the canvas.

    Returns:
        float32 [n] in [0, 1].

    Raises:
        ValueError: sizes that do not fit.
    """
    if sizes is None:
        return jnp.mean(masks > 0, axis=(1, 2), dtype=jnp.float32)
    in_image = ops_maps.is_inside(sizes, masks.shape)
    inside = ((masks > 0) & in_image).sum(axis=(1, 2), dtype=jnp.float32)
    return inside / in_image.sum(axis=(1, 2), dtype=jnp.float32)


def pointing_hit(
    maps: jax.Array, masks: jax.Array, *, tolerance: float = 0.0, inclusive: bool = False
) -> jax.Array:
    """Whether the map's peak lies on the mask, or near enough to it.

    Args:
        maps: [n, h, w]; the peak is the first maximum in row-major order.
        masks: [n, h, w], bool or numbers; inside where above 0.
        tolerance: pixels. 0 asks for a peak on the mask; t > 0 for a mask pixel at a Euclidean
            distance strictly below t, as TorchRay counts.
        inclusive: a distance of exactly t is a hit too, as the protocol's text has it.

    Returns:
        bool [n]; False for an empty mask and for a map that holds NaN.

    Raises:
        ValueError: maps and masks of different shapes, a negative or infinite tolerance.

    Source: Zhang et al. 2016 (arXiv 1608.00507), pointing game.
    """
    _check_shapes(maps, masks)
    points = pointing_game.points(maps)
    return pointing_game.hits_masks(points, masks, tolerance=tolerance, inclusive=inclusive)


def _check_shapes(maps: jax.Array, masks: jax.Array) -> None:
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"maps have shape {maps.shape} and masks {masks.shape}; expected [n, h, w] for both, "
            "resize the maps to the masks with ops.maps.resize"
        )

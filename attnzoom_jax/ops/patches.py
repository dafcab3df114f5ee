"""Patches: boxes from maps or by chance, cutting images to them, and maps of patches put back.

Boxes are [y0, x0, y1, x1], half-open, in pixels of the image: the patch holds the pixels from y0 to
y1 - 1.

A patch is resized so that the centres of its corner pixels become those of the result ("aligned
corners"): with s rows, row i of the result lies in the image at

    y = y0 + i (y1 - 1 - y0) / (s - 1)            the middle, (y0 + y1 - 1) / 2, where s = 1

so that nothing outside of the box is read, and a box of s x s pixels is copied. Maps are resized by
the other convention (`ops.maps.resize`), also into a box.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnzoom_jax.ops.maps import threshold_box
from attnzoom_jax.ops.warp import Size, sample

# Of the boxes that the authors of "Focus Longer to See Better" publish: what a box around the upper
# twentieth of a map covers at least, with the median at 10 % of the image.
AREA = (0.053, 1.0)
ASPECT = (0.5, 2.0)


def percentile_boxes(maps: jax.Array, image_size: Size, *, percentile: float = 95.0) -> jax.Array:
    """The smallest box around all pixels that reach a percentile of their map.

    The map is enlarged to the image first, bicubic with a = -0.5 (OpenCV, and so ProtoPNet, has
    -0.75: the boxes may differ by a pixel).

    Args:
        maps: [n, h, w], any sign.
        image_size: (height, width) of the image, in pixels.
        percentile: in [0, 100].

    Returns:
        int32 [n, 4], in pixels of the image. The whole image for a constant map, and for one that
        holds NaN. Separate blobs share one box.

    Raises:
        ValueError: `percentile` outside of [0, 100], or a size below 1.

    Source: Chen et al., "This Looks Like That", 2019 (arXiv 1806.10574), section 2.3 and code.
    """
    chex.assert_rank(maps, 3)
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}; expected a number in [0, 100]; try 95.0")
    _check_size("image_size", image_size)
    n, (height, width) = maps.shape[0], image_size
    maps = jnp.asarray(maps, jnp.float32)
    maps = maps - maps.min(axis=(1, 2), keepdims=True)  # resizing rounds a constant, unless it is 0
    maps = jax.image.resize(maps, (n, height, width), "cubic", antialias=False)
    # The pixels that reach a percentile between two of them are those that reach the upper one. A
    # whole number is not to be missed by rounding.
    place = math.ceil(percentile / 100 * (height * width - 1) - 1e-6)
    least = jnp.sort(maps.reshape(n, -1), axis=1)[:, place]
    return threshold_box(jnp.float32(maps >= least[:, None, None]), 1.0)


def random_boxes(
    key: jax.Array,
    n: int,
    image_size: Size,
    *,
    area: tuple[float, float] = AREA,
    aspect: tuple[float, float] = ASPECT,
) -> jax.Array:
    """Boxes drawn at random, with many small ones and a few large ones.

    The inverse of the area is uniform, which comes near to the areas of published boxes with the
    default: a median of 10 % of the image, a quarter below 7 %. The logarithm of the aspect is
    uniform, and so is the place, of all where the box fits.

    Args:
        key: PRNG key.
        n: number of boxes.
        image_size: (height, width), in pixels.
        area: least and largest share of the image, in (0, 1].
        aspect: least and largest height over width, as shares of the image's; above 0. A side that
            would exceed the image is cut, and the other one grows.

    Returns:
        int32 [n, 4], inside of the image, at least one pixel high and wide.

    Raises:
        ValueError: a range that is empty or goes beyond its bounds, or a size below 1.
    """
    _check_size("image_size", image_size)
    for name, (low, high), top in (("area", area, 1.0), ("aspect", aspect, math.inf)):
        if not 0 < low <= high <= top:
            raise ValueError(
                f"{name} is ({low}, {high}); expected 0 < least <= largest"
                f"{' <= 1, such as' if top == 1 else ', such as'} {AREA if top == 1 else ASPECT}"
            )
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    share = 1 / jax.random.uniform(area_key, (n,), minval=1 / area[1], maxval=1 / area[0])
    log_aspect = jax.random.uniform(
        aspect_key, (n,), minval=math.log(aspect[0]), maxval=math.log(aspect[1])
    )
    tall = jnp.clip(jnp.sqrt(share * jnp.exp(log_aspect)), share, 1.0)
    sides = jnp.stack([tall, share / tall], axis=1)  # [n, 2], shares of the image's
    whole = jnp.asarray(image_size, jnp.float32)
    sides = jnp.clip(jnp.round(sides * whole), 1, whole)
    places = jnp.floor(jax.random.uniform(place_key, (n, 2)) * (whole - sides + 1))
    low = jnp.clip(places, 0, whole - sides)  # the product may round up
    return jnp.concatenate([low, low + sides], axis=1).astype(jnp.int32)


def crop_boxes(images: jax.Array, boxes: jax.Array | np.ndarray, size: Size) -> jax.Array:
    """One box of each image, cut out and resized bilinearly, corners aligned.

    Shrinking is not smoothed. Differentiable in the images, and in boxes of floats.

    Args:
        images: [n, h, w, c].
        boxes: [n, 4], whole numbers or not, each at least one pixel high and wide. Where their
            values are not known yet, under jit, what lies outside of the image is cut off.
        size: (height, width) of the patches, in pixels.

    Returns:
        [n, height, width, c] in the type of the images, float32 for integers.

    Raises:
        ValueError: shapes that do not fit, a size below 1, and, where their values are known, boxes
            that are empty or leave the image.

    Source: torch's `interpolate(mode="bilinear", align_corners=True)`.
    """
    if images.ndim != 4 or boxes.shape != (images.shape[0], 4):
        raise ValueError(
            f"crop_boxes takes images [n, h, w, c] and one box [y0, x0, y1, x1] for each, [n, 4]; "
            f"got images {images.shape} and boxes {boxes.shape}"
        )
    _check_size("size", size)
    lengths = (images.shape[1], images.shape[2])
    check_boxes(boxes, lengths)
    low, high = _end_pixels(boxes, lengths)
    y, x = (
        low[:, axis, None] + _spread((high - low)[:, axis, None], m) for axis, m in enumerate(size)
    )
    return sample(images, (y, x))


def paste_boxes(maps: jax.Array, boxes: jax.Array | np.ndarray, size: Size) -> jax.Array:
    """Maps of patches put back into the image: each resized into its box, 0 outside of it.

    Row y of the image lies in a map of h rows at (y + 0.5 - y0) h / (y1 - y0) - 0.5. A pixel is
    inside of the box where its centre is, y0 <= y + 0.5 < y1. So a map of ones gives the box.

    Args:
        maps: [n, h, w], each of a whole patch as `crop_boxes` cuts it out, at any resolution.
        boxes: [n, 4], whole numbers or not, each at least one pixel high and wide. Where their
            values are not known yet, under jit, what lies outside of the image is cut off, as
            `crop_boxes` does.
        size: (height, width) of the image, in pixels.

    Returns:
        float32 [n, height, width]; the box of the whole image gives `ops.maps.resize`.

    Raises:
        ValueError: shapes that do not fit, a size below 1, and, where their values are known, boxes
            that are empty or leave the image.
    """
    if maps.ndim != 3 or boxes.shape != (maps.shape[0], 4):
        raise ValueError(
            f"paste_boxes takes maps [n, h, w] and one box [y0, x0, y1, x1] for each, [n, 4]; got "
            f"maps {maps.shape} and boxes {boxes.shape}"
        )
    _check_size("size", size)
    check_boxes(boxes, size)
    first, last = _end_pixels(boxes, size)
    places, is_inside = [], []
    for axis, pixels in enumerate(size):
        low, high = first[:, axis, None], last[:, axis, None] + 1  # edges
        centres = jnp.arange(pixels) + 0.5
        places.append((centres - low) * maps.shape[1 + axis] / (high - low) - 0.5)
        is_inside.append((low <= centres) & (centres < high))
    values = sample(jnp.asarray(maps, jnp.float32)[..., None], (places[0], places[1]))[..., 0]
    return jnp.where(is_inside[0][:, :, None] & is_inside[1][:, None, :], values, 0.0)


def _end_pixels(boxes: jax.Array | np.ndarray, image_size: Size) -> tuple[jax.Array, jax.Array]:
    """The centres [n, 2] of the first and the last pixels of boxes, cut to the image."""
    boxes, end = jnp.asarray(boxes, jnp.float32), jnp.asarray(image_size) - 1
    first = jnp.clip(boxes[:, :2], 0, end)
    return first, jnp.clip(boxes[:, 2:] - 1, first, end)


def _spread(lengths: jax.Array, size: int) -> jax.Array:
    """Lengths [n, 1] to `size` places from 0 to each of them, [n, size]; one lies in the middle."""
    # Multiplied first: whole places stay whole numbers.
    return jnp.arange(size) * lengths / (size - 1) if size > 1 else lengths / 2


def check_boxes(boxes: jax.Array | np.ndarray, image_size: Size) -> None:
    """Raise a ValueError for boxes that are empty or leave the image, where their values are known.

    Args:
        boxes: [..., 4]; traced ones pass unseen.
        image_size: (height, width), in pixels.
    """
    if isinstance(boxes, Tracer):
        return
    boxes = np.asarray(boxes).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    is_right = ((low >= 0) & (low + 1 <= high) & (high <= image_size)).all(axis=1)
    if not is_right.all():
        i = int(np.flatnonzero(~is_right)[0])
        raise ValueError(
            f"box {i} is {boxes[i].tolist()}; expected [y0, x0, y1, x1] of at least one pixel "
            f"inside of the image of {image_size[0]} x {image_size[1]} pixels"
        )


def _check_size(name: str, size: Size) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} is {tuple(size)}; expected (height, width) of at least 1 pixel")

"""Boxes [..., 4]: [y0, x0, y1, x1], half-open, in pixels; NumPy on the host, JAX on a device.

A box holds the pixels whose centres lie in it: pixel y where y0 <= y + 0.5 < y1, so that a box of
whole numbers holds those from y0 to y1 - 1. A box without height or width is empty: it pads rows of
boxes of different length, overlaps nothing and holds no pixel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Boxes = jax.Array | np.ndarray


def area(boxes: Boxes) -> Any:
    """Area of boxes.

    Args:
        boxes: [..., 4].

    Returns:
        [...], in square pixels; 0 for an empty box.
    """
    xp = _namespace(boxes)
    sides = xp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(first: Boxes, second: Boxes) -> Any:
    """Intersection over union.

    Args:
        first: [..., 4].
        second: [..., 4]; the shapes broadcast: `iou(a[:, None], b[None])` compares all pairs.

    Returns:
        [...], in [0, 1], float64 of NumPy arrays; 0 where a box is empty.

    Raises:
        ValueError: shapes that do not end in 4.
    """
    _check(first)
    _check(second)
    xp = _namespace(first, second)
    low = xp.maximum(first[..., :2], second[..., :2])
    high = xp.minimum(first[..., 2:], second[..., 2:])
    common = area(xp.concatenate([low, high], axis=-1))
    union = area(first) + area(second) - common
    return common / xp.where(union > 0, union, 1)


def scale(boxes: Boxes, before: Any, after: Any) -> Any:
    """Boxes of an image, in pixels of the same image at another size.

    Args:
        boxes: [..., 4].
        before: (height, width) that the boxes are in; or an array [..., 2], one for each box.
        after: (height, width) that they shall be in; or an array [..., 2].

    Returns:
        Floats [..., 4], not rounded. IoU does not change when both boxes are scaled.

    Raises:
        ValueError: shapes that do not end in 4.
    """
    _check(boxes)
    xp = _namespace(boxes)
    before, after = xp.asarray(before), xp.asarray(after)
    return boxes * xp.concatenate([after, after], -1) / xp.concatenate([before, before], -1)


def pixel_range(boxes: Boxes) -> tuple[Any, Any]:
    """The pixels that boxes hold.

    Args:
        boxes: [..., 4].

    Returns:
        First pixels and last pixels, whole numbers [..., 2] each, (y, x). Where one of the last
        comes before the first, the box holds none.

    Raises:
        ValueError: shapes that do not end in 4.
    """
    _check(boxes)
    xp = _namespace(boxes)
    # y0 <= y + 0.5 < y1: from ceil(y0 - 0.5) to ceil(y1 - 0.5) - 1.
    edges = xp.ceil(boxes - 0.5)
    return edges[..., :2], edges[..., 2:] - 1


def to_mask(boxes: Boxes, size: tuple[int, int]) -> Any:
    """The pixels that lie in any of some boxes.

    Args:
        boxes: [..., p, 4]; what lies outside of the image is cut off.
        size: (height, width) of the image, in pixels.

    Returns:
        bool [..., height, width].

    Raises:
        ValueError: shapes that do not end in 4, a size below 1.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {tuple(size)}; expected (height, width) of at least 1 pixel")
    xp = _namespace(boxes)
    first, last = pixel_range(boxes)
    rows, columns = (
        (xp.arange(pixels) >= first[..., axis, None]) & (xp.arange(pixels) <= last[..., axis, None])
        for axis, pixels in enumerate(size)
    )  # [..., p, height], [..., p, width]
    # How many boxes hold a pixel: sums of zeros and ones, exact at any precision of the product.
    rows, columns = rows.astype(np.float32), columns.astype(np.float32)
    return xp.matmul(xp.swapaxes(rows, -1, -2), columns) > 0


def _namespace(*arrays: Boxes) -> Any:
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _check(boxes: Boxes) -> None:
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes have shape {boxes.shape}; expected [..., 4], [y0, x0, y1, x1]")

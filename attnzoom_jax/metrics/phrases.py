"""Phrase localisation: boxes that somebody proposes, ranked by a map; on the host, in NumPy.

A proposal b with area |b| scores what the positive part P of the phrase's map holds inside of it,

    score(b) = sum_{pixels in b} P / |b|^gamma

where gamma = 0 prefers large boxes, 1 small ones, and 1/2 lies between. Of proposals that tie the
first one comes first. A phrase is localised at N where one of the first N proposals has an IoU of
at least 1/2 with the true box. Where a phrase has several boxes,

    truth   right is a proposal that fits
    union   the smallest box around all of them (Flickr30k Entities; the default)
    any     any one of them

Both are in use: tables of Flickr30k say "merged boxes" and "any box". The map points at its
maximum, the first one of several, which hits where it lies in any of the boxes, without tolerance.

Boxes are [y0, x0, y1, x1], half-open, a pixel being a square of side 1: a box whose corners are no
whole numbers holds shares of pixels. So boxes and maps may be scaled to another size, each axis for
itself: neither IoUs nor the order of scores change.

Source: Zhang et al. 2016 (arXiv 1608.00507), section 4.3, for the score; Plummer et al. 2015 (arXiv
1505.04870) for recall at N.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops import boxes as ops_boxes

GAMMA = 0.5
IOU = 0.5
AT = (1, 5, 10)
TRUTHS = ("union", "any")
# Of the sliding set: shares of the image's area, height over width, step as a share of the side.
SHARES = (0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
RATIOS = (0.5, 1.0, 2.0)
STRIDE = 1 / 3

_LEVELS = 2**30


def box_scores(maps: np.ndarray, boxes: np.ndarray, *, gamma: float = GAMMA) -> np.ndarray:
    """What a map holds inside of boxes, over their area to the power of gamma.

    Maps are rounded to 2**30 levels, so that the sums of an integral image are exact: boxes of one
    size that hold the same pixels tie, and rounding does not order them.

    Args:
        maps: [n, h, w], any sign; only the positive part counts.
        boxes: [n, m, 4], in pixels of the maps; what lies outside is cut off.
        gamma: 0 or more.

    Returns:
        float64 [n, m]; -inf for an empty box, NaN for a map that holds NaN or infinity.

    Raises:
        ValueError: shapes that do not fit, a gamma that is negative or infinite, more than 2**23
            pixels.
    """
    maps, boxes = np.asarray(maps), np.asarray(boxes, np.float64)
    if maps.ndim != 3 or boxes.ndim != 3 or boxes.shape[::2] != (len(maps), 4):
        raise ValueError(
            f"maps have shape {maps.shape} and boxes {boxes.shape}; expected [n, h, w] and "
            "[n, m, 4]"
        )
    if not (np.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma is {gamma}; expected a number of at least 0, such as 0.5")
    n, h, w = maps.shape
    if h * w > 2**23:
        raise ValueError(f"maps have {h} x {w} pixels; expected at most 2**23: resize them")
    is_finite: Any = np.isfinite(maps).all(axis=(1, 2))
    positive = np.where(is_finite[:, None, None], np.maximum(maps, 0), 0).astype(np.float64)
    top = positive.max(axis=(1, 2))
    level = np.where(top > 0, top, 1) / _LEVELS  # [n]
    integral = np.zeros((n, h + 1, w + 1))
    integral[:, 1:, 1:] = np.rint(positive / level[:, None, None]).cumsum(axis=1).cumsum(axis=2)
    boxes = np.clip(boxes, 0, (h, w, h, w))
    y0, x0, y1, x1 = np.moveaxis(boxes, -1, 0)  # [n, m] each
    inside = _at(integral, y1, x1) - _at(integral, y0, x1)
    inside -= _at(integral, y1, x0) - _at(integral, y0, x0)
    area = ops_boxes.area(boxes)
    scores = inside * level[:, None] / np.where(area > 0, area, 1) ** gamma
    scores = np.where(area > 0, scores, -np.inf)
    return np.where(is_finite[:, None], scores, np.nan)


def _at(integral: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """An integral image [n, h + 1, w + 1] at places [n, m], bilinear: exact for square pixels."""
    n, h, w = integral.shape
    row, column = np.minimum(y, h - 2).astype(int), np.minimum(x, w - 2).astype(int)
    dy, dx = y - row, x - column  # in [0, 1]
    each = np.arange(n)[:, None]
    above = (1 - dx) * integral[each, row, column] + dx * integral[each, row, column + 1]
    below = (1 - dx) * integral[each, row + 1, column] + dx * integral[each, row + 1, column + 1]
    return (1 - dy) * above + dy * below


def recall_hits(
    scores: np.ndarray,
    proposals: np.ndarray,
    boxes: np.ndarray,
    *,
    at: Sequence[int] = AT,
    iou: float = IOU,
    truth: str = "union",
) -> np.ndarray:
    """Whether one of the first proposals is right.

    Args:
        scores: [n, m], of `box_scores`; NaN where there is no order, which hits nothing.
        proposals: [n, m, 4], empty ones do not count.
        boxes: [n, p, 4], the true ones, in the same pixels; empty ones do not count.
        at: how many proposals are looked at, a number for each column.
        iou: that a proposal has to reach.
        truth: "union" or "any".

    Returns:
        bool [n, len(at)]; False where all true boxes are empty.

    Raises:
        ValueError: unknown `truth`, a number below 1 in `at`, shapes that do not fit.
    """
    if min(at) < 1:
        raise ValueError(f"at is {tuple(at)}; expected numbers of proposals of at least 1")
    if scores.shape != proposals.shape[:2]:
        raise ValueError(
            f"scores have shape {scores.shape} and proposals {proposals.shape}; expected [n, m] "
            "and [n, m, 4]"
        )
    is_right = overlaps(proposals, boxes, truth=truth) >= iou
    order = np.argsort(-scores, axis=1, kind="stable")
    is_right = np.take_along_axis(is_right & ~np.isnan(scores), order, axis=1)
    return np.stack([is_right[:, :count].any(axis=1) for count in at], axis=1)


def overlaps(proposals: np.ndarray, boxes: np.ndarray, *, truth: str = "union") -> np.ndarray:
    """The IoU of each proposal with what is true.

    Args:
        proposals: [n, m, 4].
        boxes: [n, p, 4], the true ones; empty ones do not count.
        truth: "union" or "any": the best of them.

    Returns:
        float64 [n, m], in [0, 1]; 0 without a true box.

    Raises:
        ValueError: unknown `truth`.
    """
    if truth not in TRUTHS:
        raise unknown_name("truth", truth, TRUTHS)
    boxes = union_boxes(boxes)[:, None] if truth == "union" else np.asarray(boxes, np.float64)
    found = ops_boxes.iou(np.asarray(proposals, np.float64)[:, :, None], boxes[:, None])
    return found.max(axis=2, initial=0)


def union_boxes(boxes: np.ndarray) -> np.ndarray:
    """The smallest box around all of some boxes.

    Args:
        boxes: [n, p, 4]; empty ones do not count.

    Returns:
        float64 [n, 4]; zeros, an empty box, where there is none.
    """
    boxes = np.asarray(boxes, np.float64)
    is_there = (ops_boxes.area(boxes) > 0)[..., None]
    low = np.where(is_there, boxes[..., :2], np.inf).min(axis=1, initial=np.inf)
    high = np.where(is_there, boxes[..., 2:], -np.inf).max(axis=1, initial=-np.inf)
    return np.where(is_there.any(axis=1), np.concatenate([low, high], axis=1), 0)


def pointing_hits(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether maps point into a true box.

    Args:
        maps: [n, h, w]; they point at the centre of their first maximum in row-major order.
        boxes: [n, p, 4], in pixels of the maps.

    Returns:
        bool [n]; False for a map that holds NaN or infinity.
    """
    maps = np.asarray(maps)
    n, h, w = maps.shape
    first = maps.reshape(n, h * w).argmax(axis=1)
    points = np.stack([first // w, first % w], axis=1) + 0.5
    return contains(boxes, points) & np.isfinite(maps).all(axis=(1, 2))


def contains(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether points lie in any of some boxes.

    Args:
        boxes: [n, p, 4].
        points: [n, 2], (y, x), the corner of the image being (0, 0).

    Returns:
        bool [n].
    """
    place = points[:, None]
    is_inside: Any = (boxes[..., :2] <= place) & (place < boxes[..., 2:])
    return is_inside.all(axis=2).any(axis=1)


def center_map(size: tuple[int, int]) -> np.ndarray:
    """The baseline that always looks at the middle: a Gaussian, sigma a quarter of each side.

    Args:
        size: (height, width), in pixels.

    Returns:
        float64 [height, width], at most 1.
    """
    rows, columns = ((np.arange(side) + 0.5) / side - 0.5 for side in size)
    return np.exp(-8 * (rows[:, None] ** 2 + columns**2))


def sliding_boxes(
    size: tuple[int, int],
    *,
    shares: Sequence[float] = SHARES,
    ratios: Sequence[float] = RATIOS,
    stride: float = STRIDE,
) -> np.ndarray:
    """Proposals that do not look at the image: boxes of several areas and aspects, everywhere.

    For each share and ratio one box slides from edge to edge in equal steps, none longer than
    `stride` of its side. A box that would be longer than the image is cut to it, corners are
    rounded to whole pixels, and boxes that come twice are left out. The whole image is one of them.
    By default there are 930 to 970 boxes; with steps of a third, every box of one of their sizes
    has an IoU above 0.53 with one of them, but for rounding.

    Args:
        size: (height, width) of the image, in pixels.
        shares: of the image's area, each in (0, 1].
        ratios: height over width, in pixels, each above 0.
        stride: in (0, 1].

    Returns:
        float64 [m, 4], small boxes first, then from the upper left to the lower right.

    Raises:
        ValueError: a value out of range.
    """
    height, width = size
    if min(height, width) < 1 or not (0 < min(shares) and max(shares) <= 1 and 0 < stride <= 1):
        raise ValueError(
            f"size {tuple(size)}, shares {tuple(shares)}, stride {stride}; expected at least 1 "
            "pixel, and shares and stride in (0, 1]"
        )
    if not 0 < min(ratios):
        raise ValueError(f"ratios {tuple(ratios)}; expected numbers above 0, such as 0.5")
    boxes = []
    for share in sorted(shares):
        for ratio in ratios:
            area = share * height * width
            tall, wide = min((area * ratio) ** 0.5, height), min((area / ratio) ** 0.5, width)
            tops, lefts = _starts(tall, height, stride), _starts(wide, width, stride)
            y0, x0 = (axis.ravel() for axis in np.meshgrid(tops, lefts, indexing="ij"))
            boxes.append(np.stack([y0, x0, y0 + tall, x0 + wide], axis=1))
    rounded = np.rint(np.concatenate([*boxes, [[0, 0, height, width]]]))
    rounded = rounded[ops_boxes.area(rounded) > 0]
    _, first = np.unique(rounded, axis=0, return_index=True)
    return rounded[np.sort(first)]


def _starts(side: float, length: int, stride: float) -> np.ndarray:
    """Where a side of a sliding box begins, from one edge of the image to the other."""
    return np.linspace(0, length - side, 1 + int(np.ceil((length - side) / (stride * side) - 1e-9)))

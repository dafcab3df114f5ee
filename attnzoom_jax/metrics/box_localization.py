"""Boxes from maps, and how often they are right; on the host, in NumPy.

Of a map M with positive part P = max(M, 0), the pixels with P > 0 and P >= level stand out, where

    by      level                                          thresholds a
    mean    a mean(P)                                      0 or more
    max     a max(P)                                       in [0, 1]
    energy  the largest at which the pixels that stand     in [0, 1]
            out hold at least a share a of sum(P)

The box of the map is the smallest one around them, the whole image where none is left:

    region  box
    all     around all of them
    largest around the connected component with the most pixels
    each    one around every component; the best of them counts

It is right where its IoU with one of the true boxes of the class reaches 1/2.

    overlap = overlaps(maps, sizes, boxes, thresholds)          # [n, t], each example for itself
    threshold = best_threshold(held_out_overlap, thresholds)    # never on the data it then scores
    localization_errors(overlap[:, i], ranks)                   # i the place of that threshold
    max_box_acc(overlap, thresholds)                            # the best of all thresholds

The WSOL protocol (Choe et al. 2020, arXiv 2001.07437) takes normalised maps
(`ops.maps.normalize(maps, "min_max")`), by="max", and region="largest", or "each" in its second
version, arXiv 2007.04178. Their code rounds maps to 256 levels, asks for more than the level where
this asks for at least the level, measures components by the area within their outline, takes the
outlines of holes for components too, and counts every box a pixel longer on both axes.

Excitation Backprop (Zhang et al. 2016, arXiv 1608.00507, section 4.2) takes by="mean". Whoever
thresholds maps before they are enlarged passes true boxes in pixels of the map (`ops.boxes.scale`):
the IoU is the same.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops import boxes as ops_boxes

BY = ("mean", "max", "energy")
REGIONS = ("all", "largest", "each")
CONNECTIVITY = (4, 8)
THRESHOLDS = np.arange(100) / 100  # of MaxBoxAcc; its authors take 1000
IOU = 0.5
IOUS = (0.3, 0.5, 0.7)


def map_boxes(
    map_: np.ndarray,
    threshold: float,
    *,
    by: str = "max",
    region: str = "largest",
    connectivity: int = 8,
) -> np.ndarray:
    """The boxes of one map at one threshold.

    Args:
        map_: [h, w], any sign; only the positive part counts.
        threshold: a, see above.
        by: "mean", "max" or "energy".
        region: "all", "largest" or "each". Of components of equal size the first one in row-major
            order of their boxes' corners is the largest.
        connectivity: of a component: 4, across the sides of pixels, or 8, across corners too.

    Returns:
        int [m, 4], in pixels of the map; m is 1 unless region is "each". The whole map where no
        pixel stands out.

    Raises:
        ValueError: a map that holds NaN or infinity, a threshold out of range, unknown `by`,
            `region` or `connectivity`.
    """
    _check_options([threshold], by, region, connectivity)
    map_ = np.asarray(map_)
    if map_.ndim != 2 or not np.isfinite(map_).all():
        raise ValueError(
            f"map of shape {map_.shape}; expected [h, w] without NaN or infinity: count such maps "
            "and leave them out"
        )
    positive, levels = _levels(map_, [threshold], by)
    return _boxes_above(positive, levels[0], region, connectivity)


def overlaps(
    maps: np.ndarray,
    sizes: np.ndarray | None,
    boxes: np.ndarray,
    thresholds: Sequence[float] | np.ndarray = THRESHOLDS,
    *,
    by: str = "max",
    region: str = "largest",
    connectivity: int = 8,
) -> np.ndarray:
    """The best IoU of the boxes of each map with any of its true boxes, at many thresholds.

    Args:
        maps: [n, h, w], each in the upper left corner of the canvas.
        sizes: int [n, 2], (height, width) of each; None where all fill the canvas.
        boxes: [n, p, 4], true ones, in pixels of the maps; empty ones do not count.
        thresholds: [t].
        by, region, connectivity: see `map_boxes`.

    Returns:
        float64 [n, t], in [0, 1]; NaN for an example without a true box, and for a map that holds
        NaN or infinity.

    Raises:
        ValueError: shapes that do not fit, a threshold out of range, unknown options.
    """
    _check_options(thresholds, by, region, connectivity)
    maps, boxes = np.asarray(maps), np.asarray(boxes)
    if maps.ndim != 3 or boxes.ndim != 3 or boxes.shape[::2] != (len(maps), 4):
        raise ValueError(
            f"maps have shape {maps.shape} and boxes {boxes.shape}; expected [n, h, w] and "
            "[n, p, 4]"
        )
    sizes = np.full((len(maps), 2), maps.shape[1:]) if sizes is None else np.asarray(sizes)
    found = np.full((len(maps), len(thresholds)), np.nan)
    for i, (canvas, (h, w), own) in enumerate(zip(maps, sizes, boxes, strict=True)):
        map_, true = canvas[:h, :w], own[ops_boxes.area(own) > 0]
        if len(true) == 0 or not np.isfinite(map_).all():
            continue
        positive, levels = _levels(map_, thresholds, by)
        for j, level in enumerate(levels):
            guessed = _boxes_above(positive, level, region, connectivity)
            found[i, j] = ops_boxes.iou(guessed[:, None], true[None]).max()
    return found


def _levels(
    map_: np.ndarray, thresholds: Sequence[float] | np.ndarray, by: str
) -> tuple[np.ndarray, np.ndarray]:
    """The positive part [h, w] and the level [t] of each threshold; float64."""
    positive = np.maximum(np.asarray(map_, np.float64), 0)
    shares = np.asarray(thresholds, np.float64)
    if by == "mean":
        return positive, shares * positive.mean()
    if by == "max":
        return positive, shares * positive.max()
    falling = np.sort(positive, axis=None)[::-1]
    energy = np.cumsum(falling)
    return positive, falling[np.searchsorted(energy, shares * energy[-1])]


def _boxes_above(positive: np.ndarray, level: float, region: str, connectivity: int) -> np.ndarray:
    stands_out = (positive > 0) & (positive >= level)
    if not stands_out.any():
        return np.array([[0, 0, *positive.shape]])
    if region == "all":
        rows, columns = (np.flatnonzero(stands_out.any(axis=axis)) for axis in (1, 0))
        return np.array([[rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]])
    _, _, components, _ = cv2.connectedComponentsWithStats(
        stands_out.astype(np.uint8), connectivity=connectivity
    )
    x, y, width, height, pixels = components[1:].T.astype(np.int64)  # without the background
    boxes = np.stack([y, x, y + height, x + width], axis=1)
    # The order of the components is OpenCV's own: sorted, so that ties do not depend on it.
    order = np.lexsort((x + width, y + height, x, y, -pixels))
    return boxes[order] if region == "each" else boxes[order[:1]]


def best_threshold(
    overlaps: np.ndarray, thresholds: Sequence[float] | np.ndarray, *, iou: float = IOU
) -> float:
    """The threshold that localises most examples; to be chosen on held-out data.

    Args:
        overlaps: [n, t], of held-out examples.
        thresholds: [t].
        iou: that a box has to reach.

    Returns:
        The first of the best.

    Raises:
        ValueError: no example, or an overlap that is NaN.
    """
    _check_overlaps(overlaps)
    return float(thresholds[int((np.asarray(overlaps) >= iou).mean(axis=0).argmax())])


def max_box_acc(
    overlaps: np.ndarray,
    thresholds: Sequence[float] | np.ndarray,
    *,
    ious: Sequence[float] = IOUS,
) -> dict[str, float]:
    """MaxBoxAcc: the share of right boxes at the best of all thresholds.

    It chooses the threshold on the data that it scores, which is its purpose: methods are compared
    whatever the scale of their maps. What a threshold chosen beforehand gives, say
    `localization_errors`.

    Args:
        overlaps: [n, t], of the maps of the true class.
        thresholds: [t].
        ious: that a box has to reach.

    Returns:
        "max_box_acc_30" and so on, by 100 times the IoU, in [0, 1]; "threshold_30" and so on, the
        first of the best; "max_box_acc", the mean over the IoUs (the second version's score).

    Raises:
        ValueError: no example, or an overlap that is NaN.

    Source: Choe et al. 2020 (arXiv 2001.07437), and 2020 (arXiv 2007.04178) for the mean.
    """
    _check_overlaps(overlaps)
    metrics = {}
    for iou in ious:
        name = f"{100 * iou:g}"
        metrics[f"max_box_acc_{name}"] = float((overlaps >= iou).mean(axis=0).max())
        metrics[f"threshold_{name}"] = best_threshold(overlaps, thresholds, iou=iou)
    metrics["max_box_acc"] = float(np.mean([metrics[f"max_box_acc_{100 * iou:g}"] for iou in ious]))
    return metrics


def localization_errors(
    overlaps: np.ndarray, ranks: np.ndarray, *, iou: float = IOU
) -> dict[str, float]:
    """Localisation errors of boxes from one threshold.

    A guess is a class and the box of that class's map. Of the first one, or five, one has to have
    the true class and a right box; so the map of the true class is all it takes.

    Args:
        overlaps: [n], of the map of the true class.
        ranks: int [n], the place of the true class among the logits, 0 the first.
        iou: that a box has to reach.

    Returns:
        In [0, 1]: "gt_known_error", of the box alone; "top1_error" and "top5_error"; and "count".

    Raises:
        ValueError: no example, an overlap that is NaN, shapes that do not fit.

    Source: Russakovsky et al. 2015 (arXiv 1409.0575), single-object localisation.
    """
    _check_overlaps(overlaps)
    is_right, ranks = np.asarray(overlaps) >= iou, np.asarray(ranks)
    if is_right.ndim != 1 or ranks.shape != is_right.shape:
        raise ValueError(
            f"overlaps have shape {is_right.shape} and ranks {ranks.shape}; expected [n] for both, "
            "one threshold chosen"
        )
    return {
        "gt_known_error": float(1 - is_right.mean()),
        "top1_error": float(1 - (is_right & (ranks < 1)).mean()),
        "top5_error": float(1 - (is_right & (ranks < 5)).mean()),
        "count": len(is_right),
    }


def _check_overlaps(overlaps: np.ndarray) -> None:
    if len(overlaps) == 0:
        raise ValueError("no overlap to score; expected at least one example, check the split")
    missing = np.isnan(overlaps).reshape(len(overlaps), -1).any(axis=1)
    if missing.any():
        raise ValueError(
            f"{missing.sum()} of {len(overlaps)} overlaps are NaN, of examples without a true box "
            "or with NaN in their map; count them, then leave them out or set them to 0"
        )


def _check_options(
    thresholds: Sequence[float] | np.ndarray, by: str, region: str, connectivity: int
) -> None:
    if by not in BY:
        raise unknown_name("threshold by", by, BY)
    if region not in REGIONS:
        raise unknown_name("region", region, REGIONS)
    if connectivity not in CONNECTIVITY:
        raise ValueError(f"connectivity is {connectivity}; expected 4 or 8")
    values = np.asarray(thresholds, np.float64)
    most = np.inf if by == "mean" else 1
    if (
        values.ndim != 1
        or not np.isfinite(values).all()
        or not ((0 <= values) & (values <= most)).all()
    ):
        raise ValueError(
            f"thresholds by {by} are {values.tolist()}; expected numbers "
            f"{'of at least 0' if by == 'mean' else 'in [0, 1]'}"
        )

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from attnzoom_jax.metrics import box_localization
from attnzoom_jax.ops import boxes as ops_boxes

# Two plateaus, one of which touches the other only by a corner.
CORNERS: Any = np.array(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 4, 4, 0, 0, 0],
        [0, 4, 4, 0, 0, 0],
        [0, 0, 0, 2, 0, 0],
        [0, 0, 0, 0, 0, 1],
    ],
    np.float32,
)


def smooth_maps(n, h, w, seed) -> Any:
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.normal(size=(n, h, w)), (0, 1.5, 1.5))


def slow_boxes(map_, threshold, by, region, connectivity):
    """In float64, by sets of pixels and flood fill."""
    positive = {at: max(float(map_[at]), 0.0) for at in np.ndindex(*map_.shape)}
    total = sum(positive.values())
    if by == "mean":
        level = threshold * total / map_.size
    elif by == "max":
        level = threshold * max(positive.values())
    else:
        energy = 0.0
        for level in sorted(positive.values(), reverse=True):
            energy += level
            if energy >= threshold * total - 1e-12:
                break
    left = {at for at, value in positive.items() if value > 0 and value >= level - 1e-12}
    if not left:
        return {(0, 0, *map_.shape)}
    parts = [left] if region == "all" else []
    while region != "all" and left:
        part, queue = set(), [left.pop()]
        while queue:
            y, x = queue.pop()
            part.add((y, x))
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    is_next = connectivity == 8 or 0 in (dy, dx)
                    if is_next and (y + dy, x + dx) in left:
                        left.remove((y + dy, x + dx))
                        queue.append((y + dy, x + dx))
        parts.append(part)
    if region == "largest":
        most = max(len(part) for part in parts)
        parts = [part for part in parts if len(part) == most]  # ties: any of them
    return {
        (
            min(y for y, _ in part),
            min(x for _, x in part),
            max(y for y, _ in part) + 1,
            max(x for _, x in part) + 1,
        )
        for part in parts
    }


@pytest.mark.parametrize("connectivity", box_localization.CONNECTIVITY)
@pytest.mark.parametrize("region", box_localization.REGIONS)
@pytest.mark.parametrize(
    ("by", "thresholds"),
    [("mean", [0, 0.7, 1.5, 9]), ("max", [0, 0.2, 0.55, 1]), ("energy", [0, 0.3, 0.6, 1])],
)
def test_boxes_equal_flood_fill(by, thresholds, region, connectivity):
    for map_ in smooth_maps(6, 9, 11, seed=1):
        for threshold in thresholds:
            got = box_localization.map_boxes(
                map_, threshold, by=by, region=region, connectivity=connectivity
            )
            want = slow_boxes(map_, threshold, by, region, connectivity)
            if region == "largest":
                assert len(got) == 1 and tuple(got[0]) in want
            else:
                assert sorted(map(tuple, got)) == sorted(want)


@pytest.mark.parametrize(
    ("options", "boxes"),
    [
        ({"threshold": 1.0}, [[1, 1, 3, 3]]),
        ({"threshold": 0.5}, [[1, 1, 4, 4]]),  # a level that is met exactly counts
        ({"threshold": 0.5, "connectivity": 4}, [[1, 1, 3, 3]]),
        ({"threshold": 0.25, "region": "all"}, [[1, 1, 5, 6]]),
        ({"threshold": 0.25, "region": "each"}, [[1, 1, 4, 4], [4, 5, 5, 6]]),
        ({"threshold": 0.0, "region": "all"}, [[1, 1, 5, 6]]),  # zeros never stand out
        ({"threshold": 1.0, "by": "mean", "region": "all"}, [[1, 1, 5, 6]]),  # mean 19 / 30
        ({"threshold": 3.0, "by": "mean", "region": "all"}, [[1, 1, 4, 4]]),  # 1.9
        ({"threshold": 7.0, "by": "mean", "region": "all"}, [[0, 0, 5, 6]]),  # 4.43: nothing left
        ({"threshold": 16 / 19, "by": "energy"}, [[1, 1, 3, 3]]),
        ({"threshold": 16.5 / 19, "by": "energy"}, [[1, 1, 4, 4]]),
        ({"threshold": 0.1, "by": "energy"}, [[1, 1, 3, 3]]),  # ties stay together
        ({"threshold": 1.0, "by": "energy", "region": "all"}, [[1, 1, 5, 6]]),
    ],
)
def test_boxes_by_hand(options, boxes):
    assert box_localization.map_boxes(CORNERS, **options).tolist() == boxes


def test_equal_components_take_the_first():
    map_ = np.zeros((6, 8))
    map_[4, 0:2] = map_[1, 5:7] = map_[1:3, 3] = 1
    assert box_localization.map_boxes(map_, 0.5).tolist() == [[1, 3, 3, 4]]
    assert box_localization.map_boxes(map_[:, ::-1], 0.5).tolist() == [[1, 1, 2, 3]]
    assert box_localization.map_boxes(map_[::-1], 0.5).tolist() == [[1, 0, 2, 2]]


@pytest.mark.parametrize("by", box_localization.BY)
@pytest.mark.parametrize("region", box_localization.REGIONS)
def test_empty_maps_give_the_whole_image(by, region):
    for map_ in (np.zeros((4, 5)), np.full((4, 5), -1.0), np.ones((4, 5))):
        got = box_localization.map_boxes(map_, 0.5, by=by, region=region)
        assert got.tolist() == [[0, 0, 4, 5]]


def test_overlaps_of_images_of_different_sizes():
    sizes = np.array([[9, 11], [5, 11], [9, 4], [1, 1]])
    maps = smooth_maps(4, 9, 11, seed=2) + 0.1
    maps[3, 0, 0] = 1.0
    rng = np.random.default_rng(3)
    boxes = np.sort(rng.integers(0, sizes[:, None, None, :] + 1, (4, 2, 2, 2)), axis=2).reshape(
        4, 2, 4
    )
    boxes[:, 0] = [[0, 0, h, w] for h, w in sizes]  # the whole image
    boxes[1, 0] = 0
    boxes[1, 1] = [1, 2, 4, 9]
    thresholds = [0.1, 0.5, 0.9]
    for region in box_localization.REGIONS:
        got = box_localization.overlaps(maps, sizes, boxes, thresholds, region=region)
        for i, (h, w) in enumerate(sizes):
            for j, threshold in enumerate(thresholds):
                found = box_localization.map_boxes(maps[i, :h, :w], threshold, region=region)
                want = max(float(ops_boxes.iou(one, true)) for one in found for true in boxes[i])
                assert got[i, j] == want
        assert (got[3] == 1).all()
    # Whatever lies beyond the image does not count.
    inside = box_localization.overlaps(maps, sizes, boxes, thresholds)
    for canvas, (h, w) in zip(maps, sizes, strict=True):
        canvas[h:], canvas[:, w:] = np.nan, np.nan
    np.testing.assert_array_equal(box_localization.overlaps(maps, sizes, boxes, thresholds), inside)
    alone = box_localization.overlaps(maps[:1], None, boxes[:1], thresholds)
    np.testing.assert_array_equal(alone, inside[:1])


def test_overlaps_do_not_depend_on_the_scale_of_map_and_boxes():
    maps = smooth_maps(5, 6, 7, seed=4)
    boxes = np.tile(np.array([[2, 4, 20, 21]]), (5, 1, 1))  # in an image of 24 x 28 pixels
    large = maps.repeat(4, axis=1).repeat(4, axis=2)
    for by in box_localization.BY:
        got = box_localization.overlaps(large, None, boxes, [0.3, 0.6], by=by)
        small = ops_boxes.scale(boxes, (24, 28), (6, 7))
        np.testing.assert_allclose(
            box_localization.overlaps(maps, None, small, [0.3, 0.6], by=by), got, rtol=1e-12
        )


def test_what_has_no_overlap_is_nan_and_refused_later():
    maps = np.ones((3, 4, 4))
    maps[1, 2, 2] = np.nan
    boxes = np.array([[[0, 0, 4, 4]], [[0, 0, 4, 4]], [[0, 0, 0, 0]]])
    got = box_localization.overlaps(maps, None, boxes, [0.5])
    np.testing.assert_array_equal(got, [[1], [np.nan], [np.nan]])
    with pytest.raises(ValueError, match="2 of 3 overlaps are NaN"):
        box_localization.best_threshold(got, [0.5])
    with pytest.raises(ValueError, match="2 of 3 overlaps are NaN"):
        box_localization.localization_errors(got[:, 0], np.zeros(3))
    with pytest.raises(ValueError, match="2 of 3 overlaps are NaN"):
        box_localization.max_box_acc(got, [0.5])


OVERLAPS = np.array(
    [
        [0.50, 0.69, 0.10],
        [0.30, 0.70, 0.29],
        [0.10, 0.50, 0.90],
        [0.00, 0.49, 0.80],
    ]
)


def test_the_threshold_is_the_first_of_the_best():
    thresholds = [0.2, 0.4, 0.6]
    assert box_localization.best_threshold(OVERLAPS, thresholds) == 0.4
    assert box_localization.best_threshold(OVERLAPS, thresholds, iou=0.7) == 0.6
    assert box_localization.best_threshold(OVERLAPS[2:], thresholds, iou=0.3) == 0.4  # a tie


def test_max_box_acc_by_hand():
    got = box_localization.max_box_acc(OVERLAPS, [0.2, 0.4, 0.6])
    assert got == {
        "max_box_acc_30": 1.0,
        "threshold_30": 0.4,
        "max_box_acc_50": 0.75,
        "threshold_50": 0.4,
        "max_box_acc_70": 0.5,
        "threshold_70": 0.6,
        "max_box_acc": 0.75,
    }


def test_localization_errors_by_hand():
    # Right boxes: the first three, one of them at exactly 0.5.
    got = box_localization.localization_errors(OVERLAPS[:, 1], np.array([0, 4, 5, 0]))
    assert got == {"gt_known_error": 0.25, "top1_error": 0.75, "top5_error": 0.5, "count": 4}
    none = box_localization.localization_errors(OVERLAPS[:, 1], np.array([9, 9, 9, 9]), iou=0.3)
    assert none == {"gt_known_error": 0.0, "top1_error": 1.0, "top5_error": 1.0, "count": 4}


def test_bad_arguments_are_refused():
    map_, maps, boxes = np.ones((2, 2)), np.ones((1, 2, 2)), np.ones((1, 1, 4))
    for options, message in [
        ({"by": "maximum"}, "did you mean 'max'"),
        ({"region": "larges"}, "did you mean 'largest'"),
        ({"connectivity": 6}, "expected 4 or 8"),
        ({"threshold": 1.5}, r"thresholds by max are \[1.5\]; expected numbers in \[0, 1\]"),
        ({"threshold": -1, "by": "mean"}, "of at least 0"),
        ({"threshold": np.nan, "by": "energy"}, "thresholds by energy"),
    ]:
        with pytest.raises(ValueError, match=message):
            box_localization.map_boxes(map_, **{"threshold": 0.5, **options})
    with pytest.raises(ValueError, match="without NaN or infinity"):
        box_localization.map_boxes(np.full((2, 2), np.nan), 0.5)
    with pytest.raises(ValueError, match=r"boxes \(1, 4\); expected"):
        box_localization.overlaps(maps, None, boxes[0])
    with pytest.raises(ValueError, match="at least one example"):
        box_localization.best_threshold(np.zeros((0, 2)), [0.1, 0.2])
    with pytest.raises(ValueError, match="one threshold chosen"):
        box_localization.localization_errors(OVERLAPS, np.zeros(4))

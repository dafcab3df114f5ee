from typing import Any

import numpy as np
import pytest

from attnzoom_jax.metrics import phrases
from attnzoom_jax.metrics.phrases import (
    box_scores,
    contains,
    overlaps,
    pointing_hits,
    recall_hits,
    sliding_boxes,
    union_boxes,
)

EMPTY = (0, 0, 0, 0)


def random_boxes(rng, shape, size, *, whole) -> np.ndarray:
    corners = np.sort(rng.uniform(-2, max(size) + 2, (*shape, 2, 2)), axis=-1)  # [..., yx, lowhigh]
    corners = np.round(corners) if whole else corners
    return np.stack([corners[..., i, j] for j in (0, 1) for i in (0, 1)], axis=-1)


def slow_score(map_, box, gamma):
    """Pixel by pixel, each by the share of it that lies in the box."""
    h, w = map_.shape
    y0, x0, y1, x1 = np.clip(box, 0, (h, w, h, w))
    total = 0.0
    for y in range(h):
        for x in range(w):
            share = max(min(y1, y + 1) - max(y0, y), 0) * max(min(x1, x + 1) - max(x0, x), 0)
            total += share * max(float(map_[y, x]), 0)
    area = max(y1 - y0, 0) * max(x1 - x0, 0)
    return total / area**gamma if area > 0 else -np.inf


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "fractional"])
@pytest.mark.parametrize("gamma", [0, 0.5, 1.3])
def test_scores_equal_a_loop(whole, gamma):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, 7, 10)).astype(np.float32)
    boxes = random_boxes(rng, (3, 40), (7, 10), whole=whole)
    boxes[0, 0], boxes[1, 1], boxes[2, 2] = EMPTY, (3, 5, 3, 9), (20, 20, 30, 30)
    expected = [
        [slow_score(map_, box, gamma) for box in own] for map_, own in zip(maps, boxes, strict=True)
    ]
    np.testing.assert_allclose(box_scores(maps, boxes, gamma=gamma), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)])
def test_maps_of_one_row_or_column(size):
    maps = np.arange(1, 1 + size[0] * size[1], dtype=float).reshape(1, *size)
    boxes = np.array([[(0, 0, *size), (0, 0, 1, 1), (0, 0, 0.5, 0.5)]])
    expected = [slow_score(maps[0], box, 0.5) for box in boxes[0]]
    np.testing.assert_allclose(box_scores(maps, boxes)[0], expected, rtol=1e-8)


def test_scores_by_hand():
    maps = np.zeros((1, 4, 4))
    maps[0, 1, 1], maps[0, 3, 3], maps[0, 0, 3] = 3, 1, -5
    boxes = np.array([[(1, 1, 2, 2), (0, 0, 2, 2), (0, 0, 4, 4), (3, 3, 4, 4), (0, 3, 1, 4)]])
    np.testing.assert_allclose(box_scores(maps, boxes), [[3, 3 / 2, 4 / 4, 1, 0]], rtol=1e-9)


def test_a_uniform_map_prefers_the_largest_box():
    rng = np.random.default_rng(1)
    boxes = random_boxes(rng, (1, 30), (9, 9), whole=True)
    area = np.prod(np.clip(boxes[..., 2:], 0, 9) - np.clip(boxes[..., :2], 0, 9), axis=-1)
    scores = box_scores(np.full((1, 9, 9), 0.3), boxes)
    has_area = area > 0
    np.testing.assert_allclose(scores[has_area], 0.3 * area[has_area] ** 0.5, rtol=1e-8)


def test_boxes_that_hold_the_same_pixels_tie():
    # In float32 or float64 the sums of these would differ in the last bits.
    rng = np.random.default_rng(2)
    maps = np.zeros((1, 40, 40), np.float32)
    maps[0, 5:9, 5:9] = rng.random((4, 4)) / 3
    maps[0, 20:, 20:] = rng.random((20, 20))
    boxes = np.array([[(y, x, y + 10, x + 10) for y in range(6) for x in range(6)]])
    assert len(np.unique(box_scores(maps, boxes))) == 1


def test_scaled_boxes_keep_ranks_and_overlaps():
    rng = np.random.default_rng(3)
    maps = rng.random((1, 6, 8))
    boxes = random_boxes(rng, (1, 30), (6, 8), whole=False)
    large = maps.repeat(3, axis=1).repeat(5, axis=2)
    factor = np.array([3, 5, 3, 5])
    order = np.argsort(-box_scores(maps, boxes), axis=1, kind="stable")
    larger = np.argsort(-box_scores(large, boxes * factor), axis=1, kind="stable")
    np.testing.assert_array_equal(order, larger)
    true = random_boxes(rng, (1, 2), (6, 8), whole=False)
    np.testing.assert_allclose(overlaps(boxes, true), overlaps(boxes * factor, true * factor))


def test_maps_with_nan_or_infinity_have_no_scores():
    maps = np.ones((3, 2, 2))
    maps[0, 0, 1], maps[1, 1, 1] = np.nan, np.inf
    scores = box_scores(maps, np.broadcast_to(np.array([[(0, 0, 1, 1), EMPTY]]), (3, 2, 4)))
    np.testing.assert_array_equal(scores, [[np.nan] * 2, [np.nan] * 2, [1, -np.inf]])


def slow_recall(scores, proposals, boxes, count, iou, truth):
    """One phrase; sorted by hand, overlaps by counting pixels of whole boxes."""

    def pixels(box):
        y0, x0, y1, x1 = map(int, box)
        return {(y, x) for y in range(y0, y1) for x in range(x0, x1)}

    true = [box for box in boxes if pixels(box)]
    if truth == "union" and true:
        low, high = np.min(true, axis=0)[:2], np.max(true, axis=0)[2:]
        true = [(*low, *high)]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    for i in order[:count]:
        one = pixels(proposals[i])
        for box in true:
            other = pixels(box)
            if len(one & other) >= iou * len(one | other):
                return True
    return False


@pytest.mark.parametrize("truth", phrases.TRUTHS)
@pytest.mark.parametrize("iou", [0.3, 0.5])
def test_recall_equals_a_loop(truth, iou):
    rng = np.random.default_rng(4)
    proposals = random_boxes(rng, (50, 12), (8, 8), whole=True)
    boxes = random_boxes(rng, (50, 3), (8, 8), whole=True)
    boxes[:10, 1:], boxes[3] = EMPTY, EMPTY
    scores = rng.integers(0, 5, (50, 12)).astype(float)  # many ties
    hits = recall_hits(scores, proposals, boxes, at=(1, 3, 12), iou=iou, truth=truth)
    expected = [
        [slow_recall(*one, count, iou, truth) for count in (1, 3, 12)]
        for one in zip(scores, proposals, boxes, strict=True)
    ]
    np.testing.assert_array_equal(hits, expected)
    assert 0 < hits.mean() < 1


def recall_by_hand(scores, **options):
    true = np.array([[(0, 0, 4, 4), (0, 4, 4, 8)]])
    first, other = (0, 0, 4, 4), (20, 20, 24, 24)
    return recall_hits(np.array([scores]), np.array([[other, first, EMPTY]]), true, **options)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, -np.inf], [True, True]),
        ([2.0, 1.0, -np.inf], [False, True]),
        ([1.0, 1.0, -np.inf], [False, True]),  # a tie: the first one comes first
        ([np.nan] * 3, [False, False]),
    ],
    ids=["first", "second", "tie", "nan"],
)
def test_recall_by_hand(scores, expected):
    assert recall_by_hand(scores, at=(1, 5), truth="any").tolist() == [expected]
    # The union is twice as large: an IoU of exactly 1/2 is right, more would not be.
    assert recall_by_hand(scores, at=(1, 5), truth="union").tolist() == [expected]
    strict = recall_by_hand(scores, at=(1, 5), truth="union", iou=0.51)
    assert strict.tolist() == [[False, False]]


def test_no_proposals_and_no_true_box():
    none = np.zeros((2, 0, 4))
    assert box_scores(np.ones((2, 3, 3)), none).shape == (2, 0)
    true = np.array([[(0, 0, 1, 1)]] * 2)
    assert not recall_hits(np.zeros((2, 0)), none, true).any()
    assert not recall_hits(np.ones((2, 1)), true, none).any()
    assert not overlaps(true, none, truth="any").any()
    np.testing.assert_array_equal(union_boxes(none), np.zeros((2, 4)))


def test_pointing():
    maps = np.zeros((4, 3, 4))
    maps[0, 1, 2] = maps[0, 2, 0] = 1  # a tie: the first one in row-major order
    maps[1, 1, 2] = 1
    maps[2, 1, 2], maps[2, 0, 0] = 1, np.nan
    boxes = np.array(
        [
            [(1, 2, 2, 3), EMPTY],
            [(1.6, 2, 3, 4), (0, 0, 2, 2)],
            [(0, 0, 3, 4), EMPTY],
            [EMPTY, (0, 0, 0.6, 0.6)],
        ]
    )
    # The third map holds NaN; the fourth is empty and points at its first pixel.
    assert pointing_hits(maps, boxes).tolist() == [True, False, False, True]
    assert contains(boxes[:1], np.array([[2.0, 2.5]])).tolist() == [False]
    assert contains(boxes[:1], np.array([[1.0, 2.5]])).tolist() == [True]


@pytest.mark.parametrize("size", [(64, 64), (30, 90), (500, 333), (3, 2), (1, 1)])
def test_sliding_boxes_lie_in_the_image(size):
    boxes = sliding_boxes(size)
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    np.testing.assert_array_equal(boxes, np.round(boxes))
    assert (boxes == (0, 0, *size)).all(axis=1).any()
    # As many at one edge as at the other.
    assert (boxes[:, 0] == 0).sum() == (boxes[:, 2] == size[0]).sum()


def test_every_box_of_a_sliding_size_is_met():
    """With steps of a third of a side the nearest one is a sixth away: (5/6)^2 of both at worst."""
    rng = np.random.default_rng(5)
    size = (300, 300)
    boxes = sliding_boxes(size, shares=(0.04, 0.16), ratios=(1.0,))
    for side in (60, 120):
        low = rng.uniform(0, 300 - side, (1, 200, 2))
        true = np.concatenate([low, low + side], axis=2)
        best = overlaps(boxes[None], true[0][:, None]).max(axis=1)
        assert best.min() > 25 / 47 - 1e-9


def test_sliding_sizes_by_hand():
    boxes = sliding_boxes((20, 40), shares=(0.25,), ratios=(0.5,), stride=0.5)
    # 10 x 20 pixels, steps of 5 and 10.
    expected = [(y, x, y + 10, x + 20) for y in (0, 5, 10) for x in (0, 10, 20)]
    np.testing.assert_array_equal(boxes, [*expected, (0, 0, 20, 40)])
    # Too wide for the image: cut to it.
    (box,) = sliding_boxes((20, 40), shares=(1.0,), ratios=(0.125,), stride=1.0)[:1]
    np.testing.assert_array_equal(box, [0, 0, 10, 40])


def test_the_center_map():
    map_ = phrases.center_map((4, 6))
    np.testing.assert_allclose(map_, map_[::-1, ::-1])
    assert map_.argmax() == 1 * 6 + 2
    # Rows lie half a sigma and one and a half from the middle, sigma being a quarter of the side.
    expected = np.exp([-1.125, -0.125, -0.125, -1.125])
    np.testing.assert_allclose(phrases.center_map((4, 1))[:, 0], expected)


def bad(name) -> Any:
    maps, boxes, scores = np.ones((2, 3, 3)), np.ones((2, 5, 4)), np.ones((2, 5))
    return {
        "boxes": lambda: box_scores(maps, boxes[:1]),
        "gamma": lambda: box_scores(maps, boxes, gamma=-1),
        "scores": lambda: recall_hits(scores[:, 1:], boxes, boxes),
        "at": lambda: recall_hits(scores, boxes, boxes, at=(0, 1)),
        "truth": lambda: recall_hits(scores, boxes, boxes, truth="unoin"),
        "pixels": lambda: box_scores(np.ones((1, 4096, 4096), np.int8), boxes[:1]),
        "shares": lambda: sliding_boxes((5, 5), shares=(0.5, 1.5)),
        "ratios": lambda: sliding_boxes((5, 5), ratios=(0.0,)),
        "size": lambda: sliding_boxes((5, 0)),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boxes", r"maps have shape \(2, 3, 3\) and boxes \(1, 5, 4\)"),
        ("gamma", "gamma is -1; expected a number of at least 0"),
        ("scores", r"scores have shape \(2, 4\)"),
        ("at", r"at is \(0, 1\)"),
        ("truth", "unknown truth 'unoin'; did you mean 'union'"),
        ("pixels", "4096 x 4096 pixels; expected at most"),
        ("shares", r"shares \(0.5, 1.5\)"),
        ("ratios", r"ratios \(0.0,\); expected numbers above 0"),
        ("size", r"size \(5, 0\)"),
    ],
)
def test_bad_input(name, message):
    with pytest.raises(ValueError, match=message):
        bad(name)()

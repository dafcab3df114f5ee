"""Scores of maps made by hand, and what a table says of them."""

import numpy as np
import pytest

from attnzoom_jax.evaluation.cues import canvas_of
from attnzoom_jax.evaluation.map_scores import (
    Boxes,
    Energy,
    Pointing,
    View,
    baseline_maps,
    blurred,
    is_gradient,
    mean_scores,
)
from attnzoom_jax.evaluation.rows import parse_rows
from attnzoom_jax.ops import boxes as ops_boxes

FEW = {"resamples": 50, "seed": 0}


def view(maps, boxes, sizes, *, row="grad_cam", size=(8, 8), truth=None):
    """Maps [n, h', w'] with one box each, in pixels of the stored images."""
    maps = np.asarray(maps, np.float32)
    boxes = np.asarray(boxes, np.float32).reshape(len(maps), -1, 4)
    batch = {
        "image": np.zeros((len(maps), *size, 3), np.uint8),
        "size": np.asarray(sizes, np.int32),
        "boxes": boxes,
    }
    if truth is not None:
        batch["truth"] = truth
    (row,) = parse_rows([row], baselines=("center", "uniform"))
    return View(row, maps, batch)


def cues(images, classes, difficult=None, ranks=None):
    n = len(images)
    return {
        "image": np.array(images),
        "class": np.array(classes),
        "difficult": np.zeros(n, bool) if difficult is None else np.array(difficult),
        "rank": np.zeros(n, int) if ranks is None else np.array(ranks),
    }


def peaks(*places, size=(8, 8)):
    maps = np.zeros((len(places), *size), np.float32)
    for map_, place in zip(maps, places, strict=True):
        map_[place] = 1
    return maps


# Pointing


def test_pointing_is_measured_in_pixels_of_each_image():
    """The same map, box and tolerance; the second image is ten times as large."""
    maps = peaks((1, 1), (1, 1))
    sizes = [(8, 8), (80, 80)]
    boxes = [(1, 5, 8, 8), (10, 50, 80, 80)]  # 4 pixels to the right of the peak, and about 36
    found = Pointing(1, tolerance=5).measure(view(maps, boxes, sizes))
    assert found["hit"].tolist() == [1, 0]
    assert Pointing(1, tolerance=40).measure(view(maps, boxes, sizes))["hit"].tolist() == [1, 1]


def test_pointing_at_exactly_the_tolerance():
    maps, boxes = peaks((0, 0)), [(0, 5, 8, 8)]
    for inclusive, expected in ((False, 0), (True, 1)):
        kind = Pointing(1, tolerance=5.0, inclusive=inclusive)
        assert kind.measure(view(maps, boxes, [(8, 8)]))["hit"].tolist() == [expected]


def test_pointing_at_masks_equals_pointing_at_their_boxes():
    rng = np.random.default_rng(0)
    maps, sizes = rng.random((6, 5, 7)), np.array([(20, 30), (64, 9), (12, 70)] * 2)
    corners = np.sort(rng.integers(0, 9, (6, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1], axis=1).astype(np.float32)
    truth = ops_boxes.to_mask(boxes[:, None], canvas_of(sizes))
    by_boxes = Pointing(1, tolerance=6).measure(view(maps, boxes, sizes))["hit"]
    by_masks = Pointing(1, tolerance=6).measure(view(maps, boxes, sizes, truth=truth))["hit"]
    np.testing.assert_array_equal(by_boxes, by_masks)
    assert 0 < by_boxes.sum() < 6


def test_the_center_points_at_the_middle_and_uniform_nowhere():
    maps, boxes, sizes = np.ones((2, 8, 8)), [(4, 4, 5, 5), (0, 0, 1, 1)], [(8, 8)] * 2
    hits = Pointing(1, tolerance=1).measure(view(maps, boxes, sizes, row="center"))["hit"]
    assert hits.tolist() == [1, 0]
    hits = Pointing(1, tolerance=1).measure(view(maps, boxes, sizes, row="uniform"))["hit"]
    assert np.isnan(hits).all()


def test_a_map_with_nan_misses_and_an_empty_one_points_at_the_first_pixel():
    maps = peaks((0, 0), (0, 0), (0, 0))
    maps[1, 3, 3], maps[2] = np.nan, -1
    found = Pointing(1, tolerance=1).measure(view(maps, [(0, 0, 2, 2)] * 3, [(8, 8)] * 3))
    assert found["hit"].tolist() == [1, 0, 1]  # all negative: the positive part is constant
    missing = Pointing(1, tolerance=1, empty="miss")
    found = missing.measure(view(maps, [(0, 0, 2, 2)] * 3, [(8, 8)] * 3))
    assert found["hit"].tolist() == [1, 0, 0]


def test_gradients_are_blurred_before_they_point():
    """One bright pixel far away against a block of dimmer ones: the block wins once blurred."""
    maps = peaks((2, 60), size=(64, 64))
    maps[0, 40:50, 5:15] = 0.8
    at_block = [(40, 5, 50, 15)]
    for row, expected in (("gradient", 1), ("grad_cam", 0)):
        seen = view(maps, at_block, [(64, 64)], row=row, size=(64, 64))
        assert Pointing(1, tolerance=1).measure(seen)["hit"].tolist() == [expected]
    seen = view(maps, at_block, [(64, 64)], row="gradient", size=(64, 64))
    assert Pointing(1, tolerance=1, blur=0).measure(seen)["hit"].tolist() == [0]


def test_blur_against_a_slow_sum():
    rng = np.random.default_rng(1)
    maps, (h, w), share = rng.random((1, 12, 16)).astype(np.float32), (9, 14), 0.1
    sigma, radius = share * 14, int(np.ceil(4 * share * 14))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    expected = np.zeros((12, 16))
    for y in range(h):
        for x in range(w):
            rows = np.clip(y + np.arange(-radius, radius + 1), 0, h - 1)
            columns = np.clip(x + np.arange(-radius, radius + 1), 0, w - 1)
            expected[y, x] = kernel @ maps[0].astype(np.float64)[rows][:, columns] @ kernel
    np.testing.assert_allclose(blurred(maps, np.array([(h, w)]), share)[0], expected, atol=1e-6)


def test_which_methods_are_gradients_at_the_image():
    names = (
        "gradient",
        "smooth_grad",
        "guided_backprop",
        "linear_approximation",
        "grad_cam",
        "rise",
    )
    assert [is_gradient(name) for name in names] == [True, True, True, False, False, False]


def test_accuracy_is_the_mean_over_classes():
    values = {"hit": np.array([1, 1, 1, 0.0])}
    found = Pointing(4).summarize(values, cues([0, 0, 1, 1], [2, 2, 2, 0]), **FEW)
    assert found["pointing"].value == pytest.approx(0.5)  # class 2: 3 of 3, class 0: 0 of 1
    assert found["pointing"].count == 4
    assert "pointing_difficult" not in found
    found = Pointing(4, untested="zero").summarize(values, cues([0, 0, 1, 1], [2, 2, 2, 0]), **FEW)
    assert found["pointing"].value == pytest.approx(0.25)


def test_the_difficult_subset_stands_for_itself():
    values = {"hit": np.array([1, 0, 1.0])}
    found = Pointing(1).summarize(values, cues([0, 1, 2], [0] * 3, [False, True, True]), **FEW)
    assert found["pointing_difficult"].value == pytest.approx(0.5)
    assert found["pointing_difficult"].count == 2
    assert found["pointing"].low <= found["pointing"].value <= found["pointing"].high


# Energy


def test_energy_by_boxes_and_by_masks():
    """Truth is the left half, in an image of another size and aspect; the map has 3 of 4 there."""
    maps = np.zeros((1, 2, 2))
    maps[0] = [[3, 1], [3, 1]]
    sizes, box = np.array([(20, 40)]), [(0, 0, 20, 20)]
    found = Energy().measure(view(maps, box, sizes, size=(2, 2)))
    assert found["energy"] == pytest.approx(0.75)
    assert found["rank_accuracy"] == pytest.approx(1)
    truth = ops_boxes.to_mask(np.array([box], np.float32), canvas_of(sizes))
    by_mask = Energy().measure(view(maps, box, sizes, size=(2, 2), truth=truth))
    assert by_mask["energy"] == pytest.approx(0.75)


def test_the_uniform_baseline_has_the_share_of_the_box():
    maps, box = baseline_maps("uniform", 1, (8, 8)), [(0, 0, 8, 16)]
    found = Energy().measure(view(maps, box, [(16, 16)], row="uniform"))
    assert found["energy"] == pytest.approx(0.5)
    assert found["rank_accuracy"] == pytest.approx(0.5)


def test_nan_is_left_out_of_means_and_seen_in_the_count():
    maps = np.ones((2, 8, 8))
    maps[1, 0, 0] = np.nan
    values = Energy().measure(view(maps, [(0, 0, 8, 4)] * 2, [(8, 8)] * 2))
    found = Energy().summarize(values, cues([0, 1], [0, 0]), **FEW)
    assert found["energy"].value == pytest.approx(0.5)
    assert found["energy"].count == 1


def test_means_of_nothing_are_absent():
    assert mean_scores({"a": np.array([np.nan])}, np.array([0]), **FEW) == {}


def test_center_has_its_peak_in_the_middle():
    maps = baseline_maps("center", 2, (6, 10))
    assert maps.shape == (2, 6, 10)
    np.testing.assert_allclose(maps, maps[:, ::-1, ::-1])
    assert np.unravel_index(maps[0].argmax(), (6, 10)) in {(2, 4), (2, 5), (3, 4), (3, 5)}


# Boxes


def blocks(*extents, size=(16, 16)):
    maps = np.full((len(extents), *size), 0.1, np.float32)
    for map_, (y0, x0, y1, x1) in zip(maps, extents, strict=True):
        map_[y0:y1, x0:x1] = 1
    return maps


def test_box_of_what_stands_out_in_pixels_of_the_stored_image():
    maps = blocks((0, 0, 8, 8))
    twice = view(maps, [(0, 0, 16, 16)], [(32, 32)], size=(16, 16))
    values = Boxes(thresholds=(0.0, 0.5)).measure(twice)
    assert values["overlap"].tolist() == [[0.25, 1.0]]


def test_before_or_after_the_map_is_enlarged():
    maps, box = np.array([[[1, 0.0], [0, 0]]]), [(0, 0, 8, 8)]
    seen = view(maps, box, [(16, 16)], size=(16, 16))
    assert Boxes(at="map", thresholds=(0.5,)).measure(seen)["overlap"].tolist() == [[1]]
    assert Boxes(at="input", thresholds=(0.9,)).measure(seen)["overlap"][0, 0] < 1


def test_max_box_acc_takes_the_best_threshold_and_errors_that_of_the_other_half():
    """Even images are right at the first threshold, odd ones at the second."""
    overlap = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]], float)
    found = Boxes(thresholds=(0.2, 0.4)).summarize(
        {"overlap": overlap}, cues(range(5), [0] * 5), **FEW
    )
    assert found["max_box_acc"].value == pytest.approx(3 / 5)
    assert found["box_error"].value == pytest.approx(1)
    given = Boxes(thresholds=(0.2, 0.4), threshold=0.2)
    found = given.summarize({"overlap": overlap}, cues(range(5), [0] * 5), **FEW)
    assert found["box_error"].value == pytest.approx(2 / 5)


def test_errors_with_the_class_and_mean_over_overlaps():
    overlap = np.array([[0.8], [0.6], [0.4], [0.2]])
    kind = Boxes(thresholds=(0.5,), threshold=0.5)
    found = kind.summarize({"overlap": overlap}, cues(range(4), [0] * 4, ranks=[0, 3, 0, 0]), **FEW)
    assert found["box_error"].value == pytest.approx(0.5)
    assert found["box_error_top1"].value == pytest.approx(0.75)
    assert found["box_error_top5"].value == pytest.approx(0.5)
    assert found["max_box_acc"].value == pytest.approx(0.5)
    assert found["max_box_acc_mean"].value == pytest.approx((3 / 4 + 2 / 4 + 1 / 4) / 3)


def test_one_image_alone_has_no_other_half_to_choose_a_threshold():
    found = Boxes().summarize({"overlap": np.ones((1, 20))}, cues([4], [0]), **FEW)
    assert set(found) == {"max_box_acc", "max_box_acc_mean"}
    found = Boxes(threshold=0.5).summarize({"overlap": np.ones((1, 20))}, cues([4], [0]), **FEW)
    assert found["box_error"] == (0, 0, 0, 1)


def test_a_threshold_outside_of_the_list_joins_it():
    assert Boxes(threshold=0.33).measure(
        view(blocks((0, 0, 8, 8)), [(0, 0, 8, 8)], [(16, 16)], size=(16, 16))
    )["overlap"].shape == (1, 21)


def test_nan_maps_have_no_box():
    maps = blocks((0, 0, 8, 8))
    maps[0, 0, 0] = np.nan
    seen = view(maps, [(0, 0, 8, 8)], [(16, 16)], size=(16, 16))
    assert not Boxes().measure(seen)["overlap"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "image"}, "boxes.at is 'image'"),
        ({"threshold": "best"}, "boxes.threshold is 'best'"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        Boxes(**options)

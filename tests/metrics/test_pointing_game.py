from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import ndimage

from attnzoom_jax.metrics import pointing_game
from attnzoom_jax.ops import boxes as ops_boxes
from attnzoom_jax.ops import maps as ops_maps

CANVAS = (40, 50)
resize_each = jax.jit(ops_maps.resize_each, static_argnums=2)
get_points = jax.jit(pointing_game.points, static_argnames="empty")


def one_peak(at, size=(40, 40)) -> Any:
    return jnp.zeros((1, *size)).at[0, at[0], at[1]].set(1.0)


def some_boxes(n, p, sizes, rng) -> Any:
    """Boxes inside of images of many sizes, some of them empty."""
    ends = np.sort(rng.integers(0, sizes[:, None, None, :] + 1, (n, p, 2, 2)), axis=2)
    return ends.reshape(n, p, 4) * (rng.random((n, p, 1)) < 0.7)


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize(
    ("apart", "tolerance", "inclusive", "hit"),
    [
        ((0, 15), 15.0, False, False),  # exactly 15.0 pixels
        ((0, 15), 15.0, True, True),
        ((9, 12), 15.0, False, False),  # 9, 12, 15
        ((9, 12), 15.0, True, True),
        ((0, 14), 15.0, False, True),
        ((0, 16), 15.0, True, False),
        ((9, 12), 15.001, False, True),
        ((11, 11), 15.0, True, False),  # a box grown by 15 would have it
        ((0, 0), 0.0, False, True),
        ((0, 1), 0.0, True, False),
    ],
)
def test_a_point_at_a_known_distance(kind, apart, tolerance, inclusive, hit):
    points = pointing_game.points(one_peak((3, 4)))
    box: Any = np.array([3 + apart[0], 4 + apart[1], 30, 30])  # its first pixel is the nearest
    options = {"tolerance": tolerance, "inclusive": inclusive}
    if kind == "box":
        got = pointing_game.hits_boxes(points, box[None, None], **options)
    else:
        mask = ops_boxes.to_mask(box[None], (40, 40))
        got = pointing_game.hits_masks(points, mask[None], **options)
    assert got.tolist() == [hit]


def test_the_far_side_of_a_half_open_box():
    boxes: Any = np.array([[[0, 0, 10, 10]]])  # the last pixels are row 9 and column 9
    for x, strict, inclusive in [
        (9, True, True),
        (23, True, True),
        (24, False, True),
        (25, False, False),
    ]:
        points = jnp.array([[5.0, x]])
        assert pointing_game.hits_boxes(points, boxes).tolist() == [strict]
        assert pointing_game.hits_boxes(points, boxes, inclusive=True).tolist() == [inclusive]


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("tolerance", [0, 1, 2.5, np.sqrt(2), np.sqrt(2.5), 15])
def test_boxes_and_masks_equal_a_search(tolerance, inclusive):
    rng = np.random.default_rng(3)
    n = 200
    sizes = rng.integers(5, CANVAS, (n, 2))
    boxes = some_boxes(n, 3, sizes, rng) // 2
    points: Any = np.floor(rng.random((n, 2)) * sizes).astype(np.float32)
    points[100:] += rng.integers(0, 2, (100, 2)) / 2
    masks = ops_boxes.to_mask(boxes, CANVAS)
    want = []
    for (y, x), mask in zip(points.astype(np.float64), masks, strict=True):
        rows, columns = np.nonzero(mask)
        distances = np.hypot(rows - y, columns - x)
        near = distances <= tolerance if inclusive else distances < tolerance
        on = (abs(rows - y) <= 0.5) & (abs(columns - x) <= 0.5)
        want.append(bool((near | on).any()))
    assert 0 < sum(want) < n
    options = {"tolerance": tolerance, "inclusive": inclusive}
    for metric, truth in ((pointing_game.hits_boxes, boxes), (pointing_game.hits_masks, masks)):
        jitted = jax.jit(metric, static_argnames=("tolerance", "inclusive"))
        np.testing.assert_array_equal(jitted(points, truth, **options), want)


def test_a_box_grown_by_the_tolerance_has_round_corners():
    mask: Any = np.zeros((60, 60), bool)
    mask[20:40, 25:30] = True
    y, x = np.indices(mask.shape).reshape(2, -1)
    points: Any = np.stack([y, x], axis=1)
    boxes: Any = np.broadcast_to([20, 25, 40, 30], (len(points), 1, 4))
    distances: Any = ndimage.distance_transform_edt(~mask)
    got = pointing_game.hits_boxes(points, boxes)
    np.testing.assert_array_equal(got, (distances < 15).ravel())


def test_images_of_different_sizes_in_one_batch():
    rng = np.random.default_rng(4)
    sizes = np.array([[40, 50], [13, 50], [40, 7], [21, 34], [1, 1]])
    maps = jnp.float32(rng.normal(size=(5, 4, 6)))
    boxes = some_boxes(5, 2, sizes, rng)
    boxes[4] = 0

    @jax.jit
    def of_batch(maps, sizes, boxes) -> Any:
        points = pointing_game.points(ops_maps.resize_each(maps, sizes, CANVAS), sizes)
        return points, pointing_game.hits_boxes(points, boxes, tolerance=5.0)

    points, hits = of_batch(maps, sizes, boxes)
    for i, (h, w) in enumerate(sizes):  # each on its own, without a canvas
        alone = np.asarray(resize_each(maps[i : i + 1], sizes[i : i + 1], (h, w)))[0]
        peak = np.unravel_index(alone.argmax(), alone.shape)
        np.testing.assert_array_equal(points[i], peak)
        # `resize` rounds the values of a plateau: the peak need not be the same, its height is.
        like_others = np.asarray(ops_maps.resize(maps[i : i + 1], (h, w)))[0]
        np.testing.assert_allclose(like_others[peak], like_others.max(), rtol=1e-5)
        mask = ops_boxes.to_mask(boxes[i], (h, w))
        distances: Any = ndimage.distance_transform_edt(~mask)
        assert bool(hits[i]) == bool(mask.any() and distances[peak] < 5)


def test_a_negative_map_does_not_point_beyond_its_image():
    maps = jnp.zeros((1, 6, 6)).at[0, :3, :4].set(-5.0).at[0, 2, 1].set(-1.0)
    assert pointing_game.points(maps, np.array([[3, 4]])).tolist() == [[2, 1]]


def test_ties_take_the_first_maximum_also_after_resizing():
    maps = jnp.zeros((2, 2, 2)).at[0, 0, 1].set(1.0).at[0, 1, 0].set(1.0).at[1, 1].set(1.0)
    assert pointing_game.points(maps).tolist() == [[0, 1], [1, 0]]
    # A corner cell has a plateau that starts at the border, a whole row one at the left.
    sizes = np.array([[12, 20], [18, 10]])
    big = resize_each(maps, sizes, (18, 20))
    assert get_points(big, sizes).tolist() == [[0, 15], [13, 0]]


@pytest.mark.parametrize(("empty", "point"), [("first", [0, 0]), ("miss", [-1, -1])])
def test_empty_and_broken_maps(empty, point):
    maps = jnp.stack([jnp.zeros((3, 3)), jnp.full((3, 3), -2.0), jnp.eye(3).at[1, 1].set(jnp.nan)])
    sizes = np.array([[14, 9], [3, 17], [10, 10]])
    big = resize_each(maps, sizes, (14, 17))
    points = get_points(big, sizes, empty=empty)
    assert points.tolist() == [point, point, [-1, -1]]
    assert pointing_game.is_empty(big, sizes).tolist() == [True, True, False]
    whole: Any = np.concatenate([np.zeros((3, 2), int), sizes], axis=1)[:, None]
    hits = [empty == "first"] * 2 + [False]
    assert pointing_game.hits_boxes(points, whole).tolist() == hits
    assert pointing_game.hits_masks(points, ops_boxes.to_mask(whole, (14, 17))).tolist() == hits


def test_whole_images_are_always_hit_and_nothing_never():
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, CANVAS, (30, 2))
    maps = resize_each(jnp.float32(rng.normal(size=(30, 3, 3))), sizes, CANVAS)
    whole: Any = np.concatenate([np.zeros((30, 2), int), sizes], axis=1)[:, None]
    for points in (get_points(maps, sizes), pointing_game.center_points(sizes)):
        assert pointing_game.hits_boxes(points, whole, tolerance=0).all()
        assert not pointing_game.hits_boxes(points, 0 * whole).any()
        masks = ops_boxes.to_mask(whole, CANVAS)
        assert pointing_game.hits_masks(points, masks, tolerance=0).all()
        assert not pointing_game.hits_masks(points, 0 * masks).any()


def test_the_center_is_half_the_size():
    points = pointing_game.center_points(np.array([[375, 500], [4, 3]]))
    assert points.tolist() == [[187.5, 250], [2, 1.5]]
    # 187.5 + 15 = 202.5: the nearest pixels of a box below lie at 14.5 and at 15.5.
    boxes: Any = np.array([[[202, 0, 375, 500]], [[203, 0, 375, 500]]])
    center = jnp.broadcast_to(points[0], (2, 2))
    assert pointing_game.hits_boxes(center, boxes).tolist() == [True, False]


def test_accuracy_is_the_mean_over_classes():
    hits: Any = np.array([1, 1, 1, 0, 0, 1, 1], bool)
    classes: Any = np.array([0, 0, 0, 0, 2, 2, 1])
    mask: Any = np.array([1, 1, 1, 1, 1, 1, 0])  # the cue of class 1 is padding
    sums = pointing_game.pointing_sums(hits, classes, mask, num_classes=4)
    np.testing.assert_array_equal(sums["hits"], [3, 0, 1, 0])
    np.testing.assert_array_equal(sums["cues"], [4, 0, 2, 0])
    assert pointing_game.pointing_metrics(sums) == {
        "accuracy": (3 / 4 + 1 / 2) / 2,
        "hit_rate": 4 / 6,
        "classes_tested": 2,
        "count": 6,
    }
    zero = pointing_game.pointing_metrics(sums, untested="zero")
    assert zero["accuracy"] == (3 / 4 + 1 / 2) / 4
    halves = [
        pointing_game.pointing_sums(hits[part], classes[part], mask[part], num_classes=4)
        for part in (slice(0, 3), slice(3, 7))
    ]
    added = {name: halves[0][name] + halves[1][name] for name in sums}
    assert pointing_game.pointing_metrics(added) == pointing_game.pointing_metrics(sums)


def test_mean_accuracy_of_resamples():
    hits, cues = np.array([[1, 0, 3], [0, 0, 0]]), np.array([[2, 0, 3], [0, 0, 0]])
    np.testing.assert_array_equal(pointing_game.mean_accuracy(hits, cues), [0.75, np.nan])
    np.testing.assert_array_equal(
        pointing_game.mean_accuracy(hits, cues, untested="zero"), [0.5, 0]
    )


def test_four_devices_count_what_one_counts():
    rng = np.random.default_rng(6)
    sizes = rng.integers(5, CANVAS, (16, 2))
    boxes = some_boxes(16, 2, sizes, rng)
    maps = rng.normal(size=(16, 4, 5)).astype(np.float32)
    batch = (maps, sizes, boxes, rng.integers(0, 3, 16), np.arange(16) < 14)

    def of_batch(maps, sizes, boxes, classes, mask) -> Any:
        points = pointing_game.points(ops_maps.resize_each(maps, sizes, CANVAS), sizes)
        hits = pointing_game.hits_boxes(points, boxes)
        return points, pointing_game.pointing_sums(hits, classes, mask, num_classes=3)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    parted = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    for one, four in zip(
        jax.tree.leaves(jax.jit(of_batch)(*batch)),
        jax.tree.leaves(jax.jit(of_batch)(*parted)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, four)


def test_a_class_is_asked_about_unless_all_its_boxes_are_hard():
    labels = np.array([3, 1, 3, 7, -1])
    assert pointing_game.cued_classes(labels).tolist() == [1, 3, 7]
    is_hard = np.array([True, True, False, False, False])
    assert pointing_game.cued_classes(labels, is_hard).tolist() == [3, 7]
    assert pointing_game.cued_classes(np.array([-1, -1])).tolist() == []


def test_difficult_cues_are_small_and_not_alone():
    def mask(*boxes) -> Any:
        return ops_boxes.to_mask(np.array(boxes), (10, 10))

    large, quarter, small = mask([0, 0, 6, 6]), mask([5, 5, 10, 10]), mask([0, 0, 4, 6])
    # Twice the same box: the union is what counts.
    twice = mask([0, 0, 4, 6], [0, 0, 4, 6])
    assert pointing_game.difficult_cues({2: large, 5: small}) == {2: False, 5: True}
    assert pointing_game.difficult_cues({2: quarter, 5: twice}) == {2: False, 5: True}
    assert pointing_game.difficult_cues({5: small}) == {5: False}
    assert pointing_game.difficult_cues({}) == {}


def test_a_list_of_difficult_cues_is_read():
    flags = pointing_game.parse_difficult("000001\t0\t1\t1\n\n000004 1 0 0\n", num_classes=3)
    assert {name: own.tolist() for name, own in flags.items()} == {
        "000001": [False, True, True],
        "000004": [True, False, False],
    }
    for bad in ("000001\t0\t1", "000001\t0\t1\t2"):
        with pytest.raises(ValueError, match=r"line 2 of the list .* a name and 3 flags"):
            pointing_game.parse_difficult(f"a 0 0 0\n{bad}", num_classes=3)


def test_bad_arguments_are_refused():
    points, boxes, masks = jnp.zeros((1, 2)), jnp.zeros((1, 1, 4)), jnp.zeros((1, 2, 2))
    for tolerance in (-1, np.inf, np.nan):
        with pytest.raises(ValueError, match="tolerance is"):
            pointing_game.hits_boxes(points, boxes, tolerance=tolerance)
        with pytest.raises(ValueError, match="tolerance is"):
            pointing_game.hits_masks(points, masks, tolerance=tolerance)
    with pytest.raises(ValueError, match=r"boxes \(1, 4\); expected \[n, 2\] and \[n, p, 4\]"):
        pointing_game.hits_boxes(points, boxes[0])
    with pytest.raises(ValueError, match=r"masks \(1, 2, 2\); expected"):
        pointing_game.hits_masks(jnp.zeros((3, 2)), masks)
    with pytest.raises(ValueError, match=r"empty maps 'mis'; did you mean 'miss'"):
        pointing_game.points(masks, empty="mis")
    sums = pointing_game.pointing_sums(
        jnp.zeros(2, bool), jnp.array([1, 5]), jnp.ones(2), num_classes=3
    )
    with pytest.raises(ValueError, match=r"1 cues are of a class outside \[0, 3\)"):
        pointing_game.pointing_metrics(sums)
    with pytest.raises(ValueError, match="no cue was counted"):
        pointing_game.pointing_metrics(
            {"hits": np.zeros(2), "cues": np.zeros(2), "outside": np.zeros(())}
        )
    with pytest.raises(ValueError, match="did you mean 'zero'"):
        pointing_game.mean_accuracy(np.zeros(2), np.ones(2), untested="zeros")

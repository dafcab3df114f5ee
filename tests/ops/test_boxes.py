from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops import boxes as ops_boxes


def random_boxes(n, size, rng, whole=True) -> Any:
    low = rng.uniform(0, 0.7, (n, 2)) * size
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.3, (n, 2)) * size], axis=1)
    return np.round(boxes).astype(int) if whole else boxes


def pixels_of(box, size):
    """Pixel by pixel: inside where the centre is."""
    y0, x0, y1, x1 = box
    h, w = size
    return {(y, x) for y in range(h) for x in range(w) if y0 <= y + 0.5 < y1 and x0 <= x + 0.5 < x1}


def test_iou_equals_counted_pixels():
    boxes = random_boxes(30, (20, 30), np.random.default_rng(0))
    sets = [pixels_of(box, (20, 30)) for box in boxes]
    want = [[len(a & b) / max(len(a | b), 1) for b in sets] for a in sets]
    got = ops_boxes.iou(boxes[:, None], boxes[None])
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert (np.diag(got) == 1).all()
    jitted = jax.jit(ops_boxes.iou)(jnp.asarray(boxes)[:, None], boxes[None])
    np.testing.assert_allclose(jitted, want, rtol=1e-6)


def test_iou_by_hand():
    box = np.array([0, 0, 10, 10])
    others = np.array([[0, 0, 10, 10], [0, 5, 10, 15], [0, 10, 10, 20], [0, 0, 0, 0], [5, 8, 3, 9]])
    np.testing.assert_array_equal(ops_boxes.iou(box, others), [1, 1 / 3, 0, 0, 0])
    np.testing.assert_array_equal(ops_boxes.iou(others[3:], others[3:]), [0, 0])
    np.testing.assert_array_equal(ops_boxes.area(others), [100, 100, 100, 0, 0])


def test_iou_at_the_usual_limits_is_not_rounded_below_them():
    box = np.array([0, 0, 10, 10])
    parts = np.array([[0, 0, 10, 3], [0, 0, 10, 5], [0, 0, 7, 10]])
    assert (ops_boxes.iou(box, parts) >= [0.3, 0.5, 0.7]).all()


def test_scaled_boxes_have_the_same_iou():
    rng = np.random.default_rng(1)
    first, second = (random_boxes(20, (40, 60), rng) for _ in range(2))
    before, after = (40, 60), (14, 7)
    scaled = [ops_boxes.scale(boxes, before, after) for boxes in (first, second)]
    np.testing.assert_allclose(ops_boxes.iou(*scaled), ops_boxes.iou(first, second), rtol=1e-12)
    np.testing.assert_array_equal(
        ops_boxes.scale(np.array([0, 0, 40, 60]), before, after), [0, 0, 14, 7]
    )
    sizes = np.array([[40, 60], [20, 20]])
    each = ops_boxes.scale(np.array([[0, 0, 40, 60], [5, 10, 20, 20]]), sizes, np.array([[10, 10]]))
    np.testing.assert_array_equal(each, [[0, 0, 10, 10], [2.5, 5, 10, 10]])


@pytest.mark.parametrize("whole", [True, False])
def test_to_mask_equals_a_loop(whole):
    rng = np.random.default_rng(2)
    size = (9, 12)
    boxes = np.concatenate([random_boxes(10, size, rng, whole), np.zeros((2, 4))]).reshape(4, 3, 4)
    boxes[0, 0] = [-3, 5, 4, 20]  # cut off
    boxes[1, 1] = [1.5, 0.5, 4.5, 7.5]  # through the centres of pixels
    boxes[2] = [[2.5, 3.5, 5.5, 5.5], *np.zeros((2, 4))]
    want = np.zeros((4, *size), bool)
    for i, row in enumerate(boxes):
        for y, x in set().union(*(pixels_of(box, size) for box in row)):
            want[i, y, x] = True
    np.testing.assert_array_equal(ops_boxes.to_mask(boxes, size), want)
    jitted = jax.jit(ops_boxes.to_mask, static_argnums=1)(boxes, size)
    np.testing.assert_array_equal(jitted, want)
    np.testing.assert_array_equal(
        ops_boxes.to_mask(boxes[1, :1], size).sum(), len(pixels_of(boxes[1, 0], size))
    )


def test_whole_images_and_empty_boxes():
    np.testing.assert_array_equal(
        ops_boxes.to_mask(np.array([[0, 0, 3, 4]]), (3, 4)), np.ones((3, 4))
    )
    nothing = np.array([[0, 0, 0, 0], [2, 1, 2, 4], [2, 2, 1, 3]])
    assert not ops_boxes.to_mask(nothing, (3, 4)).any()
    assert not ops_boxes.to_mask(np.zeros((0, 4)), (3, 4)).any()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"boxes have shape \(2, 5\)"):
        ops_boxes.iou(np.zeros((2, 5)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="size is"):
        ops_boxes.to_mask(np.zeros((2, 4)), (0, 3))

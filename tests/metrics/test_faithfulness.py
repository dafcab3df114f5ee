from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import ndimage

from attnzoom_jax.metrics.faithfulness import (
    Curve,
    blur,
    class_score,
    confidence,
    deletion,
    insertion,
    ranks,
)

RNG = np.random.default_rng(0)
N, H, W, C, K = 4, 5, 6, 2, 3
IMAGES = RNG.normal(size=(N, H, W, C))
MAPS = RNG.normal(size=(N, H, W))
TARGETS = np.array([2, 0, 1, 1])
WEIGHTS, BIAS = RNG.normal(size=(H, W, C, K)), RNG.normal(size=K)
METHODS = {"deletion": deletion, "insertion": insertion}
each_method = pytest.mark.parametrize("method", METHODS)


def linear(images):
    weights = jnp.asarray(WEIGHTS, images.dtype)
    return jnp.tensordot(images, weights, 3) + jnp.asarray(BIAS, images.dtype)


def request(n=N, dtype=jnp.float32):
    return jnp.asarray(IMAGES[:n], dtype), jnp.asarray(MAPS[:n], dtype), jnp.asarray(TARGETS[:n])


def slow_score(image, target, score):
    logits = np.array([(image * WEIGHTS[..., k]).sum() + BIAS[k] for k in range(K)])
    if score == "correct":
        return float(logits.argmax() == target)
    return logits[target] if score == "logit" else np.exp(logits[target]) / np.exp(logits).sum()


def slow_curve(before, after, one_map, target, steps, score):
    """Pixel after pixel, the largest value of the map first."""
    pixels = sorted(np.ndindex(H, W), key=lambda pixel: -one_map[pixel])
    shares, scores = [], []
    for step in range(steps + 1):
        count = round(step * H * W / steps)
        image = before.copy()
        for pixel in pixels[:count]:
            image[pixel] = after[pixel]
        shares.append(count / (H * W))
        scores.append(slow_score(image, target, score))
    area = sum(
        (shares[i] - shares[i - 1]) * (scores[i] + scores[i - 1]) / 2 for i in range(1, steps + 1)
    )
    return shares, scores, area


@pytest.mark.parametrize("score", ["probability", "logit", "correct"])
@pytest.mark.parametrize("steps", [1, 7, H * W])  # 30 pixels: 7 steps are of different sizes
@each_method
def test_curves_equal_a_loop_over_pixels(method, steps, score):
    base = RNG.normal(size=(N, H, W, C))
    with jax.enable_x64(True):
        images, maps, targets = request(dtype=jnp.float64)
        got = METHODS[method](
            linear, images, maps, targets, steps=steps, baseline=jnp.asarray(base), score=score
        )
        area = got.area
        assert got.scores.dtype == area.dtype == jnp.float64
    for i in range(N):
        ends = (IMAGES[i], base[i]) if method == "deletion" else (base[i], IMAGES[i])
        want = slow_curve(*ends, MAPS[i], TARGETS[i], steps, score)
        np.testing.assert_allclose(got.shares, want[0], rtol=1e-6)
        np.testing.assert_allclose(got.scores[i], want[1], rtol=1e-10)
        np.testing.assert_allclose(area[i], want[2], rtol=1e-6)


def test_a_linear_function_has_a_closed_form_that_no_other_order_beats():
    # Without its largest contributions a linear logit falls as fast as it can.
    own = np.stack([WEIGHTS[..., k] for k in TARGETS])
    gain = (IMAGES * own).sum(-1)  # [n, h, w], what each pixel adds to the logit
    ordered = -np.sort(-gain.reshape(N, -1))
    left = ordered.sum(1)[:, None] - np.c_[np.zeros(N), ordered.cumsum(1)] + BIAS[TARGETS][:, None]
    images, maps, targets = request()
    options = {"steps": H * W, "score": "logit"}
    best = deletion(linear, images, jnp.asarray(gain, jnp.float32), targets, **options)
    np.testing.assert_allclose(best.scores, left, atol=1e-4)
    area = (left[:, 1:-1].sum(1) + (left[:, 0] + left[:, -1]) / 2) / (H * W)
    np.testing.assert_allclose(best.area, area, atol=1e-4)
    assert (deletion(linear, images, maps, targets, **options).area > best.area).all()
    brought = insertion(
        linear, images, jnp.asarray(gain, jnp.float32), targets, baseline=0, **options
    )
    # What one removes, the other brings back: together they have the logits of both ends.
    both = np.repeat(left[:, :1] + left[:, -1:], H * W + 1, axis=1)
    np.testing.assert_allclose(brought.scores + best.scores, both, atol=1e-4)


def test_equal_contributions_fall_on_a_straight_line():
    images, targets = jnp.ones((1, 4, 4, 1)), jnp.array([0])

    def count(images):
        return jnp.stack([images.sum((1, 2, 3)), jnp.zeros(len(images))], axis=1)

    curve = deletion(count, images, jnp.zeros((1, 4, 4)), targets, steps=8, score="logit")
    np.testing.assert_allclose(curve.scores, [np.linspace(16, 0, 9)])
    np.testing.assert_allclose(curve.area, [8])
    np.testing.assert_allclose(curve.mean, [8])


def test_insertion_is_deletion_backwards_of_the_negative_map():
    images, maps, targets = request()
    forth = insertion(linear, images, maps, targets, steps=H * W, baseline=0.3)
    back = deletion(linear, images, -maps, targets, steps=H * W, baseline=0.3)
    np.testing.assert_allclose(forth.scores, back.scores[:, ::-1], rtol=1e-5)
    np.testing.assert_allclose(forth.area, back.area, rtol=1e-5)


def test_ends_are_the_image_and_its_baseline():
    images, maps, targets = request()
    rows = jnp.arange(N)
    own = jax.nn.softmax(linear(images))[rows, targets]
    colour = jnp.array([0.4, -1.0])
    flat = jax.nn.softmax(linear(jnp.broadcast_to(colour, images.shape)))[rows, targets]
    blurred = jax.nn.softmax(linear(blur(images)))[rows, targets]
    curve = deletion(linear, images, maps, targets, steps=2, baseline=colour)
    np.testing.assert_allclose(curve.scores[:, [0, -1]], np.stack([own, flat], 1), rtol=1e-5)
    curve = insertion(linear, images, maps, targets, steps=2)
    np.testing.assert_allclose(curve.scores[:, [0, -1]], np.stack([blurred, own], 1), rtol=1e-5)


@each_method
def test_chunks_change_nothing_and_bound_what_is_seen_at_a_time(method):
    images, maps, targets = request()
    seen = []

    def fn(images):
        seen.append(len(images))
        return linear(images)

    whole = METHODS[method](fn, images, maps, targets, steps=9, chunk_size=None)
    assert max(seen) == N * 10
    for chunk_size, most in ((1, N), (9, 2 * N), (12, 3 * N), (1000, 10 * N)):
        seen.clear()
        got = METHODS[method](fn, images, maps, targets, steps=9, chunk_size=chunk_size)
        assert max(seen) == most
        np.testing.assert_allclose(got.scores, whole.scores, rtol=1e-5)


def test_one_device_equals_four_under_jit():
    images, maps, targets = request()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put((images, maps, targets), NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def scores(images, maps, targets):
        curves = [method(linear, images, maps, targets, steps=6) for method in METHODS.values()]
        pair = confidence(linear, images, maps, targets)
        return [curve.area for curve in curves], pair.drop, pair.increase

    jax.tree.map(
        lambda one, four: np.testing.assert_allclose(one, four, rtol=1e-5),
        scores(images, maps, targets),
        scores(*spread),
    )


def test_ranks_of_ties_go_row_by_row_and_nan_comes_last():
    maps = jnp.array([[[1.0, 3.0], [3.0, 1.0]], [[0.0, -0.0], [-0.0, 0.0]]])
    np.testing.assert_array_equal(ranks(maps), [[[2, 0], [1, 3]], [[0, 1], [2, 3]]])
    constant = ranks(jnp.ones((1, 30, 40)))  # large enough for an unstable sort to show
    np.testing.assert_array_equal(constant, np.arange(1200).reshape(1, 30, 40))
    maps = jnp.array([[[np.nan, -np.inf], [np.inf, 0.0]]])
    np.testing.assert_array_equal(ranks(maps), [[[3, 2], [0, 1]]])


def test_what_is_unknown_stays_with_its_image():
    images, maps, targets = request()
    maps = maps.at[0, 1, 1].set(jnp.nan)
    targets = targets.at[1].set(K).at[2].set(-1)
    for method in METHODS.values():
        curve = method(linear, images, maps, targets, steps=3)
        assert np.isnan(curve.scores).all(1).tolist() == [True, True, True, False]
        assert np.isnan(curve.area).tolist() == [True, True, True, False]
    # Even where the network would make a number of it.
    pair = confidence(lambda x: linear(jnp.nan_to_num(x)), images, maps, targets)
    assert np.isnan(pair.drop).tolist() == [True, True, True, False]
    assert np.isnan(pair.increase).tolist() == [True, True, True, False]
    logits = jnp.array([[0.0, jnp.nan], [0.0, 1.0]])
    for score, value in (("correct", 1), ("logit", 1), ("probability", 1 / (1 + np.exp(-1)))):
        got = class_score(logits, jnp.array([0, 1]), score)
        np.testing.assert_allclose(got, [np.nan, value])


def test_drop_and_increase_by_hand():
    # The logit of class 0 is the sum of the pixels, that of class 1 is 0: y = sigmoid(sum).
    images = jnp.array([[[[2.0], [1.0]]], [[[2.0], [-1.0]]], [[[3.0], [1.0]]], [[[-200.0], [1]]]])
    maps = jnp.array([[[5.0, -1.0]], [[2.0, 0.0]], [[-1.0, -2.0]], [[1.0, 0.0]]])

    def sums(images):
        return jnp.stack([images.sum((1, 2, 3)), jnp.zeros(len(images))], axis=1)

    pair = confidence(sums, images, maps, jnp.zeros(4, int))
    sigmoid = 1 / (1 + np.exp(-np.array([3.0, 2.0, 1.0, 4.0, 0.0])))
    np.testing.assert_allclose(pair.full[:3], sigmoid[[0, 2, 3]], rtol=1e-6)
    np.testing.assert_allclose(pair.masked[:3], sigmoid[[1, 1, 4]], rtol=1e-6)
    drops = [1 - sigmoid[1] / sigmoid[0], 0, 1 - sigmoid[4] / sigmoid[3]]
    # The last image had no probability to lose.
    np.testing.assert_allclose(pair.drop, [*drops, 0], atol=1e-6)
    assert pair.increase.tolist() == [0, 1, 0, 0]
    other = confidence(sums, images, maps / 7, jnp.zeros(4, int), baseline=jnp.array([1.0]))
    want = 1 / (1 + np.exp(-np.array([3.0, 3.0, 2.0])))  # a hidden pixel is 1 each
    np.testing.assert_allclose(other.masked[:3], want, rtol=1e-6)


def test_half_of_the_weight_leaves_half_of_the_pixel():
    pair = confidence(
        lambda images: jnp.concatenate([images[:, 0, :, 0], 0 * images[:, 0, :1, 0]], axis=1),
        jnp.array([[[[4.0], [6.0]]]]),
        jnp.array([[[1.0, 2.0]]]),
        jnp.array([0]),
    )
    np.testing.assert_allclose(pair.masked, [np.exp(2) / (np.exp(2) + np.exp(6) + 1)], rtol=1e-5)


def test_blur_is_that_of_the_authors():
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = ndimage.gaussian_filter(point, 5)
    assert kernel.sum() == pytest.approx(1)
    images = RNG.normal(size=(2, 7, 13, C)).astype(np.float32)
    want = np.zeros(images.shape)
    for n, c in np.ndindex(2, C):
        want[n, ..., c] = ndimage.correlate(
            images[n, ..., c].astype(np.float64), kernel, mode="constant"
        )
    np.testing.assert_allclose(blur(jnp.asarray(images)), want, atol=1e-6)


def test_a_curve_of_shares_that_are_not_even():
    curve = Curve(jnp.array([0.0, 0.5, 0.6]), jnp.array([[1.0, 0.0, 2.0]]))
    np.testing.assert_allclose(curve.area, [(0.25 + 0.1) / 0.6], rtol=1e-6)


def test_bad_arguments_are_refused():
    images, maps, targets = request()
    for method in METHODS.values():
        for steps in (0, 31, 2.5):
            with pytest.raises(ValueError, match="from 1 to 30, the pixels"):
                method(linear, images, maps, targets, steps=steps)  # pyright: ignore
        with pytest.raises(ValueError, match="chunk_size is 0"):
            method(linear, images, maps, targets, steps=2, chunk_size=0)
        with pytest.raises(ValueError, match="did you mean 'logit'"):
            method(linear, images, maps, targets, score="logits")
        with pytest.raises(ValueError, match="one for each of the 2 channels"):
            method(linear, images, maps, targets, baseline=jnp.zeros(3))
    for metric in (*METHODS.values(), confidence):
        options: Any = {} if metric is confidence else {"steps": 2}
        with pytest.raises(ValueError, match="resize the maps to the images"):
            metric(linear, images, maps[:, 1:], targets)
        with pytest.raises(ValueError, match=r"images are int32 \[4, 5, 6, 2\]"):
            metric(linear, images.astype(int), maps, targets)
        with pytest.raises(ValueError, match=r"expected class ids int \[4\]"):
            metric(linear, images, maps, targets.astype(float))
        with pytest.raises(ValueError, match=r"expected logits \[n, k\]"):
            metric(lambda images: images, images, maps, targets, **options)
    for size in (0, 4, 2.5):
        with pytest.raises(ValueError, match="size of the blur"):
            blur(images, size=size)  # pyright: ignore
    with pytest.raises(ValueError, match="sigma of the blur"):
        blur(images, sigma=0)

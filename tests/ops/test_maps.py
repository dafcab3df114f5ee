from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops import maps as ops_maps


def random_maps(n=3, h=5, w=7, seed=0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, h, w)).astype(np.float32)


def slow_resize(maps, size, method):
    """One output pixel at a time: source centre (i + 0.5) * h / height - 0.5, borders repeat."""
    n, h, w = maps.shape
    out = np.zeros((n, *size))
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = (i + 0.5) * h / size[0] - 0.5, (j + 0.5) * w / size[1] - 0.5
            if method == "nearest":
                out[:, i, j] = maps[:, int(np.floor(y + 0.5)), int(np.floor(x + 0.5))]
                continue
            y, x = np.clip(y, 0, h - 1), np.clip(x, 0, w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = maps[:, y0, x0] * (1 - (x - x0)) + maps[:, y0, x1] * (x - x0)
            bottom = maps[:, y1, x0] * (1 - (x - x0)) + maps[:, y1, x1] * (x - x0)
            out[:, i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


@pytest.mark.parametrize("method", ops_maps.RESIZE_METHODS)
@pytest.mark.parametrize("size", [(10, 14), (11, 5), (2, 20), (1, 1)])
def test_resize_equals_one_pixel_at_a_time(method, size):
    maps = random_maps()
    got = jax.jit(ops_maps.resize, static_argnames=("size", "method"))(maps, size, method=method)
    np.testing.assert_allclose(got, slow_resize(maps, size, method), atol=2e-6)


def test_resize_keeps_constants_and_computes_in_float32():
    got = ops_maps.resize(jnp.full((1, 3, 3), 0.7, jnp.bfloat16), (8, 5))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, float(jnp.bfloat16(0.7)), rtol=1e-6)


def test_normalize_by_hand():
    maps = jnp.array([[[-4.0, 0.0], [1.0, 2.0]], [[0.0, 1.0], [3.0, 5.0]]])
    np.testing.assert_array_equal(ops_maps.normalize(maps), maps)
    np.testing.assert_allclose(
        ops_maps.normalize(maps, "max"), [[[-1, 0], [0.25, 0.5]], [[0, 0.2], [0.6, 1]]], rtol=1e-6
    )
    np.testing.assert_allclose(
        ops_maps.normalize(maps, "max", over="batch"), np.asarray(maps) / 5, rtol=1e-6
    )
    np.testing.assert_allclose(
        ops_maps.normalize(maps, "min_max"),
        [[[0, 4 / 6], [5 / 6, 1]], [[0, 0.2], [0.6, 1]]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        ops_maps.normalize(maps, "min_max", over="batch"), (np.asarray(maps) + 4) / 9, rtol=1e-6
    )


@pytest.mark.parametrize("mode", ["max", "min_max"])
@pytest.mark.parametrize("over", ops_maps.NORMALIZE_OVER)
def test_normalize_forgets_scale(mode, over):
    maps = random_maps()
    scaled = ops_maps.normalize(123.0 * maps, mode, over=over)
    np.testing.assert_allclose(scaled, ops_maps.normalize(maps, mode, over=over), atol=1e-6)
    assert float(scaled.max()) <= 1 and float(scaled.min()) >= -1


def test_normalize_without_contrast():
    maps = jnp.stack([jnp.zeros((2, 2)), jnp.full((2, 2), 3.0), jnp.full((2, 2), -3.0)])
    np.testing.assert_array_equal(ops_maps.normalize(maps, "min_max"), np.zeros((3, 2, 2)))
    # Zero means zero under "max": a constant map is all or nothing, not "no map".
    np.testing.assert_array_equal(ops_maps.normalize(maps, "max")[:, 0, 0], [0, 1, -1])
    grad = jax.grad(lambda m: ops_maps.normalize(m, "min_max").sum())(maps)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("mode", ["max", "min_max"])
def test_normalize_keeps_nan_in_its_image(mode):
    maps = random_maps()
    maps[1, 2, 3] = np.nan
    got = ops_maps.normalize(maps, mode)
    np.testing.assert_array_equal(np.isnan(got).all(axis=(1, 2)), [False, True, False])
    np.testing.assert_array_equal(np.isnan(got).any(axis=(1, 2)), [False, True, False])
    assert np.isnan(ops_maps.normalize(maps, mode, over="batch")).all()
    assert np.isnan(ops_maps.normalize(maps, "none")).sum() == 1


def test_positive():
    got = ops_maps.positive(jnp.array([[[-1.0, 0.0, 2.0, jnp.nan]]]))
    np.testing.assert_array_equal(got, [[[0, 0, 2, np.nan]]])


def test_peak_equals_a_search_and_takes_the_first_of_ties():
    maps = np.random.default_rng(3).integers(0, 4, (40, 3, 5)).astype(np.float32)  # many ties
    want = []
    for one in maps:
        best = (0, 0)
        for y in range(3):
            for x in range(5):
                if one[y, x] > one[best]:
                    best = (y, x)
        want.append(best)
    got = jax.jit(ops_maps.peak)(maps)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


def test_peak_points_at_nan():
    maps = random_maps(n=1)
    maps[0, 3, 4] = np.nan
    np.testing.assert_array_equal(ops_maps.peak(maps), [[3, 4]])


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_threshold_box_equals_a_search(threshold):
    maps = random_maps(n=30, h=6, w=9, seed=4)
    maps[:10] **= 5  # a few high pixels: small boxes
    want = []
    for one in maps:
        ys, xs = np.nonzero(one >= np.float32(threshold) * one.max())
        want.append([ys.min(), xs.min(), ys.max() + 1, xs.max() + 1])
    got = jax.jit(ops_maps.threshold_box, static_argnames="threshold")(maps, threshold=threshold)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


def test_threshold_box_of_a_rectangle_and_of_nothing():
    maps: Any = np.zeros((5, 6, 8), np.float32)
    maps[0, 2:4, 1:7] = 2.0
    maps[0, 2, 1] = 1.0  # exactly at the threshold: inside
    maps[1] = -1.0
    maps[2] = -1.0
    maps[2, 1, 1] = 0.0  # the maximum, yet nothing positive
    maps[3, 0, 0] = np.nan
    maps[4, 5, 7] = 1.0
    got = ops_maps.threshold_box(maps, 0.5)
    whole = [0, 0, 6, 8]
    np.testing.assert_array_equal(got, [[2, 1, 4, 7], whole, whole, whole, [5, 7, 6, 8]])


def test_unknown_names_and_bad_values_are_refused():
    maps = random_maps()
    with pytest.raises(ValueError, match="did you mean 'bilinear'"):
        ops_maps.resize(maps, (2, 2), method="bilinaer")
    with pytest.raises(ValueError, match="size is"):
        ops_maps.resize(maps, (0, 2))
    with pytest.raises(ValueError, match="did you mean 'min_max'"):
        ops_maps.normalize(maps, "minmax")
    with pytest.raises(ValueError, match="did you mean 'image'"):
        ops_maps.normalize(maps, "max", over="images")
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        ops_maps.threshold_box(maps, 1.5)


def test_resize_each_equals_a_loop_and_resize():
    maps = jnp.float32(np.random.default_rng(7).normal(size=(4, 3, 5)))
    sizes = np.array([[10, 12], [1, 1], [3, 5], [7, 2]])
    got = jax.jit(ops_maps.resize_each, static_argnums=2)(maps, sizes, (10, 12))
    assert got.shape == (4, 10, 12) and got.dtype == jnp.float32
    for one, (h, w), out in zip(maps, sizes, np.asarray(got), strict=True):
        np.testing.assert_allclose(
            out[:h, :w], slow_resize(one[None], (h, w), "bilinear")[0], atol=1e-6
        )
        np.testing.assert_allclose(out[:h, :w], ops_maps.resize(one[None], (h, w))[0], atol=1e-6)
        assert not out[h:].any() and not out[:, w:].any()
    np.testing.assert_array_equal(got[2, :3, :5], maps[2])  # its own size


def test_resize_each_keeps_constants_and_mirrors_to_the_last_bit():
    rng = np.random.default_rng(8)
    constants = jnp.broadcast_to(jnp.float32(rng.normal(size=(20, 1, 1))), (20, 7, 9))
    sizes = rng.integers(1, 59, (20, 2))
    for value, (h, w), out in zip(
        constants[:, 0, 0], sizes, ops_maps.resize_each(constants, sizes, (60, 60)), strict=True
    ):
        assert (np.asarray(out)[:h, :w] == value).all()
    odd = sizes // 2 * 2 + 1  # no pixel exactly between two of the map
    maps = jnp.float32(rng.normal(size=(20, 7, 9)))
    plain, flipped = (ops_maps.resize_each(m, odd, (60, 60)) for m in (maps, maps[:, ::-1, ::-1]))
    for (h, w), one, other in zip(odd, np.asarray(plain), np.asarray(flipped), strict=True):
        np.testing.assert_array_equal(one[:h, :w], other[:h, :w][::-1, ::-1])


def test_sizes_that_do_not_fit_are_refused():
    maps = jnp.zeros((2, 3, 3))
    with pytest.raises(ValueError, match=r"sizes have shape \(1, 2\)"):
        ops_maps.resize_each(maps, np.array([[2, 2]]), (4, 4))
    for bad in ([5, 4], [0, 1]):
        with pytest.raises(ValueError, match=r"size 1 is .* canvas of 4 x 4"):
            ops_maps.resize_each(maps, np.array([[2, 2], bad]), (4, 4))
    np.testing.assert_array_equal(ops_maps.is_inside(None, (2, 1, 3)), np.ones((2, 1, 3)))


@pytest.mark.parametrize("mode", ["max", "min_max"])
def test_normalize_keeps_a_nan_of_a_large_map(mode):
    maps = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)
    maps[1, 3, 5] = np.nan
    found = np.asarray(ops_maps.normalize(maps, mode))
    assert np.isnan(found).all(axis=(1, 2)).tolist() == [False, True, False]

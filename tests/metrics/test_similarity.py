from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from attnzoom_jax.metrics.similarity import similarity, spearman, ssim

RNG = np.random.default_rng(0)


def pair(n=4, h=13, w=12, levels=0):
    maps, others = RNG.normal(size=(2, n, h, w))
    others = 0.5 * maps + others
    if levels:  # many ties
        maps, others = (np.round(levels * values) / levels for values in (maps, others))
    return jnp.asarray(maps, jnp.float32), jnp.asarray(others, jnp.float32)


def waves():
    y, x = np.mgrid[:20, :17].astype(float)
    first = np.sin(x / 3) * np.cos(y / 4)
    second = np.sin(x / 3 + 0.4) * np.cos(y / 5) + 0.05 * ((x * 7 + y * 3) % 5)
    return first, second


def slow_spearman(maps, others):
    correlate: Any = stats.spearmanr
    pairs = zip(np.asarray(maps), np.asarray(others), strict=True)
    return [correlate(one.ravel(), other.ravel()).statistic for one, other in pairs]


@pytest.mark.parametrize("levels", [0, 1, 3], ids=lambda levels: f"levels{levels}")
def test_spearman_equals_scipy(levels):
    maps, others = pair(levels=levels)
    want = slow_spearman(maps, others)
    np.testing.assert_allclose(jax.jit(spearman)(maps, others), want, atol=1e-6)
    absolute = similarity(maps, others, measure="spearman_abs")
    want = slow_spearman(jnp.abs(maps), jnp.abs(others))
    np.testing.assert_allclose(absolute, want, atol=1e-6)


def test_spearman_in_float64():
    with jax.enable_x64(True):
        maps, others = jnp.asarray(RNG.normal(size=(2, 3, 9, 7)))
        want = slow_spearman(maps, others)
        got = spearman(maps, others)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_spearman_at_the_size_of_images_forgets_a_monotone_change():
    maps = jnp.asarray(RNG.normal(size=(1, 224, 224)), jnp.float32)
    np.testing.assert_allclose(spearman(maps, jnp.exp(maps) - 3), [1], atol=1e-6)
    np.testing.assert_allclose(spearman(maps, -5 * maps), [-1], atol=1e-6)


def test_spearman_of_a_constant_is_zero_and_both_zeros_are_equal():
    maps, _ = pair(n=1)
    assert spearman(maps, jnp.zeros_like(maps)).tolist() == [0]
    assert spearman(jnp.ones_like(maps), jnp.ones_like(maps)).tolist() == [0]
    signed = jnp.asarray([[[0.0, -0.0], [-0.0, 1.0]]])
    np.testing.assert_allclose(spearman(signed, jnp.asarray([[[0.0, 0], [0, 5]]])), [1], atol=1e-6)


def slow_ssim(one, other):
    one, other = ((x - x.min()) / (x.max() - x.min()) for x in (one, other))
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for y in range(one.shape[0] - 10):
        for x in range(one.shape[1] - 10):
            a, b = one[y : y + 11, x : x + 11], other[y : y + 11, x : x + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = ((weights * (v - m) ** 2).sum() for v, m in ((a, mean_a), (b, mean_b)))
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(light * (2 * both + 9e-4) / (var_a + var_b + 9e-4))
    return np.mean(values)


def test_ssim_equals_a_loop_over_windows():
    maps, others = pair()
    want = [
        slow_ssim(np.asarray(one, np.float64), np.asarray(other, np.float64))
        for one, other in zip(maps, others, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(ssim)(maps, others), want, atol=1e-5)


def test_ssim_equals_scikit_image():
    first, second = waves()
    maps = jnp.asarray([first, first, first], jnp.float32)
    others = jnp.asarray([second, -first, 3 * first + 1], jnp.float32)
    # structural_similarity of scikit-image 0.26 with the options that the module names.
    np.testing.assert_allclose(ssim(maps, others), [0.7158495, -0.7534646, 1.0], atol=1e-5)


def test_nan_stays_with_its_image():
    maps, others = pair(n=3)
    others = others.at[1, 2, 3].set(jnp.nan)
    for measure in ("spearman", "spearman_abs", "ssim"):
        for values in (
            similarity(maps, others, measure=measure),
            similarity(others, maps, measure=measure),
        ):
            assert np.isnan(values).tolist() == [False, True, False]


def test_bad_arguments_are_refused():
    maps, others = pair()
    for measure in ("spearman", "ssim"):
        with pytest.raises(ValueError, match=r"expected \[n, h, w\] for both"):
            similarity(maps, others[:, :5], measure=measure)
    with pytest.raises(ValueError, match="smaller than the window of SSIM, 11"):
        ssim(maps[:, :10], others[:, :10])
    with pytest.raises(ValueError, match="did you mean 'ssim'"):
        bad: Any = "sim"
        similarity(maps, others, measure=bad)

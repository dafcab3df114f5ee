"""How sure a metric is: intervals by the bootstrap over images.

A metric is a function of sums over images. Draw n of the n images with replacement, R times: c_ri
is how often resample r holds image i, and with the sums s_i of image i

    theta_r = statistic(sum_i c_ri s_i),    interval = quantiles (1 - level) / 2 and (1 + level) / 2

of the theta_r, by linear interpolation. Cues of one image are not independent, so that images are
drawn and not cues: all that belongs to an image goes with it. The interval says how the metric
would differ on other images of the kind. It says nothing of other trainings of the network, and it
is too narrow where images are few or nearly all alike: of n images that all hit it has no width.

Two rows of a table over the same images are compared by one call, because a difference is a
statistic as well: both rows meet the same resamples, what is hard about an image cancels, and the
rows differ where the interval leaves out 0.

    both = {"a": hits_a, "b": hits_b, "cues": cues}  # [n, k] each
    intervals(both, lambda s: mean_accuracy(s["a"], s["cues"]) - mean_accuracy(s["b"], s["cues"]))

Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; the percentile interval:
Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

CHUNK = 2**21  # numbers at a time: 16 MiB


class Interval(NamedTuple):
    """A metric and its interval, each float64 [...] as the statistic has it per resample."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def intervals(
    sums: Mapping[str, Any],
    statistic: Callable[[dict[str, np.ndarray]], Any],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The value of a statistic on all images, and its percentile interval; runs on the host.

    Args:
        sums: {name: [n, ...]}, of each image, such as its hits and cues of every class. All rows of
            a table that have the same n and seed meet the same resamples.
        statistic: {name: float64 [b, ...]}, the sums over the images of b resamples -> [b, ...].
            Called without warnings of NumPy: 0 / 0 is NaN.
        resamples: R.
        level: the share of the resamples between both ends, in (0, 1).
        seed: of the draws.

    Returns:
        value, low, high. A resample for which the statistic is no finite number, say as it holds
        no image with a cue, is left out. Where more than 1 - level of them are, or where the value
        is none itself, low and high are NaN: so they are if the sums of one image hold NaN, which
        is to be left out, and counted, before. The value may lie outside of the interval.

    Raises:
        ValueError: no image, sums of different numbers of images, a statistic that does not keep
            the resamples apart, no resamples, a level outside (0, 1).
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"resamples is {resamples} and level {level}; expected 1 or more, and a share in (0, 1)"
        )
    of_images = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    counts = {name: len(value) for name, value in of_images.items()}
    n = next(iter(counts.values()), 0)
    if n == 0 or len(set(counts.values())) > 1:
        raise ValueError(
            f"images per sum: {counts}; expected the same number for all, at least one: check the "
            "split, and that some image has a cue"
        )
    value = _evaluate(statistic, {name: s.sum(axis=0)[None] for name, s in of_images.items()})[0]
    draws = np.random.Generator(np.random.PCG64(seed))
    chunk = max(1, CHUNK // (n + sum(s.size // n for s in of_images.values())))
    found = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        times = np.stack([np.bincount(draws.integers(n, size=n), minlength=n) for _ in range(size)])
        found.append(_evaluate(statistic, _resample(times.astype(np.float64), of_images)))
    ends = ((1 - level) / 2, (1 + level) / 2)
    low, high = _quantiles(np.concatenate(found), ends, most_undefined=1 - level)
    is_known = np.isfinite(value)
    return Interval(value, np.where(is_known, low, np.nan), np.where(is_known, high, np.nan))


def _resample(times: np.ndarray, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over the images of resamples [b, ...], from how often each holds an image [b, n]."""
    with np.errstate(invalid="ignore"):  # 0 x infinity
        flat = {name: times @ s.reshape(len(s), -1) for name, s in sums.items()}
    return {name: flat[name].reshape(len(times), *s.shape[1:]) for name, s in sums.items()}


def _evaluate(statistic: Callable[..., Any], sums: dict[str, np.ndarray]) -> np.ndarray:
    size = len(next(iter(sums.values())))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(statistic(sums), np.float64)
    if values.shape[:1] != (size,):
        raise ValueError(
            f"the statistic of {size} resamples has the shape {values.shape}; expected "
            f"[{size}, ...]: reduce over the last axes only"
        )
    return values


def _quantiles(
    values: np.ndarray, ends: tuple[float, float], *, most_undefined: float
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles over the first axis of the finite values; NaN where too many are not finite."""
    is_finite = np.isfinite(values)
    is_enough = 1 - is_finite.mean(axis=0) <= most_undefined
    # 0 where the result is not used: of nothing but NaN, NumPy warns.
    known = np.where(is_finite, values, np.where(is_enough, np.nan, 0.0))
    low, high = np.nanquantile(known, ends, axis=0)
    return np.where(is_enough, low, np.nan), np.where(is_enough, high, np.nan)

import numpy as np
import pytest

from attnzoom_jax.metrics import bootstrap
from attnzoom_jax.metrics.bootstrap import intervals
from attnzoom_jax.metrics.pointing_game import mean_accuracy


def accuracy(sums):
    return mean_accuracy(sums["hits"], sums["cues"])


def cues(n=40, k=6, seed=0):
    """Hits and cues of images [n, k]; most images show few of the classes."""
    draws = np.random.default_rng(seed)
    cues = draws.random((n, k)) < 0.3
    return {"hits": cues & (draws.random((n, k)) < 0.6), "cues": cues}


def slow_intervals(images, statistic, *, resamples, level, seed):
    """The images of every resample picked one by one, and the statistic of each resample alone."""
    draws = np.random.Generator(np.random.PCG64(seed))
    n = len(next(iter(images.values())))
    found = []
    for _ in range(resamples):
        picked = draws.integers(n, size=n)
        sums = {name: sum(np.float64(s[i]) for i in picked) for name, s in images.items()}
        found.append(statistic({name: s[None] for name, s in sums.items()})[0])
    value = statistic({name: np.float64(s).sum(axis=0)[None] for name, s in images.items()})[0]
    found = np.sort(found, axis=0)
    ends = []
    for end in ((1 - level) / 2, (1 + level) / 2):
        place = end * (resamples - 1)
        below = int(place)
        above = min(below + 1, resamples - 1)
        ends.append(found[below] + (place - below) * (found[above] - found[below]))
    return value, *ends


@pytest.mark.parametrize("chunk", [1, 46 * 7, 2**21])
def test_equals_resampling_image_by_image(monkeypatch, chunk):
    monkeypatch.setattr(bootstrap, "CHUNK", chunk)
    for statistic in (accuracy, lambda s: s["hits"].sum(axis=1), lambda s: s["hits"] - s["cues"]):
        options = {"resamples": 50, "level": 0.9, "seed": 3}
        expected = slow_intervals(cues(), statistic, **options)
        for ours, theirs in zip(intervals(cues(), statistic, **options), expected, strict=True):
            assert ours.shape == np.shape(theirs)
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_depends_on_the_seed_alone():
    first = intervals(cues(), accuracy, seed=1)
    assert first == intervals(cues(), accuracy, seed=1)
    assert first != intervals(cues(), accuracy, seed=2)
    assert first.low < first.value < first.high


def test_a_higher_level_is_wider():
    narrow, wide = (intervals(cues(), accuracy, level=level) for level in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_covers_the_mean_of_a_known_distribution_as_often_as_it_says():
    samples = np.random.default_rng(0).exponential(size=(400, 100))  # of mean 1
    low, high = np.transpose(
        [
            intervals({"x": x}, lambda s: s["x"] / 100, resamples=300, level=0.9, seed=i)[1:]
            for i, x in enumerate(samples)
        ]
    )
    # 0.9 less what is lost to the skew, about 0.015; the standard error of a share is 0.015.
    assert 0.84 < np.mean((low < 1) & (1 < high)) < 0.94
    # The width is that of the normal approximation, 2 x 1.645 x 0.1.
    assert np.mean(high - low) == pytest.approx(0.329, rel=0.05)


def test_the_difference_of_two_rows_is_a_statistic_over_the_same_resamples():
    images = cues(n=60)
    worse = images["hits"] & (np.arange(60) % 10 > 0)[:, None]  # misses six images more
    both = {"a": images["hits"], "b": worse, "cues": images["cues"]}

    def difference(sums):
        return mean_accuracy(sums["a"], sums["cues"]) - mean_accuracy(sums["b"], sums["cues"])

    value, low, high = intervals(both, difference)
    one = intervals(images, accuracy)
    other = intervals({"hits": worse, "cues": images["cues"]}, accuracy)
    assert value == pytest.approx(one.value - other.value)
    assert 0 < low < value < high  # surely better,
    assert other.high > one.low  # which both intervals alone do not tell
    equal = intervals({**both, "b": images["hits"]}, difference)
    assert equal == (0, 0, 0)


def test_one_image_has_an_interval_without_width():
    images = {"hits": np.array([[1, 0]]), "cues": np.array([[1, 1]])}
    assert intervals(images, accuracy) == (0.5, 0.5, 0.5)


def test_resamples_without_a_cue_are_left_out():
    # One image of four has the cue: (3 / 4) ** 4 = 0.32 of the resamples are without it.
    one_of_four = {"hits": np.array([[1], [0], [0], [0]]), "cues": np.array([[1], [0], [0], [0]])}
    value, low, high = intervals(one_of_four, accuracy)
    assert value == 1 and np.isnan([low, high]).all()
    assert intervals(one_of_four, accuracy, level=0.6) == (1, 1, 1)
    # Seven of thirty do: 4e-4 of the resamples.
    few = {"hits": np.eye(30)[:, :1], "cues": np.float64(np.arange(30) < 7)[:, None]}
    kept = intervals(few, lambda s: np.where(s["cues"] > 2, s["hits"] / s["cues"], np.nan)[:, 0])
    everything = intervals(few, accuracy)
    assert kept.value == everything.value and 0 <= kept.low < kept.high < 1


def test_a_share_without_cues_is_nan_and_no_warning():
    none = {"hits": np.zeros((5, 2)), "cues": np.stack([np.zeros(5), np.ones(5)], axis=1)}
    value, low, high = intervals(none, lambda s: s["hits"] / s["cues"])
    assert np.isnan([value[0], low[0], high[0]]).all()
    assert value[1] == low[1] == high[1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_does_not_pass_for_one(bad):
    scores = np.array([[0.5, 0.5], [bad, 0.5], [0.5, 0.5]])
    value, low, high = intervals({"score": scores}, lambda s: s["score"] / 3)
    assert not np.isfinite(value[0]) and np.isnan([low[0], high[0]]).all()
    assert value[1] == low[1] == high[1] == 0.5


@pytest.mark.parametrize(
    ("sums", "options", "message"),
    [
        ({"x": np.zeros((0, 3))}, {}, "images per sum"),
        ({}, {}, "images per sum"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, {}, "the same number"),
        ({"x": np.zeros(3)}, {"resamples": 0}, "resamples is 0"),
        ({"x": np.zeros(3)}, {"level": 95}, "level 95"),
    ],
    ids=["zero images", "no sums", "different numbers", "no resamples", "percent"],
)
def test_refuses(sums, options, message):
    with pytest.raises(ValueError, match=message):
        intervals(sums, lambda s: s["x"], **options)


def test_refuses_a_statistic_over_all_resamples():
    with pytest.raises(ValueError, match=r"expected \[1, \.\.\.\]: reduce over the last axes"):
        intervals({"x": np.ones((3, 2))}, lambda s: s["x"].mean())

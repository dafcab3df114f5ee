"""What a config declares to be searched, how it is drawn, and what a search may look at."""

import collections
import json
import math
from typing import Any

import numpy as np
import optuna
import pytest

from attnzoom_jax.training.search import Key, best_value, check_metric, read_space, suggest
from configs import demo


def config_file(folder, space) -> str:
    path = folder / "config.py"
    path.write_text(f"def get_sweep(mode=''):\n    return {space!r}\n")
    return str(path)


def random_trials(count):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask() for _ in range(count)]


@pytest.fixture(scope="module")
def draws(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draws")
    space = {
        "optimizer.learning_rate": ("log", (1e-5, 1e-1)),
        "total_steps": ("int", (3, 6)),
        "optimizer.name": ("choice", ("adam", "sgd")),
        "optimizer.momentum": ("uniform", (0.7, 1.0), {"optimizer.name": ("sgd",)}),
        "schedule.name": ("choice", ("constant", "plateau")),
        "schedule.mode": ("choice", ("max",), {"schedule.name": ("plateau",)}),
    }
    config: Any = demo.get_config("tiny")
    config.optimizer.momentum = 0.5
    keys = read_space(config_file(folder, space), config)
    return [suggest(trial, keys, config) for trial in random_trials(2000)]


@pytest.mark.parametrize(
    ("name", "low", "high", "scale"),
    [
        ("optimizer.learning_rate", 1e-5, 1e-1, math.log),
        ("optimizer.momentum", 0.7, 1.0, float),
    ],
)
def test_floats_are_uniform_on_their_scale(draws, name, low, high, scale):
    values = [draw[name] for draw in draws if draw.get(name) is not None]
    assert low <= min(values) and max(values) <= high
    shares = [(scale(value) - scale(low)) / (scale(high) - scale(low)) for value in values]
    # Kolmogorov's distance to the uniform distribution; 1.95 / sqrt(n) is passed once in 1000.
    ranks = np.arange(len(shares)) / len(shares)
    assert np.abs(np.sort(shares) - ranks).max() < 1.95 / math.sqrt(len(shares))
    assert all(value == float(f"{value:.4g}") for value in values)


def test_whole_numbers_and_choices_are_equally_frequent(draws):
    for name, values in (("total_steps", range(3, 7)), ("optimizer.name", ("adam", "sgd"))):
        counts = collections.Counter(draw[name] for draw in draws)
        assert set(counts) == set(values)
        expected = len(draws) / len(counts)
        assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


def test_a_key_is_in_the_search_where_its_condition_holds(draws):
    for draw in draws:
        # The config has a momentum, which must not stay; it has no mode, which stays as it is.
        assert (draw["optimizer.momentum"] is not None) == (draw["optimizer.name"] == "sgd")
        assert draw.get("schedule.mode") == {"plateau": "max"}.get(draw["schedule.name"])
        assert ("schedule.mode" in draw) == (draw["schedule.name"] == "plateau")


def test_ends_with_more_digits_are_kept():
    key = Key("uniform", (0.123449, 0.123451))
    config: Any = demo.get_config("tiny")
    for trial in random_trials(50):
        drawn = suggest(trial, {"label_smoothing": key}, config)
        assert 0.123449 <= drawn["label_smoothing"] <= 0.123451


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.learning_rat": ("log", (1, 2))}, "did you mean 'optimizer.learning_rate'"),
        ({"optimizer.b1": ("loguniform", (0.1, 1))}, r"expected \(kind, values\) or"),
        ({"optimizer.b1": ("log", (0, 1))}, "log: above 0"),
        ({"optimizer.b1": ("uniform", (1.0, 0.5))}, "a lower and a higher end"),
        ({"optimizer.b1": ("uniform", (0.5, 0.7, 0.9))}, "a lower and a higher end"),
        ({"total_steps": ("int", (1.5, 3))}, "int: whole numbers"),
        ({"optimizer.name": ("choice", ())}, "plain values to choose from"),
        ({"data.mean": ("choice", ((0.5, 0.5, 0.5),))}, "plain values to choose from"),
        ({"total_steps": ("uniform", (1.5, 3.5))}, "total_steps cannot be 1.5"),
        ({"optimizer.b1": ("choice", (1,), {"optimiser.name": ("adam",)})}, "'optimizer.name'"),
        ({"seed": ("int", (0, 9), {"optimizer.name": ("adam",)})}, "'seed' cannot be None"),
        (
            {
                "optimizer.b1": ("uniform", (0.5, 0.7), {"optimizer.name": ("adam",)}),
                "optimizer.name": ("choice", ("adam", "sgd")),
            },
            "put it behind optimizer.name",
        ),
    ],
)
def test_a_space_that_cannot_be_drawn_is_refused(space, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_space(config_file(tmp_path, space), demo.get_config("tiny"))
    assert "\n" not in str(error.value)


def test_a_config_without_a_space_is_named():
    with pytest.raises(ValueError, match=r"configs/demo\.py has no get_sweep\(\)"):
        read_space("configs/demo.py:tiny", demo.get_config("tiny"))


def with_evals(metric, **evals) -> Any:
    config: Any = demo.get_config("tiny")
    config.best_metric = metric
    config.evals = {name: {"name": "classify", **part} for name, part in evals.items()}
    return config


VALIDATION = {"split": "train[98%:]", "prefix": "validation"}


@pytest.mark.parametrize(
    ("metric", "evals", "message"),
    [
        ("test/top1", {"test": {"split": "test"}}, "'test/top1' is of the test set"),
        (
            "validation/top1",
            {"a": {"split": "train[:2%]+test[:9]", "prefix": "validation"}},
            "of the test set",
        ),
        (
            "held_out/top1",
            {
                "a": {"split": "validation[:50%]", "prefix": "held_out"},
                "b": {"split": "validation", "prefix": "test"},
            },
            "of the test set",
        ),
        ("test_robust/top1", {}, "of the test set"),
        # Tiny ImageNet's test set is its validation split.
        ("test/top1", {"a": {"split": "validation", "prefix": "test"}}, "of the test set"),
        (
            "validation/top1",
            {"a": {"split": "test", "prefix": "validation"}, "b": {"split": "test"}},
            "of the test set",
        ),
        ("", {"validation": VALIDATION}, "best_metric is empty"),
    ],
)
def test_no_metric_of_the_test_set_is_searched(metric, evals, message):
    with pytest.raises(ValueError, match=message):
        check_metric(with_evals(metric, **evals))


def test_a_metric_of_the_validation_set_is_searched():
    check_metric(with_evals("validation/top1", validation=VALIDATION, test={"split": "test"}))


def test_the_value_of_a_run_is_its_best_number(tmp_path):
    lines = [{"train/loss": -1.0}, {"a/b": 0.4}, {"a/b": math.nan}, {"a/b": 0.3}, {"c/d": math.inf}]
    text = "".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(lines))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert best_value(tmp_path, "a/b", "max") == 0.4
    assert best_value(tmp_path, "a/b", "min") == 0.3
    assert best_value(tmp_path, "c/d", "max") is None

"""What a run says of its speed and memory, the trace of some of its steps, and remat by config."""

from typing import Any

import jax
import pytest

import train
from attnzoom_jax.training import flops
from attnzoom_jax.training.log import MEASURED
from attnzoom_jax.training.writer import read_metrics
from configs import demo

ONE_DEVICE = jax.devices()[:1]


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,), "insert": {}}
    base.optimizer = {"name": "sgd", "learning_rate": 0.05}
    base.schedule = {"name": "constant"}
    base.train_evals, base.best_metric = (), ""
    base.update({"total_steps": 6, "log_every_steps": 2, "eval_every_steps": 6})
    base.update_from_flattened_dict(changes)
    return base


def training_lines(folder):
    return [line for line in read_metrics(folder) if "train/loss" in line]


def numbers(folder):
    """The lines without what is measured."""
    return [{k: line[k] for k in line.keys() - set(MEASURED)} for line in training_lines(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train.train(config(), str(folder), devices=ONE_DEVICE)
    return folder


def test_a_device_without_a_peak_has_no_mfu(plain):
    lines = training_lines(plain)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(MEASURED) - line.keys() == {"mfu"}
        assert 0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0
        assert 2**26 < line["memory_bytes"] <= line["memory_peak_bytes"] < 2**36
    assert not (plain / "profile").exists()


@pytest.mark.parametrize("cache", ["host", "device"])
def test_mfu_and_a_trace_beside_the_same_numbers(tmp_path, monkeypatch, capsys, plain, cache):
    monkeypatch.setitem(flops.PEAKS, "cpu", 1e12)
    traced = []

    def make_train_step(*args, **kwargs):
        train_step = make(*args, **kwargs)

        def counted(state, batch):
            traced.append(1)
            return train_step(state, batch)

        return counted

    make = train.make_train_step
    monkeypatch.setattr(train, "make_train_step", make_train_step)
    settings = config(**{"data.cache": cache, "profile_steps": (3, 5)})
    train.train(settings, str(tmp_path), devices=ONE_DEVICE)
    assert traced == [1]  # counting compiles nothing and traces no second time
    printed = capsys.readouterr().out
    assert f"step 5/6  trace of steps 3 to 5: {tmp_path / 'profile'}\n" in printed
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    found, expected = numbers(tmp_path), numbers(plain)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    later = training_lines(tmp_path)[1:]  # the first one may end with the first call
    assert all(0 < line["mfu"] < 1 for line in later) and printed.count("  MFU ") >= 2


def test_remat_by_config_gives_the_same_numbers(tmp_path, plain):
    train.train(config(remat=("stage1",)), str(tmp_path), devices=ONE_DEVICE)
    for line, other in zip(numbers(tmp_path), numbers(plain), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("steps", [(3,), (5, 3), (0, 3), (1.0, 2)], ids=str)
def test_steps_of_a_trace_that_make_no_sense(tmp_path, steps):
    with pytest.raises(ValueError, match=r"profile_steps is .* the first step and the last"):
        train.train(config(profile_steps=steps), str(tmp_path), devices=ONE_DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["host", "device"])
def test_memory_does_not_grow_with_the_steps(tmp_path, cache):
    """Of 2,000 steps the last 1,350 moved it by 4 MiB; all their batches would take 127."""
    steps = {"total_steps": 700, "log_every_steps": 50, "eval_every_steps": 100}
    settings = config(**{**steps, "data.cache": cache, "data.batch_size": 32})
    train.train(settings, str(tmp_path), devices=ONE_DEVICE)
    used = {line["step"]: line["memory_bytes"] for line in training_lines(tmp_path)}
    batches = 400 * 32 * 32 * 32 * 3  # bytes of the images since step 300
    assert used[700] - used[300] < 0.6 * batches

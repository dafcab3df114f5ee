"""What is stopped at any step, or sees a clock that jumps, ends bit for bit as what is not."""

import random
import signal
import time

import jax
import pytest

import train
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.stop import StopSignal
from tests.fault import tiny
from tests.fault.run_kills import differences, end_of, last_checkpoint

STEPS = 14


def run(folder, mode=""):
    config = tiny.get_config(mode)
    config.update({"total_steps": STEPS, "keep_checkpoints": 1})
    train.train(config, str(folder), devices=jax.devices()[:1])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "device"])
def test_stopped_at_any_step(tmp_path, monkeypatch, capsys, mode):
    expected = end_of(run(tmp_path / "whole", mode))
    calls = []

    def came(self):
        calls.append(1)
        return len(calls) % 4 == 0

    monkeypatch.setattr(StopSignal, "came", came)
    steps = []
    while not steps or steps[-1] < STEPS:
        steps.append(last_checkpoint(run(tmp_path / "stopped", mode)))
    # In the middle of a line of the log, at an evaluation, elsewhere.
    assert steps == sorted(set(steps)) and len(steps) > 2 and any(step % 4 for step in steps[:-1])
    assert capsys.readouterr().out.count("stopped by SIGTERM") == len(steps) - 1
    assert differences(end_of(tmp_path / "stopped"), expected) == []


@pytest.mark.slow
def test_a_clock_that_jumps(tmp_path, monkeypatch, note):
    expected = end_of(run(tmp_path / "whole"))
    rng, now, now_ns = random.Random(0), time.time, time.time_ns
    jumped = [0.0]
    save = Checkpoints.save

    def jump_and_save(self, *args, **options):
        self.wait()  # Orbax gives up a save during which its 20 minutes pass by this clock
        jumped.append(rng.uniform(-1, 1) * 24 * 3600)
        save(self, *args, **options)

    monkeypatch.setattr(Checkpoints, "save", jump_and_save)
    monkeypatch.setattr(time, "time", lambda: now() + jumped[-1])
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jumped[-1] * 1e9))
    run(tmp_path / "run")
    assert len(jumped) > 3
    assert differences(end_of(tmp_path / "run"), expected) == []
    note("clock that jumps by a day", "nothing: durations are of a clock that only goes on", code=0)


def test_the_signal_is_noticed_once_and_the_handler_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.came()
        signal.raise_signal(signal.SIGTERM)
        assert stop.came()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(signal.SIGTERM) == before

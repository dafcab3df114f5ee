"""The trace of some steps; the profiler itself runs in one test."""

import sys

import jax
import jax.numpy as jnp
import pytest

from attnzoom_jax.training.profile import Profile


@pytest.fixture
def traces(monkeypatch):
    """What the profiler was told, in order."""
    told = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: told.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


def run(profile, start, last, most, told):
    """A loop of calls of at most `most` steps; returns the steps of each call and its events."""
    step, calls = start, []
    while step < last:
        events = len(told)
        profile.before(step)
        end = min(step + most, last, profile.next_stop(step))
        line = profile.after(end, jnp.zeros(()))
        calls.append((step + 1, end, told[events:], line))
        step = end
    profile.close()
    return calls


@pytest.mark.parametrize("most", [1, 50])
def test_the_steps_that_are_asked_for_are_in_it_and_no_other(tmp_path, traces, most):
    calls = run(Profile(tmp_path, (4, 6)), 0, 9, most, traces)
    started = [first for first, _, events, _ in calls if tmp_path in events]
    stopped = [(end, line) for _, end, events, line in calls if "stop" in events]
    assert started == [4] and stopped == [(6, f"trace of steps 4 to 6: {tmp_path}")]
    assert traces == [tmp_path, "stop"]


@pytest.mark.parametrize(
    ("steps", "start", "last", "expected"),
    [
        ((), 0, 9, 0),
        ((4, 6), 6, 9, 0),  # resumed behind it
        ((4, 6), 4, 9, 2),  # resumed in the middle: the rest of it
        ((4, 20), 0, 9, 2),  # the run is shorter
        ((1, 1), 0, 9, 2),
    ],
    ids=["none", "behind", "middle", "shorter", "first"],
)
def test_runs_that_do_not_have_all_of_the_steps(tmp_path, traces, steps, start, last, expected):
    run(Profile(tmp_path, steps), start, last, 3, traces)
    assert len(traces) == expected


def test_one_process_of_several_traces_and_all_make_the_same_calls(tmp_path, traces, monkeypatch):
    here = run(Profile(tmp_path, (4, 6)), 0, 9, 50, traces)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    traces.clear()
    there = run(Profile(tmp_path, (4, 6)), 0, 9, 50, traces)
    assert [call[:2] for call in there] == [call[:2] for call in here] and traces == []
    assert Profile(tmp_path, ()).next_stop(3) == sys.maxsize


def test_a_trace_is_written(tmp_path):
    profile = Profile(tmp_path / "profile", (1, 1))
    profile.before(0)
    assert profile.after(1, jnp.ones((4, 4)) @ jnp.ones((4, 4)))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 100

import math
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from attnzoom_jax.training import schedule


def config(optimizer=None, schedule=None) -> Any:
    return ml_collections.ConfigDict(
        {
            "optimizer": {"name": "sgd", "learning_rate": 0.1, **(optimizer or {})},
            "schedule": {"name": "constant", **(schedule or {})},
        }
    )


def schedule_of(
    total_steps: Any = 100, steps_per_epoch: Any = 10, learning_rate: Any = 0.1, **settings
) -> Any:
    return schedule.create_schedule(
        config({"learning_rate": learning_rate}, settings),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )


def values(rate, steps):
    """Compiled and not: division by constants differs between the two."""
    steps = np.arange(steps)
    compiled = jax.jit(jax.vmap(rate))(steps)
    np.testing.assert_allclose(compiled, [rate(int(s)) for s in steps], rtol=1e-5, atol=1e-8)
    return compiled


def test_constant():
    np.testing.assert_allclose(values(schedule_of(), 5), 0.1, rtol=1e-6)


def test_cosine_after_linear_warmup():
    def slow(step):
        if step < 20:
            return 0.1 * step / 20
        return 0.1 * (1 + math.cos(math.pi * (step - 20) / 80)) / 2

    want = [slow(step) for step in range(101)]
    for warmup in ({"warmup_steps": 20}, {"warmup_epochs": 2}, {"warmup_epochs": 1.96}):
        got = values(schedule_of(name="cosine", **warmup), 101)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    assert got[-1] == pytest.approx(0, abs=1e-8)
    without = values(schedule_of(name="cosine"), 101)
    assert without[0] == pytest.approx(0.1) and without[50] == pytest.approx(0.05)


def test_step_is_torch_step_lr():
    def step_lr(base, gamma, step_size, steps):
        """PyTorch's chained form."""
        rate, rates = base, []
        for step in range(steps):
            if step and step % step_size == 0:
                rate *= gamma
            rates.append(rate)
        return rates

    # 41 and 47: a compiled float division by them misses the boundary.
    for period in (1, 7, 41, 47):
        got = values(schedule_of(name="step", decay_steps=period, factor=0.5), 100)
        np.testing.assert_allclose(got, step_lr(0.1, 0.5, period, 100), rtol=1e-5)
    got = values(schedule_of(name="step", decay_epochs=3), 100)
    np.testing.assert_allclose(got, step_lr(0.1, 0.1, 30, 100), rtol=1e-5)


def test_step_at_boundaries_with_warmup():
    def slow(step):
        rate = 0.1 * 0.2 ** sum(step >= b for b in (30, 60, 80))
        return rate * min(step / 10, 1)

    want = [slow(step) for step in range(100)]
    for boundaries in ({"boundary_steps": (30, 60, 80)}, {"boundary_epochs": [3, 6, 8.0]}):
        got = values(schedule_of(name="step", factor=0.2, warmup_epochs=1, **boundaries), 100)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("total", [2, 3, 4, 10, 97, 100])
@pytest.mark.parametrize(
    "settings", [{}, {"pct_start": 0.45, "div_factor": 5.0, "final_div_factor": 100.0}]
)
def test_one_cycle_is_torch_one_cycle_lr(total, settings):
    def slow(step) -> Any:
        """PyTorch's loop over the phases."""
        pct = settings.get("pct_start", 0.3)
        initial = 0.1 / settings.get("div_factor", 25)
        phases = [
            (pct * total - 1, initial, 0.1),
            (total - 1, 0.1, initial / settings.get("final_div_factor", 1e4)),
        ]
        start_step = 0
        for i, (end_step, start, end) in enumerate(phases):
            if step <= end_step or i == len(phases) - 1:
                done = (step - start_step) / (end_step - start_step)
                return end + (start - end) / 2 * (math.cos(math.pi * done) + 1)
            start_step = end_step

    got = values(schedule_of(name="one_cycle", total_steps=total, **settings), total)
    np.testing.assert_allclose(got, [slow(step) for step in range(total)], rtol=1e-4, atol=2e-9)


def slow_plateau(metrics, mode, factor, patience, threshold=1e-4):
    """PyTorch's ReduceLROnPlateau, relative threshold: the scale after each evaluation."""
    best = math.inf if mode == "min" else -math.inf
    bad, scale, scales = 0, 1.0, []
    for value in metrics:
        better = value < best * (1 - threshold) if mode == "min" else value > best * (1 + threshold)
        if better:
            best, bad = value, 0
        else:
            bad += 1
        if bad > patience:
            scale, bad = scale * factor, 0
        scales.append(scale)
    return scales


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("threshold", [1e-4, 0.1])
def test_plateau_is_torch_reduce_lr_on_plateau(mode, patience, threshold):
    rng = np.random.default_rng(0)
    rise = np.minimum(np.arange(40) / 20, 1) + 0.2 * rng.random(40) + 1
    metrics = np.round(rise if mode == "max" else 4 - rise, 3).tolist()
    metrics[25] = math.nan
    settings = {
        "name": "plateau",
        "mode": mode,
        "factor": 0.5,
        "patience": patience,
        "threshold": threshold,
    }
    plateau: Any = schedule.create_plateau(config(schedule=settings))
    state = plateau.init({})
    update, scales = jax.jit(schedule.plateau_update), []
    for value in metrics:
        state = update(state, value)
        scales.append(float(schedule.plateau_scale(state)))
    want = slow_plateau(metrics, mode, 0.5, patience, threshold)
    assert want[-1] < 0.6  # the sequence does lower the rate
    np.testing.assert_allclose(scales, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"name": "cosine", "warmup": 5}, "'warmup'; did you mean 'warmup_steps'"),
        ({"name": "cosine", "warmup_steps": 5, "warmup_epochs": 1}, "expected one of the two"),
        ({"name": "cosine", "warmup_epochs": 10}, "warm-up takes 100 of 100 steps"),
        ({"name": "one_cycle", "warmup_steps": 5}, "unknown key for schedule 'one_cycle'"),
        ({"name": "one_cycle", "pct_start": 1.0}, "pct_start is 1.0"),
        ({"name": "step"}, "expected one of decay_steps"),
        ({"name": "step", "decay_steps": 3, "boundary_steps": (4,)}, "expected one of decay_"),
        ({"name": "step", "decay_steps": 0}, "decay_steps is 0"),
        ({"name": "step", "boundary_steps": (3, 3)}, "expected different steps"),
        ({"name": "plateau"}, "schedule.mode is None; the plateau schedule expects 'min'"),
        ({"name": "plateau", "mode": "min", "factor": 1.0}, "schedule.factor is 1.0"),
        ({"name": "plateau", "mode": "min", "patience": -1}, "patience is -1"),
    ],
)
def test_bad_schedule(settings, message):
    with pytest.raises(ValueError) as error:
        schedule_of(**settings)
        schedule.create_plateau(config(schedule=settings))
    assert message in str(error.value)


def test_none_counts_as_absent():
    both = {"name": "cosine", "warmup_steps": None, "warmup_epochs": 2, "factor": None}
    assert float(schedule_of(**both)(10)) == pytest.approx(0.05)

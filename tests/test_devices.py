"""One device and four give the same training, and so do the two data paths."""

from typing import Any

import jax
import numpy as np
import pytest

import train
from attnzoom_jax.training.writer import read_metrics
from configs import demo


def config(optimizer, *, cache="host", **changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {
        "name": "resnet",
        "stem": "small",
        "width": 4,
        "stage_sizes": (1,),
        "insert": {"stage1": {"name": "attention_zoom"}},
    }
    base.optimizer = optimizer
    base.schedule = {"name": "cosine"}
    base.data.update({"cache": cache, "steps_per_call": 2})
    base.augment.update({"mixup": 0.2})
    base.update({"total_steps": 5, "log_every_steps": 1, "eval_every_steps": 5})
    base.update(changes)
    return base


SGD = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
ADAM = {"name": "adam", "learning_rate": 3e-3}


def run(folder, settings, devices, **options):
    state = train.train(settings, str(folder), devices=jax.devices()[:devices], **options)
    lines = [line for line in read_metrics(folder) if "train/loss" in line]
    return state, [line["train/loss"] for line in lines]


def largest_difference(a, b):
    differences = jax.tree.map(lambda a, b: float(np.abs(np.subtract(a, b)).max()), a, b)
    return max(jax.tree.leaves(differences))


def test_sgd_on_four_devices_equals_sgd_on_one(tmp_path):
    one, losses = run(tmp_path / "one", config(SGD), 1)
    four, four_losses = run(tmp_path / "four", config(SGD), 4)
    assert len(next(iter(jax.tree.leaves(four))).sharding.device_set) == 4
    assert len(losses) == 5 and four_losses == pytest.approx(losses, abs=1e-5)
    assert largest_difference(one.params, four.params) < 1e-5
    assert largest_difference(one.batch_stats, four.batch_stats) < 1e-5
    # Begun on four, ended on one.
    run(tmp_path / "both", config(SGD), 4, stop_at=2)
    both, _ = run(tmp_path / "both", config(SGD), 1)
    assert int(both.step) == 5
    assert largest_difference(one.params, both.params) < 1e-5


def test_the_loss_of_adam_on_four_devices_equals_that_on_one(tmp_path):
    _, losses = run(tmp_path / "one", config(ADAM, cache="device"), 1)
    _, four_losses = run(tmp_path / "four", config(ADAM, cache="device"), 4)
    assert len(losses) == 5 and four_losses == pytest.approx(losses, abs=1e-5)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize("devices", [1, 4])
def test_both_data_paths_give_the_same_training(tmp_path, devices):
    options: Any = {"ema_decay": 0.9, "label_smoothing": 0.1}
    host, losses = run(tmp_path / "host", config(SGD, **options), devices)
    device, same = run(tmp_path / "device", config(SGD, cache="device", **options), devices)
    # Not the same bits: XLA fuses the steps of a loop otherwise, so sums round otherwise.
    assert losses == pytest.approx(same, abs=1e-6)
    assert largest_difference(host.variables(), device.variables()) < 1e-6
    assert largest_difference(host.params, device.params) < 1e-6
    assert int(host.step) == int(device.step) == 5

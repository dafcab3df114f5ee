"""6 steps in one process are 3 steps, a new process and 3 more steps, bit for bit."""

import itertools
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import train
from attnzoom_jax.data.device import index_batches
from attnzoom_jax.data.pipeline import train_batches
from attnzoom_jax.data.source import open_source
from attnzoom_jax.training import sharding
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.log import MEASURED
from attnzoom_jax.training.writer import read_metrics
from configs import demo

IN_A_NEW_PROCESS = """
import sys, train
from attnzoom_jax.training.workdir import Workdir
config = Workdir(sys.argv[1]).config()
train.train(config, sys.argv[1], devices=train.jax.devices()[:1])
"""


def config(cache, labels) -> Any:
    """Everything on that has randomness or a memory."""
    base: Any = demo.get_config("tiny")
    base.model = {
        "name": "resnet",
        "stem": "small",
        "width": 4,
        "stage_sizes": (1,),
        "insert": {"stage1": {"name": "attention_zoom"}},
    }
    base.optimizer = {
        "name": "adam",
        "learning_rate": 3e-3,
        "weight_decay": 1e-3,
        "clip_norm": 1.0,
        "learning_rate_multipliers": (("inserted/.*", 3.0), (".*", 1.0)),
    }
    base.schedule = {"name": "plateau", "mode": "max", "metric": "validation/top1", "patience": 0}
    base.augment.update({"mixup": 0.2, "cutmix": 1.0, "flip": True, "crop_padding": 4})
    base.augment.auto_augment = "cifar10" if cache == "host" else ""
    base.data.update({"cache": cache, "steps_per_call": 2})
    base.update({"total_steps": 6, "log_every_steps": 3, "eval_every_steps": 3, "ema_decay": 0.9})
    base.label_smoothing = 0.1
    if labels == "attributes":
        base.data.labels = labels
        base.losses.cross_entropy.name = "binary_cross_entropy"
        base.evals.validation.name = "attributes"
        base.best_metric = "validation/average_precision"
        base.schedule.update({"metric": base.best_metric})
    return base


def without_timing(folder):
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "labels"), [("host", "label"), ("device", "label"), ("device", "attributes")]
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, cache, labels, root):
    one_device = jax.devices()[:1]
    settings = config(cache, labels)
    unkilled = train.train(settings, str(tmp_path / "unkilled"), devices=one_device)

    killed = tmp_path / "killed"
    before = train.train(settings, str(killed), devices=one_device, stop_at=3)
    assert int(before.step) == 3
    # What a kill in the middle of step 5 and of a checkpoint leaves behind.
    stale = killed / "checkpoints" / "6.orbax-checkpoint-tmp"
    stale.mkdir()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/loss": 0.0}\n{"step": 6, "trai')
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(killed)]
    # XLA shares out sums by the number of devices that a process has: bits need the same one.
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(len(jax.devices()))}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"resuming {killed} from step 3" in run.stdout
    assert not stale.exists()

    checkpoints = Checkpoints(killed / "checkpoints", read_only=True)
    assert checkpoints.steps() == [3, 6]
    resumed = checkpoints.restore(6, unkilled, mesh=sharding.create_mesh(one_device))
    checkpoints.close()
    assert int(resumed.step) == 6
    for keys, leaf in jax.tree_util.tree_leaves_with_path(unkilled):
        name = jax.tree_util.keystr(keys)
        there = dict(jax.tree_util.tree_leaves_with_path(resumed))[keys]
        np.testing.assert_array_equal(there, leaf, err_msg=name)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), unkilled.params, before.params)
    assert all(jax.tree.leaves(moved))
    assert without_timing(killed) == without_timing(tmp_path / "unkilled")


def test_the_batches_go_on_where_they_were():
    source = open_source("fine_shapes/tiny", split="train")
    whole = list(itertools.islice(train_batches(source, batch_size=100, seed=0), 6))
    rest = itertools.islice(train_batches(source, batch_size=100, seed=0, start_step=3), 3)
    indices = index_batches(len(source), batch_size=100, seed=0, start_step=3)
    for batch, expected, rows in zip(rest, whole[3:], indices, strict=False):
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], [source[int(i)]["label"] for i in rows])
    assert not np.array_equal(whole[0]["label"], whole[3]["label"])

"""Two processes with two devices each train, evaluate and resume like one process with four.

Adam divides by the size of the gradient, so that rounding of a small one moves a parameter by as
much as a large one would: there the loss is compared, and the parameters with SGD.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import eval as eval_programme
import train
from attnzoom_jax.evaluation.restore import restore_model
from attnzoom_jax.models import create_model
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.workdir import Workdir, to_plain
from attnzoom_jax.training.writer import read_metrics
from configs import demo

# Trains each [folder, step to stop at, changes of the config] and evaluates where nothing changes.
IN_A_PROCESS = """
import json, sys
import jax
from absl import flags
import eval as eval_programme
import train
from attnzoom_jax import cli
from attnzoom_jax.training.workdir import Workdir

def main():
    cli.start_devices("cpu", many=True)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    for folder, stop_at, changes in json.loads(flags.FLAGS.jobs):
        config = Workdir(folder).config().unlock()
        config.update_from_flattened_dict(changes)
        state = train.train(config, folder, stop_at=stop_at)
        print("said by", jax.process_index(), int(state.step), flush=True)
        print("error of", jax.process_index(), file=sys.stderr, flush=True)
        if not changes:
            eval_programme.evaluate(folder, checkpoint="last")

flags.DEFINE_string("jobs", "", "")
cli.run(main)
"""
STEPS = 20
ROOT = pathlib.Path(__file__).parent.parent


def config(*, labels="label", **changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    base.optimizer = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    base.schedule = {"name": "cosine"}
    base.evals.localization.masks = ("object_mask",)
    if labels == "attributes":
        base.data.labels = labels
        base.losses.cross_entropy.name = "binary_cross_entropy"
        base.evals = {"validation": {"name": "attributes", "split": "validation"}}
        base.best_metric = "validation/average_precision"
    base.update({"total_steps": STEPS, "log_every_steps": 1, "eval_every_steps": STEPS // 2})
    base.update_from_flattened_dict(changes)
    return base


def sgd_config(root) -> Any:
    """From weights of a file."""
    return config(pretrained=str(root / "weights.npz"))


def adam_config() -> Any:
    """The other data path, a schedule with a memory, an evaluator that keeps of each example."""
    base = config(labels="attributes", **{"data.cache": "device", "data.steps_per_call": 5})
    base.optimizer = {"name": "adam", "learning_rate": 3e-3}
    base.schedule = {"name": "plateau", "mode": "max", "metric": base.best_metric, "patience": 0}
    base.ema_decay = 0.9
    return base


SPLIT_HEAD = {"mesh.model": 2, "sharding": [["head/kernel", [None, "model"]]]}


def start_two(jobs, folder):
    """Two processes; what they say goes to files of this folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", IN_A_PROCESS, f"--coordinator_address=localhost:{port}"]
    command += ["--num_processes=2", f"--jobs={json.dumps(jobs)}"]
    processes = []
    for i in range(2):
        with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
            processes.append(
                subprocess.Popen(
                    [*command, f"--process_id={i}"],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=err,
                )
            )
    return processes


def wait_for(path, processes):
    """Until a file has a line; the processes must live."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if path.exists() and "\n" in path.read_text():
            return
        assert all(process.poll() is None for process in processes), "a process ended"
        time.sleep(0.1)
    pytest.fail(f"{path} does not come")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs, and what became of the second process when the first was killed."""
    root = tmp_path_factory.mktemp("runs")
    sgd, adam = sgd_config(root), adam_config()
    endless = config(total_steps=10**6, eval_every_steps=10**6)
    model = create_model(num_classes=16, **sgd.model.to_dict())
    weights = init_variables(model, (32, 32, 3), 7)
    np.savez(root / "weights.npz", **flatten_dict(weights, sep="/"))
    for name, settings in (("sgd", sgd), ("adam", adam), ("endless", endless)):
        Workdir(root / name).create()
        Workdir(root / name).write("config.json", to_plain(settings))
    train.train(sgd, str(root / "begun_on_one"), stop_at=STEPS // 2)
    jobs = [
        [str(root / "sgd"), STEPS, {}],
        [str(root / "adam"), STEPS, {}],
        [str(root / "begun_on_one"), STEPS, SPLIT_HEAD],
        [str(root / "endless"), None, {}],
    ]
    processes = start_two(jobs, root)
    # They need the two cores for most of this time; what is compared comes meanwhile.
    train.train(sgd, str(root / "one_sgd"))
    train.train(adam, str(root / "one_adam"))
    wait_for(root / "endless" / "metrics.jsonl", processes)
    processes[0].kill()
    processes[0].wait()
    return root, processes[1].wait(timeout=60)


def losses(folder):
    lines = {
        line["step"]: line["train/loss"] for line in read_metrics(folder) if "train/loss" in line
    }
    assert list(lines) == list(range(1, STEPS + 1))
    return list(lines.values())


def params(folder):
    return restore_model(str(folder), checkpoint="last", mesh=None).variables


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)))


@pytest.mark.slow
def test_two_processes_train_like_one(runs):
    root, _ = runs
    assert losses(root / "sgd") == pytest.approx(losses(root / "one_sgd"), abs=1e-5)
    assert largest_difference(params(root / "sgd"), params(root / "one_sgd")) < 1e-5
    lines = [line for line in read_metrics(root / "adam") if "train/loss" in line]
    assert lines[-1]["step"] == STEPS
    expected = [line for line in read_metrics(root / "one_adam") if "train/loss" in line]
    for line, other in zip(lines, expected, strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric"), [("sgd", "test/object_energy"), ("adam", "validation/average_precision")]
)
def test_two_processes_evaluate_like_one(runs, name, metric):
    root, _ = runs
    theirs = json.loads((root / name / "eval.json").read_text())
    assert theirs["process_count"] == 2 and theirs["device_count"] == 4
    ours = eval_programme.evaluate(str(root / name), checkpoint="last")
    assert 0 < ours[metric] < 1
    assert theirs["metrics"] == pytest.approx(ours, abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(runs, tmp_path):
    root, _ = runs
    expected = losses(root / "one_sgd")
    # Begun by one process on four devices, ended by two with two each and a head in two parts.
    assert losses(root / "begun_on_one") == pytest.approx(expected, abs=1e-5)
    # Begun by two, ended by one.
    shutil.copytree(root / "sgd", tmp_path / "sgd")
    shutil.rmtree(tmp_path / "sgd" / "checkpoints" / str(STEPS))
    train.train(sgd_config(root), str(tmp_path / "sgd"))
    assert losses(tmp_path / "sgd") == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_first_process_speaks_and_errors_come_from_all(runs):
    root, _ = runs
    first, second = (root / "0.out").read_text(), (root / "1.out").read_text()
    first_errors, second_errors = (root / "0.err").read_text(), (root / "1.err").read_text()
    assert "4 x cpu (cpu), 2 process(es)" in first and "said by 0 20" in first
    assert "done: step 20" in first
    assert "said by" not in second and "step" not in second
    assert "error of 0" in first_errors and "error of 1" in second_errors


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_says_so(runs):
    root, code = runs
    assert code not in (0, None)
    last = (root / "1.err").read_text().strip().splitlines()[-1]
    assert last.startswith("error: process 1 of 2: ended before its time: another process is gone")

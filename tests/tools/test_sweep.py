"""tools/sweep.py: what is drawn, what is written down, and that a killed search goes on."""

import collections
import contextlib
import fcntl
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import optuna
import pytest
from PIL import Image

import eval as eval_programme
from attnzoom_jax.training.search import suggest
from attnzoom_jax.training.workdir import Workdir
from configs import demo

ROOT = pathlib.Path(__file__).parent.parent.parent
# A module by its name, so that the processes that it starts find it too.
sys.path.insert(0, str(ROOT / "tools"))
sweep = importlib.import_module("sweep")

CONFIG = """
from configs import demo

def get_config(mode=""):
    config = demo.get_config("tiny")
    config.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    config.schedule = {"name": "constant"}
    config.optimizer.momentum = 0.5
    config.platform = "cpu"
    config.update({"total_steps": 80, "log_every_steps": 5, "eval_every_steps": 10})
    config.update({"keep_checkpoints": 1})
    return config

def get_sweep(mode=""):
    return SPACE
"""
SPACE = {
    "optimizer.learning_rate": ("choice", (0.02, 1e35)),
    "optimizer.weight_decay": ("log", (1e-6, 1e-2)),
    "optimizer.name": ("choice", ("adam", "sgd")),
    "optimizer.momentum": ("uniform", (0.7, 1.0), {"optimizer.name": ("sgd",)}),
}


def config_file(folder, space=None) -> str:
    path = folder / "config.py"
    path.write_text(CONFIG.replace("SPACE", repr(SPACE if space is None else space)))
    return str(path)


def the_search(folder, *, space=None, seed=0, **overrides) -> Any:
    """A search as the command line gives it."""
    config: Any = demo.get_config("tiny")
    config.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    config.optimizer.momentum = 0.5
    config.seed = seed
    config.lock()
    config.update_from_flattened_dict(overrides)
    file = config_file(folder, space)
    return sweep.Search(
        config=config, config_file=file, overrides=overrides, folder=folder / "search"
    )


def random_trials(count, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask() for _ in range(count)]


# What is drawn.


def test_what_the_command_line_sets_is_not_drawn(tmp_path):
    search = the_search(tmp_path, **{"optimizer.name": "adam", "optimizer.learning_rate": 0.5})
    assert set(search.searched) == {"optimizer.weight_decay", "optimizer.momentum"}
    for trial in random_trials(5):
        drawn = suggest(trial, search.space, search.config, search.fixed)
        assert set(drawn) == {"optimizer.weight_decay", "optimizer.momentum"}
        assert drawn["optimizer.momentum"] is None and set(trial.params) == {
            "optimizer.weight_decay"
        }


@pytest.mark.parametrize("metric", ["test/top1", ""])
def test_no_metric_of_the_test_set_is_searched(metric, tmp_path):
    search = the_search(tmp_path, best_metric=metric)
    with pytest.raises(ValueError, match=r"of the test set|best_metric is empty"):
        sweep.sweep(search, trials=1)
    assert not search.folder.exists()


# The search itself, with a stand-in for training.


@pytest.fixture
def trained(monkeypatch):
    """Training of no time, whose best value is best at a weight decay of 1e-4.

    Returns:
        [(folder, overrides)] of all that was trained.
    """
    calls = []

    def train_apart(config, folder, overrides):
        calls.append((folder.name, overrides))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        if config.optimizer.learning_rate > 1:
            return "the loss is NaN"
        best = 1 / (1 + (math.log10(config.optimizer.weight_decay) + 4) ** 2)
        values = [0.5 * best, best, math.nan, 0.9 * best]
        lines = [json.dumps({"step": i, "validation/top1": v}) for i, v in enumerate(values)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return ""

    monkeypatch.setattr(sweep, "train_apart", train_apart)
    return calls


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(sweep, "save_search", lambda path, found, searched: None)


def test_what_is_written_down(tmp_path, trained, capsys):
    search = the_search(tmp_path, **{"data.dir": "a b"})
    found = sweep.sweep(search, trials=3)
    assert json.loads((search.folder / "sweep.json").read_text()) == found
    states = collections.Counter(trial["state"] for trial in found["trials"])
    assert set(states) == {"failed", "complete"} and states.total() == 3
    for i, trial in enumerate(found["trials"]):
        assert trial["number"] == i and trial["workdir"] == str(search.folder / f"trial_{i:04d}")
        # What is drawn comes on top of what the command line says, and is what was trained.
        assert trained[i] == (f"trial_{i:04d}", {"data.dir": "a b", **trial["params"]})
        if trial["params"]["optimizer.learning_rate"] > 1:
            assert trial["value"] is None and trial["error"] == "the loss is NaN"
        else:
            decay = trial["params"]["optimizer.weight_decay"]
            assert trial["value"] == pytest.approx(1 / (1 + (math.log10(decay) + 4) ** 2))
    best = max(filter(lambda t: t["value"] is not None, found["trials"]), key=lambda t: t["value"])
    words = shlex.split(found["best"].pop("command"))
    assert found["best"] == best
    assert words[:3] == ["python", "train.py", f"--config={search.config_file}"]
    values = {"data.dir": "a b", **best["params"]}
    assert words[3:-1] == [f"--config.{key}={value}" for key, value in values.items()]
    assert words[-1] == f"--workdir={search.folder}/best"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("trial_0002 (3/3)  optimizer.learning_rate=")
    assert lines[2].endswith("ETA 0s") and f"best {best['value']:.4g} (trial_" in lines[2]
    with Image.open(search.folder / "sweep.png") as image:
        assert image.width > 600 and np.ptp(np.asarray(image.convert("L"))) > 100


def test_a_killed_search_goes_on_as_if_nothing_had_been(tmp_path, trained, monkeypatch, no_picture):
    whole = sweep.sweep(the_search(tmp_path), trials=14)
    (tmp_path / "killed").mkdir()
    killed = the_search(tmp_path / "killed")
    train_apart, trained[:] = sweep.train_apart, []

    def killed_within(config, folder, overrides):
        train_apart(config, folder, overrides)
        raise KeyboardInterrupt

    for number in (0, 4, 12):  # the last one is drawn by TPE, the others at random
        sweep.sweep(killed, trials=number) if number else None
        monkeypatch.setattr(sweep, "train_apart", killed_within)
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(killed, trials=14)
        monkeypatch.setattr(sweep, "train_apart", train_apart)
    found = sweep.sweep(killed, trials=14)
    keys = ("number", "state", "value", "params", "error")
    for trial, expected in zip(found["trials"], whole["trials"], strict=True):
        assert {key: trial[key] for key in keys} == {key: expected[key] for key in keys}
    # Only the trials that were killed are trained twice, with the same parameters.
    counts = collections.Counter(name for name, _ in trained)
    assert {name for name, count in counts.items() if count == 2} == {
        f"trial_{number:04d}" for number in (0, 4, 12)
    }
    assert len({(name, str(overrides)) for name, overrides in trained}) == 14
    # Nothing is left to do.
    trained.clear()
    assert sweep.sweep(killed, trials=10) == found and not trained


def test_trials_differ_and_depend_on_the_seed(tmp_path, trained, no_picture):
    decays = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        found = sweep.sweep(the_search(tmp_path / str(seed), seed=seed), trials=5)
        decays += [trial["params"]["optimizer.weight_decay"] for trial in found["trials"]]
    assert len(set(decays)) == 10


def test_the_search_finds_the_optimum(tmp_path, trained, no_picture):
    found = sweep.sweep(the_search(tmp_path), trials=30)
    assert found["best"]["value"] > 0.95
    later = [t["params"]["optimizer.weight_decay"] for t in found["trials"][15:]]
    assert abs(np.median(np.log10(later)) + 4) < 0.6


def test_the_lowest_value_is_the_best_of_a_metric_that_shall_fall(tmp_path, trained, no_picture):
    found = sweep.sweep(the_search(tmp_path, best_mode="min"), trials=5)
    values = [trial["value"] for trial in found["trials"] if trial["value"] is not None]
    assert found["best"]["value"] == min(values) and len(set(values)) > 1


def test_an_error_stops_the_search_and_leaves_the_trial(tmp_path, trained, monkeypatch, no_picture):
    search, train_apart = the_search(tmp_path), sweep.train_apart

    def wrong(config, folder, overrides):
        raise ValueError("data set not prepared")

    monkeypatch.setattr(sweep, "train_apart", wrong)
    with pytest.raises(ValueError, match="not prepared"):
        sweep.sweep(search, trials=2)
    monkeypatch.setattr(sweep, "train_apart", train_apart)
    # Nothing is lost, so that a mended config may take the folder.
    mended = the_search(tmp_path, total_steps=3)
    assert len(sweep.sweep(mended, trials=2)["trials"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 5}, "\n  + total_steps = 5\n"),
        ({"optimizer.name": "sgd"}, "+ set by the command line = ['optimizer.name']"),
        ({"space": {"optimizer.b1": ("uniform", (0.5, 0.9))}}, "+ get_sweep.optimizer.b1.kind"),
    ],
)
def test_a_folder_of_another_search_is_refused(tmp_path, trained, no_picture, changes, message):
    sweep.sweep(the_search(tmp_path), trials=1)
    with pytest.raises(ValueError, match="holds a search of another config") as error:
        sweep.sweep(the_search(tmp_path, **changes), trials=2)
    assert message in str(error.value)
    # What no number depends on may change.
    assert len(sweep.sweep(the_search(tmp_path, **{"data.dir": "/x"}), trials=2)["trials"]) == 2


def test_a_damaged_study_is_named_and_nothing_is_lost_with_it(tmp_path, trained, no_picture):
    search = the_search(tmp_path)
    before = sweep.sweep(search, trials=3)
    study = search.folder / "study.db"
    study.write_text("no data base")
    with pytest.raises(ValueError, match=r"study\.db is no study; delete it"):
        sweep.sweep(search, trials=3)
    study.unlink()
    after = sweep.sweep(search, trials=3)
    assert [t["params"] for t in after["trials"]] == [t["params"] for t in before["trials"]]


def test_a_second_process_is_refused(tmp_path, trained, no_picture):
    search = the_search(tmp_path)
    search.folder.mkdir()
    with (search.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process searches in"):
            sweep.sweep(search, trials=1)
    sweep.sweep(search, trials=1)


def test_without_optuna_one_line_names_the_extra():
    code = (
        "import runpy, sys; sys.modules['optuna'] = None; sys.argv = ['sweep.py'];"
        "runpy.run_path('tools/sweep.py', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ") and 'pip install -e ".[sweep]"' in run.stderr


# Processes that train.


@pytest.mark.slow
def test_a_process_says_what_became_of_it(tmp_path):
    config = the_search(tmp_path, platform="cpu", **{"optimizer.name": "sgd"}).config
    nan = sweep.changed(config, {"optimizer.learning_rate": 1e35, "total_steps": 1})
    message = sweep.train_apart(nan, tmp_path / "nan", {"optimizer.learning_rate": 1e35})
    assert "NaN or infinite at step 1" in message
    assert Workdir(tmp_path / "nan").overrides() == {"optimizer.learning_rate": 1e35}
    assert "compiling" in (tmp_path / "nan" / "log.txt").read_text()

    wrong = sweep.changed(config, {"model.name": "resnet19"})
    with pytest.raises(ValueError, match=r"wrong: unknown model 'resnet19'; did you mean"):
        sweep.train_apart(wrong, tmp_path / "wrong", {})


@pytest.mark.slow
@pytest.mark.parametrize("cause", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_fails_and_one_that_is_stopped_stops_the_search(tmp_path, cause):
    def end() -> None:
        while not (tmp_path / "log.txt").exists():
            time.sleep(0.05)
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        os.kill(child.pid, cause)

    thread = threading.Thread(target=end)
    thread.start()
    config = the_search(tmp_path, platform="cpu", **{"optimizer.name": "sgd"}).config
    expected: Any = contextlib.nullcontext()
    if cause == signal.SIGTERM:
        expected = pytest.raises(ValueError, match=r"was stopped by SIGTERM; the same command")
    with expected:
        assert "its process died (SIGKILL)" in sweep.train_apart(config, tmp_path, {})
    thread.join()


def is_running(pid) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def wait_for(condition, seconds=120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_search_that_is_killed_in_a_trial_goes_on_with_it(tmp_path):
    """With what a person types; seed 2 draws two trials that train and one that fails."""
    folder = tmp_path / "search"
    file = config_file(tmp_path)
    command = [sys.executable, "tools/sweep.py", f"--config={file}", f"--workdir={folder}"]
    command += ["--trials=3", "--config.seed=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    running = folder / "trial_0000"
    wait_for(lambda: list((running / "checkpoints").glob("[0-9]*0")) or process.poll() is not None)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert children
    wait_for(lambda: not any(map(is_running, children)), seconds=20)
    assert not list((running / "checkpoints").glob("80"))

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"going on with {running}\ntrial_0000 (1/3)")
    assert f"resuming {running} from step " in (running / "log.txt").read_text()
    found = json.loads((folder / "sweep.json").read_text())
    rates = [trial["params"]["optimizer.learning_rate"] for trial in found["trials"]]
    assert sorted(rates) == [0.02, 0.02, 1e35]
    for rate, trial in zip(rates, found["trials"], strict=True):
        assert trial["state"] == ("complete" if rate < 1 else "failed")
        assert trial["params"].items() <= Workdir(trial["workdir"]).overrides().items()
    # The command trains what was trained: in the folder of the trial, nothing is left to do.
    best = found["best"]
    words = shlex.split(best["command"])
    assert words[:2] == ["python", "train.py"] and words[-1] == f"--workdir={folder}/best"
    again = [sys.executable, *words[1:-1], f"--workdir={best['workdir']}"]
    run = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "nothing to do" in run.stdout, run.stderr
    assert eval_programme.evaluate(best["workdir"])["validation/top1"] == pytest.approx(
        best["value"]
    )

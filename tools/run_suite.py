"""Run a suite: several configs, several seeds each, trained and evaluated into one result file.

    python tools/run_suite.py --suite=attention_zoom_small --workdir=runs/attention_zoom_small

A suite is a file in configs/suites/. Each run has its own folder, WORKDIR/<run>_seed<seed>, on
which eval.py and explain.py work. The same command goes on where it was stopped: train.py resumes
what is unfinished, has nothing to do where a run is done, and refuses a folder of another config.
Runs that the suite names as "tuned" go through tools/tune_masks.py as well: what it says of each
transform is a further run, <run>_<transform>.
results/<suite>.json holds every run that is done, after each of them; `python tools/make_tables.py`
makes the tables.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.training.progress import format_duration
from attnzoom_jax.training.workdir import MACHINE_KEYS, to_plain

ROOT = pathlib.Path(__file__).parent.parent
STUDY = "mask_study.json"


def run_suite(
    name: str,
    workdir: pathlib.Path,
    *,
    machine: dict[str, str] | None = None,
    results: pathlib.Path = ROOT / "results",
) -> pathlib.Path:
    """Train and evaluate every run of a suite that is not done yet.

    Args:
        name: of a file in configs/suites/.
        workdir: folder of the runs.
        machine: config keys of the machine at hand, such as data.dir; not written down.
        results: folder of result files.

    Returns:
        The result file, rewritten after each run.

    Raises:
        ValueError: unknown suite; a run that failed, with the command that shows why.
    """
    suite = load_suite(name)
    # Seed by seed, so that what is there at any time compares fairly.
    todo = [(seed, run) for seed in suite["seeds"] for run in suite["runs"]]
    began, done_here = time.monotonic(), 0
    result = results / f"{name}.json"
    for position, (seed, run) in enumerate(todo, start=1):
        folder = workdir / f"{run}_seed{seed}"
        print(f"[{position}/{len(todo)}] {run}, seed {seed}: {folder}", flush=True)
        train, evaluate = commands(suite, run, seed, folder.resolve(), machine or {})
        _call(train)
        is_done = _is_evaluated(folder, suite, seed)
        if not is_done:
            _call(evaluate)
        if run in suite.get("tuned", ()) and not _is_newer(folder / STUDY, folder / "eval.json"):
            is_done = False
            _call(["tools/tune_masks.py", f"--workdir={folder.resolve()}"])
        if not is_done:
            done_here += 1
            left = (time.monotonic() - began) / done_here * (len(todo) - position)
            print(f"[{position}/{len(todo)}] done, about {format_duration(left)} left", flush=True)
        _write(result, suite, [(s, r) for s, r in todo[:position]], workdir)
    return result


def load_suite(name: str) -> dict[str, Any]:
    """The suite of a file in configs/suites/: runs, overrides and seeds."""
    names = sorted(path.stem for path in (ROOT / "configs" / "suites").glob("[a-z]*.py"))
    if name not in names:
        raise unknown_name("suite", name, names)
    sys.path.insert(0, str(ROOT))  # of a programme in tools/, Python looks there alone
    return importlib.import_module(f"configs.suites.{name}").get_suite()


def commands(
    suite: dict[str, Any], run: str, seed: int, folder: pathlib.Path, machine: dict[str, str]
) -> list[list[str]]:
    """The commands of one run, as a person would type them."""
    overrides = {**suite["overrides"], "seed": seed, **machine}
    train = ["train.py", f"--config={suite['runs'][run]}", f"--workdir={folder}"]
    train += [f"--config.{key}={value}" for key, value in overrides.items()]
    return [train, ["eval.py", f"--workdir={folder}"]]


def _call(command: list[str]) -> None:
    # A process per run: what one of them leaves in memory does not reach the next.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
    if code:
        raise ValueError(f"exit code {code} of: python {' '.join(command)}")


def _is_evaluated(folder: pathlib.Path, suite: dict[str, Any], seed: int) -> bool:
    """Whether eval.json is of the finished run, and of what the suite asks for."""
    file = folder / "eval.json"
    if not _is_newer(file, folder / "run.json"):
        return False
    found = json.loads(file.read_text())["overrides"]
    given = {key: value for key, value in found.items() if key not in (*MACHINE_KEYS, "platform")}
    return given == to_plain({**suite["overrides"], "seed": seed})


def _is_newer(file: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether a file is there, and not older than another one."""
    return file.exists() and file.stat().st_mtime >= other.stat().st_mtime


def _write(
    result: pathlib.Path,
    suite: dict[str, Any],
    done: list[tuple[int, str]],
    workdir: pathlib.Path,
) -> None:
    runs = []
    for seed, run in done:
        folder = workdir / f"{run}_seed{seed}"
        evaluation = json.loads((folder / "eval.json").read_text())
        training = json.loads((folder / "run.json").read_text())
        keys = ("metrics", "step", "commit", "versions", "device_kind", "device_count", "cpu_count")
        kept = {key: evaluation[key] for key in keys}
        kept["seed"] = seed
        runs.append({"run": run, **kept, "training_s": training["duration_s"]})
        if run not in suite.get("tuned", ()):
            continue
        study = json.loads((folder / STUDY).read_text())
        for name, one in {**study["transforms"], **study["controls"]}.items():
            if name != "identity":  # nothing was trained for it
                further = {**kept, "metrics": one["test"], "training_s": 0.0}
                runs.append({"run": f"{run}_{name}", **further})
    content = {"suite": to_plain(suite), "runs": runs}
    result.parent.mkdir(parents=True, exist_ok=True)
    unfinished = result.with_name(result.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(result)


def main() -> int:
    """Parse the arguments and run; the return value is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", required=True, help="name of a file in configs/suites/")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the runs")
    keys = (*MACHINE_KEYS, "platform")
    for key in keys:
        parser.add_argument(f"--{key}", default="", help=f"config.{key} of every run")
    given = vars(parser.parse_args())
    machine = {key: given[key] for key in keys if given[key]}
    try:
        result = run_suite(given["suite"], given["workdir"], machine=machine)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"written: {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

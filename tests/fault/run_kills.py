"""Kills training at random moments, starts it again, and compares the end with an unkilled run.

    python -m tests.fault.run_kills --kills=100 --out=kills.json

A run is killed up to ten times, then it may go on to its end; so for 100 kills there are at least
ten runs. Moments of a kill: some time after the start, after a line of the log, or while a
checkpoint is being saved.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnzoom_jax.training.log import MEASURED
from attnzoom_jax.training.writer import read_metrics
from tests.fault.programmes import Programme, Programmes

MOMENTS = ("after the start", "after a line of the log", "while saving")
UNFINISHED = "with a checkpoint half saved"  # counted besides
KILLS_OF_A_RUN = 10
POLL = 0.0005  # seconds
PATIENCE = 300  # seconds, for a run that neither goes on nor ends


def start(programmes: Programmes, folder: pathlib.Path, mode: str) -> Programme:
    """Start, or go on with, the tiny run."""
    config = f"--config=tests/fault/tiny.py{mode and ':' + mode}"
    return programmes.start("train.py", config, f"--workdir={folder}")


def kill_somewhere(programme: Programme, folder: pathlib.Path, rng: random.Random) -> str | None:
    """Kill a run at a random moment; which kind it was, or None if the run was quicker."""
    moment = rng.choice(MOMENTS)
    if moment == "after the start":
        _wait(programme, lambda: False, seconds=rng.uniform(0, 4))
    elif moment == "after a line of the log":
        lines = rng.randint(1, 8)
        _wait(programme, lambda: programme.out.count("\nstep ") >= lines)
        time.sleep(rng.uniform(0, 0.1))
    else:
        for _ in range(rng.randint(1, 5)):  # saved before, in this start
            _wait(programme, lambda: not _is_saving(folder))
            _wait(programme, lambda: _is_saving(folder))
        time.sleep(rng.uniform(0, 0.03))
    programme.send(signal.SIGKILL)
    return moment if programme.wait() == -signal.SIGKILL else None


def run_killed(
    programmes: Programmes, folder: pathlib.Path, mode: str, kills: int, rng: random.Random
) -> Counter[str]:
    """Kill a run up to so many times, then let it end; how often at which kind of moment."""
    done: Counter[str] = Counter()
    while sum(done[moment] for moment in MOMENTS) < kills:
        last = last_checkpoint(folder)
        programme = start(programmes, folder, mode)
        moment = kill_somewhere(programme, folder, rng)
        check_resumed(programme, last)
        if moment is None:
            check_ended(programme)
            return done
        done[moment] += 1
        if damaged := list((folder / "checkpoints").glob("*.damaged")):
            raise RuntimeError(f"kills left the damaged checkpoints {damaged}")
        done[UNFINISHED] += _is_saving(folder)
    last = last_checkpoint(folder)
    programme = start(programmes, folder, mode)
    programme.wait()
    check_resumed(programme, last)
    check_ended(programme)
    return done


def last_checkpoint(folder: pathlib.Path) -> int:
    """The step of the last whole checkpoint, 0 without."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_resumed(programme: Programme, step: int) -> None:
    """Raise unless a programme went on from this step, if it came so far as to say so."""
    said = re.search(r"^resuming .* from step (\d+)$", programme.out, re.M)
    if said and int(said[1]) != step:
        raise RuntimeError(f"it went on from step {said[1]} instead of {step}")


def check_ended(programme: Programme) -> None:
    """Raise unless a programme ended as it should."""
    if programme.code != 0:
        raise RuntimeError(f"exit code {programme.code}: {programme.err[-2000:]}")


def end_of(folder: pathlib.Path) -> dict[str, Any]:
    """What a run has come to: the arrays of its last checkpoint, its metrics without timings."""
    step = last_checkpoint(folder)
    found: dict[str, Any] = {"last checkpoint": np.asarray(step)}
    state = _read(folder.absolute() / "checkpoints" / str(step) / "default")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    for number, line in enumerate(read_metrics(folder)):
        for name in line.keys() - set(MEASURED):
            found[f"metrics.jsonl line {number} {name}"] = np.asarray(line[name])
    return found


def _read(path: pathlib.Path) -> Any:
    """A checkpoint's arrays in NumPy, whatever model they are of."""
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(path, restore_args=wanted)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    return sorted(
        name
        for name in a.keys() | b.keys()
        if name not in a
        or name not in b
        or a[name].dtype != b[name].dtype
        or a[name].tobytes() != b[name].tobytes()
    )


def kill_runs(kills: int, *, seed: int, folder: pathlib.Path, modes: list[str]) -> dict[str, Any]:
    """Kill runs so many times in all.

    Returns:
        {"kills", "runs", "moments": {kind: kills}, "lost": runs that could not go on or did not
        come to the end, "different": runs that ended otherwise, "examples": what differed}.
    """
    rng = random.Random(seed)
    moments: Counter[str] = Counter()
    runs, lost, different, examples = 0, 0, 0, []
    with Programmes(folder) as programmes:
        expected = {}
        for mode in modes:
            whole = start(programmes, folder / f"whole_{mode}", mode)
            whole.wait()
            check_ended(whole)
            expected[mode] = end_of(folder / f"whole_{mode}")
        while (left := kills - sum(moments[moment] for moment in MOMENTS)) > 0:
            runs += 1
            mode, workdir = modes[runs % len(modes)], folder / f"run_{runs}"
            try:
                moments += run_killed(programmes, workdir, mode, min(KILLS_OF_A_RUN, left), rng)
                names = differences(end_of(workdir), expected[mode])
            except RuntimeError as error:
                lost += 1
                examples.append(f"run {runs}: {error}")
                continue
            different += bool(names)
            examples += [f"run {runs}: {name}" for name in names[:3]]
            print(f"run {runs}: {dict(moments)}, {len(names)} differences", flush=True)
    total = sum(moments[moment] for moment in MOMENTS)
    return {
        "kills": total,
        "runs": runs,
        "moments": dict(moments),
        "lost": lost,
        "different": different,
        "examples": examples[:20],
    }


def _is_saving(folder: pathlib.Path) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _wait(programme: Programme, condition: Any, seconds: float = PATIENCE) -> None:
    """Until the condition holds, the programme has ended, or the seconds are over."""
    end = time.monotonic() + seconds
    while not condition() and not programme.is_over():
        if time.monotonic() > end:
            return
        time.sleep(POLL)


def main() -> int:
    """Parse the arguments and kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="file for the result")
    given = parser.parse_args()
    os.nice(10)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compile_cache")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        result = kill_runs(
            given.kills, seed=given.seed, folder=pathlib.Path(folder), modes=["", "device"]
        )
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["lost"] or result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())

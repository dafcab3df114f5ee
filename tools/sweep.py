"""Search hyper-parameters with Optuna over the space that a config file declares.

    pip install -e ".[sweep]"
    python tools/sweep.py --config=configs/attention_zoom.py --workdir=runs/sweep --trials=30

The file that --config names has, beside get_config, a function get_sweep that declares the space:
attnzoom_jax/training/search.py says how. What the command line sets (--config.optimizer.name=adam)
is not searched.

A trial is a training in WORKDIR/trial_0000 and so on; its value is the best of config.best_metric
in it, never a metric of the test set. The first ten are drawn at random, the others by TPE. After
each, sweep.json has all trials and the command that trains the best one, and sweep.png shows them.
The same command goes on where it was killed; --trials is the number of all.

A trial whose loss is no number, or that needs more memory than there is, has failed, and the search
goes on. Anything else that goes wrong stops it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import multiprocessing
import os
import pathlib
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

try:
    import optuna
except ImportError:
    sys.exit('error: the search needs Optuna, the extra "sweep": pip install -e ".[sweep]"')

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError

# train.py and the configs lie beside tools/.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import train
from attnzoom_jax import cli
from attnzoom_jax.training.progress import format_duration
from attnzoom_jax.training.search import (
    Space,
    best_value,
    changed,
    check_metric,
    read_space,
    suggest,
)
from attnzoom_jax.training.stop import StopSignal
from attnzoom_jax.training.workdir import FREE_KEYS, Workdir, differences, flatten, to_plain
from attnzoom_jax.viz.search import save_search

INTERRUPTIONS = ("SIGINT", "SIGTERM", "SIGHUP")
STUDY = "sweep"


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, and where.

    Attributes:
        config: of every trial but for what is drawn.
        config_file: as --config has it.
        overrides: what the command line changed in the config.
        folder: of the search.
    """

    config: Any
    config_file: str
    overrides: Mapping[str, Any]
    folder: pathlib.Path

    @functools.cached_property
    def space(self) -> Space:
        """What the config file declares."""
        return read_space(self.config_file, self.config)

    @functools.cached_property
    def fixed(self) -> list[str]:
        """The keys that the command line sets."""
        keys = tuple(self.overrides)
        return [n for n in self.space if n in keys or n.startswith(tuple(f"{k}." for k in keys))]

    @functools.cached_property
    def searched(self) -> Space:
        """The keys of which more than one value is tried."""
        return {n: key for n, key in self.space.items() if key.varies and n not in self.fixed}

    def trial_folder(self, number: int) -> pathlib.Path:
        """The run of a trial."""
        return self.folder / f"trial_{number:04d}"


def draw_next(search: Search, study: optuna.Study) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw the next trial: a function of the seed and of the finished trials alone.

    The study learns of a trial when it has finished. A search that was killed therefore draws the
    same trial again, and goes on in its folder.

    Returns:
        What `suggest` returns; {config key: Optuna's distribution} of what was drawn.
    """
    trials = study.get_trials()
    (seed,) = np.random.SeedSequence((search.config.seed, len(trials))).generate_state(1)
    sampler = optuna.samplers.TPESampler(seed=int(seed))
    in_memory = optuna.create_study(sampler=sampler, direction=study.direction)
    in_memory.add_trials(trials)
    trial = in_memory.ask()
    return suggest(trial, search.space, search.config, search.fixed), trial.distributions


@contextlib.contextmanager
def open_study(search: Search) -> Iterator[optuna.Study]:
    """The study in the folder of a search, for one process at a time.

    It lies in SQLite, where a kill in the middle of a write leaves what was before. Optuna's other
    file, a journal, cannot be read any more once a line follows a half-written one.

    Raises:
        ValueError: the folder holds another search, or another process searches there.
    """
    folder, config = search.folder, search.config
    folder.mkdir(parents=True, exist_ok=True)
    asked = {k: v for k, v in flatten(to_plain(config)).items() if k not in FREE_KEYS}
    asked |= {f"get_sweep.{name}": to_plain(vars(key)) for name, key in search.space.items()}
    asked["set by the command line"] = search.fixed
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process searches in --workdir={folder}") from error
        path = folder / "study.db"
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}")
        except DatabaseError as error:
            raise ValueError(
                f"{path} is no study; delete it: the trials are drawn again and stand in their "
                "folders"
            ) from error
        is_min = config.best_mode == "min"
        direction = StudyDirection.MINIMIZE if is_min else StudyDirection.MAXIMIZE
        try:
            study = optuna.create_study(
                study_name=STUDY, storage=storage, direction=direction, load_if_exists=True
            )
            lines = differences(study.user_attrs.get("asked", {}), asked)
            if lines and study.get_trials():
                raise ValueError(
                    f"{folder} holds a search of another config (- there, + given):\n  "
                    + "\n  ".join(lines)
                    + "\nname another --workdir, or delete this one"
                )
            if lines:  # a new study, or one without a trial: nothing is lost
                optuna.delete_study(study_name=STUDY, storage=storage)
                study = optuna.create_study(study_name=STUDY, storage=storage, direction=direction)
                study.set_user_attr("asked", asked)
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()


# Training.


def train_apart(config: Any, folder: pathlib.Path, overrides: Mapping[str, Any]) -> str:
    """Train in a process of its own, which writes what it has to say to log.txt.

    Every trial compiles anew, so that a process costs its start alone, a few seconds. It leaves no
    memory behind, and where there is not enough the system kills it and not the search.

    Args:
        config: of the run.
        folder: of the run.
        overrides: to be written down.

    Returns:
        "", or why the trial failed.

    Raises:
        ValueError: what is wrong with more than this trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, config, folder, dict(overrides))
    process = context.Process(target=_train, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        is_of_this_trial, message = receiver.recv()
    except EOFError:  # it trained, or died
        is_of_this_trial, message = True, ""
    process.join()
    code = process.exitcode or 0
    if not is_of_this_trial:
        raise ValueError(f"{folder}: {message}")
    if message or not code:
        return message
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if cause in INTERRUPTIONS:
        raise ValueError(f"{folder} was stopped by {cause}; the same command goes on with it")
    return f"its process died ({cause}), perhaps for want of memory; see {folder / 'log.txt'}"


def _train(sender: Any, config: Any, folder: pathlib.Path, overrides: dict[str, Any]) -> None:
    """Train, in the process of a trial; send (whether it is of this trial, what is wrong)."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (folder / "log.txt").open("a") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    logging.set_verbosity(logging.ERROR)
    try:
        cli.start_devices(config.platform, compile_cache=config.compile_cache)
        stop = StopSignal()
        train.train(config, str(folder), overrides=overrides, stop=stop)
        if stop.noticed:
            sender.send((False, "was stopped by SIGTERM; the same command goes on with it"))
    except (ValueError, OSError) as error:
        sender.send((False, str(error)))
    except FloatingPointError as error:
        sender.send((True, str(error)))
    except Exception as error:
        traceback.print_exc()
        is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        sender.send((is_memory, f"{line}; see {folder / 'log.txt'}"))


def _end_with_parent() -> None:
    """Without this, the trial of a killed search would go on beside that of the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def sweep(search: Search, *, trials: int) -> dict[str, Any]:
    """Search until there are so many trials, from where the folder stands.

    Args:
        search: what is searched, and where.
        trials: how many there shall be in all.

    Returns:
        What sweep.json holds.

    Raises:
        ValueError: what a person can mend, in one message.
    """
    check_metric(search.config)
    if not search.searched:
        raise ValueError("nothing is left to search: the command line sets every key of get_sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_study(search) as study:
        found = _write_down(search, study)
        while len(found["trials"]) < trials:
            study.add_trial(_run_trial(search, len(found["trials"]), *draw_next(search, study)))
            found = _write_down(search, study)
            print(_progress(found, search.searched, trials), flush=True)
    return found


def _run_trial(
    search: Search, number: int, drawn: dict[str, Any], distributions: dict[str, Any]
) -> FrozenTrial:
    """Train with what was drawn; the finished trial, for the study."""
    config, folder = search.config, search.trial_folder(number)
    if (folder / "config.json").exists():
        print(f"going on with {folder}", flush=True)
    begin = time.monotonic()
    error = train_apart(changed(config, drawn), folder, {**search.overrides, **drawn})
    value = None if error else best_value(folder, config.best_metric, config.best_mode)
    if value is None and not error:
        error = f"no evaluation gave a number for {config.best_metric}"
    seconds = round(time.monotonic() - begin, 1)
    return optuna.trial.create_trial(
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
        value=value,
        params={name: drawn.get(name) for name in distributions},
        distributions=distributions,
        user_attrs={"drawn": drawn, "error": error, "seconds": seconds},
    )


# What came out.


def _write_down(search: Search, study: optuna.Study) -> dict[str, Any]:
    """Write sweep.json and sweep.png; what the first one holds."""
    trials = [
        {
            "number": trial.number,
            "state": "failed" if trial.value is None else "complete",
            "value": trial.value,
            "params": trial.user_attrs["drawn"],
            "error": trial.user_attrs["error"],
            "seconds": trial.user_attrs["seconds"],
            "workdir": str(search.trial_folder(trial.number)),
        }
        for trial in study.get_trials()
    ]
    sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
    complete = [trial for trial in trials if trial["value"] is not None]
    best = max(complete, key=lambda trial: sign * trial["value"], default=None)
    found = {
        "config": search.config_file,
        "metric": search.config.best_metric,
        "mode": search.config.best_mode,
        "best": best and {**best, "command": _command(search, best["params"])},
        "trials": trials,
    }
    Workdir(search.folder).write("sweep.json", found)
    save_search(search.folder / "sweep.png", found, search.searched)
    return found


def _command(search: Search, params: Mapping[str, Any]) -> str:
    """What a person types to train with these parameters."""
    words = ["python", "train.py", f"--config={search.config_file}"]
    for key, value in {**search.overrides, **params}.items():
        value = to_plain(value) if isinstance(value, ConfigDict) else value
        words.append(f"--config.{key}={value}")
    return shlex.join([*words, f"--workdir={search.folder / 'best'}"])


def _progress(found: dict[str, Any], searched: Space, trials: int) -> str:
    """The line about the last trial."""
    done, best = found["trials"], found["best"]
    trial = done[-1]
    words = [f"trial_{trial['number']:04d} ({len(done)}/{trials})"]
    params = {name: trial["params"].get(name) for name in searched}
    words += [f"{name}={value}" for name, value in params.items() if value is not None]
    if trial["value"] is None:
        words.append(f"failed: {trial['error']}")
    else:
        words.append(f"{found['metric']} {trial['value']:.4g}")
    if best is not None:
        words.append(f"best {best['value']:.4g} (trial_{best['number']:04d})")
    seconds = sum(trial["seconds"] for trial in done) / len(done)
    words.append(f"{format_duration(trial['seconds'])}")
    return "  ".join([*words, f"ETA {format_duration(seconds * (trials - len(done)))}"])


def main() -> int:
    """Parse the flags and search."""
    flag: Any = flags.FLAGS["config"]
    search = Search(
        config=flags.FLAGS.config,
        config_file=flag.config_filename,
        overrides=cli.config_overrides(),
        folder=pathlib.Path(flags.FLAGS.workdir),
    )
    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the trials
    try:
        found = sweep(search, trials=flags.FLAGS.trials)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", flush=True)
        return 130
    best = found["best"]
    if best is None:
        print(f"no trial was completed; see {search.folder}/sweep.json", flush=True)
        return 1
    print(f"best: {found['metric']} {best['value']:.4g} in {best['workdir']}; trains it again:")
    print(f"  {best['command']}", flush=True)
    return 0


if __name__ == "__main__":
    cli.define_config_flag("Config file with get_sweep(), as configs/attention_zoom.py")
    flags.DEFINE_string("workdir", None, "Folder of the search")
    flags.DEFINE_integer("trials", 30, "How many there shall be in all", lower_bound=1)
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)

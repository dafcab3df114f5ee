"""The folder of a run: what was asked for, with what it ran, what came out.

config.json  overrides.json  run.json  metrics.jsonl  tensorboard/  checkpoints/  eval.json
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections

from attnzoom_jax.training.lock import Lock

# What may differ between a run and its continuation, because no number of the training depends on
# it; so may the evaluations that do not run while training.
FREE_KEYS = (
    *("platform", "mesh.data", "mesh.model", "sharding"),
    *("log_every_steps", "compile_cache", "data.dir", "data.num_threads"),
    *("remat", "profile_steps"),
)
# Folders of the machine at hand, of no use to others: result files are without them.
MACHINE_KEYS = ("compile_cache", "data.dir")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "attnzoom-jax")


class Workdir:
    """A run's folder; `with Workdir(path) as folder:` gives it back to others at the end.

    Args:
        path: of the folder; need not exist yet.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self._lock = Lock(self.path / "lock")

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def claim(
        self,
        config: ml_collections.ConfigDict,
        overrides: Mapping[str, Any],
        *,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the folder that of this config: write it down, or check that it is the same.

        A folder without a checkpoint holds nothing that could be lost: the new config replaces
        that of the run which stopped so early, perhaps because its config was wrong. Keys on which
        the training does not depend may change at any time. No other run can claim the folder
        until this process ends, or the `with` does.

        Args:
            config: of the run.
            overrides: {key: value} given on the command line.
            data: fingerprint of the data set, which run.json holds as `data`; None to take any.

        Raises:
            ValueError: the folder holds a run of another config or data set (the differences are
                listed), is in use, or cannot be written.
        """
        ours = to_plain(config)
        is_same = False
        if (self.path / "config.json").exists() and self.has_checkpoint():
            theirs = self.read("config.json")
            watched = tuple(f"evals.{name}." for name in ours.get("train_evals", ()))
            changed = differences(theirs, ours)
            is_same = not changed
            lines = [line for line in changed if not _is_free(line.split()[1], watched=watched)]
            self._refuse("config", lines)
            began_with = self.run_info().get("data")  # runs of earlier versions have none
            if data is not None and began_with is not None:
                self._refuse("data set", differences(began_with, data))
        with self._creating():
            self.path.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self._lock.take()
            if not is_same:
                self.write("overrides.json", to_plain(overrides))
                self.write("config.json", ours)

    def create(self) -> None:
        """Make the folder, unless it is there.

        Raises:
            ValueError: it cannot be made.
        """
        with self._creating():
            self.path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _creating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"cannot write into --workdir={self.path}: {error.strerror}"
            ) from error

    def _refuse(self, what: str, lines: list[str]) -> None:
        if lines:
            raise ValueError(
                f"{self.path} holds a run of another {what} (- there, + given):\n  "
                + "\n  ".join(lines)
                + "\nname another --workdir, or delete this one"
            )

    def has_run(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "config.json").exists()

    def has_checkpoint(self) -> bool:
        """Whether a run has come as far as its first checkpoint here."""
        return any(path.name.isdigit() for path in self.checkpoints.glob("*"))

    def config(self) -> Any:
        """The config of the run in this folder.

        Raises:
            ValueError: there is no run.
        """
        if not self.has_run():
            raise ValueError(f"--workdir={self.path} holds no run (no config.json); train first")
        return ml_collections.ConfigDict(_to_tuples(self.read("config.json"))).lock()

    def run_info(self) -> dict[str, Any]:
        """What run.json holds; {} before the first training step."""
        return self.read("run.json") if (self.path / "run.json").exists() else {}

    def overrides(self) -> dict[str, Any]:
        """What the command line of the run changed in its config."""
        path = self.path / "overrides.json"
        return self.read("overrides.json") if path.exists() else {}

    def write(self, name: str, content: Any) -> pathlib.Path:
        """Write a JSON file, whole or not at all; of several processes the first one writes.

        Raises:
            ValueError: it cannot be written.
        """
        path = self.path / name
        if jax.process_index() != 0:
            return path
        unfinished = path.with_name(path.name + ".tmp")
        text = json.dumps(content, indent=2) + "\n"
        try:
            unfinished.write_text(text)
            unfinished.replace(path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error
        return path

    def read(self, name: str) -> Any:
        """What a JSON file holds.

        Raises:
            ValueError: it is no JSON file.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON file ({error}); restore or delete it") from error


def provenance() -> dict[str, Any]:
    """Which code, libraries and devices a number comes from."""
    devices = jax.devices()
    return {
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_count": os.cpu_count(),
        "process_count": jax.process_count(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def to_plain(value: Any) -> Any:
    """A config, or a part of one, as JSON knows it: dictionaries, lists and plain values."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between two plain configs, as lines "- key = value" and "+ key = value"."""
    flat_a, flat_b = flatten(a), flatten(b)
    lines = []
    for key in sorted({*flat_a, *flat_b}):
        if key not in flat_a or key not in flat_b or flat_a[key] != flat_b[key]:
            lines += [f"- {key} = {flat_a[key]}"] if key in flat_a else []
            lines += [f"+ {key} = {flat_b[key]}"] if key in flat_b else []
    return lines


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_free(key: str, *, watched: tuple[str, ...]) -> bool:
    return key in FREE_KEYS or (key.startswith("evals.") and not key.startswith(watched))


def _to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tuples(item) for key, item in value.items()}
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _commit() -> str:
    """The commit of this checkout, "+" behind it where files are changed; "" outside of git."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""

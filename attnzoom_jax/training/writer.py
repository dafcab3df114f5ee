"""Metrics of a run, to metrics.jsonl and to TensorBoard."""

import json
import pathlib
from collections.abc import Mapping

import jax
from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends metrics to a run's folder; of several processes the first one writes.

    Args:
        folder: of the run.
        start_step: lines of later steps, left by a killed run that goes on from here, are dropped.
    """

    def __init__(self, folder: pathlib.Path, *, start_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if self._writes:
            _keep_until(self._path, start_step)
            logdir = str(folder / "tensorboard")
            self._tensorboard = SummaryWriter(logdir, purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self._writes:
            self._tensorboard.close()


def read_metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order; a half-written last line is left out."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in _whole_lines(path)]


def _keep_until(path: pathlib.Path, step: int) -> None:
    lines = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    if path.exists():
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text("".join(line + "\n" for line in lines))
        unfinished.replace(path)


def _whole_lines(path: pathlib.Path) -> list[str]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in lines if line]

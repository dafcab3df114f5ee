"""Metrics of a run, to metrics.jsonl and to TensorBoard."""

import json
import pathlib
from collections.abc import Mapping

from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends metrics to a run's folder; one process writes.

    Args:
      folder: of the run.
      start_step: lines of later steps, left by a killed run that goes on from here, are dropped.
    """

    def __init__(self, folder: pathlib.Path, *, start_step: int) -> None:
        path = folder / "metrics.jsonl"
        _keep_until(path, start_step)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._tensorboard.close()


def read_metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order; a half-written last line is left out."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in _whole_lines(path)]


def _keep_until(path: pathlib.Path, step: int) -> None:
    lines = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    if path.exists():
        path.write_text("".join(line + "\n" for line in lines))


def _whole_lines(path: pathlib.Path) -> list[str]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in lines if line]

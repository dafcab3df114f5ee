"""Metrics of a run, to metrics.jsonl and to TensorBoard."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # made by protobuf when it is imported
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)


class MetricWriter:
    """Appends metrics to a run's folder; of several processes the first one writes.

    Args:
        folder: of the run.
        start_step: lines of later steps, left by a killed run that goes on from here, are dropped.
    """

    def __init__(self, folder: pathlib.Path, *, start_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        _keep_until(self._path, start_step)
        logdir = folder / "tensorboard"
        logdir.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread, which writes, ends without a word when the disk is full,
        # and then whoever has something to write waits for ever.
        self._events = EventsWriter(str(logdir / "events"), f".{os.getpid()}")
        start: Any = SessionLog.START
        self._event(start_step + 1, session_log=SessionLog(status=start))  # hides later steps
        self._events.flush()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step; an OSError if they cannot be written."""
        if not self._writes:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            for name, value in metrics.items():
                self._event(step, summary=summary.scalar(name, value))
            self._events.flush()
        except OSError as error:
            raise OSError(
                f"the metrics of step {step} cannot be written into {self._path.parent} "
                f"({error.strerror})"
            ) from error

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writes:
            with contextlib.suppress(OSError):  # what was not written was told of when it was not
                self._events.close()

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


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

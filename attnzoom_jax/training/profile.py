"""A trace of some steps of a run, for XProf, TensorBoard or Perfetto: `config.profile_steps`."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax


class Profile:
    """Traces the steps first .. last of a run; of several processes the first one does.

    Args:
        folder: of the trace.
        steps: (first, last), counted from 1; () for no trace.
    """

    def __init__(self, folder: pathlib.Path, steps: Sequence[int]) -> None:
        self.folder = folder
        self._first, self._last = steps or (1, 0)
        self._begin = 0  # first step of the trace that runs

    def next_stop(self, step: int) -> int:
        """Where a call that begins after `step` has to end, so that the trace has its steps alone.

        The same on all processes, which must make the same calls.
        """
        stops = [stop for stop in (self._first - 1, self._last) if stop > step]
        return min(stops, default=sys.maxsize)

    def before(self, step: int) -> None:
        """Say that the steps after `step` come next."""
        if self._first <= step + 1 <= self._last and not self._begin and jax.process_index() == 0:
            jax.profiler.start_trace(self.folder)
            self._begin = step + 1

    def after(self, step: int, metrics: Any) -> str:
        """Say that the steps up to `step` were started; the line to print, if the trace is done.

        Args:
            step: the last one that was started.
            metrics: of it; waited for at the end of the trace, so that it holds the steps whole.
        """
        if not self._begin or step < self._last:
            return ""
        jax.block_until_ready(metrics)
        line = f"trace of steps {self._begin} to {step}: {self.folder}"
        self.close()
        return line

    def close(self) -> None:
        """End the trace if it runs, as where a run is stopped in the middle of it."""
        if self._begin:
            jax.profiler.stop_trace()
            self._begin = 0

"""Training metrics, summed on the device between two lines.

A line is fetched and written one call of the program after it ended, while the device already works
on the next, so that logging never makes it wait.
"""

from typing import Any

import jax

from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.memory import memory_use
from attnzoom_jax.training.progress import Progress, format_duration
from attnzoom_jax.training.step import NO_STEP, add_metrics
from attnzoom_jax.training.writer import MetricWriter

# Of the values in a line, those that another run of the same config does not repeat.
MEASURED = ("images_per_second", "data_wait", "mfu", "memory_bytes", "memory_peak_bytes")
SAID_WAIT = 0.1  # share of the time spent waiting for data from which on the line says so


class TrainingLog:
    """Sums metrics on the device and writes them as lines.

    Args:
        writer: takes the metrics.
        progress: takes the lines for people.
        checkpoints: name the last good one when the loss is not finite.
    """

    def __init__(self, writer: MetricWriter, progress: Progress, checkpoints: Checkpoints) -> None:
        self.writer, self.progress, self.checkpoints = writer, progress, checkpoints
        self.sums: Any = None
        self.pending: tuple[int, Any, Any] | None = None
        self.is_first = True

    def add(self, step: int, metrics: Any) -> None:
        """Count the metrics of the steps up to `step`."""
        if self.is_first:
            jax.block_until_ready(metrics)  # compilation is no part of the throughput
            self.progress.skip(step)
            self.is_first = False
        self.sums = metrics if self.sums is None else add_metrics(self.sums, metrics)
        self.flush()
        self.progress.show(step)

    def cut(self, step: int, learning_rate: Any) -> None:
        """End the line at `step`."""
        self.pending = (step, self.sums, learning_rate)
        self.sums = None

    def flush(self) -> None:
        """Write the line that ended last, if it is not written yet."""
        if self.pending is None:
            return
        step, sums, learning_rate = self.pending
        self.pending = None
        sums = jax.device_get(sums)
        _stop_if_not_finite(sums, self.checkpoints)
        count = int(sums["steps"])
        terms = sorted(name for name in sums if name.startswith("loss/"))
        score, said = ("top1", "top-1") if "top1" in sums else ("accuracy", "accuracy")
        names = ("loss", score, *terms)
        values = {f"train/{name}": float(sums[name]) / count for name in names}
        line = f"loss {values['train/loss']:.4f}  {said} {values[f'train/{score}']:.3f}"
        values["train/grad_norm"] = float(sums["grad_norm"]) / count
        values["learning_rate"] = float(learning_rate)
        speed = self.progress.measure(step)
        if speed:
            values["images_per_second"] = speed.images_per_second
            values["data_wait"] = speed.data_wait
            line += f"  {speed.images_per_second:.0f} images/s"
            if speed.data_wait >= SAID_WAIT:
                line += f" ({speed.data_wait:.0%} waiting for data)"
            if speed.mfu is not None:
                values["mfu"] = speed.mfu
                line += f"  MFU {speed.mfu:.1%}"
            line += f"  ETA {format_duration(speed.remaining_s)}"
        values.update(memory_use())
        self.writer.write(step, values)
        self.progress.say(step, line)


def _stop_if_not_finite(metrics: Any, checkpoints: Checkpoints) -> None:
    if metrics["bad_step"] == NO_STEP:
        return
    checkpoints.wait()
    last = checkpoints.last_step()
    good = f"the last good checkpoint is step {last}" if last else "there is no checkpoint yet"
    raise FloatingPointError(
        f"the loss or its gradient is NaN or infinite at step {metrics['bad_step']}; {good} in "
        f"{checkpoints.folder}; lower optimizer.learning_rate or set optimizer.clip_norm"
    )

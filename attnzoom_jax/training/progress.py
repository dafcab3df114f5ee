"""How far a long run is, and how fast: one line every N steps, and a bar where a person watches."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

from attnzoom_jax.training.flops import count_flops


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast the last steps were.

    Attributes:
        images_per_second: of all devices and processes together.
        remaining_s: seconds to the end of the run at this speed.
        data_wait: share of the time for which the loop waited for the next batch, in [0, 1].
        mfu: share of the devices' peak arithmetic, see training/flops.py; None if unknown.
    """

    images_per_second: float
    remaining_s: float
    data_wait: float
    mfu: float | None


class Progress:
    """Throughput and remaining time of a run.

    Args:
        start_step: where this process begins.
        total_steps: where it ends.
        batch_size: examples of one step.
        peak_flops: FLOP/s of all devices; None if unknown.
    """

    def __init__(
        self,
        *,
        start_step: int,
        total_steps: int,
        batch_size: int,
        peak_flops: float | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.peak_flops = peak_flops
        self._flops: float | None = None  # of a step
        self._waited = 0.0
        self._step, self._time = start_step, time.monotonic()
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty()
        )

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; the time until each of them is there counts as waiting for data."""
        batches = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def counted(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """The jitted program; its first call counts the FLOPs of a step if the peak is known."""
        is_first = True

        def run(*arguments: Any) -> Any:
            nonlocal is_first
            if is_first and self.peak_flops:
                self._flops = count_flops(program, *arguments)
            is_first = False
            return program(*arguments)

        return run

    def measure(self, step: int) -> Speed | None:
        """The speed since the last call (or `skip`); None where no step was done since."""
        now = time.monotonic()
        steps, seconds, waited = step - self._step, now - self._time, self._waited
        self._step, self._time, self._waited = step, now, 0.0
        if not steps:
            return None
        mfu = None
        if self._flops and self.peak_flops:
            mfu = self._flops * steps / seconds / self.peak_flops
        return Speed(
            images_per_second=steps * self.batch_size / seconds,
            remaining_s=(self.total_steps - step) * seconds / steps,
            data_wait=waited / seconds,
            mfu=mfu,
        )

    def skip(self, step: int) -> None:
        """Leave the time since the last call out of the speed (evaluation, compilation)."""
        self._step, self._time, self._waited = step, time.monotonic(), 0.0

    def show(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(step - self._bar.n)

    def say(self, step: int, line: str) -> None:
        """Print a line about a step without tearing the bar."""
        self._bar.write(f"step {step}/{self.total_steps}  {line}", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m05s, 2h07m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

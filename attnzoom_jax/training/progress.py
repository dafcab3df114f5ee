"""How far a long run is: one line every N steps, and a bar where a person watches."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Throughput and remaining time of a run.

    Args:
        start_step: where this process begins.
        total_steps: where it ends.
        batch_size: examples of one step.
    """

    def __init__(self, *, start_step: int, total_steps: int, batch_size: int) -> None:
        self.total_steps = total_steps
        self.batch_size = batch_size
        self._step, self._time = start_step, time.monotonic()
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty()
        )

    def measure(self, step: int) -> tuple[float, float] | None:
        """Images per second since the last call (or `skip`), and the seconds that remain.

        None where no step was done since.
        """
        now = time.monotonic()
        steps, seconds = step - self._step, now - self._time
        self._step, self._time = step, now
        if not steps:
            return None
        return steps * self.batch_size / seconds, (self.total_steps - step) * seconds / steps

    def skip(self, step: int) -> None:
        """Leave the time since the last call out of the throughput (evaluation, compilation)."""
        self._step, self._time = step, time.monotonic()

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

"""Leaving in order when the machine is taken away: SIGTERM, which comes some seconds before.

One process listens to the signal itself. Of several processes JAX's preemption service listens: it
tells all of them when one is to go, and of a step that all of them reach.
"""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Whether to stop, from `with StopSignal() as stop:` on; a second SIGTERM ends the process."""

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None
        self._asked = 0

    def __enter__(self) -> "StopSignal":
        # JAX's service has its own handler, and Python allows one in the main thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def came(self) -> bool:
        """Whether to stop now; all processes ask equally often and get the same answer."""
        if jax.process_count() > 1:
            # The service agrees on a number that is yet to come, and it must not be skipped.
            self._asked += 1
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._came

    @property
    def noticed(self) -> bool:
        """Whether this process alone was told to stop."""
        return self._came

    def _notice(self, *_: Any) -> None:
        self._came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""How much memory a run takes, asked of the device or of the system; never waits for either."""

import os
import pathlib
import resource
import sys

import jax


def memory_use() -> dict[str, float]:
    """Memory in use now and at most so far, in bytes.

    Returns:
        {"memory_bytes", "memory_peak_bytes"} of the fullest of this process's devices, where they
        say (GPU, TPU): arrays and what running programs work with. Else, as on a CPU, the resident
        set of the process; {} where the system does not tell that either.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_in_use" in one for one in stats):
        now = max(one["bytes_in_use"] for one in stats)
        return {
            "memory_bytes": now,
            "memory_peak_bytes": max(one.get("peak_bytes_in_use", now) for one in stats),
        }
    resident = resident_bytes()
    return (
        {}
        if resident is None
        else {
            "memory_bytes": resident[0],
            "memory_peak_bytes": resident[1],
        }
    )


def resident_bytes() -> tuple[int, int] | None:
    """The resident set of this process, now and at most so far; None where /proc does not say."""
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        return None
    now = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return now, max(now, peak * (1 if sys.platform == "darwin" else 1024))

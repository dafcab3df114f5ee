"""What the benchmarks share: the machine, compilation apart, calls that take turns."""

import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

PAUSE_S = 0.05  # threads of the call before look for work a while before they sleep


def machine() -> dict:
    """What the figures belong to."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cpu_count": os.cpu_count(),
        "threads": usable,
        "load_at_start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def compiled(function: Callable[..., Any], arguments: tuple) -> tuple[Callable[[], Any], dict]:
    """A call without arguments, and what compiling it took."""
    start = time.perf_counter()
    run = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    temporary = run.memory_analysis().temp_size_in_bytes / 2**20
    facts = {"compile_s": round(compile_s, 3), "temporary_mb": round(temporary, 1)}
    return lambda: jax.block_until_ready(run(*arguments)), facts


def take_turns(calls: Mapping[str, Callable], *, seconds: float) -> dict[str, list[float]]:
    """Times of each call, in rounds of one call each: 5 to 30 within `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or (rounds < 30 and time.perf_counter() < end):
        for name, call in calls.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times

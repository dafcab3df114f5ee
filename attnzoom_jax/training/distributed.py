"""One program on many hosts: the same command runs on each of them, and JAX joins the processes.

Who announces that there are others, the first of these that does:

    --coordinator_address, --num_processes, --process_id
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    SLURM_NTASKS            of a job; its tasks are started by srun
    TPU_WORKER_HOSTNAMES    of a TPU slice on Kubernetes
    the chips of a TPU      of a Cloud TPU VM, whose metadata server knows the other hosts

What was announced and does not come true, or a TPU that is there and not used, ends the run: alone,
or on a CPU, it would go on for days without anybody's notice.
"""

import atexit
import dataclasses
import os
import pathlib
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

WAIT_S = 300  # for the other processes, as hosts do not start at the same moment
HEARTBEAT_S = 30  # without a sign of life, a process counts as dead
SHUTDOWN_S = 60  # at the end, for the others to come to it too
TPU_VENDOR = "0x1ae0"
TPU_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v2 to 7x


_watchers: list[subprocess.Popen[bytes]] = []


@dataclasses.dataclass(frozen=True)
class Announcement:
    """That a run has several processes.

    Attributes:
        by: who says so, for messages.
        count: of the processes; None where only JAX can find out.
        options: for `jax.distributed.initialize`.
    """

    by: str
    count: int | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find_announcement(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    use_tpu: bool = True,
) -> Announcement | None:
    """Who says that there are other processes.

    Args:
        coordinator_address: flag, "host:port" of process 0.
        num_processes: flag; 1 says that this process is alone, whatever the environment says.
        process_id: flag, 0 to num_processes - 1.
        use_tpu: whether this host's TPU, if it has one, is to be used.

    Returns:
        The first announcement; None where this process is alone.

    Raises:
        ValueError: an announcement that lacks a part, or out of range.
    """
    if num_processes == 1:
        return None
    flags = (coordinator_address, num_processes, process_id)
    environment = (
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        _number("JAX_NUM_PROCESSES"),
        _number("JAX_PROCESS_ID"),
    )
    if any(part is not None for part in flags):
        return _complete("--coordinator_address, --num_processes, --process_id", flags)
    # The address alone: JAX takes it instead of the one that a cluster would choose.
    if any(part is not None for part in environment[1:]):
        names = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
        return _complete(names, environment)
    found = _slurm() or (_tpu() if use_tpu else None)
    if found is None and environment[0]:
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={environment[0]} without JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, and no cluster that knows them; set them, or pass --num_processes=1 "
            "to run alone"
        )
    return found


def _complete(names: str, parts: tuple[str | None, int | None, int | None]) -> Announcement | None:
    address, count, index = parts
    if count == 1:
        return None
    if not address or count is None or index is None or not 0 <= index < count:
        raise ValueError(
            f"{names} are {address}, {count}, {index}; expected all three, such as "
            "10.0.0.1:8476, 4 and 0 to 3 for the four processes, or --num_processes=1 to run alone"
        )
    options = {"coordinator_address": address, "num_processes": count, "process_id": index}
    return Announcement(names, count, options | {"cluster_detection_method": "deactivate"})


def _slurm() -> Announcement | None:
    count = _number("SLURM_NTASKS") or 1
    if count == 1:
        return None
    if "SLURM_STEP_NODELIST" not in os.environ:
        raise ValueError(
            f"SLURM gives this job {count} tasks, and this process is none of them; start it with "
            "srun, or pass --num_processes=1 to run alone"
        )
    # JAX gives each task one GPU of its node; a task that has a node to itself takes them all.
    alone = count == _number("SLURM_STEP_NUM_NODES")
    return Announcement("SLURM_NTASKS", count, {"local_device_ids": []} if alone else {})


def _tpu() -> Announcement | None:
    hosts = tpu_hosts()
    if hosts:
        count = len(hosts) * (_number("MEGASCALE_NUM_SLICES") or 1)
        return Announcement("TPU_WORKER_HOSTNAMES", count) if count > 1 else None
    return Announcement("this host's TPU", None) if has_tpu() else None


def tpu_hosts() -> list[str]:
    """The hosts of a TPU slice, as Kubernetes tells them; [] elsewhere."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    return names.split(",") if names else []


def has_tpu(devices: pathlib.Path = pathlib.Path("/sys/bus/pci/devices")) -> bool:
    """Whether this host has chips of a TPU, be a driver for them installed or not."""
    return any(
        _line(path / "vendor") == TPU_VENDOR and _line(path / "device") in TPU_DEVICES
        for path in devices.glob("*")
    )


def join(announcement: Announcement, *, wait_s: float = WAIT_S) -> None:
    """Join the other processes; before JAX knows of any device.

    Ends the process with the exit code 1 if they do not come: inside of JAX it would be aborted.

    Args:
        announcement: as `find_announcement` returns it.
        wait_s: for the others, in seconds.

    Raises:
        ValueError: JAX does not find the others.
    """
    if jax.distributed.is_initialized():
        return
    by, count, options = announcement.by, announcement.count, announcement.options
    of = f" {options['process_id']}" if "process_id" in options else ""
    others = "the other processes" if count is None else f"{count} processes"
    print(f"process{of}: joining {others} ({by}) ...", flush=True)

    def give_up() -> None:
        print(
            f"error: process{of}: not all of {others} ({by}) came within {wait_s:.0f} s; start the "
            "same command on every host, or pass --num_processes=1 to run alone",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(wait_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=int(wait_s) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (ValueError, OSError) as error:  # no cluster that JAX knows; no metadata server
        if count is not None:
            raise ValueError(
                f"{by} announces {count} processes, and JAX does not find them: {error}"
            ) from error
        print(f"note: {by} belongs to no slice that JAX knows; this process is alone", flush=True)
    finally:
        timer.cancel()


def check_devices(announcement: Announcement | None, *, platform: str) -> None:
    """Raise a ValueError if a run would go on alone or without the TPU of its host.

    Args:
        announcement: as `find_announcement` returned it.
        platform: `config.platform`, "" for JAX's own choice.
    """
    count = announcement.count if announcement else None
    if announcement and count not in (None, jax.process_count()):
        raise ValueError(
            f"{announcement.by} announces {count} processes, and JAX sees {jax.process_count()}; "
            "start the same command on every host, or pass --num_processes=1 to run alone"
        )
    chosen = platform == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu"
    if jax.default_backend() == "cpu" and not chosen and (has_tpu() or tpu_hosts()):
        raise ValueError(
            "this host has a TPU, and JAX finds only the CPU; install the package's extra tpu, end "
            "other programs that hold the TPU, or pass --config.platform=cpu"
        )


def say_if_ended() -> None:
    """Have it said if this process ends without a word: killed, or aborted by JAX.

    JAX aborts the processes that remain when one is gone. A shell waits for a line that comes at
    every other end.
    """
    message = (
        f"error: {describe_process()}ended before its time: another process is gone, or this one "
        "was killed; start all of them again, a run goes on from its last checkpoint"
    )
    shell = subprocess.Popen(
        ["sh", "-c", 'read -r line || echo "$0" >&2', message], stdin=subprocess.PIPE
    )
    _watchers.append(shell)
    atexit.register(end_in_order)


def end_in_order() -> None:
    """Let `say_if_ended` know that this process ends by itself; at exit, and before os._exit."""
    while _watchers:
        _watchers.pop().communicate(b"\n")


def check_shared(folder: pathlib.Path) -> None:
    """Raise a ValueError, on every process, unless all of them see this folder as the same.

    Args:
        folder: that process 0 has made.
    """
    if jax.process_count() == 1:
        return
    path = folder / ".shared"
    token = multihost_utils.broadcast_one_to_all(np.array([secrets.randbits(31)], np.int32))
    if jax.process_index() == 0:
        path.write_text(str(token[0]))
    multihost_utils.sync_global_devices("the folder is marked")
    sees = multihost_utils.process_allgather(np.array([_line(path) == str(token[0])]))
    if jax.process_index() == 0:
        path.unlink(missing_ok=True)
    if not sees.all():
        blind = ", ".join(map(str, np.flatnonzero(~sees.ravel())))
        raise ValueError(
            f"the processes {blind} do not see what process 0 writes into {folder}; take a "
            "--workdir that all hosts share, such as a mounted bucket or NFS"
        )


def as_the_first_says(number: int) -> int:
    """A number that process 0 has read from a folder, whose listing may be stale on other hosts."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def describe_process() -> str:
    """What an error of one of several processes begins with, "" for one alone."""
    try:
        is_one = jax.distributed.is_initialized() and jax.process_count() > 1
    except RuntimeError:  # there is no device to count
        is_one = False
    return f"process {jax.process_index()} of {jax.process_count()}: " if is_one else ""


def _number(variable: str) -> int | None:
    """An environment variable that is a number."""
    value = os.environ.get(variable)
    if value is not None and not value.isdigit():
        raise ValueError(f"{variable}={value} is no number")
    return None if value is None else int(value)


def _line(path: pathlib.Path) -> str:
    """What a file of one line holds, "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""

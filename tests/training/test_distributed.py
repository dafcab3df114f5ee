"""Who announces other processes, and what must not happen silently."""

import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from attnzoom_jax import cli
from attnzoom_jax.training import distributed

VARIABLES = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS"),
    *("SLURM_NTASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES"),
    *("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"),
)
SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_STEP_NUM_NODES": "4"}
JOINED = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
OURS = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture
def environment(monkeypatch) -> Any:
    """Sets what the environment and this host announce; nothing at first."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(distributed, "has_tpu", lambda: False)

    def announce(variables=None, *, tpu=False):
        for name, value in (variables or {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "has_tpu", lambda: tpu)

    return announce


@pytest.mark.parametrize(
    ("variables", "flags", "by", "count", "options"),
    [
        ({}, JOINED, "--coordinator_address", 4, JOINED),
        (SLURM, JOINED, "--coordinator_address", 4, JOINED),
        (OURS, {}, "JAX_COORDINATOR_ADDRESS", 4, JOINED),
        ({**SLURM, **OURS}, {}, "JAX_COORDINATOR_ADDRESS", 4, JOINED),
        # JAX knows the rest, and takes the address itself.
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "SLURM", 4, {"local_device_ids": []}),
        (SLURM, {}, "SLURM_NTASKS", 4, {"local_device_ids": []}),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "2"}, {}, "SLURM_NTASKS", 4, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, "TPU_WORKER_HOSTNAMES", 2, {}),
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"},
            {},
            "TPU_WORKER_HOSTNAMES",
            6,
            {},
        ),
    ],
)
def test_the_first_announcement_counts(environment, variables, flags, by, count, options):
    environment(variables)
    found = distributed.find_announcement(**flags)
    assert found is not None and found.by.startswith(by) and found.count == count
    assert {k: v for k, v in found.options.items() if k != "cluster_detection_method"} == options


@pytest.mark.parametrize(
    ("variables", "flags", "use_tpu"),
    [
        ({}, {}, True),
        ({**SLURM, **OURS, "TPU_WORKER_HOSTNAMES": "a,b"}, {"num_processes": 1}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1"}, {}, True),
        ({"SLURM_NTASKS": "1"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, False),
    ],
)
def test_a_process_is_alone(environment, variables, flags, use_tpu):
    environment(variables)
    assert distributed.find_announcement(use_tpu=use_tpu, **flags) is None


def test_a_host_with_a_tpu_asks_jax_for_the_others(environment):
    environment(tpu=True)
    found = distributed.find_announcement()
    assert found is not None and (found.by, found.count) == ("this host's TPU", None)
    assert distributed.find_announcement(use_tpu=False) is None


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({}, {"num_processes": 4}, "--process_id are None, 4, None; expected all three"),
        ({}, {**JOINED, "process_id": 4}, "are host:1, 4, 4; expected .* 0 to 3"),
        ({}, {**JOINED, "process_id": -1}, "are host:1, 4, -1; expected"),
        ({"JAX_NUM_PROCESSES": "4"}, {}, "JAX_PROCESS_ID are None, 4, None; expected all three"),
        ({"JAX_NUM_PROCESSES": "four"}, {}, "JAX_NUM_PROCESSES=four is no number"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "=a:1 without JAX_NUM_PROCESSES and"),
        ({"SLURM_NTASKS": "4"}, {}, "SLURM gives this job 4 tasks, and .*; start it with srun"),
    ],
)
def test_half_an_announcement_is_one_line(environment, variables, flags, message):
    environment(variables)
    with pytest.raises(ValueError, match=message) as error:
        distributed.find_announcement(**flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("vendor", "device", "expected"),
    [
        ("0x1ae0", "0x0063", True),
        ("0x1ae0", "0x0042", False),  # a network card of the same make
        ("0x10de", "0x0063", False),
    ],
)
def test_the_chips_of_a_tpu_are_told_from_other_devices(tmp_path, vendor, device, expected):
    for name, content in (("vendor", vendor), ("device", device)):
        (tmp_path / "0000:00:04.0").mkdir(exist_ok=True)
        (tmp_path / "0000:00:04.0" / name).write_text(content + "\n")
    (tmp_path / "0000:00:05.0").mkdir()  # without a vendor
    assert distributed.has_tpu(tmp_path) is expected
    assert not distributed.has_tpu(tmp_path / "none")


def test_a_run_does_not_go_on_alone(environment, monkeypatch):
    environment()
    announcement = distributed.Announcement("TPU_WORKER_HOSTNAMES", 4)
    with pytest.raises(
        ValueError, match="TPU_WORKER_HOSTNAMES announces 4 processes, and JAX sees 1"
    ):
        distributed.check_devices(announcement, platform="")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    distributed.check_devices(announcement, platform="")


@pytest.mark.parametrize("sign", ["chips", "hosts"])
def test_a_run_does_not_go_on_without_its_tpu(environment, monkeypatch, sign):
    environment({"TPU_WORKER_HOSTNAMES": "a"} if sign == "hosts" else {}, tpu=sign == "chips")
    for variable in ("", "tpu,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", variable)
        with pytest.raises(ValueError, match="has a TPU, and JAX finds only the CPU; install"):
            distributed.check_devices(None, platform="")
    for backend, platform, variable in (("tpu", "", ""), ("cpu", "cpu", ""), ("cpu", "", "cpu")):
        monkeypatch.setenv("JAX_PLATFORMS", variable)
        monkeypatch.setattr(jax, "default_backend", lambda found=backend: found)
        distributed.check_devices(None, platform=platform)


def test_a_programme_of_one_process_refuses_several(environment):
    environment(OURS)
    with pytest.raises(ValueError, match="announces 4 processes, and this programme is one; start"):
        cli.start_devices("cpu")


def test_a_host_that_no_slice_knows_is_alone(environment, monkeypatch, capsys):
    environment(tpu=True)

    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    distributed.join(distributed.Announcement("this host's TPU", None))
    assert "this process is alone" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="SLURM_NTASKS announces 4 processes, and JAX does not find"
    ):
        distributed.join(distributed.Announcement("SLURM_NTASKS", 4))


@pytest.mark.parametrize("sees", [True, False])
def test_all_processes_must_see_the_folder(monkeypatch, tmp_path, sees):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda token: token)
    monkeypatch.setattr(distributed.multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(
        distributed.multihost_utils,
        "process_allgather",
        lambda own: np.array([own, [sees]]),
    )
    if sees:
        distributed.check_shared(tmp_path)
    else:
        with pytest.raises(ValueError, match="the processes 1 do not see what process 0 writes"):
            distributed.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_go_on_from_the_step_that_the_first_sees(monkeypatch):
    assert distributed.as_the_first_says(20) == 20
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "broadcast_one_to_all", lambda number: np.int32(10)
    )
    assert distributed.as_the_first_says(20) == 10


@pytest.mark.slow
def test_who_waits_in_vain_says_for_whom(root):
    code = (
        "from attnzoom_jax.training.distributed import find_announcement, join\n"
        "flags = dict(coordinator_address='localhost:1', num_processes=2, process_id=1)\n"
        "join(find_announcement(**flags), wait_s=1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert run.stdout.startswith("process 1: joining 2 processes (--coordinator_address")
    assert run.stderr.startswith("error: process 1: not all of 2 processes")
    assert "came within 1 s; start the same command on every host" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("sys.exit(3)", ""),
        ("raise TypeError('a fault')", ""),
        ("distributed.end_in_order(); os._exit(1)", ""),
        ("os.kill(os.getpid(), 9)", "ended before its time: another process is gone"),
        ("os.abort()", "ended before its time: another process is gone"),
    ],
)
def test_a_sudden_end_is_said(root, end, says):
    code = (
        "import os, sys\nfrom attnzoom_jax.training import distributed\n"
        f"distributed.say_if_ended()\n{end}"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert says in run.stderr and ("before its time" in run.stderr) == bool(says)

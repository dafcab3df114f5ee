"""Two processes of one run: one dies, or is told to go; both go on from the same checkpoint."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.fault.programmes import ROOT
from tests.fault.run_kills import differences, end_of, last_checkpoint

pytestmark = pytest.mark.slow
MINUTE = 60


class Pair:
    """Two processes of the tiny run, with two devices each."""

    def __init__(self, folder: pathlib.Path, logs: pathlib.Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        self.logs = [logs / f"{folder.name}_{index}.log" for index in (0, 1)]
        self.processes = []
        for index, log in enumerate(self.logs):
            command = [sys.executable, "train.py", "--config=tests/fault/tiny.py"]
            command += [f"--workdir={folder}", "--num_processes=2", f"--process_id={index}"]
            command += [f"--coordinator_address={address}", "--config.total_steps=28"]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def wait_for(self, text: str) -> None:
        """Until the first process says so."""
        end = time.monotonic() + 5 * MINUTE
        while text not in self.logs[0].read_text() and time.monotonic() < end:
            assert self.processes[0].poll() is None, self.logs[0].read_text()
            time.sleep(0.01)

    def wait(self, seconds: float = 5 * MINUTE) -> list[int]:
        """Exit codes of both."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    pair = Pair(folder / "whole", folder)
    assert pair.wait() == [0, 0], pair.logs[1].read_text()
    return folder / "whole"


@pytest.mark.parametrize("dies", [0, 1])
def test_one_of_two_dies(whole, tmp_path, note, dies):
    run = tmp_path / "run"
    pair = Pair(run, tmp_path)
    pair.wait_for("step 12/")
    pair.processes[dies].kill()
    started = time.monotonic()
    codes = pair.wait(MINUTE)
    assert time.monotonic() - started < MINUTE
    said = pair.logs[1 - dies].read_text()
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] not in (0, -signal.SIGKILL), said
    assert last_checkpoint(run) >= 8
    again = Pair(run, tmp_path)
    assert again.wait() == [0, 0], again.logs[1].read_text()
    assert "resuming" in again.logs[0].read_text()
    assert differences(end_of(run), end_of(whole)) == []
    line = next(line for line in reversed(said.splitlines()) if line.startswith("error: "))
    assert "start all of them again" in line
    # Which of JAX's threads is the first to see it, and so the wording, is a matter of chance.
    note(
        f"process {dies} of two dies",
        f"process {1 - dies} of 2: ... start all of them again ... from its last checkpoint",
        code="not 0",
    )


def test_one_of_two_is_told_to_go(whole, tmp_path, note):
    run = tmp_path / "run"
    pair = Pair(run, tmp_path)
    pair.wait_for("step 12/")
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [0, 0], pair.logs[1].read_text()
    assert "stopped by SIGTERM" in pair.logs[0].read_text()
    assert 12 <= last_checkpoint(run) < 28
    again = Pair(run, tmp_path)
    assert again.wait() == [0, 0], again.logs[1].read_text()
    assert differences(end_of(run), end_of(whole)) == []
    said = "stopped by SIGTERM, and the same command goes on"
    note("SIGTERM to one of two processes", said, code=0)

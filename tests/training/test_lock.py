import os
import socket
import subprocess
import sys

import ml_collections
import pytest

from attnzoom_jax.training import lock
from attnzoom_jax.training.lock import Lock
from attnzoom_jax.training.workdir import Workdir


def test_one_has_it_at_a_time(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    first.take()
    first.take()
    holder = rf"in use by process {os.getpid()} on {socket.gethostname()}; wait"
    with pytest.raises(ValueError, match=holder):
        second.take()
    first.release()
    first.release()
    second.take()
    with pytest.raises(ValueError, match=holder):
        first.take()
    del second
    first.take()
    first.release()


def test_a_process_that_is_killed_gives_it_back(tmp_path):
    code = f"""
from attnzoom_jax.training.lock import Lock
import pathlib, time
lock = Lock(pathlib.Path({str(tmp_path)!r}) / "lock")
lock.take()
print("taken", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "taken\n"
    mine = Lock(tmp_path / "lock")
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
        mine.take()
    process.kill()
    process.communicate()
    mine.take()
    mine.release()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    mine = Lock(tmp_path / "lock")
    mine.take()
    mine.release()
    assert "lock cannot be locked (Operation not supported)" in capsys.readouterr().out


def test_a_folder_is_given_back_at_the_end_of_the_with(tmp_path):
    config = ml_collections.ConfigDict({"seed": 0})
    with Workdir(tmp_path) as folder:
        folder.claim(config, {})
        with pytest.raises(ValueError, match="in use by"):
            Workdir(tmp_path).claim(config, {})
    with Workdir(tmp_path) as folder:
        folder.claim(config, {})

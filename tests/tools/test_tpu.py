"""The scripts of tools/tpu, with a gcloud that writes down what it is asked.

Where a test wants it, that gcloud also runs the command lines of the hosts, in a folder for a home.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import time

import pytest

TPU = pathlib.Path(__file__).parent.parent.parent / "tools" / "tpu"
SCRIPTS = ("create", "setup", "run", "logs", "delete")
GCLOUD = """#!/usr/bin/env python3
import json, os, pathlib, subprocess, sys
words = sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(words) + "\\n")
home = os.environ.get("HOST_HOME")
if home and "scp" in words:
    file = next(word for word in words if word.endswith(".tar.gz"))
    pathlib.Path(home, words[words.index(file) + 1].partition(":")[2]).write_bytes(
        pathlib.Path(file).read_bytes()
    )
if home and "ssh" in words:
    command = next(word for word in words if word.startswith("--command=")).partition("=")[2]
    environment = {**os.environ, "HOME": home}
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode)
"""
PLACE = ["--zone=us-west4-a"]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls a script; returns what it says, its exit code, and what gcloud was asked."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    (tmp_path / "bin" / "sudo").symlink_to("/bin/false")  # for all that a test may get wrong
    for name in ("PROJECT", "ACCELERATOR", "RUNTIME", "SPOT", "NFS", "PYTHON", "WORKER", "LINES"):
        monkeypatch.delenv(name, raising=False)
    record = tmp_path / "record"

    def run(script, *arguments, **variables):
        record.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(record),
            "TPU_NAME": "zoom",
            "ZONE": "us-west4-a",
            **variables,
        }
        result = subprocess.run(
            [TPU / f"{script}.sh", *arguments], env=environment, capture_output=True, text=True
        )
        asked = [json.loads(line) for line in record.read_text().splitlines()]
        for words in asked:
            assert words[:3] == ["compute", "tpus", "tpu-vm"]
        return result, [words[3:] for words in asked]

    return run


@pytest.fixture
def host(tmp_path):
    """The home of a host with a checkout whose Python writes down its arguments."""
    home = tmp_path / "home"
    (home / "attnzoom_jax" / ".venv" / "bin").mkdir(parents=True)
    python = home / "attnzoom_jax" / ".venv" / "bin" / "python"
    python.write_text('#!/bin/bash\nprintf "<%s>\\n" "$@"\nexec sleep 60\n')
    python.chmod(0o755)
    return home


def is_running(pid):
    """Whether there is such a process, and no zombie."""
    try:
        return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_variable_and_asks_nothing(call, script):
    result, asked = call(script, "--help")
    assert result.returncode == 0 and not asked
    own = re.findall(r"\$\{([A-Z]+):-", (TPU / f"{script}.sh").read_text())
    for name in ("TPU_NAME", "ZONE", "PROJECT", *own):
        assert re.search(rf"^{name} +\S", result.stdout, re.MULTILINE), name
    assert f"tools/tpu/{script}.sh" in result.stdout and "#" not in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["TPU_NAME", "ZONE"])
def test_what_is_missing_is_one_line(call, script, name):
    result, asked = call(script, **{name: ""})
    assert result.returncode == 2 and not asked
    assert result.stderr.startswith(f"error: {name} is not set; see ")
    assert result.stderr.count("\n") == 1


def test_without_gcloud_is_one_line(call, tmp_path):
    for name in ("bash", "env", "dirname", "sed"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / "gcloud").unlink()
    result, _ = call("delete", PATH=str(tmp_path / "bin"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: gcloud is not installed")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"ACCELERATOR": "v5litepod-16"},
            ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"],
        ),
        (
            {"ACCELERATOR": "v4-8", "SPOT": "1"},
            ["--accelerator-type=v4-8", "--version=tpu-ubuntu2204-base", "--spot"],
        ),
        (
            {"ACCELERATOR": "v9-8", "RUNTIME": "new"},
            ["--accelerator-type=v9-8", "--version=new"],
        ),
    ],
)
def test_create(call, variables, expected):
    result, asked = call("create", **variables)
    assert result.returncode == 0, result.stderr
    assert asked == [["create", "zoom", *PLACE, *expected]]


@pytest.mark.parametrize("kind", ["", "v9-8"])
def test_an_accelerator_that_is_not_known(call, kind):
    result, asked = call("create", ACCELERATOR=kind)
    assert result.returncode == 2 and not asked
    assert result.stderr.startswith(f"error: ACCELERATOR='{kind}' is none that this script knows")


def test_delete_asks_unless_told(call):
    assert call("delete")[1] == [["delete", "zoom", *PLACE]]
    asked = call("delete", YES="1", PROJECT="mine")[1]
    assert asked == [["delete", "zoom", *PLACE, "--project=mine", "--quiet"]]


def test_setup_copies_the_checkout_installs_and_looks_for_the_chips(call):
    result, asked = call("setup", NFS="10.0.0.2:/share", PYTHON="python3.12")
    assert result.returncode == 0, result.stderr
    copy, mount, install, look = asked
    assert copy[0] == "scp" and copy[2:] == ["zoom:attnzoom_jax.tar.gz", *PLACE, "--worker=all"]
    assert not pathlib.Path(copy[1]).exists()  # cleaned up
    for words in (mount, install, look):
        assert words[:4] == ["ssh", "zoom", *PLACE, "--worker=all"]
    assert "mount -t nfs '10.0.0.2:/share' ~/shared" in mount[4]
    assert "apt-get install -y -qq python3.12 python3.12-venv" in install[4]
    assert "pip install --quiet --editable '.[tpu]'" in install[4]
    assert "cli.start_devices('tpu', many=True)" in look[4]
    assert len(call("setup")[1]) == 3  # nothing to mount


def test_setup_stops_at_the_first_command_that_fails(call, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    # A Python that cannot make an environment: on this host everything before it works.
    (tmp_path / "bin" / "python3.99").symlink_to("/bin/false")
    result, asked = call("setup", HOST_HOME=str(home), PYTHON="python3.99")
    assert result.returncode != 0
    assert [words[0] for words in asked] == ["scp", "ssh"]
    assert (home / "attnzoom_jax" / "train.py").exists()


def test_run_starts_one_run_passes_every_word_on_and_stops_it(call, host):
    words = ["train.py", "--config=configs/demo.py:tiny", "--workdir=../shared/a b", "--x=$HOME'\""]
    result, asked = call("run", *words, HOST_HOME=str(host))
    assert result.returncode == 0, result.stderr
    assert asked[0][:4] == ["ssh", "zoom", *PLACE, "--worker=all"]
    log = host / "attnzoom_jax" / "run.log"
    for _ in range(100):
        if log.read_text().count("\n") == 5:
            break
        time.sleep(0.1)
    assert log.read_text() == "".join(f"<{word}>\n" for word in ["-u", *words])
    pid = int((host / "attnzoom_jax" / "run.pid").read_text())

    again, _ = call("run", *words, HOST_HOME=str(host))
    assert again.returncode == 1 and again.stderr.startswith("error: a run is going on")
    assert int((host / "attnzoom_jax" / "run.pid").read_text()) == pid

    stopped, _ = call("run", "--stop", HOST_HOME=str(host))
    assert stopped.returncode == 0
    for _ in range(100):
        if not is_running(pid):
            break
        time.sleep(0.1)
    assert not is_running(pid)
    assert call("run", "--stop", HOST_HOME=str(host))[0].returncode == 0  # nothing to stop


def test_run_needs_a_programme(call):
    result, asked = call("run")
    assert result.returncode == 2 and not asked
    assert result.stderr.startswith("error: no programme; see ")


def test_logs_follow_one_host_or_show_all(call):
    assert call("logs")[1] == [
        ["ssh", "zoom", *PLACE, "--worker=0", "--command=tail -n 50 -f attnzoom_jax/run.log"]
    ]
    assert call("logs", WORKER="all", LINES="5")[1] == [
        ["ssh", "zoom", *PLACE, "--worker=all", "--command=tail -n 5  attnzoom_jax/run.log"]
    ]

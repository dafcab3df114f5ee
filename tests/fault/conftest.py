"""What the tests of faults share: a run of some seconds, and the table of what happened."""

import json
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.fault.programmes import ROOT, Programme, Programmes
from tests.fault.run_kills import differences, end_of

RESULT = ROOT / "results" / "faults.json"
STEPS, EVERY = 12, 4


@pytest.fixture(scope="session")
def programmes(tmp_path_factory) -> Iterator[Programmes]:
    """Starts programmes."""
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    with Programmes(tmp_path_factory.mktemp("logs"), **environment) as started:
        yield started


class Run:
    """The tiny run in a folder.

    Args:
        programmes: start it.
        folder: its workdir.
        data_dir: of its data set; None for the usual one.
    """

    def __init__(
        self, programmes: Programmes, folder: pathlib.Path, data_dir: pathlib.Path | None = None
    ) -> None:
        self.programmes, self.folder, self.data_dir = programmes, folder, data_dir

    def start(self, *flags: str) -> Programme:
        """Start it, or go on with it."""
        command = ["train.py", "--config=tests/fault/tiny.py", f"--workdir={self.folder}"]
        command += [f"--config.total_steps={STEPS}", "--config.keep_checkpoints=3"]
        if self.data_dir:
            command.append(f"--config.data.dir={self.data_dir}")
        return self.programmes.start(*command, *flags)

    def go(self, *flags: str) -> Programme:
        """Start it and wait for its end."""
        programme = self.start(*flags)
        programme.wait()
        return programme

    def checkpoints(self) -> list[str]:
        """Names in the folder of the checkpoints."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@pytest.fixture(scope="session")
def whole(programmes, tmp_path_factory) -> Run:
    """A run that nothing happened to, with the checkpoints 4, 8 and 12."""
    run = Run(programmes, tmp_path_factory.mktemp("whole") / "run")
    ended = run.go()
    assert ended.code == 0, ended.err
    assert run.checkpoints() == ["12", "4", "8"]
    return run


@pytest.fixture
def half(whole, tmp_path) -> Run:
    """The same run, before step 12."""
    run = Run(whole.programmes, tmp_path / "run")
    shutil.copytree(whole.folder, run.folder)
    shutil.rmtree(run.folder / "checkpoints" / "12")
    return run


@pytest.fixture
def disk(tmp_path) -> Iterator[pathlib.Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def record(note) -> Callable[..., None]:
    """Notes what a programme said when a fault befell it, and what was lost: nothing."""

    def record(
        fault: str, ended: Programme, *, lost: list[str], said: str = "", again: str = "nothing"
    ) -> None:
        assert lost == []
        said = said or ended.err.removeprefix("error: ").strip()
        note(fault, said, code=ended.code, lost=again)

    return record


@pytest.fixture
def note(tmp_path) -> Callable[..., None]:
    """Notes a line of the table in docs/reliability.md, or checks that it stands there.

    ATTNZOOM_RECORD_FAULTS=1 writes results/faults.json anew.
    """

    def note(fault: str, said: str, *, code: int | str | None = 1, lost: str = "nothing") -> None:
        line = {"exit code": code, "said": _without_paths(said, tmp_path), "lost": lost}
        lines = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        if os.environ.get("ATTNZOOM_RECORD_FAULTS"):
            lines[fault] = line
            RESULT.write_text(json.dumps(dict(sorted(lines.items())), indent=1) + "\n")
        assert lines[fault] == line

    return note


def goes_on(run: Run, whole: Run) -> list[str]:
    """Let a run end; what is then not as in the run that nothing happened to."""
    ended = run.go()
    assert ended.code == 0, ended.err
    return differences(end_of(run.folder), end_of(whole.folder))


def is_one_line(ended: Programme) -> bool:
    """Whether a programme says nothing but one line, "error: ..."."""
    return ended.err.startswith("error: ") and ended.err.count("\n") == 1


def _without_paths(message: str, folder: pathlib.Path) -> str:
    message = message.replace(str(folder / "run"), "RUN").replace(str(folder / "disk/run"), "RUN")
    message = message.replace(str(folder / "data"), "DATA").replace(f"{folder}/", "")
    message = re.sub(r"process \d+ on \S+?(?=;)", "process 4711 on host", message)
    return " ".join(message.split())

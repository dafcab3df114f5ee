"""Programmes as processes that can be killed, without the seconds that their imports take.

One process imports them and forks for each start; the child is a process like any other, and runs
the programme's file as a person's command does.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
SERVER = """
import json, os, runpy, signal, sys, traceback, warnings
sys.path.insert(0, os.getcwd())
import eval, explain, train
warnings.simplefilter("ignore")  # JAX warns of every fork; its threads start later
for line in sys.stdin:
    log, sys.argv = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        # As at the end of every process; JAX's own threads are left alone by that.
        import atexit, threading
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(json.dumps(child), flush=True)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


def _without_privileges() -> list[str]:
    """What makes permissions of files count for root too."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    few = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={few}", f"--inh-caps={few}"]


class Programmes:
    """Starts programmes one after the other; `with Programmes(folder) as programmes:`.

    Args:
        folder: of the logs.
        environment: further variables of all of them.
    """

    def __init__(self, folder: pathlib.Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            **environment,
        }
        self.count = 0

    def __enter__(self) -> "Programmes":
        self._server = subprocess.Popen(
            [*_without_privileges(), sys.executable, "-c", SERVER],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def start(self, *arguments: Any) -> "Programme":
        """Start one, such as start("train.py", "--workdir=..."); it must end before the next."""
        assert self._server.stdin
        self.count += 1
        log = self.folder / f"programme_{self.count}"
        self._server.stdin.write(json.dumps([str(log), [str(word) for word in arguments]]) + "\n")
        self._server.stdin.flush()
        return Programme(self, log, self.answer())

    def run(self, *arguments: Any) -> "Programme":
        """Start one and wait for its end."""
        programme = self.start(*arguments)
        programme.wait()
        return programme

    def answer(self) -> int:
        """The next number from the server: a process, or the exit code of one."""
        assert self._server.stdout
        return json.loads(self._server.stdout.readline())


class Programme:
    """A programme that runs, or ran."""

    def __init__(self, server: Programmes, log: pathlib.Path, pid: int) -> None:
        self._server, self._log, self.pid = server, log, pid
        self.code: int | None = None

    @property
    def out(self) -> str:
        """What it printed so far."""
        path = self._log.with_suffix(".out")
        return path.read_text() if path.exists() else ""

    @property
    def err(self) -> str:
        """What it printed so far to the error output."""
        path = self._log.with_suffix(".err")
        return path.read_text() if path.exists() else ""

    def is_over(self) -> bool:
        """Whether it has ended, waited for or not."""
        try:
            state = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.code is None and not self.is_over():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the end; the exit code, minus the signal where one ended it."""
        if self.code is None:
            self.code = self._server.answer()
        return self.code

"""What befalls the folder of a run: nothing is lost, and one line says what happened."""

import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from attnzoom_jax.training.lock import Lock
from tests.fault.conftest import goes_on, is_one_line

pytestmark = pytest.mark.slow


def wait_for(programme, text):
    end = time.monotonic() + 120
    while text not in programme.out and time.monotonic() < end:
        assert not programme.is_over(), programme.err
        time.sleep(0.001)


def test_sigterm(programmes, whole, half, record):
    run = half
    shutil.rmtree(run.folder)
    programme = run.start("--config.eval_every_steps=5", "--config.total_steps=400")
    wait_for(programme, "\nstep 7/400")
    programme.send(signal.SIGTERM)
    assert programme.wait() == 0 and programme.err == ""
    said = programme.out.splitlines()[-1]
    step = int(re.search(r"step (\d+) ", said)[1])
    assert run.checkpoints()[0] and str(step) in run.checkpoints()
    again = run.start("--config.eval_every_steps=5", "--config.total_steps=400")
    wait_for(again, f"from step {step}")
    again.send(signal.SIGKILL)
    again.wait()
    said = re.sub(r"step \d+ after .*?;", "step N;", said)
    record("SIGTERM", programme, lost=[], said=said)


@pytest.mark.parametrize("pages", [0, 2, 16, 64])
def test_disk_full(whole, half, disk, record, pages):
    run = half
    run.folder = shutil.move(run.folder, disk / "run")
    with (disk / "ballast").open("wb") as file:
        left = shutil.disk_usage(disk).free - 4096 * pages
        file.write(bytes(left))
    ended = run.go()
    assert ended.code == 1 and is_one_line(ended), ended.err
    assert "No space left on device" in ended.err
    assert {"4", "8"} <= set(run.checkpoints())
    (disk / "ballast").unlink()
    lost = goes_on(run, whole)
    fault = {0: "disk full at the start", 64: "disk full at a checkpoint"}.get(pages)
    if fault:
        record(fault, ended, lost=lost, said=re.sub(r"[\d.]+ MB", "N MB", ended.err[7:]))
    assert lost == []


def test_a_disk_that_cannot_be_written(whole, half, disk, record):
    run = half
    run.folder = shutil.move(run.folder, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = run.go()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert ended.code == 1 and is_one_line(ended), ended.err
    record("workdir on a read-only disk", ended, lost=goes_on(run, whole))


@pytest.mark.parametrize(
    ("fault", "name", "mode"),
    [
        ("workdir that may not be written", ".", 0o500),
        ("checkpoint that may not be read", "checkpoints/8", 0o000),
    ],
)
def test_wrong_permissions(whole, half, record, fault, name, mode):
    path = half.folder / name
    before = path.stat().st_mode
    path.chmod(mode)
    ended = half.go()
    path.chmod(before)
    assert ended.code == 1 and is_one_line(ended), ended.err
    record(fault, ended, lost=goes_on(half, whole))


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "a file missing"])
def test_the_newest_checkpoint_is_damaged(whole, half, record, damage):
    folder = half.folder / "checkpoints" / "8"
    file = max((path for path in folder.rglob("*/d/*")), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "a file missing":
        file.unlink()
    else:
        bit = random.Random(0).randrange(8 * len(content))
        content[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(content)
    ended = half.go()
    assert ended.code == 0, ended.err
    said = next(line for line in ended.out.splitlines() if "is damaged" in line)
    assert "resuming" in ended.out and "from step 4" in ended.out
    assert half.checkpoints() == ["12", "4", "8", "8.damaged"]
    said = re.sub(r"/d/\w+", "/d/...", said)  # a random name
    record(f"newest checkpoint {damage}", ended, lost=goes_on(half, whole), said=said)


def test_every_checkpoint_is_damaged(whole, half, record):
    for file in half.folder.glob("checkpoints/*/metrics/metrics"):
        file.write_text(file.read_text().replace(".", "1."))
    before = {str(path): path.stat().st_mtime for path in half.folder.glob("checkpoints/*")}
    ended = half.go()
    assert ended.code == 1 and is_one_line(ended), ended.err
    assert before == {str(path): path.stat().st_mtime for path in half.folder.glob("checkpoints/*")}
    shutil.rmtree(half.folder / "checkpoints")  # begins anew
    again = "all steps, done again"
    record("every checkpoint damaged", ended, lost=goes_on(half, whole), again=again)


def test_two_runs_in_one_folder(whole, half, record):
    other = Lock(half.folder / "lock")
    other.take()
    ended = half.go()
    other.release()
    assert ended.code == 1 and is_one_line(ended), ended.err
    record("second run in a workdir", ended, lost=goes_on(half, whole))

import jax
import numpy as np
import pytest

from attnzoom_jax.training import memory


def test_the_resident_set_grows_with_what_is_held():
    before = memory.memory_use()
    held = np.ones(2**24)  # 128 MiB
    after = memory.memory_use()
    assert 0.9 * held.nbytes < after["memory_bytes"] - before["memory_bytes"] < 1.5 * held.nbytes
    assert after["memory_peak_bytes"] >= after["memory_bytes"]
    del held
    end = memory.memory_use()
    assert end["memory_bytes"] < after["memory_bytes"] - 2**26
    # The system's own counts lag by some pages.
    assert end["memory_peak_bytes"] >= 0.99 * after["memory_peak_bytes"] > end["memory_bytes"]


class Device:
    def __init__(self, now, **more):
        self.stats = {"bytes_in_use": now, **more}

    def memory_stats(self):
        return self.stats


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([Device(5, peak_bytes_in_use=9), Device(7, peak_bytes_in_use=8)], (7, 9)),
        ([Device(5)], (5, 5)),
    ],
    ids=["the fullest of several", "no peak"],
)
def test_devices_that_say_are_believed(monkeypatch, devices, expected):
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    names = ("memory_bytes", "memory_peak_bytes")
    assert memory.memory_use() == dict(zip(names, expected, strict=True))


def test_a_system_that_does_not_tell_gives_nothing(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    assert memory.memory_use() == {}

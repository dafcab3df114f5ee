"""Training that is killed at random moments ends as if nothing had been, bit for bit."""

import pytest

from tests.fault.run_kills import MOMENTS, kill_runs


@pytest.mark.slow
def test_ten_kills(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    result = kill_runs(10, seed=1, folder=tmp_path, modes=[""])
    assert result["kills"] == 10
    assert result["lost"] == result["different"] == 0, result["examples"]
    assert sum(result["moments"].get(moment, 0) > 0 for moment in MOMENTS) >= 2

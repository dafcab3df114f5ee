"""Importing the package is quick, and never imports TensorFlow, even where it is installed."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, pkgutil, sys, time
start = time.perf_counter()
import attnzoom_jax, {module}
seconds = time.perf_counter() - start
if {everything}:
    for module in pkgutil.walk_packages(attnzoom_jax.__path__, "attnzoom_jax."):
        __import__(module.name)
found = [name for name in sys.modules if name.partition(".")[0] == "tensorflow"]
count = sum(name.startswith("attnzoom_jax") for name in sys.modules)
print(json.dumps({{"seconds": seconds, "tensorflow": found, "modules": count}}))
"""


@pytest.fixture
def fake_tensorflow(tmp_path):
    """A folder with a `tensorflow` that cannot be imported without being noticed."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow imported')")
    return str(tmp_path)


def run(folder, module, *, everything=False):
    code = CODE.format(module=module, everything=everything)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("module", ["attnzoom_jax", "attnzoom_jax.data.source"])
def test_import_is_quick_and_without_tensorflow(fake_tensorflow, module):
    seconds = []
    for _ in range(3):  # other processes may hold the machine up once
        found = run(fake_tensorflow, module)
        assert found["tensorflow"] == []
        seconds.append(found["seconds"])
        if seconds[-1] < 2:
            return
    pytest.fail(f"importing {module} took {seconds} seconds")


def test_no_module_of_the_package_imports_tensorflow(fake_tensorflow):
    found = run(fake_tensorflow, "attnzoom_jax", everything=True)
    assert found["tensorflow"] == []
    assert found["modules"] > 20


def test_the_fake_is_noticed(fake_tensorflow):
    with pytest.raises(AssertionError, match="TensorFlow imported"):
        run(fake_tensorflow, "tensorflow")

"""Every config loads, builds, and runs in its mode `:tiny`; its values are compared with a golden.

REGENERATE_GOLDEN=1 writes the golden files anew; look at the difference before it is committed.
"""

import importlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import eval as eval_programme
import explain
import train
from attnzoom_jax.data.source import Source
from attnzoom_jax.evaluation.restore import restore_model
from attnzoom_jax.training import experiment, sharding
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.workdir import Workdir, differences, flatten, to_plain
from configs import default

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "configs" / "golden"
NAMES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "default")
)
MODES = ("", "tiny")


def load(name, mode="") -> Any:
    return importlib.import_module(f"configs.{name}").get_config(mode)


def any_source(name, *, split, data_dir="", fields=()):
    """Stands for a data set that is not prepared here."""
    return Source(
        name=f"{name}:{split}",
        class_names=tuple(f"class {i}" for i in range(100)),
        image_shape=(64, 64, 3),
        examples=[{}] * 50_000,
    )


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_golden_file(name):
    values = {mode: to_plain(load(name, mode)) for mode in MODES}
    file = GOLDEN / f"{name}.json"
    if os.environ.get("REGENERATE_GOLDEN"):
        file.write_text(json.dumps(values, indent=2) + "\n")
    golden = json.loads(file.read_text())
    changed = {mode: differences(golden[mode], values[mode]) for mode in MODES}
    assert not any(changed.values()), f"{changed}; if they are meant: REGENERATE_GOLDEN=1"


def test_no_golden_file_is_left_over():
    assert sorted(file.stem for file in GOLDEN.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_a_config_has_every_key_and_adds_none_outside_its_open_sections(name, mode):
    free = ("model.", "optimizer.", "schedule.", "evals.")
    keys = {key for key in flatten(to_plain(load(name, mode))) if not key.startswith(free)}
    known = flatten(to_plain(default.get_config()))
    assert keys == {key for key in known if not key.startswith(free)}


@pytest.mark.parametrize("name", NAMES)
def test_a_newcomer_can_run_it_from_its_docstring(name):
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert f"python train.py --config=configs/{name}.py --workdir=runs/" in text
    for word in ("Hardware and time:", "Expected:", "`:tiny`"):
        assert word in text


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_mode_is_named(name):
    with pytest.raises(ValueError, match="unknown mode 'tny'"):
        load(name, "tny")


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_the_whole_experiment_fit(name, monkeypatch):
    monkeypatch.setattr(experiment, "open_source", any_source)
    config = load(name)
    parts = experiment.create_experiment(config)
    assert parts.total_steps >= parts.eval_every >= 1
    variables = jax.eval_shape(lambda: init_variables(parts.model, parts.image_shape, 0))
    jax.eval_shape(parts.optimizer.init, variables["params"])
    schedule: Any = parts.schedule
    rates = [float(schedule(step)) for step in range(0, parts.total_steps, 97)]
    assert np.isfinite(rates).all() and max(rates) <= config.optimizer.learning_rate * 1.0001


@pytest.mark.parametrize(
    "name",
    [name if name == "demo" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_tiny_trains_evaluates_and_explains_offline(name, tmp_path):
    config = load(name, "tiny")
    config.total_steps = 2
    state = train.train(config, str(tmp_path), devices=jax.devices()[:1])
    assert int(state.step) == 2
    # What the folder says of itself is enough for the other two.
    assert Workdir(tmp_path).config() == config.lock()
    metrics = eval_programme.evaluate(str(tmp_path))
    assert metrics["test/count"] == 60 and 0 <= metrics["test/top1"] <= 1
    trained = restore_model(str(tmp_path), mesh=sharding.create_mesh(jax.devices()[:1]))
    arrays = explain.explain(trained, explain.from_split(trained, "test", 3), tmp_path / "explain")
    assert arrays["grad_cam"].shape[0] == 3 and np.isfinite(arrays["grad_cam"]).all()
    gates = [name for name in arrays if name.endswith("/gate")]
    assert len(gates) == len(config.model.get("insert", {}))
    for picture in ("test_00000", "test_00002", "contact_sheet"):
        with Image.open(tmp_path / "explain" / f"{picture}.png") as image:
            assert image.width > 300 and np.ptp(np.asarray(image.convert("L"))) > 100
    with np.load(tmp_path / "explain" / "maps.npz") as maps:
        assert set(maps.files) == {key.replace("/", ".") for key in arrays}

"""A run goes on with other devices, and checkpoints of earlier versions are read.

`stored_runs` holds a small run for each way in which checkpoints were written. To add one:
STORE_RUN=NAME python -m pytest tests/test_elastic.py -k store_a_run -n 0
"""

import hashlib
import json
import os
import pathlib
import shutil
import zipfile
from typing import Any

import jax
import numpy as np
import pytest

import train
from attnzoom_jax.evaluation.restore import restore_model
from attnzoom_jax.training import sharding
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.optimizer import create_optimizer
from attnzoom_jax.training.schedule import create_schedule
from attnzoom_jax.training.state import create_state
from attnzoom_jax.training.writer import read_metrics
from configs import demo

STORED = pathlib.Path(__file__).parent / "stored_runs"
SPLIT_HEAD = {"mesh.model": 2, "sharding": (("head/kernel", (None, "model")),)}


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    base.optimizer = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9}
    base.schedule = {"name": "cosine"}
    base.update({"total_steps": 6, "log_every_steps": 1, "eval_every_steps": 3})
    base.update_from_flattened_dict(changes)
    return base


def losses(folder):
    lines = [line for line in read_metrics(folder) if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    return [line["train/loss"] for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on four devices, and one that was killed half way."""
    root = tmp_path_factory.mktemp("runs")
    whole = train.train(config(), str(root / "whole"))
    train.train(config(), str(root / "half"), stop_at=3)
    return root, whole


@pytest.mark.parametrize(
    ("devices", "changes"),
    [(2, {}), (1, {}), (4, SPLIT_HEAD)],
    ids=["two", "one", "a_split_head"],
)
def test_a_run_of_four_devices_goes_on_with(runs, tmp_path, devices, changes):
    root, whole = runs
    folder = tmp_path / "run"
    shutil.copytree(root / "half", folder)
    settings = config(**changes)
    state = train.train(settings, str(folder), devices=jax.devices()[:devices])
    assert int(state.step) == 6
    assert len(state.step.sharding.device_set) == devices
    is_split = not state.params["head"]["kernel"].sharding.is_fully_replicated
    assert is_split == bool(changes)
    assert losses(folder) == pytest.approx(losses(root / "whole"), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, whole)


def test_variables_come_as_numpy_without_any_mesh(runs):
    root, whole = runs
    variables = restore_model(str(root / "whole"), checkpoint="last", mesh=None).variables
    jax.tree.map(np.testing.assert_array_equal, variables, whole.variables())
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(variables))


def digests(tree):
    """{path: [shape, type, checksum]} of the arrays of a tree."""
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): [
            list(leaf.shape),
            str(leaf.dtype),
            hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest(),
        ]
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def logits_of(trained):
    images = np.random.default_rng(0).normal(size=(2, *trained.image_shape)).astype(np.float32)
    return np.asarray(trained.model.apply(trained.variables, images, train=False))


def test_store_a_run(tmp_path):
    name = os.environ.get("STORE_RUN")
    if not name:
        pytest.skip("STORE_RUN=NAME stores one")
    settings = config(**{"model.width": 2, "ema_decay": 0.5, "total_steps": 2})
    settings.update({"eval_every_steps": 2, "best_metric": ""})
    state = train.train(settings, str(tmp_path / "run"))
    logits = logits_of(restore_model(str(tmp_path / "run"), mesh=None))
    expected = {"state": digests(state), "logits": logits.tolist()}
    with zipfile.ZipFile(STORED / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("expected.json", json.dumps(expected))
        for path in sorted((tmp_path / "run").rglob("*")):
            if path.is_file() and "tensorboard" not in path.parts and path.name != "lock":
                file.write(path, path.relative_to(tmp_path))


@pytest.mark.parametrize("name", sorted(path.stem for path in STORED.glob("*.zip")))
def test_checkpoints_of_earlier_versions_are_read(name, tmp_path):
    with zipfile.ZipFile(STORED / f"{name}.zip") as file:
        file.extractall(tmp_path)
    expected = json.loads((tmp_path / "expected.json").read_text())
    folder = str(tmp_path / "run")

    # To look at: the averaged parameters, on the host or on devices.
    averaged = {k.removeprefix("ema_"): v for k, v in expected["state"].items() if k[:4] == "ema_"}
    for mesh in (None, sharding.create_mesh()):
        trained = restore_model(folder, mesh=mesh)
        assert digests({"params": trained.variables["params"]}) == averaged
        np.testing.assert_allclose(logits_of(trained), expected["logits"], atol=1e-5)

    # To go on with: all of the state.
    mesh = sharding.create_mesh(jax.devices()[:2])
    schedule = create_schedule(trained.config, total_steps=2, steps_per_epoch=1)
    state = create_state(
        trained.model,
        create_optimizer(trained.config, trained.variables["params"], schedule=schedule),
        image_shape=trained.image_shape,
        seed=1,
        mesh=mesh,
        use_ema=True,
    )
    checkpoints = Checkpoints(pathlib.Path(folder) / "checkpoints", read_only=True)
    assert digests(checkpoints.restore(2, like=state, mesh=mesh)) == expected["state"]
    checkpoints.close()

"""A run with precomputed boxes from end to end: trained, evaluated, explained."""

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import eval as eval_programme
import train
from attnzoom_jax.data.datasets import image_folder
from attnzoom_jax.training.experiment import create_experiment
from configs import default
from tests.data.official_archives import photo


def settings(folder, **changes) -> Any:
    config = default.get_config()
    config.total_steps, config.eval_every_steps, config.eval_every_epochs = 2, 2, 0.0
    config.data.update({"name": "photos", "dir": str(folder / "sets"), "patches": str(folder)})
    config.data.update({"resize": "squash", "image_size": 32, "batch_size": 4})
    config.data.eval_batch_size = 4
    config.evals.validation.split = config.evals.validation.prefix = "validation"
    backbone = {"backbone": "resnet10", "stem": "small", "width": 4}
    config.model.update({"name": "two_stream", **backbone, "steps": 2, "hidden": 4, "add_on": 0})
    config.model.update({"patch_source": "boxes", "patch_size": 16, "eval_patch": "mean"})
    config.losses = {
        "global": {"name": "cross_entropy", "tap": "global_head"},
        "object": {"name": "cross_entropy", "tap": "object_head"},
    }
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def folder(tmp_path):
    """Three splits of six images of two classes, and three boxes for each image."""
    for split in ("train", "validation", "test"):
        paths = sorted(f"{split}/{'ab'[i % 2]}/{i}.jpg" for i in range(6))
        for i, path in enumerate(paths):
            photo(tmp_path / "photos" / path, size=(20, 24), seed=i)
        boxes = np.array([[0, 448, 0, 448], [10, 200, 30, 300], [200, 448, 100, 448]])
        labels = np.array([["ab".index(path.split("/")[1])] * 3 for path in paths])
        rows = np.concatenate([np.stack([boxes] * 6), labels[..., None]], axis=-1)
        np.save(tmp_path / f"{split}_patches.npy", rows.astype(float))
    scanned = image_folder.scan(tmp_path / "photos")
    image_folder.build(scanned, "photos", data_dir=tmp_path / "sets")
    return tmp_path


@pytest.mark.slow
def test_a_run_with_boxes(folder):
    run = folder / "run"
    train.train(settings(folder), str(run), devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss/object" in line for line in lines)
    metrics = eval_programme.evaluate(str(run))
    assert metrics["test/count"] == 6 and 0 <= metrics["test/top1"] <= 1
    command = ["explain.py", f"--workdir={run}", "--figure=steps", f"--out={folder / 'out'}"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=True
    )
    assert "patches are taken around the class map here" in done.stdout
    with np.load(folder / "out" / "steps.npz") as stored:
        assert stored["weights"].shape[1] == 2 and stored["views"].shape[2:] == (16, 16, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment.flip": True}, r"augment\.flip moves or mixes the images, and not the boxes"),
        ({"augment.cutmix": 1.0}, r"augment\.cutmix moves or mixes"),
        ({"model.patch_source": "cam"}, r"data\.patches is .* and model\.patch_source is 'cam'"),
        ({"data.patches": ""}, r"data\.patches is '' and model\.patch_source is 'boxes'"),
    ],
)
def test_boxes_and_what_does_not_go_with_them(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        create_experiment(settings(folder, **changes))

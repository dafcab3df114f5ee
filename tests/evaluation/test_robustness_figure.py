"""Curves from the files that runs leave."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.evaluation.robustness_figure import draw_mask_study, draw_robustness
from attnzoom_jax.ops.masks import TRANSFORMS
from attnzoom_jax.viz.curves import COLORS

EVALS = {"test": {"name": "classify", "split": "test"}, "hard": {"name": "robustness"}}
METRICS = {"clean_accuracy": 0.9, "jpeg_2_accuracy": 0.5, "count": 10, "corruption_accuracy": 0.5}


def run(folder, *, prefix="", split="test", metrics=METRICS):
    evals = {**EVALS, "hard": {**EVALS["hard"], "split": split, "prefix": prefix}}
    own = {f"{prefix or split}/{name}": value for name, value in metrics.items()}
    evaluation = {"metrics": {"test/top1": 0.9, **own}, "config": {"evals": evals}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(evaluation["config"]))
    (folder / "eval.json").write_text(json.dumps(evaluation))
    return str(folder)


def has_color(path, color):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    with Image.open(path) as image:
        near = np.abs(np.asarray(image.convert("RGB")).astype(int) - rgb).max(axis=2) < 12
    return near.sum() > 50


def test_runs_are_drawn_whatever_their_prefixes(tmp_path):
    one = run(tmp_path / "one", prefix="hard")
    two = run(tmp_path / "two", split="val", metrics={"fgsm_linf_2_255_accuracy": 0.25})
    draw_robustness({"first": one, "second": two}, tmp_path / "out")
    with (tmp_path / "out" / "robustness.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["run", "corruption_or_attack", "norm", "level_or_distance", "accuracy"],
        ["first", "jpeg", "", "0.0", "0.9"],
        ["first", "jpeg", "", "2.0", "0.5"],
        ["second", "fgsm", "linf", str(2 / 255), "0.25"],
    ]
    assert all(has_color(tmp_path / "out" / "robustness.png", color) for color in COLORS[:2])
    draw_robustness({"first": one}, tmp_path / "out")
    assert not has_color(tmp_path / "out" / "robustness.png", COLORS[1])


def test_every_tuned_transform_has_its_curve(tmp_path):
    folder, out = run(tmp_path / "run", prefix="hard"), tmp_path / "out"
    assert not draw_mask_study(folder, out) and not out.exists()
    names = [*TRANSFORMS, "best"]
    test = [{"hard/clean_accuracy": 0.9, "hard/jpeg_2_accuracy": 0.1 * i} for i in range(8)]
    study = {n: {"chosen": None, "test": t} for n, t in zip(names, test, strict=True)}
    (tmp_path / "run" / "mask_study.json").write_text(json.dumps({"transforms": study}))
    assert draw_mask_study(folder, out)
    assert all(has_color(out / "mask_study.png", color) for color in COLORS)


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        draw_robustness({"none": str(tmp_path)}, tmp_path / "out")
    folder = run(tmp_path / "run", metrics={"count": 3})
    told = (
        r'run/eval.json has no metrics of robustness; add \{"name": "robustness", "split": "test"'
    )
    with pytest.raises(ValueError, match=told):
        draw_robustness({"run": folder}, tmp_path / "out")
    (tmp_path / "run" / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json is no JSON file"):
        draw_robustness({"run": folder}, tmp_path / "out")
    (tmp_path / "run" / "eval.json").unlink()
    with pytest.raises(ValueError, match=r"has no eval\.json; run: python eval\.py --workdir="):
        draw_robustness({"run": folder}, tmp_path / "out")
    assert not (tmp_path / "out").exists()

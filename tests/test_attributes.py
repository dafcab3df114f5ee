"""A run on attributes from one end to the other: train.py, its lines, eval.py."""

import json
from typing import Any

import jax
import pytest

import eval as eval_programme
import train
from attnzoom_jax.data.datasets.fine_shapes_renderer import ATTRIBUTES
from attnzoom_jax.training.writer import read_metrics
from configs import default


def test_a_model_of_attributes_is_trained_and_evaluated(tmp_path, capsys):
    config: Any = default.in_mode(default.get_config(), "tiny")
    config.model.update({"name": "resnet10", "stem": "small", "width": 4})
    config.data.labels = "attributes"
    weights = tuple(1.0 + k for k in range(len(ATTRIBUTES)))
    config.losses = {"bce": {"name": "binary_cross_entropy", "positive_weight": weights}}
    for name in ("validation", "test"):
        config.evals[name] = {"name": "attributes", "split": name, "masks": name == "test"}
    config.best_metric = "validation/average_precision"
    train.train(config, str(tmp_path), devices=jax.devices()[:1])

    lines = read_metrics(tmp_path)
    training = [line for line in lines if "train/loss" in line]
    assert len(training) == 2 and "train/top1" not in training[0]
    assert all(0 < line["train/accuracy"] < 1 for line in training)
    said = capsys.readouterr().out
    assert f"accuracy {training[0]['train/accuracy']:.3f}  " in said and "top-1" not in said
    # What is said is short, what is written is complete.
    assert "validation/average_precision 0." in said and "accuracy_striped" not in said
    seen = next(line for line in lines if line["step"] == 4 and "validation/accuracy" in line)
    assert {f"validation/accuracy_{name}" for name in ATTRIBUTES} <= seen.keys()

    metrics = eval_programme.evaluate(str(tmp_path), checkpoint="last")
    del seen["step"]
    assert {name: metrics[name] for name in seen} == pytest.approx(seen, rel=1e-5)
    assert 0 < metrics["test/map_energy"] < 1 and "validation/map_energy" not in metrics
    assert json.loads((tmp_path / "eval.json").read_text())["metrics"] == metrics
    eval_programme.print_table(metrics)
    table = {row.split()[0]: row.split()[1] for row in capsys.readouterr().out.split("\n")[2:-1]}
    assert (table["test/count"], table["test/attributes_scored"]) == ("60", str(len(ATTRIBUTES)))

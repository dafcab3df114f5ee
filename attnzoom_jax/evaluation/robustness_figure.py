"""Curves of robustness from what runs have written: their eval.json, and mask_study.json."""

import csv
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from attnzoom_jax.training.workdir import Workdir
from attnzoom_jax.viz.curves import read_curves, save_robustness_curves

STUDY = "mask_study.json"  # of tools/tune_masks.py
PREFIX = "robustness"
EVALUATION = {"name": "robustness", "split": "test", "prefix": PREFIX}


def draw_robustness(workdirs: Mapping[str, str], out: pathlib.Path) -> None:
    """Draw the robustness of runs; write robustness.png and robustness.csv.

    Args:
        workdirs: {name of the run in the picture: its folder}, evaluated by eval.py.
        out: folder, is created.

    Raises:
        ValueError: no run, no eval.json, or one without metrics of robustness.
    """
    runs = {}
    for name, workdir in workdirs.items():
        folder = Workdir(workdir)
        folder.config()  # raises where there is no run
        if not (folder.path / "eval.json").exists():
            raise ValueError(f"{workdir} has no eval.json; run: python eval.py --workdir={workdir}")
        evaluation = folder.read("eval.json")
        runs[name] = _under_one_prefix(
            evaluation.get("metrics", {}),
            evaluation.get("config", {}).get("evals", {}),
            f"{workdir}/eval.json",
        )
    out.mkdir(parents=True, exist_ok=True)
    save_robustness_curves(out / "robustness.png", runs, prefix=PREFIX)
    with (out / "robustness.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("run", "corruption_or_attack", "norm", "level_or_distance", "accuracy"))
        for name, metrics in runs.items():
            for (kind, norm), points in read_curves(metrics, prefix=PREFIX).items():
                table.writerows((name, kind, norm, x, accuracy) for x, accuracy in points)


def draw_mask_study(workdir: str, out: pathlib.Path) -> bool:
    """Draw the robustness with each tuned transform of the masks; write mask_study.png.

    Args:
        workdir: folder of the run that tools/tune_masks.py has studied.
        out: folder, is created.

    Returns:
        Whether there is a study.

    Raises:
        ValueError: a study without metrics of robustness.
    """
    folder = Workdir(workdir)
    if not (folder.path / STUDY).exists():
        return False
    evals, transforms = folder.config().evals, folder.read(STUDY)["transforms"]
    runs = {
        name.replace("_", " "): _under_one_prefix(one["test"], evals, f"{workdir}/{STUDY}")
        for name, one in transforms.items()
    }
    curves = [read_curves(metrics, prefix=PREFIX) for metrics in runs.values()]
    least = min(y for found in curves for curve in found.values() for _, y in curve)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "mask_study.png"
    # Transforms differ by little: the panels begin at the tenth below all curves.
    save_robustness_curves(path, runs, prefix=PREFIX, lowest=min(math.floor(10 * least) / 10, 0.9))
    return True


def _under_one_prefix(
    metrics: Mapping[str, float], evals: Mapping[str, Any], file: str
) -> dict[str, float]:
    """The metrics of the first evaluation of robustness, whatever its prefix in the config."""
    prefixes = [e.get("prefix") or e["split"] for e in evals.values() if e["name"] == "robustness"]
    found = [prefix for prefix in prefixes if _has_curves(metrics, prefix)]
    if not found:
        raise ValueError(
            f"{file} has no metrics of robustness; add {json.dumps(EVALUATION)} to config.evals, "
            "then evaluate the run with that --config"
        )
    own = (name for name in metrics if name.rpartition("/")[0] == found[0])
    return {f"{PREFIX}/{name.rpartition('/')[2]}": metrics[name] for name in own}


def _has_curves(metrics: Mapping[str, float], prefix: str) -> bool:
    try:
        return bool(read_curves(metrics, prefix=prefix))
    except ValueError:
        return False

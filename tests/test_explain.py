"""The figures of explain.py from end to end, on two small runs."""

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import train
from configs import demo


def small_run(folder, insert) -> Any:
    config: Any = demo.get_config("tiny")
    config.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    config.model.insert = insert
    config.update({"total_steps": 2})
    train.train(config, str(folder), devices=jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def zoomed(tmp_path_factory):
    layer = {"stage1": {"name": "attention_zoom", "threshold": 0.9}}
    return small_run(tmp_path_factory.mktemp("runs") / "zoomed", layer)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "plain", {})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("sheet", "b"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)).save(
            folder / f"{name}.png"
        )
    (folder / "notes.png").write_text("no image")
    return folder


def explain(root, *arguments):
    command = [sys.executable, "explain.py", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def is_picture(path):
    with Image.open(path) as image:
        return image.width > 300 and np.ptp(np.asarray(image.convert("L"))) > 100


def test_warp_draws_right_and_wrong_images_by_the_mask(root, zoomed, tmp_path):
    process = explain(
        root, f"--workdir={zoomed}", "--figure=warp", f"--out={tmp_path}", "--count=2"
    )
    assert process.returncode == 0 and process.stderr == ""
    assert "attention: the mask at tap 'inserted/stage1/gate'" in process.stdout
    with np.load(tmp_path / "warp.npz") as arrays:
        is_right = arrays["predicted"] == arrays["labels"]
        assert 0 < is_right.sum() <= 2 and (~is_right).sum() == 2
        assert arrays["warped"].shape[1:] == (256, 256, 3)
        names = arrays["names"].tolist()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"warp_sheet.png", *(f"warp_{name}.png" for name in names)}
    assert all(is_picture(tmp_path / name) for name in pictures)


def test_warp_of_files_by_a_method(root, plain, photos, tmp_path):
    process = explain(
        root,
        *(f"--workdir={plain}", "--figure=warp", f"--out={tmp_path}", f"--images={photos}/*"),
        *("--method=layer_cam", "--option=fwhm=6", "--option=grid=separable", "--class=3"),
    )
    assert process.returncode == 1 and process.stderr == ""  # for the file that is no image
    assert "notes.png is no readable image" in process.stdout
    assert "attention: layer_cam at tap 'stage1'" in process.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        *("warp.npz", "warp_sheet.png", "warp_b.png", "warp_sheet_2.png")
    }


def test_compare_brings_both_maps_to_one_resolution(root, zoomed, plain, tmp_path):
    process = explain(
        root,
        *(f"--workdir={zoomed}", f"--other_workdir={plain}", "--figure=compare"),
        *(f"--out={tmp_path}", "--method=hires_cam", "--tap=backbone/stage1", "--count=1"),
    )
    assert process.returncode == 0 and process.stderr == ""
    places = "hires_cam at tap 'backbone/stage1' of zoomed, tap 'stage1' of plain"
    assert places in process.stdout
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert facts["this"]["map"] == [2 * side for side in facts["other"]["map"]]
    assert facts["common_map"] == facts["other"]["map"]
    counts = {block: row["count"] for block, row in facts["blocks"].items()}
    assert counts["all"] == 60 == sum(counts.values()) - 60
    for row in facts["blocks"].values():
        for score in ("this_object_energy", "other_part_native_energy", "part_share"):
            assert (row[score] is None) == (row["count"] == 0)
    assert is_picture(tmp_path / "compare.png")


def test_compare_of_files_which_have_no_labels(root, zoomed, plain, photos, tmp_path):
    process = explain(
        root,
        *(f"--workdir={zoomed}", f"--other_workdir={plain}", "--figure=compare"),
        *(f"--out={tmp_path}", f"--images={photos}/[bs]*.png"),
    )
    assert process.returncode == 0 and process.stderr == ""
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert facts["blocks"]["unlabelled"]["count"] == 2 and facts["class"] == "predicted"
    assert is_picture(tmp_path / "compare.png")

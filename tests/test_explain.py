"""The figures of explain.py from end to end, on small runs."""

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import train
from attnzoom_jax.data.datasets.fine_shapes import annotations
from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation import map_figure
from attnzoom_jax.evaluation.attribute_figure import deciding_pixels_of
from attnzoom_jax.evaluation.restore import restore_model
from attnzoom_jax.training.sharding import create_mesh
from attnzoom_jax.training.workdir import Workdir
from configs import demo

pytestmark = pytest.mark.usefixtures("quick_compilation")


def small_run(folder, insert, model=None, **changes) -> Any:
    config: Any = demo.get_config("tiny")
    config.update_from_flattened_dict(changes)
    config.model = model or {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    config.model["insert"] = insert
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


FIELDS = ("objects", "object_ids", "part_ids", "attribute_bits")
OF_ATTRIBUTES = {
    "data.labels": "attributes",
    "best_metric": "validation/balanced_accuracy",
    "losses.cross_entropy.name": "binary_cross_entropy",
    **{f"evals.{name}.name": "attributes" for name in ("validation", "test")},
}


@pytest.fixture(scope="module")
def attributes(tmp_path_factory):
    """A run on attributes, from one end to the other."""
    folder = tmp_path_factory.mktemp("runs") / "attributes"
    return small_run(folder, {"stage1": {"name": "attention_zoom"}}, **OF_ATTRIBUTES)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A run on attributes with masks for each of them."""
    folder = tmp_path_factory.mktemp("runs") / "masked"
    model = {"name": "multi_channel", "backbone": "resnet10", "stem": "small", "width": 4}
    return small_run(folder, {}, {**model, "tap": "stage2"}, **OF_ATTRIBUTES)


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


def test_maps_of_an_attribute(root, attributes, tmp_path):
    process = explain(
        root, f"--workdir={attributes}", f"--out={tmp_path}", "--count=3", "--class=striped"
    )
    assert process.returncode == 0 and process.stderr == ""
    names = Workdir(attributes).run_info()["class_names"]
    with np.load(tmp_path / "maps.npz") as arrays:
        assert arrays["targets"].tolist() == [names.index("striped")] * 3
        assert arrays["labels"].shape == arrays["probabilities"].shape == (3, len(names))
        assert set(np.unique(arrays["labels"])) == {0, 1}
        assert (arrays["predicted"] == arrays["probabilities"].argmax(1)).all()
        assert abs(arrays["probabilities"].sum(1) - 1).min() > 0.1  # sigmoids
    assert is_picture(tmp_path / "contact_sheet.png")


def test_the_title_lists_the_strongest_attributes(attributes):
    trained = restore_model(str(attributes), checkpoint="last", mesh=create_mesh(jax.devices()[:1]))
    probabilities, label = np.full(13, 0.1), np.zeros(13)
    probabilities[[3, 7]], label[[3, 4]] = (0.9, 0.6), 1
    title = map_figure._title(trained, probabilities, label)
    names = trained.class_names
    assert title.replace("\n", " ") == f"{names[3]} 0.90, {names[7]} 0.60 11 of 13 right"
    title = map_figure._title(trained, probabilities, np.array(-1))
    assert title.replace("\n", " ") == f"{names[3]} 0.90, {names[7]} 0.60"


def test_attributes_of_a_split(root, masked, tmp_path):
    process = explain(
        root, f"--workdir={masked}", "--figure=attributes", f"--out={tmp_path}", "--count=2"
    )
    assert process.returncode == 0 and process.stderr == ""
    assert f"2 pictures, attributes.png and attributes.npz in {tmp_path}" in process.stdout
    names = Workdir(masked).run_info()["class_names"]
    with np.load(tmp_path / "attributes.npz") as arrays:
        assert arrays["attributes"].tolist() == names and arrays["usage_images"] == 60
        assert arrays["logits"].shape == (2, len(names)) == arrays["true"].shape
        np.testing.assert_allclose(arrays["usage"].sum(1), 1, rtol=1e-5)
    for name in ("attributes", "attributes_test_00000", "attributes_test_00001"):
        assert is_picture(tmp_path / f"{name}.png")


def test_attributes_of_files(root, masked, photos, tmp_path):
    process = explain(
        root,
        *(f"--workdir={masked}", "--figure=attributes", f"--out={tmp_path}"),
        *(f"--images={photos}/*.png", "--class=ring"),
    )
    assert process.returncode == 1 and process.stderr == ""  # for the file that is no image
    with np.load(tmp_path / "attributes.npz") as arrays:
        assert arrays["usage_images"] == 2 and "true" not in arrays
        assert arrays["attributes"][arrays["shown"].argmax(1)].tolist() == ["ring", "ring"]


def test_deciding_pixels_are_those_of_the_annotation(masked):
    trained = restore_model(str(masked), checkpoint="last", mesh=create_mesh(jax.devices()[:1]))
    pixels = deciding_pixels_of(trained, "test", 5)
    source = open_source("fine_shapes/tiny", split="test", fields=FIELDS)
    assert pixels is not None and pixels.any()
    for found, i in zip(pixels, range(5), strict=True):
        np.testing.assert_array_equal(found, annotations(source[i])["attribute_masks"][0])


def test_robustness_needs_no_model(root, plain, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text((plain / "config.json").read_text())
    evals = {"robustness": {"name": "robustness", "split": "test"}}
    metrics = {"test/clean_accuracy": 0.9, "test/jpeg_1_accuracy": 0.8}
    evaluation = {"metrics": metrics, "config": {"evals": evals}}
    (run / "eval.json").write_text(json.dumps(evaluation))
    arguments = (f"--workdir={run}", "--figure=robustness", f"--out={tmp_path / 'out'}")
    process = explain(root, *arguments, f"--other_workdir={run}")
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout == f"robustness.png and robustness.csv in {tmp_path / 'out'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("robustness.csv", "robustness.png")
    }
    rows = (tmp_path / "out" / "robustness.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["run", "this", "this", "other", "other"]
    assert is_picture(tmp_path / "out" / "robustness.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure=warp"], "--figure=warp tells right from wrong classes, and this run has attri"),
        (["--class=label"], "--class=label: an image has several attributes; name one, such as "),
        (["--class=red"], "--class='red': expected predicted, label, or a class id below 13, or a"),
    ],
    ids=["warp", "label", "name"],
)
def test_what_makes_no_sense_of_attributes_is_one_line(
    root, attributes, tmp_path, arguments, message
):
    process = explain(root, f"--workdir={attributes}", f"--out={tmp_path}", *arguments)
    assert process.returncode == 1 and process.stderr.startswith(f"error: {message}")
    assert process.stderr.count("\n") == 1

"""The table end to end, on fine_shapes/tiny and on annotated images made by hand."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.data.annotated import open_annotated
from attnzoom_jax.data.source import Source
from attnzoom_jax.evaluation import attribution_table, create_evaluator
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.metrics import localization
from attnzoom_jax.models import bind
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training import sharding
from configs import default

METHODS = ("grad_cam@relu", "excitation_backprop@relu", "gradient", "smooth_grad")
OPTIONS = {"smooth_grad": {"samples": 2}}
SCORES = {"pointing": {"tolerance": 3.0}, "energy": {}, "boxes": {}}


def data_config(**changes) -> Any:
    data: Any = default.get_config().data
    data.update({"name": "fine_shapes/tiny", **changes})
    return data


def create(trained, *, devices=1, data=None, **options) -> Any:
    options = {"methods": METHODS, "options": OPTIONS, "scores": SCORES, "batch_size": 4} | options
    options = {"split": "test", "truth": "parts", "resamples": 50, "max_images": 11} | options
    return create_evaluator(
        "attribution_table",
        trained.model,
        data=data or data_config(),
        mesh=sharding.create_mesh(jax.devices()[:devices]),
        chunk_images=5,
        **options,
    )


@pytest.fixture(scope="module")
def table(trained):
    evaluator = create(trained)
    metrics = evaluator.run(trained.variables)
    return evaluator, metrics


def scores_of(evaluator, row):
    return next(r["scores"] for r in evaluator.table["rows"] if r["row"] == row)


def test_rows_and_counts(table):
    evaluator, metrics = table
    assert [r["row"] for r in evaluator.table["rows"]] == ["center", "uniform", *METHODS]
    assert evaluator.table["counts"] == {
        "images": 11,
        "images_with_cues": 11,
        "cues": 11,
        "difficult_cues": 0,
        "classes": 11,
        "top1": 11,
    } | {k: evaluator.table["counts"][k] for k in ("classes", "top1")}
    assert set(metrics) <= set(evaluator.metric_names)
    assert "test/uniform/pointing" not in metrics  # it has no point
    assert "pointing_difficult" not in evaluator.table["metrics"]  # nothing is difficult here
    assert all(0 <= value <= 1 for value in metrics.values())
    for row in evaluator.table["rows"]:
        for score in row["scores"].values():
            assert score["low"] <= score["value"] <= score["high"] and score["count"] == 11


def test_energy_and_pointing_of_grad_cam_by_hand(table, trained):
    """One image after the other, through the functions that a user would call."""
    _, metrics = table
    source = open_annotated(data_config(), split="test", truth="parts")
    fn = bind(trained.model, trained.variables, train=False)
    energy, hits = [], {}
    for example in (source[i] for i in range(11)):
        inputs = to_input(jnp.asarray(example["image"])[None], data_config())
        label = int(example["labels"][0])
        maps = attribution.grad_cam(fn, inputs, jnp.array([label]), tap="relu")
        heat = ops_maps.positive(ops_maps.resize(maps, (32, 32)))
        truth = jnp.asarray(example["masks"][:1])
        energy.append(float(localization.energy_inside(heat, truth)[0]))
        hit = localization.pointing_hit(heat, truth, tolerance=3)
        hits.setdefault(label, []).append(float(hit[0]))
    assert metrics["test/grad_cam@relu/energy"] == pytest.approx(np.mean(energy), abs=1e-5)
    expected = np.mean([np.mean(own) for own in hits.values()])
    assert metrics["test/grad_cam@relu/pointing"] == pytest.approx(expected)


def test_four_devices_give_the_same_numbers(table, trained):
    _, metrics = table
    again = create(trained, devices=4).run(trained.variables)
    assert again == pytest.approx(metrics, abs=1e-5)


def test_images_are_seen_whole(table, trained):
    _, metrics = table
    found = create(trained, data=data_config(crop_size=16), methods=METHODS[:1]).run(
        trained.variables
    )
    assert found == pytest.approx({name: metrics[name] for name in found}, abs=1e-5)


def test_the_table_is_written(trained, tmp_path, capsys):
    evaluator = create(trained, methods=("grad_cam@relu",), folder=tmp_path / "t")
    evaluator.run(trained.variables)
    table = json.loads((tmp_path / "t" / "table.json").read_text())
    assert table["rows"][2]["scores"] == scores_of(evaluator, "grad_cam@relu")
    for ending in ("csv", "tex"):
        assert "grad" in (tmp_path / "t" / f"table.{ending}").read_text()
    assert (tmp_path / "t" / "table.png").stat().st_size > 10_000
    assert "pointing" in capsys.readouterr().out


def test_a_killed_table_goes_on(trained, tmp_path, monkeypatch):
    expected = create(trained).run(trained.variables)
    stopping, calls = create(trained, folder=tmp_path), []
    original = attribution_table.read_cues

    def read_cues(source, places, **options):
        calls.append(places[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(source, places, **options)

    monkeypatch.setattr(attribution_table, "read_cues", read_cues)
    with pytest.raises(KeyboardInterrupt):
        stopping.run(trained.variables)
    again = create(trained, folder=tmp_path)
    assert again.run(trained.variables) == pytest.approx(expected, abs=1e-6)
    assert calls == [0, 5, 10, 10]


def test_another_request_begins_anew_in_the_same_folder(trained, tmp_path):
    """Of other weights, outputs, methods, or another function of the same weights."""
    options: Any = {"scores": {"energy": {}}, "folder": tmp_path, "max_images": 5}

    def value(variables, trained=trained, methods=("grad_cam@relu",), **more):
        run = create(trained, methods=methods, **more, **options).run(variables)
        return run[f"test/{methods[0]}/energy"]

    first = value(trained.variables)
    moved = jax.tree.map(lambda leaf: leaf + 0.5, trained.variables)
    file = tmp_path / "map.json"
    file.write_text('{"*": [3]}')
    ungated = dataclasses.replace(trained, model=trained.model.clone(has_gate=False))
    others = [value(moved), value(trained.variables, methods=("gradient",))]
    others.append(value(trained.variables, outputs=str(file)))
    file.write_text('{"*": [4]}')
    others.append(value(trained.variables, outputs=str(file)))
    others.append(value(trained.variables, trained=ungated))
    assert len({first, *others}) == 6
    assert value(trained.variables) == first


def test_permuted_weights_are_another_network(trained):
    options: Any = {"methods": ("grad_cam@relu",), "scores": {"energy": {}}}
    given = create(trained, **options).run(trained.variables)
    permuted = create(trained, weights="permuted", **options).run(trained.variables)
    assert permuted["test/uniform/energy"] == given["test/uniform/energy"]
    assert permuted["test/grad_cam@relu/energy"] != given["test/grad_cam@relu/energy"]


@pytest.mark.slow
def test_faithfulness_is_in_the_table(trained):
    names = ("insertion", "deletion", "average_drop", "increase", "road", "max_sensitivity")
    evaluator = create(
        trained,
        methods=("grad_cam@relu",),
        scores={"faithfulness": {"names": names, "steps": 4, "samples": 2, "shares": (0.5,)}},
        max_images=4,
    )
    evaluator.run(trained.variables)
    assert set(scores_of(evaluator, "grad_cam@relu")) == set(names)
    assert scores_of(evaluator, "grad_cam@relu")["max_sensitivity"]["value"] > 0
    assert scores_of(evaluator, "center")["max_sensitivity"]["value"] == 0


# Annotated images of several sizes, with everything that can be wrong.

NAMES = tuple(f"class {i}" for i in range(16))


def image(h, w, labels, boxes, *, name="a.jpg", **more):
    rng = np.random.default_rng(h * w)
    return {
        "name": name,
        "image": rng.integers(0, 255, (h, w, 3)).astype(np.uint8),
        "labels": np.array(labels, np.int32),
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "is_hard": np.zeros(len(labels), bool),
        "problems": (),
        **more,
    }


MIXED = [
    image(40, 60, [0, 3], [(0, 0, 40, 60), (5, 5, 15, 25)]),  # one box is the whole image
    image(90, 30, [3], [(10, 10, 80, 20)], name="b.jpg"),
    image(1, 1, [], [], name="broken.jpg", problems=(("unreadable_image", "broken.jpg"),)),
    image(33, 47, [5], [(1, 1, 9, 9)], name="c.jpg", problems=(("clipped_box", "c.jpg: box 0"),)),
]


@pytest.fixture
def mixed(monkeypatch):
    def open_mixed(data, *, split, truth):
        return Source("mixed:test", NAMES, (None, None, 3), MIXED)

    monkeypatch.setattr(attribution_table, "open_annotated", open_mixed)


@pytest.mark.parametrize("resize", ["squash", "short_side"])
def test_images_of_several_sizes(trained, mixed, resize):
    evaluator = create(
        trained, truth="boxes", methods=("grad_cam@relu",), resize=resize, size=32, multiple=8
    )
    evaluator.run(trained.variables)
    counts, problems = evaluator.table["counts"], evaluator.table["problems"]
    assert (counts["images"], counts["images_with_cues"], counts["cues"]) == (4, 3, 4)
    assert counts["difficult_cues"] == 1
    assert problems["unreadable_image"] == {"count": 1, "first": ["broken.jpg"]}
    assert problems["clipped_box"]["first"] == ["c.jpg: box 0"]
    assert problems["no_cue"]["first"] == ["broken.jpg: no class is annotated"]


def test_nan_in_a_map_is_named(trained, mixed):
    variables = jax.tree.map(lambda leaf: leaf * np.nan, trained.variables)
    evaluator = create(trained, truth="boxes", methods=("grad_cam@relu",), resize="squash", size=32)
    evaluator.run(variables)
    problem = evaluator.table["problems"]["not_finite_map (grad_cam@relu)"]
    assert problem["count"] == 4
    assert problem["first"][0] == "grad_cam@relu: a.jpg"
    assert "energy" not in scores_of(evaluator, "grad_cam@relu")
    assert scores_of(evaluator, "grad_cam@relu")["pointing"]["value"] == 0


def test_an_empty_map_is_named_whatever_the_scores(trained, mixed):
    variables = jax.tree.map(jnp.zeros_like, trained.variables)
    options: Any = {"scores": {"energy": {}}, "methods": ("grad_cam@relu",)}
    evaluator = create(trained, truth="boxes", resize="squash", size=32, **options)
    evaluator.run(variables)
    assert evaluator.table["problems"]["empty_map (grad_cam@relu)"]["count"] == 4
    assert not any("uniform" in kind for kind in evaluator.table["problems"])


def test_no_cue_at_all_is_an_error(trained, mixed, monkeypatch):
    monkeypatch.setitem(globals(), "MIXED", MIXED[2:3])
    with pytest.raises(ValueError, match=r"mixed:test: no cue to score \(unreadable_image"):
        create(trained, resize="squash", size=32).run(trained.variables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("grad_kam",)}, "unknown method 'grad_kam'.*grad_cam"),
        ({"methods": ("grad_cam@relo",)}, "'relo'.*relu"),
        ({"scores": {"pointng": {}}}, "unknown score 'pointng'.*pointing"),
        ({"scores": {"pointing": {"tolerence": 3}}}, "scores.pointing.*tolerence"),
        ({"scores": {}}, "scores is empty"),
        ({"weights": "none"}, "unknown weights 'none'.*permuted"),
        ({"batch_size": 3, "devices": 2}, "batch_size=3 cannot be split over 2 devices"),
        ({"data": data_config(resize="crop", image_size=16)}, "a crop hides a part of the truth"),
        ({"truth": "boxs"}, "unknown truth 'boxs'"),
    ],
)
def test_what_cannot_be_understood(trained, options, message):
    with pytest.raises(ValueError, match=message):
        create(trained, **options).run(trained.variables)

"""train.py and eval.py from end to end, on a small run."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import eval as eval_programme
import explain
import train
from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.evaluation.restore import restore_model
from attnzoom_jax.models import create_model
from attnzoom_jax.training import sharding
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.writer import read_metrics
from configs import demo

ONE_DEVICE = jax.devices()[:1]


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    base.optimizer = {"name": "sgd", "learning_rate": 0.05}
    base.schedule = {"name": "constant"}
    base.evals.localization.masks = ("object_mask",)
    base.update({"total_steps": 6, "log_every_steps": 2, "eval_every_steps": 3})
    base.update_from_flattened_dict(changes)
    return base


def run(folder, settings, **options):
    return train.train(settings, str(folder), devices=ONE_DEVICE, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with averaged parameters, its folder and its state."""
    folder = tmp_path_factory.mktemp("finished")
    state = run(folder, config(ema_decay=0.5), overrides={"ema_decay": 0.5})
    return folder, state


def test_the_folder_holds_what_was_asked_for_and_what_came_out(finished):
    folder, state = finished
    read = lambda name: json.loads((folder / name).read_text())  # noqa: E731
    assert read("config.json")["optimizer"]["learning_rate"] == 0.05
    assert read("overrides.json") == {"ema_decay": 0.5}
    info = read("run.json")
    assert info["steps"] == 6 and info["seed"] == 0 and info["platform"] == "cpu"
    assert {"commit", "versions", "device_kind", "device_count", "start"} <= info.keys()
    assert info["duration_s"] > 0
    assert list((folder / "tensorboard").glob("events*"))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    assert checkpoints.steps() == [3, 6] and int(state.step) == 6
    checkpoints.close()


def test_the_lines_of_a_run(finished):
    lines = read_metrics(finished[0])
    training = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "validation/top1" in line]
    # Each evaluation ends a line of its own, so that a resumed run writes the same ones.
    assert [line["step"] for line in training] == [2, 3, 4, 6]
    assert [line["step"] for line in evaluations] == [3, 6]
    for line in training:
        assert line["train/loss"] > 0 and 0 <= line["train/top1"] <= 1
        assert line["learning_rate"] == pytest.approx(0.05)
    assert evaluations[0]["validation/count"] == 60


def test_a_line_is_the_mean_of_its_steps(tmp_path, finished):
    run(tmp_path, config(ema_decay=0.5, log_every_steps=1))
    single = {line["step"]: line for line in read_metrics(tmp_path) if "train/loss" in line}
    for line in read_metrics(finished[0]):
        if "train/loss" in line and line["step"] in (2, 6):
            before, last = (single[step]["train/loss"] for step in (line["step"] - 1, line["step"]))
            assert line["train/loss"] == pytest.approx((before + last) / 2, rel=1e-5)


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    state = run(folder, config(ema_decay=0.5))
    assert int(state.step) == 6 and "nothing to do" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_eval_repeats_what_training_saw_with_the_averaged_parameters(finished):
    folder, _ = finished
    evaluations = [line for line in read_metrics(folder) if "validation/top1" in line]
    for checkpoint, line in (("3", evaluations[0]), ("last", evaluations[1])):
        metrics = eval_programme.evaluate(str(folder), checkpoint=checkpoint)
        seen = {name: value for name, value in line.items() if name != "step"}
        assert {name: metrics[name] for name in seen} == pytest.approx(seen, rel=1e-5)
    written = json.loads((folder / "eval.json").read_text())
    assert written["metrics"] == metrics and written["step"] == 6
    assert {"test/top1", "test/object_energy_ratio", "test/count"} <= metrics.keys()
    assert {"config", "overrides", "commit", "versions", "device_kind", "seed"} <= written.keys()
    eval_programme.print_table(metrics)


@pytest.mark.parametrize("cache", ["host", "device"])
def test_the_step_is_traced_once(tmp_path, monkeypatch, cache):
    traced = []

    def make_train_step(*args, **kwargs):
        train_step = make(*args, **kwargs)

        def counted(state, batch):
            traced.append(1)
            return train_step(state, batch)

        return counted

    make = train.make_train_step
    monkeypatch.setattr(train, "make_train_step", make_train_step)
    # Calls of 2, 1, 2 and 1 steps, of one program.
    run(tmp_path, config(**{"data.cache": cache, "data.steps_per_call": 5}))
    assert len(traced) == 1


def test_a_loss_that_is_no_number_stops_the_run_at_its_last_good_checkpoint(tmp_path):
    exploding = config(total_steps=8, eval_every_steps=2, log_every_steps=4)
    exploding.schedule = {"name": "step", "boundary_steps": (3,), "factor": 1e35}
    for _ in range(2):  # and stops again when it is started again
        with pytest.raises(FloatingPointError) as error:
            run(tmp_path, exploding)
        assert "infinite at step 4; the last good checkpoint is step 2 in " in str(error.value)
        assert "\n" not in str(error.value)
    checkpoints = Checkpoints(tmp_path / "checkpoints", best_metric="validation/top1")
    assert checkpoints.steps() == [2] and checkpoints.find("best") == 2
    checkpoints.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 2]


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    exploding = config(**{"optimizer.learning_rate": 1e35})
    with pytest.raises(FloatingPointError, match="at step 1; there is no checkpoint yet"):
        run(tmp_path, exploding)
    # Nothing is lost, so a mended config may take the folder.
    run(tmp_path, config(total_steps=1))


def test_early_stopping_counts_what_was_before_a_resume(tmp_path, capsys):
    # A metric that never gets better after the first evaluation.
    still = config(early_stopping=2, eval_every_steps=1, best_metric="validation/count")
    run(tmp_path / "whole", still)
    assert "stopped early" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "whole")] == [1, 1, 2, 2, 3, 3]
    parts = tmp_path / "parts"
    run(parts, still, stop_at=2)
    with (parts / "metrics.jsonl").open("a") as file:  # killed between evaluation and checkpoint
        file.write('{"step": 3, "validation/count": 60}\n')
    assert int(run(parts, still).step) == 3
    assert [line["step"] for line in read_metrics(parts)] == [1, 1, 2, 2, 3, 3]
    assert int(run(parts, still).step) == 3


def test_a_run_without_a_best_metric_keeps_the_last(tmp_path):
    run(tmp_path, config(best_metric="", total_steps=2))
    last = eval_programme.evaluate(str(tmp_path), checkpoint="last")
    assert "test/top1" in last and eval_programme.evaluate(str(tmp_path)) == last


def test_what_is_cropped_in_training_is_cropped_elsewhere(tmp_path):
    cropped = config(total_steps=1, **{"data.crop_size": 24})
    run(tmp_path, cropped)
    assert eval_programme.evaluate(str(tmp_path))["test/count"] == 60
    trained = restore_model(str(tmp_path), mesh=sharding.create_mesh(ONE_DEVICE))
    assert trained.image_shape == (24, 24, 3)
    examples = explain.from_split(trained, "test", 2)
    source = open_source("fine_shapes/tiny", split="test")
    for i in range(2):
        np.testing.assert_array_equal(examples.images[i], source[i]["image"][4:28, 4:28])
    arrays = explain.explain(trained, examples, tmp_path / "explain")
    assert np.isfinite(arrays["grad_cam"]).all()
    assert (tmp_path / "explain" / "contact_sheet.png").exists()


def test_training_learns(tmp_path):
    """The loss on one repeated batch falls: the whole of the split is one batch."""
    few = config(total_steps=30, eval_every_steps=30, log_every_steps=1)
    few.data.update({"train_split": "train[:16]"})
    few.augment.update({"flip": False, "crop_padding": 0})
    few.optimizer = {"name": "adam", "learning_rate": 0.02}
    run(tmp_path, few)
    losses = [line["train/loss"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert np.mean(losses[-3:]) < min(2.4, 0.8 * losses[0])  # chance: ln 16 = 2.77


def test_a_resumed_run_keeps_its_start_and_adds_up_its_time(tmp_path):
    run(tmp_path, config(), stop_at=3)
    first = json.loads((tmp_path / "run.json").read_text())
    run(tmp_path, config())
    second = json.loads((tmp_path / "run.json").read_text())
    assert second["start"] == first["start"] and second["steps"] == 6
    assert second["duration_s"] > first["duration_s"] > 0


def test_a_model_comes_back_without_its_data_set(finished, tmp_path, monkeypatch):
    folder, _ = finished
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    trained = restore_model(str(folder), mesh=sharding.create_mesh(ONE_DEVICE))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photo.png")
    examples = explain.from_files(trained, f"{tmp_path}/*.png")
    assert examples.images.shape == (1, *trained.image_shape)
    assert not list(tmp_path.glob("fine_shapes"))


def test_files_are_resized_as_the_run_resizes(finished, tmp_path):
    folder, _ = finished
    trained = restore_model(str(folder), mesh=sharding.create_mesh(ONE_DEVICE))
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # the central square
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    squashed = explain.from_files(trained, f"{tmp_path}/*.png").images
    assert 0.2 < (squashed > 127).mean() < 0.5
    other = config(**{"data.resize": "crop", "data.image_size": 32})
    cropped = explain.from_files(
        dataclasses.replace(trained, config=other), f"{tmp_path}/*.png"
    ).images
    assert (cropped > 200).all()


def test_two_evaluations_may_not_give_the_same_metric(finished):
    folder, _ = finished
    settings = config(ema_decay=0.5)
    settings.evals.test.split = "validation"
    with pytest.raises(ValueError, match=r"'validation/.*'; set evals\..*\.prefix"):
        eval_programme.evaluate(str(folder), config=settings)


def test_a_watched_metric_that_no_evaluation_gives_stops_the_run_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match=r"metric in best_metric 'validation/acc'.*/top1"):
        run(tmp_path / "run", config(best_metric="validation/acc"))
    assert not (tmp_path / "run").exists()


def test_evaluators_name_the_metrics_that_they_give(finished):
    folder, _ = finished
    trained = restore_model(str(folder), mesh=sharding.create_mesh(ONE_DEVICE))
    mesh = sharding.create_mesh(ONE_DEVICE)
    for options in trained.config.evals.values():
        evaluator = create_evaluator(
            model=trained.model, data=trained.config.data, mesh=mesh, **options
        )
        given = [name for name in evaluator.run(trained.variables) if "/gate_" not in name]
        if options["name"] == "attribution_table":  # what no cue can give has no row
            assert set(given) < set(evaluator.metric_names)
        else:
            assert sorted(evaluator.metric_names) == sorted(given)


def test_several_methods_stand_side_by_side(finished, tmp_path, capsys):
    folder, _ = finished
    trained = restore_model(str(folder), mesh=sharding.create_mesh(ONE_DEVICE))
    methods = ("contrastive_excitation_backprop", "smooth_grad", "occlusion")
    arrays = explain.explain(
        trained,
        explain.from_split(trained, "test", 3),
        tmp_path / "explain",
        methods=methods,
        options={"samples": 2, "negative": "clamp"},
        target="label",
        chunk_size=2,
    )
    printed = capsys.readouterr().out
    assert "contrastive_excitation_backprop at tap 'stage" in printed
    assert "smooth_grad at the image" in printed and "2/3 images" in printed
    with np.load(tmp_path / "explain" / "maps.npz") as maps:
        for method in methods:
            assert len(maps[method]) == 3 and np.isfinite(maps[method]).all()
            np.testing.assert_array_equal(maps[method], arrays[method])
        np.testing.assert_allclose(maps["absolute"], 1, atol=0.05)  # with negative=clamp
    assert (tmp_path / "explain" / "contact_sheet.png").exists()


def test_the_taps_are_listed_with_the_default_marked(finished):
    folder, _ = finished
    trained = restore_model(str(folder), mesh=sharding.create_mesh(ONE_DEVICE))
    lines = [line.split("  ") for line in explain.list_taps(trained).splitlines()]
    assert lines[0][0] == "tap"
    (default,) = (line[0] for line in lines if line[-1] == "default")
    assert default.startswith("stage")
    depths = [int(line[-1].split()[-1]) for line in lines[1:] if line[-1] != "default"]
    assert min(depths) == 1 and max(depths) == 4


def test_a_run_begins_with_published_weights_and_resumes_without_the_file(tmp_path, capsys):
    file = tmp_path / "weights.npz"
    settings = config(pretrained=str(file), **{"optimizer.learning_rate": 1e-12})
    model = create_model(num_classes=16, **settings.model.to_dict())
    variables = init_variables(model, (32, 32, 3), seed=5)
    np.savez(file, **{k: np.asarray(v) for k, v in flatten_dict(variables, sep="/").items()})
    run(tmp_path / "run", settings, stop_at=3)
    assert "newly initialised  0: none" in capsys.readouterr().out
    file.unlink()
    state = run(tmp_path / "run", settings)
    close = functools.partial(np.testing.assert_allclose, atol=1e-9)
    jax.tree.map(close, state.params, variables["params"])


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "weights.npz"
    np.savez(file, strange=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"weights\.npz is of another network than the model"):
        run(tmp_path / "run", config(pretrained=str(file)))
    assert not (tmp_path / "run").exists()

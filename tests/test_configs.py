"""Every config loads, builds, and runs in its mode `:tiny`; its values are compared with a golden.

REGENERATE_GOLDEN=1 writes the golden files anew; look at the difference before it is committed.
"""

import functools
import importlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import optuna
import pytest
from PIL import Image

import eval as eval_programme
import explain
import train
from attnzoom_jax.data.source import Source
from attnzoom_jax.evaluation.restore import restore_model
from attnzoom_jax.models import create_model
from attnzoom_jax.training import experiment, sharding
from attnzoom_jax.training.optimizer import create_optimizer
from attnzoom_jax.training.schedule import create_schedule
from attnzoom_jax.training.search import changed, check_metric, read_space, suggest
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.workdir import Workdir, differences, flatten, to_plain
from configs import attention_zoom, default

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "configs" / "golden"
NAMES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "default")
)
EVALUATIONS = ("attribution_table", "phrases")  # of a run, or of a network from elsewhere
TRAININGS = [name for name in NAMES if name not in EVALUATIONS]
MODES = ("", "tiny")


def load(name, mode="") -> Any:
    return importlib.import_module(f"configs.{name}").get_config(mode)


def any_source(data, *, split):
    """Stands for a data set that is not prepared here."""
    return Source(
        name=f"{data.name}:{split}",
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
    free = ("model.", "optimizer.", "schedule.", "evals.", "losses.")
    keys = {key for key in flatten(to_plain(load(name, mode))) if not key.startswith(free)}
    known = flatten(to_plain(default.get_config()))
    assert keys == {key for key in known if not key.startswith(free)}


@pytest.mark.parametrize("name", NAMES)
def test_a_newcomer_can_run_it_from_its_docstring(name):
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    programme = "eval" if name in EVALUATIONS else "train"
    assert f"python {programme}.py --config=configs/{name}.py --workdir=runs/" in text
    for word in ("Hardware and time:", "Expected:", "`:tiny`"):
        assert word in text


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_mode_is_named(name):
    with pytest.raises(ValueError, match="unknown mode 'tny'"):
        load(name, "tny")


@pytest.mark.parametrize("name", TRAININGS)
def test_the_parts_of_the_whole_experiment_fit(name, monkeypatch):
    monkeypatch.setattr(experiment, "open_split", any_source)
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
    score = "top1" if config.data.labels == "label" else "balanced_accuracy"
    assert metrics["test/count"] == 60 and 0 <= metrics[f"test/{score}"] <= 1
    trained = restore_model(str(tmp_path), mesh=sharding.create_mesh(jax.devices()[:1]))
    arrays = explain.explain(trained, explain.from_split(trained, "test", 3), tmp_path / "explain")
    assert arrays["grad_cam"].shape[0] == 3 and np.isfinite(arrays["grad_cam"]).all()
    gates = [name for name in arrays if "/gate" in name]
    zooms = config.model.steps - 1 if config.model.name == "recursive_zoom" else 0
    assert len(gates) == len(config.model.get("insert", {})) + zooms
    for picture in ("test_00000", "test_00002", "contact_sheet"):
        with Image.open(tmp_path / "explain" / f"{picture}.png") as image:
            assert image.width > 300 and np.ptp(np.asarray(image.convert("L"))) > 100
    with np.load(tmp_path / "explain" / "maps.npz") as maps:
        assert set(maps.files) == {key.replace("/", ".") for key in arrays}


# The tables of AttZoom: configs/attention_zoom.py.

TABLES = [
    (dataset, backbone)
    for dataset in attention_zoom.DATASETS
    for backbone in attention_zoom.BACKBONES
]


def table_config(dataset, backbone, variant, mode=""):
    choice = f"dataset={dataset},backbone={backbone},variant={variant}"
    return load("attention_zoom", ",".join(filter(None, [choice, mode])))


@functools.cache
def variant_shapes(backbone, variant):
    """{parameter path: shape} of a config's model at 32x32 pixels."""
    config = table_config("cifar100", backbone, variant)
    model = create_model(num_classes=100, **to_plain(config.model))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("backbone", attention_zoom.BACKBONES)
def test_variants_differ_in_the_parameters_of_the_layer_alone(backbone):
    shapes = {variant: variant_shapes(backbone, variant) for variant in attention_zoom.VARIANTS}
    base = {f"backbone/{path}": shape for path, shape in shapes["base"].items()}
    added = {
        variant: sorted(path for path in found if path not in base)
        for variant, found in shapes.items()
        if variant != "base"
    }
    mask = "inserted/stem/attention_conv/kernel"
    zoom = "inserted/stem/zoom/kernel"
    assert added == {
        "zoom": [mask, zoom],
        "mask_only": [mask, zoom],
        "zoom_only": [zoom],
        "bilinear": [],
    }
    for variant in added:
        assert base.items() <= shapes[variant].items()


def test_rows_are_those_of_the_tables():
    assert len(attention_zoom.ROWS) == 24
    config = table_config("cifar100", "se_resnet50", "zoom")
    assert (config.data.batch_size, config.optimizer.name) == (64, "sgd")
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.99, 6e-4)
    assert config.schedule.name == "cosine" and config.early_stopping == 5
    config = table_config("tiny_imagenet", "cbam_resnet50", "base")
    assert (config.schedule.name, config.schedule.decay_epochs) == ("step", 30.0)
    assert config.optimizer.learning_rate == 5e-3 and not config.model.insert


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("backbone=resnet5", "unknown backbone 'resnet5'; did you mean 'resnet50'"),
        ("variant=none", "unknown variant 'none'"),
        ("model=resnet50", "unknown choice 'model'"),
    ],
)
def test_an_unknown_choice_is_named(mode, message):
    with pytest.raises(ValueError, match=message):
        load("attention_zoom", mode)


# At :tiny the two data sets are one, and differ in the hyper-parameters alone. DenseNet and CBAM
# take minutes to compile and are left to a person: train.py --config=...:backbone=densenet121,tiny.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "backbone"),
    [
        ("cifar100", "resnet50"),
        ("tiny_imagenet", "mobilenet"),
        ("cifar100", "se_resnet50"),
        ("tiny_imagenet", "resnext50"),
    ],
)
def test_backbones_take_two_steps_at_tiny_offline(dataset, backbone, tmp_path):
    config = table_config(dataset, backbone, "zoom", "tiny")
    config.total_steps = 2
    config.train_evals = ()
    config.best_metric, config.early_stopping = "", 0
    assert int(train.train(config, str(tmp_path), devices=jax.devices()[:1]).step) == 2


@pytest.mark.parametrize(("dataset", "backbone", "with_layer"), attention_zoom.ROWS)
def test_every_row_has_an_optimizer_and_a_schedule(dataset, backbone, with_layer, monkeypatch):
    monkeypatch.setattr(experiment, "open_split", any_source)
    config = table_config(dataset, backbone, "zoom" if with_layer else "base")
    parts = experiment.create_experiment(config)
    assert round(parts.total_steps / parts.eval_every) == 50  # epochs, each with an evaluation
    schedule: Any = parts.schedule
    rates = [float(schedule(step)) for step in range(0, parts.total_steps, parts.eval_every)]
    assert np.isfinite(rates).all() and 0 < max(rates) <= config.optimizer.learning_rate * 1.0001


@pytest.mark.parametrize(("dataset", "backbone", "with_layer"), attention_zoom.ROWS)
@pytest.mark.parametrize("mode", MODES)
def test_whatever_is_drawn_has_an_optimizer_and_a_schedule(dataset, backbone, with_layer, mode):
    variant = "zoom" if with_layer else "base"
    config = table_config(dataset, backbone, variant, mode)
    words = f"dataset={dataset},backbone={backbone},variant={variant},{mode}"
    space = read_space(f"{ROOT}/configs/attention_zoom.py:{words}", config)
    check_metric(config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        drawn = changed(config, suggest(study.ask(), space, config))
        schedule: Any = create_schedule(drawn, total_steps=1000, steps_per_epoch=20.0)
        create_optimizer(drawn, {"kernel": np.zeros(3)}, schedule=schedule)
        seen.add((drawn.optimizer.name, drawn.schedule.name))
        assert mode != "tiny" or drawn.data.batch_size <= 240  # images of the tiny data set
        assert (drawn.optimizer.momentum is None) == (drawn.optimizer.name == "adam")
        assert (drawn.schedule.decay_epochs is None) == (drawn.schedule.name != "step")
    assert len(seen) == 8

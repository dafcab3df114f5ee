"""tools/cost.py: its counts against counts by hand; the rows; data sets that are not here."""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import re
import socket
import subprocess
import sys
import time
from typing import Any

import flax.linen as nn
import pytest

from attnzoom_jax.training import sharding
from configs import attention_zoom, demo

# XLA counts FLOPs and bytes before LLVM sees a program.
pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parent.parent.parent
SPEC = importlib.util.spec_from_file_location("cost", ROOT / "tools" / "cost.py")
assert SPEC is not None and SPEC.loader is not None
cost: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cost)

WIDTH = 4
ZOOM = {"name": "attention_zoom", "threshold": 0.9}
ALL = {"base", "zoom", "mask_only", "zoom_only", "bilinear", "straight_through"}
FLAGS = {"image_size": (16, 16), "num_classes": 5}


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    model = {"name": "resnet", "stem": "small", "width": WIDTH, "stage_sizes": (1, 1)}
    base.model = {**model, "insert": {"stem": ZOOM}}
    base.augment.flip = False
    base.optimizer.name = "sgd"
    base.update_from_flattened_dict(changes)
    return base.lock()


def create_parts(settings, batch_size=8):
    return cost.create_parts(settings, cost.find_source(settings, **FLAGS), batch_size)


@pytest.fixture(scope="module")
def rows():
    return cost.measure(create_parts(config()), 8, with_time=False)


# What is counted.


class Net(nn.Module):
    """Nothing but multiply-adds."""

    @nn.compact
    def __call__(self, x):
        for c, k, stride, groups in LAYERS:
            x = nn.Conv(c, (k, k), stride, feature_group_count=groups, use_bias=False)(x)
        return nn.Dense(5, use_bias=False)(x.reshape(x.shape[0], -1))


LAYERS = ((8, 3, 1, 1), (12, 3, 2, 4), (16, 1, 1, 1), (16, 5, 1, 1))


def taps_by_hand(size, kernel, stride):
    """Pairs (output pixel, tap) along one axis that meet a pixel and not the padding of SAME."""
    out = -(-size // stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    return sum(
        0 <= i * stride + tap - before < size
        for i, tap in itertools.product(range(out), range(kernel))
    )


def flops_by_hand(size, channels):
    """FLOPs of each layer of Net on one image."""
    counts = []
    for features, kernel, stride, groups in LAYERS:
        taps = taps_by_hand(size, kernel, stride) ** 2
        counts.append(2 * taps * (channels // groups) * features)
        size, channels = -(-size // stride), features
    return [*counts, 2 * size * size * channels * 5]


def measure_net(batch_size):
    experiment = dataclasses.replace(create_parts(config(), batch_size)["base"], model=Net())
    return cost.measure({"base": experiment}, batch_size, with_time=False)["base"]


def test_flops_are_those_of_a_count_by_hand():
    row, by_hand = measure_net(16), flops_by_hand(16, 3)
    assert row["forward_flops"] == pytest.approx(sum(by_hand), rel=1e-3)
    # Each layer twice more, for both gradients; the images have none. Normalisation of the images,
    # loss and update are what the tolerance is for: nothing is counted per step of a longer loop.
    assert row["training_flops"] == pytest.approx(3 * sum(by_hand) - by_hand[0], rel=0.05)
    kernels = [3 * 9 * 8, 2 * 9 * 12, 12 * 16, 16 * 25 * 16, 8 * 8 * 16 * 5]
    assert row["parameters"] == sum(kernels)


def test_the_cost_of_an_image_does_not_depend_on_the_batch():
    small, large = measure_net(8), measure_net(32)
    assert large["forward_flops"] == small["forward_flops"]
    assert 0.9 < large["training_flops"] / small["training_flops"] <= 1  # the update is shared
    assert large["memory_bytes"] <= small["memory_bytes"]  # so are the gradients


def test_memory_holds_at_least_what_the_backward_pass_needs():
    # The inputs of the second to the last layer, float32; those of the first are the images.
    inputs = 16 * 16 * 8 + 8 * 8 * (12 + 16 + 16)
    assert 4 * inputs <= measure_net(32)["memory_bytes"] <= 10 * 4 * inputs


def test_the_controls_differ_in_parameters_where_they_should(rows):
    counts = {name: row["parameters"] for name, row in rows.items()}
    mask, kernel = 9 * WIDTH, 9 * WIDTH  # W_A: 3 x 3 x c x 1, W_E: 3 x 3 x 1 x c
    added = {name: count - counts["base"] for name, count in counts.items()}
    assert added == {
        "base": 0,
        "zoom": mask + kernel,
        "mask_only": mask + kernel,
        "zoom_only": kernel,
        "bilinear": 0,
        "straight_through": mask + kernel,
    }


@pytest.mark.parametrize("key", ["forward_flops", "training_flops"])
def test_the_resolution_is_what_costs(rows, key):
    counts = {name: row[key] for name, row in rows.items()}
    assert counts["bilinear"] == pytest.approx(counts["zoom_only"], rel=0.05)
    assert counts["straight_through"] == pytest.approx(counts["zoom"], rel=0.01)
    assert counts["base"] < counts["mask_only"] < 1.3 * counts["base"]
    assert 2.5 * counts["base"] < counts["bilinear"] < counts["zoom"]
    assert 2.5 * counts["base"] < counts["zoom_only"] < counts["zoom"]
    assert rows["zoom"]["memory_bytes"] > 2 * rows["base"]["memory_bytes"]


# The rows.


def test_the_rows_of_a_config():
    assert list(cost.variants({})) == ["base"]
    gate = {"name": "squeeze_excite"}
    assert cost.variants({"stage1": gate}) == {"base": {}, "base + layer": {"stage1": gate}}
    found = cost.variants({"stem": ZOOM, "stage1": gate})
    assert list(found)[:2] == ["base", "zoom"] and set(found) == ALL
    for name, fields in cost.CONTROLS.items():
        assert found[name] == {"stem": {**ZOOM, **fields}, "stage1": gate}


@pytest.mark.parametrize("variant", ["mask_only", "zoom_only", "bilinear"])
def test_a_config_of_a_control_has_no_controls(variant):
    settings: Any = attention_zoom.get_config(f"variant={variant}")
    assert list(cost.variants(settings.model.insert.to_dict())) == ["base", "base + layer"]


@pytest.mark.parametrize(
    ("field", "missing"),
    [({"mask": "straight_through"}, "straight_through"), ({"zoom_conv": "bilinear"}, "bilinear")],
    ids=["straight_through", "bilinear"],
)
def test_a_row_that_another_one_equals_is_left_out(field, missing):
    assert set(cost.variants({"stem": {**ZOOM, **field}})) == ALL - {missing}


def test_a_control_that_does_not_fit_is_told_and_left_out(capsys):
    warp = {"name": "zoom_warp", "reads": "stem/gate"}
    settings = config()
    with settings.unlocked():
        settings.model.insert = {"stem": ZOOM, "stage1": warp}
    parts = create_parts(settings)
    assert set(parts) == {"base", "zoom", "mask_only", "straight_through"}
    out = capsys.readouterr().out
    assert len(re.findall(r"^left out: (?:zoom_only|bilinear): .*'stem/gate'", out, re.M)) == 2


def test_patterns_of_paths_do_not_stop_base():
    settings = config(**{"optimizer.weight_decay": 0.1})
    with settings.unlocked():
        settings.optimizer.weight_decay_mask = "backbone/.*"
        settings.optimizer.learning_rate_multipliers = (("inserted/.*", 0.1), (".*", 1.0))
    assert len(create_parts(settings)) == 6
    assert settings.optimizer.weight_decay_mask == "backbone/.*"  # the config is not changed


def test_what_is_wrong_with_the_config_itself_is_raised():
    with pytest.raises(ValueError, match="unknown option of resnet 'widht'; did you mean 'width'"):
        create_parts(config(**{"model.widht": 4}))


# Times.


def test_rows_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", (3, 3))
    calls = []

    def step(name):
        def run(state, batch):
            calls.append((name, state))
            time.sleep(0.2 if state == 0 else 0.01)
            return state + 1, batch

        return run

    names = ("base", "zoom")
    times = cost._time({name: step(name) for name in names}, dict.fromkeys(names, 0), None)
    assert calls == [(name, state) for state in range(4) for name in names]
    for name in names:
        assert len(times[name]) == 3 and all(0.01 <= seconds < 0.2 for seconds in times[name])


def test_the_compiled_steps_run(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", (2, 2))
    parts = {name: part for name, part in create_parts(config()).items() if name != "mask_only"}
    for row in cost.measure(parts, 8, with_time=True).values():
        assert row["rounds"] == 2 and 0 < row["step_s_fastest"] <= row["step_s"] < 10
    # They train: the state that is timed with gives a finite loss.
    mesh = sharding.create_mesh(cost.jax.devices()[:1])
    batch = cost.noise_batch(parts["zoom"], 8)
    state = cost.state_shapes(parts["zoom"], mesh)
    _, step = cost._compile(parts["zoom"], state, batch, mesh)
    _, metrics = step(cost._noise(state), sharding.to_global(batch, mesh))
    assert 0 < float(metrics["loss"]) < 100 and int(metrics["steps"]) == 1


# What is printed.

KEYS = ("parameters", "forward_flops", "training_flops", "memory_bytes", "step_s")
FAKE = {
    "base": dict(zip(KEYS, (1_234_567, 2e6, 6e6, 2**20, 0.010), strict=True)),
    "zoom": dict(zip(KEYS, (1_234_639, 7.6e6, 21.6e6, 4 * 2**20, 0.031), strict=True)),
}


def test_the_table_is_aligned():
    rows = {
        name: {key: row[key] for key in ("parameters", "training_flops")}
        for name, row in FAKE.items()
    }
    assert cost.table(rows).splitlines() == [
        "               parameters   training MFLOP",
        "base   1,234,567   1.00 x    6.00   1.00 x",
        "zoom   1,234,639   1.00 x   21.60   3.60 x",
    ]
    assert cost.table(FAKE).splitlines()[-1].endswith("31.00   3.10 x")


def test_the_last_line_says_what_the_layer_multiplies():
    assert cost.summary(FAKE, {"stem": ZOOM}) == (
        "attention_zoom at 'stem' (everything after it runs on 4 times as many pixels): "
        "3.6 x the FLOPs of a training step, 3.1 x the step time"
    )
    both = {"stem": {**ZOOM, "factor": 3}, "stage1": {"name": "eca"}}
    text = cost.summary(FAKE, both)
    assert "9 times as many pixels) and eca at 'stage1': 3.6 x" in text
    assert "pixels" not in cost.summary(FAKE, {"stem": {**ZOOM, "factor": 1}})
    assert "inserts no layer" in cost.summary({"base": FAKE["base"]}, {})


# Data sets that are not here.


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No data set, and whoever asks the network fails the test."""

    def connect(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    return {"data.dir": str(tmp_path)}


TFDS = {"cifar100": (32, 32, 100), "imagenet2012": (None, None, 1000), "mnist": (28, 28, 10)}


@pytest.mark.parametrize("name", TFDS)
def test_tfds_describes_what_is_not_prepared(offline, name):
    source = cost.find_source(config(**offline, **{"data.name": name}))
    h, w, c = source.image_shape
    assert (h, w, len(source.class_names)) == TFDS[name] and c == 3


def test_images_of_several_sizes_need_a_size(offline):
    settings = {**offline, "data.name": "imagenet2012"}
    with pytest.raises(ValueError, match=r"differ in size; set data\.resize"):
        source = cost.find_source(config(**settings))
        cost.create_parts(config(**settings), source, 8)
    cropped = config(**settings, **{"data.resize": "crop", "data.image_size": 24})
    parts = cost.create_parts(cropped, cost.find_source(cropped), 2)
    assert parts["base"].image_shape == (24, 24, 3)
    assert cost.noise_batch(parts["base"], 2)["image"].shape == (2, 24, 24, 3)


def test_a_crop_is_cut_from_the_larger_image():
    settings = config(**{"data.crop_size": 12})
    parts = create_parts(settings)["base"]
    assert parts.image_shape == (12, 12, 3)
    assert cost.noise_batch(parts, 3)["image"].shape == (3, 16, 16, 3)


def test_a_patch_costs_what_its_image_costs():
    """No folder of boxes is needed; patch_source=whole is the same box, without being given."""
    settings = config(**{"data.resize": "squash", "data.image_size": 16})
    model = {"name": "two_stream", "backbone": "resnet", "steps": 2, "hidden": 4, "add_on": 0}
    rows = []
    for patch_source, folder in (("boxes", "no/such/folder"), ("whole", "")):
        with settings.unlocked():
            settings.model = {**model, "patch_source": patch_source, "patch_size": 8, "insert": {}}
            settings.model.update({"stem": "small", "width": WIDTH, "stage_sizes": (1,)})
            settings.data.patches = folder
            settings.augment.crop_padding = 0
            settings.losses = {"object": {"name": "cross_entropy", "tap": "object_head"}}
        rows.append(cost.measure(create_parts(settings, 4), 4, with_time=False)["base"])
    given, whole = rows
    assert given["parameters"] == whole["parameters"]
    for key in ("forward_flops", "training_flops"):
        assert given[key] == pytest.approx(whole[key], rel=0.02)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("cifar1000", {}, "did you mean 'cifar100'.*give --image_size=H,W --num_classes=K"),
        ("coco", {}, "not prepared in .*give --image_size=H,W --num_classes=K"),
        ("cifar1000", {"num_classes": 5}, "expected both, such as --image_size=64,64"),
        ("cifar1000", {"image_size": (8,), "num_classes": 5}, "--image_size=8 .*expected both"),
    ],
)
def test_a_data_set_that_nobody_knows(offline, name, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        cost.find_source(config(**offline, **{"data.name": name}), **flags)
    assert "\n" not in str(error.value)


# The programme.


def run(*arguments):
    command = [sys.executable, "tools/cost.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


CONFIG = """
from configs import demo

def get_config():
    config = demo.get_config("tiny")
    config.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    config.model.insert = {"stage1": {"name": "squeeze_excite", "reduction": 2}}
    return config
"""


def test_it_measures_prints_and_writes(tmp_path):
    file, out = tmp_path / "config.py", tmp_path / "cost.json"
    file.write_text(CONFIG)
    process = run(f"--config={file}", "--batch_size=4", "--config.seed=3", f"--out={out}")
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert "resnet, 4 images of 32x32 per step, 16 classes (fine_shapes/tiny:train)" in lines
    assert "compiling base + layer (2/2) ..." in lines
    ratios = r"[\d.]+ x the FLOPs of a training step, [\d.]+ x the step time"
    assert re.fullmatch(f"squeeze_excite at 'stage1': {ratios}", lines[-2])
    assert lines[-1] == f"wrote {out}"
    report = json.loads(out.read_text())
    note = "by the 4 images of a step; the config's own batch is --batch_size=16"
    assert any(line.endswith(note) for line in lines)
    assert report["overrides"] == {"seed": 3} and report["num_classes"] == 16
    assert report["batch_size"] == 4 and report["image_shape"] == [32, 32, 3]
    added = report["rows"]["base + layer"]["parameters"] - report["rows"]["base"]["parameters"]
    assert added == (4 * 2 + 2) + (2 * 4 + 4)
    (row,) = (line.split() for line in lines if line.startswith("base + layer"))
    assert row[3] == f"{report['rows']['base + layer']['parameters']:,}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config_file", "count", "last"),
    [
        ("demo.py:tiny", 6, "attention_zoom at 'stage2' (everything after it runs on 4 times as"),
        ("attention_zoom.py:backbone=mobilenet,variant=mask_only,tiny", 2, "attention_zoom at"),
        ("cifar100_resnet18.py:tiny", 1, "the config inserts no layer"),
    ],
    ids=["demo", "attention_zoom", "cifar100_resnet18"],
)
def test_configs_at_tiny(config_file, count, last):
    process = run(f"--config=configs/{config_file}", "--no_time")
    assert (process.returncode, process.stderr) == (0, "")
    assert f"({count}/{count}) ..." in process.stdout and f"/{count + 1}) ..." not in process.stdout
    line = process.stdout.splitlines()[-1]
    assert line.startswith(last) and "step time" not in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config.model.widht=4"], 2, "unknown config key 'model.widht'; did you mean"),
        (["--config.model.name=resnet19"], 1, "unknown model 'resnet19'; did you mean"),
        (["--config.data.batch_size=4"], 1, "has no effect here; give --batch_size"),
        (["--batch_size=0"], 2, "--batch_size=0"),
        (["--image_size=a,b"], 1, "--image_size=a,b: expected H,W"),
        (["--out=no/such/folder/cost.json"], 1, "there is no folder no/such/folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(arguments, code, message):
    process = run("--config=configs/demo.py:tiny", *arguments)
    assert process.returncode == code
    assert process.stderr.startswith("error: ") and message in process.stderr
    assert process.stderr.count("\n") == 1

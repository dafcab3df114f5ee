import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation import create_evaluator, split
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.layers import CBAM
from attnzoom_jax.layers.tap import Tap
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.two_stream import two_stream
from attnzoom_jax.ops.patches import crop_boxes
from attnzoom_jax.training import sharding
from configs import default
from tests.ops.test_patches import slow_crop, slow_paste


class Net(nn.Module):
    """Grad-CAM at `relu` is known by hand: the head's column over h w, times the map."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (4, 4), strides=(4, 4), padding="VALID", name="conv")(x)
        x = Relu(name="relu")(x)
        return nn.Dense(16, name="head")(x.mean((1, 2)))


class Relu(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


def variables() -> Any:
    return Net().init(jax.random.key(3), jnp.zeros((1, 32, 32, 3)))


def data_config(batch_size=4) -> Any:
    data: Any = default.get_config().data
    data.update({"name": "fine_shapes/tiny", "eval_batch_size": batch_size})
    return data


def evaluate(
    split="test[:11]", *, batch_size=4, devices=1, model: Any = None, params: Any = None, **options
):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    evaluator = create_evaluator(
        "localize",
        model or Net(),
        data=data_config(batch_size),
        mesh=mesh,
        split=split,
        prefix="t",
        **options,
    )
    return evaluator.run(params or variables())


def slow_resize(values, size):
    """Bilinear with half-pixel centres and clamped edges, one pixel after the other."""
    resized = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            at = [(v + 0.5) * len(values) / size - 0.5 for v in (y, x)]
            at = [min(max(v, 0), len(values) - 1) for v in at]
            (y0, x0), (dy, dx) = (int(at[0]), int(at[1])), (at[0] % 1, at[1] % 1)
            y1, x1 = min(y0 + 1, len(values) - 1), min(x0 + 1, len(values) - 1)
            top = (1 - dx) * values[y0, x0] + dx * values[y0, x1]
            bottom = (1 - dx) * values[y1, x0] + dx * values[y1, x1]
            resized[y, x] = (1 - dy) * top + dy * bottom
    return resized


def slow_map(image, label):
    params = variables()["params"]
    pixels = (np.asarray(image, np.float64) / 255 - 0.5) / 0.25
    activations = np.zeros((8, 8, 6))
    for y in range(8):
        for x in range(8):
            window = pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            value = np.tensordot(window, params["conv"]["kernel"], 3) + params["conv"]["bias"]
            activations[y, x] = np.maximum(value, 0)
    weights = params["head"]["kernel"][:, label] / 64
    return slow_resize(np.maximum(activations @ weights, 0), 32)


def slow_metrics(count):
    fields = ("image", "label", "object_mask", "part_mask")
    source = open_source("fine_shapes/tiny", split="test", fields=fields)
    rows = []
    for i in range(count):
        example = source[i]
        heat = slow_map(example["image"], int(example["label"]))
        peak = np.unravel_index(heat.argmax(), heat.shape)
        row = {"empty_maps": heat.max() <= 0}
        for name in ("object", "part"):
            inside = np.asarray(example[f"{name}_mask"])[..., 0] > 0
            row[f"{name}_energy"] = heat[inside].sum() / heat.sum() if heat.sum() else 0
            row[f"{name}_share"] = inside.mean()
            row[f"{name}_pointing"] = inside[peak]
            row[f"{name}_center"] = inside[16, 16]
        rows.append(row)
    metrics = {f"t/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for name in ("object", "part"):
        metrics[f"t/{name}_energy_ratio"] = metrics[f"t/{name}_energy"] / metrics[f"t/{name}_share"]
    return metrics


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (16, 1), (8, 4)])
def test_equals_a_slow_version_whatever_the_batch(batch_size, devices):
    metrics = evaluate(batch_size=batch_size, devices=devices, tap="relu")
    expected = slow_metrics(11)
    assert metrics.keys() >= expected.keys()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_without_a_tap_the_last_spatial_one_is_taken():
    assert evaluate() == evaluate(tap="relu") != evaluate(tap="conv")


def test_unknown_taps_and_fields_are_named():
    with pytest.raises(ValueError, match="unknown tap 'rleu'; did you mean 'relu'"):
        evaluate(tap="rleu")
    with pytest.raises(ValueError, match="'object_msk'; did you mean 'object_mask'"):
        evaluate(masks=("object_msk",))


# ---- a stream that looks at a patch


BOX = (3.25, 5.0, 21.5, 30.0)


class Pair(nn.Module):
    """Two streams: what `Net` makes of the image, plus what it makes of a patch."""

    @nn.compact
    def __call__(self, x, train=False):
        boxes = Tap(name="boxes")(jnp.broadcast_to(jnp.float32(BOX), (len(x), 4)))
        patch = crop_boxes(x, boxes, (16, 16))
        seen = nn.Conv(6, (4, 4), strides=(4, 4), padding="VALID", name="object_conv")(patch)
        seen = Relu(name="object_trunk")(seen)
        return Net(name="net")(x) + nn.Dense(16, name="object_head")(seen.mean((1, 2)))


def slow_patch_metrics(params, count):
    """Grad-CAM of the sum of both logits, by hand, pasted into the box pixel by pixel."""
    fields = ("image", "label", "object_mask", "part_mask")
    source = open_source("fine_shapes/tiny", split="test", fields=fields)
    kernel, bias = params["object_conv"]["kernel"], params["object_conv"]["bias"]
    in_box = slow_paste(np.ones((1, 1)), BOX, (32, 32)) > 0
    rows = []
    for i in range(count):
        example = source[i]
        pixels = (np.asarray(example["image"], np.float64) / 255 - 0.5) / 0.25
        patch = slow_crop(pixels, BOX, (16, 16))
        windows = patch.reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4)
        activations = np.maximum(np.tensordot(windows, kernel, 3) + bias, 0)
        weights = params["object_head"]["kernel"][:, int(example["label"])] / 16
        small = np.maximum(activations @ weights, 0)
        heat = slow_paste(small, BOX, (32, 32))
        row = {"patch_empty_maps": small.max() <= 0, "patch_share": in_box.mean()}
        for name in ("object", "part"):
            inside = np.asarray(example[f"{name}_mask"])[..., 0] > 0
            peak = np.unravel_index(heat.argmax(), heat.shape)
            row[f"patch_{name}_energy"] = heat[inside].sum() / heat.sum() if heat.sum() else 0
            row[f"patch_{name}_pointing"] = inside[peak]
            row[f"patch_{name}_covered"] = (inside & in_box).sum() / inside.sum()
            row[f"{name}_share"] = inside.mean()
        rows.append(row)
    metrics = {f"t/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for name in ("object", "part"):
        share = metrics[f"t/{name}_share"]
        metrics[f"t/patch_{name}_energy_ratio"] = metrics[f"t/patch_{name}_energy"] / share
    return metrics


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (8, 4)])
def test_the_map_of_an_object_stream_is_scored_in_its_box(batch_size, devices):
    params = Pair().init(jax.random.key(2), jnp.zeros((1, 32, 32, 3)))["params"]
    params["net"] = variables()["params"]
    given: Any = {"model": Pair(), "params": {"params": params}}
    given |= {"batch_size": batch_size, "devices": devices}
    metrics = evaluate(**given, tap="net/relu")
    expected = slow_patch_metrics(params, 11)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert 0 < metrics["t/patch_part_covered"] < 1
    # The other stream is scored as if it were alone.
    alone = evaluate(tap="relu")
    assert {name: metrics[name] for name in alone} == pytest.approx(alone, rel=1e-4)
    assert metrics.keys() - alone.keys() == {name for name in expected if "/patch_" in name}
    # So is a tap in the patch that is asked for.
    asked = evaluate(**given, tap="object_trunk")
    for name in ("object_energy", "part_energy_ratio", "part_pointing", "empty_maps"):
        assert asked[f"t/{name}"] == asked[f"t/patch_{name}"] == metrics[f"t/patch_{name}"]


def small_two_stream(**fields):
    backbone = ResNet(16, stem="small", block="basic", stage_sizes=(1,), width=4)
    return two_stream(backbone, steps=2, hidden=4, patch_size=16, add_on=0, **fields)


def moved_variables(model):
    """No value at its start: all that is there does something."""
    found = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    leaves, tree = jax.tree.flatten(found["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return {**found, "params": jax.tree.unflatten(tree, moved)}


@pytest.mark.parametrize("shared", [False, True], ids=["two_trunks", "one_trunk"])
def test_masks_of_layers_in_the_patch_lie_in_the_box_too(shared):
    layers = {"global_trunk": CBAM(2), "object_trunk": CBAM(2)}
    model = Insert(small_two_stream(patch_source="cam", shared=shared), layers)
    params = moved_variables(model)
    metrics = evaluate("test[:3]", model=model, params=params)
    assert metrics["t/patch_empty_maps"] < 1 and 0.05 < metrics["t/patch_share"] < 1

    fields = ("image", "label", "part_mask")
    source = open_source("fine_shapes/tiny", split="test[:3]", fields=fields)
    images = to_input(jnp.stack([example["image"] for example in source]), data_config())
    labels = jnp.array([int(example["label"]) for example in source])
    fn = bind(model, params, train=False)
    gates = attribution.gate_taps(attribution.list_taps(fn, images))
    assert gates == [f"inserted/{name}/spatial/gate" for name in layers]
    _, taps = attribution.read_taps(fn, images, [*gates, "backbone/boxes"])
    maps = attribution.grad_cam(fn, images, labels, tap="backbone/object_trunk")
    whole, boxes = [(0, 0, 32, 32)] * 3, taps["backbone/boxes"]
    inside = [np.asarray(example["part_mask"])[..., 0] > 0 for example in source]
    for kind, values, places in (
        ("patch", np.maximum(maps, 0), boxes),
        ("gate_global_trunk.spatial", taps[gates[0]][..., 0], whole),
        ("gate_object_trunk.spatial", taps[gates[1]][..., 0], boxes),
    ):
        heats = [slow_paste(v, place, (32, 32)) for v, place in zip(values, places, strict=True)]
        energies = [h[part].sum() / (h.sum() or 1) for h, part in zip(heats, inside, strict=True)]
        assert metrics[f"t/{kind}_part_energy"] == pytest.approx(np.mean(energies), rel=1e-3)


def test_of_several_boxes_the_first_is_scored(monkeypatch):
    boxes = np.array([[0, 0, 32, 32], [4, 4, 12, 20], [20, 0, 28, 8]], np.float32)
    model = small_two_stream(patch_source="boxes", eval_patch="mean")
    params = moved_variables(model)

    def evaluate_with(boxes):
        def open_split(data, *, split, fields):
            source = open_source(data.name, split=split, fields=fields)
            examples = [{**example, "boxes": boxes} for example in source]
            return dataclasses.replace(source, examples=examples)

        monkeypatch.setattr(split, "open_split", open_split)
        return evaluate("test[:3]", model=model, params=params)

    first = evaluate_with(boxes[1:2])
    assert first == evaluate_with(boxes[[1, 0, 2]]) != evaluate_with(boxes)
    assert first["t/patch_share"] == 8 * 16 / 32**2
    assert evaluate_with(boxes)["t/patch_part_covered"] == 1

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.training import sharding
from configs import default


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


def evaluate(split="test[:11]", *, batch_size=4, devices=1, model: Any = None, **options):
    data: Any = default.get_config().data
    data.update({"name": "fine_shapes/tiny", "eval_batch_size": batch_size})
    mesh = sharding.create_mesh(jax.devices()[:devices])
    evaluator = create_evaluator(
        "localize", model or Net(), data=data, mesh=mesh, split=split, prefix="t", **options
    )
    return evaluator.run(variables())


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

"""The evaluator of attributes against one image after the other, in NumPy and float64."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.attributes import open_attributes
from attnzoom_jax.data.datasets.fine_shapes_renderer import ATTRIBUTES
from attnzoom_jax.evaluation import attributes, create_evaluator
from attnzoom_jax.layers import Gate
from attnzoom_jax.training import sharding
from configs import default

A = len(ATTRIBUTES)
FIELDS = ("image", "label", "attribute_bits", "object_mask")


class Masks(nn.Module):
    """Masks of the images, so that they are constant above the tap `relu`."""

    count: int
    channels: int

    @nn.compact
    def __call__(self, features, images):
        window = {"kernel_size": (4, 4), "strides": (4, 4), "padding": "VALID"}
        logits = nn.Conv(self.count * self.channels, name="conv", **window)(images)
        masks = nn.sigmoid(logits).reshape(*features.shape[:3], self.count, self.channels)
        return features[..., None, :] * Gate(name="gate")(masks)


class Net(nn.Module):
    """Grad-CAM at `relu` is known by hand: heads times the mean mask over h w, times the map."""

    count: int = A
    channels: int = 6

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(6, (4, 4), strides=(4, 4), padding="VALID", name="conv")(images)
        x = Relu(name="relu")(x)
        if self.count:
            x = Masks(self.count, self.channels, name="attention")(x, images).mean((1, 2))
        else:
            x = x.mean((1, 2))[:, None]
        heads = self.param("heads", nn.initializers.normal(1.0), (A, 6))
        bias = self.param("bias", nn.initializers.normal(0.3), (A,))
        return (x * heads).sum(-1) + bias


class Relu(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


def variables(model) -> Any:
    return model.init(jax.random.key(3), jnp.zeros((1, 32, 32, 3)))


def evaluator(model: Any = None, *, split="test[:11]", batch_size=4, devices=1, **options) -> Any:
    data: Any = default.get_config().data
    data.update({"name": "fine_shapes/tiny", "eval_batch_size": batch_size})
    data.labels = options.pop("labels", "attributes")
    data.crop_size = options.pop("crop_size", 0)
    mesh = sharding.create_mesh(jax.devices()[:devices])
    given = {"name": "attributes", "split": split, "prefix": "t", **options}
    return create_evaluator(model=model or Net(), data=data, mesh=mesh, **given)


def stretched(values, size):
    """Bilinear with half-pixel centres and clamped edges, along both axes."""
    for _ in range(2):
        side = len(values)
        at = (np.arange(size) + 0.5) * side / size - 0.5
        values = np.array([np.interp(at, np.arange(side), column) for column in values.T])
    return values


def slow_pass(model, image):
    """Logits [a], features [h, w, c] and masks [h, w, a, c] of one image."""
    params = jax.tree.map(np.float64, variables(model)["params"])
    pixels = (np.asarray(image, np.float64) / 255 - 0.5) / 0.25
    side = len(pixels) // 4
    windows = pixels.reshape(side, 4, side, 4, 3).swapaxes(1, 2)  # [side, side, 4, 4, 3]
    of = lambda conv: np.tensordot(windows, conv["kernel"], 3) + conv["bias"]  # noqa: E731
    features = np.maximum(of(params["conv"]), 0)
    masks = np.ones((side, side, 1, 1))
    if model.count:
        masks = 1 / (1 + np.exp(-of(params["attention"]["conv"])))
        masks = masks.reshape(side, side, model.count, model.channels)
    pooled = (features[:, :, None] * masks).mean((0, 1))
    return (pooled * params["heads"]).sum(-1) + params["bias"], features, masks, params["heads"]


def slow_energies(model, count, crop=32):
    """{kind: {attribute: (mean energy, mean share)}} over images that have its pixels."""
    source = open_attributes("fine_shapes/tiny", split="test", fields=FIELDS)
    rows: dict[str, list[list[tuple[float, float]]]]
    rows = {kind: [[] for _ in ATTRIBUTES] for kind in ("map_energy", "mask_energy")}
    inner = slice((32 - crop) // 2, (32 + crop) // 2)
    for i in range(count):
        example = {name: value[inner, inner] for name, value in source[i].items() if value.ndim > 1}
        _, features, masks, heads = slow_pass(model, example["image"])
        full = np.broadcast_to(masks, (crop // 4, crop // 4, A, 6))
        for k in range(A):
            inside = (example["attribute_bits"][..., 0] >> k) % 2 == 1
            inside &= example["object_mask"][..., 0] > 0
            if not inside.any():
                continue
            cam = features @ (heads[k] * full[:, :, k].mean((0, 1)))
            for kind, heat in (("map_energy", cam), ("mask_energy", full[:, :, k].mean(-1))):
                heat = stretched(np.maximum(heat, 0), crop)
                energy = heat[inside].sum() / heat.sum() if heat.sum() else 0.0
                rows[kind][k].append((energy, inside.mean()))
    return {
        kind: {name: np.mean(r, axis=0) for name, r in zip(ATTRIBUTES, of, strict=True) if r}
        for kind, of in rows.items()
    }


def slow_spread(model, count, axis):
    source = open_attributes("fine_shapes/tiny", split="test", fields=FIELDS)
    spreads = []
    for i in range(count):
        masks = np.moveaxis(slow_pass(model, source[i]["image"])[2], axis, 0)
        pairs = [np.abs(a - b) for a, b in itertools.combinations(masks, 2)]
        spreads.append(np.mean(pairs) if pairs else 0.0)
    return float(np.mean(spreads))


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (16, 1), (8, 4)])
def test_what_is_told_equals_a_loop_whatever_the_batch(batch_size, devices):
    metrics = evaluator(split="test[:30]", batch_size=batch_size, devices=devices).run(
        variables(Net())
    )
    source = open_attributes("fine_shapes/tiny", split="test")
    logits = np.array([slow_pass(Net(), source[i]["image"])[0] for i in range(30)])
    labels = np.array([source[i]["label"] for i in range(30)]) > 0.5
    balanced, precisions = [], []
    for k, name in enumerate(ATTRIBUTES):
        right, there = (logits[:, k] > 0) == labels[:, k], labels[:, k]
        assert metrics[f"t/accuracy_{name}"] == pytest.approx(right.mean())
        balanced.append((right[there].mean() + right[~there].mean()) / 2)
        assert metrics[f"t/balanced_accuracy_{name}"] == pytest.approx(balanced[-1])
        # All scores differ: the mean precision at the ranks of those that are there.
        ranks = np.sort((-logits[:, k]).argsort().argsort()[there])
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1)))
        assert metrics[f"t/average_precision_{name}"] == pytest.approx(precisions[-1])
    assert metrics["t/accuracy"] == pytest.approx(((logits > 0) == labels).mean())
    assert metrics["t/balanced_accuracy"] == pytest.approx(np.mean(balanced))
    assert metrics["t/average_precision"] == pytest.approx(np.mean(precisions))
    assert (metrics["t/count"], metrics["t/attributes_scored"]) == (30, A)
    assert len(metrics) == 5 + 3 * A


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (8, 4)])
@pytest.mark.parametrize(
    "model", [Net(), Net(channels=1), Net(count=1, channels=1)], ids=["own", "attribute", "one"]
)
def test_masks_and_maps_equal_a_slow_version(model, batch_size, devices):
    made = evaluator(model, batch_size=batch_size, devices=devices, masks=True, tap="relu")
    metrics = made.run(variables(model))
    for kind, expected in slow_energies(model, 11).items():
        assert expected  # some attribute has pixels
        for name, (energy, share) in expected.items():
            assert metrics[f"t/{kind}_{name}"] == pytest.approx(energy, rel=1e-4)
            assert metrics[f"t/{kind}_ratio_{name}"] == pytest.approx(energy / share, rel=1e-4)
        for name in set(ATTRIBUTES) - expected.keys():
            assert f"t/{kind}_{name}" not in metrics and f"t/{kind}_ratio_{name}" not in metrics
        each = np.array(list(expected.values()))
        assert metrics[f"t/{kind}"] == pytest.approx(each[:, 0].mean(), rel=1e-4)
        assert metrics[f"t/{kind}_ratio"] == pytest.approx(
            (each[:, 0] / each[:, 1]).mean(), rel=1e-4
        )
    spreads = {name: slow_spread(model, 11, i) for i, name in ((2, "attributes"), (3, "channels"))}
    for name, value in spreads.items():
        assert metrics[f"t/mask_spread_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-9)
    assert (spreads["attributes"] > 0) == (model.count > 1)
    assert (spreads["channels"] > 0) == (model.channels > 1)
    assert set(made.metric_names) <= metrics.keys()


def test_an_image_without_deciding_pixels_does_not_count():
    """A small crop cuts the mark off in some images, and so the pixels of its attributes."""
    inner, mark = slice(12, 20), ATTRIBUTES.index("pale_mark")
    source = open_attributes("fine_shapes/tiny", split="test[:11]", fields=FIELDS)
    has_mark = [(e["attribute_bits"][inner, inner] >> mark & 1).any() for e in source]
    assert 0 < sum(has_mark) < 11
    metrics = evaluator(masks=True, tap="relu", crop_size=8).run(variables(Net()))
    for kind, expected in slow_energies(Net(), 11, crop=8).items():
        for name, (energy, share) in expected.items():
            assert metrics[f"t/{kind}_{name}"] == pytest.approx(energy, rel=1e-4)
            assert metrics[f"t/{kind}_ratio_{name}"] == pytest.approx(energy / share, rel=1e-4)


def test_a_model_without_masks_has_maps_alone():
    metrics = evaluator(Net(count=0), masks=True, tap="relu").run(variables(Net(count=0)))
    assert not [name for name in metrics if "mask" in name]
    expected = slow_energies(Net(count=0), 11)["map_energy"]
    for name, (energy, _) in expected.items():
        assert metrics[f"t/map_energy_{name}"] == pytest.approx(energy, rel=1e-4)


def test_without_a_tap_the_last_spatial_one_is_taken():
    model = Net(count=0)
    by_default, named, other = (
        evaluator(model, masks=True, tap=tap).run(variables(model)) for tap in ("", "relu", "conv")
    )
    assert by_default == named != other


def test_what_does_not_fit_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"attributes needs data.labels=attributes, and it is lab"):
        evaluator(labels="label")
    for name in ("classify", "localize"):
        with pytest.raises(ValueError, match=f"evaluator {name} needs data.labels=label"):
            evaluator(name=name)
    with pytest.raises(ValueError, match="tap='relu' is where maps are taken; set masks=True"):
        evaluator(tap="relu")
    with pytest.raises(ValueError, match="unknown tap 'rleu'; did you mean 'relu'"):
        evaluator(tap="rleu", masks=True).run(variables(Net()))
    monkeypatch.setattr(attributes, "MOST_BITS", 8)
    with pytest.raises(ValueError, match="has 13 attributes, and attribute_bits has 8 bits"):
        evaluator(masks=True)

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.corruptions import CORRUPTIONS
from attnzoom_jax.data.pipeline import Resize
from attnzoom_jax.data.source import open_source
from attnzoom_jax.data.split import open_split
from attnzoom_jax.evaluation import create_evaluator, robustness
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.training import sharding
from configs import default

ATTRIBUTES = 13
SMALL = {"corruptions": ("gaussian_noise", "jpeg"), "levels": (1, 5), "linf": (4 / 255, 16 / 255)}
SMALL |= {"l2": (0.4,), "steps": 4, "queries": 10}


class Linear(nn.Module):
    """Keeps each example by itself, so that a batch's size cannot matter."""

    outputs: int = 16
    is_hard: bool = False  # a step and a huge factor: no gradient anywhere

    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(self.outputs, name="head")(x[:, ::4, ::4].reshape(len(x), -1))
        return 1e4 * jnp.round(40 * logits) if self.is_hard else logits


def config_data(labels="label", batch_size=16, **changes) -> Any:
    data: Any = default.get_config().data
    data.update({"name": "fine_shapes/tiny", "eval_batch_size": batch_size, "labels": labels})
    data.update(changes)
    return data


def fitted(labels="label", split="test", **changes) -> Any:
    """A head that fits the split, as well as a ridge lets it."""
    data = config_data(labels, **changes)
    source = open_split(data, split=split)
    images = to_input(jnp.stack([example["image"] for example in source]), data)
    targets = np.array([example["label"] for example in source])
    targets = 2 * targets - 1 if labels == "attributes" else np.eye(16)[targets]
    values = np.asarray(images[:, ::4, ::4], np.float64).reshape(len(images), -1)
    ridge = values.T @ values + 3000 * np.eye(values.shape[1])
    kernel = np.linalg.solve(ridge, values.T @ targets)
    bias = jnp.zeros(kernel.shape[1])
    return {"params": {"head": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": bias}}}


def evaluate(variables, *, labels="label", batch_size=16, devices=1, model: Any = None, **options):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    model = model or Linear(ATTRIBUTES if labels == "attributes" else 16)
    evaluator = create_evaluator(
        "robustness",
        model,
        data=config_data(labels, batch_size),
        mesh=mesh,
        **{"split": "test[:21]", "prefix": "t", **SMALL, **options},
    )
    metrics = evaluator.run(variables)
    assert list(metrics) == evaluator.metric_names
    return metrics


def slow_logits(variables, image):
    pixels = (np.asarray(image, np.float64) / 255 - 0.5) / 0.25
    return pixels[::4, ::4].reshape(-1) @ np.asarray(
        variables["params"]["head"]["kernel"], np.float64
    )


def slow_corrupted(name, level, number, image, seed):
    numbers = np.random.default_rng([seed, zlib.crc32(name.encode()), level, number])
    return CORRUPTIONS[name](image, level, numbers)


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (16, 1), (8, 4)])
def test_corrupted_images_equal_a_slow_loop_whatever_the_batch(batch_size, devices):
    variables = fitted()
    metrics = evaluate(variables, batch_size=batch_size, devices=devices, attacks=(), seed=5)
    source = open_source("fine_shapes/tiny", split="test[:21]")
    expected = {"t/count": 21.0}
    right = [slow_logits(variables, e["image"]).argmax() == e["label"] for e in source]
    expected["t/clean_accuracy"] = float(np.mean(right))
    for name in ("gaussian_noise", "jpeg"):
        for level in (1, 5):
            images = [slow_corrupted(name, level, i, e["image"], 5) for i, e in enumerate(source)]
            found = [slow_logits(variables, image).argmax() for image in images]
            right = [c == e["label"] for c, e in zip(found, source, strict=True)]
            expected[f"t/{name}_{level}_accuracy"] = float(np.mean(right))
        both = [expected[f"t/{name}_{level}_accuracy"] for level in (1, 5)]
        expected[f"t/{name}_accuracy"] = float(np.mean(both))
    both = [expected[f"t/{name}_accuracy"] for name in ("gaussian_noise", "jpeg")]
    expected["t/corruption_accuracy"] = float(np.mean(both))
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert len(set(expected.values())) > 4


def test_attributes_have_two_accuracies():
    variables = fitted("attributes")
    metrics = evaluate(variables, labels="attributes")
    source = open_split(config_data("attributes"), split="test[:21]")
    images = [slow_corrupted("jpeg", 5, i, e["image"], 0) for i, e in enumerate(source)]
    predicted = np.array([slow_logits(variables, image) for image in images]) > 0
    labels = np.array([example["label"] for example in source]) > 0.5
    assert metrics["t/jpeg_5_accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-6)
    balanced = [
        (p[is_there].mean() + (~p[~is_there]).mean()) / 2
        for p, is_there in zip(predicted.T, labels.T, strict=True)
        if is_there.any() and not is_there.all()
    ]
    assert metrics["t/jpeg_5_balanced_accuracy"] == pytest.approx(np.mean(balanced), abs=1e-6)
    assert metrics["t/attack_clean_accuracy"] == pytest.approx(metrics["t/clean_accuracy"])
    of_pgd = [metrics[f"t/pgd_linf_{e}_255_accuracy"] for e in (4, 16)]
    assert metrics["t/attack_clean_accuracy"] >= of_pgd[0] > of_pgd[1] + 0.02


@pytest.mark.parametrize("labels", ["label", "attributes"])
def test_attacks_do_not_depend_on_batch_or_devices(labels):
    variables = fitted(labels)
    options: Any = {"labels": labels, "corruptions": ()}
    metrics = evaluate(variables, **options)
    assert evaluate(variables, **options) == metrics
    for batch_size, devices in ((5, 1), (8, 4)):
        other = evaluate(variables, batch_size=batch_size, devices=devices, **options)
        assert other == pytest.approx(metrics, abs=1e-6)
    for setting in ("linf_4_255", "linf_16_255", "l2_0.4"):
        left = [metrics[f"t/{a}_{setting}_accuracy"] for a in ("pgd", "random_search")]
        slack = 0.02 if labels == "attributes" else 0  # PGD climbs a loss, and counts decisions
        assert left[0] <= left[1] + slack and left[1] <= metrics["t/attack_clean_accuracy"]
    assert metrics["t/pgd_linf_16_255_accuracy"] < metrics["t/attack_clean_accuracy"]
    of_pgd = [metrics[f"t/pgd_{s}_accuracy"] for s in ("linf_4_255", "linf_16_255", "l2_0.4")]
    assert metrics["t/attack_accuracy"] == pytest.approx(np.mean(of_pgd))
    assert metrics["t/gradient_masking"] <= slack
    assert evaluate(variables, seed=1, **options).keys() == metrics.keys()


def test_fgsm_equals_a_slow_version():
    variables = fitted()
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    right = []
    for example in open_source("fine_shapes/tiny", split="test[:21]"):
        logits = slow_logits(variables, example["image"])
        probabilities = np.exp(logits) / np.exp(logits).sum()
        gradient = kernel @ (probabilities - np.eye(16)[example["label"]])
        attacked = example["image"] / 255
        attacked[::4, ::4] += np.sign(gradient).reshape(8, 8, 3) * 16 / 255
        right.append(slow_logits(variables, 255 * attacked.clip(0, 1)).argmax() == example["label"])
    metrics = evaluate(variables, corruptions=(), attacks=("fgsm",))
    assert metrics["t/fgsm_linf_16_255_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    assert 0 < np.mean(right) < metrics["t/attack_clean_accuracy"]
    assert "t/attack_accuracy" not in metrics and "t/gradient_masking" not in metrics


def test_a_hidden_gradient_is_told(capsys):
    variables = fitted()
    hard = Linear(is_hard=True)
    options: Any = {"corruptions": (), "attacks": ("pgd", "random_search"), "linf": (32 / 255,)}
    metrics = evaluate(variables, model=hard, **options | {"l2": (), "queries": 500})
    gap = metrics["t/pgd_linf_32_255_accuracy"] - metrics["t/random_search_linf_32_255_accuracy"]
    assert metrics["t/gradient_masking"] == pytest.approx(gap) and gap > 0.1
    said = capsys.readouterr().out
    assert said.count("warning: gradient masking? random_search leaves an accuracy of") == 1
    evaluate(variables, **options)
    assert "warning" not in capsys.readouterr().out


def run_of(variables, model=None, **changes):
    """Another run's model, as its folder would give it."""
    config: Any = default.get_config()
    config.data = config_data(**changes)
    names = open_split(config.data, split="test").class_names
    return TrainedModel(config, model or Linear(), variables, 3, names, (32, 32, 3))


def test_attacks_of_another_model_are_tried(monkeypatch):
    variables, asked = fitted(), []
    # The same function with another normalisation: its attack is the model's own.
    same = fitted(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    kernel = variables["params"]["head"]["kernel"] * 4
    bias = -0.5 * kernel.sum(axis=0)
    same = {"params": {"head": {"kernel": kernel, "bias": bias}}}
    other = run_of(same, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def restore(workdir, mesh):
        asked.append(workdir)
        return other

    monkeypatch.setattr(robustness, "restore_model", restore)
    options: Any = {"corruptions": (), "attacks": ("pgd",), "transfer_from": "runs/other"}
    metrics = evaluate(variables, **options)
    assert asked == ["runs/other"]
    for setting in ("linf_4_255", "linf_16_255", "l2_0.4"):
        own = metrics[f"t/pgd_{setting}_accuracy"]
        assert metrics[f"t/transfer_{setting}_accuracy"] == pytest.approx(own, abs=0.05)
    assert metrics["t/pgd_linf_16_255_accuracy"] < metrics["t/attack_clean_accuracy"]
    assert abs(metrics["t/gradient_masking"]) < 0.05
    # On the hard model its own PGD finds nothing, and the smooth model's examples do.
    hard = evaluate(variables, model=Linear(is_hard=True), **options)
    assert hard["t/gradient_masking"] > 0.1


def test_a_run_of_other_classes_or_sizes_is_told(monkeypatch):
    other = run_of(fitted("attributes"), Linear(ATTRIBUTES), labels="attributes")
    monkeypatch.setattr(robustness, "restore_model", lambda workdir, mesh: other)
    with pytest.raises(ValueError, match="transfer_from=x is a model of 13 classes and images of"):
        evaluate(fitted(), transfer_from="x")


def test_a_part_of_the_images_is_spread_over_the_split():
    variables = fitted()
    options: Any = {"count": 5, "attack_count": 7, "attacks": ("pgd",)}
    metrics = evaluate(variables, **options)
    assert metrics["t/count"] == 5 and metrics["t/attack_count"] == 7
    source = open_source("fine_shapes/tiny", split="test[:21]")
    for score, rows in (("clean", (0, 4, 8, 12, 16)), ("attack_clean", range(0, 21, 3))):
        right = [slow_logits(variables, source[i]["image"]).argmax() for i in rows]
        right = [c == source[i]["label"] for c, i in zip(right, rows, strict=True)]
        assert metrics[f"t/{score}_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    # An image is corrupted alike, however many there are.
    images = [
        slow_corrupted("gaussian_noise", 5, i, source[i]["image"], 0) for i in (0, 4, 8, 12, 16)
    ]
    right = [slow_logits(variables, image).argmax() for image in images]
    right = [c == source[i]["label"] for c, i in zip(right, (0, 4, 8, 12, 16), strict=True)]
    assert metrics["t/gaussian_noise_5_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)


def test_images_are_resized_before_they_are_corrupted():
    data = config_data()
    data.update({"resize": "squash", "image_size": 48, "crop_size": 32})
    mesh = sharding.create_mesh(jax.devices()[:1])
    request: Any = {**SMALL, "corruptions": ("occlusion",), "levels": (5,), "attack_count": 4}
    evaluator = create_evaluator(
        "robustness", Linear(), data=data, mesh=mesh, split="test[:21]", **request
    )
    metrics = evaluator.run(fitted())
    source = open_source("fine_shapes/tiny", split="test[:21]")
    right = []
    for i, example in enumerate(source):
        image = Resize("squash", 48)(example["image"])[8:40, 8:40]
        corrupted = slow_corrupted("occlusion", 5, i, image, 0)
        right.append(slow_logits(fitted(), corrupted).argmax() == example["label"])
    assert metrics["test[:21]/occlusion_5_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)


def test_distances_have_names():
    names = [robustness.setting_name("linf", epsilon) for epsilon in (8 / 255, 0.0078431, 0.01)]
    assert names == ["linf_8_255", "linf_2_255", "linf_0.01"]
    assert robustness.setting_name("l2", 0.2) == "l2_0.2"


def test_a_config_of_before_attributes_has_classes():
    """Its data section has no key `labels`."""
    data = config_data()
    del data["labels"]
    options = {"corruptions": ("contrast",), "levels": (3,), "attacks": ()}
    mesh = sharding.create_mesh(jax.devices()[:1])
    evaluator = create_evaluator(
        "robustness", Linear(), data=data, split="test", mesh=mesh, **options
    )
    assert "test/contrast_3_accuracy" in evaluator.metric_names
    assert "test/clean_accuracy" in evaluator.run(fitted())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": ("jpg",)}, "unknown corruption 'jpg'; did you mean 'jpeg'"),
        ({"levels": (0,)}, "level 0 of a corruption; expected 1, 2, 3, 4 or 5"),
        ({"attacks": ("pdg",)}, "unknown attack 'pdg'; did you mean 'pgd'"),
        ({"linf": (0,)}, "epsilon of an attack is 0; expected a distance above 0"),
        ({"linf": (8,)}, "epsilon of an attack is 8; .* such as 8/255"),
        ({"linf": ("a",)}, "epsilon of an attack is 'a'; expected a distance above 0"),
        ({"linf": 8 / 255}, "linf is 0.03.*; expected a tuple"),
        ({"corruptions": "jpeg"}, "corruptions is 'jpeg'; expected a tuple"),
        ({"steps": 0}, "steps of an attack is 0"),
        ({"queries": 0}, "queries of an attack is 0"),
        ({"seed": -1}, "seed -1 must be 0 or more"),
        ({"count": 22}, "count is 22; expected 0, for all, up to the 21 of fine_shapes/tiny"),
        ({"attack_count": -1}, "attack_count is -1"),
        ({"levels": ()}, "corruptions need levels"),
        ({"linf": (), "l2": ()}, "attacks distances"),
        ({"level": (1,)}, "unknown option of robustness 'level'; did you mean 'levels'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate({}, **options)

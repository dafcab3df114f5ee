"""Training on attributes: terms of the loss, the share of right answers, and what is refused."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnzoom_jax.layers import Gate
from attnzoom_jax.training import sharding, step
from attnzoom_jax.training.experiment import create_experiment
from attnzoom_jax.training.objective import create_terms, total_loss
from attnzoom_jax.training.state import create_state
from configs import demo

BCE = {"name": "binary_cross_entropy"}
MESH = sharding.create_mesh(jax.devices()[:1])


class Masked(nn.Module):
    """Four logits, each of features under a mask of its own: the tap `gate`, [n, h, w, 4, c]."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5, name="features")(x)
        logits = nn.Dense(20, name="attention")(x).reshape(*x.shape[:3], 4, 5)
        masked = x[..., None, :] * Gate(name="gate")(nn.sigmoid(logits) - 0.5)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(masked.mean((1, 2, 4)))
        return nn.Dense(4, name="head")(x)


def batch(n=6, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8),
        "label": rng.integers(0, 2, (n, 4)).astype(np.float32),
    }


def recipe(losses, **changes):
    return step.Recipe(
        seed=5, mean=(0.5,) * 3, std=(0.25,) * 3, losses=create_terms(losses), **changes
    )


def start(optimizer, mesh=MESH):
    return create_state(Masked(), optimizer, image_shape=(4, 4, 3), seed=1, mesh=mesh)


def loss_of(losses, targets, label_smoothing=0.0) -> Any:
    variables = jax.tree.map(jnp.asarray, start(optax.sgd(0.1)).variables())
    images = jnp.asarray(np.random.default_rng(2).normal(size=(len(targets), 4, 4, 3)), "f4")
    return total_loss(
        create_terms(losses),
        Masked(),
        variables,
        images,
        jnp.asarray(targets, jnp.float32),
        label_smoothing=label_smoothing,
        key=jax.random.key(0),
    )


def slow_bce(logits, targets, weight):
    p = 1 / (1 + np.exp(-np.float64(logits)))
    return -(weight * targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean()


def test_each_term_is_its_formula():
    targets = batch()["label"]
    losses = {
        "all": {**BCE, "positive_weight": (1.0, 2.0, 0.5, 4.0)},
        "head": {**BCE, "tap": "head", "weight": 0.5},
        "sparse": {"name": "sparsity", "mask": "gate", "weight": 0.1},
    }
    loss, (means, logits, _) = loss_of(losses, targets)
    weight = np.array([1.0, 2.0, 0.5, 4.0])
    assert float(means["all"]) == pytest.approx(slow_bce(logits, targets, weight), rel=1e-5)
    assert float(means["head"]) == pytest.approx(slow_bce(logits, targets, 1), rel=1e-5)
    total = means["all"] + 0.5 * means["head"] + 0.1 * means["sparse"]
    assert float(loss) == pytest.approx(float(total), rel=1e-6)


def test_sparsity_is_the_mean_absolute_value_of_taps_of_any_rank():
    targets = batch()["label"]
    for tap in ("gate", "head", "features"):
        variables = start(optax.sgd(0.1)).variables()
        images = np.random.default_rng(2).normal(size=(6, 4, 4, 3)).astype(np.float32)
        _, (means, _, _) = loss_of({"a": {"name": "sparsity", "mask": tap}}, targets)
        params = jax.tree.map(np.float64, variables["params"])
        x = images @ params["features"]["kernel"] + params["features"]["bias"]
        if tap == "features":
            expected = np.abs(x).mean()
        elif tap == "gate":
            logits = x @ params["attention"]["kernel"] + params["attention"]["bias"]
            assert (logits < 0).any() and (logits > 0).any()
            expected = np.abs(1 / (1 + np.exp(-logits)) - 0.5).mean()
        else:
            expected = np.abs(loss_of({"a": BCE}, targets)[1][1]).mean()
        assert float(means["a"]) == pytest.approx(expected, rel=1e-5)


def test_class_ids_are_vectors_with_a_single_one():
    """Class ids train by this loss too: one sigmoid per class."""
    made = step.make_train_step(Masked(), optax.sgd(0.1), recipe({"a": BCE}), num_classes=4)
    examples = batch()
    ids = np.arange(6, dtype=np.int32) % 4
    _, by_id = jax.jit(made)(start(optax.sgd(0.1)), {**examples, "label": ids})
    _, by_vector = jax.jit(made)(start(optax.sgd(0.1)), {**examples, "label": np.eye(4)[ids]})
    assert float(by_id["loss"]) == pytest.approx(float(by_vector["loss"]), rel=1e-6)
    assert "top1" in by_id and "accuracy" not in by_id
    assert "accuracy" in by_vector and "top1" not in by_vector


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_the_share_of_right_answers(options):
    made = step.make_train_step(
        Masked(), optax.sgd(0.0), recipe({"a": BCE}, **options), num_classes=4
    )
    state, examples = start(optax.sgd(0.0)), batch(16)
    _, metrics = jax.jit(made)(state, examples)
    if not options:
        x = (examples["image"] / 255 - 0.5) / 0.25
        logits, _ = Masked().apply(
            state.variables(), jnp.asarray(x, "f4"), train=True, mutable=["batch_stats"]
        )
        right = (np.asarray(logits) > 0) == (examples["label"] > 0.5)
        assert float(metrics["accuracy"]) == pytest.approx(right.mean(), abs=1e-6)
        assert float(metrics["loss"]) == pytest.approx(
            slow_bce(logits, examples["label"], 1), rel=1e-4
        )
    assert 0 < float(metrics["accuracy"]) < 1 and np.isfinite(metrics["loss"])


@pytest.mark.parametrize("devices", [1, 4])
def test_steps_on_the_device_equal_steps_from_the_host(devices):
    optimizer = optax.sgd(0.1, momentum=0.9)
    mesh = sharding.create_mesh(jax.devices()[:devices])
    losses = {"a": BCE, "b": {"name": "sparsity", "mask": "gate"}}
    made = step.make_train_step(
        Masked(),
        optimizer,
        recipe(losses, flip=True, mixup=0.3, label_smoothing=0.1),
        num_classes=4,
    )
    split = batch(20)
    indices = np.random.default_rng(1).integers(0, 20, (3, 8)).astype(np.int32)
    one = step.jit_train_step(made, mesh)
    host, host_sums = start(optimizer, mesh), step.zero_metrics(losses, score="accuracy")
    for row in indices:
        examples = {name: column[row] for name, column in split.items()}
        host, metrics = one(host, sharding.to_global(examples, mesh))
        host_sums = step.add_metrics(host_sums, metrics)
    several = step.jit_steps_on_device(made, mesh, losses=losses)
    split = jax.device_put(split, sharding.replicated(mesh))
    device, device_sums = several(start(optimizer, mesh), split, indices, np.int32(3))
    assert device_sums.keys() == host_sums.keys() >= {"accuracy", "loss/a", "loss/b"}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, device_sums, host_sums)
    jax.tree.map(close, device, host)


# What is refused.


@pytest.mark.parametrize("given", [0.0, -1.0, np.inf, True, "2", (), (1.0, 0.0), (1.0, "2")])
def test_a_bad_weight_is_one_line(given):
    with pytest.raises(ValueError, match=r"losses.a: positive_weight is .*expected a number above"):
        create_terms({"a": {**BCE, "positive_weight": given}})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            {"a": {**BCE, "positive_weight": (1.0, 2.0)}},
            "positive_weight holds 2 numbers and there are 4 attributes",
        ),
        (
            {"a": {**BCE, "tap": "features"}},
            r"binary_cross_entropy: tap 'features' has the shape \[6, 4, 4, 5\]; expected logits",
        ),
        ({"a": {"name": "sparsity"}}, "losses.a lacks mask; it is the path of a tap"),
        ({"a": {"name": "sparsity", "mask": "gat"}}, "unknown tap 'gat'; did you mean 'gate'"),
    ],
)
def test_what_does_not_fit_is_one_line(losses, message):
    with pytest.raises(ValueError, match=message):
        loss_of(losses, batch()["label"])


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    base.data.labels = "attributes"
    base.update_from_flattened_dict(changes)
    return base


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            {"cross_entropy": {"name": "cross_entropy"}},
            "losses.cross_entropy is a softmax .* set its name to binary_cross_entropy",
        ),
        ({"a": {**BCE, "positive_weight": (1.0,)}}, "holds 1 numbers and there are 13 attributes"),
    ],
)
def test_a_loss_that_does_not_fit_the_attributes_is_found_before_the_run(losses, message):
    with pytest.raises(ValueError, match=message):
        create_experiment(config(losses=losses))


def test_an_experiment_has_a_logit_for_each_attribute():
    parts = create_experiment(config(losses={"a": BCE}))
    assert len(parts.source.class_names) == 13 == parts.model.num_classes
    label = parts.source[0]["label"]
    assert label.dtype == np.float32 and label.shape == (13,)

"""The terms of the loss against NumPy in float64, what they cost, and what they refuse."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import train
from attnzoom_jax.attribution import excitation_backprop, grad_cam, read_taps
from attnzoom_jax.attribution.program import Known
from attnzoom_jax.layers import AttentionZoom, CamGuidedAttention, Gate
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.training import sharding, step
from attnzoom_jax.training.experiment import create_experiment
from attnzoom_jax.training.forward import Forward
from attnzoom_jax.training.objective import create_terms, total_loss
from attnzoom_jax.training.state import create_state, init_variables
from attnzoom_jax.training.writer import read_metrics
from configs import demo

CE = {"name": "cross_entropy"}
MESH = sharding.create_mesh(jax.devices()[:1])


def batch(n=6, size=4, classes=3, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8),
        "label": (np.arange(n) % classes).astype(np.int32),
    }


def recipe(losses, **changes):
    return step.Recipe(
        seed=5, mean=(0.5,) * 3, std=(0.25,) * 3, losses=create_terms(losses), **changes
    )


def create(model, losses, *, size=4, optimizer: Any = None, **changes):
    """A jitted step and the state before it."""
    optimizer = optimizer or optax.sgd(0.1)
    made = step.make_train_step(model, optimizer, recipe(losses, **changes), num_classes=3)
    state = create_state(model, optimizer, image_shape=(size, size, 3), seed=1, mesh=MESH)
    return jax.jit(made), state


class TwoHeads(nn.Module):
    """Logits of two heads, of which the sum is the output; with a norm and dropout."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x.mean((1, 2)))
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(nn.Dense(8, name="hidden")(x)))
        return nn.Dense(3, name="global_head")(x) + nn.Dense(3, name="object_head")(x)


class Guided(nn.Module):
    """Trunk, attention, mean, norm over the batch, head."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(4, name="trunk")(x))
        x = CamGuidedAttention(reduction=2, name="attention")(x).mean((1, 2))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(x)


# Cross-entropy, at the output and at taps.


def losses_and_gradient(model, losses, variables, images, targets):
    def loss(params):
        return total_loss(
            create_terms(losses),
            model,
            {**variables, "params": params},
            images,
            targets,
            label_smoothing=0.1,
            key=jax.random.key(3),
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def start(model, seed=1, n=6, size=4):
    """Variables with no value at its default, images and targets."""
    rng = np.random.default_rng(seed)
    variables = jax.eval_shape(lambda: init_variables(model, (size, size, 3), 0))
    params = jax.tree.map(
        lambda leaf: np.float32(rng.normal(0, 0.8, leaf.shape)), variables["params"]
    )
    stats = jax.tree.map(lambda leaf: np.ones(leaf.shape, "f4"), variables["batch_stats"])
    images = np.float32(rng.normal(size=(n, size, size, 3)))
    return {"params": params, "batch_stats": stats}, images, np.eye(3, dtype="f4")[np.arange(n) % 3]


def test_what_a_tap_reads_is_of_the_very_pass_that_is_trained():
    """The tap `root` is the output: same dropout, same statistics, same gradient."""
    given = start(TwoHeads())
    direct = losses_and_gradient(TwoHeads(), {"a": CE}, *given)
    by_tap = losses_and_gradient(TwoHeads(), {"a": {**CE, "tap": "root"}}, *given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), direct, by_tap)


def test_each_head_has_its_own_loss_and_the_sum_is_weighted():
    losses = {
        "global": {**CE, "tap": "global_head"},
        "object": {**CE, "tap": "object_head", "weight": 0.3},
    }
    given = start(TwoHeads())
    (loss, (parts, logits, _)), grad = losses_and_gradient(TwoHeads(), losses, *given)
    assert float(loss) == pytest.approx(float(parts["global"] + 0.3 * parts["object"]), rel=1e-6)
    alone = {
        name: losses_and_gradient(TwoHeads(), {name: {**losses[name], "weight": 1.0}}, *given)
        for name in losses
    }
    for name, ((value, (_, others, _)), _) in alone.items():
        assert float(parts[name]) == pytest.approx(float(value), rel=1e-6)
        np.testing.assert_allclose(others, logits, rtol=1e-6)
    expected = jax.tree.map(lambda a, b: a + 0.3 * b, alone["global"][1], alone["object"][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad, expected)
    assert np.abs(alone["global"][1]["object_head"]["kernel"]).max() == 0
    assert np.abs(grad["object_head"]["kernel"]).max() > 0


def test_several_terms_are_metrics_of_their_own_also_of_steps_on_the_device():
    losses = {"global": {**CE, "tap": "global_head"}, "all": {**CE, "weight": 2.0}}
    train_step, state = create(TwoHeads(), losses)
    sums = step.zero_metrics(losses)
    after = state
    for i in range(2):
        after, metrics = train_step(after, batch(seed=i))
        expected = metrics["loss/global"] + 2 * metrics["loss/all"]
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-6)
        sums = step.add_metrics(sums, metrics)
    optimizer = optax.sgd(0.1)
    made = step.make_train_step(TwoHeads(), optimizer, recipe(losses), num_classes=3)
    several = step.jit_steps_on_device(made, MESH, losses=losses)
    split = {name: np.concatenate([batch(seed=i)[name] for i in range(2)]) for name in batch()}
    indices = np.arange(12, dtype=np.int32).reshape(2, 6)
    device, device_sums = several(state, split, indices, np.int32(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), device_sums, sums)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), device.params, after.params
    )


def test_one_term_has_no_metric_but_the_loss():
    train_step, state = create(TwoHeads(), {"only": CE})
    _, metrics = train_step(state, batch())
    assert set(metrics) == {"loss", "top1", "grad_norm", "steps", "bad_step"}


# Channel guidance, by hand in NumPy.


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def slow_forward(p, x):
    """`Guided` in training mode; every value that the gradients by hand need."""
    v: Any = {"X": np.maximum(x @ p["trunk"]["kernel"] + p["trunk"]["bias"], 0)}
    fc1, fc2 = (p["attention"]["channel_attention"][name] for name in ("fc1", "fc2"))
    v["hidden"] = np.maximum(v["X"].mean((1, 2)) @ fc1["kernel"] + fc1["bias"], 0)
    v["a"] = softmax(v["hidden"] @ fc2["kernel"] + fc2["bias"])
    v["S"] = 1 / (1 + np.exp(-np.einsum("nhwc,nc->nhw", v["X"], v["a"])))
    v["Y"] = v["X"] * v["S"][..., None]
    pooled = v["Y"].mean((1, 2))
    v["sigma"] = np.sqrt(pooled.var(0) + 1e-5)
    v["normed"] = (pooled - pooled.mean(0)) / v["sigma"]
    x = v["normed"] * p["norm"]["scale"] + p["norm"]["bias"]
    v["z"] = x @ p["head"]["kernel"] + p["head"]["bias"]
    return v


def slow_beta(p, v, weights, at):
    """Spatial mean of d sum_b weights_b z_b / d(Y or X), through the norm over the batch."""
    _, h, w, _ = v["X"].shape
    d = (weights @ p["head"]["kernel"].T) * p["norm"]["scale"]
    d = (d - d.mean(0) - v["normed"] * (d * v["normed"]).mean(0)) / v["sigma"]
    d_y = np.broadcast_to(d[:, None, None] / (h * w), v["Y"].shape)
    if at == "output":
        return d_y.mean((1, 2))
    d_map = (d_y * v["X"]).sum(-1) * v["S"] * (1 - v["S"])  # [n, h, w]
    d_a = np.einsum("nhw,nhwc->nc", d_map, v["X"])
    d_q = v["a"] * (d_a - (v["a"] * d_a).sum(-1, keepdims=True))
    fc1, fc2 = (p["attention"]["channel_attention"][name] for name in ("fc1", "fc2"))
    d_g = ((d_q @ fc2["kernel"].T) * (v["hidden"] > 0)) @ fc1["kernel"].T
    d_x = d_y * v["S"][..., None] + d_map[..., None] * v["a"][:, None, None]
    return (d_x + d_g[:, None, None] / (h * w)).mean((1, 2))


def slow_loss(p, x, targets, w, *, weight, direction, reduction, leak):
    """(loss, mean of the term, what the gradient descends on besides) with w held constant."""
    v = slow_forward(p, x)
    smooth = targets * 0.9 + 0.1 / 3
    cross_entropy = -(smooth * np.log(softmax(v["z"]))).sum(-1).mean()
    to_cam = (v["a"] * np.log(v["a"] / w)).sum(-1)
    to_attention = (w * np.log(w / v["a"])).sum(-1)
    term = {
        "attention_to_cam": to_cam,
        "cam_to_attention": to_attention,
        "symmetric": (to_cam + to_attention) / 2,
    }[direction]
    term = term.sum() if reduction == "sum" else term.mean()
    return cross_entropy + weight * term, term, weight * leak * v["z"].max(-1).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": 0.4, "temperature": 0.01},
        {"target": "label", "temperature": 0.01},
        {"at": "input", "temperature": 0.01},
        {"direction": "cam_to_attention", "temperature": 0.02, "reduction": "mean"},
        {"direction": "symmetric", "temperature": 0.02, "at": "input", "target": "label"},
        {"faithful": True},
        {"faithful": True, "weight": 0.5},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_channel_guidance_and_all_its_gradients_are_those_of_numpy(options):
    variables, images, targets = start(Guided(), seed=6)
    losses = {"ce": CE, "cam": {"name": "channel_guidance", "layer": "attention", **options}}
    (loss, (parts, logits, _)), grad = losses_and_gradient(
        Guided(), losses, variables, images, targets
    )

    p, x = jax.tree.map(np.float64, (variables["params"], images))
    v = slow_forward(p, x)
    is_label = options.get("target") == "label"
    cued = targets if is_label else np.eye(3)[v["z"].argmax(-1)]
    assert is_label or (cued != targets).any()  # or the two could not be told apart
    beta = slow_beta(p, v, cued, options.get("at", "output"))
    w = softmax(beta / options.get("temperature", 1.0))
    assert options.get("temperature", 1.0) == 1.0 or w.max() > 1.3 / 4  # not uniform
    settings = {
        "weight": options.get("weight", 1.0),
        "direction": options.get("direction", "attention_to_cam"),
        "reduction": options.get("reduction", "sum"),
        "leak": options.get("faithful", False),
    }
    expected, term, _ = slow_loss(p, x, targets, w, **settings)
    np.testing.assert_allclose(logits, v["z"], rtol=1e-4, atol=1e-5)
    assert float(parts["cam"]) == pytest.approx(term, rel=1e-4)
    assert float(loss) == pytest.approx(expected, rel=1e-4)

    for path, leaf in jax.tree_util.tree_leaves_with_path(p):
        found = grad
        for key in path:
            found = found[key.key]
        for i in np.ndindex(leaf.shape):
            values = []
            for change in (1e-6, -1e-6):
                before, leaf[i] = leaf[i], leaf[i] + change
                total, _, leaked = slow_loss(p, x, targets, w, **settings)
                values.append(total + leaked)
                leaf[i] = before
            slope = (values[0] - values[1]) / 2e-6
            assert float(found[i]) == pytest.approx(slope, rel=1e-3, abs=3e-5), (path, i)


def test_one_class_for_all_leaves_no_gradient_behind_a_norm_over_the_batch():
    """As the docstring says: the weights are uniform, the divergence is log c - entropy."""
    variables, images, targets = start(Guided(), seed=1)
    v = slow_forward(*jax.tree.map(np.float64, (variables["params"], images)))
    assert (v["z"].argmax(-1) == 0).all()
    losses = {"cam": {"name": "channel_guidance", "layer": "attention"}}
    (loss, _), _ = losses_and_gradient(Guided(), losses, variables, images, targets)
    assert float(loss) == pytest.approx((v["a"] * np.log(4 * v["a"])).sum(), rel=1e-4)


def test_the_layer_is_named_as_it_is_listed_when_it_is_inserted():
    model = Insert(Trunk(), {"stage1": CamGuidedAttention(reduction=2)})
    losses = {"cam": {"name": "channel_guidance", "layer": "inserted/stage1"}}
    (loss, _), grad = losses_and_gradient(model, losses, *start(model, size=8))
    assert float(loss) > 0
    attention = grad["inserted"]["stage1"]["channel_attention"]["fc2"]["kernel"]
    assert np.abs(attention).max() > 0
    assert np.abs(grad["backbone"]["head"]["kernel"]).max() == 0


# Guidance, by closed forms.


class Trunk(nn.Module):
    """Many multiplications below the tap `stage1`, few above it, with norms over the batch."""

    width: int = 8

    @nn.compact
    def __call__(self, x, *, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train)  # noqa: E731
        for _ in range(2):
            x = nn.relu(norm()(nn.Conv(self.width, (3, 3))(x)))
        x = Stage(name="stage1")(x)
        x = norm()(x.mean((1, 2)))
        return nn.Dense(3, name="head")(x)


class Stage(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(x.shape[-1], (3, 3))(x))


class Masked(nn.Module):
    """A mask of its own making in the middle."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="trunk")(x))
        mask = nn.sigmoid(nn.Conv(1, (3, 3), name="mask")(x))
        return nn.Dense(3, name="head")((x * Gate(name="gate")(mask)).mean((1, 2)))


HEAD = np.random.default_rng(4).normal(size=(5, 3))
FEATURES = np.maximum(np.random.default_rng(5).normal(size=(4, 3, 4, 5)), 0)


def linear_head(x):
    x = checkpoint_name(x, "features")
    return x.mean((1, 2)) @ jnp.float32(HEAD)


def pass_with(mask, features=FEATURES, targets=(0, 1, 2, 0)) -> Forward:
    images = jnp.float32(features)
    return Forward(
        fn=linear_head,
        images=images,
        targets=jnp.eye(3)[jnp.array(targets)],
        logits=linear_head(images),
        taps={"mask": mask, "features": images},
        label_smoothing=0.0,
        key=jax.random.key(0),
    )


def guidance(**options):
    given = {"name": "guidance", "mask": "mask", "tap": "features", **options}
    return create_terms({"guide": given})["guide"]


def slow_distance(mask, guide, distance):
    m, g = mask / mask.sum(), guide / guide.sum()
    if distance == "kl":
        return sum(b * np.log(b / a) for a, b in zip(m.ravel(), g.ravel(), strict=True) if b > 0)
    if distance == "mse":
        return np.mean((m / m.mean() - g / g.mean()) ** 2)
    return 1 - (m * g).sum() / np.sqrt((m**2).sum() * (g**2).sum())


@pytest.mark.parametrize("distance", ["kl", "mse", "cosine"])
@pytest.mark.parametrize("target", ["label", "predicted"])
@pytest.mark.parametrize("method", ["grad_cam", "layer_cam"])
def test_guidance_is_the_distance_of_shares(method, target, distance):
    mask = np.random.default_rng(6).uniform(size=(4, 3, 4, 2))
    found = guidance(method=method, target=target, distance=distance)(pass_with(jnp.float32(mask)))
    classes = (0, 1, 2, 0) if target == "label" else (FEATURES.mean((1, 2)) @ HEAD).argmax(-1)
    for n, k in enumerate(classes):
        # Everything after the tap is linear: the gradient is head / 12 everywhere.
        weights = np.maximum(HEAD[:, k], 0) if method == "layer_cam" else HEAD[:, k]
        guide = np.maximum(FEATURES[n] @ weights / 12, 0)
        assert guide.any()
        expected = slow_distance(mask[n].mean(-1), guide, distance)
        assert float(found[n]) == pytest.approx(expected, rel=1e-4)


def test_the_map_is_brought_to_the_grid_of_the_mask():
    mask = np.random.default_rng(6).uniform(size=(4, 6, 8))
    guide = np.maximum(FEATURES @ HEAD[:, 1], 0).repeat(2, axis=1).repeat(2, axis=2)
    given = pass_with(jnp.float32(mask)[..., None], targets=(1, 1, 1, 1))
    found = guidance(target="label")(given)
    blurred = jax.image.resize(jnp.float32(guide[:, ::2, ::2]), mask.shape, "linear")
    for n in range(4):
        expected = slow_distance(mask[n], np.float64(blurred[n]), "kl")
        assert float(found[n]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("distance", ["kl", "mse", "cosine"])
def test_an_empty_map_or_mask_has_no_loss_and_no_gradient(distance):
    features, mask = FEATURES.copy(), np.ones((4, 3, 4, 1))
    features[1], mask[2] = 0, 0
    mask[3, 0] = 0  # in places: as far away as a logarithm may say
    term = guidance(distance=distance, target="label")

    def values(mask):
        found = term(pass_with(mask, features))
        return found.sum(), found

    gradient, found = jax.grad(values, has_aux=True)(jnp.float32(mask))
    assert np.isfinite(found).all() and np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(found)[[1, 2]], 0)
    np.testing.assert_array_equal(np.asarray(gradient)[[1, 2]], 0)
    assert float(found[0]) > 0 and float(found[3]) > 0 and np.abs(gradient[0]).max() > 0


def test_no_number_stays_no_number():
    features = FEATURES.copy()
    features[1, 0, 0] = np.nan
    found = guidance(target="label")(pass_with(jnp.ones((4, 3, 4, 1)), features))
    assert np.isnan(found[1]) and np.isfinite(np.asarray(found)[[0, 2, 3]]).all()


def test_the_gradient_goes_into_what_makes_the_mask_alone():
    losses = {"guide": {"name": "guidance", "mask": "gate", "tap": "trunk"}}
    _, grad = losses_and_gradient(Masked(), losses, *start(Masked()))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(grad["head"]))
    assert np.abs(grad["mask"]["kernel"]).max() > 0 and np.abs(grad["trunk"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": "contrastive_excitation_backprop", "tap": "trunk"},
        {
            "method": "finer_cam",
            "tap": "trunk",
            "target": "predicted",
            "options": {"alpha": 0.5},
        },
        {"method": "layer_cam", "tap": "input"},
        {"method": "smooth_grad", "options": {"samples": 2}},
        {"method": "rise", "options": {"masks": 8, "cells": 2, "chunk_size": 4}},
    ],
    ids=lambda options: options["method"],
)
def test_ten_steps_bring_the_mask_to_the_map(options):
    losses = {"guide": {"name": "guidance", "mask": "gate", "target": "label", **options}}
    train_step, state = create(Masked(), losses, size=8, optimizer=optax.sgd(1.0))
    distances = []
    for _ in range(11):
        state, metrics = train_step(state, batch(size=8))
        assert int(metrics["bad_step"]) == step.NO_STEP
        distances.append(float(metrics["loss"]))
    assert 0 < distances[-1] < 0.9 * distances[0]


def overlap(model, state, examples):
    """Common share of mask and Grad-CAM, mean over the batch."""
    fn = bind(model, state.variables())
    images = jnp.float32(examples["image"] / 255 - 0.5) / 0.25
    _, taps = read_taps(fn, images, ["gate"])
    guide = jnp.maximum(grad_cam(fn, images, examples["label"], tap="trunk"), 0)
    mask = taps["gate"][..., 0]
    mask, guide = (x / jnp.maximum(x.sum((1, 2), keepdims=True), 1e-9) for x in (mask, guide))
    return float(jnp.minimum(mask, guide).sum((1, 2)).mean())


def test_ten_steps_raise_the_overlap_of_mask_and_map():
    losses = {"guide": {"name": "guidance", "mask": "gate", "tap": "trunk", "target": "label"}}
    train_step, state = create(Masked(), losses, size=8, optimizer=optax.sgd(1.0))
    before = overlap(Masked(), state, batch(size=8))
    for _ in range(10):
        state, _ = train_step(state, batch(size=8))
    assert overlap(Masked(), state, batch(size=8)) > before + 0.05


def test_four_devices_do_as_one():
    losses = {"ce": CE, "cam": {"name": "channel_guidance", "layer": "attention"}}
    losses["map"] = {"name": "guidance", "mask": "attention/gate", "tap": "attention/input"}
    optimizer, found = optax.sgd(0.1), []
    for count in (1, 4):
        mesh = sharding.create_mesh(jax.devices()[:count])
        made = step.make_train_step(Guided(), optimizer, recipe(losses), num_classes=3)
        state = create_state(Guided(), optimizer, image_shape=(4, 4, 3), seed=1, mesh=mesh)
        examples = sharding.to_global(batch(8), mesh)
        state, metrics = step.jit_train_step(made, mesh)(state, examples)
        found.append(jax.tree.map(np.asarray, (state.params, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


# What it costs.


def flops(model, losses, size=16):
    train_step, state = create(model, losses, size=size)
    compiled: Any = train_step.lower(state, batch(8, size)).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    "term",
    [
        {"name": "channel_guidance", "layer": "inserted/stage1"},
        {"name": "channel_guidance", "layer": "inserted/stage1", "at": "input"},
        {"name": "guidance", "mask": "inserted/stage1/gate", "tap": "inserted/stage1"},
        {
            "name": "guidance",
            "mask": "inserted/stage1/gate",
            "tap": "backbone/stage1",
            "method": "contrastive_excitation_backprop",
        },
    ],
    ids=("channel_guidance", "channel_guidance at input", "grad_cam", "contrastive"),
)
def test_a_term_runs_the_trunk_once(term):
    """The step is about three forward passes through the trunk; a fourth would be seen."""
    model = Insert(Trunk(width=24), {"stage1": CamGuidedAttention(reduction=8)})
    plain = flops(model, {"ce": CE})
    assert flops(model, {"ce": CE, "term": term}) < 1.03 * plain


def test_a_term_sees_the_trunk_again_where_it_looks_at_the_image():
    """Or the test above could not fail."""
    model = Insert(Trunk(width=24), {"stage1": CamGuidedAttention(reduction=8)})
    term = {"name": "guidance", "mask": "inserted/stage1/gate", "method": "gradient"}
    assert flops(model, {"ce": CE, "term": term}) > 1.2 * flops(model, {"ce": CE})


@pytest.mark.parametrize("method", [grad_cam, excitation_backprop])
def test_a_known_tap_gives_the_map_of_the_whole_function(method):
    model = Insert(Trunk(), {"stage1": AttentionZoom()})
    variables, images, targets = start(model, size=8)
    fn = bind(model, variables, train=False)
    for tap in ("inserted/stage1", "backbone/Conv_1"):
        _, taps = read_taps(fn, images, [tap])
        known = Known(fn, taps)
        expected = method(fn, images, targets, tap=tap)
        np.testing.assert_allclose(method(known, images, targets, tap=tap), expected, atol=1e-6)
        chunked = method(known, images, targets, tap=tap, chunk_size=4)  # computed, not known
        np.testing.assert_allclose(chunked, expected, atol=1e-6)
        other = Known(fn, {tap: 2 * taps[tap] + 1})
        assert np.abs(method(other, images, targets, tap=tap) - expected).max() > 1e-3


# What does not fit is one line.


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "losses is empty; expected"),
        ({"a": "cross_entropy"}, "losses.a is 'cross_entropy'; expected the name of a term and"),
        ({"a": {"weight": 1.0}}, r"losses.a is .*; expected the name of a term"),
        ({"a": {"name": "crossentropy"}}, "unknown term losses.a.name 'crossentropy'; did you mea"),
        ({"a": {**CE, "wieght": 2}}, "option of losses.a 'wieght'; did you mean 'weight'"),
        ({"a": {**CE, "weight": np.inf}}, "losses.a: weight is inf; expected a finite number"),
        ({"a": {**CE, "weight": "2"}}, "losses.a: must be real number, not str"),
        ({"a": {"name": "guidance"}}, "losses.a lacks mask; it is the path of a tap"),
        ({"a": {"name": "channel_guidance"}}, "losses.a lacks layer; it is the path of a tap"),
    ],
)
def test_a_bad_term_is_one_line(losses, message):
    with pytest.raises(ValueError, match=message) as error:
        create_terms(losses)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "losses.a: temperature is 0.0; expected a number above 0"),
        ({"target": "labels"}, "losses.a: unknown target 'labels'; did you mean 'label'"),
        ({"at": "outptu"}, "unknown at 'outptu'; did you mean 'output'"),
        ({"direction": "kl"}, "unknown direction 'kl'"),
        ({"reduction": "none"}, "unknown reduction 'none'"),
        ({"faithful": True, "temperature": 0.1}, "faithful=True is the published script: leave"),
    ],
)
def test_a_bad_option_of_channel_guidance_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_terms({"a": {"name": "channel_guidance", "layer": "x", **options}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "losses.a: unknown method 'gradcam'; did you mean 'grad_cam'"),
        ({"tap": ""}, "losses.a: grad_cam explains a tap; set tap, such as 'backbone/stage3'"),
        ({"method": "rise"}, "losses.a: rise explains the image; leave tap away"),
        ({"distance": "l2"}, "unknown distance 'l2'"),
        ({"options": {"alhpa": 1}, "method": "finer_cam"}, "finer_cam 'alhpa'; did you mean 'alp"),
    ],
)
def test_a_bad_option_of_guidance_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_terms({"a": {"name": "guidance", "mask": "m", "tap": "t", **options}})
    assert "\n" not in str(error.value)


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {
        "name": "resnet",
        "stem": "small",
        "width": 4,
        "stage_sizes": (1,),
        "insert": {"stage1": {"name": "cam_guided"}},
    }
    base.update_from_flattened_dict(changes)
    return base


CHANNEL = {"name": "channel_guidance", "layer": "inserted/stage1"}
MAP = {"name": "guidance", "mask": "inserted/stage1/gate", "tap": "backbone/stage1"}


def test_states_of_steps_are_no_mask():
    with pytest.raises(ValueError, match=r"shape \[4, 6, 8\]; expected \[n, h, w, c\]"):
        guidance(target="label")(pass_with(jnp.ones((4, 6, 8))))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({**CE, "tap": "backbone/haed"}, "unknown tap 'backbone/haed'; did you mean 'backbone/hea"),
        (
            {**CE, "tap": "backbone/stage1"},
            r"tap 'backbone/stage1' has the shape \[16, .*; expecte",
        ),
        (
            {**CHANNEL, "layer": "inserted/stage2"},
            "'inserted/stage2/channel_attention/fc2'; did yo",
        ),
        ({**CHANNEL, "layer": "backbone/stage1"}, "unknown tap 'backbone/stage1/channel_attention"),
        ({**MAP, "mask": "inserted/stage1/gat"}, "unknown tap 'inserted/stage1/gat'; did you mean"),
        ({**MAP, "mask": ""}, "unknown tap ''"),
        ({**MAP, "tap": "stage1"}, "unknown tap 'stage1'; did you mean .* or 'backbone/stage1'"),
        (
            {**MAP, "tap": "backbone/head"},
            r"tap 'backbone/head' has the shape \[16, 16\]; expected",
        ),
        (
            {**MAP, "mask": "inserted/stage1/channel_attention"},
            r"tap 'inserted/stage1/channel_attention' has the shape \[16, 4\]; expected \[n, h, w",
        ),
        (
            {**MAP, "method": "finer_cam", "target": "label"},
            r"targets must be class ids int \[16\]",
        ),
    ],
)
def test_a_tap_that_does_not_fit_is_one_line_before_training(term, message):
    settings = config()
    settings.losses = {"cross_entropy": CE, "other": term}
    with pytest.raises(ValueError, match=message) as error:
        create_experiment(settings)
    assert "\n" not in str(error.value)


# The whole programme.


@pytest.mark.parametrize("cache", ["host", "device"])
def test_training_writes_every_term(tmp_path, cache):
    settings = config(**{"data.cache": cache, "log_every_steps": 1, "total_steps": 2})
    settings.losses = {"cross_entropy": CE, "cam": {**CHANNEL, "weight": 0.5}, "map": MAP}
    train.train(settings, str(tmp_path), devices=jax.devices()[:1])
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert len(lines) == 2
    for line in lines:
        parts = [line[f"train/loss/{name}"] for name in ("cross_entropy", "cam", "map")]
        assert line["train/loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + parts[2], rel=1e-5)
        assert all(part > 0 for part in parts)

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.attribution import excitation_backprop, grad_cam, list_taps, read_taps
from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models import Features, Insert, RecursiveZoom, bind, create_model
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.ops.warp import saliency_grid, sample, to_saliency
from attnzoom_jax.ops.warp_points import warp_points

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(2, 16, 24, 3)), jnp.float32)
NET = ResNet(5, stem="cifar", stage_sizes=(1, 1), width=4)
TAP = "stage2"


def model_of(**fields):
    return RecursiveZoom(NET, **{**dict(steps=3, tap=TAP, cells=8, fwhm=3.0), **fields})


@functools.cache
def fresh():
    return jax.jit(model_of().init)(KEY, IMAGES)


def looking(scale=3.0):
    """Variables with an attention and weights of the steps that are not uniform."""
    variables = jax.tree.map(lambda leaf: leaf, fresh())
    params = variables["params"]
    kernel = RNG_KERNEL * scale
    params["attention"]["kernel"] = jnp.float32(kernel).reshape(1, 1, 8, 1)
    params["step_weights"]["score"]["kernel"] = jnp.float32(RNG_KERNEL[::-1] * 2)[:, None]
    return variables


RNG_KERNEL = RNG.normal(size=8)


def backbone_of(variables):
    return {collection: tree["backbone"] for collection, tree in variables.items()}


def logits_of(model, variables, train=False):
    def call(v):
        return model.apply(v, IMAGES, train=train, mutable=["batch_stats"])

    return jax.jit(call)(variables)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("variables", [fresh, looking], ids=["fresh", "looking"])
def test_one_look_is_the_backbone_bit_for_bit(train, variables):
    variables = variables()
    expected, stats = logits_of(NET, backbone_of(variables), train)
    logits, updates = logits_of(model_of(steps=1), variables, train)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(
        np.testing.assert_array_equal, updates["batch_stats"]["backbone"], stats["batch_stats"]
    )


@pytest.mark.parametrize("steps", [2, 4])
def test_begins_as_the_backbone(steps):
    model = model_of(steps=steps)
    expected, _ = logits_of(NET, backbone_of(fresh()))
    logits, _ = logits_of(model, fresh())
    np.testing.assert_allclose(logits, expected, rtol=2e-6, atol=1e-6)
    views = ["view", *(f"view#{t}" for t in range(1, steps))]
    _, taps = read_taps(bind(model, fresh()), IMAGES, [*views, "step_weights"])
    for view in views:
        np.testing.assert_array_equal(taps[view], IMAGES)
    np.testing.assert_array_equal(taps["step_weights"], jnp.full((2, steps), 1 / steps))
    assert np.abs(expected).max() > 0.1


def test_has_the_backbones_tree_whatever_the_steps():
    shapes = [jax.eval_shape(model_of(steps=steps).init, KEY, IMAGES) for steps in (1, 3)]
    assert shapes[0] == shapes[1]
    alone = jax.eval_shape(NET.init, KEY, IMAGES)
    assert backbone_of({c: shapes[0][c] for c in alone}) == alone
    params = jax.tree.map(lambda leaf: leaf.shape, shapes[0]["params"])
    params.pop("backbone")
    assert params == {
        "attention": {"kernel": (1, 1, 8, 1)},
        "step_weights": {"score": {"kernel": (8, 1)}},
    }
    without = jax.eval_shape(model_of(attention="activation").init, KEY, IMAGES)["params"]
    assert set(without) == {"backbone", "step_weights"}


def read(maps, places):
    """Maps [n, h, w] at places [n, p, 2] in their pixels, one by one, borders repeated."""
    out = np.zeros(places.shape[:2])
    h, w = maps.shape[1:]
    for i, points in enumerate(np.float64(places)):
        for j, (y, x) in enumerate(points):
            y, x = np.clip(y, 0, h - 1), np.clip(x, 0, w - 1)
            top, left = min(int(y), h - 2), min(int(x), w - 2)
            rows = maps[i, top : top + 2, left : left + 2]
            down, across = y - top, x - left
            out[i, j] = np.array([1 - down, down]) @ rows @ np.array([1 - across, across])
    return out


@pytest.mark.parametrize("attention", ["learned", "activation"])
def test_equals_its_equations(attention):
    """The loop written out; that the places of the cells are right is checked by the way back."""
    model, variables = model_of(attention=attention, temperature=0.5), looking(1.0)
    if attention == "activation":
        variables["params"].pop("attention")
    names = [f"{name}{repeat}" for name in ("view", "attention") for repeat in ("", "#1", "#2")] + [
        *("saliency", "saliency#1", "step_weights"),
        f"backbone/{TAP}#3",
    ]
    logits, taps = read_taps(jax.jit(bind(model, variables)), IMAGES, names)

    inside, params = backbone_of(variables), jax.tree.map(np.float64, variables["params"])
    features_of = jax.jit(
        lambda x: Features(NET, TAP).apply({c: {"backbone": tree} for c, tree in inside.items()}, x)
    )
    h, w, cells = 16, 24, 8
    centres = [(np.arange(cells) + 0.5) * m / cells - 0.5 for m in (h, w)]
    centres = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
    looks, total, places, view = [], 0.0, np.stack([centres] * 2), IMAGES
    for t in range(3):
        repeat = f"#{t}" if t else ""
        np.testing.assert_allclose(taps[f"view{repeat}"], view, atol=1e-3)
        looks.append(np.float64(features_of(view)))
        if attention == "learned":
            maps = looks[-1] @ params["attention"]["kernel"][0, 0, :, 0]
        else:
            maps = looks[-1].mean(-1)
            maps /= np.abs(maps).max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(taps[f"attention{repeat}"][..., 0], maps, atol=1e-3)
        if t == 2:
            break
        scale = np.array(maps.shape[1:]) / (h, w)
        total = total + read(maps, (places + 0.5) * scale - 0.5).reshape(2, cells, cells)
        weights = np.exp((total - total.max(axis=(1, 2), keepdims=True)) / 0.5)
        saliency = weights / weights.sum(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(taps[f"saliency{repeat}"][..., 0], saliency, atol=1e-4)
        grid = saliency_grid(jnp.float32(saliency), (h, w), fwhm=3.0)
        view = sample(IMAGES, grid)
        places = np.asarray(warp_points(jnp.float32([centres] * 2), grid))
        back = np.stack([read(np.asarray(grid[..., axis]), places) for axis in (0, 1)], axis=-1)
        is_shown = ((places >= 0) & (places <= (h - 1, w - 1))).all(axis=-1)
        np.testing.assert_allclose(back[is_shown], np.stack([centres] * 2)[is_shown], atol=1e-3)
        assert is_shown.mean() > 0.2

    means = np.stack([one.mean((1, 2)) for one in looks], axis=1)
    scores = np.exp(means @ params["step_weights"]["score"]["kernel"][:, 0])
    weights = scores / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(taps["step_weights"], weights, atol=1e-3)
    assert weights.std() > 1e-3
    fused = sum(weights[:, t, None, None, None] * looks[t] for t in range(3))
    np.testing.assert_allclose(taps[f"backbone/{TAP}#3"], fused, atol=1e-3)
    head = params["backbone"]["head"]
    expected = fused.mean((1, 2)) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert np.abs(taps["view#2"] - IMAGES).max() > 0.5  # it does zoom


def test_zooms_in_on_what_it_looks_at_step_by_step():
    """The attention is the brightness: a spot grows from view to view."""

    class Bright(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(1, (1, 1), name="look")(x))
            return nn.Dense(2, name="head")(x.mean((1, 2)))

    y, x = np.mgrid[:32, :32]
    spot = np.exp(-((y - 9) ** 2 + (x - 21) ** 2) / 6.0)[None, ..., None]
    model = RecursiveZoom(Bright(), 4, "look", attention="activation", cells=16, temperature=0.2)
    variables = jax.jit(model.init)(KEY, jnp.float32(spot))
    variables["params"]["backbone"]["look"]["kernel"] = jnp.ones((1, 1, 1, 1))
    views = ["view", "view#1", "view#2", "view#3"]
    _, taps = read_taps(bind(model, variables), jnp.float32(spot), views)
    sizes = [float((taps[view] > 0.5).sum()) for view in views]
    assert sizes[3] > sizes[2] > sizes[1] > 1.2 * sizes[0]
    # The spot stays where it is in the image: attention of every view is mapped back to it.
    _, taps = read_taps(bind(model, variables), jnp.float32(spot), ["saliency", "saliency#2"])
    for name in taps:
        peak = np.unravel_index(np.argmax(taps[name][0, ..., 0]), (16, 16))
        np.testing.assert_allclose(peak, (9 / 2, 21 / 2), atol=1)


def test_the_saliency_head_learns_through_the_warp():
    weights = jnp.float32(RNG.normal(size=(2, 5)))

    def gradients(variables):
        def loss(params):
            logits = model_of().apply({**variables, "params": params}, IMAGES)
            return (logits * weights).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    found = gradients(fresh())
    assert np.abs(found["attention"]["kernel"]).min() > 1e-6
    # All looks are the same at first; which one counts is learned once they differ.
    assert np.abs(found["step_weights"]["score"]["kernel"]).max() < 1e-5
    found = gradients(looking())
    assert all(np.any(g != 0) and np.all(np.isfinite(g)) for g in jax.tree.leaves(found))

    def loss_at(size):
        variables = looking(0.3)
        variables["params"]["attention"]["kernel"] += size * jnp.eye(8)[2].reshape(1, 1, 8, 1)
        return (model_of(steps=2).apply(variables, IMAGES) * weights).sum()

    # With two looks the places of the second mapping, which count as given, play no part.
    slope = jax.jit(jax.grad(loss_at))(0.0)
    run = jax.jit(loss_at)
    np.testing.assert_allclose(slope, (run(1e-2) - run(-1e-2)) / 2e-2, rtol=0.1)


def test_statistics_before_the_tap_are_updated_once_per_look():
    variables = jax.tree.map(lambda leaf: leaf, fresh())
    params = variables["params"]  # of a tap with half the channels
    params["attention"]["kernel"] = params["attention"]["kernel"][:, :, :4]
    params["step_weights"]["score"]["kernel"] = params["step_weights"]["score"]["kernel"][:4]
    _, updates = logits_of(model_of(tap="stage1"), variables, train=True)
    found = updates["batch_stats"]["backbone"]
    _, alone = logits_of(NET, backbone_of(fresh()), train=True)
    alone = alone["batch_stats"]
    # All views are the images: mean and variance move three times towards the same values.
    for path in (("stem", "norm1"), ("stage1", "block1", "norm1")):
        one, three = (functools.reduce(lambda t, k: t[k], path, t) for t in (alone, found))
        np.testing.assert_allclose(three["mean"], one["mean"] * (1 - 0.9**3) / 0.1, atol=1e-5)
    after = ("stage2", "block1", "norm1")
    one, once = (functools.reduce(lambda t, k: t[k], after, t) for t in (alone, found))
    np.testing.assert_allclose(once["mean"], one["mean"], atol=1e-6)


def test_every_tap_has_its_name():
    taps = list_taps(bind(model_of(), fresh()), IMAGES)
    for repeat in ("", "#1", "#2"):
        assert taps[f"view{repeat}"] == (2, 16, 24, 3)
        assert taps[f"attention{repeat}"] == (2, 8, 12, 1)
        assert taps[f"backbone/stage1{repeat}"] == (2, 16, 24, 4)
        assert taps[f"backbone/{TAP}{repeat}"] == (2, 8, 12, 8)
    assert taps[f"backbone/{TAP}#3"] == (2, 8, 12, 8)
    assert taps["saliency"] == taps["saliency#1"] == taps["saliency/gate#1"] == (2, 8, 8, 1)
    assert taps["step_weights"] == (2, 3)
    more = {"view#3", "attention#3", "saliency#2", f"backbone/{TAP}#4", "backbone/stage1#3"}
    assert not more & set(taps)


def test_relevance_and_cams_of_every_look():
    variables = looking()
    variables["params"]["backbone"]["head"]["kernel"] = jnp.abs(
        variables["params"]["backbone"]["head"]["kernel"]
    )
    fn, targets = bind(model_of(), variables), jnp.array([1, 4])
    taps = [f"backbone/{TAP}{repeat}" for repeat in ("", "#1", "#2", "#3")]
    maps = excitation_backprop(fn, IMAGES, targets, tap=taps)
    *looks, fused = (maps[tap].sum((1, 2)) for tap in taps)
    np.testing.assert_allclose(fused, 1.0, rtol=1e-4)
    np.testing.assert_allclose(sum(looks), 1.0, rtol=1e-4)  # the weights take none of it
    assert min(look.min() for look in looks) > 0.01
    cams = grad_cam(fn, IMAGES, targets, tap=["view", *taps])
    assert all(np.abs(cam).max() > 0 for cam in cams.values())


def test_a_grid_of_a_view_is_that_of_its_saliency():
    model = model_of(strength=0.7)
    _, taps = read_taps(bind(model, looking()), IMAGES, ["saliency#1", "view#2"])
    grid = model.grid_of(taps["saliency#1"], (16, 24))
    np.testing.assert_allclose(sample(IMAGES, grid), taps["view#2"], atol=1e-5)
    whole = saliency_grid(taps["saliency#1"][..., 0], (16, 24), fwhm=3.0)
    assert np.abs(whole - grid).max() > 0.1


def test_constant_logits_give_a_uniform_saliency():
    assert np.ptp(to_saliency(jnp.full((1, 8, 8), 0.3), (8, 8))) == 0


def test_by_name_with_layers_inserted():
    options = dict(num_classes=5, backbone="resnet10", stem="cifar", width=4, tap="stage2", cells=8)
    model = create_model("recursive_zoom", attention="activation", **options)
    assert isinstance(model, RecursiveZoom) and model.steps == 2
    model = create_model(
        "recursive_zoom", insert={"backbone/stage3": {"name": "attention_zoom"}}, **options
    )
    shapes = jax.eval_shape(model.init, KEY, IMAGES)["params"]
    assert set(shapes["inserted"]) == {"backbone.stage3"}
    inside = model_of(tap=f"backbone/{TAP}").clone(
        backbone=Insert(NET, {"stage1": AttentionZoom()})
    )
    shapes = jax.eval_shape(inside.init, KEY, IMAGES)["params"]
    assert set(shapes["backbone"]) == {"backbone", "inserted"}


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Conv)(3, (1, 1), name="conv")(x).mean((1, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0: expected an integer of at least 1"),
        ({"cells": 0}, "cells=0"),
        ({"attention": "activatoin"}, "attention 'activatoin'; did you mean 'activation'"),
        ({"tap": "stage9"}, "unknown tap of the backbone 'stage9'; did you mean 'stage"),
        ({"tap": "stage9", "steps": 1}, "unknown tap of the backbone 'stage9'; did you mean"),
        (
            {"tap": "head"},
            r"the tap 'head' has shape \(2, 5\); expected features .*before the pool",
        ),
        ({"tap": "head", "steps": 1}, r"the tap 'head' has shape \(2, 5\)"),
        ({"fwhm": 1.0}, "fwhm is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"backbone": Remat(), "tap": "conv"}, "'conv' lies inside a lifted transformation"),
        ({"backbone": Remat(), "tap": "conv", "steps": 1}, "'conv' lies inside a lifted"),
    ],
)
def test_bad_fields_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(model_of().clone(**fields).init, KEY, IMAGES)
    assert "\n" not in str(error.value)


def test_bad_options_by_name():
    with pytest.raises(ValueError, match="option of resnet50 'stpes'; did you mean 'steps'"):
        create_model("recursive_zoom", num_classes=5, stpes=3)
    with pytest.raises(ValueError, match="attention 'cbam'"):
        create_model("recursive_zoom", num_classes=5, attention="cbam")

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.layers import MultiChannelAttention
from attnzoom_jax.models import AttributeModel, Insert, bind, create_model, with_transform
from attnzoom_jax.models.attribute import MASKS
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.ops.masks import transform_masks

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(2, 12, 16, 3)), jnp.float32)
NET = ResNet(5, stem="cifar", stage_sizes=(1, 1), width=4)
POWER = {"name": "power", "exponent": 3.0}


def model_of(**fields):
    return AttributeModel(NET, **{**dict(attributes=5, tap="stage2", rank=3), **fields})


@functools.cache
def variables_of(granularity="attribute_channel"):
    variables = model_of(granularity=granularity).init(jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)  # also for the biases, which start at zero
    return jax.tree.map(lambda leaf: leaf + jnp.float32(rng.normal(0, 0.1, leaf.shape)), variables)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_logits(features, variables, *, granularity, application, exponent=1.0):
    """Attribute by attribute, channel by channel, in float64."""
    params = jax.tree.map(np.float64, variables["params"])
    a, c = params["heads"]["kernel"].shape
    logits = np.zeros((len(features), a))
    if granularity != "none":
        own, stats = params["attention"], variables["batch_stats"]["attention"]["norm"]
        shared = jax.lax.conv_general_dilated(
            jnp.asarray(features, jnp.float32),
            jnp.asarray(own["conv"]["kernel"], jnp.float32),
            *((1, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        scale = own["norm"]["scale"] / np.sqrt(np.float64(stats["var"]) + 1e-5)
        shared = (np.float64(shared) - np.float64(stats["mean"])) * scale + own["norm"]["bias"]
        shared = np.maximum(shared, 0)
        reduced = np.maximum(shared @ own["reduce"]["kernel"] + own["reduce"]["bias"], 0)
        rank = own["expand"]["kernel"].shape[1]
    for k in range(a):
        for channel in range(c):
            signal = np.float64(features[..., channel])  # [n, h, w]
            if granularity != "none":
                set_, mask_ = (0 if granularity == "single" else k), channel
                mask_ = channel if granularity == "attribute_channel" else 0
                of_k = reduced[..., set_ * rank : (set_ + 1) * rank]
                kernel = own["expand"]["kernel"][set_, :, mask_]
                mask = sigmoid(of_k @ kernel + own["expand"]["bias"][set_, mask_]) ** exponent
                signal = signal * (mask + (application == "residual"))
            logits[:, k] += params["heads"]["kernel"][k, channel] * signal.mean(axis=(1, 2))
        logits[:, k] += params["heads"]["bias"][k]
    return logits


@pytest.mark.parametrize("application", ["product", "residual"])
@pytest.mark.parametrize("granularity", MASKS)
def test_equals_the_formula(granularity, application):
    model, variables = (
        model_of(granularity=granularity, application=application),
        variables_of(granularity),
    )
    logits, taps = attribution.read_taps(bind(model, variables), IMAGES, ["backbone/stage2"])
    expected = slow_logits(
        taps["backbone/stage2"], variables, granularity=granularity, application=application
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_transform_changes_the_masks_and_no_parameter():
    plain, variables = model_of(), variables_of()
    model = with_transform(plain, POWER)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    _, before = attribution.read_taps(bind(plain, variables), IMAGES, ["attention/gate"])
    logits, after = attribution.read_taps(
        bind(model, variables), IMAGES, ["attention/gate", "backbone/stage2"]
    )
    np.testing.assert_allclose(
        after["attention/gate"], transform_masks(before["attention/gate"], POWER), rtol=1e-6
    )
    expected = slow_logits(
        after["backbone/stage2"],
        variables,
        granularity="attribute_channel",
        application="product",
        exponent=3.0,
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("attribute_channel", (5, 8)), ("attribute", (5, 1)), ("single", (1, 1))],
)
def test_masks_differ_where_they_may(granularity, shape):
    fn = bind(model_of(granularity=granularity), variables_of(granularity))
    _, taps = attribution.read_taps(fn, IMAGES, ["attention/gate"])
    mask = np.asarray(taps["attention/gate"])
    assert mask.shape == (2, 12 // 2, 16 // 2, *shape)
    assert ((mask > 0) & (mask < 1)).all()
    assert np.unique(mask.reshape(-1, np.prod(shape)), axis=1).shape[1] == np.prod(shape)


def test_without_masks_it_is_the_backbone_with_its_head():
    variables = variables_of("none")
    params = dict(variables["params"]["backbone"])
    heads = variables["params"]["heads"]
    params["head"] = {"kernel": heads["kernel"].T, "bias": heads["bias"]}
    alone = {"params": params, "batch_stats": variables["batch_stats"]["backbone"]}
    found: Any = model_of(granularity="none").apply(variables, IMAGES)
    expected: Any = NET.apply(alone, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("application", ["product", "residual"])
def test_relevance_goes_through_the_masks_to_the_features(application):
    model = model_of(application=application, transform=POWER)
    fn = bind(model, variables_of())
    for k in range(5):
        targets = jnp.full(2, k)
        maps = attribution.excitation_backprop(fn, IMAGES, targets, tap="backbone/stage2")
        balance = attribution.relevance_balance(fn, IMAGES, targets, tap="backbone/stage2")
        np.testing.assert_allclose(maps.sum((1, 2)) + balance.dropped, 1, atol=1e-5)
        np.testing.assert_allclose(balance.dropped, 0, atol=1e-5)
        contrastive = attribution.contrastive_excitation_backprop(
            fn, IMAGES, targets, tap="backbone/stage2"
        )
        np.testing.assert_allclose(contrastive.sum((1, 2)), 0, atol=1e-5)
        assert np.abs(contrastive).max() > 1e-4


def test_relevance_of_an_attribute_by_hand():
    """Of logit k, place and channel p, c share w_kc+ M_kpc F_pc; the masks take nothing."""
    fn, k = bind(model_of(), variables_of()), 3
    _, taps = attribution.read_taps(fn, IMAGES, ["backbone/stage2", "attention/gate"])
    features = np.asarray(taps["backbone/stage2"], np.float64)
    mask = np.asarray(taps["attention/gate"], np.float64)
    weights = np.maximum(variables_of()["params"]["heads"]["kernel"][k], 0)
    shares = weights * mask[:, :, :, k] * features
    expected = shares.sum(-1) / shares.sum((1, 2, 3))[:, None, None]
    maps = attribution.excitation_backprop(fn, IMAGES, jnp.full(2, k), tap="backbone/stage2")
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-6)


def test_grad_cam_of_an_attribute_is_the_gradient_through_its_masks():
    """The masks have a gradient too: it equals finite differences of the logit, in float64."""
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables_of())
        layer = MultiChannelAttention(5, rank=3)
        own = {name: tree["attention"] for name, tree in variables.items()}
        heads = variables["params"]["heads"]
        features = jnp.asarray(np.random.default_rng(3).uniform(0, 1, (1, 3, 4, 8)))

        def logit(features):
            masked: Any = layer.apply(own, features)
            means = masked.mean((1, 2))
            return (means[0, 2] * heads["kernel"][2]).sum()

        slope = jax.grad(logit)(features)
        step = np.random.default_rng(4).normal(size=features.shape) * 1e-4
        # The masks are float32.
        found = (logit(features + step) - logit(features - step)) / 2
        np.testing.assert_allclose(found, (slope * step).sum(), rtol=2e-2)


def test_classes_in_place_of_attributes():
    model = create_model("multi_channel", num_classes=7, backbone="resnet10", width=4, stem="small")
    logits = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES)[0])
    assert logits.shape == (2, 7) and model.default_tap == "backbone/stage4"


def test_without_attributes_the_layer_goes_anywhere():
    model = Insert(NET, {"stage1": MultiChannelAttention(rank=2)})
    variables = model.init(jax.random.key(0), IMAGES)
    fn = bind(model, variables)
    taps = attribution.list_taps(fn, IMAGES)
    assert taps["inserted/stage1/gate"] == taps["backbone/stage1"]
    tap, targets = "backbone/stage1/before", jnp.array([0, 1])
    maps = attribution.excitation_backprop(fn, IMAGES, targets, tap=tap)
    balance = attribution.relevance_balance(fn, IMAGES, targets, tap=tap)
    np.testing.assert_allclose(maps.sum((1, 2)) + balance.dropped, 1, atol=1e-5)


def test_statistics_are_updated_in_training_alone():
    variables = variables_of()
    _, updates = model_of().apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    trees: Any = (variables, updates)
    before, after = (tree["batch_stats"]["attention"]["norm"]["mean"] for tree in trees)
    assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"granularity": "channel"}, "unknown granularity 'channel'"),
        ({"attributes": 0}, "attributes=0: expected a whole number of at least 1"),
        ({"granularity": "none", "transform": POWER}, "no masks to transform"),
        ({"transform": {"name": "power", "exponent": -1.0}}, "above 0"),
        ({"transform": (POWER,) * 4}, "4 transforms for 5 masks"),
        ({"granularity": "single", "transform": (POWER,) * 5}, "5 transforms for 1 masks"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        model_of(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"application": "sum"}, "unknown application 'sum'"),
        ({"rank": 0}, "rank is 0"),
        ({"tap": "stage9"}, "unknown tap of the backbone 'stage9'"),
        ({"tap": "head"}, "features \\[n, h, w, c\\]"),
    ],
)
def test_bad_fields_when_called(fields, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: model_of(**fields).init(jax.random.key(0), IMAGES))


def test_a_model_without_masks_has_none_to_transform():
    with pytest.raises(ValueError, match="ResNet has no masks to transform"):
        with_transform(NET, POWER)
    around = with_transform(Insert(model_of(), {}), POWER)
    assert isinstance(around, nn.Module) and around.backbone.transform is not None

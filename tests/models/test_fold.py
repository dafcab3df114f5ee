"""Folding batch norms: the same outputs from kernels alone, and no norm folded that must stay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from attnzoom_jax.layers import ECA
from attnzoom_jax.models import Insert, create_model, fold_batch_norm
from attnzoom_jax.models.densenet import DenseNet
from attnzoom_jax.models.iresnet import IResNet
from attnzoom_jax.models.mobilenet import MobileNetV2
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.vgg import VGG
from attnzoom_jax.models.wide_resnet import WideResNet
from tests.models.test_resnet import random_images, random_variables

SHAPE = (1, 32, 32, 3)


def folded_norms(variables):
    """Paths of the norms that at most add a bias."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}
    paths = [path.removeprefix("batch_stats/").removesuffix("/var") for path in flat]
    return {
        path
        for path in paths
        if f"batch_stats/{path}/var" in flat
        and np.all(flat[f"batch_stats/{path}/mean"] == 0)
        and np.allclose(flat[f"batch_stats/{path}/var"], 1 - 1e-5, atol=1e-7, rtol=0)
        and np.all(flat[f"params/{path}/scale"] == 1)
    }


def every_norm(variables):
    paths = flatten_dict(variables["batch_stats"], sep="/")
    return {path.rpartition("/")[0] for path in paths}


MODELS = {
    "resnet": (ResNet(5, stage_sizes=(1, 2), width=8), {""}),
    "bottleneck": (ResNet(5, stage_sizes=(1, 1), block="bottleneck", width=8), {""}),
    "vgg": (VGG(5, stage_sizes=(1, 2), width=4, norm="batch", stem="cifar"), {""}),
    "mobilenet": (MobileNetV2(5, width=4), {""}),
    # Which norms come after a convolution: the others begin a block.
    "densenet": (DenseNet(5, stage_sizes=(2, 1), width=8), {"norm2", "stem/norm1"}),
    "wide_resnet": (WideResNet(5, stage_sizes=(1, 1), widen=1, width=8), {"norm2"}),
    "iresnet": (
        IResNet(5, stage_sizes=(3,), width=4),
        {"norm1", "norm2", "norm3", "shortcut_norm"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay(name):
    model, ends = MODELS[name]
    images = random_images(h=32, w=32)
    variables = random_variables(model, images)
    folded = fold_batch_norm(model, variables, image_shape=SHAPE)
    apply = jax.jit(model.apply)
    expected = apply(variables, images)
    assert np.std(expected) > 0.05
    scale = np.abs(expected).max()
    np.testing.assert_allclose(apply(folded, images), expected, rtol=1e-5, atol=1e-5 * scale)
    found = folded_norms(folded)
    norms = {path for path in every_norm(variables) if path.endswith(tuple(ends))}
    if name == "iresnet":
        norms.discard("stage1/block3/norm3")  # after a sum
    assert found == norms
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    assert not folded_norms(variables)


def test_a_convolution_with_a_bias_takes_all():
    model, _ = MODELS["vgg"]
    variables = random_variables(model, np.zeros(SHAPE))
    folded = fold_batch_norm(model, variables, image_shape=SHAPE)
    assert np.all(folded["params"]["stage1"]["norm1"]["bias"] == 0)
    assert np.any(folded["params"]["stage1"]["conv1"]["bias"] != 0)


def test_kernels_are_those_of_the_formula():
    model, _ = MODELS["resnet"]
    variables = random_variables(model, np.zeros(SHAPE))
    folded = fold_batch_norm(model, variables, image_shape=SHAPE)
    before, after = variables["params"]["stem"], folded["params"]["stem"]
    stats = variables["batch_stats"]["stem"]["norm1"]
    for c in range(8):
        m = before["norm1"]["scale"][c] / np.sqrt(stats["var"][c] + 1e-5)
        expected = before["conv1"]["kernel"][..., c] * m
        np.testing.assert_allclose(after["conv1"]["kernel"][..., c], expected, rtol=1e-6)
        bias = before["norm1"]["bias"][c] - stats["mean"][c] * m
        np.testing.assert_allclose(after["norm1"]["bias"][c], bias, rtol=1e-5)


class Shared(nn.Module):
    """Convolutions whose norm is not their only reader, or not always the same."""

    kind: str

    @nn.compact
    def __call__(self, x, *, train=False):
        conv = nn.Conv(3, (3, 3), name="conv")
        axis = 1 if self.kind == "axis" else -1
        norm = nn.BatchNorm(use_running_average=True, axis=axis, name="norm")
        y = conv(x)
        if self.kind == "sum":
            return norm(y) + y
        if self.kind == "output":
            return norm(y), y
        if self.kind == "twice":
            return norm(conv(norm(y)))
        if self.kind == "activation":
            return norm(nn.relu(y))
        if self.kind == "shift":
            return norm(y + 1)
        if self.kind == "reshape":
            return norm(y.reshape(x.shape[0], -1, 2, 3))
        if self.kind == "half":
            return norm(y / 2)
        return norm(y)


@pytest.mark.parametrize(
    "kind", ["sum", "output", "twice", "activation", "shift", "half", "reshape", "axis"]
)
def test_what_must_stay_stays(kind):
    model = Shared(kind)
    variables = random_variables(model, jnp.zeros(SHAPE))
    with pytest.raises(ValueError, match="nothing to fold"):
        fold_batch_norm(model, variables, image_shape=SHAPE)


def test_the_plain_one_is_folded():
    variables = random_variables(Shared("plain"), jnp.zeros(SHAPE))
    folded = fold_batch_norm(Shared("plain"), variables, image_shape=SHAPE)
    assert folded_norms(folded) == {"norm"}


@pytest.mark.parametrize(
    "layer", [lambda x: x + x.mean(), lambda x: x * x.mean(), lambda x: x + 1, lambda x: -x]
)
def test_a_layer_between_convolution_and_norm_keeps_them_apart(layer):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(x)

    backbone, _ = MODELS["resnet"]
    model = Insert(backbone, {"stem/conv1": Layer(), "stage1": ECA()})
    images = random_images(h=32, w=32)
    variables = random_variables(model, images)
    folded = fold_batch_norm(model, variables, image_shape=SHAPE)
    left = every_norm(variables) - folded_norms(folded)
    assert left == {"backbone/stem/norm1"}
    apply = jax.jit(model.apply)
    expected = apply(variables, images)
    np.testing.assert_allclose(apply(folded, images), expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_norms_says_so():
    model = create_model("vgg16", num_classes=3, width=2, stem="cifar")
    variables = random_variables(model, np.zeros(SHAPE))
    with pytest.raises(ValueError, match="in VGG no batch norm directly follows"):
        fold_batch_norm(model, variables, image_shape=SHAPE)

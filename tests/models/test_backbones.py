"""What VGG, DenseNet, MobileNets and ConvNeXt promise alike, without computing anything.

Each family's own file has its values, names, training and relevance.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.layers import CBAM, AttentionZoom, SqueezeExcite
from attnzoom_jax.models import Insert
from attnzoom_jax.models.convnext import ConvNeXt
from attnzoom_jax.models.densenet import DenseNet
from attnzoom_jax.models.iresnet import IResNet
from attnzoom_jax.models.mobilenet import MobileNetV1, MobileNetV2
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.vgg import VGG
from attnzoom_jax.models.wide_resnet import WideResNet
from tests.models import test_resnet
from tests.models.backbone_checks import plain_variables, relevance_at

SMALL = {
    "vgg": VGG(7, stage_sizes=(1, 2, 1, 1, 1), norm="batch", width=8),
    "densenet": DenseNet(7, stage_sizes=(2, 1, 1, 1), width=8),
    "mobilenet_v1": MobileNetV1(7, width=8),
    "mobilenet_v2": MobileNetV2(7, width=8),
    "convnext": ConvNeXt(7, stage_sizes=(1, 2, 1, 1), width=8),
}
CHANNELS = {  # of stage1, stage2, ... at width 8
    "vgg": (8, 16, 32, 64, 64),
    "densenet": (16, 12, 10, 9),
    "mobilenet_v1": (32, 64, 128, 256),
    "mobilenet_v2": (6, 8, 24, 320),
    "convnext": (8, 16, 32, 64),
}
FIRST = {"imagenet": 4, "small": 2, "cifar": 1}  # how much smaller than the image stage1 is
STEM = {  # how much smaller the stem is, where not as stage1
    ("mobilenet_v1", "imagenet"): 2,
    ("mobilenet_v2", "imagenet"): 2,
}
RESIDUAL = {
    "resnet": ResNet(7, stage_sizes=(1, 1, 1, 1), block="bottleneck", width=8),
    "resnext": ResNet(7, stage_sizes=(1, 1, 1, 1), block="bottleneck", width=8, groups=4),
    "wide_resnet": WideResNet(7, stage_sizes=(1, 1, 1), widen=1, width=8),
    "iresnet": IResNet(7, stage_sizes=(2, 2), width=8),
}
families = pytest.mark.parametrize("family", SMALL)
tap_shapes = functools.cache(test_resnet.tap_shapes)


@families
@pytest.mark.parametrize("stem", FIRST)
def test_maps_of_every_stage(family, stem):
    taps = tap_shapes(dataclasses.replace(SMALL[family], stem=stem), (2, 64, 96, 3))
    assert taps[""].shape == taps["head"].shape == (2, 7)
    first = 2 if family == "vgg" else FIRST[stem]
    for i, channels in enumerate(CHANNELS[family]):
        part = first * 2**i
        assert taps[f"stage{i + 1}"].shape == (2, 64 // part, 96 // part, channels)
    if family != "vgg":
        part = STEM.get((family, stem), FIRST[stem])
        assert taps["stem"].shape == (2, 64 // part, 96 // part, 8)


@functools.cache
def parameters(model, shape=(1, 32, 32, 3)):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]


@families
def test_the_size_of_the_images_changes_no_parameter(family):
    model = SMALL[family]
    assert parameters(model, (1, 45, 67, 3)) == parameters(model)


@families
def test_the_stem_leaves_the_parameters_of_the_stages(family):
    def stages(stem):
        params = parameters(dataclasses.replace(SMALL[family], stem=stem))
        return {path: params[path] for path in params if path.startswith("stage")}

    assert stages("imagenet") == stages("small") == stages("cifar") != {}


@families
def test_zooms_at_every_stage_change_no_parameter_of_the_network(family):
    """All at once: after the i-th the maps are 2^i times as high and wide."""
    model = SMALL[family]
    stages = [f"stage{i + 1}" for i in range(len(CHANNELS[family]))]
    inside = "stage2/conv1" if family == "vgg" else "stage2/block1"
    paths = ["input", *stages, inside]
    images = jnp.zeros((1, 32, 32, 3))
    zoomed = Insert(model, {path: AttentionZoom() for path in paths})
    logits, variables = jax.eval_shape(zoomed.init_with_output, jax.random.key(0), images)
    assert logits.shape == (1, 7)
    assert variables["params"]["backbone"] == parameters(model)
    last = test_resnet.tap_shapes(zoomed, images.shape)[f"backbone/{stages[-1]}"]
    assert last.shape[1:3] == tuple(
        side * 2 ** len(paths) for side in tap_shapes(model, images.shape)[stages[-1]].shape[1:3]
    )


@families
def test_bfloat16_computes_with_float32_parameters_and_logits(family):
    model = dataclasses.replace(SMALL[family], dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    taps = tap_shapes(model, (2, 32, 32, 3))
    after_pool = {"", "head", "dropout", "head_norm"}
    for path, leaf in taps.items():
        assert leaf.dtype == (jnp.float32 if path in after_pool else jnp.bfloat16), path


@families
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "cfar"}, "stem 'cfar'.*did you mean 'cifar'"),
        ({"dtype": "bf16"}, "dtype 'bf16'.*bfloat16"),
        ({"width": 0}, "width=0"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_field_is_named(family, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL[family], **fields)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("vgg", {"stage_sizes": (1, 0)}, r"stage_sizes=\(1, 0\).*such as \(2, 2, 3, 3, 3\)"),
        ("vgg", {"norm": "btch"}, "norm 'btch'.*did you mean 'batch'"),
        ("vgg", {"dropout": 1.5}, "dropout=1.5.*such as 0.5"),
        ("densenet", {"stage_sizes": ()}, r"stage_sizes=\(\)"),
        ("densenet", {"width": 7}, "width=7.*even"),
        ("mobilenet_v1", {"dropout": -1}, "dropout=-1"),
        ("mobilenet_v2", {"dropout": 2}, "dropout=2"),
        ("mobilenet_v2", {"width": 6}, "width=6.*multiple of 4"),
        ("convnext", {"stage_sizes": (0,)}, r"stage_sizes=\(0,\)"),
        ("convnext", {"drop_path": 1.1}, "drop_path=1.1.*such as 0.1"),
    ],
)
def test_bad_field_of_a_family_is_named(family, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL[family], **fields)


@families
def test_image_without_batch_axis_is_refused(family):
    with pytest.raises(ValueError, match=r"\(8, 8, 3\).*\[n, h, w, c\]"):
        SMALL[family].init(jax.random.key(0), jnp.zeros((8, 8, 3)))


@pytest.mark.parametrize("family", ["vgg", "densenet", "convnext"])
def test_images_that_vanish_are_refused(family):
    images = jnp.zeros((1, 40, 16, 3))
    with pytest.raises(ValueError, match=r"\(1, 40, 16, 3\).* leave nothing"):
        jax.eval_shape(SMALL[family].init, jax.random.key(0), images)


@pytest.mark.parametrize("family", ["mobilenet_v1", "mobilenet_v2"])
def test_images_of_one_pixel_are_enough_for_a_mobilenet(family):
    assert tap_shapes(SMALL[family], (1, 1, 1, 3))["stage4"].shape[1:3] == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*SMALL, *RESIDUAL])
def test_excitation_backprop_accounts_for_all_relevance_with_attention_inside(family):
    """Gates pass relevance to the signal; none of it arrives in them, and none is lost in them."""
    model = (SMALL | RESIDUAL)[family]
    names = [name for name in tap_shapes(model, (2, 32, 32, 3)) if name.startswith("stage")]
    stages = sorted({name.partition("/")[0] for name in names})[1:]
    layers = {stage: (SqueezeExcite(2), CBAM(2))[i % 2] for i, stage in enumerate(stages)}
    gated = Insert(model, layers)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = plain_variables(gated, images)
    measure = relevance_at("backbone/stage1", model=gated, images=images, negative="clamp")
    at_tap, absolute, dropped = measure(variables)
    np.testing.assert_allclose(at_tap + dropped, 1, atol=1e-4)
    assert np.all(absolute < 1.01 + np.abs(dropped)) and np.all(dropped > -1e-4)

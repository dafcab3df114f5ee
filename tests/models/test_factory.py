"""Every model by name: published sizes, stable parameter paths, clear refusals.

The golden files list every parameter and statistic of a model. A path that changes breaks the
checkpoints people have; when that is meant, rewrite them and look at the difference:

    REGENERATE_GOLDEN=1 python -m pytest tests/models/test_factory.py -k golden
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.models.factory import MODEL_NAMES, WRAPPER_NAMES, create_model
from attnzoom_jax.models.resnet import ResNet

GOLDEN = pathlib.Path(__file__).parent / "golden"

# name: classes, parameters (statistics not counted).
PUBLISHED = {
    "resnet10": (1000, 5_418_792),
    "resnet18": (1000, 11_689_512),
    "resnet34": (1000, 21_797_672),
    "resnet50": (1000, 25_557_032),
    "resnet101": (1000, 44_549_160),
    "resnet152": (1000, 60_192_808),
    # Option A, the paper's 0.27M, 0.46M, 0.66M, 0.85M (its table 6).
    "cifar_resnet20": (10, 269_722),
    "cifar_resnet32": (10, 464_154),
    "cifar_resnet44": (10, 658_586),
    "cifar_resnet56": (10, 853_018),
    "resnext50_32x4d": (1000, 25_028_904),
    "se_resnet50": (1000, 28_088_024),
    "cbam_resnet50": (1000, 28_089_624),  # the paper's 28.09M; see test_attention_count below
    "wide_resnet28_10": (10, 36_479_194),
    "iresnet50": (1000, 25_557_032),  # the paper's 25.56M, exactly those of ResNet-50
    "vgg16": (1000, 138_357_544),
    "vgg16_bn": (1000, 138_365_992),
    "vgg19": (1000, 143_667_240),
    "vgg19_bn": (1000, 143_678_248),
    "densenet121": (1000, 7_978_856),
    "mobilenet_v1": (1000, 4_231_976),
    "mobilenet_v2": (1000, 3_504_872),
    "convnext_tiny": (1000, 28_589_128),
    # ResNet-18 without its head; convolution and norm of the masks, both layers of 40 sub-networks
    # of 8 channels, 40 heads.
    "multi_channel": (
        40,
        11_689_512
        - 1000 * 513
        + (9 * 512 * 512 + 2 * 512)
        + (512 * 320 + 320)
        + (40 * 8 * 512 + 40 * 512)
        + 40 * 513,
    ),
    # ResNet-50, and a number per channel for the attention and for the weights of the steps.
    "recursive_zoom": (1000, 25_557_032 + 2 * 2048),
    "two_stream": (200, 46_134_289),  # from the layers of the authors' code
}


# `resnet` is free-form.
NAMED = tuple(name for name in (*MODEL_NAMES, *WRAPPER_NAMES) if name != "resnet")


@functools.cache
def variable_shapes(name):
    model = create_model(name, num_classes=PUBLISHED[name][0])
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_every_model_is_counted():
    assert set(PUBLISHED) == set(NAMED)
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_published_parameter_count(name):
    assert count(variable_shapes(name)["params"]) == PUBLISHED[name][1]


@pytest.mark.parametrize("n", [3, 5, 7, 9])
def test_cifar_count_by_arithmetic(n):
    # Per stage 2n convolutions of 3x3, the first one of a later stage from half the channels.
    convs = 27 * 16 + sum(9 * c * c * 2 * n for c in (16, 32, 64)) - 9 * (32 * 16 + 64 * 32)
    norms = 2 * 16 + sum(2 * c * 2 * n for c in (16, 32, 64))
    head = 64 * 10 + 10
    assert convs + norms + head == PUBLISHED[f"cifar_resnet{6 * n + 2}"][1]


def test_attention_count_by_arithmetic():
    ends = [c for c, blocks in ((256, 3), (512, 4), (1024, 6), (2048, 3)) for _ in range(blocks)]
    excite = sum(2 * c * (c // 16) + c // 16 + c for c in ends)
    spatial = len(ends) * (7 * 7 * 2 + 2)
    plain = PUBLISHED["resnet50"][1]
    assert plain + excite == PUBLISHED["se_resnet50"][1]
    assert plain + excite + spatial == PUBLISHED["cbam_resnet50"][1]


@pytest.mark.parametrize("name", NAMED)
def test_golden_paths_and_shapes(name):
    leaves = jax.tree_util.tree_leaves_with_path(variable_shapes(name))
    lines = sorted(f"{'/'.join(k.key for k in path)} {list(leaf.shape)}" for path, leaf in leaves)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("REGENERATE_GOLDEN"):
        path.write_text("\n".join(lines) + "\n")
        pytest.skip(f"rewrote {path.name}")
    assert lines == path.read_text().splitlines()


@pytest.mark.parametrize("name", NAMED)
def test_tiny_version_of_every_model_has_float32_logits(name):
    model = create_model(name, num_classes=7, width=4, dtype="bfloat16")
    images = jnp.zeros((2, 32, 32, 3))
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


def test_options_override_what_the_name_stands_for():
    model = create_model(
        "resnet",
        num_classes=7,
        block="bottleneck",
        stem="cifar",
        width=8,
        stage_sizes=[1, 2],
        dtype="bfloat16",
    )
    expected = ResNet(
        num_classes=7,
        stem="cifar",
        stage_sizes=(1, 2),
        block="bottleneck",
        width=8,
        dtype="bfloat16",
    )
    assert model == expected
    hash(model)  # what jit needs of a static argument; a list would not do
    assert create_model("resnet50", num_classes=7).stage_sizes == (3, 4, 6, 3)


def test_unknown_name_lists_the_near_or_the_known():
    with pytest.raises(ValueError, match=r"unknown model 'resnet5'; did you mean .*'resnet50'"):
        create_model("resnet5", num_classes=7)
    with pytest.raises(ValueError, match=f"There is: {', '.join(MODEL_NAMES[:20])}"):
        create_model("zzz", num_classes=7)


@pytest.mark.parametrize(
    ("option", "near"), [("widht", "width"), ("zero_init", "zero_init_residual"), ("type", "dtype")]
)
def test_unknown_option_names_the_nearest(option, near):
    with pytest.raises(
        ValueError, match=f"unknown option of resnet18 '{option}'; did you mean '{near}'"
    ):
        create_model("resnet18", num_classes=7, **{option: 1})


@pytest.mark.parametrize("option", ["parent", "zzz"])
def test_option_without_a_near_match_is_refused_too(option):
    with pytest.raises(ValueError, match="There is: num_classes, stem"):
        create_model("resnet18", num_classes=7, **{option: 1})


def test_bad_value_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="did you mean 'imagenet'"):
        create_model("resnet18", num_classes=7, stem="imagnet")


@pytest.mark.parametrize("option", ["stage_sizes", "block", "shortcut"])
def test_a_name_keeps_what_makes_it_that_network(option):
    with pytest.raises(ValueError, match=f"{option} is what makes .* take the name 'resnet'"):
        create_model("cifar_resnet20", num_classes=7, **{option: 1})


@pytest.mark.parametrize(
    ("name", "option", "where"),
    [
        ("resnet50", "groups", "take the name 'resnet' and set block, groups, width_per_group"),
        ("se_resnet50", "attention", "take the name 'resnet' and set .*attention"),
        ("wide_resnet28_10", "widen", "build attnzoom_jax.models.wide_resnet.WideResNet"),
        ("iresnet50", "stage_sizes", "build attnzoom_jax.models.iresnet.IResNet"),
    ],
)
def test_the_error_says_where_to_set_it(name, option, where):
    with pytest.raises(ValueError, match=f"{option} is what makes {name} .*{where}"):
        create_model(name, num_classes=7, **{option: 1})


def test_an_option_of_none_is_the_names_own():
    options = {"stem": None, "width": None, "stage_sizes": None, "dtype": None}
    assert create_model("resnet34", num_classes=7, **options) == create_model(
        "resnet34", num_classes=7
    )


@pytest.mark.parametrize("layer", ["attention_zoom", {}, {"threshold": 0.5}])
def test_a_layer_without_its_name_is_one_clear_error(layer):
    with pytest.raises(ValueError, match=r"insert\.stage1 is .*expected the layer's name"):
        create_model("resnet18", num_classes=7, insert={"stage1": layer})

"""What the arrays of our backbones are called in published weights: one table per architecture.

A row is a path of ours and its name in a file. In the path `{s}`, `{b}` and `{i}` stand for the
numbers of stage, block and layer; the name may use them, the same less one (`{s0}`, `{b0}`, `{i0}`)
and what counts otherwise:

    {even} {odd}   2 s - 2 and 2 s - 1: ConvNeXt's stages and what is between them, in torchvision
    {run}          number of the block over all stages, from 1 (MobileNetV2 in torchvision)
    {conv:02}      number of the convolution over the network, from 0; the head is the last one
    {feature}      number in VGG's `features`, which counts convolutions, norms, ReLUs and pools

A path that ends in a module stands for its arrays, whose names then follow LEAVES; one that ends in
an array stands for that one, with its whole name. Where several rows match, the first of which the
file has the name counts: a table holds all the naming schemes that are in circulation.

Sources of the names: the `state_dict` of the models of torchvision and timm and of the authors'
code, as the docstring of each architecture's file lists them.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnzoom_jax.models.convnext import ConvNeXt
from attnzoom_jax.models.densenet import DenseNet
from attnzoom_jax.models.iresnet import IResNet
from attnzoom_jax.models.mobilenet import MobileNetV1, MobileNetV2
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.vgg import VGG
from attnzoom_jax.models.wide_resnet import WideResNet

Table = tuple[tuple[str, str], ...]

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

RESIDUAL: Table = (
    ("stem/conv1", "conv1"),
    ("stem/norm1", "bn1"),
    ("stage{s}/block{b}/conv{i}", "layer{s}.{b0}.conv{i}"),
    ("stage{s}/block{b}/norm{i}", "layer{s}.{b0}.bn{i}"),
    ("stage{s}/block{b}/shortcut_conv", "layer{s}.{b0}.downsample.0"),
    ("stage{s}/block{b}/shortcut_norm", "layer{s}.{b0}.downsample.1"),
    ("head", "fc"),
    ("head", "linear"),  # of CIFAR
)
RESNET: Table = (
    *RESIDUAL,
    ("stage{s}/block{b}/attention/fc{i}", "layer{s}.{b0}.se.fc{i}"),
    ("stage{s}/block{b}/attention/conv", "layer{s}.{b0}.se.conv"),
    ("stage{s}/block{b}/attention/conv", "layer{s}.{b0}.eca.conv"),
    ("stage{s}/block{b}/attention/channel/fc1", "layer{s}.{b0}.cbam.ChannelGate.mlp.1"),
    ("stage{s}/block{b}/attention/channel/fc2", "layer{s}.{b0}.cbam.ChannelGate.mlp.3"),
    ("stage{s}/block{b}/attention/spatial/conv", "layer{s}.{b0}.cbam.SpatialGate.spatial.conv"),
    ("stage{s}/block{b}/attention/spatial/norm", "layer{s}.{b0}.cbam.SpatialGate.spatial.bn"),
)
IRESNET: Table = (
    # Number 0 is the pool where the projection has one, and the convolution otherwise.
    ("stage{s}/block{b}/shortcut_norm", "layer{s}.{b0}.downsample.2"),
    ("stage{s}/block{b}/shortcut_norm", "layer{s}.{b0}.downsample.1"),
    ("stage{s}/block{b}/shortcut_conv", "layer{s}.{b0}.downsample.0"),
    ("stage{s}/block{b}/shortcut_conv", "layer{s}.{b0}.downsample.1"),
    *(row for row in RESIDUAL if "shortcut" not in row[0]),
)
WIDE_RESNET: Table = (
    # The authors' functional code, whose convolutions are tensors without a module.
    ("stem/conv1/kernel", "conv0"),
    ("stage{s}/block{b}/conv{i}/kernel", "group{s0}.block{b0}.conv{i0}"),
    ("stage{s}/block{b}/norm{i}", "group{s0}.block{b0}.bn{i0}"),
    ("stage{s}/block{b}/shortcut_conv/kernel", "group{s0}.block{b0}.convdim"),
    ("stage{s}/norm1", "bn"),
    # The module that robustness benchmarks share.
    ("stem/conv1", "conv1"),
    ("stage{s}/block{b}/conv{i}", "block{s}.layer.{b0}.conv{i}"),
    ("stage{s}/block{b}/norm{i}", "block{s}.layer.{b0}.bn{i}"),
    ("stage{s}/block{b}/shortcut_conv", "block{s}.layer.{b0}.convShortcut"),
    ("stage{s}/norm1", "bn1"),
    ("head", "fc"),
)
VGG_NAMES: Table = (
    ("stage{s}/conv{i}", "features.{feature}"),
    ("stage{s}/norm{i}", "features.{feature}"),
    ("classifier/fc1", "classifier.0"),
    ("classifier/fc2", "classifier.3"),
    ("head", "classifier.6"),
    # timm, where they are convolutions
    ("classifier/fc{i}", "pre_logits.fc{i}"),
    ("head", "head.fc"),
)
DENSENET: Table = (
    ("stem/conv1", "features.conv0"),
    ("stem/norm1", "features.norm0"),
    ("stage{s}/block{b}/conv{i}", "features.denseblock{s}.denselayer{b}.conv{i}"),
    ("stage{s}/block{b}/norm{i}", "features.denseblock{s}.denselayer{b}.norm{i}"),
    # files from before PyTorch 0.4, which are those that torchvision still gives out
    ("stage{s}/block{b}/conv{i}", "features.denseblock{s}.denselayer{b}.conv.{i}"),
    ("stage{s}/block{b}/norm{i}", "features.denseblock{s}.denselayer{b}.norm.{i}"),
    ("stage{s}/transition/conv1", "features.transition{s0}.conv"),
    ("stage{s}/transition/norm1", "features.transition{s0}.norm"),
    ("stage{s}/norm1", "features.norm5"),
    ("head", "classifier"),
)

# Convolutions in their order, their batch norms folded: what norms have left is a bias.
FOLDED: Table = (
    ("stem/conv1/kernel", "conv{conv:02}/kernel"),
    ("stem/norm1/bias", "conv{conv:02}/bias"),
    ("stage{s}/block{b}/conv{i}/kernel", "conv{conv:02}/kernel"),
    ("stage{s}/block{b}/norm{i}/bias", "conv{conv:02}/bias"),
    ("stage{s}/conv1/kernel", "conv{conv:02}/kernel"),
    ("stage{s}/norm1/bias", "conv{conv:02}/bias"),
    ("head/kernel", "conv{conv:02}/kernel"),
    ("head/bias", "conv{conv:02}/bias"),
)

# The first stage of ours is the first two of timm.
_V1_BLOCKS = {
    "stage1/block1": "blocks.0.0",
    "stage1/block2": "blocks.1.0",
    "stage1/block3": "blocks.1.1",
    "stage{s}/block{b}": "blocks.{s}.{b0}",
}
MOBILENET_V1: Table = (
    ("stem/conv1", "conv_stem"),
    ("stem/norm1", "bn1"),
    *(
        (f"{ours}/{layer}", f"{theirs}.{name}")
        for ours, theirs in _V1_BLOCKS.items()
        for layer, name in (("conv1", "conv_dw"), ("conv2", "conv_pw"), ("norm{i}", "bn{i}"))
    ),
    ("head", "classifier"),
    *FOLDED,
)
# timm starts a stage wherever the channels change.
_V2_BLOCKS = {
    "stage1/block2": "blocks.1.0",
    "stage1/block3": "blocks.1.1",
    **{f"stage2/block{b}": f"blocks.2.{b - 1}" for b in range(1, 4)},
    **{f"stage3/block{b}": f"blocks.3.{b - 1}" for b in range(1, 5)},
    **{f"stage3/block{b}": f"blocks.4.{b - 5}" for b in range(5, 8)},
    **{f"stage4/block{b}": f"blocks.5.{b - 1}" for b in range(1, 4)},
    "stage4/block4": "blocks.6.0",
}
MOBILENET_V2: Table = (
    ("stem/conv1", "features.0.0"),
    ("stem/norm1", "features.0.1"),
    # The first block has no expansion, and what follows counts from there.
    ("stage1/block1/conv2", "features.1.conv.0.0"),
    ("stage1/block1/norm2", "features.1.conv.0.1"),
    ("stage1/block1/conv3", "features.1.conv.1"),
    ("stage1/block1/norm3", "features.1.conv.2"),
    ("stage{s}/block{b}/conv1", "features.{run}.conv.0.0"),
    ("stage{s}/block{b}/norm1", "features.{run}.conv.0.1"),
    ("stage{s}/block{b}/conv2", "features.{run}.conv.1.0"),
    ("stage{s}/block{b}/norm2", "features.{run}.conv.1.1"),
    ("stage{s}/block{b}/conv3", "features.{run}.conv.2"),
    ("stage{s}/block{b}/norm3", "features.{run}.conv.3"),
    ("stage{s}/conv1", "features.18.0"),
    ("stage{s}/norm1", "features.18.1"),
    ("head", "classifier.1"),
    # timm
    ("stem/conv1", "conv_stem"),
    ("stem/norm1", "bn1"),
    ("stage1/block1/conv2", "blocks.0.0.conv_dw"),
    ("stage1/block1/norm2", "blocks.0.0.bn1"),
    ("stage1/block1/conv3", "blocks.0.0.conv_pw"),
    ("stage1/block1/norm3", "blocks.0.0.bn2"),
    *(
        (f"{ours}/{layer}", f"{theirs}.{name}")
        for ours, theirs in _V2_BLOCKS.items()
        for layer, name in (
            ("conv1", "conv_pw"),
            ("conv2", "conv_dw"),
            ("conv3", "conv_pwl"),
            ("norm{i}", "bn{i}"),
        )
    ),
    ("stage{s}/conv1", "conv_head"),
    ("stage{s}/norm1", "bn2"),
    ("head", "classifier"),
    *FOLDED,
)

CONVNEXT: Table = (
    ("stem/conv1", "features.0.0"),
    ("stem/norm1", "features.0.1"),
    ("stage{s}/downsample/norm1", "features.{even}.0"),
    ("stage{s}/downsample/conv1", "features.{even}.1"),
    ("stage{s}/block{b}/conv1", "features.{odd}.{b0}.block.0"),
    ("stage{s}/block{b}/norm1", "features.{odd}.{b0}.block.2"),
    ("stage{s}/block{b}/dense1", "features.{odd}.{b0}.block.3"),
    ("stage{s}/block{b}/dense2", "features.{odd}.{b0}.block.5"),
    ("stage{s}/block{b}/layer_scale/scale", "features.{odd}.{b0}.layer_scale"),
    ("head_norm", "classifier.0"),
    ("head", "classifier.2"),
    # timm
    ("stem/conv1", "stem.0"),
    ("stem/norm1", "stem.1"),
    ("stage{s}/downsample/norm1", "stages.{s0}.downsample.0"),
    ("stage{s}/downsample/conv1", "stages.{s0}.downsample.1"),
    ("stage{s}/block{b}/conv1", "stages.{s0}.blocks.{b0}.conv_dw"),
    ("stage{s}/block{b}/norm1", "stages.{s0}.blocks.{b0}.norm"),
    ("stage{s}/block{b}/dense{i}", "stages.{s0}.blocks.{b0}.mlp.fc{i}"),
    ("stage{s}/block{b}/layer_scale/scale", "stages.{s0}.blocks.{b0}.gamma"),
    ("head_norm", "head.norm"),
    ("head", "head.fc"),
    # the authors
    ("stem/conv1", "downsample_layers.0.0"),
    ("stem/norm1", "downsample_layers.0.1"),
    ("stage{s}/downsample/norm1", "downsample_layers.{s0}.0"),
    ("stage{s}/downsample/conv1", "downsample_layers.{s0}.1"),
    ("stage{s}/block{b}/conv1", "stages.{s0}.{b0}.dwconv"),
    ("stage{s}/block{b}/norm1", "stages.{s0}.{b0}.norm"),
    ("stage{s}/block{b}/dense{i}", "stages.{s0}.{b0}.pwconv{i}"),
    ("stage{s}/block{b}/layer_scale/scale", "stages.{s0}.{b0}.gamma"),
    ("head_norm", "norm"),
    ("head", "head"),
)

TABLES: Mapping[type, Table] = {
    ResNet: RESNET,
    WideResNet: WIDE_RESNET,
    IResNet: IRESNET,
    VGG: VGG_NAMES,
    DenseNet: DENSENET,
    MobileNetV1: MOBILENET_V1,
    MobileNetV2: MOBILENET_V2,
    ConvNeXt: CONVNEXT,
}


def weight_names(paths: Iterable[str], table: Table) -> dict[str, tuple[str, ...]]:
    """What the arrays of a backbone may be called in a file.

    Args:
        paths: of the arrays, below the backbone and without their collection, such as
            "stage1/block2/conv1/kernel".
        table: of the backbone's class, from TABLES.

    Returns:
        {path: names, the first that a file has is the one}; () for a path that no row matches.
    """
    paths = list(paths)
    modules = list(dict.fromkeys(path.rpartition("/")[0] for path in paths))
    counted = _counted(modules)
    rows = [(_pattern(key), key.rpartition("/")[2] in LEAVES, name) for key, name in table]
    names = {}
    for path in paths:
        module, _, leaf = path.rpartition("/")
        found = []
        for pattern, is_array, name in rows:
            match = pattern.fullmatch(path if is_array else module)
            if match:
                numbers = {letter: int(number) for letter, number in match.groupdict().items()}
                name = name.format(**numbers, **_derived(numbers), **counted[module])
                found.append(name if is_array else f"{name}.{LEAVES[leaf]}")
        names[path] = tuple(dict.fromkeys(found))
    return names


def has_form(name: str, table: Table) -> bool:
    """Whether a name in a file is one of a table's, whatever its numbers."""
    return any(pattern.fullmatch(name) for pattern in _forms(table))


@functools.cache
def _forms(table: Table) -> tuple[re.Pattern[str], ...]:
    forms = [re.sub(r"\\\{[^}]*\\\}", r"\\d+", re.escape(name)) for _, name in table]
    return tuple(re.compile(form + r"(\.\w+)?") for form in dict.fromkeys(forms))


def _pattern(key: str) -> re.Pattern[str]:
    """A row's path as a regular expression, its letters as groups."""
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(key)))


def _derived(numbers: Mapping[str, int]) -> dict[str, int]:
    less = {f"{letter}0": number - 1 for letter, number in numbers.items()}
    s = numbers.get("s", 0)
    return less | {"even": 2 * s - 2, "odd": 2 * s - 1}


def _counted(modules: Sequence[str]) -> dict[str, dict[str, int]]:
    """{module: the numbers that run over the whole network}."""
    modules = sorted(modules, key=_place)
    blocks = list(dict.fromkeys(b for m in modules if (b := _block(m))))
    convs = [m for m in modules if "conv" in m.rpartition("/")[2] or m == "head"]
    features = _vgg_features(modules)
    counted = {}
    for module in modules:
        conv = module.replace("norm", "conv")  # a norm has the number of its convolution
        counted[module] = {
            "run": blocks.index(_block(module)) + 1 if _block(module) else 0,
            "conv": convs.index(conv) if conv in convs else 0,
            "feature": features.get(module, 0),
        }
    return counted


def _place(module: str) -> tuple[Any, ...]:
    """A key that sorts modules as they are called: stem, stages, head; block2 before block10."""
    first = {"ste": 0, "sta": 1}.get(module[:3], 2)
    numbered = re.split(r"(\d+)", module)
    return (first, *(int(part) if part.isdigit() else part for part in numbered))


def _block(module: str) -> str:
    match = re.match(r"stage\d+/block\d+", module)
    return match[0] if match else ""


def _vgg_features(modules: Sequence[str]) -> dict[str, int]:
    """Numbers of convolutions and norms, where ReLUs and the pools after the stages count too."""
    numbers, number, before = {}, 0, "stage1"
    for module in modules:
        stage, _, layer = module.partition("/")
        if not re.fullmatch(r"conv\d+", layer) or not stage.startswith("stage"):
            continue
        number += stage != before
        before = stage
        numbers[module] = number
        norm = f"{stage}/{layer.replace('conv', 'norm')}"
        if norm in modules:
            number += 1
            numbers[norm] = number
        number += 2
    return numbers

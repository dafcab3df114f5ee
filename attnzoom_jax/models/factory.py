"""Every model of the package, by name.

A model is an entry of one table: its name and the call that builds it, with the fields that make it
what it is already filled in. What the caller passes fills in or overrides the rest. A second table
has the models that are built around one of these.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.factory import create_layer
from attnzoom_jax.models.attribute import AttributeModel, attribute_model
from attnzoom_jax.models.convnext import ConvNeXt
from attnzoom_jax.models.densenet import DenseNet
from attnzoom_jax.models.insert import Insert
from attnzoom_jax.models.iresnet import IResNet
from attnzoom_jax.models.mobilenet import MobileNetV1, MobileNetV2
from attnzoom_jax.models.recursive_zoom import RecursiveZoom
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.two_stream import TwoStream, two_stream
from attnzoom_jax.models.vgg import VGG
from attnzoom_jax.models.wide_resnet import WideResNet

# `resnet` is free; every other name fixes what makes it that network.
_basic = functools.partial(ResNet, block="basic")
_bottleneck = functools.partial(ResNet, block="bottleneck", groups=1, width_per_group=64)
_resnet50 = functools.partial(_bottleneck, stage_sizes=(3, 4, 6, 3))
_cifar_resnet = functools.partial(ResNet, stem="cifar", block="basic", shortcut="pad", width=16)
_vgg16 = functools.partial(VGG, stage_sizes=(2, 2, 3, 3, 3))
_vgg19 = functools.partial(VGG, stage_sizes=(2, 2, 4, 4, 4))

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "resnet10": functools.partial(_basic, stage_sizes=(1, 1, 1, 1)),
    "resnet18": functools.partial(_basic, stage_sizes=(2, 2, 2, 2)),
    "resnet34": functools.partial(_basic, stage_sizes=(3, 4, 6, 3)),
    "resnet50": _resnet50,
    "resnet101": functools.partial(_bottleneck, stage_sizes=(3, 4, 23, 3)),
    "resnet152": functools.partial(_bottleneck, stage_sizes=(3, 8, 36, 3)),
    # He et al. 2016, section 4.2: 6n + 2 layers.
    "cifar_resnet20": functools.partial(_cifar_resnet, stage_sizes=(3, 3, 3)),
    "cifar_resnet32": functools.partial(_cifar_resnet, stage_sizes=(5, 5, 5)),
    "cifar_resnet44": functools.partial(_cifar_resnet, stage_sizes=(7, 7, 7)),
    "cifar_resnet56": functools.partial(_cifar_resnet, stage_sizes=(9, 9, 9)),
    "resnext50_32x4d": functools.partial(_resnet50, groups=32, width_per_group=4),
    "se_resnet50": functools.partial(_resnet50, attention="squeeze_excite"),
    "cbam_resnet50": functools.partial(_resnet50, attention="cbam"),
    # Zagoruyko and Komodakis 2016: 6 * 4 + 4 layers, 10 times as wide.
    "wide_resnet28_10": functools.partial(WideResNet, stage_sizes=(4, 4, 4), widen=10),
    "iresnet50": functools.partial(IResNet, stage_sizes=(3, 4, 6, 3)),
    "vgg16": functools.partial(_vgg16, norm="none"),
    "vgg16_bn": functools.partial(_vgg16, norm="batch"),
    "vgg19": functools.partial(_vgg19, norm="none"),
    "vgg19_bn": functools.partial(_vgg19, norm="batch"),
    "densenet121": functools.partial(DenseNet, stage_sizes=(6, 12, 24, 16)),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "convnext_tiny": functools.partial(ConvNeXt, stage_sizes=(3, 3, 9, 3)),
}

FIXED = frozenset(
    {"stage_sizes", "block", "shortcut", "groups", "width_per_group", "attention", "widen", "norm"}
)
LINEN_FIELDS = ("parent", "name")


def _fields(model: type[nn.Module], *given: str) -> tuple[str, ...]:
    """The fields of a model's class that an option may set: all but linen's and those given."""
    names = [field.name for field in dataclasses.fields(model)]
    return tuple(name for name in names if name not in (*LINEN_FIELDS, *given))


MODEL_NAMES: tuple[str, ...] = tuple(_MODELS)

# name: (call that wraps a backbone, its options, the backbone it takes if none is named).
_WRAPPERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...], str]] = {
    "multi_channel": (
        attribute_model,
        _fields(AttributeModel, "backbone", "attributes"),
        "resnet18",
    ),
    "recursive_zoom": (RecursiveZoom, _fields(RecursiveZoom, "backbone"), "resnet50"),
    "two_stream": (
        two_stream,
        ("shared", "tap", *_fields(TwoStream, "global_trunk", "object_trunk", "num_classes")),
        "vgg19",
    ),
}
WRAPPER_NAMES: tuple[str, ...] = tuple(_WRAPPERS)


def create_model(
    name: str,
    *,
    num_classes: int,
    insert: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a classifier by name.

    The options are the fields of the model's class, and in a config the keys of `config.model`:

    | models                     | class       | options                                        |
    |----------------------------|-------------|------------------------------------------------|
    | resnet10 18 34 50 101 152  | ResNet      | stem="imagenet", width=64, zero_init_residual, |
    |                            |             | attention="" ("squeeze_excite", "eca",         |
    |                            |             | "cbam"), dtype                                 |
    | cifar_resnet20 32 44 56    | ResNet      | stem="cifar", width=16, and as above           |
    | resnext50_32x4d            | ResNet      | as resnet50                                    |
    | se_resnet50, cbam_resnet50 | ResNet      | as resnet50, but for attention                 |
    | resnet                     | ResNet      | stage_sizes, block, shortcut, groups,          |
    |                            |             | width_per_group, and as resnet50               |
    | wide_resnet28_10           | WideResNet  | stem="cifar", width=16, dropout=0.0, dtype     |
    | iresnet50                  | IResNet     | stem="imagenet", width=64, dtype               |
    | vgg16 19, vgg16_bn 19_bn   | VGG         | stem="imagenet", width=64, dropout=0.5, dtype, |
    |                            |             | fully_convolutional=False                      |
    | densenet121                | DenseNet    | stem="imagenet", width=64, dtype               |
    | mobilenet_v1               | MobileNetV1 | stem="imagenet", width=32, dropout=0.0, dtype  |
    | mobilenet_v2               | MobileNetV2 | stem="imagenet", width=32, dropout=0.2, dtype  |
    | convnext_tiny              | ConvNeXt    | stem="imagenet", width=96, drop_path=0.0,      |
    |                            |             | dtype                                          |

    Models around one of these take its name as the option `backbone`, and its options beside their
    own, which go first where both have one of a name:

    | models         | class          | options                                                    |
    |----------------|----------------|------------------------------------------------------------|
    | multi_channel  | AttributeModel | backbone="resnet18", tap="stage4", granularity,            |
    |                |                | application, transform, hidden, rank=8; num_classes is the |
    |                |                | number of attributes                                       |
    | recursive_zoom | RecursiveZoom  | backbone="resnet50", steps=2, tap="stage4", attention,     |
    |                |                | cells=31, fwhm=13.0, temperature=1.0, strength=1.0         |
    | two_stream     | TwoStream      | backbone="vgg19", shared=False (one trunk for both),       |
    |                |                | tap="" (after the last stage), steps=10, hidden=512,       |
    |                |                | aggregation, patch_source, eval_patch, patch_size=224,     |
    |                |                | add_on=1024, object_weight=1.0                             |

    Args:
        name: one of MODEL_NAMES or WRAPPER_NAMES.
        num_classes: logits per image, at least 1.
        insert: {path: {"name": layer, **its fields}}, layers to insert, as `Insert` takes them.
        **options: fields of the model, such as stem="cifar" or dtype="bfloat16"; a list is taken as
            a tuple. What is not given keeps the value that the name stands for.

    Returns:
        A linen module: `model.apply(variables, images, train=False)` maps images [n, h, w, c] to
        logits, float32 [n, k].

    Raises:
        ValueError: unknown name or option (the nearest ones are named), or a value out of range.
    """
    # Configs name every option, None where the model's own value is wanted, and hold lists, which
    # linen cannot hash.
    options = {key: value for key, value in options.items() if value is not None}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if name in _WRAPPERS:
        wrap, known, default = _WRAPPERS[name]
        backbone = options.pop("backbone", default)
        own = {option: options.pop(option) for option in known if option in options}
        model = wrap(_create(backbone, num_classes, options, also=("backbone", *known)), **own)
    elif name in _MODELS:
        model = _create(name, num_classes, options)
    else:
        raise unknown_name("model", name, (*MODEL_NAMES, *WRAPPER_NAMES))
    if not insert:
        return model
    for path, layer in insert.items():
        if not isinstance(layer, Mapping) or "name" not in layer:
            raise ValueError(
                f"insert.{path} is {layer!r}; expected the layer's name and fields, such as "
                '{"name": "attention_zoom", "threshold": 0.5}'
            )
    return Insert(model, {path: create_layer(**layer) for path, layer in insert.items()})


def _create(
    name: str, num_classes: int, options: Mapping[str, Any], also: tuple[str, ...] = ()
) -> nn.Module:
    """A model of the first table; `also` are options that its wrapper has."""
    if name not in _MODELS:
        raise unknown_name("backbone", name, MODEL_NAMES)
    create = _MODELS[name]
    fixed = FIXED.intersection(getattr(create, "keywords", ()))
    fields = [field for field in inspect.signature(create).parameters if field not in LINEN_FIELDS]
    for option in options:
        if option in fixed:
            raise ValueError(f"{option} is what makes {name} that network; {_free_form(create)}")
        if option not in fields:
            known = [*also, *(f for f in fields if f not in fixed)]
            raise unknown_name(f"option of {name}", option, known)
    return create(num_classes=num_classes, **options)


def _free_form(create: Any) -> str:
    """Where to set what a name fixes, for the end of an error."""
    if create.func is ResNet:
        return f"for another one take the name 'resnet' and set {', '.join(create.keywords)}"
    return f"for another one build {create.func.__module__}.{create.func.__name__}"

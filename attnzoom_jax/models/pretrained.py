"""Published weights into our models.

    model = create_model("resnet50", num_classes=200)
    variables = load_pretrained(model, "resnet50.pth", key=key, image_shape=(1, 224, 224, 3))

What a file holds is found by `weight_files`, what of it goes where, and in what layout, by
`weight_match`, with the names of `weight_names`.

A file written under our own names, `params/stem/conv1/kernel`, is read too, also for the layers of
an `Insert`. A model that holds several networks, as `TwoStream` does, gets the file into each.

Preprocessing is part of the weights: torchvision's expect RGB in [0, 1], less its mean and over its
deviation; MobileNets from TensorFlow expect [-1, 1] and `padding="tf"`.

A layer that is inserted changes what the network computes unless it begins as the identity:
SqueezeExcite, ECA and CBAM do with `identity_init=True`, exactly. AttentionZoom and ZoomWarp
cannot: a mask is below 1 and the map is resampled, so that the network has to be fine-tuned.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from attnzoom_jax.models.factory import LINEN_FIELDS, MODEL_NAMES, create_model
from attnzoom_jax.models.features import Features
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.weight_files import read_weights
from attnzoom_jax.models.weight_match import (
    Found,
    Place,
    match_arrays,
    matched_share,
    path_inside,
    wanted_paths,
)
from attnzoom_jax.models.weight_names import TABLES, has_form

# What wrappers put before every name; several may stand in a row.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
IGNORED = ("num_batches_tracked",)  # torch's counter, which nothing reads

# Below this share of the model's arrays found in the file, or of the file's arrays used, the two
# are taken for different networks.
LEAST_SHARE = 0.85
LISTED = 8  # names in a message before it is cut short


def load_pretrained(
    model: nn.Module, path: str, *, key: jax.Array, image_shape: Sequence[int]
) -> dict[str, Any]:
    """Variables of a model with the weights of a file where the file has them.

    Prints, by name, what was loaded, what is newly initialised, and what of the file was not used.
    Newly initialised are, without an error: what a wrapper (`Insert`, `TwoStream`, `RecursiveZoom`)
    adds to its backbone, attention inside the blocks that the file does not have, and the head
    where its shape differs (another number of classes).

    Args:
        model: of `create_model`, or modules around such ones.
        path: a file of weights with the names of torchvision, timm or the authors' code, or our
            own: .pth, .pt, .th, .safetensors or .npz, as `read_weights` takes them. Prefixes such
            as "module." and wrappers such as {"state_dict": ...} are understood.
        key: PRNG key of what is newly initialised.
        image_shape: [n, h, w, c] or [h, w, c] of the images that the model sees.

    Returns:
        Variables as of `model.init`, float32: {"params": ..., "batch_stats": ...}, the latter only
        where the model has such.

    Raises:
        ValueError: a file that `read_weights` refuses; a model without a table of names; arrays of
            other shapes (given and expected are listed); a file of another network (the one
            that it fits best is named).
    """
    images = _image_shape(image_shape)
    places = _backbones(model)
    families = {type(place.module) for place in places}
    if len(families) != 1:
        known = ", ".join(family.__name__ for family in TABLES)
        found = ", ".join(sorted(family.__name__ for family in families)) or "none"
        raise ValueError(
            f"load_pretrained: expected a network of one family with known names ({known}), "
            f"{type(model).__name__} holds {found}"
        )
    family = families.pop()
    file = _without_prefixes(read_weights(path))
    shapes = _shapes(model, images)
    found = Found()
    for place in places:
        here = match_arrays(file, shapes, place)
        if here.wrong_shapes or matched_share(here, file, shapes, place) < LEAST_SHARE:
            raise ValueError(_misfit(path, family, here, file, shapes))
        lacking = [name for name in wanted_paths(shapes, place) if name not in here.arrays]
        if lacking:
            raise ValueError(
                f"{path} lacks {len(lacking)} arrays of the network ({family.__name__}): "
                f"{_shortened(lacking)}; is the file complete?"
            )
        found.add(here)

    missing = [name for name in shapes if name not in found.arrays]

    def rest(key: jax.Array) -> dict[str, jax.Array]:
        # The rest of the network is dead code to the compiler, so that this takes little.
        variables = _init(model, key, images)
        return {name: variables[name] for name in missing}

    new = jax.jit(rest)(key) if missing else {}
    if jax.process_index() == 0:
        prefixes = [place.prefix for place in places]
        print(_summary(path, found, missing, file, prefixes), flush=True)
    loaded = {name: jnp.asarray(array, jnp.float32) for name, array in found.arrays.items()}
    return unflatten_dict({name: (loaded | new)[name] for name in shapes}, sep="/")


def count_classes(model: nn.Module, path: str, *, image_shape: Sequence[int]) -> int:
    """How many classes the head in a file of weights tells apart.

    Args:
        model: with any number of classes, as of `load_pretrained`.
        path: as of `load_pretrained`.
        image_shape: as of `load_pretrained`.

    Returns:
        Their number; 0 where the file has no head, or is of another network.

    Raises:
        ValueError: a file that `read_weights` refuses.
    """
    file = _without_prefixes(read_weights(path))
    shapes = _shapes(model, _image_shape(image_shape))
    found = Found()
    for place in _backbones(model):
        found.add(match_arrays(file, shapes, place))
    return found.classes


def _misfit(
    path: str,
    family: type,
    found: Found,
    file: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> str:
    """The error for a file that does not fit the model."""
    best = _best_fit(file)
    advice = f"; the file fits {best} best" if best else ""
    if found.wrong_shapes:
        head = f"{path} does not fit the model ({family.__name__}), given and expected"
        lines = _shortened(found.wrong_shapes, separator="\n  ")
        return f"{head}:\n  {lines}\n{len(found.wrong_shapes)} shapes differ{advice}"
    unused = sorted(name for name in file if name not in found.used)
    return (
        f"{path} is of another network than the model ({family.__name__}): "
        f"{len(found.arrays)} of the model's {len(shapes)} arrays are in the file, and "
        f"{len(unused)} of the file's {len(file)} have no place in the model"
        + (f" ({_shortened(unused[:3])}, ...)" if unused else "")
        + (advice or "; its names are of no network that is known")
    )


def _best_fit(file: Mapping[str, np.ndarray]) -> str:
    """The name of the model that a file fits best; "" where it fits none."""
    share = {
        family: sum(has_form(name, table) for name in file) / len(file)
        for family, table in TABLES.items()
    }
    scores = {}
    for name in MODEL_NAMES:
        model = create_model(name, num_classes=1)
        if name == "resnet" or share[type(model)] < max(*share.values(), 0.5):
            continue
        shapes = _published_shapes(name)
        found = match_arrays(file, shapes, Place(model, prefix="", is_whole=True))
        scores[name] = len(found.arrays) / max(len(shapes), len(file))
    best = max(scores, key=lambda name: scores[name], default="")
    return best if best and scores[best] > 0.5 else ""


@functools.cache
def _published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return _shapes(create_model(name, num_classes=1), (1, 64, 64, 3))


def _summary(
    path: str,
    found: Found,
    missing: Sequence[str],
    file: Mapping[str, np.ndarray],
    prefixes: Sequence[str],
) -> str:
    """What was loaded, is new, and was not used."""
    inside = (
        next((short for prefix in prefixes if (short := path_inside(name, prefix))), "inserted")
        for name in found.arrays
    )
    parts = collections.Counter(name.partition("/")[0] for name in inside)
    loaded = ", ".join(f"{part} {count}" for part, count in parts.items())
    folded = f" ({found.folded} batch norms are folded in the file)" if found.folded else ""
    new = [name for name in missing if name.partition("/")[0] in ("params", "batch_stats")]
    modules = dict.fromkeys(name.partition("/")[2].rpartition("/")[0] for name in new)
    head = f" (head: {found.head})" if found.head else ""
    unused = sorted(name for name in file if name not in found.used)
    return "\n".join(
        [
            f"{path}:",
            f"  loaded             {len(found.arrays)} arrays: {loaded}{folded}",
            f"  newly initialised  {len(new)}: {_shortened(list(modules)) or 'none'}{head}",
            f"  unused             {len(unused)}: {_shortened(unused) or 'none'}",
        ]
    )


def _shortened(names: Sequence[str], separator: str = ", ") -> str:
    rest = len(names) - LISTED
    more = [f"... and {rest} more"] if rest > 0 else []
    return separator.join([*names[:LISTED], *more])


def _without_prefixes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under their own names, without those that nothing reads."""
    stripped = {}
    for name, array in arrays.items():
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
        if name in stripped:
            raise ValueError(
                f"the file has {name!r} under several prefixes; it holds more than one network, "
                "save the one that you mean alone"
            )
        if name.rpartition(".")[2] not in IGNORED:
            stripped[name] = array
    return stripped


def _backbones(model: nn.Module, prefix: str = "", is_whole: bool = True) -> list[Place]:
    """The networks with known names inside of a model: itself, or its fields' own."""
    if type(model) in TABLES:
        return [Place(model, prefix, is_whole)]
    is_whole = is_whole and not isinstance(model, Features)
    fields = ((field.name, getattr(model, field.name)) for field in dataclasses.fields(model))
    return [
        place
        for name, value in fields
        if isinstance(value, nn.Module) and name not in LINEN_FIELDS
        for place in _backbones(value, f"{prefix}{name}/", is_whole)
    ]


def _image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) not in (3, 4):
        raise ValueError(
            f"image_shape={tuple(shape)}: expected [n, h, w, c] or [h, w, c], such as "
            "(1, 224, 224, 3)"
        )
    return (1, *shape[-3:])


def _shapes(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    leaves = jax.eval_shape(lambda: _init(model, jax.random.key(0), image_shape))
    return {path: leaf.shape for path, leaf in leaves.items()}


def _init(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """{path with its collection: array} of new variables."""
    train: Any = train_argument(model, False)
    rngs = {"params": key, "dropout": key}
    return flatten_dict(model.init(rngs, jnp.zeros(image_shape), **train), sep="/")

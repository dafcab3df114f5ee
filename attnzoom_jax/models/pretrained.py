"""Published weights into our models.

    model = create_model("resnet50", num_classes=200)
    variables = load_pretrained(model, "resnet50.pth", key=key, image_shape=(1, 224, 224, 3))

Names come from `weight_names`, files from `weight_files`. torch keeps other layouts than we do:

| array                 | torch                   | here                                |
|-----------------------|-------------------------|-------------------------------------|
| convolution           | [out, in / g, h, w]     | [h, w, in / g, out]                 |
| depthwise             | [c, 1, h, w]            | [h, w, 1, c]                        |
| along the channels    | [out, in, k]            | [k, in, out]                        |
| linear                | [out, in]               | [in, out]                           |
| linear as convolution | [out, in, h, w]         | [in * h * w, out], channels first   |
| layer scale           | [c, 1, 1] or [c]        | [c]                                 |

Arrays whose name ends in "kernel" are taken as they are. Where a file has its batch norms folded
into the convolutions before them, the bias becomes that of a norm which does nothing else.

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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from attnzoom_jax.models.blocks import Norm
from attnzoom_jax.models.factory import LINEN_FIELDS, MODEL_NAMES, create_model
from attnzoom_jax.models.features import Features
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.weight_files import read_weights
from attnzoom_jax.models.weight_names import TABLES, has_form, weight_names

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
    found = _Found()
    for place in places:
        here = _find(file, shapes, family, place.prefix)
        if here.wrong_shapes or _share(here, file, shapes, family, place) < LEAST_SHARE:
            raise ValueError(_misfit(path, family, here, file, shapes))
        lacking = [name for name in _wanted(shapes, place) if name not in here.arrays]
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


@dataclasses.dataclass
class _Found:
    """What of a file goes where.

    Attributes:
        arrays: {path of ours with its collection: array}, in our layout and the file's type.
        used: names in the file, also of a head that does not fit.
        wrong_shapes: a line for each array that does not fit.
        folded: number of norms that the file has folded.
        head: why the head is new; "" where it is not, or the file has none.
    """

    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    wrong_shapes: list[str] = dataclasses.field(default_factory=list)
    folded: int = 0
    head: str = ""

    def add(self, other: "_Found") -> None:
        """What was found for another network of the same model."""
        self.arrays |= other.arrays
        self.used |= other.used
        self.folded += other.folded
        self.head = self.head or other.head


@dataclasses.dataclass(frozen=True)
class _Place:
    """A network inside of a model.

    Attributes:
        module: the network.
        prefix: of the paths of its variables.
        is_whole: whether it is used to its end, rather than up to a tap.
    """

    module: nn.Module
    prefix: str
    is_whole: bool


def _find(
    file: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], family: type, prefix: str
) -> _Found:
    """Match a file's arrays with those of a model."""
    found = _Found()
    candidates = _candidates(shapes, family, prefix)
    heads: dict[str, np.ndarray] = {}
    for path, shape in shapes.items():
        name = next((name for name in candidates[path] if name in file), None)
        if name is None:
            continue
        found.used.add(name)
        array = _to_our_layout(file[name], name, path, shape)
        if _is_head(path, prefix):
            heads[path] = array
        elif array.shape == shape:
            found.arrays[path] = array
        else:
            given = list(file[name].shape)
            here = "" if array.shape == file[name].shape else f", here {list(array.shape)}"
            found.wrong_shapes.append(f"{name} {given}{here}: expected {list(shape)} for {path}")
    for path, array in heads.items():
        if array.shape != shapes[path]:
            found.head = f"the file's is {list(array.shape)}, the model's {list(shapes[path])}"
    if not found.head:
        found.arrays |= heads
    _fill_folded_norms(found, shapes)
    return found


def _candidates(
    shapes: Mapping[str, tuple[int, ...]], family: type, prefix: str
) -> dict[str, tuple[str, ...]]:
    """{path with its collection: names that it may have in a file}."""
    inside = {path: _inside(path, prefix) for path in shapes}
    tables = weight_names([name for name in inside.values() if name], TABLES[family])
    candidates = {}
    for path, name in inside.items():
        collection = path.partition("/")[0]
        own = (path, f"{collection}/{name}") if name else (path,)
        candidates[path] = (*tables.get(name, ()), *own)
    return candidates


def _inside(path: str, prefix: str) -> str:
    """The path below the backbone and without its collection; "" outside of the backbone."""
    path = path.partition("/")[2]
    return path.removeprefix(prefix) if path.startswith(prefix) else ""


def _is_head(path: str, prefix: str) -> bool:
    return _inside(path, prefix) in ("head/kernel", "head/bias")


def _to_our_layout(array: np.ndarray, name: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a file in our layout, see the top of this file; a view where that can be."""
    if path.endswith("/kernel") and not name.endswith("kernel") and array.ndim > 1:
        if len(shape) == 2:
            array = array.reshape(array.shape[0], -1)
        array = array.transpose(*range(2, array.ndim), 1, 0)
    if array.ndim != len(shape) and _without_ones(array.shape) == _without_ones(shape):
        array = array.reshape(shape)
    elif path.endswith("/kernel") and (array.ndim, len(shape)) == (4, 2):
        array = array.reshape(-1, array.shape[-1])  # a head as a 1x1 convolution, in our layout
    return array


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _fill_folded_norms(found: _Found, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Batch norms of which the file has the bias alone do nothing but add it."""
    values = {"scale": 1.0, "mean": 0.0, "var": 1.0 - Norm.keywords["epsilon"]}
    for path in list(found.arrays):
        collection, _, name = path.partition("/")
        module, _, leaf = name.rpartition("/")
        others = {
            f"{'params' if other == 'scale' else 'batch_stats'}/{module}/{other}": value
            for other, value in values.items()
        }
        is_norm = collection == "params" and leaf == "bias" and others.keys() <= shapes.keys()
        if is_norm and not others.keys() & found.arrays.keys():
            found.folded += 1
            for other, value in others.items():
                found.arrays[other] = np.full(shapes[other], value, np.float32)


def _share(
    found: _Found,
    file: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    family: type,
    place: _Place,
) -> float:
    """How much of the network the file has, or of the file the network: what is less."""
    wanted = _wanted(shapes, place)
    given = [name for name in file if has_form(name, TABLES[family])]
    have = sum(path in found.arrays for path in wanted) / max(len(wanted), 1)
    if not given or not place.is_whole:  # under our own names, or under no known ones
        return have
    return min(have, sum(name in found.used for name in given) / len(given))


def _wanted(shapes: Mapping[str, tuple[int, ...]], place: _Place) -> list[str]:
    """The arrays of a network that a file must have: all but head and attention in its blocks."""
    return [
        path
        for path in shapes
        if (name := _inside(path, place.prefix))
        and not _is_head(path, place.prefix)
        and "/attention/" not in name
    ]


def _misfit(
    path: str,
    family: type,
    found: _Found,
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
        family = type(create_model(name, num_classes=1))
        if name == "resnet" or share[family] < max(*share.values(), 0.5):
            continue
        shapes = _published_shapes(name)
        found = _find(file, shapes, family, "")
        scores[name] = len(found.arrays) / max(len(shapes), len(file))
    best = max(scores, key=lambda name: scores[name], default="")
    return best if best and scores[best] > 0.5 else ""


@functools.cache
def _published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return _shapes(create_model(name, num_classes=1), (1, 64, 64, 3))


def _summary(
    path: str,
    found: _Found,
    missing: Sequence[str],
    file: Mapping[str, np.ndarray],
    prefixes: Sequence[str],
) -> str:
    """What was loaded, is new, and was not used."""
    inside = (
        next((short for prefix in prefixes if (short := _inside(name, prefix))), "inserted")
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


def _backbones(model: nn.Module, prefix: str = "", is_whole: bool = True) -> list[_Place]:
    """The networks with known names inside of a model: itself, or its fields' own."""
    if type(model) in TABLES:
        return [_Place(model, prefix, is_whole)]
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

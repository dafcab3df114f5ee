"""Which array of a file of weights goes where in a network, and in what layout.

Published weights are torch's, which keeps other layouts than we do:

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
"""

import dataclasses
from collections.abc import Iterable, Mapping

import flax.linen as nn
import numpy as np

from attnzoom_jax.models.blocks import Norm
from attnzoom_jax.models.weight_names import TABLES, has_form, weight_names


@dataclasses.dataclass
class Found:
    """What of a file goes where.

    Attributes:
        arrays: {path of ours with its collection: array}, in our layout and the file's type.
        used: names in the file, also of a head that does not fit.
        wrong_shapes: a line for each array that does not fit.
        folded: number of norms that the file has folded.
        head: why the head is new; "" where it is not, or the file has none.
        classes: of the file's head; 0 where it has none.
    """

    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    wrong_shapes: list[str] = dataclasses.field(default_factory=list)
    folded: int = 0
    head: str = ""
    classes: int = 0

    def add(self, other: "Found") -> None:
        """What was found for another network of the same model."""
        self.arrays |= other.arrays
        self.used |= other.used
        self.folded += other.folded
        self.head = self.head or other.head
        self.classes = self.classes or other.classes


@dataclasses.dataclass(frozen=True)
class Place:
    """A network inside of a model.

    Attributes:
        module: the network.
        prefix: of the paths of its variables.
        is_whole: whether it is used to its end, rather than up to a tap.
    """

    module: nn.Module
    prefix: str
    is_whole: bool


def match_arrays(
    file: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], place: Place
) -> Found:
    """Match a file's arrays with those of a model.

    Args:
        file: {name: array}, in the file's layout.
        shapes: {path with its collection: shape} of all that the model has.
        place: the network of the model that the file is of.

    Returns:
        What was found; a head that does not fit is left out, and not an error.
    """
    found = Found()
    candidates = _candidates(shapes, place)
    heads: dict[str, np.ndarray] = {}
    for path, shape in shapes.items():
        name = next((name for name in candidates[path] if name in file), None)
        if name is None:
            continue
        found.used.add(name)
        array = _to_our_layout(file[name], name, path, shape)
        if _is_head(path, place.prefix):
            heads[path] = array
        elif array.shape == shape:
            found.arrays[path] = array
        else:
            given = list(file[name].shape)
            here = "" if array.shape == file[name].shape else f", here {list(array.shape)}"
            found.wrong_shapes.append(f"{name} {given}{here}: expected {list(shape)} for {path}")
    for path, array in heads.items():
        found.classes = array.shape[-1]
        if array.shape != shapes[path]:
            found.head = f"the file's is {list(array.shape)}, the model's {list(shapes[path])}"
    if not found.head:
        found.arrays |= heads
    _fill_folded_norms(found, shapes)
    return found


def matched_share(
    found: Found,
    file: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    place: Place,
) -> float:
    """How much of the network the file has, or of the file the network: what is less.

    Args:
        found: by `match_arrays`.
        file: as for `match_arrays`.
        shapes: as for `match_arrays`.
        place: as for `match_arrays`; one that is not used to its end need not have all of the file.

    Returns:
        A share in [0, 1].
    """
    wanted = wanted_paths(shapes, place)
    given = [name for name in file if has_form(name, TABLES[type(place.module)])]
    have = sum(path in found.arrays for path in wanted) / max(len(wanted), 1)
    if not given or not place.is_whole:  # under our own names, or under no known ones
        return have
    return min(have, sum(name in found.used for name in given) / len(given))


def wanted_paths(shapes: Mapping[str, tuple[int, ...]], place: Place) -> list[str]:
    """The arrays of a network that a file must have: all but head and attention in its blocks.

    Args:
        shapes: as for `match_arrays`.
        place: as for `match_arrays`.

    Returns:
        Their paths with their collections.
    """
    return [
        path
        for path in shapes
        if (name := path_inside(path, place.prefix))
        and not _is_head(path, place.prefix)
        and "/attention/" not in name
    ]


def path_inside(path: str, prefix: str) -> str:
    """The path below a network and without its collection; "" outside of the network.

    Args:
        path: with its collection, `params/backbone/stem/conv1/kernel`.
        prefix: of the network, `backbone/`.

    Returns:
        Here `stem/conv1/kernel`.
    """
    path = path.partition("/")[2]
    return path.removeprefix(prefix) if path.startswith(prefix) else ""


def _candidates(shapes: Mapping[str, tuple[int, ...]], place: Place) -> dict[str, tuple[str, ...]]:
    """{path with its collection: names that it may have in a file}."""
    names = {path: path_inside(path, place.prefix) for path in shapes}
    tables = weight_names([name for name in names.values() if name], TABLES[type(place.module)])
    candidates = {}
    for path, name in names.items():
        collection = path.partition("/")[0]
        own = (path, f"{collection}/{name}") if name else (path,)
        candidates[path] = (*tables.get(name, ()), *own)
    return candidates


def _is_head(path: str, prefix: str) -> bool:
    return path_inside(path, prefix) in ("head/kernel", "head/bias")


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


def _fill_folded_norms(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> None:
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

"""Where arrays live: a mesh of all devices, with batches split over its axis "data".

Everything else is whole on every device, but for parameters that the config's rules split over the
axis "model", for heads too wide for one device. Models never know of devices: jit inserts the
communication, so that BatchNorm statistics under a mesh are those of the global batch.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.training.paths import matching, path_of

AXES = ("data", "model")
Rules = Sequence[tuple[str, Sequence[str | None]]]


def create_mesh(devices: Any = None, *, shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh with the axes "data" and "model".

    Args:
        devices: to take; None for all.
        shape: `config.mesh`, {axis: number of devices}, -1 for what remains; None: all to "data".

    Returns:
        The mesh. The devices of a process stand together along "data", so that the global batch is
        what the processes hold, one after the other.

    Raises:
        ValueError: unknown axis, a shape that the devices do not fill, or a "model" axis that
            reaches over several processes, of which each reads its own examples.
    """
    devices = jax.devices() if devices is None else list(devices)
    data, model = _sizes({"data": -1, "model": 1, **(shape or {})}, len(devices))
    devices = sorted(devices, key=lambda device: device.process_index)
    table = np.array(devices, object).reshape(data, model)
    if any(len({device.process_index for device in row}) > 1 for row in table):
        raise ValueError(
            f"mesh.model={model} reaches over several processes; take a divisor of the devices "
            f"that each of them has, {sum(d.process_index == 0 for d in devices)}"
        )
    # Auto axes: with Explicit ones plain integer indexing raises.
    return Mesh(table, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(shape: Mapping[str, int], count: int) -> tuple[int, int]:
    """Both axes of the mesh of `count` devices."""
    for axis in shape:
        if axis not in AXES:
            raise unknown_name("axis in config.mesh", axis, AXES)
    data, model = (shape[axis] for axis in AXES)
    known = math.prod(size for size in (data, model) if size != -1)
    rest = count // known if known > 0 else 0
    sizes = (rest if data == -1 else data, rest if model == -1 else model)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise ValueError(
            f"mesh.data={data} and mesh.model={model} do not share out {count} devices; take two "
            "numbers of which that is the product, or -1 for one of them"
        )
    return sizes


def mesh_anywhere(shape: Mapping[str, int] | None) -> Mesh:
    """The mesh of `config.mesh` as far as the devices at hand allow.

    A run is evaluated wherever its parameters find room: its axis "model" may become shorter, the
    axis "data" takes the rest.
    """
    model = max(1, (shape or {}).get("model", 1))
    return create_mesh(shape={"model": math.gcd(model, jax.local_device_count())})


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_example(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the first axis over the axis "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_by_rules(tree: Any, *, params: Any, rules: Rules, mesh: Mesh) -> Any:
    """The sharding of each array of a state.

    Args:
        tree: a state, or the variables of a model: arrays or shapes.
        params: the parameters in it.
        rules: `config.sharding`, pairs (pattern, axes) such as ("head/kernel", (None, "model")).
            The first pattern that matches the whole path of a parameter decides along which of the
            array's axes it is split, None for not; what no pattern matches is whole everywhere.
        mesh: with the axes that the rules name.

    Returns:
        A tree of shardings. What ends in the path of a parameter and has its shape, as the
        optimiser's moments and averaged parameters have, lives like that parameter.

    Raises:
        ValueError: a pattern that matches nothing, an unknown axis, more axes than the array has, a
            size that is no multiple of the devices along the mesh's axis.
    """
    places = check_rules(params, rules, mesh)

    def place(keys: Any, leaf: Any) -> NamedSharding:
        parts = path_of(keys).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        found = (places[end] for end in ends if end in places)
        spec = next((spec for shape, spec in found if shape == leaf.shape), PartitionSpec())
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def check_rules(
    params: Any, rules: Rules, mesh: Mesh
) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    """The parameters that rules split, as {path: (shape, how)}; ValueErrors of `split_by_rules`."""
    shapes = {path_of(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(params)}
    places: dict[str, tuple[tuple[int, ...], PartitionSpec]] = {}
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2 or isinstance(rule[1], str):
            raise ValueError(
                f"config.sharding: {rule!r} is no rule; expected a tuple of pairs (pattern, axes), "
                "such as (('head/kernel', (None, 'model')),)"
            )
        pattern, axes = rule
        for path in sorted(matching(pattern, shapes, "config.sharding") - places.keys()):
            _check_split(path, shapes[path], axes, mesh)
            places[path] = shapes[path], PartitionSpec(*axes)
    return places


def _check_split(path: str, shape: tuple[int, ...], axes: Sequence[Any], mesh: Mesh) -> None:
    if len(axes) > len(shape):
        raise ValueError(
            f"config.sharding: {path} {list(shape)} has {len(shape)} axes, and the rule "
            f"{tuple(axes)} names {len(axes)}; take at most as many"
        )
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and axis not in AXES:
            raise unknown_name("axis in config.sharding", axis, AXES)
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"config.sharding: {path} {list(shape)} cannot be split into {mesh.shape[axis]} "
                f"along {axis!r}, as {size} is no multiple of that; change config.mesh.{axis}, or "
                "leave the rule out"
            )


def check_batch_size(batch_size: int, mesh: Mesh, *, key: str = "data.batch_size") -> None:
    """Raise a ValueError, naming the config's key, if a batch does not split over the mesh."""
    parts = mesh.shape["data"]
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"{key}={batch_size} cannot be split over {parts} devices; take a multiple of {parts}"
        )


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Global arrays from the slices that each process holds, split by example."""
    sharding = split_by_example(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def to_every_device(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are whole on every device, from the same ones on each process."""
    # device_put would compare them between the processes, byte by byte.
    place = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(place, x, global_shape=x.shape), tree
    )


def split_whole(array: Any, mesh: Mesh) -> jax.Array:
    """A batch that every process has whole as a global array, split by example."""
    count = len(array) // jax.process_count()
    own = array[jax.process_index() * count :][:count]
    return jax.make_array_from_process_local_data(split_by_example(mesh), own)


def prefetch(batches: Iterable[Any], mesh: Mesh, *, ahead: int = 2) -> Iterator[Any]:
    """`to_global` of each batch, started `ahead` batches before it is asked for."""
    batches = iter(batches)
    queue = collections.deque(to_global(batch, mesh) for batch in itertools.islice(batches, ahead))
    while queue:
        queue.extend(to_global(batch, mesh) for batch in itertools.islice(batches, 1))
        yield queue.popleft()

"""Where arrays live: one ("data",) mesh, batches split over it, everything else replicated.

Models never know of devices: jit inserts the communication, so that BatchNorm statistics under a
mesh are those of the global batch.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def create_mesh(devices: Any = None) -> Mesh:
    """A mesh with the one axis "data" over the devices (default: all of them)."""
    devices = jax.devices() if devices is None else list(devices)
    # Auto axes: with the default, Explicit, plain integer indexing raises.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_example(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh, *, key: str = "data.batch_size") -> None:
    """Raise a ValueError, naming the config's key, if a batch does not split over the mesh."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"{key}={batch_size} cannot be split over {mesh.size} devices; "
            f"take a multiple of {mesh.size}"
        )


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Global arrays from the slices that each process holds, split by example."""
    sharding = split_by_example(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def prefetch(batches: Iterable[Any], mesh: Mesh, *, ahead: int = 2) -> Iterator[Any]:
    """`to_global` of each batch, started `ahead` batches before it is asked for."""
    batches = iter(batches)
    queue = collections.deque(to_global(batch, mesh) for batch in itertools.islice(batches, ahead))
    while queue:
        queue.extend(to_global(batch, mesh) for batch in itertools.islice(batches, 1))
        yield queue.popleft()

"""Compiles the training step of a config for devices that are not here, and says what it takes.

    python tools/compile.py --config=configs/cifar100_resnet18.py --topology=v5e-16
    python tools/compile.py --config=configs/demo.py --devices=4 --memory_gib=8

--topology describes a slice of TPUs by the name it is rented under, v2-8 .. v6e-256, or as JAX
writes it (v5e:4x4). The compiler comes with libtpu, which `pip install "jax[tpu]"` brings and which
needs no TPU. --devices compiles for as many CPU devices instead: shardings and communication are
alike, memory is what the CPU's compiler plans, which knows nothing of `remat`.

The program is that of train.py for the config: mesh, sharding, batch, inserted layers, `remat`. It
is not run, and no parameter is made. Figures are of one device: arguments are the state and its
part of the batch (or of the whole split, with data.cache=device), outputs mostly take their place,
temporary is what lives while the step runs. FLOPs and collectives are counted in the compiled
program, the body of a loop once; bytes of a collective are those of its result.

The exit code is 1 where the step does not fit into --memory_gib, or else into what a device of the
topology has.

The data set need not be prepared, as for tools/cost.py.
"""

import importlib.util
import math
import os
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies

# The configs lie beside tools/, and import each other; cost.py lies here.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import cost

from attnzoom_jax import cli
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.training import sharding
from attnzoom_jax.training.experiment import Experiment, create_experiment
from attnzoom_jax.training.flops import peak_flops
from attnzoom_jax.training.paths import path_of
from attnzoom_jax.training.step import jit_steps_on_device, jit_train_step, make_train_step

GIB, MIB = 2**30, 2**20
# Generation: (cores that its name counts per chip, axes of its grid of chips, GiB of a device).
TPUS = {
    "v2": (2, 2, 8),
    "v3": (2, 2, 16),
    "v4": (2, 3, 32),
    "v5e": (1, 2, 16),
    "v5p": (2, 3, 95),
    "v6e": (1, 2, 32),
}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
BYTES = {"pred": 1, "bf16": 2}  # of other types the name says the bits


def topology_name(slice_name: str) -> str:
    """How JAX names a slice of TPUs: v5e:4x4 for v5e-16.

    Raises:
        ValueError: no such slice.
    """
    kind, _, size = slice_name.replace("v5litepod", "v5e").partition("-")
    if ":" in kind:
        return kind
    if kind not in TPUS:
        raise unknown_name("TPU in --topology", kind, TPUS)
    cores, axes, _ = TPUS[kind]
    chips = int(size) // cores if size.isdigit() else 0
    if chips < 1 or chips & (chips - 1) or (axes == 3 and chips < 4):
        such_as = f"{kind}-{4 * cores}, {kind}-{8 * cores}, {kind}-{16 * cores}"
        raise ValueError(f"--topology={slice_name}: expected a slice such as {such_as}")
    grid = [2 ** ((chips.bit_length() - 1 + i) // axes) for i in range(axes)]
    if grid == [1, 2, 2]:
        grid.reverse()  # the one that is not written in ascending order
    return f"{kind}:{'x'.join(map(str, grid))}"


def described_devices(slice_name: str) -> list[Any]:
    """The devices of a slice of TPUs, none of which is here.

    Raises:
        ValueError: no such slice, or no compiler for it.
    """
    name = topology_name(slice_name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={slice_name} needs the compiler in libtpu, which is not installed: "
            'pip install "jax[tpu]"; or compile for CPU devices, with --devices=8'
        )
    # Else libtpu asks a server that only Google's machines have, and locks other compilers out.
    for key, value in LIBTPU.items():
        os.environ.setdefault(key, value)
    grid = [int(side) for side in name.partition(":")[2].split("x") if side.isdigit()]
    # A host has four chips, but where that is more than there are.
    options = {"chips_per_host_bounds": [*grid, 1, 1][:3]} if math.prod(grid) < 4 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(found.devices)
    except Exception as error:  # whatever the plugin raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--topology={slice_name} ({name}): {reason}") from error


def compile_step(config: Any, experiment: Experiment, mesh: Any) -> tuple[Any, Any]:
    """Compile the training step of train.py without running it.

    Args:
        config: of the experiment.
        experiment: its parts.
        mesh: of any devices, here or not.

    Returns:
        The compiled program, and the state as arrays with shapes and shardings alone.
    """
    train_step = make_train_step(
        experiment.model,
        experiment.optimizer,
        experiment.recipe,
        num_classes=len(experiment.source.class_names),
    )
    state = cost.state_shapes(experiment, mesh)
    place = sharding.split_by_rules(state, params=state.params, rules=config.sharding, mesh=mesh)
    state = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, place
    )
    batch = jax.tree.map(_shape, cost.noise_batch(experiment, config.data.batch_size))
    if config.data.cache == "host":
        return jit_train_step(train_step, mesh, place=place).lower(state, batch).compile(), state
    examples, most = len(experiment.source), config.data.steps_per_call
    split = {k: jax.ShapeDtypeStruct((examples, *v.shape[1:]), v.dtype) for k, v in batch.items()}
    indices = jax.ShapeDtypeStruct((most, config.data.batch_size), np.int32)
    losses = experiment.recipe.losses
    program = jit_steps_on_device(train_step, mesh, losses=losses, place=place)
    return program.lower(state, split, indices, np.int32(most)).compile(), state


def _shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def memory(program: Any) -> dict[str, int]:
    """Bytes on each device: arguments, outputs, of these in place of arguments, temporary, peak."""
    found = program.memory_analysis()
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "in place": found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    used = sizes["arguments"] + sizes["outputs"] - sizes["in place"] + sizes["temporary"]
    return {**sizes, "peak": used}


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results)} in the text of a compiled program."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    # What starts and is waited for later has its result in the line of the wait.
    pattern = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-done)?\(")
    for line in hlo.splitlines():
        if match := pattern.search(line):
            counts[match[2]] += 1
            sizes[match[2]] += sum(map(_bytes, re.findall(r"([a-z]\w*)\[([\d,]*)\]", match[1])))
    return {kind: (counts[kind], sizes[kind]) for kind in COLLECTIVES if kind in counts}


def _bytes(shape: tuple[str, str]) -> int:
    name, sides = shape
    bits = re.match(r"[a-z]+(\d+)", name)
    size = BYTES.get(name) or (max(int(bits[1]) // 8, 1) if bits else 0)
    return size * math.prod(int(side) for side in sides.split(",") if side)


def parameter_groups(params: Any) -> dict[str, list[Any]]:
    """{how they are split: [(path, array)]}, the ones that are whole on every device first."""
    groups: dict[str, list[Any]] = {"whole on every device": []}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = tuple(leaf.sharding.spec)
        name = f"split {spec}" if any(spec) else "whole on every device"
        groups.setdefault(name, []).append((path_of(keys), leaf))
    return {name: group for name, group in groups.items() if group}


def parameter_lines(params: Any) -> list[str]:
    """The sharding of every parameter; paths that differ in numbers alone share a line."""
    lines = []
    for name, group in parameter_groups(params).items():
        whole = sum(leaf.size * leaf.dtype.itemsize for _, leaf in group)
        here = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for _, leaf in group
        )
        sizes = f"{whole / MIB:.2f} MiB, {here / MIB:.2f} MiB on each device"
        lines.append(f"  {name}: {len(group)} arrays, {sizes}")
        patterns = Counter(re.sub(r"\d+", "*", path) for path, _ in group)
        lines += [f"    {pattern} ({count})" for pattern, count in patterns.items()]
    return lines


def report(program: Any, state: Any, devices: Sequence[Any], limit_gib: float) -> tuple[str, bool]:
    """What is known of the compiled step, as text, and whether it fits."""
    sizes, flops = memory(program), (program.cost_analysis() or {}).get("flops")
    fits = not limit_gib or sizes["peak"] <= limit_gib * GIB
    lines = ["memory of each device"]
    lines += [f"  {name:<10} {size / MIB:12,.1f} MiB" for name, size in sizes.items()]
    if flops:
        lines.append(f"FLOPs of a step on each device: {flops:.4g}")
        if peak := peak_flops(devices[:1]):
            lines[-1] += f"; {1e3 * flops / peak:.2f} ms at its peak of {peak / 1e12:.4g} TFLOP/s"
    lines.append("collectives of a step")
    found = collectives(program.as_text())
    lines += [f"  {kind:<20} {n:5}  {b / MIB:9,.2f} MiB" for kind, (n, b) in found.items()]
    lines += [] if found else ["  none"]
    lines += ["parameters", *parameter_lines(state.params)]
    if limit_gib:
        says = "fits into" if fits else "DOES NOT FIT into"
        lines.append(f"{says} {limit_gib:g} GiB: the peak is {sizes['peak'] / GIB:.4g} GiB")
    return "\n".join(lines), fits


def main() -> int:
    """Parse the flags, compile, and print."""
    given, config = flags.FLAGS, flags.FLAGS.config
    if bool(given.topology) == bool(given.devices):
        raise ValueError("give one of --topology=v5e-16 and --devices=8")
    if given.devices:
        jax.config.update("jax_num_cpu_devices", given.devices)
    cli.start_devices("cpu", compile_cache=config.compile_cache)
    try:
        image_size = tuple(map(int, given.image_size))
    except ValueError:
        raise ValueError(f"--image_size={','.join(given.image_size)}: expected H,W") from None
    devices = described_devices(given.topology) if given.topology else jax.devices()
    mesh = sharding.create_mesh(devices, shape=config.mesh)
    sharding.check_batch_size(config.data.batch_size, mesh)
    source = cost.find_source(config, image_size=image_size, num_classes=given.num_classes)
    experiment = create_experiment(config, source=cost.with_boxes(config, source))
    (h, w, _), name = experiment.image_shape, given.topology or "fake devices"
    print(
        f"compiling {config.model.name}, {config.data.batch_size} images of {h}x{w} per step, "
        f"{len(source.class_names)} classes ({source.name}), for {len(devices)} x "
        f"{devices[0].device_kind} ({name}), {dict(mesh.shape)} ...",
        flush=True,
    )
    kind = given.topology.replace("v5litepod", "v5e").partition("-")[0].partition(":")[0]
    limit = given.memory_gib or TPUS.get(kind, (0, 0, 0))[2]
    start = time.perf_counter()
    try:
        program, state = compile_step(config, experiment, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"the step DOES NOT FIT into {limit:g} GiB: {reason}") from error
    text, fits = report(program, state, devices, limit)
    print(f"compiled in {time.perf_counter() - start:.1f} s\n{text}", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    cli.define_config_flag("Config file of the experiment, for example configs/demo.py")
    flags.DEFINE_string("topology", "", "Slice of TPUs that is described, such as v5e-16")
    flags.DEFINE_integer("devices", 0, "CPU devices instead", lower_bound=0)
    flags.DEFINE_float("memory_gib", 0.0, "Memory of a device; 0: what the topology's has")
    flags.DEFINE_list("image_size", [], "H,W of the images, where the data set is not prepared")
    flags.DEFINE_integer("num_classes", 0, "Of a data set that is not prepared")
    flags.mark_flag_as_required("config")
    cli.run(main)

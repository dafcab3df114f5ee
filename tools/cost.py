"""What an attention layer costs, known before a week is spent on it.

    python tools/cost.py --config=configs/attention_zoom.py:backbone=mobilenet
    python tools/cost.py --config=configs/demo.py:tiny --no_time --out=cost.json

Rows: `base` is the config without its inserted layers, `zoom` the config as it is. Then come the
controls of AttentionZoom: those of configs/attention_zoom.py, and the straight-through mask. Where
no inserted layer both attends and zooms, the second row is `base + layer`, without controls.

Columns, each with its ratio to `base`; all but the first and the last per image:

    parameters  learned ones, of the model
    forward     FLOPs of the forward pass of an evaluation
    training    FLOPs of one training step: augmentation, forward, backward, update
    memory      temp_size_in_bytes of the training step: what XLA plans for while the step runs,
                beside its arguments (state, batch) and results: the activations that are kept for
                the backward pass, the gradients, and work space
    step        time of a training step on the whole batch: median after a warm-up, the rows
                taking turns, so that a busy machine slows all of them; compilation is apart

The programs are the real ones, those of train.py with one step per call, on one device. FLOPs are
XLA's count of what it compiled: a multiply-add is two, taps in the padding are none. So they depend
on the device: on a CPU the gradient of a depthwise kernel is computed, and counted, as that of a
full one, and the training step of a MobileNet is far above three forward passes. The body of a loop
counts once: the random numbers of the augmentation, and on a CPU a ZoomWarp, come from loops.

Gradients, update and much of the work space do not grow with the batch. Where it is small they hide
what the layer multiplies: to know the memory and the time of a run, give its batch as --batch_size.

Learning-rate multipliers and the mask of the weight decay are left at their defaults, because they
name parameters by paths that `base` lacks.

The data set need not be prepared. Its image size and classes come from TFDS, without the network,
or from --image_size=H,W and --num_classes=K; then its length is taken as 50,000, which only the
learning rate depends on.

The boxes of data.patches are not read; each image has one here, the whole of it. Where it lies
costs nothing, but with several an evaluation with eval_patch=mean is dearer than said here.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags

# The configs lie beside tools/, and import each other.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from attnzoom_jax import cli
from attnzoom_jax.data import source as sources
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.data.source import Source
from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.training import sharding
from attnzoom_jax.training.experiment import Experiment, create_experiment
from attnzoom_jax.training.state import TrainState, create_state
from attnzoom_jax.training.step import jit_train_step, make_train_step
from attnzoom_jax.training.workdir import MACHINE_KEYS, provenance, to_plain
from configs.attention_zoom import VARIANTS

CONTROLS = {name: fields for name, fields in VARIANTS.items() if fields}
CONTROLS["straight_through"] = {"mask": "straight_through"}
LENGTH = 50_000  # of a data set that is not there
ROUNDS, SECONDS = (5, 200), 60.0  # of timing: at least and at most; about, for all rows together
# Column: (key of a row, unit, value of one unit).
COLUMNS = {
    "parameters": ("parameters", "", 1),
    "forward": ("forward_flops", "MFLOP", 1e6),
    "training": ("training_flops", "MFLOP", 1e6),
    "memory": ("memory_bytes", "MiB", 2**20),
    "step": ("step_s", "ms", 1e-3),
}
Row = dict[str, Any]


def find_source(config: Any, *, image_size: tuple[int, ...] = (), num_classes: int = 0) -> Source:
    """The training split, or what stands for it where it is not prepared.

    Args:
        config: of the experiment.
        image_size: [h, w] of the stored images; () to look them up.
        num_classes: of the labels; 0 to look them up.

    Returns:
        A source; one that stands for another holds no image.

    Raises:
        ValueError: the data set is neither here nor described by TFDS; only one of the two given.
    """
    data = config.data
    root = sources.data_root(data.dir)
    if image_size or num_classes:
        if len(image_size) != 2 or min(image_size) < 1 or num_classes < 1:
            raise ValueError(
                f"--image_size={','.join(map(str, image_size))} --num_classes={num_classes}: "
                "expected both, such as --image_size=64,64 --num_classes=200"
            )
        return _stand_in("--image_size and --num_classes", image_size, num_classes)
    if data.name in sources.embedded_names() or sources.find_prepared(data.name, root):
        return sources.open_source(data.name, split=data.train_split, data_dir=data.dir)
    if data.name.partition("/")[0] in sources.tfds_names():
        described = _described_by_tfds(data.name, root)
        if described:
            return described
    raise ValueError(
        f"{sources.not_prepared(data.name, root)}; the cost alone can be had without the images: "
        "give --image_size=H,W --num_classes=K"
    )


def _described_by_tfds(name: str, root: pathlib.Path) -> Source | None:
    """What TFDS's code says of a set, without the network; None where it says too little."""
    try:
        features: Any = tfds.builder(name, data_dir=root).info.features
        image, label = features["image"], features["label"]
        return _stand_in(f"{name}, as TFDS describes it", image.shape[:2], label.num_classes)
    except Exception:  # any of the hundreds of builders may want more than there is
        return None


def _stand_in(name: str, image_size: tuple[int | None, ...], num_classes: int) -> Source:
    return Source(
        name=name,
        class_names=tuple(map(str, range(num_classes))),
        image_shape=(*image_size, 3),
        examples=[{}] * LENGTH,
    )


def with_boxes(config: Any, source: Source) -> Source:
    """The source, with the whole of each image as its box where the config has boxes."""
    if not config.data.patches:
        return source
    side = config.data.image_size
    whole = np.array([[0, 0, side, side]], np.float32)
    return dataclasses.replace(source, examples=[{"boxes": whole}] * len(source))


def variants(insert: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{row: what is inserted} for a config's `model.insert`, `base` first, the config's own next.

    Controls replace every layer that attends and zooms; one that equals an earlier row is left out.
    """
    rows: dict[str, dict[str, Any]] = {"base": {}}
    if not insert:
        return rows
    zooms = [path for path, layer in insert.items() if _attends_and_zooms(layer)]
    rows["zoom" if zooms else "base + layer"] = dict(insert)
    for name, fields in CONTROLS.items() if zooms else ():
        control = {path: {**insert[path], **fields} for path in zooms}
        if {**insert, **control} not in rows.values():
            rows[name] = {**insert, **control}
    return rows


def _is_zoom(layer: Any) -> bool:
    return isinstance(layer, Mapping) and layer.get("name") == "attention_zoom"


def _attends_and_zooms(layer: Any) -> bool:
    return _is_zoom(layer) and layer.get("mask") != "ones" and layer.get("factor") != 1


def create_parts(config: Any, source: Source, batch_size: int) -> dict[str, Experiment]:
    """The parts of a run for each row; a control that does not fit is told and left out.

    Args:
        config: of the experiment.
        source: training split.
        batch_size: images of a step.

    Returns:
        {row: parts}.

    Raises:
        ValueError: as `create_experiment`.
    """
    config = config.copy_and_resolve_references()
    source = with_boxes(config, source)
    parts = {}
    with config.unlocked():
        config.data.batch_size = batch_size
        config.optimizer.update({"weight_decay_mask": None, "learning_rate_multipliers": None})
        for name, insert in variants(config.model.insert.to_dict()).items():
            config.model.insert = insert
            try:
                parts[name] = create_experiment(config, source=source)
            except ValueError as error:
                if name not in CONTROLS:
                    raise
                # A further layer may read the mask, which two of the controls lack.
                print(f"left out: {name}: {error}", flush=True)
    return parts


def measure(parts: Mapping[str, Experiment], batch_size: int, *, with_time: bool) -> dict[str, Row]:
    """Compile the programs of each row, count, and time the training steps.

    Args:
        parts: {row: parts of its run}.
        batch_size: images of a step.
        with_time: whether to run the steps; no parameter is made otherwise.

    Returns:
        {row: {key of COLUMNS: value}}; FLOPs and bytes are per image, times in seconds. Also
        compile_s and, with times, step_s_fastest and rounds.
    """
    mesh = sharding.create_mesh(jax.devices()[:1])
    batch = noise_batch(next(iter(parts.values())), batch_size)
    rows, steps, states = {}, {}, {}
    for i, (name, experiment) in enumerate(parts.items()):
        print(f"compiling {name} ({i + 1}/{len(parts)}) ...", flush=True)
        state = state_shapes(experiment, mesh)
        rows[name], steps[name] = _compile(experiment, state, batch, mesh)
        if with_time:
            states[name] = jax.device_put(_noise(state), sharding.replicated(mesh))
    if with_time:
        print("timing ...", flush=True)
        for name, times in _time(steps, states, sharding.to_global(batch, mesh)).items():
            rows[name]["step_s"] = statistics.median(times)
            rows[name].update({"step_s_fastest": min(times), "rounds": len(times)})
    return rows


def noise_batch(experiment: Experiment, batch_size: int) -> dict[str, np.ndarray]:
    """Noise of the size that the host hands to a training step, and the boxes if there are any."""
    size = experiment.resize.size
    shape = experiment.source.image_shape if experiment.resize.mode == "none" else (size, size, 3)
    shape = tuple(int(side or 0) for side in shape)  # none is None, create_experiment saw to it
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    labels = np.arange(batch_size) % len(experiment.source.class_names)
    inputs = {k: np.stack([v] * batch_size) for k, v in extra_inputs(experiment.source[0]).items()}
    return {"image": images, "label": labels.astype(np.int32), **inputs}


def state_shapes(experiment: Experiment, mesh: Any) -> TrainState:
    """The state at step 0 as shapes; no parameter is made."""
    create = functools.partial(
        create_state,
        experiment.model,
        experiment.optimizer,
        image_shape=experiment.image_shape,
        seed=experiment.recipe.seed,
        mesh=mesh,
        use_ema=experiment.recipe.ema_decay > 0,
    )
    return jax.eval_shape(create)


def _noise(shapes: TrainState) -> TrainState:
    """A state to time with: to compile the real initialisation takes longer than the step itself.

    No programme here branches on the values, so any finite ones will do.
    """
    rng = np.random.default_rng(0)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    noise = jax.tree.map(lambda leaf: rng.normal(scale=0.05, size=leaf.shape), shapes.params)
    return ones.replace(params=jax.tree.map(np.float32, noise))


def _compile(
    experiment: Experiment, state: TrainState, batch: dict[str, np.ndarray], mesh: Any
) -> tuple[Row, Any]:
    """What XLA says of the programs of a row, and its compiled training step."""
    n, model = len(batch["label"]), experiment.model
    train_step = make_train_step(
        model,
        experiment.optimizer,
        experiment.recipe,
        num_classes=len(experiment.source.class_names),
    )

    def forward(variables: Any, images: jax.Array, inputs: Any) -> Any:
        train: Any = train_argument(model, False)
        return model.apply(variables, images, **inputs, **train)

    images = jax.ShapeDtypeStruct((n, *experiment.image_shape), np.float32)
    inputs, start = extra_inputs(batch), time.perf_counter()
    evaluation: Any = jax.jit(forward).lower(state.variables(), images, inputs).compile()
    step: Any = jit_train_step(train_step, mesh).lower(state, batch).compile()
    row = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "forward_flops": evaluation.cost_analysis()["flops"] / n,
        "training_flops": step.cost_analysis()["flops"] / n,
        "memory_bytes": step.memory_analysis().temp_size_in_bytes / n,
        "compile_s": time.perf_counter() - start,
    }
    return row, step


def _time(steps: dict[str, Any], states: dict[str, Any], batch: Any) -> dict[str, list[float]]:
    """Seconds of each round of each row, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end, least, most = time.perf_counter() + SECONDS, ROUNDS[0] + 1, ROUNDS[1] + 1
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        for name, step in steps.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], batch)
            jax.block_until_ready((states[name], metrics))
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: seconds[1:] for name, seconds in times.items()}


def table(rows: Mapping[str, Row]) -> str:
    """The rows as an aligned text: each value, and how many times that of `base` it is."""
    base = rows["base"]
    columns = {name: column for name, column in COLUMNS.items() if column[0] in base}
    lines = [["", *(f"{name} {unit}".rstrip() for name, (_, unit, _) in columns.items())]]
    for name, row in rows.items():
        lines.append([name])
        for key, _, one in columns.values():
            value = f"{row[key] / one:,.{0 if one == 1 else 2}f}"
            lines[-1].append(f"{value} {row[key] / base[key]:6.2f} x")
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    aligned = [
        line[0].ljust(widths[0])
        + "".join(f"   {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


def summary(rows: Mapping[str, Row], insert: Mapping[str, Any]) -> str:
    """What the inserted layers multiply, in one sentence."""
    if not insert:
        return "the config inserts no layer (model.insert is empty), so there is `base` alone"
    places = []
    for path, layer in insert.items():
        pixels = layer.get("factor", AttentionZoom.factor) ** 2 if _is_zoom(layer) else 1
        after = f" (everything after it runs on {pixels} times as many pixels)"
        places.append(f"{layer['name']} at {path!r}{after if pixels > 1 else ''}")
    base, own = list(rows.values())[:2]
    # Without the memory: at a small batch its ratio is that of the gradients and the work space.
    counted = {"training_flops": "FLOPs of a training step", "step_s": "step time"}
    ratios = [
        f"{own[key] / base[key]:.3g} x the {what}" for key, what in counted.items() if key in own
    ]
    return f"{' and '.join(places)}: {', '.join(ratios)}"


def main() -> None:
    """Parse the flags, measure, and print."""
    given, config = flags.FLAGS, flags.FLAGS.config
    out = pathlib.Path(given.out) if given.out else None
    if out and not out.parent.is_dir():  # before the minutes of compiling
        raise ValueError(f"--out={out}: there is no folder {out.parent}")
    if "data.batch_size" in cli.config_overrides():
        raise ValueError("--config.data.batch_size has no effect here; give --batch_size")
    cli.start_devices(config.platform, compile_cache=config.compile_cache)
    try:
        image_size = tuple(map(int, given.image_size))
    except ValueError:
        raise ValueError(f"--image_size={','.join(given.image_size)}: expected H,W") from None
    source = find_source(config, image_size=image_size, num_classes=given.num_classes)
    parts = create_parts(config, source, given.batch_size)
    h, w, _ = parts["base"].image_shape
    what = f"{config.model.name}, {given.batch_size} images of {h}x{w} per step"
    print(f"{what}, {len(source.class_names)} classes ({source.name})", flush=True)
    rows = measure(parts, given.batch_size, with_time=not given.no_time)
    print(f"\n{table(rows)}\n")
    if given.batch_size < config.data.batch_size:
        print(
            "the figures of a training step hold the update and the gradients, shared by the "
            f"{given.batch_size} images of a step; the config's own batch is "
            f"--batch_size={config.data.batch_size}"
        )
    print(summary(rows, config.model.insert.to_dict()))
    if out:
        overrides = to_plain(cli.config_overrides())
        report = {
            "tool": "cost",
            **provenance(),
            "model": to_plain(config.model),
            "overrides": {k: v for k, v in overrides.items() if k not in MACHINE_KEYS},
            "batch_size": given.batch_size,
            "image_shape": parts["base"].image_shape,
            "num_classes": len(source.class_names),
            "data": source.name,
            "rows": rows,
        }
        out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {out}")


if __name__ == "__main__":
    cli.define_config_flag("Config file of the experiment, for example configs/demo.py")
    flags.DEFINE_integer("batch_size", 8, "Images of a training step", lower_bound=1)
    flags.DEFINE_bool("no_time", False, "Count only; nothing is run")
    flags.DEFINE_list("image_size", [], "H,W of the images, where the data set is not prepared")
    flags.DEFINE_integer("num_classes", 0, "Of a data set that is not prepared")
    flags.DEFINE_string("out", "", "JSON file to write")
    flags.mark_flag_as_required("config")
    cli.run(main)

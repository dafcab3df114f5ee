"""Train a classifier: python train.py --config=configs/demo.py --workdir=runs/demo.

The run resumes by itself when its workdir holds a checkpoint. `_train` reads from top to bottom.
"""

import contextlib
import datetime
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from attnzoom_jax import cli
from attnzoom_jax.data.bad_examples import left_out
from attnzoom_jax.data.device import index_batches, load_split
from attnzoom_jax.data.fingerprint import fingerprint
from attnzoom_jax.data.pipeline import train_batches
from attnzoom_jax.evaluation import check_watched, create_evaluator
from attnzoom_jax.models import load_pretrained
from attnzoom_jax.training import distributed, sharding
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.experiment import Experiment, create_experiment
from attnzoom_jax.training.flops import peak_flops
from attnzoom_jax.training.log import TrainingLog
from attnzoom_jax.training.profile import Profile
from attnzoom_jax.training.progress import Progress, format_duration
from attnzoom_jax.training.schedule import plateau_scale, plateau_update
from attnzoom_jax.training.state import TrainState, create_state
from attnzoom_jax.training.step import (
    jit_steps_on_device,
    jit_train_step,
    make_train_step,
)
from attnzoom_jax.training.stop import StopSignal
from attnzoom_jax.training.workdir import Workdir, provenance
from attnzoom_jax.training.writer import MetricWriter, read_metrics


def train(
    config: Any,
    workdir: str,
    *,
    overrides: dict[str, Any] | None = None,
    devices: Any = None,
    stop_at: int | None = None,
    stop: StopSignal | None = None,
) -> TrainState:
    """Train as the config says, from where the workdir stands; SIGTERM saves and ends it.

    Args:
        config: a ConfigDict with the keys of configs/default.py.
        workdir: folder of the run.
        overrides: what the command line changed, to be written down.
        devices: to train on; None for all.
        stop_at: leave off after this step, as a killed run would; None for the config's length.
        stop: listens to SIGTERM, and tells the caller of it.

    Returns:
        The state at the end.

    Raises:
        ValueError: what a person can mend, in one message.
        FloatingPointError: the loss became NaN or infinite; the last good checkpoint is named.
    """
    with contextlib.ExitStack() as held:  # what is given back or finished, whatever happens
        stop = held.enter_context(stop or StopSignal())
        return _train(config, workdir, held, stop, overrides or {}, devices, stop_at)


def _train(
    config: Any,
    workdir: str,
    held: contextlib.ExitStack,
    stop: StopSignal,
    overrides: dict[str, Any],
    devices: Any,
    stop_at: int | None,
) -> TrainState:
    started = time.monotonic()
    folder = held.enter_context(Workdir(workdir))
    mesh = sharding.create_mesh(devices, shape=config.mesh)

    # The parts of the run. Nothing is written before all of them are known to fit.
    sharding.check_batch_size(config.data.batch_size, mesh)
    experiment = create_experiment(config)
    sharding.check_rules(experiment.param_shapes, config.sharding, mesh)
    evaluators = [
        create_evaluator(model=experiment.model, data=config.data, mesh=mesh, **config.evals[name])
        for name in config.train_evals
    ]
    watched = {"best_metric": config.best_metric, "schedule.metric": config.schedule.get("metric")}
    check_watched(watched, evaluators)
    pretrained = None
    if config.pretrained and not folder.has_checkpoint():
        pretrained = load_pretrained(
            experiment.model,
            config.pretrained,
            key=jax.random.key(config.seed),
            image_shape=experiment.image_shape,
        )
    data = fingerprint(config.data)
    folder.claim(config, overrides, data=data)
    distributed.check_shared(folder.path)
    state = create_state(
        experiment.model,
        experiment.optimizer,
        image_shape=experiment.image_shape,
        seed=config.seed,
        mesh=mesh,
        use_ema=config.ema_decay > 0,
        pretrained=pretrained,
        rules=config.sharding,
    )
    place = jax.tree.map(lambda leaf: leaf.sharding, state)

    # Where the run stands: its own last checkpoint, else published weights, else the beginning.
    checkpoints = held.enter_context(
        Checkpoints(
            folder.checkpoints,
            best_metric=config.best_metric,
            best_mode=config.best_mode,
            keep=config.keep_checkpoints,
        )
    )
    step = distributed.as_the_first_says(checkpoints.last_step() or 0)
    if step:
        state = checkpoints.restore(step, like=state, mesh=mesh)
        print(f"resuming {folder.path} from step {step}", flush=True)
    last = min(experiment.total_steps, stop_at or experiment.total_steps)
    best = _BestSoFar(config, folder, step)
    if step >= last or best.stop_early:
        print(f"nothing to do: {folder.path} is trained to step {step}", flush=True)
        checkpoints.close()
        return state
    before = folder.run_info() if step else {}
    info = {
        **provenance(),
        "seed": config.seed,
        "start": before.get("start", _now()),
        "duration_s": before.get("duration_s", 0.0),  # of all processes that trained this run
        "steps": step,
        "class_names": experiment.source.class_names,
        "image_shape": experiment.image_shape,
        "data": data,
        "left_out": before.get("left_out", []),  # training examples that cannot be read
    }
    folder.write("run.json", info)
    writer = MetricWriter(folder.path, start_step=step)
    held.callback(writer.close)

    print(
        f"training {config.model.name} on {config.data.name}: steps {step + 1} to {last}, "
        f"{config.data.batch_size} images each; compiling ...",
        flush=True,
    )

    # The loop. `advance` does as many steps as it can up to the next boundary.
    progress = Progress(
        start_step=step,
        total_steps=experiment.total_steps,
        batch_size=config.data.batch_size,
        peak_flops=peak_flops(mesh.devices.flat),
    )
    create_advance = _on_device if config.data.cache == "device" else _from_host
    advance = create_advance(config, experiment, mesh, place, step, progress)
    profile = Profile(folder.path / "profile", config.profile_steps)
    log = TrainingLog(writer, progress, checkpoints)
    log.sums = checkpoints.line(step)
    while step < last and not best.stop_early and not stop.came():
        log_at = _next_multiple(step, config.log_every_steps)
        eval_at = min(_next_multiple(step, experiment.eval_every), last)
        profile.before(step)
        end = min(log_at, eval_at, profile.next_stop(step))
        state, metrics, done = advance(state, end - step)
        step += done
        log.add(step, metrics)
        if traced := profile.after(step, metrics):
            progress.say(step, traced)
        if step in (log_at, eval_at):
            learning_rate = experiment.schedule(step - 1) * plateau_scale(state.opt_state)
            log.cut(step, learning_rate)
        if step == eval_at:
            log.flush()
            results: dict[str, float] = {}
            for evaluator in evaluators:
                results.update(evaluator.run(state.variables()))
            if config.schedule.name == "plateau":
                watched = results[config.schedule.metric]
                state = state.replace(opt_state=plateau_update(state.opt_state, watched))
            writer.write(step, results)
            # What some evaluators give of each attribute or layer stands in the file alone.
            main = {name for evaluator in evaluators for name in evaluator.metric_names}
            said = [f"{name} {value:.4g}" for name, value in results.items() if name in main]
            progress.say(step, "  ".join(said))
            best.update(results)
            checkpoints.save(step, state, results)
            folder.write("run.json", _at_step(step, info, started, experiment))
            progress.skip(step)

    # The end: everything on disk before the run is called done.
    profile.close()
    is_done = step >= last or best.stop_early
    if not is_done:
        log.flush()
        if step and checkpoints.last_step() != step:
            checkpoints.save(step, state, line=log.sums)
            folder.write("run.json", _at_step(step, info, started, experiment))
    checkpoints.close()
    progress.close()
    if best.stop_early:
        print(f"stopped early: {config.best_metric} did not improve for {best.since} evaluations")
    duration = format_duration(time.monotonic() - started)
    said = "done" if is_done else "stopped by SIGTERM, and the same command goes on"
    print(f"{said}: step {step} after {duration}; results in {folder.path}", flush=True)
    return state


def _from_host(
    config: Any, experiment: Experiment, mesh: Any, place: Any, step: int, progress: Progress
) -> Any:
    """Batches decoded on the host, one step per call."""
    batches = sharding.prefetch(
        train_batches(
            experiment.source,
            batch_size=config.data.batch_size,
            seed=config.seed,
            start_step=step,
            resize=experiment.resize,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.data.num_threads,
        ),
        mesh,
    )
    batches = progress.timed(batches)
    train_step = progress.counted(jit_train_step(_train_step(experiment), mesh, place=place))

    def advance(state: TrainState, limit: int) -> tuple[TrainState, Any, int]:
        del limit
        state, metrics = train_step(state, next(batches))
        return state, metrics, 1

    return advance


def _on_device(
    config: Any, experiment: Experiment, mesh: Any, place: Any, step: int, progress: Progress
) -> Any:
    """The whole split on the device, many steps per call."""
    split = load_split(
        experiment.source, resize=experiment.resize, num_threads=config.data.num_threads
    )
    split = sharding.to_every_device(split, mesh)
    indices: Iterator[np.ndarray] = index_batches(
        len(experiment.source),
        batch_size=config.data.batch_size,
        seed=config.seed,
        start_step=step,
    )
    losses = experiment.recipe.losses
    train_steps = progress.counted(
        jit_steps_on_device(_train_step(experiment), mesh, losses=losses, place=place)
    )
    most = config.data.steps_per_call

    def advance(state: TrainState, limit: int) -> tuple[TrainState, Any, int]:
        count = min(most, limit)
        table = np.zeros((most, config.data.batch_size), np.int32)
        for i in range(count):
            table[i] = next(indices)
        state, metrics = train_steps(state, split, table, np.int32(count))
        return state, metrics, count

    return advance


def _train_step(experiment: Experiment) -> Any:
    return make_train_step(
        experiment.model,
        experiment.optimizer,
        experiment.recipe,
        num_classes=len(experiment.source.class_names),
    )


def _at_step(
    step: int, info: dict[str, Any], started: float, experiment: Experiment
) -> dict[str, Any]:
    """What run.json says of a run at a step."""
    seconds = info["duration_s"] + time.monotonic() - started
    skipped = sorted({*info["left_out"], *left_out(experiment.source)})
    return {**info, "steps": step, "duration_s": round(seconds, 1), "left_out": skipped}


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class _BestSoFar:
    """The best evaluation, for early stopping; what a resumed run had before `step` counts too."""

    def __init__(self, config: Any, folder: Workdir, step: int) -> None:
        self.metric, self.patience = config.best_metric, config.early_stopping
        self.sign = 1 if config.best_mode == "max" else -1
        self.value, self.since = -math.inf, 0
        for line in read_metrics(folder.path):
            if self.metric in line and line["step"] <= step:
                self.update(line)

    def update(self, results: dict[str, float]) -> None:
        if not self.metric:
            return
        value = self.sign * results[self.metric]
        is_better = value > self.value  # NaN is not
        self.value = value if is_better else self.value
        self.since = 0 if is_better else self.since + 1

    @property
    def stop_early(self) -> bool:
        return 0 < self.patience <= self.since


def main() -> None:
    """Parse the flags and train."""
    config = flags.FLAGS.config
    cli.start_devices(config.platform, compile_cache=config.compile_cache, many=True)
    train(config, flags.FLAGS.workdir, overrides=cli.config_overrides())


if __name__ == "__main__":
    cli.define_config_flag("Config file of the experiment, for example configs/demo.py")
    flags.DEFINE_string("workdir", None, "Folder of the run")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)

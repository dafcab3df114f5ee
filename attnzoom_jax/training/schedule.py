"""Learning-rate schedules from a config.

    schedule = create_schedule(config, total_steps=..., steps_per_epoch=...)
    logged = schedule(step) * plateau_scale(opt_state)   # the learning rate in force

The plateau schedule alone depends on the evaluations: what it remembers lies in the optimiser
state, so that checkpoints carry it, and `plateau_update` tells it of each evaluation.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from attnzoom_jax.errors import unknown_name

_WARMUP = ("warmup_steps", "warmup_epochs")
_SCHEDULES = {
    "constant": _WARMUP,
    "cosine": _WARMUP,
    "step": (
        *_WARMUP,
        *("decay_steps", "decay_epochs", "boundary_steps", "boundary_epochs", "factor"),
    ),
    "plateau": (*_WARMUP, "factor", "patience", "threshold", "mode", "metric"),
    "one_cycle": ("pct_start", "div_factor", "final_div_factor"),
}


class PlateauState(NamedTuple):
    """The plateau schedule's part of the optimiser state: arrays only, so checkpoints carry it.

    Fields are scalars: `scale` multiplies the learning rate, `best` is the best value so far,
    `bad_evaluations` counts the evaluations since; the others are the config's settings.
    """

    scale: jax.Array
    best: jax.Array
    bad_evaluations: jax.Array
    factor: jax.Array
    patience: jax.Array
    threshold: jax.Array
    maximize: jax.Array


def create_schedule(
    config: ml_collections.ConfigDict, *, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """The learning rate as a function of the step.

    `config.schedule` holds `name` and the settings of that schedule; a setting of None counts as
    absent. Where a setting ends in `_steps` or `_epochs`, give one of the two.

    - "constant": the learning rate throughout.
    - "cosine": half a cosine from the learning rate, at the end of warm-up, to 0 at `total_steps`.
    - "step": times `factor` (default 0.1) every `decay_steps` | `decay_epochs`, or at each of
      `boundary_steps` | `boundary_epochs`; both count from the start of the run.
    - "plateau": constant, times `plateau_scale` of the optimiser state; see `plateau_update`.
      `mode` ("min" or "max") is required; `factor` (0.1), `patience` (10 evaluations) and
      `threshold` (1e-4, relative) are PyTorch's; `metric` names the value, for the caller to read.
    - "one_cycle": PyTorch's OneCycleLR with cosine annealing, `pct_start` (0.3), `div_factor`
      (25), `final_div_factor` (1e4); the momentum does not cycle.

    All but "one_cycle" take `warmup_steps` | `warmup_epochs` (default 0): a linear factor that is
    0 at step 0 and 1 from the end of warm-up on.

    Args:
        config: reads `optimizer.learning_rate` (the highest, before per-path multipliers) and
            `schedule`.
        total_steps: length of the run.
        steps_per_epoch: turns epochs into steps, rounded to the nearest.

    Returns:
        step -> learning rate, a scalar; works on ints and traced arrays.

    Raises:
        ValueError: unknown name or key, missing or contradictory settings, warm-up too long.

    Source: cosine, Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5; one cycle, Smith
    and Topin 2018 (arXiv 1708.07120).
    """
    peak = read_learning_rate(config)
    name, settings = read_section(config["schedule"], "schedule", _SCHEDULES)
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; expected at least 1")
    if name == "one_cycle":
        return _one_cycle(peak, total_steps, **settings)

    warmup = _steps(settings, "warmup", steps_per_epoch) or 0
    if not 0 <= warmup < total_steps:
        raise ValueError(
            f"warm-up takes {warmup} of {total_steps} steps; expected fewer than the run has, "
            "shorten schedule.warmup_steps or schedule.warmup_epochs"
        )
    if name == "cosine":
        decay = optax.cosine_decay_schedule(peak, total_steps - warmup)
        decay = optax.join_schedules([optax.constant_schedule(peak), decay], [warmup])
    elif name == "step":
        decay = _step_decay(peak, settings, steps_per_epoch)
    else:
        decay = optax.constant_schedule(peak)
    if not warmup:
        return decay
    rise = optax.linear_schedule(0.0, 1.0, warmup)
    return lambda step: rise(step) * decay(step)


def plateau_update(opt_state: optax.OptState, value: jax.typing.ArrayLike) -> optax.OptState:
    """The optimiser state after one evaluation: scaled down where the metric stopped improving.

    Pure, and may be jitted. PyTorch's ReduceLROnPlateau with a relative threshold: when the
    metric has not beaten its best for more than `patience` evaluations in a row, the scale is
    multiplied by `factor` and the count starts again. NaN beats nothing.

    Args:
        opt_state: of an optimiser whose schedule is "plateau".
        value: the metric that the config watches, a scalar.

    Returns:
        The state, equal but for its PlateauState.

    Raises:
        ValueError: the state holds no plateau.
    """
    leaves, treedef = jax.tree.flatten(opt_state, is_leaf=_is_plateau)
    if not any(_is_plateau(leaf) for leaf in leaves):
        raise ValueError(
            "the optimiser state holds no plateau; expected one made with schedule.name='plateau'"
        )
    value = jnp.asarray(value, jnp.float32)
    leaves = [_after_evaluation(leaf, value) if _is_plateau(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, leaves)


def plateau_scale(opt_state: optax.OptState) -> jax.Array:
    """What the plateau schedule multiplies the learning rate by; 1 under any other schedule.

    Args:
        opt_state: of an optimiser from `create_optimizer`.

    Returns:
        float32 scalar.
    """
    for leaf in jax.tree.leaves(opt_state, is_leaf=_is_plateau):
        if _is_plateau(leaf):
            return leaf.scale
    return jnp.float32(1.0)


def read_section(
    section: Any, kind: str, known: dict[str, tuple[str, ...]]
) -> tuple[str, dict[str, Any]]:
    """Split a section of a config into its name and its other settings, without those of None.

    Args:
        section: of the config.
        kind: what the section describes, for messages.
        known: {name: its settings}.

    Returns:
        The name, {setting: value}.

    Raises:
        ValueError: no name, or an unknown name or setting.
    """
    settings = {key: section[key] for key in section}
    settings = {key: value for key, value in settings.items() if value is not None}
    name = settings.pop("name", None)
    if name is None:
        raise ValueError(f"{kind}.name is missing; there is: {', '.join(known)}")
    if name not in known:
        raise unknown_name(kind, str(name), known)
    for key in settings:
        if key not in known[name]:
            raise unknown_name(f"key for {kind} {name!r}:", key, known[name])
    return name, settings


def read_learning_rate(config: ml_collections.ConfigDict) -> float:
    """Read `optimizer.learning_rate`; raise a ValueError if it is missing or not above 0."""
    section: Any = config["optimizer"]
    if "learning_rate" not in section or section["learning_rate"] is None:
        raise ValueError("optimizer.learning_rate is missing; expected a number above 0")
    return _positive("optimizer.learning_rate", section["learning_rate"])


def _positive(key: str, value: Any) -> float:
    if not value > 0:
        raise ValueError(f"{key} is {value}; expected a number above 0")
    return value


# Parts of the schedules.


def _steps(settings: dict[str, Any], key: str, steps_per_epoch: float) -> Any:
    """`<key>_steps`, or `<key>_epochs` in steps; None if neither is there. Scalars and tuples."""
    steps, epochs = settings.pop(f"{key}_steps", None), settings.pop(f"{key}_epochs", None)
    if steps is not None and epochs is not None:
        raise ValueError(
            f"schedule.{key}_steps is {steps} and schedule.{key}_epochs is {epochs}; "
            "expected one of the two, set the other to None"
        )
    if epochs is None:
        return steps
    if isinstance(epochs, Iterable):
        return tuple(round(epoch * steps_per_epoch) for epoch in epochs)
    return round(epochs * steps_per_epoch)


def _step_decay(peak: float, settings: dict[str, Any], steps_per_epoch: float) -> optax.Schedule:
    every = _steps(settings, "decay", steps_per_epoch)
    boundaries = _steps(settings, "boundary", steps_per_epoch)
    factor = _positive("schedule.factor", settings.get("factor", 0.1))
    if (every is None) == (boundaries is None):
        raise ValueError(
            f"schedule 'step' has a period of {every} steps and the boundaries {boundaries}; "
            "expected one of decay_steps, decay_epochs, boundary_steps, boundary_epochs"
        )
    if boundaries is not None:
        if len(set(boundaries)) < len(boundaries) or min(boundaries, default=0) < 0:
            raise ValueError(f"boundaries fall on the steps {boundaries}; expected different steps")
        return optax.piecewise_constant_schedule(
            peak, {boundary: factor for boundary in boundaries}
        )
    _positive("schedule.decay_steps", every)
    # optax.exponential_decay divides in float32; compiled, 41 / 41 falls short of 1 and the drop
    # comes a step late. The integer division is exact.
    return lambda step: peak * factor ** (jnp.asarray(step) // every).astype(jnp.float32)


def _one_cycle(
    peak: float,
    total_steps: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> optax.Schedule:
    """PyTorch's: the peak at step pct_start * total_steps - 1, the end at total_steps - 1.

    optax.cosine_onecycle_schedule puts both one step later, so it never reaches the end.
    """
    if not 0 < pct_start < 1:
        raise ValueError(f"schedule.pct_start is {pct_start}; expected a share in (0, 1)")
    start = peak / _positive("schedule.div_factor", div_factor)
    end = start / _positive("schedule.final_div_factor", final_div_factor)
    top, last = pct_start * total_steps - 1, total_steps - 1

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        # A run so short that it starts past the peak has no rise: the ends are kept in order.
        up = jnp.clip(step / max(top, 1e-6), 0.0, 1.0)
        down = jnp.clip((step - top) / (last - top), 0.0, 1.0)
        rising = peak + (start - peak) * (1 + jnp.cos(jnp.pi * up)) / 2
        falling = end + (peak - end) * (1 + jnp.cos(jnp.pi * down)) / 2
        return jnp.where(jnp.asarray(step) <= top, rising, falling)

    return schedule


# Plateau. optax.contrib.reduce_on_plateau takes the value at every step, counts steps and only
# minimises; this one is told once per evaluation.


def create_plateau(config: ml_collections.ConfigDict) -> optax.GradientTransformation | None:
    """What scales the updates under the plateau schedule; None under any other.

    Args:
        config: reads `schedule`.

    Returns:
        An Optax transformation for the end of a chain; its state is a PlateauState.

    Raises:
        ValueError: a missing or wrong setting.
    """
    name, settings = read_section(config["schedule"], "schedule", _SCHEDULES)
    if name != "plateau":
        return None
    mode = settings.get("mode")
    if mode not in ("min", "max"):
        raise ValueError(
            f"schedule.mode is {mode!r}; the plateau schedule expects 'min' for a metric that "
            "should fall, such as a loss, 'max' for one that should rise, such as top-1"
        )
    factor = settings.get("factor", 0.1)
    patience = settings.get("patience", 10)
    threshold = settings.get("threshold", 1e-4)
    if not 0 < factor < 1:
        raise ValueError(f"schedule.factor is {factor}; expected a share in (0, 1)")
    if not (patience >= 0 and threshold >= 0):
        raise ValueError(
            f"schedule.patience is {patience} and schedule.threshold {threshold}; "
            "expected 0 or more for both"
        )

    def init(params: optax.Params) -> PlateauState:
        del params
        return PlateauState(
            scale=jnp.asarray(1.0, jnp.float32),
            best=jnp.asarray(-jnp.inf if mode == "max" else jnp.inf, jnp.float32),
            bad_evaluations=jnp.asarray(0, jnp.int32),
            factor=jnp.asarray(factor, jnp.float32),
            patience=jnp.asarray(patience, jnp.int32),
            threshold=jnp.asarray(threshold, jnp.float32),
            maximize=jnp.asarray(mode == "max"),
        )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, PlateauState)
        return jax.tree.map(lambda u: u * state.scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)


def _after_evaluation(state: PlateauState, value: jax.Array) -> PlateauState:
    better = jnp.where(
        state.maximize,
        value > state.best * (1 + state.threshold),
        value < state.best * (1 - state.threshold),
    )
    bad = jnp.where(better, 0, state.bad_evaluations + 1)
    lower = bad > state.patience
    return state._replace(
        scale=jnp.where(lower, state.scale * state.factor, state.scale),
        best=jnp.where(better, value, state.best),
        bad_evaluations=jnp.where(lower, 0, bad),
    )

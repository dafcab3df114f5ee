"""Optimisers from a config, made of Optax parts.

    schedule = create_schedule(config, total_steps=..., steps_per_epoch=...)
    optimizer = create_optimizer(config, params, schedule=schedule)

Weight decay means what it means in PyTorch. "sgd" and "adam" add wd * p to the gradient, before
momentum and moments (L2); "adamw" and "lamb" add it to the direction, after them (decoupled,
Loshchilov and Hutter 2019, arXiv 1711.05101):

    sgd     g = grad + wd p;   v = momentum v + g;   p -= lr (g + momentum v if nesterov else v)
    adam    g = grad + wd p;   p -= lr m^ / (sqrt(v^) + eps)
    adamw   p -= lr (m^ / (sqrt(v^) + eps) + wd p)
    lamb    r = m^ / (sqrt(v^) + eps) + wd p;   p -= lr |p| / |r| r
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax

from attnzoom_jax.training.paths import matching, path_of
from attnzoom_jax.training.schedule import (
    create_plateau,
    read_learning_rate,
    read_section,
)

_EVERY_OPTIMIZER = (
    "name",
    "learning_rate",
    "weight_decay",
    "weight_decay_mask",
    "clip_norm",
    "learning_rate_multipliers",
)
_OPTIMIZERS = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("b1", "b2", "eps"),
    "adamw": ("b1", "b2", "eps"),
    "lamb": ("b1", "b2", "eps"),
}


def create_optimizer(
    config: ml_collections.ConfigDict, params: Any, *, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimiser that a config describes.

    `config.optimizer` holds, with defaults in brackets and None counting as absent:

    - `name`: "sgd", "adam", "adamw" or "lamb"; `learning_rate`.
    - "sgd": `momentum` [0], `nesterov` [False]; the others: `b1` [0.9], `b2` [0.999],
      `eps` [1e-8, lamb 1e-6].
    - `weight_decay` [0], of the parameters that `weight_decay_mask` [".*kernel$"] matches.
    - `clip_norm` [0 = off]: largest norm of all gradients together, before weight decay.
    - `learning_rate_multipliers` [()]: pairs (pattern, factor). The first pattern that matches a
      parameter decides; factor 0 freezes it: no update, no decay, no part in the norm, no state.

    Patterns are regular expressions that must match a parameter's whole "/"-joined path.

    Args:
        config: reads `optimizer` and `schedule` (for "plateau").
        params: the parameters, or their shapes; only the paths matter.
        schedule: step -> learning rate, from `create_schedule`.

    Returns:
        An Optax transformation; its `update` needs the parameters.

    Raises:
        ValueError: unknown name or key, a value out of range, a pattern that matches nothing, a
            parameter that no multiplier's pattern matches.
    """
    read_learning_rate(config)  # the schedule holds it already; this names a config without one
    name, settings = read_section(
        config["optimizer"],
        "optimizer",
        {name: (*_EVERY_OPTIMIZER, *keys) for name, keys in _OPTIMIZERS.items()},
    )
    del settings["learning_rate"]
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    factors = _multipliers(settings.pop("learning_rate_multipliers", ()), paths)

    parts = []
    if clip_norm := _not_negative(settings, "clip_norm", 0.0):
        parts.append(optax.clip_by_global_norm(clip_norm))
    parts += _direction(name, settings, paths)
    parts.append(optax.scale_by_learning_rate(schedule))
    if any(factor not in (0, 1) for factor in factors.values()):
        parts.append(_scale_by_path(factors))
    optimizer = optax.chain(*parts)
    if not all(factors.values()):
        optimizer = optax.partition(
            {"trained": optimizer, "frozen": optax.set_to_zero()},
            _by_path(lambda path: "trained" if factors[path] else "frozen"),
        )
    plateau = create_plateau(config)
    return optax.chain(optimizer, plateau) if plateau else optimizer


def _not_negative(settings: dict[str, Any], key: str, default: float) -> float:
    value = settings.pop(key, default)
    if not value >= 0:
        raise ValueError(f"optimizer.{key} is {value}; expected 0 or more")
    return value


def _direction(
    name: str, settings: dict[str, Any], paths: list[str]
) -> list[optax.GradientTransformation]:
    """From gradients to the direction of descent, weight decay at its place on the way."""
    weight_decay = _not_negative(settings, "weight_decay", 0.0)
    pattern = settings.pop("weight_decay_mask", r".*kernel$")
    decay = []
    if weight_decay:
        decayed = matching(pattern, paths, "optimizer.weight_decay_mask")
        decay.append(optax.add_decayed_weights(weight_decay, _by_path(decayed.__contains__)))
    if name == "sgd":
        momentum = _not_negative(settings, "momentum", 0.0)
        nesterov = settings.pop("nesterov", False)
        if nesterov and not momentum:
            raise ValueError("optimizer.nesterov is True without momentum; set optimizer.momentum")
        return [*decay, optax.trace(momentum, nesterov=nesterov)] if momentum else decay
    if name == "lamb":
        settings.setdefault("eps", 1e-6)
        return [optax.scale_by_adam(**settings), *decay, optax.scale_by_trust_ratio()]
    moments = optax.scale_by_adam(**settings)
    return [*decay, moments] if name == "adam" else [moments, *decay]


def _by_path(value: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A function of a parameter tree: the tree of `value(path)`."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda keys, _: value(path_of(keys)), tree)


def _multipliers(pairs: Any, paths: list[str]) -> dict[str, float]:
    """The factor of every path; 1 for all of them when there are no pairs."""
    if not pairs:
        return dict.fromkeys(paths, 1.0)
    key = "optimizer.learning_rate_multipliers"
    factors: dict[str, float] = {}
    for pattern, factor in pairs:
        if not (factor >= 0 and math.isfinite(factor)):
            raise ValueError(f"{key}: the factor of {pattern!r} is {factor}; expected 0 or more")
        fresh = matching(pattern, paths, key) - factors.keys()
        if not fresh:
            raise ValueError(
                f"{key}: earlier patterns take every parameter that {pattern!r} matches; "
                "the first match decides, so put the narrower pattern first"
            )
        factors.update({path: factor for path in fresh})
    missed = [path for path in paths if path not in factors]
    if missed:
        raise ValueError(
            f"{key}: no pattern matches {', '.join(missed)}; the patterns are "
            f"{', '.join(repr(pattern) for pattern, _ in pairs)}; end with ('.*', 1.0) for the rest"
        )
    return factors


def _scale_by_path(factors: dict[str, float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(
            lambda keys, update: update * factors[path_of(keys)], updates
        )
    )

"""The hyper-parameters that a config file declares to be searched, and how they are drawn.

    def get_sweep(mode: str = "") -> dict[str, tuple]:
        return {
            "optimizer.learning_rate": ("log", (1e-5, 1e-1)),  # log-uniform between two ends
            "optimizer.name": ("choice", ("adam", "sgd")),
            "optimizer.momentum": ("uniform", (0.7, 1.0), {"optimizer.name": ("sgd",)}),
            "total_steps": ("int", (1000, 2000)),  # both ends included
        }

The third part says where a key is in the search: where each key in it has one of these values.
Elsewhere the key is None, whatever the config says. A choice of one value sets it. Floats are drawn
to four digits.
"""

import copy
import dataclasses
import math
import pathlib
import runpy
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import FieldReference

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.training.workdir import flatten, to_plain
from attnzoom_jax.training.writer import read_metrics

KINDS = ("choice", "int", "log", "uniform")


@dataclasses.dataclass(frozen=True)
class Key:
    """How the value of a config key is drawn.

    Attributes:
        kind: one of KINDS.
        values: the choices, or the two ends.
        only_where: {other key: its values}; unless each other key has one of its values, this key
            is None.
    """

    kind: str
    values: tuple[Any, ...]
    only_where: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def varies(self) -> bool:
        """Whether there is more than one value."""
        return self.kind != "choice" or len(self.values) > 1


Space = Mapping[str, Key]


def read_space(config_file: str, config: Any) -> dict[str, Key]:
    """Read what a config file's get_sweep declares, and check it.

    Args:
        config_file: as --config has it, FILE or FILE:MODE.
        config: what its get_config gives.

    Returns:
        {config key: how it is drawn}.

    Raises:
        ValueError: no get_sweep, or an entry that cannot be drawn or does not fit the config.
    """
    file, *mode = config_file.split(":", 1)
    get_sweep = runpy.run_path(file).get("get_sweep")
    if get_sweep is None:
        raise ValueError(
            f"{file} has no get_sweep(), which declares what to search; "
            "configs/attention_zoom.py has one"
        )
    entries = get_sweep(*mode)
    known = flatten(to_plain(config))
    space: dict[str, Key] = {}
    for name, entry in entries.items():
        if len(entry) not in (2, 3) or entry[0] not in KINDS:
            raise ValueError(
                f"get_sweep: {name} is {entry}; expected (kind, values) or (kind, values, "
                f"{{other key: its values}}), the kind one of {', '.join(KINDS)}"
            )
        key = Key(entry[0], tuple(entry[1]), *entry[2:])
        for asked in (name, *key.only_where):
            if asked not in known:
                raise unknown_name("config key in get_sweep", asked, known)
            if asked != name and asked in entries and asked not in space:
                raise ValueError(f"get_sweep: {name} depends on {asked}; put it behind {asked}")
        _check_key(name, key, config)
        space[name] = key
    return space


def _check_key(name: str, key: Key, config: Any) -> None:
    """Raise a ValueError where nothing can be drawn, or what is drawn does not fit the config."""
    if key.kind == "choice":
        plain = (str, bool, int, float, type(None))  # what Optuna can write down
        is_right = bool(key.values) and all(isinstance(value, plain) for value in key.values)
    else:
        low, high = key.values if len(key.values) == 2 else (0, 0)
        is_right = low < high and (low > 0 or key.kind != "log")
        is_right &= key.kind != "int" or (isinstance(low, int) and isinstance(high, int))
    if not is_right:
        raise ValueError(
            f"get_sweep: {name} is {key.kind} of {key.values}; expected plain values to choose "
            "from, or a lower and a higher end (int: whole numbers; log: above 0)"
        )
    if key.only_where:
        check_may_be_none(config, name)
    for value in key.values:
        try:
            changed(config, {name: value})
        except TypeError as error:
            raise ValueError(f"get_sweep: {name} cannot be {value!r}: {error}") from error


def check_may_be_none(config: Any, key: str) -> None:
    """Raise a ValueError for a key (with dots) whose place in the config is no placeholder."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    if not isinstance(dict(config.items(preserve_field_references=True))[name], FieldReference):
        raise ValueError(f"config key {key!r} cannot be None; give it a value")


def changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a config, with other values of some keys."""
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(values)
    return config


def suggest(trial: Any, space: Space, config: Any, fixed: Collection[str] = ()) -> dict[str, Any]:
    """Draw the values of one trial.

    Args:
        trial: Optuna's.
        space: as `read_space` returns it.
        config: has the value of what is not drawn.
        fixed: keys that are not drawn; where they are not in the search, they too are None.

    Returns:
        {config key: value} of what is drawn, or is None now and was not.
    """
    values = flatten(to_plain(config))
    drawn: dict[str, Any] = {}
    for name, key in space.items():
        if any(values[other] not in allowed for other, allowed in key.only_where.items()):
            value = None
        elif name in fixed:
            continue
        elif key.kind == "choice":
            value = trial.suggest_categorical(name, key.values)
        elif key.kind == "int":
            value = trial.suggest_int(name, *key.values)
        else:
            low, high = key.values
            value = trial.suggest_float(name, low, high, log=key.kind == "log")
            # Short to type, and the same on machines whose logarithms differ in the last bit.
            value = min(max(float(f"{value:.4g}"), low), high)
        if value is not None or values[name] is not None:
            drawn[name] = values[name] = value
    return drawn


def check_metric(config: Any) -> None:
    """Raise a ValueError where config.best_metric is nothing that a search may look at."""
    if not config.best_metric:
        raise ValueError("config.best_metric is empty; name what the search is to better")
    bases: dict[str, set[str]] = {}  # {prefix: splits, whatever their slices}
    for part in config.evals.values():
        found = {name.partition("[")[0].strip() for name in part.split.split("+")}
        bases.setdefault(part.get("prefix") or part.split, set()).update(found)
    tests = {"test"}.union(*(bases[name] for name in bases if name.startswith("test")))
    watched = {"best_metric": config.best_metric, "schedule.metric": config.schedule.get("metric")}
    for key, metric in watched.items():
        prefix = (metric or "").rpartition("/")[0]
        if prefix.startswith("test") or bases.get(prefix, set()) & tests:
            raise ValueError(
                f"config.{key}={metric!r} is of the test set, which a search must not see; take a "
                "metric of a validation split, as validation/top1"
            )


def best_value(folder: pathlib.Path, metric: str, mode: str) -> float | None:
    """The best value of a metric in a run; None where no evaluation gave a number."""
    values = [line[metric] for line in read_metrics(folder) if metric in line]
    values = [value for value in values if math.isfinite(value)]
    return (max if mode == "max" else min)(values, default=None)

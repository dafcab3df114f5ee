"""One forward pass in training mode: what it returns, its taps, and how to look at it again."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from attnzoom_jax.attribution import read_taps
from attnzoom_jax.attribution.program import Known
from attnzoom_jax.models import bind
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.remat import rematerialized


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward pass in training mode, as the terms see it.

    Attributes:
        fn: images -> logits, the same pass with the parameters held constant; outputs are taps.
        images: [n, h, w, c].
        targets: float32 [n, k], weights of the classes, or attributes.
        logits: [n, k].
        taps: {name: value} of what the terms read.
        label_smoothing: in [0, 1).
        key: for methods that draw.
    """

    fn: Callable[[jax.Array], jax.Array]
    images: jax.Array
    targets: jax.Array
    logits: jax.Array
    taps: Mapping[str, jax.Array]
    label_smoothing: float
    key: jax.Array

    def cued(self, target: str) -> jax.Array:
        """What a map explains: the predicted classes, int [n], or the targets, float [n, k]."""
        return self.targets if target == "label" else self.logits.argmax(axis=-1)

    def fn_from(self, tap: str) -> Callable[[jax.Array], jax.Array]:
        """`fn`, continued from the value at a tap, if that was read."""
        if tap not in self.taps:
            return self.fn
        return Known(self.fn, {tap: jax.lax.stop_gradient(self.taps[tap])})


def run_forward(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    targets: jax.Array,
    *,
    inputs: Mapping[str, jax.Array] | None = None,
    reads: Sequence[str],
    label_smoothing: float,
    key: jax.Array,
    remat: Sequence[str] = (),
) -> tuple[Forward, Any]:
    """Run a model in training mode, and read taps of it.

    Args:
        model: images [n, h, w, c] -> logits [n, k].
        variables: {"params": ..., "batch_stats": ...}.
        images: [n, h, w, c].
        targets: float32 [n, k].
        inputs: what else the model is called with, see `data.patches.extra_inputs`.
        reads: names of taps; with none the model is just called.
        label_smoothing: in [0, 1).
        key: of dropout.
        remat: paths of modules that the backward pass computes again; with no taps alone.

    Returns:
        The pass, and the new `batch_stats`.

    Raises:
        ValueError: unknown tap or path, with near matches; `remat` beside taps.
    """
    train: Any = train_argument(model, True)
    call: Any = {"mutable": ["batch_stats"], "rngs": {"dropout": key}, **train, **(inputs or {})}
    taps: dict[str, jax.Array] = {}
    if reads and remat:
        raise ValueError(
            f"remat={tuple(remat)} beside losses that read taps ({', '.join(reads)}): what is read "
            "in a forward pass is kept of it; take one of the two"
        )
    if reads:
        (logits, updates), taps = read_taps(bind(model, variables, **call), images, reads)
    else:
        with rematerialized(model, remat):
            logits, updates = model.apply(variables, images, **call)

    def fn(images: jax.Array) -> jax.Array:
        return bind(model, jax.lax.stop_gradient(variables), **call)(images)[0]

    forward = Forward(fn, images, targets, logits, taps, label_smoothing, key)
    return forward, updates.get("batch_stats", {})

"""Terms of a training loss that compare an output with its targets, or look at a mask alone.

Each gives one value per example; `training/objective.py` weights and adds them, and
`training/guidance.py` has those that compare attention with attribution. The formulas of the
cross-entropies are in `training/losses.py`.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnzoom_jax.training.forward import Forward
from attnzoom_jax.training.losses import sigmoid_cross_entropy, softmax_cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term(abc.ABC):
    """A term of the loss; the fields are its options in the config.

    Attributes:
        weight: what its mean over the batch is multiplied by.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        if isinstance(self.weight, bool) or not math.isfinite(self.weight):
            raise ValueError(f"weight is {self.weight!r}; expected a finite number, such as 1.0")

    @property
    def reads(self) -> tuple[str, ...]:
        """The taps whose values the term reads."""
        return ()

    @abc.abstractmethod
    def __call__(self, forward: Forward) -> jax.Array:
        """The value of each example, float32 [n]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfLogits(Term):
    """A term of the model's output, or of logits at a tap."""

    tap: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """The tap, if there is one."""
        return tuple(filter(None, [self.tap]))

    def _logits(self, forward: Forward, name: str) -> jax.Array:
        logits = forward.taps[self.tap] if self.tap else forward.logits
        if logits.shape != forward.targets.shape:
            raise ValueError(
                f"{name}: {f'tap {self.tap!r}' if self.tap else 'the output'} has the shape "
                f"{list(logits.shape)}; expected logits {list(forward.targets.shape)}"
            )
        return logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(_OfLogits):
    """Softmax cross-entropy: each image is of one class.

    Attributes:
        tap: logits [n, k]; "" for the model's output.
    """

    def __call__(self, forward: Forward) -> jax.Array:
        """The cross-entropy of each example, [n]."""
        return softmax_cross_entropy(
            self._logits(forward, "cross_entropy"),
            forward.targets,
            label_smoothing=forward.label_smoothing,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(_OfLogits):
    """Sigmoid cross-entropy, the mean over the attributes: each of them is there or not.

    Class ids become vectors with a single 1.

    Attributes:
        tap: logits [n, a]; "" for the model's output.
        positive_weight: how much more an attribute that is there counts than one that is not: one
            number above 0 for all attributes, or a of them. Above 1 for rare attributes.
    """

    positive_weight: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        given = self.positive_weight
        weights = given if isinstance(given, tuple) else (given,)
        if not weights or not all(_is_number(w) and w > 0 for w in weights):
            raise ValueError(
                f"positive_weight is {given!r}; expected a number above 0, such as 1.0, or a tuple "
                "of them, one per attribute"
            )

    def __call__(self, forward: Forward) -> jax.Array:
        """The mean cross-entropy of each example, [n]."""
        return sigmoid_cross_entropy(
            self._logits(forward, "binary_cross_entropy"),
            forward.targets,
            positive_weight=self.positive_weight,
            label_smoothing=forward.label_smoothing,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity(Term):
    """The mean of a mask without its sign: little attention, where little is needed.

    Attributes:
        mask: tap [n, ...] of any rank, such as `attention/gate`.
    """

    mask: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The mask."""
        return (self.mask,)

    def __call__(self, forward: Forward) -> jax.Array:
        """The mean of each example's mask, [n]."""
        mask, n = forward.taps[self.mask], len(forward.images)
        if mask.ndim == 0 or len(mask) != n:
            raise ValueError(
                f"sparsity: tap {self.mask!r} has the shape {list(mask.shape)}; expected "
                f"[n, ...] with n = {n}"
            )
        return jnp.abs(mask.astype(jnp.float32)).mean(axis=tuple(range(1, mask.ndim)))


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)

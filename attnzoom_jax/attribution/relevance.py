"""The walk from a program's output back to its taps, one rule per primitive.

`walk` visits the steps in reverse. At each it asks the step's rule to hand the relevance of the
outputs on to the inputs, and adds up what arrives at a value from several sides. Steps below the
lowest tap are not visited. What a rule is, is left to who gives the table: Excitation Backprop
hands on probabilities, guided back-propagation a gradient.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnzoom_jax.attribution.flow import Flow
from attnzoom_jax.attribution.program import Step, Values


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices that rules may look at; see `excitation_backprop`."""

    sums: str = "raw"
    scales: str = "ignore"
    negative: str = "raw"


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Share:
    """Relevance for one value.

    Attributes:
        ref: the value.
        relevance: an array of its shape.
        sign: signs to which the value would be flipped, or None; broadcast to its shape.
    """

    ref: Any
    relevance: jax.Array
    sign: Any = None


@dataclasses.dataclass(frozen=True)
class Visit:
    """A step and what a rule may look at.

    Attributes:
        step: the step.
        flow: what is signal in the program.
        values: every value of the program.
        relevance: of each output of the step; zeros where none arrived.
        sign: as `Share.sign`, of the first output.
        options: the caller's choices.
        is_dual: whether a linear map is to act with its weights negated (contrastive).
    """

    step: Step
    flow: Flow
    values: Values
    relevance: Sequence[jax.Array]
    sign: Any
    options: Options
    is_dual: bool = False

    @property
    def inputs(self) -> list[Any]:
        """The values of the step's inputs."""
        return [self.values[ref] for ref in self.step.inputs]

    @property
    def signal(self) -> list[int]:
        """Positions of the inputs that depend on the images."""
        return [i for i, ref in enumerate(self.step.inputs) if self.flow.is_signal(ref)]


Rule = Callable[[Visit], Iterable[Share]]


class _Arrived:
    """What has arrived at the values: sums, and a sign where there was but one share."""

    def __init__(self) -> None:
        self.relevance: dict[int, jax.Array] = {}
        self.sign: dict[int, Any] = {}

    def add(self, share: Share) -> None:
        if share.ref in self.relevance:
            self.relevance[share.ref] += share.relevance
            self.sign[share.ref] = None
        else:
            self.relevance[share.ref] = share.relevance
            self.sign[share.ref] = share.sign

    def take(self, refs: Sequence[int], flow: Flow, dtype: Any) -> list[jax.Array]:
        """The relevance of values, zeros where none arrived; they are done with."""
        shapes = (flow.program.shapes[ref].shape for ref in refs)
        return [
            self.relevance.pop(ref) if ref in self.relevance else jnp.zeros(shape, dtype)
            for ref, shape in zip(refs, shapes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Walk:
    """What a walk found.

    Attributes:
        relevance: {tap: relevance, of the tap's shape}; a tap that none reached is missing.
        uncontrasted: of a contrastive walk, {tap: the part of it that met no linear map}.
        dropped: relevance that steps took and did not hand on, summed over the batch.
    """

    relevance: dict[str, jax.Array]
    uncontrasted: dict[str, jax.Array]
    dropped: jax.Array


def walk(
    flow: Flow,
    values: Values,
    start: jax.Array,
    *,
    taps: Sequence[str],
    rule_of: Callable[[Step], Rule],
    options: Options = DEFAULTS,
    contrast_at: Collection[str] = (),
) -> Walk:
    """Hand relevance from the output down to taps.

    Args:
        flow: of the program.
        values: of the program.
        start: relevance of the program's one output.
        taps: where to read it.
        rule_of: the rule of a step; may raise.
        options: for the rules.
        contrast_at: primitives; the first of them on every path hands on its relevance minus that
            of its dual (`Visit.is_dual`). Empty for a plain walk.

    Returns:
        The relevance at the taps.
    """
    reached = flow.reached_from(taps)
    above, below = _Arrived(), _Arrived()  # of the contrast, which a plain walk has behind it
    if flow.is_signal(flow.program.outputs[0]):
        (above if contrast_at else below).add(Share(flow.program.outputs[0], start))
    found = Walk({}, {}, jnp.zeros((), start.dtype))
    dropped = found.dropped
    for step in reversed(flow.program.steps):
        goes_on = reached.intersection(filter(flow.is_signal, step.inputs))
        for arrived in (above, below):
            if not any(ref in arrived.relevance for ref in step.outputs):
                continue
            sign = arrived.sign.get(step.outputs[0])
            relevance = arrived.take(step.outputs, flow, start.dtype)
            if step.tap is not None and step.tap in taps:
                at_tap = found.relevance if arrived is below else found.uncontrasted
                at_tap[step.tap] = relevance[0]
            if not goes_on:
                continue
            rule, visit = rule_of(step), Visit(step, flow, values, relevance, sign, options)
            shares, target = list(rule(visit)), arrived
            if arrived is above and step.primitive in contrast_at:
                dual = rule(dataclasses.replace(visit, is_dual=True))
                shares += [Share(share.ref, -share.relevance, share.sign) for share in dual]
                target = below
            dropped += sum(map(jnp.sum, relevance)) - sum(s.relevance.sum() for s in shares)
            for share in shares:
                if share.ref in reached:
                    target.add(share)
    return dataclasses.replace(found, dropped=dropped)

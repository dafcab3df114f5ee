"""Excitation Backprop: how probable it is that a winner-take-all walk from a class meets a unit.

Marginal winning probability (Zhang et al. 2016, arXiv 1608.00507; IJCV 126, 2018): every unit
hands its probability to one of its inputs, drawn in proportion to the excitation x_j w+_ij that it
gets from them (eq. 3). From the class downwards this gives a distribution over the units of every
layer; a tap's map is its sum over the channels. `rules` holds the rule of each primitive.

The contrastive map subtracts that of a dual class unit with the weights of the last linear map
negated. The walk is linear, so it is enough to run that one map twice and to carry the signed
difference down; there is no clamp on the way. Plain maps become nearly the same for all classes
with depth: to tell classes apart, take the contrastive one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnzoom_jax.attribution.chunks import map_images
from attnzoom_jax.attribution.flow import Flow
from attnzoom_jax.attribution.program import LINEAR_MAPS, Step
from attnzoom_jax.attribution.relevance import Options, Rule, Walk, walk
from attnzoom_jax.attribution.rules import RULES
from attnzoom_jax.attribution.taps import trace_at
from attnzoom_jax.attribution.targets import check_spatial, check_targets, start_signal
from attnzoom_jax.errors import unknown_name

SUMS = ("raw", "positive")
SCALES = ("ignore", "positive")
NEGATIVE = ("raw", "clamp")


def excitation_backprop(
    fn: Callable[[jax.Array], Any],
    images: jax.Array,
    targets: jax.Array,
    *,
    tap: str | Sequence[str],
    sums: str = "raw",
    scales: str = "ignore",
    negative: str = "raw",
    rules: Mapping[str, Rule] | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Excitation Backprop (marginal winning probability) at a tap, or at several in one walk.

    Args:
        fn: images [n, h, w, c] -> logits [n, k], or [n, h, w, k]; each image's logits depend on
            that image alone.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap of shape [n, h', w', c'] (`input` for the images), or a list of names.
        sums: where two branches meet, shares in proportion to their "raw" values (as the reference
            implementation has it; a negative branch has a negative share), or to their "positive"
            parts.
        scales: of batch norm and other affine steps: "ignore", or "positive": the layer before
            is first flipped so that every scale is positive, as the authors did for ResNet-50
            (where nothing but linear steps lies between, and nobody else reads that layer).
        negative: responses below zero: "raw" counts them as they are, so that shares may be
            negative and large where an input is signed (the image; linear bottlenecks); "clamp"
            counts them as zero. No difference in networks of ReLUs. See `relevance_balance`.
        rules: {primitive, or `jit:NAME` of a jitted function: rule}, before our own `rules.RULES`.
        chunk_size: at most this many images at once, to bound memory; None for all.

    Returns:
        Raw maps [n, h', w'], at least float32: the signed sum over channels. For a list of taps
        {tap: maps}. Under jit a class id out of range gives NaN.

    Raises:
        ValueError: unknown tap, a tap that does not depend on the images or that no relevance
            reaches, logits or targets of a wrong shape, class id out of range, unknown option, a
            primitive without a rule, a product of two signals with no gate marked.
    """
    options = _options(sums, scales, negative)
    return _maps(fn, images, targets, tap, options, rules or {}, chunk_size)


def contrastive_excitation_backprop(
    fn: Callable[[jax.Array], Any],
    images: jax.Array,
    targets: jax.Array,
    *,
    tap: str | Sequence[str],
    sums: str = "raw",
    scales: str = "ignore",
    negative: str = "raw",
    rules: Mapping[str, Rule] | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Contrastive Excitation Backprop: what speaks for the class rather than against it.

    Args:
        fn: as `excitation_backprop`.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: as `excitation_backprop`; a tap below the last linear map of every path.
        sums: as `excitation_backprop`.
        scales: as `excitation_backprop`.
        negative: as `excitation_backprop`.
        rules: as `excitation_backprop`.
        chunk_size: at most this many images at once, to bound memory; None for all.

    Returns:
        Raw signed maps [n, h', w'], at least float32; each sums to about 0. The paper shows
        `ops.maps.positive` of them. For a list of taps {tap: maps}.

    Raises:
        ValueError: as `excitation_backprop`; a tap with no linear map above it.
    """
    options = _options(sums, scales, negative)
    return _maps(fn, images, targets, tap, options, rules or {}, chunk_size, is_contrastive=True)


@dataclasses.dataclass(frozen=True)
class Balance:
    """Where the probability of 1 went, per image [n].

    Attributes:
        at_tap: sum of the relevance at the tap; below 1 also where paths pass the tap by.
        absolute: sum of its absolute values; far above 1 the map is ill-conditioned.
        dropped: taken by a step and handed to nobody (units with no positive support, ReLUs).
    """

    at_tap: jax.Array
    absolute: jax.Array
    dropped: jax.Array


def relevance_balance(
    fn: Callable[[jax.Array], Any],
    images: jax.Array,
    targets: jax.Array,
    *,
    tap: str,
    sums: str = "raw",
    scales: str = "ignore",
    negative: str = "raw",
    rules: Mapping[str, Rule] | None = None,
) -> Balance:
    """How much of the probability Excitation Backprop brings down to a tap.

    On networks of ReLUs with images >= 0 the relevance at a tap that all paths cross, and what was
    dropped, sum to 1. Where responses are signed it may grow without bound: read `absolute`.

    Args:
        fn: as `excitation_backprop`.
        images: [n, h, w, c].
        targets: class ids int [n].
        tap: one tap, of any shape.
        sums: as `excitation_backprop`.
        scales: as `excitation_backprop`.
        negative: as `excitation_backprop`.
        rules: as `excitation_backprop`.

    Returns:
        The balance of each image.

    Raises:
        ValueError: as `excitation_backprop`.
    """
    options = _options(sums, scales, negative)
    check_targets(fn, images, targets)

    def balance(image: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
        found = _walk(fn, image[None], target[None], [tap], options, rules or {})
        relevance = found.relevance[tap]
        return relevance.sum(), jnp.abs(relevance).sum(), found.dropped

    return Balance(*jax.vmap(balance)(images, targets))


def _maps(
    fn: Callable[[jax.Array], Any],
    images: jax.Array,
    targets: jax.Array,
    tap: str | Sequence[str],
    options: Options,
    rules: Mapping[str, Rule],
    chunk_size: int | None,
    is_contrastive: bool = False,
) -> Any:
    taps = [tap] if isinstance(tap, str) else list(tap)

    def of_chunk(images: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        found = _walk(fn, images, targets, taps, options, rules, is_contrastive, is_map=True)
        return {name: found.relevance[name].sum(axis=-1) for name in taps}

    maps = map_images(of_chunk, fn, images, targets, chunk_size=chunk_size)
    return maps[tap] if isinstance(tap, str) else maps


def _walk(
    fn: Callable[[jax.Array], Any],
    images: jax.Array,
    targets: jax.Array,
    taps: Sequence[str],
    options: Options,
    rules: Mapping[str, Rule],
    is_contrastive: bool = False,
    is_map: bool = False,
) -> Walk:
    table = {**RULES, **rules}
    whole = [name for name in table if name.startswith("jit:")]
    program = trace_at(fn, images, taps, open_calls=True, whole=whole)
    flow = Flow(program)
    for tap in taps:
        if is_map:
            check_spatial(program, tap, images.shape[0])
    values = program.evaluate(images)
    start = start_signal(program.result(values), targets)

    def rule_of(step: Step) -> Rule:
        if step.primitive not in table:
            raise ValueError(
                f"Excitation Backprop has no rule for the primitive {step.primitive!r} at "
                f"{step.source}; give one, rules={{{step.primitive!r}: rule}} (docs/methods.md)"
            )
        return table[step.primitive]

    found = walk(
        flow,
        values,
        start,
        taps=taps,
        rule_of=rule_of,
        options=options,
        contrast_at=LINEAR_MAPS if is_contrastive else (),
    )
    for tap in taps:
        _check_found(tap, found, flow)
    return found


def _check_found(tap: str, found: Walk, flow: Flow) -> None:
    (marked,) = (step for step in flow.program.steps if step.tap == tap)
    if not flow.is_signal(marked.inputs[0]):
        raise ValueError(f"tap {tap!r} does not depend on the images; choose one that does")
    if tap in found.uncontrasted:
        raise ValueError(
            f"tap {tap!r} has no linear map (matrix product, convolution) between it and the "
            "output on some path, so there is nothing to contrast; choose a tap further down"
        )
    if tap not in found.relevance:
        raise ValueError(
            f"no relevance reaches tap {tap!r}: what follows it ends in gates or statistics, or "
            "not in the output; choose a tap on the signal's way"
        )


def _options(sums: str, scales: str, negative: str) -> Options:
    for kind, given, known in (
        ("sums", sums, SUMS),
        ("scales", scales, SCALES),
        ("negative", negative, NEGATIVE),
    ):
        if given not in known:
            raise unknown_name(f"option {kind}", given, known)
    return Options(sums=sums, scales=scales, negative=negative)

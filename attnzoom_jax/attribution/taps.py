"""Taps by name: list them, read them, choose one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution.program import LINEAR_MAPS, Constant, Program, trace

# The reserved tap: the images themselves, unless the function marks a tap of that name.
INPUT = "input"


def trace_at(
    fn: Callable[..., Any], images: jax.Array, taps: Sequence[str], **options: Any
) -> Program:
    """Trace a function of images whose taps are wanted; `input` means the images.

    Args:
        fn: any JAX function of images.
        images: [n, h, w, c].
        taps: names of taps.
        **options: of `trace`.

    Returns:
        The program, with a tap `input` if it is wanted.

    Raises:
        ValueError: unknown tap, with near matches.
    """
    program = trace(fn, images, **options)
    if INPUT in taps and INPUT not in program.taps:
        program = trace(lambda x: fn(checkpoint_name(x, INPUT)), images, **options)
    for tap in taps:
        program.check_tap(tap)
    return program


def list_taps(fn: Callable[..., Any], *args: Any) -> dict[str, tuple[int, ...]]:
    """The taps of a function, in order of execution.

    Args:
        fn: any JAX function; a Flax model through `models.bind`.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

    Returns:
        {name: shape}.
    """
    return {name: tap.shape for name, tap in trace(fn, *args).taps.items()}


def read_taps(
    fn: Callable[..., Any], images: jax.Array, names: Sequence[str]
) -> tuple[Any, dict[str, jax.Array]]:
    """The function's result and the values of some of its taps, from one forward pass.

    Args:
        fn: any JAX function of images.
        images: [n, h, w, c].
        names: taps.

    Returns:
        fn(images) and {name: value}.

    Raises:
        ValueError: unknown tap, with near matches.
    """
    return trace(fn, images).run(images, read=names)


def gate_taps(taps: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The taps that are masks of places, `<path>/gate`, in order; those of channels are not.

    Args:
        taps: as `list_taps` returns them.

    Returns:
        Their names.
    """
    masks = {name: shape for name, shape in taps.items() if is_gate(name) and len(shape) == 4}
    return [name for name, (_, h, w, _) in masks.items() if h * w > 1]


def tap_depths(fn: Callable[..., Any], *args: Any) -> dict[str, int]:
    """How deep each tap lies: the convolutions and matrix products on the longest way to it.

    Args:
        fn: any JAX function.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

    Returns:
        {name: depth}, in order of execution.
    """
    program = trace(fn, *args, open_calls=True)
    depths = _depths(program)
    return {
        step.tap: depths.get(step.outputs[0], 0) for step in program.steps if step.tap is not None
    }


def default_tap(fn: Callable[[jax.Array], Any], images: jax.Array | jax.ShapeDtypeStruct) -> str:
    """The last tap with a spatial extent below the classifier, the usual place for a class map.

    Args:
        fn: any JAX function of images.
        images: [n, h, w, c], or their shape; nothing is computed.

    Returns:
        The name of the last tap of shape [n, h, w, c] with h * w > 1 that is no gate and that a
        convolution or matrix product follows; if none follows any, the last spatial tap.

    Raises:
        ValueError: there is none.
    """
    program = trace(fn, images, open_calls=True)
    depths = _depths(program)
    end = max(depths.get(ref, 0) for ref in program.outputs if not isinstance(ref, Constant))
    spatial = {
        step.tap: depths.get(step.outputs[0], 0)
        for step in program.steps
        if step.tap is not None and not is_gate(step.tap) and _is_spatial(program.taps[step.tap])
    }
    if not spatial:
        raise ValueError(
            "no tap has a spatial extent [n, h, w, c]; mark one with "
            'jax.ad_checkpoint.checkpoint_name(x, "name"), or bind a Flax model with models.bind'
        )
    below_classifier = [name for name, depth in spatial.items() if depth < end]
    return (below_classifier or list(spatial))[-1]


def _depths(program: Program) -> dict[int, int]:
    """The most linear maps on any way from the images to each value."""
    depths = dict.fromkeys(program.inputs, 0)
    for step in program.steps:
        known = [depths[r] for r in step.inputs if not isinstance(r, Constant) and r in depths]
        if known:
            depth = max(known) + (step.primitive in LINEAR_MAPS)
            depths.update(dict.fromkeys(step.outputs, depth))
    return depths


def _is_spatial(value: jax.ShapeDtypeStruct) -> bool:
    return len(value.shape) == 4 and value.shape[1] * value.shape[2] > 1


def is_gate(name: str) -> bool:
    """Whether a tap is an attention mask, by its name `<path>/gate`."""
    return name.partition("#")[0].split("/")[-1] == "gate"

"""A JAX function as a list of steps whose named taps can be listed, read and perturbed.

`jax.ad_checkpoint.checkpoint_name(x, "stage3")` leaves one `name` equation in the jaxpr of any JAX
function, also under jit, vmap, grad and remat. `trace` turns the function into a flat list of
steps: calls (jit, remat) that hold a tap are inlined, a scan that holds one is unrolled and its
taps become `name#t`; everything else stays one step. Only this file knows how JAX represents a
program.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from attnzoom_jax.errors import unknown_name

# The call-like primitives that may be inlined, and the parameter that holds what they call.
CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One application of a primitive: values are numbers, constants stand for themselves."""

    equation: Any
    function: Callable[..., list[Any]]  # applies the equation to values
    inputs: tuple[Any, ...]  # int: a value's number; Constant: the value itself
    outputs: tuple[int, ...]
    tap: str | None  # its name, if this step marks a tap


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that the program holds rather than computes."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
        steps: in order of execution.
        inputs: numbers of the values that the flattened arguments give.
        outputs: numbers or constants of the flattened results.
        output_tree: structure of the result.
        taps: {name: shape and dtype}, in order of execution.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    output_tree: Any
    taps: Mapping[str, jax.ShapeDtypeStruct]

    def run(
        self, *args: Any, read: Sequence[str] = (), add: Mapping[str, jax.Array] | None = None
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Execute the program.

        Args:
            *args: as given to `trace`, in shape and dtype.
            read: names of taps whose values are returned.
            add: {tap: array added to its value}; differentiate by it to get the gradient at a tap.
              A tap that is both read and added to returns the sum.

        Returns:
            The function's result, and {tap: value}.

        Raises:
            ValueError: unknown tap, with near matches.
        """
        add = add or {}
        for name in (*read, *add):
            self.check_tap(name)
        values: dict[int, Any] = dict(zip(self.inputs, jax.tree.leaves(args), strict=True))
        found = {}

        def look_up(ref: Any) -> Any:
            return ref.value if isinstance(ref, Constant) else values[ref]

        for step in self.steps:
            results = _apply(step, [look_up(ref) for ref in step.inputs])
            if step.tap is not None:
                if step.tap in add:
                    results = [results[0] + add[step.tap].astype(results[0].dtype)]
                if step.tap in read:
                    found[step.tap] = results[0]
            values.update(zip(step.outputs, results, strict=True))
        return jax.tree.unflatten(self.output_tree, map(look_up, self.outputs)), found

    def check_tap(self, name: str) -> None:
        """Raise a ValueError that names near matches if there is no such tap."""
        if name not in self.taps:
            raise unknown_name("tap", name, self.taps)


def trace(fn: Callable[..., Any], *args: Any) -> Program:
    """Trace a function into a program.

    Args:
        fn: any JAX function.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The program; a tap name that occurs again gets `#1`, `#2`, ...

    Raises:
        ValueError: a tap inside a while loop or a cond, where it has no single value, or inside a
            function with its own derivative, which inlining would lose.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    flattened = _Flattening()
    inputs = flattened.new_values(closed.jaxpr.invars)
    outputs = flattened.inline(closed, inputs)
    return Program(
        steps=tuple(flattened.steps),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        output_tree=jax.tree.structure(shapes),
        taps=flattened.taps,
    )


class _Flattening:
    """Collects the steps of a jaxpr and of those it calls."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.taps: dict[str, jax.ShapeDtypeStruct] = {}
        self.count = 0

    def new_values(self, variables: Sequence[Any]) -> list[int]:
        self.count += len(variables)
        return list(range(self.count - len(variables), self.count))

    def inline(self, closed: Any, inputs: Sequence[Any]) -> list[Any]:
        """Append the steps of a closed jaxpr applied to `inputs`; return its outputs."""
        jaxpr = closed.jaxpr
        refs: dict[Any, Any] = dict(zip(jaxpr.constvars, map(Constant, closed.consts), strict=True))
        refs.update(zip(jaxpr.invars, inputs, strict=True))

        def look_up(atom: Any) -> Any:
            return Constant(atom.val) if isinstance(atom, core.Literal) else refs[atom]

        for equation in jaxpr.eqns:
            arguments = [look_up(atom) for atom in equation.invars]
            body = None if equation.primitive.name == "name" else _body_with_tap(equation)
            if body is None:
                outputs = self.append(equation, _as_function(jaxpr, equation), arguments)
            else:
                outputs = self.inline(body, arguments)
            refs.update(zip(equation.outvars, outputs, strict=True))
        return [look_up(atom) for atom in jaxpr.outvars]

    def append(self, equation: Any, function: Any, inputs: Sequence[Any]) -> list[int]:
        outputs = self.new_values(equation.outvars)
        tap = None
        if equation.primitive.name == "name":
            tap = self.unused_name(equation.params["name"])
            aval = equation.outvars[0].aval
            self.taps[tap] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        self.steps.append(Step(equation, function, tuple(inputs), tuple(outputs), tap))
        return outputs

    def unused_name(self, name: str) -> str:
        if name not in self.taps:
            return name
        repeat = 1
        while f"{name}#{repeat}" in self.taps:
            repeat += 1
        return f"{name}#{repeat}"


def _as_function(jaxpr: Any, equation: Any) -> Callable[..., list[Any]]:
    """One equation as a function of its arguments, literals included."""
    variables = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
    unique = list(dict.fromkeys(variables))
    one = jaxpr.replace(
        constvars=[],
        invars=unique,
        outvars=list(equation.outvars),
        eqns=[equation],
        effects=equation.effects,
    )
    function = core.jaxpr_as_fun(_close(one))

    def apply(*arguments: Any) -> list[Any]:
        values = {
            atom: argument
            for atom, argument in zip(equation.invars, arguments, strict=True)
            if not isinstance(atom, core.Literal)
        }
        return list(function(*(values[variable] for variable in unique)))

    return apply


def _body_with_tap(equation: Any) -> Any | None:
    """What an equation calls, as a closed jaxpr, if a tap is inside; else None."""
    if not any(_has_tap(jaxpr) for jaxpr in _jaxprs_in(equation.params)):
        return None
    primitive = equation.primitive.name
    if primitive in CALLS:
        return _close(equation.params[CALLS[primitive]])
    if primitive == "scan":
        return _unroll(equation)
    if primitive.startswith("custom_"):
        raise ValueError(
            f"a tap inside a function with its own derivative ({primitive}) would lose that "
            "derivative; mark the tap outside of that function"
        )
    raise ValueError(
        f"a tap inside {primitive!r} has no single value; move the tap out of it, or unroll it"
    )


def _close(jaxpr: Any) -> Any:
    """A jaxpr together with its constants (from JAX 0.11 on there is only one kind)."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, [])


def _jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item


def _has_tap(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name == "name" or any(map(_has_tap, _jaxprs_in(equation.params)))
        for equation in jaxpr.eqns
    )


def _unroll(equation: Any) -> Any:
    """A scan as a jaxpr without the loop; the taps of iteration t are named `name#t`."""
    params = equation.params

    def unrolled(*args: Any) -> list[Any]:
        consts, carry, sequences = _scan_arguments(params, args)
        body = trace(core.jaxpr_as_fun(_close(params["jaxpr"])), *_body_avals(equation))
        times = range(params["length"])
        results: dict[int, list[Any]] = {}
        for t in reversed(times) if params["reverse"] else times:
            inputs = (*consts, *carry, *(sequence[t] for sequence in sequences))
            marked = dataclasses.replace(body, steps=tuple(_mark(step, t) for step in body.steps))
            outputs, _ = marked.run(*inputs)
            carry, results[t] = outputs[: len(carry)], outputs[len(carry) :]
        stacked = [jnp.stack([results[t][i] for t in times]) for i in range(len(results[0]))]
        return carry + stacked

    return jax.make_jaxpr(unrolled)(*(_shape(atom.aval) for atom in equation.invars))


def _scan_arguments(params: Any, args: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The arguments of a scan as constants, initial carry and sequences."""
    if "ft_in" in params:  # from JAX 0.12 on
        consts, carry, sequences = params["ft_in"].update(args).unpack()
        return list(consts), list(carry), list(sequences)
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(args[:first]), list(args[first:last]), list(args[last:])


def _body_avals(equation: Any) -> list[jax.ShapeDtypeStruct]:
    return [_shape(aval) for aval in _close(equation.params["jaxpr"]).in_avals]


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _mark(step: Step, t: int) -> Step:
    return step if step.tap is None else dataclasses.replace(step, tap=f"{step.tap}#{t}")


def _apply(step: Step, inputs: Sequence[Any]) -> list[Any]:
    if step.tap is not None:
        return [checkpoint_name(inputs[0], step.tap)]
    return step.function(*inputs)


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
    """The taps that are attention masks with a spatial extent, `<path>/gate`, in order.

    Args:
        taps: as `list_taps` returns them.

    Returns:
        Their names.
    """
    return [name for name, shape in taps.items() if _is_gate(name) and len(shape) == 4]


def default_tap(taps: Mapping[str, tuple[int, ...]]) -> str:
    """The last tap with a spatial extent, the usual place for a class map.

    Args:
        taps: as `list_taps` returns them.

    Returns:
        The name of the last tap of shape [n, h, w, c] with h * w > 1 that is no gate.

    Raises:
        ValueError: there is none.
    """
    spatial = [
        name
        for name, shape in taps.items()
        if len(shape) == 4 and shape[1] * shape[2] > 1 and not _is_gate(name)
    ]
    if not spatial:
        raise ValueError(
            "no tap has a spatial extent [n, h, w, c]; mark one with "
            'jax.ad_checkpoint.checkpoint_name(x, "name"), or bind a Flax model with models.bind'
        )
    return spatial[-1]


def _is_gate(name: str) -> bool:
    return name.partition("#")[0].split("/")[-1] == "gate"

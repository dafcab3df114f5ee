"""A JAX function as a list of steps whose named taps can be listed, read and perturbed.

`jax.ad_checkpoint.checkpoint_name(x, "stage3")` leaves one `name` equation in the jaxpr of any JAX
function, also under jit, vmap, grad and remat. `trace` turns the function into a flat list of
steps: calls (jit, remat) that hold a tap are inlined, a scan that holds one is unrolled and its
taps become `name#t`; everything else stays one step. `trace(..., open_calls=True)` opens every
call, so that a walk from the output back sees each primitive; a function with its own derivative
(custom_jvp, custom_vjp) keeps it: its body is opened beside it, and the step that computes its
result names the body's result first. Only this file knows how JAX represents a program.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core, source_info_util

from attnzoom_jax.errors import unknown_name

# The call-like primitives that may be inlined, and the parameter that holds what they call.
CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}


# Where weights are applied.
LINEAR_MAPS = ("conv_general_dilated", "dot_general")
# Functions with a derivative of their own, and the parameter that holds what they compute.
CUSTOM_CALLS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One application of a primitive: values are numbers, constants stand for themselves."""

    equation: Any
    function: Callable[..., list[Any]]  # applies the equation to values
    inputs: tuple[Any, ...]  # int: a value's number; Constant: the value itself
    outputs: tuple[int, ...]
    tap: str | None  # its name, if this step marks a tap
    caller: str = ""  # where the call that holds it was written

    @property
    def primitive(self) -> str:
        """The primitive's name; `jit:NAME` for a call of a jitted function."""
        name = self.equation.primitive.name
        return f"{name}:{self.equation.params['name']}" if name == "jit" else name

    @property
    def params(self) -> Mapping[str, Any]:
        """The primitive's parameters."""
        return self.equation.params

    @property
    def source(self) -> str:
        """Where the user's code calls it: file:line (function)."""
        return source_info_util.summarize(self.equation.source_info) or self.caller

    def apply(self, *inputs: Any) -> list[Any]:
        """The step on inputs of any float dtype, computed in that dtype.

        A call computes in the dtypes that it was traced with, and returns that of its inputs.
        """
        if any(_jaxprs_in(self.equation.params)):
            traced = [_shape(atom.aval) for atom in self.equation.invars]
            others, own = inputs[: -len(traced)], inputs[-len(traced) :]
            cast = [jnp.asarray(x, like.dtype) for x, like in zip(own, traced, strict=True)]
            wide = jnp.result_type(*(x for x in own if jnp.issubdtype(x.dtype, jnp.floating)))
            return [output.astype(wide) for output in self.function(*others, *cast)]
        params = dict(self.equation.params)
        if "preferred_element_type" in params:
            params["preferred_element_type"] = None
        outputs = self.equation.primitive.bind(*inputs, **params)
        return list(outputs) if self.equation.primitive.multiple_results else [outputs]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that the program holds rather than computes."""

    value: Any


class Values(dict[int, Any]):
    """What a program computed: {number of a value: array}; a constant stands for itself."""

    def __getitem__(self, ref: Any) -> Any:
        """The array that a step's input or a program's output refers to."""
        return ref.value if isinstance(ref, Constant) else super().__getitem__(ref)


@dataclasses.dataclass(frozen=True)
class Known:
    """A function, and the values at some of its taps for the arguments that it will be given.

    What looks at such a tap and beyond it then does not compute what comes before it. A value of
    another shape than the tap's is not used: the call is for a part of the batch.
    """

    fn: Callable[..., Any]
    values: Mapping[str, jax.Array]

    def __call__(self, *args: Any) -> Any:
        """The function itself."""
        return self.fn(*args)


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
        steps: in order of execution.
        inputs: numbers of the values that the flattened arguments give.
        outputs: numbers or constants of the flattened results.
        output_tree: structure of the result.
        shapes: {number of a value: its shape and dtype}.
        taps: {name: shape and dtype}, in order of execution.
        known: {tap: value that takes the place of the computed one}.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    output_tree: Any
    shapes: Mapping[int, jax.ShapeDtypeStruct]
    taps: Mapping[str, jax.ShapeDtypeStruct]
    known: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

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
        values = self.evaluate(*args, add=add)
        found = {
            step.tap: values[step.outputs[0]]
            for step in self.steps
            if step.tap is not None and step.tap in read
        }
        return self.result(values), found

    def evaluate(self, *args: Any, add: Mapping[str, jax.Array] | None = None) -> "Values":
        """Every value of the program, by its number.

        Args:
            *args: as given to `trace`, in shape and dtype.
            add: {tap: array added to its value}.

        Returns:
            The values; a constant is looked up as itself.
        """
        add = add or {}
        values = Values(zip(self.inputs, jax.tree.leaves(args), strict=True))
        for step in self.steps:
            inputs = [values[ref] for ref in step.inputs]
            if step.tap is not None and step.tap in self.known:
                inputs = [self.known[step.tap]]
            results = _apply(step, inputs)
            if step.tap is not None and step.tap in add:
                results = [results[0] + add[step.tap].astype(results[0].dtype)]
            values.update(zip(step.outputs, results, strict=True))
        return values

    def result(self, values: "Values") -> Any:
        """The function's result, from what `evaluate` returned."""
        return jax.tree.unflatten(self.output_tree, [values[ref] for ref in self.outputs])

    def check_tap(self, name: str) -> None:
        """Raise a ValueError that names near matches if there is no such tap."""
        if name not in self.taps:
            raise unknown_name("tap", name, self.taps)


def trace(
    fn: Callable[..., Any], *args: Any, open_calls: bool = False, whole: Collection[str] = ()
) -> Program:
    """Trace a function into a program.

    Args:
        fn: any JAX function, or one with taps that are `Known`.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
        open_calls: open every call and unroll every scan, not only those that hold a tap.
        whole: calls that stay one step all the same, as `jit:NAME`.

    Returns:
        The program; a tap name that occurs again gets `#1`, `#2`, ...

    Raises:
        ValueError: a tap inside a while loop or a cond, where it has no single value, or inside a
            function with its own derivative, which inlining would lose.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    flattened = _Flattening(open_calls, whole)
    inputs = flattened.new_values(closed.jaxpr.invars)
    outputs = flattened.inline(closed, inputs)
    known = fn.values.items() if isinstance(fn, Known) else ()
    return Program(
        steps=tuple(flattened.steps),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        output_tree=jax.tree.structure(shapes),
        shapes=flattened.shapes,
        taps=flattened.taps,
        known={tap: x for tap, x in known if _shape(x) == flattened.taps.get(tap)},
    )


class _Flattening:
    """Collects the steps of a jaxpr and of those it calls."""

    def __init__(self, open_calls: bool, whole: Collection[str]) -> None:
        self.open_calls = open_calls
        self.whole = whole
        self.steps: list[Step] = []
        self.taps: dict[str, jax.ShapeDtypeStruct] = {}
        self.shapes: dict[int, jax.ShapeDtypeStruct] = {}

    def new_values(self, variables: Sequence[Any]) -> list[int]:
        numbers = list(range(len(self.shapes), len(self.shapes) + len(variables)))
        self.shapes.update(zip(numbers, (_shape(v.aval) for v in variables), strict=True))
        return numbers

    def inline(self, closed: Any, inputs: Sequence[Any], caller: str = "") -> list[Any]:
        """Append the steps of a closed jaxpr applied to `inputs`; return its outputs."""
        jaxpr = closed.jaxpr
        refs: dict[Any, Any] = dict(zip(jaxpr.constvars, map(Constant, closed.consts), strict=True))
        refs.update(zip(jaxpr.invars, inputs, strict=True))

        def look_up(atom: Any) -> Any:
            return Constant(atom.val) if isinstance(atom, core.Literal) else refs[atom]

        for equation in jaxpr.eqns:
            # Inside of JAX's own functions an equation knows no line of the user's.
            source = source_info_util.summarize(equation.source_info) or caller
            arguments = [look_up(atom) for atom in equation.invars]
            body = self.body_to_open(equation)
            function = _as_function(jaxpr, equation)
            if body is None:
                outputs = self.append(equation, function, arguments, source)
            elif equation.primitive.name in CUSTOM_CALLS:
                results = self.inline(body, arguments, source)
                called = _after(len(results), function)
                outputs = self.append(equation, called, results + arguments, source)
            else:
                outputs = self.inline(body, arguments, source)
            refs.update(zip(equation.outvars, outputs, strict=True))
        return [look_up(atom) for atom in jaxpr.outvars]

    def body_to_open(self, equation: Any) -> Any | None:
        """What an equation calls, as a closed jaxpr, if its steps are to take its place."""
        primitive = equation.primitive.name
        if primitive == "name":
            return None
        body = _body_with_tap(equation)
        if primitive == "jit" and f"jit:{equation.params['name']}" in self.whole:
            if body is not None:
                raise ValueError(
                    f"the jitted function {equation.params['name']!r} holds a tap and has a rule "
                    "as one step; give the rule, or mark the tap, elsewhere"
                )
            return None
        if body is not None or not self.open_calls:
            return body
        if primitive == "scan":
            return _unroll(equation)
        parameter = (CALLS | CUSTOM_CALLS).get(primitive)
        return None if parameter is None else _close(equation.params[parameter])

    def append(self, equation: Any, function: Any, inputs: Sequence[Any], caller: str) -> list[int]:
        outputs = self.new_values(equation.outvars)
        tap = None
        if equation.primitive.name == "name":
            tap = self.unused_name(equation.params["name"])
            self.taps[tap] = self.shapes[outputs[0]]
        self.steps.append(Step(equation, function, tuple(inputs), tuple(outputs), tap, caller))
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


def _after(count: int, function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The function, taking `count` arguments before its own that it does not look at."""
    return lambda *arguments: function(*arguments[count:])


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

"""How the signal, what depends on the images, flows through a program.

A value is *signal* if it is computed from the images, other than through

- a gate: a mask marked `checkpoint_name(mask, "<path>/gate")`,
- a decision: a comparison, an index (no derivative passes there either).

What is not signal counts as a constant. Where two signal values meet in a product, a quotient or a
difference, this order decides what they are to each other:

1. One reaches it through more reductions and broadcasts than the other: a statistic of a norm, or
   a gate such as that of squeeze-and-excitation. It counts as a constant too.
2. Both are elementwise functions of one and the same value: together they are an activation.
3. Anything else is for the caller to refuse.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnzoom_jax.attribution.program import CUSTOM_CALLS, Constant, Program, Step
from attnzoom_jax.attribution.taps import is_gate

COPIES = {
    *("name", "copy", "copy_p", "convert_element_type", "reduce_precision", "stop_gradient"),
    *("sharding_constraint", "optimization_barrier", "mesh_cast", "pvary", "device_put"),
    *CUSTOM_CALLS,
}
REARRANGEMENTS = {
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "slice"),
    *("dynamic_slice", "gather", "split", "reduce_window_max", "reduce_max"),
}
ACTIVATIONS = {
    *("tanh", "logistic", "exp", "exp2", "expm1", "log", "log1p", "erf", "erfc", "sqrt", "rsqrt"),
    *("cbrt", "integer_pow", "pow", "square", "abs"),
}
ELEMENTWISE = {
    *(ACTIVATIONS | COPIES),
    *("add", "sub", "mul", "div", "neg", "max", "min", "clamp", "select_n", "sign", "floor"),
    *("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "is_finite", "add_any"),
}
# Where the minimum of an activation is looked for; further out it must not fall below that.
GRID = np.linspace(-20, 20, 20_001)
FAR_OUT = np.array([-1e4, -1e3, -1e2, 1e2, 1e3, 1e4])


class Flow:
    """The signal of a program.

    Attributes:
        program: the program.
        producer: {value: the step that computes it}.
        reductions: {signal value: the fewest reductions and broadcasts between it and the images}.
    """

    def __init__(self, program: Program, *, through_gates: bool = False) -> None:
        """Follow the signal from the program's inputs to its end.

        Args:
            program: with all its calls opened.
            through_gates: count gates as signal too, for what is a plain derivative.
        """
        self.program = program
        self.producer = {ref: step for step in program.steps for ref in step.outputs}
        self.reductions: dict[int, int] = dict.fromkeys(program.inputs, 0)
        for step in program.steps:
            signal = [ref for ref in signal_inputs(step) if self.is_signal(ref)]
            is_gated = step.primitive == "name" and is_gate(step.params["name"])
            if not signal or (is_gated and not through_gates):
                continue
            is_float = any(map(self._is_float, signal))
            for output in step.outputs:
                is_decision = is_float and not self._is_float(output)
                if is_decision or program.shapes[output].dtype == jnp.bool_:
                    continue
                self.reductions[output] = min(
                    self.reductions[ref] + self._reduces(step, ref) for ref in signal
                )

    def is_signal(self, ref: Any) -> bool:
        """Whether a value depends on the images."""
        return not isinstance(ref, Constant) and ref in self.reductions

    def reached_from(self, taps: Sequence[str]) -> set[int]:
        """The signal values that depend on one of the taps, the tap's own value included."""
        reached: set[int] = set()
        for step in self.program.steps:
            if step.tap in taps or reached.intersection(
                ref for ref in step.inputs if not isinstance(ref, Constant)
            ):
                reached.update(filter(self.is_signal, step.outputs))
        return reached

    def statistic(self, step: Step) -> int | None:
        """Which of a step's two signal inputs is a statistic or a gate: 0, 1, or None."""
        first, second = (self.reductions[ref] + self._reduces(step, ref) for ref in step.inputs)
        return None if first == second else int(second > first)

    def common_source(self, refs: Sequence[int]) -> int | None:
        """The nearest value of which all of these are elementwise functions."""
        return next(self._sources(refs), None)

    def minimum(self, ref: Any) -> float | jax.Array | None:
        """The smallest value that an activation can give: -1 for tanh, -0.17 for GELU.

        Args:
            ref: a value.

        Returns:
            The minimum, measured on a grid, where `ref` is an activation's output, or a copy, a
            rearrangement or a concatenation of such; else None. Traced where a parameter of the
            activation is; then 0 stands for one without a minimum.
        """
        # Under jit too, what is known is computed now.
        with jax.ensure_compile_time_eval():
            return self._minimum(ref)

    def _minimum(self, ref: Any) -> Any:
        step = self.producer.get(ref) if self.is_signal(ref) else None
        if step is None:
            return None
        if step.primitive in ("concatenate", "stack"):
            minima = [self._minimum(part) for part in step.inputs]
            if any(value is None for value in minima):
                return None
            is_traced = any(isinstance(value, Tracer) for value in minima)
            return jnp.stack(minima).min() if is_traced else min(minima)
        if step.primitive in COPIES | REARRANGEMENTS:
            return self._minimum(step.inputs[0])
        if step.primitive == "max" and any(scalar(other) == 0 for other in step.inputs):
            return 0.0  # ReLU, without looking
        found = None
        for source in self._sources([ref]):  # the further the source, the closer the bound
            near, far = (self._evaluate(ref, {source: grid}) for grid in (GRID, FAR_OUT))
            if near is None or far is None:
                continue
            is_bounded = far.min() >= near.min() - 1e-6
            if isinstance(near, Tracer):  # a parameter of the activation is traced
                found = jnp.where(is_bounded, near.min(), 0.0)
            elif is_bounded:
                found = float(near.min())
        return found

    def _sources(self, refs: Sequence[int]) -> Iterator[int]:
        """The values of which these are all elementwise functions, nearest first."""
        frontier, is_first = set(refs), len(refs) == 1  # a value is no function of itself
        while True:
            if len(frontier) == 1 and not is_first:
                yield next(iter(frontier))
            is_first = False
            last = max(frontier)  # values are numbered in order of execution
            step = self.producer.get(last)
            if step is None or step.primitive not in ELEMENTWISE:
                return
            inputs = [ref for ref in signal_inputs(step) if self.is_signal(ref)]
            if any(self._shape(ref) != self._shape(last) for ref in inputs):
                return
            frontier = (frontier - {last}) | set(inputs)

    def _evaluate(self, ref: Any, values: dict[Any, Any]) -> Any:
        """An elementwise function of values given, or None where it holds more than scalars."""
        if isinstance(ref, Constant):
            return jnp.reshape(ref.value, ()) if np.size(ref.value) == 1 else None
        if ref not in values:
            step = self.producer.get(ref)
            if step is None or step.primitive not in ELEMENTWISE | {"broadcast_in_dim"}:
                return None
            inputs = [self._evaluate(part, values) for part in signal_inputs(step)]
            if any(value is None for value in inputs):
                return None
            if step.primitive in {"broadcast_in_dim", *COPIES} - {"convert_element_type"}:
                values[ref] = inputs[0]
            else:
                arrays = jnp.broadcast_arrays(*map(_in_float32, inputs))
                values[ref] = step.apply(*arrays)[0]
        return values[ref]

    def _shape(self, ref: Any) -> tuple[int, ...]:
        return self.program.shapes[ref].shape

    def _is_float(self, ref: int) -> bool:
        return jnp.issubdtype(self.program.shapes[ref].dtype, jnp.floating)

    def _reduces(self, step: Step, ref: int) -> int:
        """1 if the step reduces this input, or spreads it over more elements; else 0."""
        primitive = step.primitive
        if primitive.startswith("reduce_") and primitive != "reduce_precision":
            return 1
        if primitive in ("broadcast_in_dim", "tile") or primitive in ELEMENTWISE:
            sizes = [self.program.shapes[value].size for value in (ref, step.outputs[0])]
            return int(sizes[0] < sizes[1])
        return 0


def signal_inputs(step: Step) -> tuple[Any, ...]:
    """The inputs that relevance may flow to: of a custom call, its body's results."""
    return step.inputs[: len(step.outputs)] if step.primitive in CUSTOM_CALLS else step.inputs


def scalar(ref: Any) -> np.ndarray | None:
    """The value of a constant of one element that can be looked at, else None."""
    value = ref.value if isinstance(ref, Constant) else None
    if value is None or isinstance(value, Tracer) or np.size(value) != 1:
        return None
    return np.asarray(value).reshape(())


def _in_float32(value: Any) -> jax.Array:
    """Constants of half precision meet a grid of float32."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.asarray(value, jnp.float32)
    return jnp.asarray(value)

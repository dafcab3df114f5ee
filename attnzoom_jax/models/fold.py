"""Batch norms folded into the convolutions before them, for inference and attribution.

A norm at rest is one multiplication and one addition per channel,

    norm(conv(x)) = m (K x + b - mean) + beta,   m = scale / sqrt(var + epsilon)

so that the kernel m K, without a norm but with the bias m (b - mean) + beta, gives the same. What
is folded here keeps its place in the tree of the variables: the norm is set to scale 1, mean 0,
variance 1 - epsilon, and its bias stays where the convolution has none. The model is the same
module, with the same taps and checkpoints; between a kernel and its ReLU there is only an addition
left, so that a rule for kernels (excitation backprop, relevance) sees the whole linear map. It is
not faster: XLA fuses a norm at rest with what follows it, folded or not.

Which norm follows which convolution is read from the model's trace: the convolution's output has
the norm as its only reader. Others stay as they are (a norm that comes first in its block, an
output that a sum reads as well, a layer between the two, a module called more than once).
"""

import collections
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution.program import Program, trace
from attnzoom_jax.models.insert import train_argument

NORM = "folding norm: "  # before the path, as the name of a tap
# Primitives that change no value, and those that lay out a bias for its addition.
AS_IT_IS = ("name", "convert_element_type")
SPREADING = ("reshape", "broadcast_in_dim")


def fold_batch_norm(
    model: nn.Module, variables: Any, *, image_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Variables with which the model computes the same, its norms being part of the kernels.

    For inference only: training would normalise by the batch, and give something else.

    Args:
        model: any linen module of images.
        variables: its variables, {"params": ..., "batch_stats": ..., ...}.
        image_shape: [n, h, w, c] of images that the model takes.

    Returns:
        Variables of the same shapes, those of folded norms and their convolutions in float32.

    Raises:
        ValueError: no batch norm reads the output of a convolution and is its only reader.
    """
    pairs = _pairs(model, variables, image_shape)
    if not pairs:
        raise ValueError(
            f"fold_batch_norm: in {type(model).__name__} no batch norm directly follows a "
            "convolution; there is nothing to fold"
        )
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}
    for conv, (norm, epsilon) in pairs.items():
        _fold(flat, conv, norm, epsilon)
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in flat.items()}, sep="/")


def _fold(flat: dict[str, Any], conv: str, norm: str, epsilon: float) -> None:
    """Fold one norm, in place; in float64."""
    kernel = f"params/{conv}/kernel"  # [..., c]
    mean, var = f"batch_stats/{norm}/mean", f"batch_stats/{norm}/var"
    scale, norm_bias, conv_bias = (
        f"params/{norm}/scale",
        f"params/{norm}/bias",
        f"params/{conv}/bias",
    )
    factor = flat.get(scale, 1.0) / np.sqrt(np.float64(flat[var]) + epsilon)  # [c]
    bias = (flat.get(conv_bias, 0.0) - np.float64(flat[mean])) * factor + flat.get(norm_bias, 0.0)
    flat[kernel] = np.float32(flat[kernel] * factor)
    flat[var] = np.full_like(flat[var], 1 - epsilon)
    if scale in flat:
        flat[scale] = np.ones_like(flat[scale])
    # Whichever of the three is there takes the bias; a norm has a mean in any case.
    values = {conv_bias: bias, norm_bias: bias, mean: -bias}
    taker = next(path for path in values if path in flat)
    for path in values:
        if path in flat:
            flat[path] = np.float32(values[path] if path == taker else np.zeros_like(bias))


def _pairs(
    model: nn.Module, variables: Any, image_shape: tuple[int, ...]
) -> dict[str, tuple[str, float]]:
    """{path of a convolution: path and epsilon of the norm that alone reads its output}."""
    epsilons = {}

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and _is_at_rest(module, args, kwargs):
            path = "/".join(module.path)
            epsilons[path] = module.epsilon
            args = (checkpoint_name(args[0], NORM + path), *args[1:])
        return next_fun(*args, **kwargs)

    def run(variables: Any, images: jax.Array) -> Any:
        train: Any = train_argument(model, False)
        with nn.intercept_methods(interceptor):
            return model.apply(variables, images, **train)

    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    walk = _Walk(trace(run, variables, images, open_calls=True), variables)
    pairs = {}
    for norm, epsilon in epsilons.items():
        conv = walk.convolution_before(NORM + norm)
        if conv:
            pairs[conv] = (norm, epsilon)
    return pairs


def _is_at_rest(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call is of a batch norm of the last axis with its running statistics."""
    if not isinstance(module, nn.BatchNorm) or not args:
        return False
    at_rest = kwargs.get("use_running_average", module.use_running_average)
    return bool(at_rest) and module.axis in (-1, args[0].ndim - 1)


class _Walk:
    """Walks a program backwards, from a norm to the convolution that it reads."""

    def __init__(self, program: Program, variables: Any) -> None:
        self.program = program
        self.producers = {step.outputs[0]: step for step in program.steps}
        read = [number for step in program.steps for number in step.inputs]
        self.readers = collections.Counter(
            number for number in (*read, *program.outputs) if isinstance(number, int)
        )
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        paths = ["/".join(key.key for key in path) for path, _ in leaves]
        self.parameters = dict(zip(program.inputs, paths, strict=False))  # the images come last

    def convolution_before(self, tap: str) -> str:
        """The path of the convolution whose output goes to a tap and nowhere else; "" if none."""
        if tap not in self.program.taps or f"{tap}#1" in self.program.taps:
            return ""
        (number,) = (step.inputs[0] for step in self.program.steps if step.tap == tap)
        bias = ""
        while self.readers[number] == 1 and number in self.producers:
            step = self.producers[number]
            number = step.inputs[0]
            if step.primitive == "add" and not bias:
                bias = self._parameter(step.inputs[1], (*AS_IT_IS, *SPREADING))
                if not bias:
                    break
            elif step.primitive == "conv_general_dilated":
                return self._path(step, bias)
            elif step.primitive not in AS_IT_IS:
                break
        return ""

    def _path(self, step: Any, bias: str) -> str:
        """The module of a convolution that uses a kernel, and the bias if any, of its own."""
        kernel = self._parameter(step.inputs[1], AS_IT_IS)
        path = kernel.removeprefix("params/").removesuffix("/kernel")
        is_plain = kernel == f"params/{path}/kernel" and bias in ("", f"params/{path}/bias")
        numbers = step.params["dimension_numbers"]
        is_last = numbers.rhs_spec[0] == len(numbers.rhs_spec) - 1  # the axis of output channels
        return path if is_plain and is_last else ""

    def _parameter(self, number: Any, through: tuple[str, ...]) -> str:
        """The path of the parameter that a value is, and the only use of; "" if none."""
        while isinstance(number, int) and self.readers[number] == 1:
            if number in self.parameters:
                return self.parameters[number]
            if number not in self.producers or self.producers[number].primitive not in through:
                break
            number = self.producers[number].inputs[0]
        return ""

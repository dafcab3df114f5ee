"""A maximum along axes that is safe to differentiate, and keeps NaN.

The gradient of jnp.max compares x with its maximum once more: where a compiler computes x a second
time, rounded otherwise, no place is equal, and the gradient is divided by zero (seen in CBAM with
XLA's optimisations off). Choosing a place by argmax cannot fail so.

jnp.max should be NaN where there is one, but XLA's reductions on the CPU drop it from larger arrays
(JAX 0.10.2). argmax finds it.
"""

import math

import jax
import jax.numpy as jnp


def first_max(x: jax.Array, *, axis: int | tuple[int, ...], keepdims: bool = False) -> jax.Array:
    """The maximum; its gradient goes to the first place that reaches it, as torch's max does.

    Args:
        x: floats of any shape.
        axis: one axis, or neighbouring ones in increasing order.
        keepdims: whether the axes stay, with length 1.

    Returns:
        The maximum, NaN where there is one, without these axes unless `keepdims`.
    """
    axes = (axis,) if isinstance(axis, int) else axis
    axes = tuple(a % x.ndim for a in axes)
    first, last = axes[0], axes[-1] + 1
    if axes != tuple(range(first, last)):
        raise ValueError(f"axis={axis} of shape {x.shape}: expected neighbouring axes, in order")
    shape = (*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:])
    flat = x.reshape(shape)
    place = jnp.argmax(flat, axis=first, keepdims=True)
    top = jnp.take_along_axis(flat, place, axis=first).squeeze(first)
    return jnp.expand_dims(top, axes) if keepdims else top

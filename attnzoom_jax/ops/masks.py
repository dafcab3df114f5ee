"""Attention masks: from logits of any real value to weights in [0, 1]."""

import jax
import jax.numpy as jnp


def saturated_sigmoid(
    logits: jax.Array, *, threshold: float, straight_through: bool = False
) -> jax.Array:
    """Sigmoid that jumps to one where it reaches a threshold.

    f(a) = 1 if sigmoid(a) >= threshold, else sigmoid(a). What matters passes untouched, the rest
    fades. Its gradient is sigmoid(a) (1 - sigmoid(a)) below the threshold and 0 from there on.

    Args:
        logits: any shape, any real values.
        threshold: at or below 0 every weight is 1; above 1 this is the plain sigmoid.
        straight_through: the same values with the gradient of the sigmoid everywhere, so that a
            mask of ones can still learn; ours, not the paper's.

    Returns:
        float32 weights shaped like `logits`, in (0, threshold) or exactly 1.

    Source: AttZoom (arXiv 2508.03625), attention module, thresholded sigmoid.
    """
    weights = jax.nn.sigmoid(logits.astype(jnp.float32))
    saturated = jnp.where(weights >= threshold, 1.0, weights)
    if straight_through:
        return jax.lax.stop_gradient(saturated) + (weights - jax.lax.stop_gradient(weights))
    return saturated

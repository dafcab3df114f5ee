"""Filters that slide a small kernel over rows, then over columns."""

import jax
import jax.numpy as jnp
import numpy as np


def smooth(values: jax.Array, kernel: np.ndarray) -> jax.Array:
    """Weighted means over a square window, where the window lies inside the array.

    Args:
        values: float [n, h, w, ...], h and w at least m. Pad it first for a result of its size.
        kernel: [m], the weights along rows and along columns; the window has their outer product.

    Returns:
        [n, h - m + 1, w - m + 1, ...], of the type of `values`.

    Raises:
        ValueError: an array smaller than the window.
    """
    m = len(kernel)
    if values.ndim < 3 or min(values.shape[1:3]) < m:
        raise ValueError(
            f"values have shape {values.shape}; expected [n, h, w, ...] with at least {m} rows and "
            f"columns, for a window of {m}"
        )
    weights = np.asarray(kernel, values.dtype)
    for axis in (1, 2):
        length = values.shape[axis] - m + 1
        total = jnp.zeros((), values.dtype)
        for i, weight in enumerate(weights):
            total += weight * jax.lax.slice_in_dim(values, i, i + length, axis=axis)
        values = total
    return values

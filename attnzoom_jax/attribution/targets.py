"""What a map explains: the cued class as a start signal on the logits, and checks of the request.

The start signal of a class puts 1 on its logit. Where the function is fully convolutional, with
logits [n, h, w, k], it spreads over the positions of that class's map as a spatial softmax (Zhang
et al. 2016, arXiv 1608.00507, as their code and TorchRay's do it); a 1x1 map gives the 1 again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnzoom_jax.attribution.program import Program
from attnzoom_jax.errors import unknown_name

SCORES = ("logit", "probability", "sigmoid")


def start_signal(logits: Any, targets: jax.Array) -> jax.Array:
    """The weight of every logit in what a map explains.

    Args:
        logits: what the function returned, [n, k] or [n, h, w, k].
        targets: class ids int [n] in [0, k), or weights float [n, k].

    Returns:
        An array of the shape of the logits, at least float32, to which no gradient flows; under
        jit NaN for a class id out of range.

    Raises:
        ValueError: logits that are no such float array, targets of another shape or range.
    """
    check_logits(logits)
    weights = class_weights(logits.shape[0], logits.shape[-1], targets)
    logits = jax.lax.stop_gradient(at_least_float32(logits))
    weights = jax.lax.stop_gradient(weights.astype(logits.dtype))
    if logits.ndim == 2:
        return weights
    weights = weights[:, None, None, :]
    # A class that is not asked for may be minus infinity, its softmax NaN.
    return jnp.where(weights != 0, weights * jax.nn.softmax(logits, axis=(1, 2)), 0)


def target_score(logits: Any, targets: jax.Array, *, score: str = "logit") -> jax.Array:
    """The score that a map explains: the logits weighted by the start signal.

    Args:
        logits: [n, k] or [n, h, w, k].
        targets: class ids int [n] in [0, k), or weights float [n, k].
        score: "logit", "probability" (softmax over the classes) or "sigmoid" of the logit.

    Returns:
        Scores [n], at least float32; under jit NaN for a class id out of range.

    Raises:
        ValueError: as `start_signal`, or an unknown score.
    """
    check_score(score)
    signal = start_signal(logits, targets)
    values = logits.astype(signal.dtype)
    if score == "probability":
        values = jax.nn.softmax(values, axis=-1)
    elif score == "sigmoid":
        values = jax.nn.sigmoid(values)
    return _weighted(signal, values).sum(axis=tuple(range(1, logits.ndim)))


def class_scores(logits: Any) -> jax.Array:
    """The score of every class.

    Args:
        logits: [n, k] or [n, h, w, k].

    Returns:
        Scores [n, k], at least float32: the logits, or their means weighted by the spatial softmax.

    Raises:
        ValueError: logits that are no such float array.
    """
    check_logits(logits)
    n, k = logits.shape[0], logits.shape[-1]
    signal = start_signal(logits, jnp.ones((n, k)))
    values = logits.astype(signal.dtype)
    return values if logits.ndim == 2 else _weighted(signal, values).sum(axis=(1, 2))


def class_weights(n: int, k: int, targets: Any) -> jax.Array:
    """Targets as weights of the classes.

    Args:
        n: number of images.
        k: number of classes.
        targets: class ids int [n] in [0, k), or weights float [n, k].

    Returns:
        Float [n, k]; under jit NaN for a class id out of range.

    Raises:
        ValueError: targets of another shape, type or range.
    """
    shape, dtype = jnp.shape(targets), jnp.result_type(targets)
    if shape == (n, k) and jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(targets)
    if shape != (n,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"targets must be class ids int [{n}] or logit weights float [{n}, {k}], not "
            f"{dtype} {list(shape)}"
        )
    return one_hot(targets, k)


def one_hot(ids: Any, k: int) -> jax.Array:
    """Class ids as weights of the classes.

    Args:
        ids: int [...], in [0, k).
        k: number of classes.

    Returns:
        Float [..., k]; under jit NaN for a class id out of range.

    Raises:
        ValueError: a class id out of range.
    """
    check_class_ids(ids, k)
    ids = jnp.asarray(ids)
    is_class = (ids >= 0) & (ids < k)
    return jnp.where(is_class[..., None], jax.nn.one_hot(ids, k), jnp.nan)


def at_least_float32(values: jax.Array) -> jax.Array:
    """Relevance, gradients and maps keep float64 and leave bfloat16 behind."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def check_logits(logits: Any) -> None:
    """Raise a ValueError unless the function returned float logits [n, k] or [n, h, w, k]."""
    if not _is_array(logits) or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"the function must return one float array of logits [n, k], not {_describe(logits)}; "
            "wrap it in a function that returns the logits alone"
        )
    if logits.ndim not in (2, 4):
        raise ValueError(
            f"logits must have the shape [n, k] or [n, h, w, k], not {list(logits.shape)}"
        )


def check_targets(fn: Callable[[jax.Array], Any], images: jax.Array, targets: jax.Array) -> None:
    """Raise a ValueError unless targets fit what the function returns; nothing is computed."""
    logits = jax.eval_shape(fn, images)
    check_logits(logits)
    class_weights(logits.shape[0], logits.shape[-1], targets)


def check_class_ids(ids: Any, k: int) -> None:
    """Raise a ValueError if a class id whose value is known is not in [0, k)."""
    # A traced value cannot be looked at, nor one of which this process holds only a part.
    if isinstance(ids, Tracer) or not getattr(ids, "is_fully_addressable", True):
        return
    # By NumPy: in a function that is being traced, JAX would trace the minimum of a known value.
    values = np.asarray(ids)
    for extreme in (values.min(), values.max()) if values.size else ():
        if not 0 <= extreme < k:
            raise ValueError(f"target {extreme} is out of range for {k} classes")


def check_spatial(program: Program, tap: str, n: int) -> None:
    """Raise a ValueError unless the program has this tap, with float values [n, h, w, c]."""
    program.check_tap(tap)
    shape, dtype = program.taps[tap].shape, program.taps[tap].dtype
    if len(shape) != 4 or shape[0] != n:
        raise ValueError(
            f"tap {tap!r} has the shape {list(shape)}; a map needs [n, h, w, c] with n = {n}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"tap {tap!r} is {dtype}; a map needs float values")


def check_images(images: Any) -> None:
    """Raise a ValueError unless images are a float array [n, h, w, c]."""
    shape, dtype = jnp.shape(images), jnp.result_type(images)
    if len(shape) != 4 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"images must be float [n, h, w, c], not {dtype} {list(shape)}; convert them as the "
            "network expects its input, for example images.astype(jnp.float32) / 255"
        )


def check_score(score: str) -> None:
    """Raise a ValueError that names near matches unless the score is one of SCORES."""
    if score not in SCORES:
        raise unknown_name("score", score, SCORES)


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError unless a setting is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")


def _weighted(signal: jax.Array, values: jax.Array) -> jax.Array:
    """The product, zero where the signal is: also on logits of minus infinity, masked classes."""
    return jnp.where(signal != 0, signal * values, 0)


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, jax.ShapeDtypeStruct))


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if _is_array(value) else type(value).__name__

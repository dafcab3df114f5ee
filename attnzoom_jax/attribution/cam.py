"""Class activation maps from the gradient of a class score at a tap.

Grad-CAM (Selvaraju et al. 2017): for activations A [n, h, w, c] at the tap and the score y of the
cued class before the softmax,

    alpha_k = mean over positions of dy / dA_k        (eq. 1)
    map     = sum_k alpha_k A_k                       (eq. 2, before its final ReLU)

The final ReLU is `ops.maps.positive`, applied by whoever wants it: a raw map can be compared.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from attnzoom_jax.attribution.program import Program, trace


def grad_cam(
    fn: Callable[[jax.Array], Any], images: jax.Array, targets: jax.Array, *, tap: str
) -> jax.Array:
    """Grad-CAM at a tap.

    Args:
        fn: images [n, h, w, c] -> logits [n, k]; each image's logits depend on that image alone.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap of shape [n, h', w', c'].

    Returns:
        Raw float32 maps [n, h', w'], signed, neither rescaled nor normalised.

    Raises:
        ValueError: unknown tap, tap without spatial axes, logits or targets of a wrong shape.
    """
    activations, gradients = gradient_at_tap(fn, images, targets, tap=tap)
    weights = gradients.mean(axis=(1, 2))  # [n, c']
    return jnp.einsum("nc,nhwc->nhw", weights, activations)


def gradient_at_tap(
    fn: Callable[[jax.Array], Any], images: jax.Array, targets: jax.Array, *, tap: str
) -> tuple[jax.Array, jax.Array]:
    """Activations at a tap and the gradient of each image's own score by them.

    Args:
        fn: images [n, h, w, c] -> logits [n, k].
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap of shape [n, h', w', c'].

    Returns:
        Two float32 arrays [n, h', w', c'].

    Raises:
        ValueError: as `grad_cam`.
    """
    program = trace(fn, images)
    _check_spatial(program, tap, images.shape[0])
    shape = program.taps[tap]

    def score(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, values = program.run(images, read=[tap], add={tap: delta})
        return target_score(logits, targets).sum(), values[tap]

    # The gradient by an addition of zero at the tap: nothing below the tap is differentiated.
    zeros = jnp.zeros(shape.shape, shape.dtype)
    gradients, activations = jax.grad(score, has_aux=True)(zeros)
    return activations.astype(jnp.float32), gradients.astype(jnp.float32)


def target_score(logits: Any, targets: jax.Array) -> jax.Array:
    """The score that a map explains: the cued logit, or a weighted sum of logits.

    Args:
        logits: [n, k].
        targets: class ids int [n] in [0, k), or weights float [n, k].

    Returns:
        Float32 scores [n].

    Raises:
        ValueError: logits that are no float array [n, k], targets of another shape or range.
    """
    if not isinstance(logits, jax.Array) or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"the function must return one float array of logits [n, k], not {_describe(logits)}; "
            "wrap it in a function that returns the logits alone"
        )
    if logits.ndim != 2:
        raise ValueError(f"logits must have the shape [n, k], not {list(logits.shape)}")
    n, k = logits.shape
    logits = logits.astype(jnp.float32)
    targets = jnp.asarray(targets)
    if targets.shape == (n, k) and jnp.issubdtype(targets.dtype, jnp.floating):
        return (logits * targets).sum(axis=1)
    if targets.shape != (n,) or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be class ids int [{n}] or logit weights float [{n}, {k}], not "
            f"{targets.dtype} {list(targets.shape)}"
        )
    if n and not isinstance(targets, Tracer):  # a traced value cannot be looked at
        for extreme in (int(targets.min()), int(targets.max())):
            if not 0 <= extreme < k:
                raise ValueError(f"target {extreme} is out of range for {k} classes")
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


def _check_spatial(program: Program, tap: str, n: int) -> None:
    program.check_tap(tap)
    shape = program.taps[tap].shape
    if len(shape) != 4 or shape[0] != n:
        raise ValueError(
            f"tap {tap!r} has the shape {list(shape)}; a map needs [n, h, w, c] with n = {n}"
        )


def _describe(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__

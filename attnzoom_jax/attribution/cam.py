"""Class activation maps from the gradient of a class score at a tap.

Grad-CAM (Selvaraju et al. 2017): for activations A [n, h, w, c] at the tap and the score y of the
cued class before the softmax,

    alpha_k = mean over positions of dy / dA_k        (eq. 1)
    map     = sum_k alpha_k A_k                       (eq. 2, before its final ReLU)

The final ReLU is `ops.maps.positive`, applied by whoever wants it: a raw map can be compared.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from attnzoom_jax.attribution.program import Program, trace


def grad_cam(
    fn: Callable[[jax.Array], Any],
    images: jax.Array,
    targets: jax.Array,
    *,
    tap: str | Sequence[str],
) -> Any:
    """Grad-CAM at a tap, or at several in one pass.

    Args:
        fn: images [n, h, w, c] -> logits [n, k]; each image's logits depend on that image alone.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap of shape [n, h', w', c'], or a list of such names.

    Returns:
        Raw float32 maps [n, h', w'], signed, neither rescaled nor normalised; for a list of taps
        {tap: maps}. Under jit a class id out of range gives a map of NaN.

    Raises:
        ValueError: unknown tap, tap without spatial axes, logits or targets of a wrong shape, class
            id out of range.
    """
    taps = [tap] if isinstance(tap, str) else list(tap)
    values = gradients_at_taps(fn, images, targets, taps=taps)
    maps = {}
    for name, (activations, gradients) in values.items():
        weights = gradients.mean(axis=(1, 2))  # [n, c']
        maps[name] = jnp.einsum("nc,nhwc->nhw", weights, activations)
    return maps[tap] if isinstance(tap, str) else maps


def gradients_at_taps(
    fn: Callable[[jax.Array], Any], images: jax.Array, targets: jax.Array, *, taps: Sequence[str]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Activations at taps and the gradient of each image's own score by them.

    Args:
        fn: images [n, h, w, c] -> logits [n, k].
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        taps: names of taps of shape [n, h', w', c'].

    Returns:
        {tap: (activations, gradients)}, float32 [n, h', w', c'] each.

    Raises:
        ValueError: as `grad_cam`.
    """
    program = trace(fn, images)
    for tap in taps:
        _check_spatial(program, tap, images.shape[0])

    def score(deltas: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, values = program.run(images, read=taps, add=deltas)
        return target_score(logits, targets).sum(), values

    # The gradient by an addition of zero at the tap: nothing below the tap is differentiated.
    zeros = {tap: jnp.zeros(program.taps[tap].shape, program.taps[tap].dtype) for tap in taps}
    gradients, activations = jax.grad(score, has_aux=True)(zeros)
    return {
        tap: (activations[tap].astype(jnp.float32), gradients[tap].astype(jnp.float32))
        for tap in taps
    }


def target_score(logits: Any, targets: jax.Array) -> jax.Array:
    """The score that a map explains: the cued logit, or a weighted sum of logits.

    Args:
        logits: [n, k].
        targets: class ids int [n] in [0, k), or weights float [n, k].

    Returns:
        Float32 scores [n]; under jit NaN for a class id out of range.

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
    # A factor, so that a class that is not there makes the gradient NaN as well.
    is_known = jnp.where((targets >= 0) & (targets < k), 1.0, jnp.nan)
    scores = jnp.take_along_axis(logits, targets[:, None], axis=1, mode="clip")[:, 0]
    return scores * is_known


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

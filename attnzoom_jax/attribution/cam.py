"""Class activation maps from the gradient of a class score at a tap.

For activations A [n, h, w, c] at the tap and the gradient g = dy/dA of the score y of the cued
class before the softmax, sums over positions and channels of each image, the map at a position is

    Grad-CAM     sum_k A_k mean(g_k)                                   (Selvaraju et al. 2017)
    Grad-CAM++   sum_k A_k sum(relu(g_k) g_k^2 / (2 g_k^2 + sum(A_k) g_k^3))
                                                                    (Chattopadhay et al. 2018)
    HiRes-CAM    sum_k A_k g_k                                     (Draelos and Carin 2020)
    Layer-CAM    sum_k A_k relu(g_k)                                   (Jiang et al. 2021)
    XGrad-CAM    sum_k A_k sum(g_k A_k) / sum(A_k)                     (Fu et al. 2020)
    Finer-CAM    Grad-CAM of y - alpha * mean of the scores of look-alike classes
                                                                       (Zhang et al. 2025)

where a mean or sum with parentheses runs over the positions of one channel. A quotient whose
denominator is zero counts as zero; there is no epsilon. The final ReLU is `ops.maps.positive`,
applied by whoever wants it: a raw map can be compared.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnzoom_jax.attribution.chunks import map_images
from attnzoom_jax.attribution.taps import trace_at
from attnzoom_jax.attribution.targets import (
    at_least_float32,
    check_class_ids,
    check_logits,
    check_spatial,
    class_scores,
    class_weights,
    one_hot,
    target_score,
)

LOOK_ALIKES = 3  # classes that Finer-CAM compares with, unless they are given

Fn = Callable[[jax.Array], Any]
Tap = str | Sequence[str]
Score = Callable[..., jax.Array]  # (logits, targets, ...) -> [n]
Combine = Callable[[jax.Array, jax.Array], jax.Array]  # (activations, gradients) -> [n, h, w]


def grad_cam(
    fn: Fn, images: jax.Array, targets: jax.Array, *, tap: Tap, chunk_size: int | None = None
) -> Any:
    """Grad-CAM at a tap, or at several in one pass.

    Args:
        fn: images [n, h, w, c] -> logits [n, k], or [n, h, w, k] where it is fully convolutional
            (then the score is their mean weighted by the class's spatial softmax, which is held
            constant); each image's logits depend on that image alone.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap of shape [n, h', w', c'], or a list of such names; "input" is the images.
        chunk_size: images per pass, in turn within one program; None for all at once.

    Returns:
        Raw maps [n, h', w'], at least float32, signed, neither rescaled nor normalised; for a list
        of taps {tap: maps}. Under jit a class id out of range gives a map of NaN.

    Raises:
        ValueError: unknown tap, tap without spatial axes, logits or targets of a wrong shape, class
            id out of range, bad chunk size.

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), eq. 1-2.
    """
    return _cam(_mean_gradient, fn, images, targets, tap=tap, chunk_size=chunk_size)


def grad_cam_plus_plus(
    fn: Fn, images: jax.Array, targets: jax.Array, *, tap: Tap, chunk_size: int | None = None
) -> Any:
    """Grad-CAM++: positive gradients, summed with closed-form weights per position.

    Args:
        fn: as for `grad_cam`.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap, or a list of names.
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `grad_cam` returns them. They lack the factor exp(y) of the paper's score, a
        constant of each image. Made for activations that are not negative; with others a
        denominator may change its sign.

    Raises:
        ValueError: as `grad_cam`.

    Source: Chattopadhay et al. 2018 (arXiv 1710.11063), eq. 10 and 19.
    """
    return _cam(_higher_order, fn, images, targets, tap=tap, chunk_size=chunk_size)


def hires_cam(
    fn: Fn, images: jax.Array, targets: jax.Array, *, tap: Tap, chunk_size: int | None = None
) -> Any:
    """HiRes-CAM: each position weighted by its own gradient.

    Args:
        fn: as for `grad_cam`.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap, or a list of names.
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `grad_cam` returns them. Where all that follows the tap is linear, a map sums to
        the score less its bias.

    Raises:
        ValueError: as `grad_cam`.

    Source: Draelos and Carin 2020 (arXiv 2011.08891).
    """
    return _cam(_product, fn, images, targets, tap=tap, chunk_size=chunk_size)


def layer_cam(
    fn: Fn, images: jax.Array, targets: jax.Array, *, tap: Tap, chunk_size: int | None = None
) -> Any:
    """Layer-CAM: each position weighted by its own gradient where that is positive.

    Args:
        fn: as for `grad_cam`.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap, or a list of names; early stages are what the method is made for.
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `grad_cam` returns them.

    Raises:
        ValueError: as `grad_cam`.

    Source: Jiang et al. 2021 (IEEE TIP 30, 5875), eq. 5-6.
    """
    return _cam(_positive_product, fn, images, targets, tap=tap, chunk_size=chunk_size)


def xgrad_cam(
    fn: Fn, images: jax.Array, targets: jax.Array, *, tap: Tap, chunk_size: int | None = None
) -> Any:
    """XGrad-CAM: channels weighted by their gradient, averaged in proportion to the activations.

    Args:
        fn: as for `grad_cam`.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap, or a list of names.
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `grad_cam` returns them; each sums to the sum of the HiRes-CAM, a silent channel
        aside. A signed channel whose sum is near zero gets a large weight: take a tap after a ReLU.

    Raises:
        ValueError: as `grad_cam`.

    Source: Fu et al. 2020 (arXiv 2008.02312), eq. 8.
    """
    return _cam(_activation_mean, fn, images, targets, tap=tap, chunk_size=chunk_size)


def finer_cam(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    tap: Tap,
    similar: jax.Array | None = None,
    alpha: float = 1.0,
    chunk_size: int | None = None,
) -> Any:
    """Finer-CAM: Grad-CAM of what tells the class from those that look like it.

    The score is y_target - alpha * sum_j p_j y_j over the look-alike classes j, weighted by the
    softmax of their own scores, which is held constant.

    Args:
        fn: as for `grad_cam`.
        images: [n, h, w, c].
        targets: class ids int [n].
        tap: name of a tap, or a list of names.
        similar: look-alike classes int [n, m]; None for the three (fewer if there are fewer
            classes) whose scores are nearest to the target's in that image.
        alpha: strength of the comparison, at least 0; 0 gives Grad-CAM.
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `grad_cam` returns them.

    Raises:
        ValueError: as `grad_cam`, targets that are no class ids, `similar` of a wrong shape or out
            of range, fewer than two classes.

    Source: Zhang et al. 2025 (CVPR, arXiv 2501.11309); the weights are those of the authors' code.
    """
    n = len(images)
    if jnp.shape(targets) != (n,):
        raise ValueError(
            f"targets must be class ids int [{n}], not of the shape {list(jnp.shape(targets))}: "
            "Finer-CAM compares one class with others"
        )
    arrays = () if similar is None else (similar,)
    if similar is not None:
        shape, dtype = jnp.shape(similar), jnp.result_type(similar)
        if (
            len(shape) != 2
            or shape[0] != n
            or not shape[1]
            or not jnp.issubdtype(dtype, jnp.integer)
        ):
            raise ValueError(
                f"similar must be class ids int [{n}, m] with m at least 1, not {dtype} "
                f"{list(shape)}"
            )
        if chunk_size is not None:  # within a chunk their values cannot be looked at
            logits = jax.eval_shape(fn, images)
            check_logits(logits)
            check_class_ids(similar, logits.shape[-1])
    score = functools.partial(_finer_score, alpha=alpha)
    return _cam(
        _mean_gradient, fn, images, targets, *arrays, tap=tap, chunk_size=chunk_size, score=score
    )


def gradients_at_taps(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *arrays: jax.Array,
    taps: Sequence[str],
    score: Score = target_score,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Activations at taps and the gradient of each image's own score by them.

    Args:
        fn: images [n, h, w, c] -> logits [n, k] or [n, h, w, k].
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        *arrays: more arrays [n, ...] that the score takes.
        taps: names of taps of shape [n, h', w', c'].
        score: (logits, targets, *arrays) -> scores [n].

    Returns:
        {tap: (activations, gradients)}, [n, h', w', c'] each, at least float32.

    Raises:
        ValueError: as `grad_cam`.
    """
    program = trace_at(fn, images, taps)
    for tap in taps:
        check_spatial(program, tap, images.shape[0])

    def total(deltas: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, values = program.run(images, read=taps, add=deltas)
        return score(logits, targets, *arrays).sum(), values

    # The gradient by an addition of zero at the tap: nothing below the tap is differentiated.
    zeros = {tap: jnp.zeros(program.taps[tap].shape, program.taps[tap].dtype) for tap in taps}
    gradients, activations = jax.grad(total, has_aux=True)(zeros)
    return {
        tap: (at_least_float32(activations[tap]), at_least_float32(gradients[tap])) for tap in taps
    }


def _cam(
    combine: Combine,
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *arrays: jax.Array,
    tap: Tap,
    chunk_size: int | None,
    score: Score = target_score,
) -> Any:
    taps = [tap] if isinstance(tap, str) else list(tap)

    def maps_of(images: jax.Array, *request: jax.Array) -> dict[str, jax.Array]:
        values = gradients_at_taps(fn, images, *request, taps=taps, score=score)
        return {name: combine(*value) for name, value in values.items()}

    maps = map_images(maps_of, fn, jnp.asarray(images), targets, *arrays, chunk_size=chunk_size)
    return maps[tap] if isinstance(tap, str) else {name: maps[name] for name in taps}


# A product and a sum rather than a matrix product: that is rounded to fewer bits on accelerators.
def _product(activations: jax.Array, weights: jax.Array) -> jax.Array:
    return (activations * weights).sum(axis=-1)  # [n, h, w]


def _mean_gradient(activations: jax.Array, gradients: jax.Array) -> jax.Array:
    return _product(activations, gradients.mean(axis=(1, 2), keepdims=True))


def _higher_order(activations: jax.Array, gradients: jax.Array) -> jax.Array:
    # g^2 cancels, and with it the underflow of small gradients; at g = 0 the numerator is zero.
    total = activations.sum(axis=(1, 2), keepdims=True)
    terms = _quotient(jax.nn.relu(gradients), 2 + total * gradients)
    return _product(activations, terms.sum(axis=(1, 2), keepdims=True))


def _positive_product(activations: jax.Array, gradients: jax.Array) -> jax.Array:
    return _product(activations, jax.nn.relu(gradients))


def _activation_mean(activations: jax.Array, gradients: jax.Array) -> jax.Array:
    total = activations.sum(axis=(1, 2), keepdims=True)
    weighted = (gradients * activations).sum(axis=(1, 2), keepdims=True)
    return _product(activations, _quotient(weighted, total))


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Zero where the denominator is, in value and derivative; a numerator of NaN stays."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0 * numerator, numerator / jnp.where(is_zero, 1, denominator))


def _finer_score(
    logits: jax.Array, targets: jax.Array, similar: jax.Array | None = None, *, alpha: float
) -> jax.Array:
    scores = jax.lax.stop_gradient(class_scores(logits))
    n, k = scores.shape
    if k < 2:
        raise ValueError(f"Finer-CAM compares classes, but the function returns {k}")
    own = class_weights(n, k, targets)  # [n, k]
    if similar is None:
        similar = _nearest(scores, own == 1, min(LOOK_ALIKES, k - 1))
    look_alikes = one_hot(similar, k)  # [n, m, k]
    shares = jax.nn.softmax(jnp.take_along_axis(scores, jnp.asarray(similar), 1, mode="clip"))
    return target_score(logits, own - alpha * (shares[..., None] * look_alikes).sum(axis=1))


def _nearest(scores: jax.Array, is_own: jax.Array, m: int) -> jax.Array:
    """The m classes [n, m] whose scores are nearest to that of the image's own class."""
    distance = jnp.abs(scores - jnp.where(is_own, scores, 0).sum(axis=1, keepdims=True))
    largest = jnp.finfo(distance.dtype).max  # also of classes at minus infinity
    distance = jnp.nan_to_num(distance, nan=largest, posinf=largest)
    return jax.lax.top_k(-jnp.where(is_own, jnp.inf, distance), m)[1]

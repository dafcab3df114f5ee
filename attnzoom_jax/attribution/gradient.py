"""Maps from the gradient of a class score by the image, and from sums of such gradients.

With the score y of the cued class and the image x, per value of the image:

    gradient              dy/dx                                      (Simonyan et al. 2014)
    input x gradient      x dy/dx                                (Shrikumar et al. 2016)
    SmoothGrad            mean over noise e ~ N(0, s^2) of dy/dx at x + e    (Smilkov et al. 2017)
    integrated gradients  (x - b) * integral over t in [0, 1] of dy/dx at b + t (x - b)
                                                             (Sundararajan et al. 2017, eq. 1)

    guided backprop       dy/dx, where every ReLU hands on the positive part of the gradient, and
                          only where its input is >= 0               (Springenberg et al. 2015)

and at a tap with activations A the linear approximation A dy/dA. A map is the largest absolute
value, or the signed sum, over the channels of a pixel.

Samples and steps run one after the other in one loop, so that memory does not grow with them. (On a
CPU that costs speed, see `chunks.map_chunks`.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.attribution.cam import Fn, Tap, hires_cam
from attnzoom_jax.attribution.chunks import map_images, scan
from attnzoom_jax.attribution.flow import Flow, scalar
from attnzoom_jax.attribution.program import CUSTOM_CALLS, Step
from attnzoom_jax.attribution.relevance import Rule, Share, Visit, walk
from attnzoom_jax.attribution.rules import unchanged, vector_jacobian
from attnzoom_jax.attribution.taps import INPUT, trace_at
from attnzoom_jax.attribution.targets import (
    at_least_float32,
    check_count,
    check_images,
    start_signal,
    target_score,
)
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops.maximum import first_max

REDUCTIONS = {
    "max_abs": lambda values: first_max(jnp.abs(values), axis=-1),
    "sum": lambda values: values.sum(axis=-1),
}


def gradient(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    reduce: str = "max_abs",
    chunk_size: int | None = None,
) -> jax.Array:
    """The gradient of the class score by the image.

    Args:
        fn: images [n, h, w, c] -> logits [n, k], or [n, h, w, k] where it is fully convolutional;
            each image's logits depend on that image alone.
        images: float [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        reduce: over the channels, "max_abs" or "sum".
        chunk_size: images per pass, in turn within one program; None for all at once.

    Returns:
        Raw maps [n, h, w], at least float32; under jit NaN for a class id out of range.

    Raises:
        ValueError: images that are no floats, logits or targets of a wrong shape, class id out of
            range, unknown reduction, bad chunk size.

    Source: Simonyan et al. 2014 (arXiv 1312.6034), section 3.
    """
    values_of = functools.partial(_gradient, fn)
    return _map(values_of, fn, images, targets, reduce=reduce, chunk_size=chunk_size)


def input_x_gradient(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    reduce: str = "sum",
    chunk_size: int | None = None,
) -> jax.Array:
    """The image times the gradient of the class score by it.

    Args:
        fn: as for `gradient`.
        images: float [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        reduce: over the channels, "sum" or "max_abs".
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `gradient` returns them, signed with "sum".

    Raises:
        ValueError: as `gradient`.

    Source: Shrikumar et al. 2016 (arXiv 1605.01713).
    """

    def values_of(images: jax.Array, targets: jax.Array) -> jax.Array:
        return at_least_float32(images) * _gradient(fn, images, targets)

    return _map(values_of, fn, images, targets, reduce=reduce, chunk_size=chunk_size)


def smooth_grad(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    key: jax.Array,
    samples: int = 50,
    noise: float = 0.15,
    reduce: str = "max_abs",
    chunk_size: int | None = None,
) -> jax.Array:
    """SmoothGrad: the mean gradient over noisy copies of the image.

    Args:
        fn: as for `gradient`.
        images: float [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        key: PRNG key. The noise depends on it, the image's place in the batch and the number of the
            sample alone, not on chunk_size.
        samples: noisy copies of every image, one after the other.
        noise: standard deviation of the noise, as a share of each image's range (max - min).
        reduce: over the channels, after the mean: "max_abs" or "sum".
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `gradient` returns them.

    Raises:
        ValueError: as `gradient`, or `samples` below 1.

    Source: Smilkov et al. 2017 (arXiv 1706.03825).
    """
    check_count("samples", samples)

    def values_of(images: jax.Array, targets: jax.Array, indices: jax.Array) -> jax.Array:
        wide = at_least_float32(images)
        extent = wide.max(axis=(1, 2, 3)) - wide.min(axis=(1, 2, 3))
        scale = noise * extent[:, None, None, None]

        def draw(index: jax.Array, sample: jax.Array) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(key, index), sample)
            return jax.random.normal(own, images.shape[1:], wide.dtype)

        def term(sample: jax.Array) -> jax.Array:
            drawn = jax.vmap(draw, in_axes=(0, None))(indices, sample)  # [n, h, w, c]
            return _gradient(fn, (wide + scale * drawn).astype(images.dtype), targets)

        return _sum_of_terms(term, jnp.arange(samples), wide) / samples

    indices = jnp.arange(len(images))
    return _map(values_of, fn, images, targets, indices, reduce=reduce, chunk_size=chunk_size)


def integrated_gradients(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    steps: int = 32,
    baseline: Any = 0.0,
    reduce: str = "sum",
    chunk_size: int | None = None,
) -> jax.Array:
    """Integrated gradients along the straight line from a baseline to the image.

    Args:
        fn: as for `gradient`.
        images: float [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        steps: points of the Gauss-Legendre quadrature, one after the other.
        baseline: the image without evidence: a number, or an array that broadcasts to the images,
            for example [c] or [n, h, w, c].
        reduce: over the channels, "sum" or "max_abs".
        chunk_size: images per pass; None for all at once.

    Returns:
        Maps as `gradient` returns them. With "sum" and enough steps a map sums to the score of the
        image less that of the baseline (completeness).

    Raises:
        ValueError: as `gradient`, `steps` below 1, or a baseline that does not broadcast.

    Source: Sundararajan et al. 2017 (arXiv 1703.01365), eq. 1; the quadrature is our choice.
    """
    check_count("steps", steps)
    check_images(images)
    shape = jnp.shape(images)
    if not _broadcasts(jnp.shape(baseline), shape):
        raise ValueError(
            f"baseline has the shape {list(jnp.shape(baseline))}, which does not broadcast to the "
            f"images {list(shape)}; give a number, [c], [h, w, c] or [n, h, w, c]"
        )
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]

    def values_of(images: jax.Array, targets: jax.Array, start: jax.Array) -> jax.Array:
        wide = at_least_float32(images)
        start = start.astype(wide.dtype)
        line = wide - start

        def term(point: tuple[jax.Array, jax.Array]) -> jax.Array:
            t, weight = point
            return weight * _gradient(fn, (start + t * line).astype(images.dtype), targets)

        points = jnp.asarray((nodes + 1) / 2, wide.dtype), jnp.asarray(weights / 2, wide.dtype)
        return line * _sum_of_terms(term, points, wide)

    start = jnp.broadcast_to(jnp.asarray(baseline), shape)
    return _map(values_of, fn, images, targets, start, reduce=reduce, chunk_size=chunk_size)


def guided_backprop(
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *,
    reduce: str = "max_abs",
    chunk_size: int | None = None,
) -> jax.Array:
    """Guided back-propagation: the gradient, with only positive parts through every ReLU.

    ReLUs are found in the program, whatever wrote them: max(x, 0), also within ReLU6, jitted
    functions, remat and scans. Everything else keeps its own derivative.

    Args:
        fn: as for `gradient`.
        images: float [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        reduce: over the channels, "max_abs" or "sum".
        chunk_size: images per pass, in turn within one program; None for all at once.

    Returns:
        Raw maps [n, h, w], at least float32; under jit NaN for a class id out of range.

    Raises:
        ValueError: as `gradient`.

    Source: Springenberg et al. 2015 (arXiv 1412.6806), section 3.4; where the input is exactly 0
    the gradient passes, as in TorchRay.
    """

    def values_of(images: jax.Array, targets: jax.Array) -> jax.Array:
        program = trace_at(fn, images, [INPUT], open_calls=True)
        flow = Flow(program, through_gates=True)
        values = program.evaluate(images)
        start = start_signal(program.result(values), targets)
        rule_of = functools.partial(_guided_rule, flow)
        return walk(flow, values, start, taps=[INPUT], rule_of=rule_of).relevance[INPUT]

    return _map(values_of, fn, images, targets, reduce=reduce, chunk_size=chunk_size)


def _guided_rule(flow: Flow, step: Step) -> Rule:
    if _is_relu(step):
        return _guided_relu
    if step.primitive in CUSTOM_CALLS:
        # A function with its own derivative keeps it, unless it is a ReLU in that dress.
        inside = step
        while inside.primitive in {"min", *CUSTOM_CALLS} and inside.inputs[0] in flow.producer:
            inside = flow.producer[inside.inputs[0]]
        return unchanged if _is_relu(inside) else vector_jacobian
    return vector_jacobian


def _is_relu(step: Step) -> bool:
    return step.primitive == "max" and any(scalar(value) == 0 for value in step.inputs)


def _guided_relu(visit: Visit) -> list[Share]:
    (p,), (i,) = visit.relevance, visit.signal
    return [Share(visit.step.inputs[i], jnp.where(visit.inputs[i] >= 0, jax.nn.relu(p), 0))]


def linear_approximation(
    fn: Fn, images: jax.Array, targets: jax.Array, *, tap: Tap, chunk_size: int | None = None
) -> Any:
    """Activations times the gradient of the class score by them, summed over channels.

    The first-order estimate of what the score loses when a position of the tap is set to zero; the
    formula of HiRes-CAM, under the name that it has in TorchRay.

    Args:
        fn: as for `gradient`.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        tap: name of a tap of shape [n, h', w', c'], or a list of such names; at "input" it is
            `input_x_gradient`.
        chunk_size: images per pass; None for all at once.

    Returns:
        Raw signed maps [n, h', w'], at least float32; for a list of taps {tap: maps}.

    Raises:
        ValueError: as `grad_cam`.
    """
    return hires_cam(fn, images, targets, tap=tap, chunk_size=chunk_size)


def _map(
    values_of: Callable[..., jax.Array],
    fn: Fn,
    images: jax.Array,
    targets: jax.Array,
    *arrays: jax.Array,
    reduce: str,
    chunk_size: int | None,
) -> jax.Array:
    check_images(images)
    if reduce not in REDUCTIONS:
        raise unknown_name("reduction", reduce, REDUCTIONS)

    def maps_of(*request: jax.Array) -> jax.Array:
        return REDUCTIONS[reduce](values_of(*request))

    return map_images(maps_of, fn, jnp.asarray(images), targets, *arrays, chunk_size=chunk_size)


def _gradient(fn: Fn, images: jax.Array, targets: jax.Array) -> jax.Array:
    total = jax.grad(lambda x: target_score(fn(x), targets).sum())
    return at_least_float32(total(images))  # [n, h, w, c]


def _sum_of_terms(term: Callable[[Any], jax.Array], points: Any, like: jax.Array) -> jax.Array:
    """The sum of term(point), one after the other; what is inside a term is never kept."""
    return scan(lambda total, point: (total + term(point), None), jnp.zeros_like(like), points)[0]


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)

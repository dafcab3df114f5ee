"""The rules of Excitation Backprop, one per primitive (Zhang et al. 2016, arXiv 1608.00507).

The winner of a unit i among its inputs j is drawn with probability

    P(a_j | a_i) = Z_i x_j w_ij  if w_ij >= 0, else 0        (eq. 3)

with Z_i = 1 / sum_j x_j w+_ij, and 0 where that sum is 0; there is no bias. In arrays, for
relevance p of a layer's output:

    z = W+ x,    q = p / z (0 where z = 0),    p_in = x * (W+^T q)

What has no weights follows the same idea. A step hands on all that it was given, or drops it where
nothing can have won (a ReLU that is off, z = 0); it never makes any.

| step | p goes to |
|---|---|
| convolution, matrix product | the inputs, as above |
| the zoom of AttZoom | as above; where its response is negative, W- in place of W+ |
| sum, mean, average pooling, two branches that meet | the terms, in proportion to their values |
| maximum, max pooling | the largest, the first one of several |
| max(x, constant), the ReLU gate | x where it exceeds the constant |
| other activations | x |
| x times, plus, minus, over a constant, a gate or a statistic (`flow`) | x |
| rearrangement | where each element came from |
| the resampling of a warp | the pixels it was mixed from, in proportion to their weights |

After an activation with a negative minimum, such as tanh or GELU, x - min takes the place of x in
the first row: responses are to be read from their minimum (section 3.2, case of other activations).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from attnzoom_jax.attribution.flow import ACTIVATIONS, COPIES, signal_inputs
from attnzoom_jax.attribution.program import LINEAR_MAPS
from attnzoom_jax.attribution.relevance import Rule, Share, Visit


def linear(visit: Visit) -> Iterable[Share]:
    """Signal times constant weights: the W+ rule. Public for steps of one's own."""
    if len(visit.signal) != 1:
        raise _product_error(visit)
    (i,) = visit.signal
    (p,) = visit.relevance
    ref = visit.step.inputs[i]
    x, minimum = _responses(visit, i), visit.flow.minimum(ref)
    if minimum is not None:
        x = jnp.where(minimum < 0, _as(visit.inputs[i], p) - minimum, x)
    if not any(
        jnp.issubdtype(jnp.result_type(v), jnp.floating)
        for v in visit.inputs[:i] + visit.inputs[i + 1 :]
    ):
        raise ValueError(
            f"{visit.step.primitive!r} at {visit.step.source} has no weights among its inputs, so "
            "the linear rule cannot take their positive part; pass them to it as an argument"
        )
    others = [_as(value, p) for value in visit.inputs]
    flip = -1 if visit.is_dual else 1

    def excite(x: jax.Array, flip: int) -> jax.Array:
        inputs = [x if j == i else jax.nn.relu(flip * w) for j, w in enumerate(others)]
        return visit.step.apply(*inputs)[0]

    def both_signs(x: jax.Array) -> jax.Array:
        return jnp.where(visit.sign >= 0, excite(x, flip), excite(x, -flip))

    z, pull = jax.vjp((lambda x: excite(x, flip)) if visit.sign is None else both_signs, x)
    return [Share(ref, x * pull(divide(p, z))[0])]


def zoom(visit: Visit) -> Iterable[Share]:
    """The zoom of AttZoom, which no activation follows: W+ for responses >= 0, W- for others."""
    (response,) = (visit.values[ref] for ref in visit.step.outputs)
    return linear(dataclasses.replace(visit, sign=jnp.where(response >= 0, 1.0, -1.0)))


def proportional(visit: Visit) -> Iterable[Share]:
    """A sum of signals: in proportion to its terms."""
    (p,) = visit.relevance
    return _split(visit, [_responses(visit, i) for i in visit.signal], p)


def branches(visit: Visit) -> Iterable[Share]:
    """Two branches, x + y or x - y: in proportion; a constant or a statistic takes nothing."""
    is_difference = visit.step.primitive == "sub"
    signal = _without_statistic(visit) if is_difference else visit.signal
    if len(signal) == 1:
        sign = -1 if is_difference and signal == [1] else 1
        return [_pass(visit, signal[0], sign)]
    terms = [_as(visit.inputs[i], visit.relevance[0]) for i in signal]
    if visit.options.sums == "positive" or visit.options.negative == "clamp":
        terms[0] = jax.nn.relu(terms[0])
        terms[1] = jnp.minimum(terms[1], 0) if is_difference else jax.nn.relu(terms[1])
    return _split(visit, terms, visit.relevance[0])


def product(visit: Visit) -> Iterable[Share]:
    """A product or quotient: the signal takes all, never the gate or the statistic."""
    signal = _without_statistic(visit)
    if len(signal) == 1:
        other = visit.inputs[1 - signal[0]]
        return [_pass(visit, signal[0], other)]
    source = visit.flow.common_source(visit.step.inputs)
    if source is None:
        raise _product_error(visit)
    return [Share(source, visit.relevance[0])]  # an activation, such as x * sigmoid(x)


def maximum(visit: Visit) -> Iterable[Share]:
    """Of two signals the larger one; of one, where it exceeds the constant (ReLU)."""
    (p,) = visit.relevance
    x, y = visit.inputs
    if len(visit.signal) == 2:
        wins = [x >= y, x < y]
    else:
        wins = [x > y, y > x]
    return [_pass(visit, i, None, jnp.where(wins[i], p, 0)) for i in visit.signal]


def minimum(visit: Visit) -> Iterable[Share]:
    """Of two signals the smaller one; of one, all of it: a saturated unit is active."""
    (p,) = visit.relevance
    x, y = visit.inputs
    wins = [x <= y, x > y] if len(visit.signal) == 2 else [True, True]
    return [_pass(visit, i, None, jnp.where(wins[i], p, 0)) for i in visit.signal]


def clamp(visit: Visit) -> Iterable[Share]:
    """The signal where it exceeds the lower bound, as ReLU6."""
    (p,) = visit.relevance
    low, x, _ = visit.inputs
    if visit.signal != [1]:
        raise _product_error(visit)
    return [Share(visit.step.inputs[1], jnp.where(x > low, p, 0))]


def largest(visit: Visit) -> Iterable[Share]:
    """The maximum over axes: the first largest element."""
    (p,) = visit.relevance
    (x,) = visit.inputs
    axes = visit.step.params["axes"]
    last = tuple(range(x.ndim - len(axes), x.ndim))
    moved = jnp.moveaxis(x, axes, last)
    flat = moved.reshape(*p.shape, -1)
    first = jax.nn.one_hot(flat.argmax(-1), flat.shape[-1], dtype=p.dtype)
    shares = (first * p[..., None]).reshape(moved.shape)
    return [Share(visit.step.inputs[0], jnp.moveaxis(shares, last, axes))]


def unchanged(visit: Visit) -> Iterable[Share]:
    """Copies: all of it; of a function with its own derivative, to what its body computes."""
    refs = signal_inputs(visit.step)
    sign = visit.sign if len(refs) == 1 else None
    return [
        Share(ref, p, sign)
        for ref, p in zip(refs, visit.relevance, strict=True)
        if visit.flow.is_signal(ref)
    ]


def activation(visit: Visit) -> Iterable[Share]:
    """An elementwise function of the signal: all of it, to its argument."""
    return [_pass(visit, i, None) for i in visit.signal[:1]]


def negation(visit: Visit) -> Iterable[Share]:
    """All of it, with the opposite sign for the scales."""
    return [_pass(visit, 0, -1)]


def vector_jacobian(visit: Visit) -> Iterable[Share]:
    """The ordinary derivative: of a rearrangement, each element goes back to where it came from.

    Also the rule of a resampling whose weights sum to one. Public for steps of one's own.
    """
    signal = [_as(visit.inputs[i], visit.relevance[0]) for i in visit.signal]
    _, pull = jax.vjp(_function_of_signal(visit), *signal)
    refs = [visit.step.inputs[i] for i in visit.signal]
    shares = pull(list(visit.relevance))
    if visit.sign is None or visit.step.primitive == "reduce_window_max":
        return [Share(ref, p) for ref, p in zip(refs, shares, strict=True)]
    # A sign stays with the element that it belongs to; what goes nowhere has none (zero).
    signs = [jnp.broadcast_to(visit.sign, p.shape).astype(p.dtype) for p in visit.relevance[:1]]
    signs += [jnp.zeros_like(p) for p in visit.relevance[1:]]
    shares_and_signs = zip(refs, shares, pull(signs), strict=True)
    return [Share(ref, p, jnp.sign(sign)) for ref, p, sign in shares_and_signs]


def resampling(visit: Visit) -> Iterable[Share]:
    """A resampling: its transpose, to what was sampled; nothing to what chose the places."""
    p = visit.relevance[0]
    image, *places = [_as(value, p) for value in visit.inputs]
    _, pull = jax.vjp(lambda image: visit.step.apply(image, *places)[0], image)
    is_signal = visit.flow.is_signal(visit.step.inputs[0])
    return [Share(visit.step.inputs[0], pull(p)[0])] if is_signal else []


def divide(p: jax.Array, z: jax.Array) -> jax.Array:
    """The quotient p / z, and 0 where z is 0."""
    nothing = z == 0
    return jnp.where(nothing, 0, p / jnp.where(nothing, 1, z))


RULES: dict[str, Rule] = {
    **dict.fromkeys(COPIES, unchanged),
    **dict.fromkeys(ACTIVATIONS, activation),
    **dict.fromkeys(LINEAR_MAPS, linear),
    "jit:linear_zoom": zoom,
    "jit:resample": resampling,
    **dict.fromkeys(("reduce_sum", "reduce_window_sum", "cumsum"), proportional),
    **dict.fromkeys(("add", "add_any", "sub"), branches),
    **dict.fromkeys(("mul", "div"), product),
    "max": maximum,
    "min": minimum,
    "clamp": clamp,
    "neg": negation,
    "reduce_max": largest,
    **dict.fromkeys(
        (
            *("broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice"),
            *("expand_dims", "gather", "pad", "reduce_window_max", "reshape", "rev", "scatter"),
            *("jit:_resize", "select_n", "slice", "split", "squeeze", "stack", "tile"),
            *("transpose", "unstack"),
        ),
        vector_jacobian,
    ),
}


def _as(value: Any, p: jax.Array) -> Any:
    """Floats in the dtype of the relevance; indices and predicates as they are."""
    value = jnp.asarray(value)
    return value.astype(p.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _responses(visit: Visit, i: int) -> jax.Array:
    """An input's values as the responses among which the winner is drawn."""
    x = _as(visit.inputs[i], visit.relevance[0])
    return jax.nn.relu(x) if visit.options.negative == "clamp" else x


def _split(visit: Visit, terms: list[jax.Array], p: jax.Array) -> list[Share]:
    (z,), pull = jax.vjp(_function_of_signal(visit), *terms)
    parts = zip(visit.signal, terms, pull([divide(p, z)]), strict=True)
    return [Share(visit.step.inputs[i], term * q) for i, term, q in parts]


def _function_of_signal(visit: Visit) -> Callable[..., list[jax.Array]]:
    """The step as a function of its signal inputs, the others held."""
    inputs = [_as(value, visit.relevance[0]) for value in visit.inputs]

    def apply(*signal: jax.Array) -> list[jax.Array]:
        arguments = dict(enumerate(inputs)) | dict(zip(visit.signal, signal, strict=True))
        return visit.step.apply(*arguments.values())

    return apply


def _without_statistic(visit: Visit) -> list[int]:
    """The signal inputs of a step with two, without the one that is a statistic or a gate."""
    if len(visit.signal) < 2:
        return visit.signal
    statistic = visit.flow.statistic(visit.step)
    return [i for i in visit.signal if i != statistic]


def _pass(visit: Visit, i: int, sign: Any, relevance: jax.Array | None = None) -> Share:
    """All of the relevance to one input; summed where the step spread that input.

    `sign` is that of the factor on the input; None for a step through which no flip can pass.
    """
    p = visit.relevance[0] if relevance is None else relevance
    ref = visit.step.inputs[i]
    shape = visit.flow.program.shapes[ref].shape
    spread = tuple(axis for axis, size in enumerate(shape) if size != p.shape[axis])
    p = p.sum(axis=spread, keepdims=True) if shape else p.sum()
    if visit.options.scales == "ignore" or spread or sign is None:
        return Share(ref, p)
    before = 1.0 if visit.sign is None else visit.sign
    return Share(ref, p, before * jnp.where(jnp.asarray(sign) < 0, -1.0, 1.0))


def _product_error(visit: Visit) -> ValueError:
    return ValueError(
        f"{visit.step.primitive!r} at {visit.step.source} combines two values that both depend on "
        "the images, and neither is known to be the gate; mark the mask, "
        'mask = jax.ad_checkpoint.checkpoint_name(mask, "<path>/gate"), so that relevance follows '
        "the other one, or give a rule of your own: "
        f"rules={{{visit.step.primitive!r}: rule}}"
    )

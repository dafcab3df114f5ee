"""Every rule against a slow version of itself: matrices and loops in NumPy float64.

A case is a small function around one primitive. What its rule hands on is read by a walk whose
start is random, and compared to the definition: for a linear map with the matrix J of its signal,
found by moving one input at a time, x * J+^T (p / J+ x) with J+ = max(J, 0).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution.flow import ACTIVATIONS, Flow
from attnzoom_jax.attribution.program import trace
from attnzoom_jax.attribution.relevance import Options, walk
from attnzoom_jax.attribution.rules import RULES
from attnzoom_jax.ops.warp import sample
from attnzoom_jax.ops.zoom import linear_zoom

Arrays = list[np.ndarray]
Oracle = Callable[[Any, Arrays, np.ndarray], Arrays]

# Names of primitives that the JAX of this test has not, or only inside of a shard_map, each with
# one that it has and that follows the same rule.
NOT_HERE = {"copy_p": "copy", "mesh_cast": "copy", "pvary": "copy", "expand_dims": "reshape"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of signals, some primitive of which is looked at, and what its rule must do."""

    primitive: str
    fn: Callable[..., Any]
    inputs: Arrays
    oracle: Oracle


# ----------------------------------------------------------------------------- the slow versions


def ratio(p, z):
    return np.divide(p, z, out=np.zeros(np.broadcast(p, z).shape), where=z != 0)


def matrices(fn, xs):
    """The matrix [outputs, inputs] of each signal of a map that is linear but for an offset."""
    with jax.enable_x64(True):
        offset = np.asarray(fn(*(jnp.zeros(x.shape) for x in xs))).ravel()
        found = []
        for i, x in enumerate(xs):
            moved = [np.zeros(other.shape) for other in xs]
            columns = []
            for j in range(x.size):
                moved[i].flat[j] = 1
                columns.append(np.asarray(fn(*map(jnp.asarray, moved))).ravel() - offset)
                moved[i].flat[j] = 0
            found.append(np.stack(columns, axis=1))
    return found


def excited(fn, xs, p):
    """Linear map: x * J+^T (p / J+ x)."""
    (x,), (matrix,) = xs, matrices(fn, xs)
    return [by_positive_weights(matrix, x, p)]


def by_positive_weights(matrix, x, p):
    weights = np.maximum(matrix, 0)
    return x * (weights.T @ ratio(p.ravel(), weights @ x.ravel())).reshape(x.shape)


def excited_either_way(fn, xs, p):
    """The zoom: J- in place of J+ where the response is negative."""
    (x,), (matrix,) = xs, matrices(fn, xs)
    sign = np.where(matrix @ x.ravel() >= 0, 1, -1)
    return [by_positive_weights(matrix * sign[:, None], x, p)]


def in_proportion(fn, xs, p):
    """Sum: each term takes its raw share."""
    found = matrices(fn, xs)
    z = sum(matrix @ x.ravel() for matrix, x in zip(found, xs, strict=True))
    q = ratio(p.ravel(), z)
    return [x * (m.T @ q).reshape(x.shape) for m, x in zip(found, xs, strict=True)]


def transposed(fn, xs, p):
    """Rearrangement: every output element goes back to where it came from."""
    return [(m.T @ p.ravel()).reshape(x.shape) for m, x in zip(matrices(fn, xs), xs, strict=True)]


def transposed_for_the_first(fn, xs, p):
    (image, *places) = xs
    return [*transposed(lambda x: fn(x, *places), [image], p), *map(np.zeros_like, places)]


def untouched(fn, xs, p):
    """Copies and activations."""
    return [p]


def to_the_first_signal(fn, xs, p):
    return [p, *(np.zeros(x.shape) for x in xs[1:])]


# -------------------------------------------------------------------------------------- the cases

RNG = np.random.default_rng(0)


def signed(*shape):
    return RNG.normal(size=shape)


def positive(*shape):
    return RNG.uniform(0.1, 2.0, size=shape)


def with_ties(*shape):
    return RNG.integers(-2, 3, size=shape).astype(np.float64)


def conv(kernel, strides=None, padding: Any = "SAME", **settings):
    """A convolution, channels last, of the kernel's number of spatial axes."""
    axes = "DHW"[5 - kernel.ndim :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    strides = strides or (1,) * len(axes)

    def fn(x):
        w = jnp.asarray(kernel, x.dtype)
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=numbers, **settings
        )

    return fn


def product_with(weights, spec):
    return lambda x: jnp.einsum(spec, x, jnp.asarray(weights, x.dtype))


def contraction(weights, dimensions, *, left=False):
    def fn(x):
        w = jnp.asarray(weights, x.dtype)
        return lax.dot_general(*((w, x) if left else (x, w)), dimension_numbers=dimensions)

    return fn


CONVOLUTIONS = {
    "same": (conv(signed(3, 3, 2, 3)), (2, 5, 4, 2)),
    "valid": (conv(signed(3, 2, 2, 3), padding="VALID"), (1, 5, 4, 2)),
    "explicit padding": (conv(signed(3, 3, 2, 2), padding=((2, 0), (1, 3))), (1, 4, 4, 2)),
    "cropping": (conv(signed(3, 3, 2, 2), padding=((-1, 0), (1, -1))), (1, 6, 5, 2)),
    "strided": (conv(signed(3, 3, 2, 3), (2, 3)), (1, 7, 6, 2)),
    "strided 1x1": (conv(signed(1, 1, 2, 3), (2, 2), "VALID"), (1, 5, 4, 2)),
    "dilated": (conv(signed(3, 3, 2, 2), rhs_dilation=(2, 1)), (1, 6, 5, 2)),
    "grouped": (conv(signed(3, 3, 2, 6), feature_group_count=2), (1, 4, 4, 4)),
    "depthwise": (conv(signed(3, 3, 1, 6), feature_group_count=3), (1, 4, 4, 3)),
    "batch groups": (conv(signed(3, 3, 2, 4), batch_group_count=2), (4, 4, 3, 2)),
    "inserted zeros": (
        conv(signed(3, 3, 2, 2), padding=((1, 2), (2, 0)), lhs_dilation=(2, 3)),
        (1, 3, 3, 2),
    ),
    "1d": (conv(signed(3, 2, 3), (2,)), (2, 7, 2)),
    "3d": (conv(signed(2, 3, 2, 2, 2), (1, 2, 1)), (1, 3, 4, 3, 2)),
    "transposed": (
        lambda x: lax.conv_transpose(x, jnp.asarray(UP, x.dtype), (2, 2), "SAME"),
        (1, 3, 4, 2),
    ),
    "transposed valid": (
        lambda x: lax.conv_transpose(x, jnp.asarray(UP, x.dtype), (2, 3), "VALID"),
        (1, 3, 2, 2),
    ),
    "channels first": (
        lambda x: lax.conv(x, jnp.asarray(FIRST, x.dtype), (1, 2), "SAME"),
        (1, 2, 4, 4),
    ),
    "vmapped": (jax.vmap(conv(signed(3, 3, 2, 3))), (2, 1, 4, 3, 2)),
}
UP, FIRST = signed(3, 3, 2, 3), signed(3, 2, 3, 3)

PRODUCTS = {
    "weights right": (lambda x: x @ jnp.asarray(MATRIX, x.dtype), (3, 4)),
    "weights left": (lambda x: jnp.asarray(MATRIX, x.dtype).T @ x, (4, 2)),
    "vector": (contraction(signed(4), (((1,), (0,)), ((), ()))), (3, 4)),
    "two axes": (product_with(signed(3, 4, 5), "bij,ijk->bk"), (2, 3, 4)),
    "batch axis right": (contraction(signed(3, 4, 2), (((2,), (1,)), ((0,), (0,)))), (3, 2, 4)),
    "batch axis left": (
        contraction(signed(2, 3, 4), (((2,), (1,)), ((1,), (0,))), left=True),
        (3, 4, 2),
    ),
    "heads": (product_with(signed(3, 4, 2), "bshd,hdk->bshk"), (1, 2, 3, 4)),
    "sum of heads": (product_with(signed(3, 4, 2), "bshd,hdk->bsk"), (1, 2, 3, 4)),
    "mixes places": (product_with(signed(4, 5), "bsc,st->btc"), (2, 4, 3)),
    "vmapped": (jax.vmap(lambda x: jnp.asarray(MATRIX, x.dtype).T @ x), (3, 4)),
}
MATRIX = signed(4, 3)

INDEX = np.array([[2, 0, 2], [1, 1, 4]])
CHOICE = np.array([[True, False, True], [False, False, True]])


def first_maximum_over(axes):
    """All of p to the largest, the first of several, counted in the order of the axes."""

    def oracle(fn, xs, p):
        (x,) = xs
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        share = np.zeros(x.shape)
        for index in np.ndindex(p.shape):
            where: list[Any] = [slice(None)] * x.ndim
            for axis, i in zip(kept, index, strict=True):
                where[axis] = i
            window = x[tuple(where)]
            first = np.unravel_index(window.argmax(), window.shape)
            share[tuple(where)][first] += p[index]
        return [share]

    return oracle


def max_pool(window, strides, padding):
    def fn(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)

    def oracle(fn, xs, p):
        (x,) = xs
        low = [before for before, _ in padding]
        padded = np.pad(x, padding, constant_values=-np.inf)
        share = np.zeros(padded.shape)
        for index in np.ndindex(p.shape):
            corner = [i * s for i, s in zip(index, strides, strict=True)]
            where = tuple(slice(c, c + k) for c, k in zip(corner, window, strict=True))
            first = np.unravel_index(padded[where].argmax(), window)
            share[where][first] += p[index]
        return [share[tuple(slice(b, b + n) for b, n in zip(low, x.shape, strict=True))]]

    return fn, oracle


POOL = max_pool((1, 2, 2, 1), (1, 2, 2, 1), ((0, 0), (0, 0), (0, 0), (0, 0)))
OVERLAPPING = max_pool((1, 3, 3, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (1, 0), (0, 0)))


def winner(fn, xs, p):
    """The larger of two, the first if they are equal; summed where one was spread."""
    x, y = xs
    shares = np.where(x >= y, p, 0), np.where(x >= y, 0, p)
    return [folded(share, value.shape) for share, value in zip(shares, xs, strict=True)]


def loser(fn, xs, p):
    x, y = xs
    return [np.where(x <= y, p, 0), np.where(x <= y, 0, p)]


def where_positive(fn, xs, p):
    return [np.where(xs[0] > 0, p, 0)]


def folded(share, shape):
    """Summed over the axes along which an array of this shape was spread."""
    spread = tuple(axis for axis, size in enumerate(shape) if size != share.shape[axis])
    return share.sum(axis=spread, keepdims=True)


@jax.custom_vjp
def doubled(x):
    return jnp.tanh(x)


doubled.defvjp(lambda x: (jnp.tanh(x), None), lambda _, g: (2 * g,))


def on_one_device(x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    return lax.with_sharding_constraint(x, sharding)


def both_behind_a_barrier(x, y):
    return jnp.concatenate(lax.optimization_barrier((x, y)))


def split_and_swapped(x):
    first, second = lax.split(x, (1, 3), axis=1)
    return jnp.concatenate([second, first], axis=1)


def unstacked_and_swapped(x):
    first, second = jnp.unstack(x)
    return jnp.concatenate([second, first])


def cotangents_added(x):
    """`add_any` of x and 3 x, as differentiation leaves it in a program."""
    return jax.linear_transpose(lambda y: (y, 3 * y), x)((x, x))[0]


ACTIVATION_CASES = {
    "pow": lambda x: lax.pow(x, jnp.asarray(1.5, x.dtype)),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    **{name: getattr(lax, name) for name in sorted(ACTIVATIONS - {"pow", "integer_pow", "abs"})},
    "abs": jnp.abs,
}

# Places in a picture of 4 x 5 pixels, some beyond its border.
PLACES = np.random.default_rng(1).uniform(-1, 5, size=(1, 3, 4, 2))
LINES = PLACES[:, :, 0, 0], PLACES[:, 0, :, 1]

CASES: dict[str, Case] = {
    **{
        f"convolution, {name}": Case("conv_general_dilated", fn, [signed(*shape)], excited)
        for name, (fn, shape) in CONVOLUTIONS.items()
    },
    **{
        f"product, {name}": Case("dot_general", fn, [signed(*shape)], excited)
        for name, (fn, shape) in PRODUCTS.items()
    },
    "product, unit without support": Case(
        "dot_general", lambda x: x @ jnp.asarray([[-1.0, 1.0]] * 4), [positive(3, 4)], excited
    ),
    **{
        f"zoom, {name}": Case(
            "jit:linear_zoom",
            functools.partial(linear_zoom, kernel=kernel, factor=factor),
            [signed(1, 3, 4, 2)],
            excited_either_way,
        )
        for name, kernel, factor in (
            ("depthwise", signed(3, 3, 1, 2), 2),
            ("full", signed(3, 3, 2, 3), 2),
            ("thrice", signed(4, 5, 1, 2), 3),
            ("once", signed(3, 3, 1, 2), 1),
        )
    },
    **{
        f"activation {name}": Case(name, fn, [positive(3, 4)], untouched)
        for name, fn in ACTIVATION_CASES.items()
    },
    "copy": Case("copy", jnp.copy, [signed(3, 4)], untouched),
    "conversion": Case(
        "convert_element_type", lambda x: x.astype(jnp.float32), [signed(3, 4)], untouched
    ),
    "rounding": Case(
        "reduce_precision", lambda x: lax.reduce_precision(x, 8, 10), [signed(3, 4)], untouched
    ),
    "stopped gradient": Case("stop_gradient", lax.stop_gradient, [signed(3, 4)], untouched),
    "name": Case("name", lambda x: checkpoint_name(x, "name"), [signed(3, 4)], untouched),
    "sharding": Case("sharding_constraint", on_one_device, [signed(3, 4)], untouched),
    "device": Case("device_put", jax.device_put, [signed(3, 4)], untouched),
    "barrier": Case(
        "optimization_barrier", both_behind_a_barrier, [signed(2, 3), signed(1, 3)], transposed
    ),
    "custom_jvp": Case("custom_jvp_call", jax.nn.relu, [signed(3, 4)], where_positive),
    "custom_vjp": Case("custom_vjp_call", doubled, [signed(3, 4)], untouched),
    "sum over axes": Case("reduce_sum", lambda x: x.sum((0, 2)), [signed(2, 3, 4)], in_proportion),
    "sum of zeros": Case("reduce_sum", lambda x: x.sum(0), [np.zeros((2, 3))], in_proportion),
    "mean": Case("reduce_sum", lambda x: x.mean((1, 2)), [positive(2, 3, 4, 2)], in_proportion),
    "sum pool": Case(
        "reduce_window_sum",
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 2, 1), (1, 2, 1, 1), "SAME"),
        [signed(1, 5, 4, 2)],
        in_proportion,
    ),
    "running sum": Case("cumsum", lambda x: lax.cumsum(x, 1), [positive(2, 5)], in_proportion),
    "running sum back": Case(
        "cumsum", lambda x: lax.cumsum(x, 0, reverse=True), [signed(4, 2)], in_proportion
    ),
    "branches": Case("add", jnp.add, [signed(3, 4), signed(3, 4)], in_proportion),
    "branch spread": Case(
        "add", lambda x, y: lax.add_p.bind(x, y), [signed(3, 4), signed(1, 4)], in_proportion
    ),
    "branch twice": Case("add", lambda x: x + x, [signed(3, 4)], untouched),
    "bias": Case("add", lambda x: 5.0 + x, [signed(3, 4)], untouched),
    "vector of biases": Case("add", lambda x: x + signed(4), [signed(3, 4)], untouched),
    "cancelled": Case(
        "add", jnp.add, [np.array([1.0, 2.0, 0.0]), np.array([-1.0, 1.0, 0.0])], in_proportion
    ),
    "cotangents": Case("add_any", cotangents_added, [signed(3, 4)], untouched),
    "difference": Case("sub", jnp.subtract, [signed(3, 4), signed(3, 4)], in_proportion),
    "constant taken": Case("sub", lambda x: x - 5.0, [signed(3, 4)], untouched),
    "taken from constant": Case("sub", lambda x: 5.0 - x, [signed(3, 4)], untouched),
    "mean taken": Case("sub", lambda x: x - x.mean(1, keepdims=True), [signed(3, 4)], untouched),
    "scale": Case("mul", lambda x: x * jnp.asarray([2.0, -3.0]), [signed(3, 2)], untouched),
    "scale left": Case("mul", lambda x: -2.0 * x, [signed(3, 2)], untouched),
    "spread by a factor": Case(
        "mul",
        lambda x: lax.mul_p.bind(x, jnp.ones((3, 4))),
        [signed(1, 4)],
        lambda fn, xs, p: [p.sum(0, keepdims=True)],
    ),
    "gate": Case(
        "mul",
        lambda x, mask: x * checkpoint_name(mask, "layer/gate"),
        [signed(3, 4), positive(3, 4)],
        to_the_first_signal,
    ),
    "gate left": Case(
        "mul",
        lambda x, mask: checkpoint_name(mask, "gate") * x,
        [signed(3, 4), positive(3, 4)],
        to_the_first_signal,
    ),
    "reduced gate": Case(
        "mul", lambda x: jax.nn.sigmoid(x.mean(1, keepdims=True)) * x, [signed(3, 4)], untouched
    ),
    "x * sigmoid(x)": Case("mul", lambda x: x * lax.logistic(x), [signed(3, 4)], untouched),
    "sigmoid(x) * x": Case("mul", lambda x: lax.logistic(x) * x, [signed(3, 4)], untouched),
    "x * x": Case("mul", lambda x: x * x, [signed(3, 4)], untouched),
    "divided": Case("div", lambda x: x / 3.0, [signed(3, 4)], untouched),
    "divisor": Case("div", lambda x: 3.0 / x, [positive(3, 4)], untouched),
    "divided by norm": Case(
        "div", lambda x: x / jnp.sqrt((x**2).sum(1, keepdims=True)), [signed(3, 4)], untouched
    ),
    "x / (1 + |x|)": Case("div", lambda x: x / (1 + jnp.abs(x)), [signed(3, 4)], untouched),
    "relu": Case("max", lambda x: jnp.maximum(x, 0.0), [with_ties(3, 4)], where_positive),
    "relu left": Case(
        "max",
        lambda x: lax.max(jnp.zeros(x.shape), x),
        [with_ties(3, 4)],
        where_positive,
    ),
    "maximum": Case("max", jnp.maximum, [with_ties(5, 4), with_ties(5, 4)], winner),
    "maximum, spread": Case(
        "max",
        lambda x, y: lax.max_p.bind(x, y),
        [with_ties(5, 1), with_ties(5, 4)],
        winner,
    ),
    "minimum": Case("min", jnp.minimum, [with_ties(5, 4), with_ties(5, 4)], loser),
    "saturation": Case("min", lambda x: jnp.minimum(x, 0.5), [signed(3, 4)], untouched),
    "relu6": Case("clamp", lambda x: lax.clamp(0.0, x, 1.0), [with_ties(3, 4)], where_positive),
    "negation": Case("neg", lambda x: -x, [signed(3, 4)], untouched),
    "maximum over axes": Case(
        "reduce_max",
        lambda x: x.max((1, 3)),
        [with_ties(2, 3, 4, 3)],
        first_maximum_over((1, 3)),
    ),
    "maximum over all": Case("reduce_max", jnp.max, [with_ties(2, 3)], first_maximum_over((0, 1))),
    "maximum over the first": Case(
        "reduce_max",
        lambda x: x.max(0),
        [with_ties(4, 3)],
        first_maximum_over((0,)),
    ),
    "max pool": Case("reduce_window_max", POOL[0], [with_ties(1, 4, 6, 2)], POOL[1]),
    "max pool, overlapping": Case(
        "reduce_window_max",
        OVERLAPPING[0],
        [with_ties(2, 5, 4, 2)],
        OVERLAPPING[1],
    ),
    "spread": Case(
        "broadcast_in_dim",
        lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (0, 2)),
        [signed(2, 1)],
        transposed,
    ),
    "tiles": Case("tile", lambda x: jnp.tile(x, (2, 3)), [signed(2, 3)], transposed),
    "joined": Case(
        "concatenate",
        lambda x, y: jnp.concatenate([x, jnp.ones((2, 1)), y, x], 1),
        [signed(2, 3), signed(2, 2)],
        transposed,
    ),
    "part": Case(
        "dynamic_slice",
        lambda x: lax.dynamic_slice(x, (jnp.int32(1), jnp.int32(2)), (2, 2)),
        [signed(4, 5)],
        transposed,
    ),
    "part replaced": Case(
        "dynamic_update_slice",
        lambda x, y: lax.dynamic_update_slice(x, y, (jnp.int32(1), jnp.int32(2))),
        [signed(4, 5), signed(2, 2)],
        transposed,
    ),
    "taken": Case("gather", lambda x: x[:, INDEX], [signed(2, 5)], transposed),
    "taken along": Case(
        "gather",
        lambda x: jnp.take_along_axis(x, INDEX, 1),
        [signed(2, 5)],
        transposed,
    ),
    "set": Case(
        "scatter",
        lambda x, y: x.at[INDEX[1, 1:]].set(y),
        [signed(5, 2), signed(2, 2)],
        transposed,
    ),
    "padded": Case(
        "pad",
        lambda x: lax.pad(x, 1.0, ((1, 0, 2), (0, -1, 0))),
        [signed(3, 4)],
        transposed,
    ),
    "reshaped": Case("reshape", lambda x: x.reshape(6, 2), [signed(3, 4)], transposed),
    "reversed": Case("rev", lambda x: x[::-1, ::-1], [signed(3, 4)], transposed),
    "chosen": Case(
        "select_n",
        lambda x, y: jnp.where(CHOICE, x, y),
        [signed(2, 3), signed(2, 3)],
        transposed,
    ),
    "relu by choice": Case(
        "select_n",
        lambda x: jnp.where(x > 0, x, 0),
        [with_ties(3, 4)],
        where_positive,
    ),
    "leaky relu": Case("select_n", jax.nn.leaky_relu, [signed(3, 4)], untouched),
    "sliced": Case(
        "slice",
        lambda x: lax.slice(x, (1, 0), (4, 5), (2, 3)),
        [signed(4, 6)],
        transposed,
    ),
    "split": Case("split", split_and_swapped, [signed(2, 4)], transposed),
    "squeezed": Case("squeeze", lambda x: lax.squeeze(x, (1,)), [signed(3, 1, 2)], transposed),
    "stacked": Case(
        "stack",
        lambda x, y: jnp.stack([x, y, x], 1),
        [signed(2, 3), signed(2, 3)],
        transposed,
    ),
    "unstacked": Case("unstack", unstacked_and_swapped, [signed(2, 3)], transposed),
    "transposed": Case("transpose", lambda x: x.transpose(1, 2, 0), [signed(2, 3, 4)], transposed),
    **{
        f"resized, {method} to {size}": Case(
            "jit:_resize",
            functools.partial(jax.image.resize, shape=(1, size, 3, 2), method=method),
            [signed(1, 4, 5, 2)],
            transposed,
        )
        for method in ("nearest", "linear", "cubic")
        for size in (3, 7)
    },
    **{
        f"warped, {impl}": Case(
            "jit:resample",
            functools.partial(sample, grid=grid, impl=impl),
            [signed(1, 4, 5, 2)],
            transposed,
        )
        for impl, grid in (("loop", PLACES), ("gather", PLACES), ("matmul", LINES))
    },
    "warped by the signal": Case(
        "jit:resample", sample, [signed(1, 4, 5, 2), PLACES], transposed_for_the_first
    ),
}


def probability(case):
    """A random start of the output's shape; signed, which linear rules must not mind."""
    with jax.enable_x64(True):
        shape = jax.eval_shape(case.fn, *map(jnp.asarray, case.inputs)).shape
    return np.random.default_rng(1).normal(size=shape)


def hand_down(fn, inputs, p, *, contrast_at=(), **options):
    """What a walk brings from the output to each of the inputs, what was dropped, the steps."""

    def marked(*xs):
        return fn(*(checkpoint_name(x, f"x{i}") for i, x in enumerate(xs)))

    with jax.enable_x64(True):
        arrays = list(map(jnp.asarray, inputs))
        whole = [name for name in RULES if name.startswith("jit:")]
        program = trace(marked, *arrays, open_calls=True, whole=whole)
        taps = [f"x{i}" for i in range(len(arrays))]
        found = walk(
            Flow(program),
            program.evaluate(*arrays),
            jnp.asarray(p),
            taps=taps,
            rule_of=lambda step: RULES[step.primitive],
            options=Options(**options),
            contrast_at=contrast_at,
        )
        nothing = [jnp.zeros(x.shape) for x in arrays]
        shares = [found.relevance.get(tap, n) for tap, n in zip(taps, nothing, strict=True)]
        assert all(share.dtype == jnp.float64 for share in shares)
        return list(map(np.asarray, shares)), float(found.dropped), program.steps


def test_every_rule_has_a_case():
    assert set(RULES) <= {case.primitive for case in CASES.values()} | set(NOT_HERE)
    for name, alike in NOT_HERE.items():
        assert RULES[name] is RULES[alike]


@functools.cache
def walked(name):
    case = CASES[name]
    return hand_down(case.fn, case.inputs, probability(case))


@pytest.mark.parametrize("name", CASES)
def test_rule_equals_its_definition(name):
    case = CASES[name]
    shares, _, steps = walked(name)
    assert case.primitive in {step.primitive for step in steps}
    expected = case.oracle(case.fn, case.inputs, probability(case))
    for share, value in zip(shares, expected, strict=True):
        np.testing.assert_allclose(share, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_what_is_handed_on_and_what_is_dropped_is_all_there_was(name):
    shares, dropped, _ = walked(name)
    total = sum(share.sum() for share in shares) + dropped
    np.testing.assert_allclose(total, probability(CASES[name]).sum(), rtol=1e-9, atol=1e-9)


LINEAR = [name for name, case in CASES.items() if case.oracle is excited]


@pytest.mark.parametrize("name", LINEAR)
def test_contrastive_step_is_that_of_the_weights_less_that_of_their_negatives(name):
    case = CASES[name]
    (x,), (matrix,) = case.inputs, matrices(case.fn, case.inputs)
    p = probability(case)
    (share,), _, _ = hand_down(case.fn, [x], p, contrast_at=[case.primitive])
    expected = by_positive_weights(matrix, x, p) - by_positive_weights(-matrix, x, p)
    np.testing.assert_allclose(share, expected, rtol=1e-9, atol=1e-12)


def test_only_the_first_linear_map_is_contrasted():
    x, p = positive(3, 4), signed(3, 2)
    upper, lower = signed(5, 2), signed(4, 5)

    def fn(x):
        return jax.nn.relu(x @ lower) @ upper

    (share,), _, _ = hand_down(fn, [x], p, contrast_at=["dot_general"])
    hidden = np.maximum(x @ lower, 0)
    expected = np.zeros(x.shape)
    for n in range(3):
        above, below = upper.T, lower.T
        contrast = by_positive_weights(above, hidden[n], p[n])
        contrast -= by_positive_weights(-above, hidden[n], p[n])
        expected[n] = by_positive_weights(below, x[n], contrast)
    np.testing.assert_allclose(share, expected, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ activations below zero

BELOW_ZERO = {
    "tanh": (jnp.tanh, np.tanh, -1.0),
    "elu": (jax.nn.elu, lambda x: np.where(x > 0, x, np.expm1(x)), -1.0),
    "silu": (jax.nn.silu, lambda x: x / (1 + np.exp(-x)), -0.2784645427610738),
}


@pytest.mark.parametrize("layout", ["product", "convolution", "pooled, then reshaped"])
@pytest.mark.parametrize("name", BELOW_ZERO)
def test_responses_are_read_from_the_minimum_of_the_activation(name, layout):
    activation, slow, minimum = BELOW_ZERO[name]
    x = signed(1, 4, 4, 3)
    linear_map = conv(signed(3, 3, 3, 2))
    if layout == "product":
        linear_map = product_with(signed(3, 2), "nhwc,cd->nhwd")
    if layout == "pooled, then reshaped":
        linear_map = product_with(signed(3, 2), "nic,cd->nid")

    def between(x):
        if layout != "pooled, then reshaped":
            return x
        n, h, w, c = x.shape
        blocks = x.reshape(n, h // 2, 2, w // 2, 2, c)
        return blocks.max((2, 4)).reshape(n, -1, c)

    def fn(x):
        return linear_map(between(activation(x)))

    response = np.asarray(between(slow(x)))
    (matrix,) = matrices(linear_map, [response])
    with jax.enable_x64(True):
        p = np.random.default_rng(2).normal(size=jax.eval_shape(fn, x).shape)
    (share,), _, _ = hand_down(fn, [x], p)
    # Zero padding stays zero: only what the activation gave is moved.
    expected = by_positive_weights(matrix, response - minimum, p)
    if layout == "pooled, then reshaped":
        expected = first_maximum_over_blocks(slow(x), expected)
    np.testing.assert_allclose(share, expected, rtol=1e-5, atol=1e-6)


def first_maximum_over_blocks(x, p):
    n, h, w, c = x.shape
    blocks = x.reshape(n, h // 2, 2, w // 2, 2, c)
    (share,) = first_maximum_over((2, 4))(None, [blocks], p.reshape(n, h // 2, w // 2, c))
    return share.reshape(x.shape)


# -------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("operation", ["add", "sub"])
def test_positive_sums_share_by_what_is_above_zero(operation):
    x, y, p = signed(4, 5), signed(4, 5), signed(4, 5)
    x[0], y[0] = -1, -1 if operation == "add" else 1  # nothing to win
    shares, dropped, _ = hand_down(getattr(jnp, NUMPY[operation]), [x, y], p, sums="positive")
    terms = np.maximum(x, 0), np.maximum(y if operation == "add" else -y, 0)
    q = ratio(p, sum(terms))
    for share, term in zip(shares, terms, strict=True):
        np.testing.assert_allclose(share, term * q, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dropped, p[sum(terms) == 0].sum(), atol=1e-9)


@pytest.mark.parametrize("sums", ["raw", "positive"])
@pytest.mark.parametrize("operation", ["add", "sub"])
def test_clamped_branches_never_take_a_negative_share(operation, sums):
    x, y, p = signed(6, 5), signed(6, 5), positive(6, 5)
    options = {"sums": sums, "negative": "clamp"}
    shares, _, _ = hand_down(getattr(jnp, NUMPY[operation]), [x, y], p, **options)
    terms = np.maximum(x, 0), np.maximum(y if operation == "add" else -y, 0)
    q = ratio(p, sum(terms))
    for share, term in zip(shares, terms, strict=True):
        np.testing.assert_allclose(share, term * q, rtol=1e-9, atol=1e-12)


NUMPY = {"add": "add", "sub": "subtract"}


@pytest.mark.parametrize(
    "name", ["convolution, strided", "product, heads", "sum over axes", "sum pool", "running sum"]
)
def test_clamped_responses_below_zero_win_nothing(name):
    case = CASES[name]
    p = probability(case)
    x = RNG.normal(size=case.inputs[0].shape)
    (share,), _, _ = hand_down(case.fn, [x], p, negative="clamp")
    (matrix,) = matrices(case.fn, [x])
    expected = by_positive_weights(matrix, np.maximum(x, 0), p)
    np.testing.assert_allclose(share, expected, rtol=1e-9, atol=1e-12)
    assert (share[x < 0] == 0).all()


def test_clamping_changes_nothing_after_an_activation_that_is_read_from_its_minimum():
    x, p, w = signed(3, 4), signed(3, 2), signed(4, 2)

    def fn(x):
        return jnp.tanh(x) @ w

    (share,), _, _ = hand_down(fn, [x], p, negative="clamp")
    expected = [by_positive_weights(w.T, np.tanh(x[n]) + 1, p[n]) for n in range(3)]
    np.testing.assert_allclose(share, expected, rtol=1e-6, atol=1e-9)


SCALE = np.array([1.5, -0.5, -2.0])
AFFINE_STEPS = {
    "times": (lambda y: y * SCALE, SCALE),
    "times, left": (lambda y: SCALE * y, SCALE),
    "over": (lambda y: y / SCALE, SCALE),
    "divisor": (lambda y: SCALE / y, SCALE),
    "negated": (lambda y: -y, -np.ones(3)),
    "taken from a constant": (lambda y: 2.0 - y, -np.ones(3)),
    "a constant taken": (lambda y: (y - 2.0) * SCALE, SCALE),
    "bias": (lambda y: (y + SCALE) * SCALE, SCALE),
    "twice": (lambda y: (y * SCALE + 1) * SCALE[::-1], SCALE * SCALE[::-1]),
    "named": (lambda y: checkpoint_name(y, "y") * SCALE, SCALE),
    "copied": (lambda y: jnp.copy(y).astype(jnp.float32).astype(jnp.float64) * SCALE, SCALE),
    "reshaped": (lambda y: (y.reshape(2, 12, 3) * SCALE).reshape(y.shape), SCALE),
    "rearranged": (lambda y: (y[:, ::-1, :, ::-1] * SCALE)[:, ::-1, :, ::-1], SCALE[::-1]),
    "padded and cut": (lambda y: jnp.pad(y, 1)[1:-1, 1:-1, 1:-1, 1:-1] * SCALE, SCALE),
    "gate": (lambda y: y * jnp.tanh(-jnp.abs(y).sum(-1, keepdims=True)), -np.ones(3)),
    "zero": (lambda y: y * np.array([0.0, -0.0, -1.0]), np.array([1, 1, -1])),
}


@pytest.mark.parametrize("layer", ["convolution", "product"])
@pytest.mark.parametrize("name", AFFINE_STEPS)
def test_positive_scales_flip_the_weights_before(name, layer):
    affine, sign = AFFINE_STEPS[name]
    x = signed(2, 3, 4, 2)
    kernel = signed(3, 3, 2, 3) if layer == "convolution" else signed(2, 3)
    by_product = functools.partial(product_with, spec="...c,cd->...d")
    linear_map = conv if layer == "convolution" else by_product
    p = signed(2, 3, 4, 3)
    (matrix,) = matrices(linear_map(kernel * np.where(sign < 0, -1, 1)), [x])
    for contrast_at, dual in (((), 0), (["conv_general_dilated", "dot_general"], 1)):
        (share,), _, _ = hand_down(
            lambda x: affine(linear_map(kernel)(x)),
            [x],
            p,
            scales="positive",
            contrast_at=contrast_at,
        )
        expected = by_positive_weights(matrix, x, p)
        expected -= dual * by_positive_weights(-matrix, x, p)
        np.testing.assert_allclose(share, expected, rtol=1e-9, atol=1e-12)
    (ignored,), _, _ = hand_down(lambda x: affine(linear_map(kernel)(x)), [x], p)
    (matrix,) = matrices(linear_map(kernel), [x])
    np.testing.assert_allclose(ignored, by_positive_weights(matrix, x, p), rtol=1e-9, atol=1e-12)


def test_a_zoom_is_the_same_however_it_is_flipped():
    """Its rule follows the sign of its response, which flips with its weights."""
    kernel, x, p = signed(3, 3, 1, 3), positive(1, 3, 3, 3), signed(1, 6, 6, 3)

    def scaled(kernel, scale):
        zoom = functools.partial(linear_zoom, kernel=kernel, factor=2)
        return hand_down(lambda x: zoom(x) * scale, [x], p, scales="positive")[0][0]

    rebuilt = scaled(kernel * np.sign(SCALE), np.abs(SCALE))
    np.testing.assert_allclose(scaled(kernel, SCALE), rebuilt, rtol=1e-9, atol=1e-12)


def test_positive_scales_are_those_of_a_network_rebuilt_with_them():
    """Kernels, biases and means flipped, as was done for the published ResNet-50."""
    x, p = positive(2, 6, 6, 2), signed(2, 4)
    layers = [
        {
            "kernel": signed(3, 3, a, b),
            "bias": signed(b),
            "mean": signed(b),
            "scale": signed(b),
            "offset": signed(b),
        }
        for a, b in ((2, 4), (4, 4), (4, 3))
    ]
    head = signed(3, 4)
    flipped = []
    for layer in layers:
        sign = np.sign(layer["scale"])
        moved = {name: value * sign for name, value in layer.items()}
        flipped.append({**moved, "offset": layer["offset"]})
        assert (flipped[-1]["scale"] > 0).all()

    def network(layers):
        def fn(x):
            for i, layer in enumerate(layers):
                y = conv(layer["kernel"], (1, 1 + i // 2))(x) + layer["bias"]
                y = (y - layer["mean"]) * layer["scale"] + layer["offset"]
                x = jax.nn.relu(x + y if i == 1 else y)
            return x.mean((1, 2)) @ head

        return fn

    shares = [
        hand_down(network(weights), [x], p, contrast_at=["dot_general"], scales=scales)[0][0]
        for weights, scales in ((layers, "positive"), (flipped, "ignore"), (layers, "ignore"))
    ]
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-8, atol=1e-11)
    assert np.abs(shares[0] - shares[2]).max() > 0.01 * np.abs(shares[0]).max()

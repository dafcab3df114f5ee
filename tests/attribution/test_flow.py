"""What is signal, what is a statistic, and from where the responses of an activation are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution.flow import Flow
from attnzoom_jax.attribution.program import trace

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 4, 4, 6)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)


def flow_of(fn, *args):
    return Flow(trace(fn, *(args or (X,)), open_calls=True))


def output_of(fn, *args):
    """The flow of a function, and its only output."""
    flow = flow_of(fn, *args)
    (output,) = flow.program.outputs
    return flow, output


def last_step(fn, *args):
    flow, output = output_of(fn, *args)
    return flow, flow.producer[output]


def mask(x, name="layer/gate"):
    return checkpoint_name(jax.nn.sigmoid(x @ WEIGHTS), name)


def spread(value):
    """A vector of channels [n, c], one for every pixel."""
    return value[:, None, None, :]


# -------------------------------------------------------------------------------------- signal


@pytest.mark.parametrize(
    ("fn", "is_signal"),
    [
        (lambda x: x, True),
        (lambda x: x @ WEIGHTS + 1, True),
        (lambda x: jnp.ones((2, 3)), False),
        (lambda x: WEIGHTS @ WEIGHTS, False),
        (lambda x: lax.stop_gradient(x), True),
        (lambda x: x > 0, False),
        (lambda x: (x > 0).astype(jnp.float32), False),
        (lambda x: x.argmax(-1), False),
        (lambda x: jnp.float32(1) * x.argmax(-1), False),
        (lambda x: x.astype(jnp.int32), False),
        (lambda x: jnp.where(x > 0, 1.0, 2.0), False),
        (lambda x: jnp.where(x > 0, x, 2.0), True),
        (mask, False),
        (lambda x: mask(x, "gate"), False),
        (lambda x: mask(x, "a/b/gate"), False),
        (lambda x: 2 * mask(x) + 1, False),
        (lambda x: mask(x, "gated"), True),
        (lambda x: mask(x, "gate/conv"), True),
        (lambda x: x * mask(x), True),
        (lambda x: jax.nn.relu(x), True),
        (lambda x: jax.checkpoint(jnp.tanh)(x), True),
        (lambda x: lax.scan(lambda c, y: (c + y, None), jnp.zeros(x.shape[1:]), x)[0], True),
    ],
)
def test_signal_is_what_depends_on_the_images_but_for_gates_and_decisions(fn, is_signal):
    flow, output = output_of(fn)
    assert flow.is_signal(output) == is_signal


def test_repeated_gates_are_all_gates():
    def fn(x):
        return mask(mask(x, "gate"), "gate")

    flow, output = output_of(fn)
    assert list(flow.program.taps) == ["gate", "gate#1"]
    assert not flow.is_signal(output)


def test_integer_images_are_signal_until_a_decision_on_floats():
    images = jnp.arange(96, dtype=jnp.uint8).reshape(2, 4, 4, 3)
    assert output_of(lambda x: x.astype(jnp.float32) / 255, images)[0].reductions
    for fn, is_signal in (
        (lambda x: x.astype(jnp.float32) / 255, True),
        (lambda x: x[:, ::2].astype(jnp.int32) * 2, True),
        (lambda x: x > 3, False),
        (lambda x: (x / 255).astype(jnp.int32), False),
    ):
        flow, output = output_of(fn, images)
        assert flow.is_signal(output) == is_signal


def test_reached_are_the_signals_that_depend_on_a_tap():
    def fn(x):
        left = checkpoint_name(x @ WEIGHTS, "left")
        right = checkpoint_name(jnp.tanh(x), "right")
        return jnp.stack([left * mask(right), right, left + right])

    flow = flow_of(fn)
    tap = {step.tap: step.outputs[0] for step in flow.program.steps if step.tap}
    left, right = (flow.reached_from([name]) for name in ("left", "right"))
    assert tap["left"] in left - right and tap["right"] in right - left
    assert tap["layer/gate"] not in left | right
    (product,) = (step for step in flow.program.steps if step.primitive == "mul")
    assert product.outputs[0] in left - right
    (added,) = (step for step in flow.program.steps if step.primitive == "add")
    assert added.outputs[0] in left & right
    assert left | right == flow.reached_from(["left", "right"])
    assert not left.intersection(flow.program.inputs)


# --------------------------------------------------------------------- reductions, statistics


@pytest.mark.parametrize(
    ("fn", "reductions"),
    [
        (lambda x: x, 0),
        (lambda x: jnp.tanh(x) @ WEIGHTS, 0),
        (lambda x: x.reshape(2, 16, 6), 0),
        (lambda x: x.astype(jnp.bfloat16), 0),
        (lambda x: lax.reduce_precision(x, 5, 10), 0),
        (lambda x: x.sum((1, 2)), 1),
        (lambda x: x.mean((1, 2), keepdims=True), 1),
        (lambda x: spread(x.max((1, 2))) + jnp.zeros(x.shape), 2),
        (lambda x: x + spread(x.max((1, 2))), 0),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), 1),
        (lambda x: jax.nn.sigmoid(x[..., :1] @ WEIGHTS[:1, :1]), 0),
        (lambda x: x.mean(-1, keepdims=True) * jnp.ones(6), 2),
    ],
)
def test_reductions_are_counted_along_the_shortest_way(fn, reductions):
    flow, output = output_of(fn)
    assert flow.reductions[output] == reductions


@pytest.mark.parametrize(
    ("fn", "position"),
    [
        (lambda x: x * jax.nn.sigmoid(spread(x.mean((1, 2)) @ WEIGHTS)), 1),
        (lambda x: jax.nn.sigmoid(spread(x.mean((1, 2)) @ WEIGHTS)) * x, 0),
        (lambda x: x - x.mean(-1, keepdims=True), 1),
        (lambda x: x.mean(-1, keepdims=True) - x, 0),
        (lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True)), 1),
        (lambda x: x * jax.nn.sigmoid(x @ WEIGHTS[:, :1]), 1),  # one mask for all channels
        (lambda x: lax.mul_p.bind(x, jax.nn.sigmoid(x[..., :1])), 1),
        (lambda x: x * jnp.tile(jax.nn.sigmoid(x[..., :1]), (1, 1, 1, 6)), 1),
        (lambda x: x * jnp.repeat(jax.nn.sigmoid(x[..., :1]), 6, axis=-1), 1),
        (lambda x: x * jax.nn.sigmoid(x @ WEIGHTS), None),
        (lambda x: x.mean((1, 2)) * x.max((1, 2)), None),
    ],
)
def test_of_two_signals_the_statistic_is_what_was_reduced_or_spread_more(fn, position):
    flow, step = last_step(fn)
    assert len([ref for ref in step.inputs if flow.is_signal(ref)]) == 2
    assert flow.statistic(step) == position


# ------------------------------------------------------------------------------ common sources


@pytest.mark.parametrize(
    "fn",
    [
        lambda h: h * jax.nn.sigmoid(h),
        lambda h: jnp.tanh(h) * jax.nn.sigmoid(2 * h + 1),
        lambda h: h * jnp.tanh(jax.nn.softplus(h)),
        lambda h: h * jax.nn.relu(h),
        lambda h: (h + 1) * jnp.where(h > 0, h, 0.1 * h) * jnp.exp(-h),
        lambda h: h / (1 + jnp.abs(h)),
        lambda h: h * h,
        lambda h: jnp.square(h) * h,
        lambda h: h * (h * h),
    ],
)
def test_elementwise_functions_of_one_value_have_it_as_their_source(fn):
    def network(x):
        return fn(checkpoint_name(x @ WEIGHTS, "h"))

    flow, step = last_step(network)
    (h,) = (step.outputs[0] for step in flow.program.steps if step.tap == "h")
    while step.primitive not in ("mul", "div"):
        step = flow.producer[step.inputs[0]]
    assert flow.common_source(step.inputs) == h


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * (x @ WEIGHTS),
        lambda x: jnp.tanh(x[:1]) * x[1:],
        lambda x: x * x[:, ::-1],
        lambda x: (x @ WEIGHTS) * (x @ WEIGHTS),
        lambda x: x.mean(-1) * x.max(-1),
    ],
)
def test_signals_from_different_places_have_no_common_source(fn):
    flow, step = last_step(fn)
    assert flow.common_source(step.inputs) is None


def test_two_images_have_no_common_source():
    flow, step = last_step(lambda x, y: x * y, X, X)
    assert flow.common_source(step.inputs) is None


# --------------------------------------------------------------------------------- the minimum

# Found by bisection of the derivative in float64, but where they are exact.
MINIMA = {
    "tanh": (jnp.tanh, -1.0),
    "erf": (lax.erf, -1.0),
    "gelu, tanh": (jax.nn.gelu, -0.170041),
    "gelu, erf": (lambda x: jax.nn.gelu(x, approximate=False), -0.169971),
    "silu": (jax.nn.silu, -0.278465),
    "silu, written out": (lambda x: x / (1 + jnp.exp(-x)), -0.278465),
    "elu": (jax.nn.elu, -1.0),
    "celu": (jax.nn.celu, -1.0),
    "selu": (jax.nn.selu, -1.758099),
    "hard_swish": (jax.nn.hard_swish, -0.375),
    "hard_tanh": (jax.nn.hard_tanh, -1.0),
    "clipped": (lambda x: jnp.clip(x, -1, 1), -1.0),
    "mish": (jax.nn.mish, -0.308843),
    "softplus": (jax.nn.softplus, 0.0),
    "sigmoid": (jax.nn.sigmoid, 0.0),
    "hard_sigmoid": (jax.nn.hard_sigmoid, 0.0),
    "relu": (jax.nn.relu, 0.0),
    "relu, plain": (lambda x: jnp.maximum(x, 0), 0.0),
    "relu, left": (lambda x: lax.max(jnp.zeros_like(x), x), 0.0),
    "relu, chosen": (lambda x: jnp.where(x > 0, x, 0), 0.0),
    "relu6": (jax.nn.relu6, 0.0),
    "square": (jnp.square, 0.0),
    "absolute": (jnp.abs, 0.0),
    "shifted": (lambda x: 2 * jnp.tanh(x) + 0.5, -1.5),
    "tanh of relu": (lambda x: jnp.tanh(jax.nn.relu(x)), 0.0),
    "elu of relu": (lambda x: jax.nn.elu(jax.nn.relu(x)), 0.0),
    "log of relu": (lambda x: jnp.log1p(jax.nn.relu(x)), 0.0),
    "relu taken down": (lambda x: jax.nn.relu(x) - 1, -1.0),
    "under jit": (jax.jit(jnp.tanh), -1.0),
    "rematerialised": (jax.checkpoint(jax.nn.silu), -0.278465),
}
NONE = {
    "images": lambda x: x,
    "linear": lambda x: x @ WEIGHTS,
    "leaky_relu": jax.nn.leaky_relu,
    "prelu": lambda x: jnp.where(x > 0, x, 0.25 * x),
    "sum": lambda x: jnp.tanh(x) + x @ WEIGHTS,
    "mean of tanh": lambda x: jnp.tanh(x).mean((1, 2)),
    "product of tanh": lambda x: jnp.tanh(x) @ WEIGHTS,
    "cube": lambda x: x**3,
    "log": jnp.log,
    "negated": lambda x: -x,
    "one per channel": lambda x: jnp.tanh(x) * jnp.arange(6.0),
    "constant": lambda x: jnp.ones((3, 3)),
    "minimum": lambda x: jnp.minimum(x, 0),
    "joined with a linear map": lambda x: jnp.concatenate([jnp.tanh(x), x @ WEIGHTS], -1),
    "gate": mask,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", MINIMA)
def test_minimum_of_an_activation(name, dtype):
    fn, expected = MINIMA[name]
    flow, output = output_of(fn, (X @ WEIGHTS).astype(dtype))
    found = flow.minimum(output)
    assert found is not None
    assert found == pytest.approx(expected, abs=1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("name", NONE)
def test_what_has_no_minimum_or_not_one_that_is_known(name):
    flow, output = output_of(NONE[name])
    assert flow.minimum(output) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["gelu, tanh", "elu", "hard_swish", "relu", "softplus"])
def test_minimum_with_wide_floats_enabled(name, dtype):
    """A float32 network holds float32 constants, whatever JAX would make of new arrays."""
    fn, expected = MINIMA[name]
    with jax.enable_x64(True):
        flow, output = output_of(fn, np.ones((2, 3), dtype))
        assert flow.minimum(output) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x.reshape(2, 16, 6)[:, ::-1].transpose(0, 2, 1), -1.0),
        (lambda x: x[:, 1:3], -1.0),
        (lambda x: x[:, jnp.array([3, 0])], -1.0),
        (lambda x: checkpoint_name(x, "here"), -1.0),
        (lambda x: x.max((1, 2)), -1.0),
        (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"), -1),
        (lambda x: jnp.concatenate([x, jax.nn.relu(x)], -1), -1.0),
        (lambda x: jnp.concatenate([2 * x, x], -1), -2.0),
        (lambda x: jnp.stack([2 * x, x]), -2.0),
        (lambda x: lax.split(x, (2, 4), axis=3)[1], -1.0),
        (lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), -1.0),
    ],
)
def test_minimum_is_kept_by_copies_and_rearrangements(fn, expected):
    flow, output = output_of(lambda x: fn(jnp.tanh(x)))
    assert flow.minimum(output) == pytest.approx(expected, abs=1e-6)


def test_minimum_is_found_with_copies_between_that_only_fit_the_images():
    """A sharding of four axes does not fit the line of values on which an activation is tried."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))

    def silu(x):
        return x * jax.nn.sigmoid(lax.with_sharding_constraint(x, sharding))

    flow, output = output_of(silu)
    assert flow.minimum(output) == pytest.approx(-0.278465, abs=1e-5)


def test_minimum_is_the_same_inside_of_a_traced_function():
    found = []

    def fn(x):
        flow, output = output_of(jax.nn.gelu, x)
        found.append(flow.minimum(output))
        return x

    jax.jit(fn)(X)
    jax.grad(lambda x: jax.vmap(fn)(x).sum())(X)
    assert found == [pytest.approx(-0.170041, abs=1e-5)] * len(found) and len(found) >= 2

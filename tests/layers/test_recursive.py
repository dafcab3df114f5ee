import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attnzoom_jax.attribution import list_taps, read_taps
from attnzoom_jax.layers import RecursiveAttention
from attnzoom_jax.layers.factory import create_layer
from attnzoom_jax.layers.recursive import AGGREGATIONS
from attnzoom_jax.models import bind

KEY = jax.random.key(0)
X = jnp.float32(np.random.default_rng(0).normal(size=(3, 5)))


def variables_of(layer, x=X):
    return jax.jit(layer.init)(KEY, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_lstm(params, sequence, hidden):
    """One layer, example by example, gate by gate, in float64; sequence is a list of [d]."""
    kernels = {k: np.float64(v) for k, v in params.items()}
    h, c, states = np.zeros(hidden), np.zeros(hidden), []
    for x in sequence:
        gates = {}
        for j, gate in enumerate("ifgo"):  # torch's order
            part = slice(j * hidden, (j + 1) * hidden)
            gates[gate] = (
                kernels["input_kernel"][:, part].T @ x
                + kernels["input_bias"][part]
                + kernels["hidden_kernel"][:, part].T @ h
                + kernels["hidden_bias"][part]
            )
        i, f, o = (sigmoid(gates[gate]) for gate in "ifo")
        c = f * c + i * np.tanh(gates["g"])
        h = o * np.tanh(c)
        states.append(h)
    return states


def slow_recursive_attention(params, x, layer):
    """The module's docstring in float64: fused [n, hidden], states and weights."""
    fused, all_states, all_weights = [], [], []
    for row in np.float64(x):
        states = [row] * layer.steps
        for i in range(1, layer.num_layers + 1):
            states = slow_lstm(params[f"lstm{i}"], states, layer.hidden)
        if layer.aggregation == "attention":
            u, b = np.float64(params["score"]["kernel"])[:, 0], float(params["score"]["bias"][0])
            scores = np.exp([u @ state + b for state in states])
            weights = scores / scores.sum()
        elif layer.aggregation == "last":
            weights = np.eye(layer.steps)[-1]
        else:
            weights = np.full(layer.steps, 1 / layer.steps)
        fused.append(sum(w * state for w, state in zip(weights, states, strict=True)))
        all_states.append(states)
        all_weights.append(weights)
    return np.array(fused), np.array(all_states), np.array(all_weights)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("steps", "num_layers"), [(1, 2), (4, 2), (3, 1), (2, 3)])
def test_equals_the_loop_in_float64(aggregation, steps, num_layers):
    layer = RecursiveAttention(steps, 6, num_layers, aggregation)
    variables = variables_of(layer)
    # Scores of the first weights hardly differ.
    params = jax.tree.map(lambda p: 4 * p, variables["params"])
    fused, states, weights = slow_recursive_attention(params, X, layer)
    out, taps = read_taps(
        bind(layer, {"params": params}),
        X,
        ["states", *(["gate"] if aggregation == "attention" else [])],
    )
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, fused, atol=1e-5)
    np.testing.assert_allclose(taps["states"], states, atol=1e-5)
    if aggregation == "attention":
        np.testing.assert_allclose(taps["gate"][..., 0], weights, atol=1e-5)
        assert steps == 1 or weights.std() > 0.002  # they do differ


def test_parameters_are_torchs():
    shapes = jax.eval_shape(RecursiveAttention(10).init, KEY, jnp.zeros((1, 512)))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == {
        **{
            f"lstm{i}": {
                "input_kernel": (512, 2048),
                "hidden_kernel": (512, 2048),
                "input_bias": (2048,),
                "hidden_bias": (2048,),
            }
            for i in (1, 2)
        },
        "score": {"kernel": (512, 1), "bias": (1,)},
    }
    # Two layers with two biases each, and the attention.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 4_202_496 + 513


def test_starts_uniform_within_the_root_of_the_units():
    params = variables_of(RecursiveAttention(2, 16))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert np.abs(leaf).max() <= 0.25, path
        if leaf.size > 1:
            assert np.abs(leaf).max() > 0.15, path
    kernel = variables_of(RecursiveAttention(2, 64))["params"]["lstm1"]["hidden_kernel"]
    np.testing.assert_allclose(kernel.std(), 0.125 / np.sqrt(3), rtol=0.02)


def test_one_step_is_its_state_however_it_is_fused():
    variables = variables_of(RecursiveAttention(1, 6))
    outs = [
        jax.jit(RecursiveAttention(1, 6, aggregation=name).apply)(variables, X)
        for name in AGGREGATIONS
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def test_later_steps_change_less_than_first_ones():
    layer = RecursiveAttention(40, 6)
    variables = variables_of(layer)
    _, taps = read_taps(bind(layer, variables), X, ["states"])
    change = np.abs(np.diff(taps["states"], axis=1)).max(axis=(0, 2))
    assert change[0] > 0.01 and change[-1] < 1e-4 * change[0]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(RecursiveAttention(3, 4, name="recursive")(x))


def test_taps_and_gradients():
    variables = variables_of(Net())
    taps = list_taps(bind(Net(), variables), X)
    assert taps["recursive/states"] == (3, 3, 4)
    assert taps["recursive/gate"] == (3, 3, 1)
    assert taps["recursive"] == (3, 4)
    weights = jnp.arange(6.0).reshape(3, 2)
    loss = jax.jit(jax.grad(lambda v, x: (Net().apply(v, x) * weights).sum(), argnums=(0, 1)))
    params, x = loss(variables, X)
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, x)):
        # The bias of the scores changes no softmax.
        is_without = "score" in str(path) and "bias" in str(path)
        assert (np.abs(leaf).max() < 1e-6) == is_without, path
    layer = params["params"]["recursive"]["lstm2"]
    np.testing.assert_array_equal(layer["input_bias"], layer["hidden_bias"])


def test_the_products_with_the_inputs_are_not_in_the_loops():
    """One product per layer outside, one with the state inside; that with x for one step only."""
    layer, x = RecursiveAttention(20, 8), jnp.zeros((2, 64))
    shapes = jax.eval_shape(layer.init, KEY, x)
    jaxpr = jax.make_jaxpr(layer.apply)(shapes, x)

    def products(equations):
        return [
            tuple(v.aval.shape for v in e.invars)
            for e in equations
            if e.primitive.name == "dot_general"
        ]

    loops = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert [products(e.params["jaxpr"].eqns) for e in loops] == [[((2, 8), (8, 32))]] * 2
    assert products(jaxpr.eqns) == [
        ((2, 1, 64), (64, 32)),
        ((2, 20, 8), (8, 32)),
        ((2, 20, 8), (8, 1)),
    ]


@pytest.mark.parametrize(
    ("fields", "x", "message"),
    [
        ({"steps": 0}, X, "RecursiveAttention.steps is 0, expected a whole number .* try 10"),
        ({"hidden": 0}, X, "hidden is 0"),
        ({"num_layers": True}, X, "num_layers is True"),
        ({"aggregation": "atention"}, X, "aggregation 'atention'; did you mean 'attention'"),
        ({}, X[:, None, None], r"vectors \[n, d\], got shape \(3, 1, 1, 5\)"),
    ],
)
def test_bad_fields_and_input(fields, x, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(RecursiveAttention(**fields).init, KEY), x)


def test_by_name():
    assert create_layer("recursive_attention", steps=3) == RecursiveAttention(3)

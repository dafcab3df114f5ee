import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution import list_taps, program, read_taps

X = jnp.arange(12.0).reshape(3, 4) / 7


def inner(x):
    return checkpoint_name(jnp.sin(x), "a")


def wrapped_in(wrapper):
    return lambda x: checkpoint_name(wrapper(inner)(x) * 2, "b")


WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "nested jit": lambda f: jax.jit(jax.jit(f)),
    "remat": jax.checkpoint,
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_taps_are_found_and_read_through_every_wrapper(wrapper):
    fn = wrapped_in(wrapper)
    assert list_taps(fn, X) == {"a": (3, 4), "b": (3, 4)}
    output, values = read_taps(fn, X, ["a", "b"])
    np.testing.assert_allclose(values["a"], np.sin(X), rtol=1e-6)
    np.testing.assert_array_equal(values["b"], output)
    np.testing.assert_allclose(output, 2 * np.sin(X), rtol=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_adding_at_a_tap_changes_only_what_follows(wrapper):
    traced = program.trace(wrapped_in(wrapper), X)
    output, values = traced.run(X, read=["a"], add={"a": jnp.ones_like(X)})
    np.testing.assert_allclose(values["a"], np.sin(X) + 1, rtol=1e-6)
    np.testing.assert_allclose(output, 2 * (np.sin(X) + 1), rtol=1e-6)


def test_gradient_at_a_tap_is_that_of_the_rest_of_the_function():
    traced = program.trace(wrapped_in(jax.jit), X)
    grad = jax.grad(lambda d: (traced.run(X, add={"a": d})[0] ** 2).sum())(jnp.zeros_like(X))
    np.testing.assert_allclose(grad, 8 * np.sin(X), rtol=1e-6)


def test_a_traced_function_may_itself_be_jitted():
    fn = wrapped_in(jax.checkpoint)
    jitted = jax.jit(lambda x: read_taps(fn, x, ["a"])[1]["a"])
    np.testing.assert_allclose(jitted(X), np.sin(X), rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_unrolled_and_its_taps_numbered_by_iteration(reverse):
    def body(carry, x):
        carry = checkpoint_name(jnp.tanh(carry + x), "h")
        return carry, carry * 2

    def fn(x):
        return jax.lax.scan(body, jnp.zeros(4), x, reverse=reverse)

    assert list_taps(fn, X) == {f"h#{t}": (4,) for t in ([2, 1, 0] if reverse else [0, 1, 2])}
    (carry, stacked), values = read_taps(fn, X, ["h#0", "h#2"])
    expected_carry, expected = fn(X)
    np.testing.assert_allclose(carry, expected_carry, rtol=1e-6)
    np.testing.assert_allclose(stacked, expected, rtol=1e-6)
    np.testing.assert_allclose(values["h#0"], expected[0] / 2, rtol=1e-6)
    np.testing.assert_allclose(values["h#2"], expected[2] / 2, rtol=1e-6)


def test_a_tap_in_a_loop_without_a_fixed_length_raises():
    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() < 10, lambda x: inner(x) + 1, x)

    with pytest.raises(ValueError, match="while"):
        list_taps(fn, X)


def test_steps_without_taps_stay_whole_and_keep_their_custom_gradient():
    @jax.custom_jvp
    def odd(x):
        return x

    odd.defjvp(lambda primals, tangents: (primals[0], 5 * tangents[0]))
    traced = program.trace(lambda x: odd(checkpoint_name(x, "a")), X)
    grad = jax.grad(lambda d: traced.run(X, add={"a": d})[0].sum())(jnp.zeros_like(X))
    np.testing.assert_array_equal(grad, np.full(X.shape, 5.0))


def test_repeated_names_are_numbered():
    def fn(x):
        return inner(inner(x))

    assert list(list_taps(fn, X)) == ["a", "a#1"]
    np.testing.assert_allclose(read_taps(fn, X, ["a#1"])[1]["a#1"], np.sin(np.sin(X)), rtol=1e-6)


def test_unknown_tap_names_the_nearest():
    def fn(x):
        return checkpoint_name(x, "stage3")

    with pytest.raises(ValueError, match="'stage4'; did you mean 'stage3'"):
        read_taps(fn, X, ["stage4"])


def test_nothing_is_computed_to_list_taps():
    shape = jax.ShapeDtypeStruct((2, 10**6, 10**6, 3), jnp.float32)
    assert list_taps(lambda x: checkpoint_name(x * 2, "big"), shape) == {"big": shape.shape}


@pytest.mark.parametrize("rule", ["custom_jvp", "custom_vjp"])
def test_a_tap_inside_a_function_with_its_own_derivative_raises(rule):
    marked = getattr(jax, rule)(inner)
    if rule == "custom_jvp":
        marked.defjvp(lambda x, dx: (inner(x[0]), dx[0]))
    else:
        marked.defvjp(lambda x: (inner(x), None), lambda _, g: (g,))
    with pytest.raises(ValueError, match="its own derivative"):
        list_taps(marked, X)


# ------------------------------------------------------------------------------- calls opened


@jax.custom_jvp
def fivefold(x):
    """Tanh, that says its derivative is 5."""
    return jnp.tanh(x)


fivefold.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 5 * tangents[0]))


@jax.custom_vjp
def sevenfold(x, y):
    return jnp.tanh(x), x * y


sevenfold.defvjp(lambda x, y: (sevenfold(x, y), None), lambda _, g: (7 * g[0], 7 * g[1]))


@jax.jit
def named(x):
    return jnp.sin(x) + 1


def body(carry, x):
    return named(carry) * x, (carry, jnp.cos(x))


OPENED = {
    "jit": (jax.jit(jnp.sin), ["sin"]),
    "nested jit": (lambda x: jax.jit(named)(2 * x), ["mul", "sin", "add"]),
    "remat": (jax.checkpoint(named), ["sin", "add"]),
    "remat in jit": (jax.jit(jax.checkpoint(named)), ["sin", "add"]),
    "vmap of jit": (jax.vmap(named), ["sin", "add"]),
    "custom_jvp": (lambda x: fivefold(x) + 1, ["tanh", "custom_jvp_call", "add"]),
    "vmap of custom_jvp": (jax.vmap(fivefold), ["tanh", "custom_jvp_call"]),
    "custom_vjp": (
        lambda x: sum(sevenfold(x, 2 * x)),
        ["mul", "tanh", "mul", "custom_vjp_call", "add", "add"],
    ),
    "same value twice": (lambda x: x - x * x, ["mul", "sub"]),
    "constant": (lambda x: x + X, ["add"]),
}


@pytest.mark.parametrize("name", OPENED)
def test_open_calls_show_every_primitive_in_order(name):
    fn, primitives = OPENED[name]
    traced = program.trace(fn, X, open_calls=True)
    assert [step.primitive for step in traced.steps] == primitives
    output, _ = traced.run(X)
    np.testing.assert_allclose(output, fn(X), rtol=1e-6)


@pytest.mark.parametrize("name", [*OPENED, "scan"])
def test_closed_and_open_programs_compute_the_same(name):
    fn = OPENED[name][0] if name != "scan" else lambda x: lax.scan(body, x[0], x)
    expected = fn(X)
    for is_open in (False, True):
        traced = program.trace(fn, X, open_calls=is_open)
        for run in (traced.run, jax.jit(traced.run)):
            result, _ = run(X)
            assert jax.tree.structure(result) == jax.tree.structure(expected)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_open_calls_unroll_scans_within_scans(reverse):
    def outer(carry, x):
        carry, ys = lax.scan(body, carry, jnp.stack([x, 2 * x]), reverse=reverse)
        return carry, ys

    def fn(x):
        return lax.scan(outer, x[0], x, reverse=reverse)

    traced = program.trace(fn, X, open_calls=True)
    primitives = [step.primitive for step in traced.steps]
    assert primitives.count("sin") == primitives.count("cos") == 6
    assert not {"scan", "jit", "jit:named"} & set(primitives)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced.run(X)[0], fn(X))


def test_calls_named_in_whole_stay_one_step_wherever_they_are():
    def fn(x):
        return lax.scan(body, jax.checkpoint(named)(x[0]), x)[0]

    traced = program.trace(fn, X, open_calls=True, whole=["jit:named"])
    primitives = [step.primitive for step in traced.steps]
    assert primitives.count("jit:named") == 4 and "sin" not in primitives
    np.testing.assert_allclose(traced.run(X)[0], fn(X), rtol=1e-6)


def test_a_call_with_a_rule_as_one_step_that_holds_a_tap_is_refused():
    with pytest.raises(ValueError, match="'inner' holds a tap and has a rule as one step"):
        program.trace(jax.jit(inner), X, open_calls=True, whole=["jit:inner"])


def test_a_function_with_its_own_derivative_stands_after_its_body():
    traced = program.trace(lambda x: sevenfold(x, 2 * x), X, open_calls=True)
    (argument, tanh, product, call) = traced.steps
    results = (tanh.outputs[0], product.outputs[0])
    assert call.inputs == (*results, *traced.inputs, argument.outputs[0])
    assert traced.outputs == call.outputs


def test_a_function_with_its_own_derivative_keeps_it_when_opened():
    for fn, expected in (
        (lambda x: fivefold(3 * x).sum(), 15.0),
        (lambda x: fivefold(fivefold(x)).sum(), 25.0),
        (lambda x: jax.vmap(jax.jit(fivefold))(x).sum(), 5.0),
        (lambda x: sevenfold(x, 2 * x)[1].sum(), 14.0),
        (lambda x: jax.checkpoint(fivefold)(x).sum(), 5.0),
    ):
        traced = program.trace(fn, X, open_calls=True)
        grad = jax.grad(lambda x, traced=traced: traced.run(x)[0])(X)
        np.testing.assert_allclose(grad, np.full(X.shape, expected), rtol=1e-6)


def test_evaluate_gives_every_value_by_its_number():
    def fn(x):
        return {"out": (named(x) * 3, X, 2.0)}

    traced = program.trace(fn, X, open_calls=True)
    values = traced.evaluate(X)
    assert set(values) == set(traced.shapes)
    for number, value in values.items():
        shape = traced.shapes[number]
        assert (value.shape, value.dtype) == (shape.shape, shape.dtype)
    sine, total, product = (values[step.outputs[0]] for step in traced.steps)
    np.testing.assert_allclose(sine, np.sin(X), rtol=1e-6)
    np.testing.assert_allclose(total, np.sin(X) + 1, rtol=1e-6)
    np.testing.assert_allclose(product, 3 * (np.sin(X) + 1), rtol=1e-6)
    # A constant is no value of its own, but is looked up as one.
    outputs = [values[ref] for ref in traced.outputs]
    np.testing.assert_array_equal(outputs[1], X)
    assert outputs[2] == 2
    assert jax.tree.structure(fn(X)) == traced.output_tree


def test_evaluate_adds_at_taps_as_run_does():
    traced = program.trace(wrapped_in(jax.jit), X, open_calls=True)
    values = traced.evaluate(X, add={"a": jnp.ones_like(X)})
    (tap,) = (step.outputs[0] for step in traced.steps if step.tap == "a")
    np.testing.assert_allclose(values[tap], np.sin(X) + 1, rtol=1e-6)
    np.testing.assert_allclose(values[traced.outputs[0]], 2 * (np.sin(X) + 1), rtol=1e-6)


def test_a_step_says_where_it_was_written():
    def fn(x):
        return jax.jit(lambda x: jnp.tanh(jnp.sin(x)))(x)  # the line looked for

    def scanned(x):
        return lax.scan(lambda c, y: (c + fn(y), None), x[0], x)[0]

    line = fn.__code__.co_firstlineno + 1
    for function in (fn, jax.checkpoint(fn), jax.vmap(fn), scanned):
        traced = program.trace(function, X, open_calls=True)
        sources = [step.source for step in traced.steps if step.primitive in ("sin", "tanh")]
        assert sources
        assert all(f"test_program.py:{line}" in source for source in sources)


def test_a_step_inside_a_function_of_jax_says_where_that_was_called():
    def fn(x):
        return jnp.round(jnp.median(x, axis=1))  # the line looked for

    line = fn.__code__.co_firstlineno + 1
    for _ in range(2):  # JAX keeps what it traced
        traced = program.trace(fn, X, open_calls=True)
        sources = [step.source for step in traced.steps if step.primitive in ("sort", "round")]
        assert len(sources) == 2
        assert all(f"test_program.py:{line}" in source for source in sources)


def test_a_step_can_be_applied_in_a_wider_type_than_it_was_traced_with():
    kernel = jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    image = jnp.ones((1, 4, 4, 2), jnp.bfloat16)

    def fn(x):
        y = lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.bfloat16,
        )
        return named(lax.dot_general(y, kernel[0, 0], (((3,), (0,)), ((), ()))))

    traced = program.trace(fn, image, open_calls=True, whole=["jit:named"])
    values = traced.evaluate(image)
    for step in traced.steps:
        if step.primitive in ("conv_general_dilated", "dot_general", "jit:named"):
            inputs = [values[ref].astype(jnp.float32) + 1 / 512 for ref in step.inputs]
            (wide,) = step.apply(*inputs)
            assert wide.dtype == jnp.float32
            (narrow,) = step.function(*(x.astype(jnp.bfloat16) for x in inputs))
            assert narrow.dtype == jnp.bfloat16
            np.testing.assert_allclose(wide, narrow.astype(jnp.float32), rtol=2e-2)

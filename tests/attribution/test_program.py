import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution import default_tap, list_taps, program, read_taps

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


def test_default_tap_is_the_last_spatial_one_that_is_no_gate():
    taps = {"a": (2, 8, 8, 3), "b": (2, 4, 4, 9), "b/gate": (2, 4, 4, 1), "gap": (2, 1, 1, 9)}
    assert default_tap(taps) == "b"
    with pytest.raises(ValueError, match="spatial"):
        default_tap({"root": (2, 10)})


@pytest.mark.parametrize("rule", ["custom_jvp", "custom_vjp"])
def test_a_tap_inside_a_function_with_its_own_derivative_raises(rule):
    marked = getattr(jax, rule)(inner)
    if rule == "custom_jvp":
        marked.defjvp(lambda x, dx: (inner(x[0]), dx[0]))
    else:
        marked.defvjp(lambda x: (inner(x), None), lambda _, g: (g,))
    with pytest.raises(ValueError, match="its own derivative"):
        list_taps(marked, X)

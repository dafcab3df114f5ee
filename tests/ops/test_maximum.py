import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops.maximum import first_max

X = np.random.default_rng(0).integers(0, 4, size=(3, 4, 5, 6)).astype(np.float32)  # many ties


@pytest.mark.parametrize("axis", [0, -1, 2, (1, 2), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_values_are_those_of_numpy(axis, keepdims):
    found = first_max(jnp.asarray(X), axis=axis, keepdims=keepdims)
    np.testing.assert_array_equal(found, X.max(axis=axis, keepdims=keepdims))


@pytest.mark.parametrize("shape", [(4, 64, 64), (2, 8, 8)])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_nan_stays(shape, wrap):
    x = np.random.default_rng(0).random(shape).astype(np.float32)
    x[1, 3, 5] = np.nan
    found = wrap(lambda x: first_max(x, axis=(1, 2)))(x)
    np.testing.assert_array_equal(found, x.max(axis=(1, 2)))
    assert np.isnan(found[1])


def test_the_gradient_goes_to_the_first_of_equal_places():
    upstream = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    found = jax.grad(lambda x: (first_max(x, axis=(1, 2)) * upstream).sum())(jnp.asarray(X))
    slow = np.zeros_like(X)
    for n in range(3):
        for c in range(6):
            places = [(h, w) for h in range(4) for w in range(5)]
            h, w = next(p for p in places if X[n, p[0], p[1], c] == X[n, :, :, c].max())
            slow[n, h, w, c] = upstream[n, c]
    np.testing.assert_array_equal(found, slow)


def test_axes_that_are_not_neighbours_are_refused():
    with pytest.raises(ValueError, match="expected neighbouring axes"):
        first_max(jnp.asarray(X), axis=(0, 2))

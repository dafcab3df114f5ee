import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops.smooth import smooth


@pytest.mark.parametrize("channels", [(), (2,)], ids=["maps", "images"])
def test_equals_a_loop_over_windows(channels):
    values = np.random.default_rng(0).normal(size=(2, 6, 5, *channels)).astype(np.float32)
    kernel = np.array([0.2, 0.7, -0.3])
    want = np.zeros((2, 4, 3, *channels))
    for n, y, x, i, j in np.ndindex(2, 4, 3, 3, 3):
        want[n, y, x] += kernel[i] * kernel[j] * values[n, y + i, x + j]
    got = smooth(jnp.asarray(values), kernel)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.dtype == jnp.float32


def test_a_kernel_of_one_scales_and_a_type_is_kept():
    values = jnp.ones((1, 3, 3), jnp.bfloat16)
    got = smooth(values, np.array([2.0]))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), np.full((1, 3, 3), 4))


def test_an_array_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="at least 3 rows and columns"):
        smooth(jnp.ones((1, 9, 2)), np.ones(3))

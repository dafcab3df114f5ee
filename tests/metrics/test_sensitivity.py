import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from attnzoom_jax.metrics.sensitivity import max_sensitivity

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 3, 5, 2)).astype(np.float32)
KEY = jax.random.key(3)


def mix(weights, images):
    """A linear map of the image: [n, 3, 5]."""
    return jnp.einsum("nhwc,hwcyx->nyx", images, weights)


WEIGHTS = RNG.normal(size=(3, 5, 2, 3, 5))


def draws(samples, ids, dtype):
    """What each image adds, in units of the radius: [samples, n, h, w, c]."""
    shape = IMAGES.shape[1:]
    return np.array(
        [
            [
                jax.random.uniform(
                    jax.random.fold_in(jax.random.fold_in(KEY, i), id), shape, dtype, -1, 1
                )
                for id in ids
            ]
            for i in range(samples)
        ]
    )


@pytest.mark.parametrize("is_relative", [True, False])
def test_equals_a_loop_over_the_samples(is_relative):
    with jax.enable_x64(True):
        images, ids = IMAGES.astype(np.float64), [7, 0, 3, 2]
        radius = np.array([0.1, 0.03])
        weights = jnp.asarray(WEIGHTS)
        got = max_sensitivity(
            Partial(mix, weights),
            jnp.asarray(images),
            key=KEY,
            radius=radius,
            samples=5,
            is_relative=is_relative,
            ids=ids,
        )
        moves = radius * draws(5, ids, jnp.float64)
        changes = np.einsum("snhwc,hwcyx->snyx", moves, WEIGHTS)
        want = np.sqrt((changes**2).sum((2, 3))).max(0)
        if is_relative:
            want /= np.linalg.norm(np.einsum("nhwc,hwcyx->nyx", images, WEIGHTS), axis=(1, 2))
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_of_one_pixel_comes_near_the_radius_from_below():
    images = jnp.ones((3, 1, 1, 1))
    got = max_sensitivity(
        lambda images: 4 * images[..., 0], images, key=KEY, radius=0.5, samples=60
    )
    # |4 (y - x)| / |4 x| with |y - x| <= 0.5: the true maximum is 0.5.
    assert (got <= 0.5).all() and (got > 0.45).all()


def test_more_samples_never_lower_it_and_no_scale_matters():
    def explain(images):
        return jnp.sin(3 * images).sum(-1)

    values = [
        max_sensitivity(explain, jnp.asarray(IMAGES), key=KEY, samples=samples)
        for samples in (1, 3, 6)
    ]
    assert (values[0] <= values[1]).all() and (values[1] <= values[2]).all()
    assert (values[0] < values[2]).any()
    tiny = max_sensitivity(lambda x: 1e-25 * explain(x), jnp.asarray(IMAGES), key=KEY, samples=6)
    np.testing.assert_allclose(tiny, values[2], rtol=1e-4)


def test_a_map_that_ignores_the_image_is_not_sensitive_and_an_empty_one_has_no_scale():
    images = jnp.asarray(IMAGES)
    assert max_sensitivity(lambda x: jnp.ones(x.shape[:3]), images, key=KEY).tolist() == [0] * 4

    def empty(images):
        return images[..., 0] * jnp.array([1, 0, 1, 1])[:, None, None]

    assert np.isnan(max_sensitivity(empty, images, key=KEY)).tolist() == [False, True, False, False]
    # Nor where it would be empty no longer: the share of nothing is unknown rather than infinite.
    born = max_sensitivity(lambda x: jax.nn.relu(x).sum(-1), 0 * images, key=KEY)
    assert np.isnan(born).all()
    absolute = max_sensitivity(empty, images, key=KEY, is_relative=False)
    assert absolute[1] == 0 and (absolute[jnp.array([0, 2, 3])] > 0).all()


def test_nan_stays_with_its_image():
    images = jnp.asarray(IMAGES).at[2, 0, 0, 0].set(jnp.nan)
    got = max_sensitivity(lambda x: x.sum(-1), images, key=KEY)
    assert np.isnan(got).tolist() == [False, False, True, False]


def test_draws_follow_ids_and_key_and_not_the_batch_or_its_devices():
    explain = Partial(mix, jnp.asarray(WEIGHTS, jnp.float32))
    images = jnp.asarray(IMAGES)
    whole = max_sensitivity(explain, images, key=KEY)
    part = max_sensitivity(explain, images[2:], key=KEY, ids=jnp.array([2, 3]))
    np.testing.assert_allclose(whole[2:], part, rtol=1e-5)
    other = max_sensitivity(explain, images, key=jax.random.key(4))
    assert (other != whole).all()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(max_sensitivity(explain, spread, key=KEY), whole, rtol=1e-5)
    jitted = jax.jit(lambda images, key: max_sensitivity(explain, images, key=key))(images, KEY)
    np.testing.assert_allclose(jitted, whole, rtol=1e-5)


def test_bad_arguments_are_refused():
    images = jnp.asarray(IMAGES)

    def explain(images):
        return images[..., 0]

    for radius in (0, -1, np.nan, [0.1, 0.0], [0.1, 0.1, 0.1]):
        with pytest.raises(ValueError, match="radius is"):
            max_sensitivity(explain, images, key=KEY, radius=radius)
    for samples in (0, 1.5):
        with pytest.raises(ValueError, match="samples is"):
            max_sensitivity(explain, images, key=KEY, samples=samples)  # pyright: ignore
    with pytest.raises(ValueError, match=r"images are int32 \[4, 3, 5, 2\]"):
        max_sensitivity(explain, images.astype(int), key=KEY)
    with pytest.raises(ValueError, match="expected a map for each"):
        max_sensitivity(lambda images: images.sum(), images, key=KEY)

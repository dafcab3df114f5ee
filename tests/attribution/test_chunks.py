import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnzoom_jax.attribution.chunks import map_chunks, map_images

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(7, 4, 5, 2)), jnp.float32)
TARGETS = jnp.array([0, 1, 2, 2, 1, 0, 2])


def each(images, targets):
    """Something of every image alone, in two parts of different rank."""
    return {"map": images.sum(-1) * targets[:, None, None], "mean": jnp.tanh(images).mean((1, 2))}


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit], ids=["plain", "jit"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 8, None, np.int64(2)])
def test_every_chunk_size_gives_the_same_in_the_same_order(chunk_size, wrapper):
    expected = each(IMAGES, TARGETS)
    chunked = wrapper(lambda x, t: map_chunks(each, x, t, chunk_size=chunk_size))(IMAGES, TARGETS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), chunked, expected)


def test_a_chunk_is_never_larger_and_the_last_is_filled_with_the_last_image():
    seen = []

    def record(images):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
        return images

    map_chunks(record, jnp.arange(7), chunk_size=3)
    jax.effects_barrier()
    assert {chunk.shape for chunk in seen} == {(3,)}
    assert sorted(np.concatenate(seen)) == [0, 1, 2, 3, 4, 5, 6, 6, 6]


def test_the_function_is_traced_as_often_for_a_long_batch_as_for_a_short_one():
    def count_traces(n):
        traces = []

        def function(x):
            traces.append(x.shape)
            return 2 * x

        jax.jit(lambda x: map_chunks(function, x, chunk_size=2))(jnp.arange(float(n)))
        return traces

    assert count_traces(5) == count_traces(33)
    assert set(count_traces(33)) == {(2,)}


def temporary_bytes(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("is_gradient", [False, True])
def test_the_chunk_bounds_the_memory_also_under_a_gradient(is_gradient):
    images = jnp.ones((32, 8, 8, 1))

    def wide(x):  # far more inside than at either end
        inside = jnp.sin(x * jnp.arange(256.0))
        return jnp.cumsum(inside, axis=-1)[..., -1].sum((1, 2))

    def needed(chunk_size):
        def apply(x):
            return map_chunks(wide, x, chunk_size=chunk_size)

        gradient = jax.grad(lambda x: (apply(x) ** 2).sum())
        return temporary_bytes(gradient if is_gradient else apply, images)

    assert needed(2) < needed(None) / 4


def test_gradients_pass_through():
    def loss(images, chunk_size):
        values = map_chunks(each, images, TARGETS, chunk_size=chunk_size)
        return (values["map"] ** 2).sum() + (values["mean"] ** 3).sum()

    expected = jax.grad(loss)(IMAGES, None)
    np.testing.assert_allclose(jax.grad(loss)(IMAGES, 3), expected, rtol=1e-5, atol=1e-6)


def test_vmap_over_requests():
    def one(k):
        return map_chunks(each, IMAGES, jnp.full(7, k), chunk_size=3)["map"]

    maps = jax.vmap(one)(jnp.arange(3))
    np.testing.assert_allclose(maps[2], 2 * np.asarray(IMAGES).sum(-1), rtol=1e-5, atol=1e-6)


def test_images_spread_over_devices_stay_where_they_are():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    images = np.asarray(RNG.normal(size=(16, 4, 5, 2)), np.float32)
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))

    def spread(x):
        return map_chunks(lambda x: jnp.tanh(x).sum(-1), x, chunk_size=8)

    compiled = jax.jit(spread).lower(sharded).compile()
    for communication in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert communication not in compiled.as_text()
    np.testing.assert_allclose(compiled(sharded), np.tanh(images).sum(-1), atol=1e-6)


def test_an_empty_batch_stays_empty():
    assert map_chunks(lambda x: 2 * x, jnp.zeros((0, 3)), chunk_size=2).shape == (0, 3)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, "4", True])
def test_a_bad_chunk_size_is_one_clear_error(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size is {chunk_size!r}; expected a whole number"):
        map_chunks(each, IMAGES, TARGETS, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_known_targets_are_checked_though_chunks_hide_them(chunk_size):
    def fn(images):
        return images.mean((1, 2))  # two classes

    with pytest.raises(ValueError, match="target 2 is out of range for 2 classes"):
        map_images(each, fn, IMAGES, TARGETS, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=r"class ids int \[7\]"):  # the batch's size, not a chunk's
        map_images(each, fn, IMAGES, TARGETS[:3], chunk_size=chunk_size)

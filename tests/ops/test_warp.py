import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops import warp, warp_points
from attnzoom_jax.ops.maps import resize
from attnzoom_jax.ops.warp import dense_grid

DENSE, SEPARABLE = ("gather", "loop"), ("matmul", "gather", "loop")

# Eagerly every operation would be compiled on its own.
sample = jax.jit(warp.sample, static_argnames="impl")
to_saliency = jax.jit(
    warp.to_saliency, static_argnames=("size", "weighting", "temperature", "floor")
)
SIZES = ("size", "image_size", "strength")
saliency_grid = jax.jit(warp.saliency_grid, static_argnames=(*SIZES, "fwhm"))
separable_grid = jax.jit(warp.separable_grid, static_argnames=(*SIZES, "marginal", "max_zoom"))
points_to_output = jax.jit(warp_points.warp_points)
points_to_input = jax.jit(warp_points.unwarp_points)
warp_boxes = jax.jit(warp_points.warp_boxes)
invert = jax.jit(warp_points.invert, static_argnames="image_size")


def random_case(seed=0, *, image=(2, 5, 6, 3), size=(4, 7), margin=1.5):
    """Images and a dense grid in float64 that also reaches beyond the borders."""
    rng = np.random.default_rng(seed)
    n, h, w, _ = image
    low, high = np.full(2, -margin), np.array([h, w]) - 1 + margin
    return rng.normal(size=image), rng.uniform(low, high, size=(n, *size, 2))


def random_lines(seed=0, *, n=2, image=(5, 6), size=(4, 7)):
    rng = np.random.default_rng(seed)
    y, x = (
        rng.uniform(-1, m, size=(n, s)).astype(np.float32) for m, s in zip(image, size, strict=True)
    )
    return y, x


def slow_sample(images, grid):
    """Bilinear interpolation, one output pixel after the other, in float64."""
    images, grid = np.float64(images), np.float64(grid)
    _, h, w, c = images.shape
    out = np.zeros((*grid.shape[:3], c))
    for index in np.ndindex(*grid.shape[:3]):
        y = min(max(grid[index][0], 0), h - 1)
        x = min(max(grid[index][1], 0), w - 1)
        for i, j in itertools.product(range(h), range(w)):
            weight = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
            out[index] += weight * images[index[0], i, j]
    return out


def identity(h, w):
    return np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)


def blob(cells, centre, width, *, floor=0.05):
    """Saliency [1, cells, cells]: a Gaussian of this width, in cells, above a floor."""
    y, x = np.mgrid[:cells, :cells]
    distance = (y - centre[0]) ** 2 + (x - centre[1]) ** 2
    return jnp.float32(floor + np.exp(-distance / (2 * width**2)))[None]


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("impl", ["auto", *DENSE])
@pytest.mark.parametrize("image", [(2, 5, 6, 3), (1, 1, 4, 2), (1, 3, 1, 1)])
def test_dense_sampling_equals_the_slow_one(impl, image):
    images, grid = random_case(image=image)
    sampled = sample(jnp.float32(images), jnp.float32(grid), impl=impl)
    assert sampled.dtype == jnp.float32
    np.testing.assert_allclose(sampled, slow_sample(images, grid), atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", *SEPARABLE])
@pytest.mark.parametrize("image", [(2, 5, 6, 3), (2, 1, 6, 1)])
def test_separable_sampling_equals_the_slow_one(impl, image):
    images, _ = random_case(image=image)
    lines = random_lines(image=image[1:3])
    sampled = sample(jnp.float32(images), tuple(map(jnp.asarray, lines)), impl=impl)
    np.testing.assert_allclose(sampled, slow_sample(images, dense_grid(lines)), atol=1e-5)


@pytest.mark.parametrize("impl", SEPARABLE)
def test_the_identity_takes_every_pixel_as_it_is(impl):
    images = jnp.float32(random_case()[0])
    lines = tuple(jnp.tile(jnp.arange(m, dtype=jnp.float32), (2, 1)) for m in (5, 6))
    np.testing.assert_array_equal(sample(images, lines, impl=impl), images)


def gradients(images, grid, weights, impl):
    """Of a sum with weights, by images and grid."""

    def total(images, grid):
        return (jnp.float32(weights) * sample(images, grid, impl=impl)).sum()

    arguments = jnp.float32(images), jax.tree.map(jnp.float32, grid)
    return jax.jit(jax.grad(total, argnums=(0, 1)))(*arguments)


def moved(value, index, by):
    other = np.array(value)
    other[index] += by
    return other


@pytest.mark.parametrize("impl", DENSE)
def test_gradients_equal_finite_differences(impl):
    images, grid = random_case(image=(2, 4, 3, 2), size=(2, 3), margin=0.5)
    # Away from the kinks, which are at whole numbers.
    grid = np.floor(grid) + 0.1 + 0.8 * (grid - np.floor(grid))
    weights = np.random.default_rng(3).normal(size=(2, 2, 3, 2))
    by_images, by_grid = gradients(images, grid, weights, impl)

    def total(images, grid):
        return (weights * slow_sample(images, grid)).sum()

    for index in np.ndindex(images.shape):
        expected = total(moved(images, index, 1.0), grid) - total(images, grid)
        np.testing.assert_allclose(by_images[index], expected, atol=1e-5)
    for index in np.ndindex(grid.shape):
        up, down = (total(images, moved(grid, index, by)) for by in (1e-3, -1e-3))
        np.testing.assert_allclose(by_grid[index], (up - down) / 2e-3, atol=1e-4)
    assert np.abs(by_grid).min() == 0.0  # some place lies beyond the border
    assert np.abs(by_grid).max() > 0.1


@pytest.mark.parametrize("impl", DENSE)
def test_gradient_at_the_identity_is_the_difference_to_the_next_pixel(impl):
    images, _ = random_case(image=(1, 4, 5, 2))
    grid = np.float64(identity(4, 5))[None]
    weights = np.random.default_rng(3).normal(size=images.shape)
    _, by_grid = gradients(images, grid, weights, impl)
    for index in np.ndindex(grid.shape):
        axis, last = index[-1], grid.shape[1 + index[-1]] - 1
        step = 1e-3 if grid[index] < last else -1e-3  # at the last pixel, to the one before
        difference = slow_sample(images, moved(grid, index, step)) - slow_sample(images, grid)
        expected = (weights * difference).sum() / step
        assert abs(expected) > 1e-3, axis
        np.testing.assert_allclose(by_grid[index], expected, rtol=1e-3, atol=1e-5)


def test_all_ways_have_the_same_gradients():
    images, _ = random_case()
    lines = random_lines()
    lines[0][0, 1], lines[1][1, 2], lines[1][1, 3] = 2.0, 0.0, 5.0  # whole ones, both borders
    weights = np.random.default_rng(3).normal(size=(2, 4, 7, 3))
    by_images, by_lines = gradients(images, lines, weights, "matmul")
    dense = np.asarray(dense_grid(lines))
    for impl in DENSE:
        found = gradients(images, lines, weights, impl)
        np.testing.assert_allclose(found[0], by_images, atol=1e-5)
        for axis in range(2):
            np.testing.assert_allclose(found[1][axis], by_lines[axis], atol=1e-5)
        by_dense = gradients(images, dense, weights, impl)[1]
        np.testing.assert_allclose(by_dense[..., 0].sum(2), by_lines[0], atol=1e-5)


@pytest.mark.parametrize("impl", SEPARABLE)
def test_forward_mode_and_second_derivatives(impl):
    images = jnp.float32(random_case()[0])
    lines = tuple(map(jnp.asarray, random_lines()))
    f = functools.partial(sample, impl=impl)
    _, out = jax.jvp(lambda g: f(images, g), (lines,), (jax.tree.map(jnp.ones_like, lines),))
    dense = dense_grid(lines)
    _, expected = jax.jvp(lambda g: sample(images, g), (dense,), (jnp.ones_like(dense),))
    np.testing.assert_allclose(out, expected, atol=1e-5)

    def slope(images):
        return (jax.grad(lambda g: f(images, g).sum())(lines)[0] ** 2).sum()

    assert jnp.abs(jax.jit(jax.grad(slope))(images)).max() > 0.1


@pytest.mark.parametrize("impl", SEPARABLE)
def test_bfloat16_pictures_are_sampled_at_float32_places(impl):
    # In bfloat16 the places 300.3 and 301.7 are both 300 or 302.
    ramp = jnp.broadcast_to((jnp.arange(400) % 2.0)[:, None, None], (400, 2, 1))
    images = ramp[None].astype(jnp.bfloat16)
    lines = jnp.float32([[300.25, 301.75]]), jnp.float32([[0.0, 1.0]])
    sampled = sample(images, lines, impl=impl)
    assert sampled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(sampled[0, :, 0, 0], [0.25, 0.25])
    # 2,048 outputs from one pixel: a sum kept in bfloat16 stops at 256.
    many = jnp.zeros((1, 2048)), jnp.zeros((1, 1))
    grad = jax.grad(lambda x: sample(x, many, impl=impl).astype(jnp.float32).sum())(images)
    assert grad.dtype == jnp.bfloat16
    assert float(grad[0, 0, 0, 0]) == 2048.0


@pytest.mark.parametrize("impl", DENSE)
def test_nan_stays_where_it_is(impl):
    images, grid = random_case()
    grid[0, 1, 2, 0] = np.nan
    sampled = sample(jnp.float32(images), jnp.float32(grid), impl=impl)
    expected = np.zeros(sampled.shape, bool)
    expected[0, 1, 2] = True
    np.testing.assert_array_equal(np.isnan(sampled), expected)


def test_integers_are_sampled_as_floats():
    images = jnp.arange(6, dtype=jnp.uint8).reshape(1, 1, 6, 1)
    sampled = sample(images, jnp.float32([[[[0.0, 2.5]]]]))
    assert sampled.dtype == jnp.float32
    assert float(sampled[0, 0, 0, 0]) == 2.5


def test_vmap_and_eager_equal_jit():
    images, grid = random_case()
    images, grid = jnp.float32(images), jnp.float32(grid)
    expected = sample(images, grid)
    np.testing.assert_allclose(warp.sample(images, grid), expected, atol=1e-6)
    one_by_one = jax.vmap(lambda i, g: sample(i[None], g[None])[0])(images, grid)
    np.testing.assert_allclose(one_by_one, expected, atol=1e-6)


# ---------------------------------------------------------------------------------- saliency grids


def slow_saliency_grid(saliency, size, image_size, fwhm, reach):
    """The paper's two quotients at every output pixel, in plain float64 loops."""
    saliency = np.float64(saliency)
    n, a, b = saliency.shape
    padded = np.pad(saliency, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    j = np.stack(np.meshgrid(np.arange(a + 2 * reach), np.arange(b + 2 * reach), indexing="ij"))
    j = j - reach  # in cells; the border's cells count on
    grid = np.zeros((n, *size, 2))
    for image, y, x in itertools.product(range(n), range(size[0]), range(size[1])):
        o = [(y + 0.5) * a / size[0] - 0.5, (x + 0.5) * b / size[1] - 0.5]
        squared = (j[0] - o[0]) ** 2 + (j[1] - o[1]) ** 2
        weight = padded[image] * np.exp(-4 * np.log(2) * squared / fwhm**2)
        for axis, (cells, pixels) in enumerate(zip((a, b), image_size, strict=True)):
            u = (weight * j[axis]).sum() / weight.sum()
            grid[image, y, x, axis] = (u + 0.5) * pixels / cells - 0.5
    return grid


@pytest.mark.parametrize(
    ("cells", "size", "image_size", "fwhm"),
    [((7, 6), (5, 8), (5, 8), 3.0), ((5, 5), (3, 4), (12, 10), 4.5), ((4, 9), (9, 4), (6, 6), 2.5)],
)
def test_saliency_grid_equals_the_papers_quotients(cells, size, image_size, fwhm):
    saliency = np.random.default_rng(0).uniform(size=(2, *cells)) ** 3
    grid = saliency_grid(jnp.float32(saliency), size, image_size=image_size, fwhm=fwhm)
    expected = slow_saliency_grid(saliency, size, image_size, fwhm, reach=math.ceil(3 * fwhm))
    np.testing.assert_allclose(grid, expected, atol=2e-5)


def test_saliency_grid_with_the_authors_constants():
    # 31 x 31 cells, 30 cells of padding, a full width of 13; at the cells themselves.
    saliency = np.random.default_rng(0).uniform(size=(1, 31, 31)) ** 4
    grid = saliency_grid(jnp.float32(saliency), (31, 31), fwhm=13.0)
    expected = slow_saliency_grid(saliency, (31, 31), (31, 31), 13.0, reach=30)
    np.testing.assert_allclose(grid, expected, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 961, 0.37])
def test_uniform_saliency_gives_exactly_the_identity(value):
    uniform = jnp.full((2, 31, 29), value)
    exact = np.broadcast_to(identity(64, 48), (2, 64, 48, 2))
    np.testing.assert_array_equal(saliency_grid(uniform, (64, 48)), exact)
    np.testing.assert_array_equal(dense_grid(separable_grid(uniform, (64, 48))), exact)


@pytest.mark.parametrize("make", [saliency_grid, separable_grid])
def test_uniform_saliency_at_another_size_is_a_plain_resize(make):
    images = jnp.float32(np.random.default_rng(0).normal(size=(1, 9, 7, 1)))
    grid = make(jnp.ones((1, 31, 31)), (5, 12), image_size=(9, 7))
    expected = resize(images[..., 0], (5, 12))
    np.testing.assert_allclose(sample(images, grid)[..., 0], expected, atol=1e-5)


def test_a_blob_is_magnified_and_nothing_folds():
    grid = np.asarray(saliency_grid(blob(31, (12, 20), 3.0), (62, 62)))[0]
    steps_y, steps_x = np.diff(grid[..., 0], axis=0), np.diff(grid[..., 1], axis=1)
    assert steps_y.min() > 0.3 and steps_x.min() > 0.3
    # Two and a half times, at the blob (0.4 of the mean step).
    assert 0.38 < steps_y.min() / steps_y.mean() < 0.43
    assert 0.38 < steps_x.min() / steps_x.mean() < 0.43
    densest = np.unravel_index(steps_y[:, 40].argmin(), (61,))[0]
    np.testing.assert_allclose(grid[densest, 40, 0], 25, atol=2.0)


def test_strength_scales_the_shift():
    saliency = blob(9, (2, 5), 1.5)
    full, half, none = (
        saliency_grid(saliency, (9, 9), fwhm=4.0, strength=strength) for strength in (1.0, 0.5, 0.0)
    )
    np.testing.assert_array_equal(none[0], identity(9, 9))
    np.testing.assert_allclose(half - none, (full - none) / 2, atol=1e-5)


@pytest.mark.parametrize("kind", ["saliency", "max", "sum"])
def test_grids_have_the_right_gradient_by_saliency(kind):
    def shift(saliency):
        if kind == "saliency":
            grid = saliency_grid(saliency, (4, 5), image_size=(10, 10), fwhm=2.5)
        else:
            lines = separable_grid(saliency, (4, 5), image_size=(10, 10), marginal=kind)
            grid = dense_grid(lines)
        return (grid * weights).sum()

    rng = np.random.default_rng(0)
    weights = rng.normal(size=(1, 4, 5, 2))
    saliency = rng.uniform(0.2, 1.0, size=(1, 5, 6))
    with jax.enable_x64(True):
        shift = jax.jit(shift)
        grad = np.asarray(jax.jit(jax.grad(shift))(jnp.asarray(saliency)))
        for index in np.ndindex(saliency.shape):
            up, down = (float(shift(jnp.asarray(moved(saliency, index, d)))) for d in (1e-6, -1e-6))
            np.testing.assert_allclose(grad[index], (up - down) / 2e-6, rtol=1e-4, atol=1e-5)
        at_identity = np.asarray(jax.grad(shift)(jnp.ones((1, 5, 6))))
    assert np.abs(grad).max() > 0.1
    assert np.isfinite(at_identity).all() and np.abs(at_identity).max() > 0.01


# --------------------------------------------------------------------------------- separable grids


def slow_quantiles(weights, size, length):
    """Where the distribution of a density over cells reaches (o + 0.5) / size."""
    cells = len(weights)
    distribution = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    edges = np.interp((np.arange(size) + 0.5) / size, distribution, np.arange(cells + 1))
    return edges * length / cells - 0.5


@pytest.mark.parametrize("marginal", ["max", "sum"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_separable_grid_equals_the_inverse_distribution(marginal, strength):
    attention = np.random.default_rng(0).uniform(size=(2, 6, 9)) ** 3
    grid = separable_grid(
        jnp.float32(attention), (7, 5), image_size=(20, 30), marginal=marginal, strength=strength
    )
    reduce = np.max if marginal == "max" else np.sum
    for axis, (size, length) in enumerate(((7, 20), (5, 30))):
        for image in range(2):
            weights = reduce(attention[image], axis=1 - axis)
            weights = strength * weights / weights.sum() + (1 - strength) / len(weights)
            expected = slow_quantiles(weights, size, length)
            np.testing.assert_allclose(grid[axis][image], expected, atol=1e-4)


def test_nothing_is_magnified_more_than_allowed():
    attention = blob(16, (4, 11), 0.5, floor=0.0)
    for max_zoom in (1.5, 4.0):
        for line in separable_grid(attention, (512, 512), image_size=(64, 64), max_zoom=max_zoom):
            zoom = (64 / 512) / np.diff(line[0])
            np.testing.assert_allclose(zoom.max(), max_zoom, rtol=1e-2)
            assert zoom.min() > 0
    free = separable_grid(attention, (512, 512), image_size=(64, 64))[0][0]
    assert (64 / 512) / np.diff(free).min() > 5.0
    mild = jnp.linspace(1.0, 1.5, 8).reshape(1, 8, 1)
    bounded, unbounded = separable_grid(mild, (9, 9), max_zoom=4.0), separable_grid(mild, (9, 9))
    np.testing.assert_allclose(bounded[0], unbounded[0], atol=1e-6)


def test_attention_that_is_zero_nearly_everywhere_keeps_grids_finite_and_rising():
    attention = jnp.zeros((1, 12, 12)).at[0, 3, 8].set(1.0)
    y, x = separable_grid(attention, (24, 24))
    # All rows come from one cell, all columns too.
    for line, cell in ((y, 3), (x, 8)):
        assert np.all(np.diff(line[0]) > 0)
        assert np.all((line >= 2 * cell - 0.5) & (line <= 2 * cell + 1.5))
    assert jnp.isfinite(saliency_grid(attention, (24, 24), fwhm=2.0)).all()


# ---------------------------------------------------------------------------- saliency from a map


@pytest.mark.parametrize("weighting", ["softmax", "power"])
def test_to_saliency_by_definition(weighting):
    maps = np.random.default_rng(0).normal(size=(2, 4, 5))
    found = to_saliency(jnp.float32(maps), (4, 5), weighting=weighting, temperature=0.5, floor=0.1)
    for image in range(2):
        if weighting == "softmax":
            weights = np.exp((maps[image] - maps[image].max()) / 0.5)
        else:
            weights = (np.maximum(maps[image], 0) / maps[image].max()) ** 2
        weights = 0.1 + 0.9 * weights
        np.testing.assert_allclose(found[image], weights / weights.sum(), rtol=1e-4)


@pytest.mark.parametrize("weighting", ["softmax", "power"])
@pytest.mark.parametrize("value", [-0.3, 0.0, 0.7, 1e-9])
def test_a_constant_map_is_uniform_whatever_the_resize(weighting, value):
    saliency = to_saliency(jnp.full((2, 7, 5), value), (31, 31), weighting=weighting)
    assert np.ptp(np.asarray(saliency)) == 0.0
    np.testing.assert_allclose(saliency.sum((1, 2)), 1.0, rtol=1e-5)


def test_to_saliency_resizes_and_keeps_nan():
    maps = jnp.float32(np.random.default_rng(0).uniform(size=(2, 3, 4)))
    found = to_saliency(maps, (6, 8), weighting="power")
    expected = resize(maps, (6, 8))
    np.testing.assert_allclose(found, expected / expected.sum((1, 2), keepdims=True), rtol=1e-4)
    holed = to_saliency(maps.at[0, 1, 1].set(jnp.nan), (6, 8))
    assert jnp.isnan(holed[0]).all() and not jnp.isnan(holed[1]).any()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_to_saliency_has_finite_gradients_at_zeros(temperature):
    def peak(maps):
        return to_saliency(maps, (3, 3), weighting="power", temperature=temperature).max()

    for maps in (jnp.zeros((1, 3, 3)), jnp.eye(3)[None]):
        assert jnp.isfinite(jax.grad(peak)(maps)).all()


# ------------------------------------------------------------------------------ points and boxes


def grids():
    """A dense and a separable grid, warped hard, at another size than the picture."""
    saliency = blob(31, (10, 21), 3.0) + blob(31, (25, 6), 2.0)
    options = dict(size=(40, 50), image_size=(60, 48))
    return {
        "dense": saliency_grid(saliency, **options, fwhm=9.0),
        "separable": separable_grid(saliency, **options, max_zoom=4.0),
    }


def slow_inverse(grid, point):
    """The closest of a hundred places per cell of a dense grid [height, width, 2]."""
    best = (np.inf, (0.0, 0.0))
    for s, r in itertools.product(np.linspace(0, 1, 11), repeat=2):
        rows = grid[:-1] * (1 - s) + grid[1:] * s
        values = rows[:, :-1] * (1 - r) + rows[:, 1:] * r
        distance = np.abs(values - point).sum(-1)
        y, x = np.unravel_index(distance.argmin(), distance.shape)
        best = min(best, (distance[y, x], (y + s, x + r)))
    return np.array(best[1])


@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_points_move_to_where_the_picture_moves(kind):
    grid = grids()[kind]
    dense = np.float64(dense_grid(grid)[0])
    rng = np.random.default_rng(0)
    points = dense[rng.integers(5, 35, 8), rng.integers(5, 45, 8)] + rng.uniform(-0.3, 0.3, (8, 2))
    found = points_to_output(jnp.float32(points)[None], grid)[0]
    for point, place in zip(points, found, strict=True):
        np.testing.assert_allclose(place, slow_inverse(dense, point), atol=0.12)


@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_there_and_back_again(kind):
    grid = grids()[kind]
    pixels = jnp.float32(identity(60, 48).reshape(1, -1, 2))
    places = points_to_output(pixels, grid)
    # Some pixels are cropped, and their places lie outside of the output.
    outside = (places < 0) | (places > jnp.asarray([39, 49]))
    assert 0 < outside.any(-1).mean() < 0.5
    np.testing.assert_allclose(points_to_input(places, grid), pixels, atol=1e-3)
    on_grid = jnp.float32(identity(40, 50).reshape(1, -1, 2))
    back = dense_grid(grid).reshape(1, -1, 2)
    np.testing.assert_allclose(points_to_input(on_grid, grid), back, atol=1e-4)
    np.testing.assert_allclose(points_to_output(back, grid), on_grid, atol=1e-3)


@pytest.mark.parametrize("fwhm", [3.0, 6.0])
def test_a_grid_of_extremes_is_inverted_too(fwhm):
    saliency = np.random.default_rng(0).uniform(size=(4, 31, 31)) ** 40
    grid = saliency_grid(jnp.float32(saliency), (64, 48), image_size=(48, 64), fwhm=fwhm)
    steps = np.diff(grid[..., 0], axis=1)
    assert 0 < steps.min() < 0.1 and steps.max() > 2.0
    pixels = jnp.tile(jnp.float32(identity(48, 64).reshape(1, -1, 2)), (4, 1, 1))
    places = invert(grid, (48, 64)).reshape(pixels.shape)
    np.testing.assert_allclose(points_to_input(places, grid), pixels, atol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_the_inverse_grid_undoes_the_warp(kind):
    grid = grids()[kind]
    inverse = invert(grid, (60, 48))
    y, x = np.mgrid[:60, :48]
    images = jnp.float32(np.sin(y / 20) + np.cos(x / 20))[None, ..., None]
    back = sample(sample(images, grid), inverse)
    places = np.asarray(dense_grid(inverse))[0]
    is_shown = np.all((places >= 0) & (places <= [39, 49]), axis=-1)
    assert is_shown.mean() > 0.5
    np.testing.assert_allclose(back[0][is_shown], images[0][is_shown], atol=0.03)


def test_nothing_moves_under_the_identity():
    saliency = jnp.ones((1, 9, 9))
    boxes = jnp.float32([[[0, 0, 20, 30], [3, 4, 5, 9.5], [-2, 1, 4, 40]]])
    for grid in (saliency_grid(saliency, (20, 30)), separable_grid(saliency, (20, 30))):
        np.testing.assert_allclose(warp_boxes(boxes, grid), boxes, atol=1e-4)
        found = dense_grid(invert(grid, (20, 30)))
        np.testing.assert_allclose(found[0], identity(20, 30), atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "separable"])
def test_boxes_hold_what_they_held(kind):
    grid = grids()[kind]
    box = np.array([[[18, 30, 30, 44]]])
    mask = np.zeros((1, 60, 48, 1))
    mask[0, 18:30, 30:44] = 1.0
    warped = sample(jnp.float32(mask), grid)[0, ..., 0] >= 0.5
    y, x = np.nonzero(warped)
    expected = [y.min(), x.min(), y.max() + 1, x.max() + 1]
    np.testing.assert_allclose(warp_boxes(jnp.float32(box), grid)[0, 0], expected, atol=1.0)


def test_a_resize_scales_boxes():
    grid = saliency_grid(jnp.ones((1, 5, 5)), (10, 40), image_size=(20, 20))
    boxes = jnp.float32([[[4, 4, 10, 20]]])
    np.testing.assert_allclose(warp_boxes(boxes, grid), [[[2, 8, 5, 40]]], atol=1e-4)


# ------------------------------------------------------------------------------------------ errors

IMAGES, GRID = jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 3, 3, 2))
CELLS = jnp.ones((1, 5, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(IMAGES, GRID, impl="gahter"), "did you mean 'gather'"),
        (lambda: sample(IMAGES, GRID, impl="matmul"), "needs a separable grid"),
        (lambda: sample(IMAGES[0], GRID), r"images \[n, h, w, c\].*got images \(4, 4, 1\)"),
        (lambda: sample(IMAGES, GRID[:1]), "grid of n = 1"),
        (lambda: sample(IMAGES, GRID[..., :1]), r"dense \[n, height, width, 2\]"),
        (lambda: sample(IMAGES, (GRID, GRID)), "or separable"),
        (lambda: saliency_grid(CELLS, (4, 4), fwhm=1.0), "fwhm is 1.0; expected at least 2"),
        (lambda: saliency_grid(CELLS, (4, 0)), r"size is \(4, 0\)"),
        (lambda: saliency_grid(CELLS, (4, 4), strength=2.0), "strength is 2.0"),
        (lambda: separable_grid(CELLS, (4, 4), marginal="mean"), "unknown marginal 'mean'"),
        (lambda: separable_grid(CELLS, (4, 4), max_zoom=1.0), "max_zoom is 1.0"),
        (lambda: separable_grid(CELLS, (4, 4), image_size=(0, 4)), r"image_size is \(0, 4\)"),
        (lambda: to_saliency(CELLS, (4, 4), weighting="softmx"), "did you mean 'softmax'"),
        (lambda: to_saliency(CELLS, (4, 4), temperature=0.0), "temperature is 0.0"),
        (lambda: to_saliency(CELLS, (4, 4), floor=1.5), "floor is 1.5"),
        (lambda: invert(GRID[:, :1], (4, 4)), "1 x 3 pixels has no slope"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

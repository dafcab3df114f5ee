import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnzoom_jax import attribution
from attnzoom_jax.attribution.perturbation import _random_mask

RNG = np.random.default_rng(0)
N, H, W, C, M, K = 3, 9, 12, 2, 4, 5
IMAGES = RNG.normal(size=(N, H, W, C))
TARGETS = np.array([4, 0, 2])
WEIGHTS = RNG.normal(size=(N, K))
W1, B1 = RNG.normal(size=(C, M)), RNG.normal(size=M)
W2, B2 = RNG.normal(size=(M, K)), RNG.normal(size=K)
PLACE = RNG.normal(size=(H, W, M))
KEY = jax.random.key(5)
MASKS, CELLS, KEEP = 11, 3, 0.4


def rise(fn, images, targets, **options):
    options = {"key": KEY, "masks": MASKS, "cells": CELLS, "keep": KEEP, **options}
    return attribution.rise(fn, images, targets, **options)


def occlusion(fn, images, targets, **options):
    options = {"window": (4, 5), "stride": (2, 3), "value": VALUE, **options}
    return attribution.occlusion(fn, images, targets, **options)


VALUE = np.array([0.3, -0.2])
METHODS = {"rise": rise, "occlusion": occlusion}
each_method = pytest.mark.parametrize("method", METHODS)


def network(images):
    dtype = images.dtype
    w1, b1, w2, b2, place = (jnp.asarray(x, dtype) for x in (W1, B1, W2, B2, PLACE))
    return (place * jax.nn.relu(images @ w1 + b1)).mean((1, 2)) @ w2 + b2


def spatial_network(images):
    dtype = images.dtype
    w1, b1, w2, b2 = (jnp.asarray(x, dtype) for x in (W1, B1, W2, B2))
    return jax.nn.relu(images @ w1 + b1)[:, ::2, ::3] @ w2 + b2


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def slow_score(image, weights, score, *, is_spatial=False):
    hidden = np.maximum(image @ W1 + B1, 0)
    if is_spatial:
        logits = (hidden[::2, ::3] @ W2 + B2).reshape(-1, K)  # [positions, k]
        shares = np.stack([softmax(logits[:, k]) for k in range(K)], axis=1)
    else:
        logits = ((PLACE * hidden).mean((0, 1)) @ W2 + B2)[None]
        shares = np.ones((1, K))
    if score == "probability":
        values = np.stack([softmax(row) for row in logits])
    else:
        values = logits if score == "logit" else 1 / (1 + np.exp(-logits))
    return (weights * shares * values).sum()


def slow_mask(index, *, cells=CELLS, keep=KEEP, size=(H, W)):
    """Mask number `index`, its cells and its place drawn as `rise` draws them."""
    key = jax.random.fold_in(KEY, index)
    draws = np.asarray(jax.random.uniform(key, (2 + cells**2,), jnp.float32))
    grid = (draws[2:] < keep).reshape(cells, cells)
    cell = [-(-length // cells) for length in size]
    start = [int(draws[i] * cell[i]) for i in range(2)]
    mask = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            near = []  # per axis the two cells around a pixel, and the share of the second
            for position, enlarged in zip((y + start[0], x + start[1]), cell, strict=True):
                at = (position + 0.5) * cells / ((cells + 1) * enlarged) - 0.5
                at = min(max(at, 0), cells - 1)
                first = min(int(at), cells - 2) if cells > 1 else 0
                near.append((first, min(first + 1, cells - 1), at - first))
            (top, bottom, down), (left, right, across) = near
            mask[y, x] = (1 - down) * (
                (1 - across) * grid[top, left] + across * grid[top, right]
            ) + down * ((1 - across) * grid[bottom, left] + across * grid[bottom, right])
    return mask


def slow_rise(targets, score, *, is_spatial=False, images=IMAGES):
    weights = np.eye(K)[targets] if targets.ndim == 1 else targets
    maps = np.zeros((N, H, W))
    masks = [slow_mask(i) for i in range(MASKS)]
    for i in range(N):
        for mask in masks:
            hidden = images[i] * mask[..., None]
            maps[i] += slow_score(hidden, weights[i], score, is_spatial=is_spatial) * mask
    return maps / (MASKS * KEEP)


def slow_occlusion(targets, score, *, is_spatial=False, images=IMAGES):
    weights = np.eye(K)[targets] if targets.ndim == 1 else targets
    maps = np.zeros((N, H, W))
    for i in range(N):
        seen = slow_score(images[i], weights[i], score, is_spatial=is_spatial)
        covers = np.zeros((H, W))
        for y in (0, 2, 4, 5):
            for x in (0, 3, 6, 7):
                hidden = images[i].copy()
                hidden[y : y + 4, x : x + 5] = VALUE
                drop = seen - slow_score(hidden, weights[i], score, is_spatial=is_spatial)
                maps[i, y : y + 4, x : x + 5] += drop
                covers[y : y + 4, x : x + 5] += 1
        maps[i] /= covers
    return maps


SLOW = {"rise": slow_rise, "occlusion": slow_occlusion}
SCORE = {"rise": "probability", "occlusion": "logit"}  # the defaults


def in_float32(images=IMAGES):
    return jnp.asarray(images, jnp.float32)


@each_method
@pytest.mark.parametrize(
    ("score", "is_spatial"),
    [("probability", False), ("logit", False), ("sigmoid", False), ("probability", True)],
)
def test_maps_follow_the_formulas(method, score, is_spatial):
    fn = spatial_network if is_spatial else network
    with jax.enable_x64(True):
        maps = METHODS[method](fn, jnp.asarray(IMAGES), TARGETS, score=score)
        assert maps.dtype == jnp.float64
        expected = SLOW[method](TARGETS, score, is_spatial=is_spatial)
        np.testing.assert_allclose(maps, expected, atol=1e-13)


@each_method
@pytest.mark.parametrize("targets", [TARGETS, WEIGHTS], ids=["ids", "weights"])
def test_float32_is_enough_and_the_defaults_are_those_of_the_papers(method, targets):
    maps = METHODS[method](network, in_float32(), targets)
    assert maps.dtype == jnp.float32
    np.testing.assert_allclose(maps, SLOW[method](targets, SCORE[method]), atol=1e-6)


@each_method
def test_bfloat16_networks_give_float32_maps(method):
    maps = METHODS[method](network, jnp.asarray(IMAGES, jnp.bfloat16), TARGETS, score="logit")
    assert maps.dtype == jnp.float32
    expected = SLOW[method](TARGETS, "logit")
    np.testing.assert_allclose(maps, expected, atol=0.03)


@each_method
@pytest.mark.parametrize("chunk_size", [1, 3, 7, None])
def test_every_chunk_size_gives_the_same_map_and_bounds_every_call(method, chunk_size):
    expected = METHODS[method](network, in_float32(), TARGETS)
    sizes = []

    def recorded(images):
        sizes.append(len(images))
        return network(images)

    jitted = jax.jit(lambda x, t: METHODS[method](recorded, x, t, chunk_size=chunk_size))
    maps = jitted(in_float32(), TARGETS)
    np.testing.assert_allclose(maps, expected, atol=2e-6)
    # The first call with shapes alone, which computes nothing, sees the batch as it is.
    assert max(sizes[1:]) <= (chunk_size or np.inf)
    if chunk_size in (3, 7):
        assert max(sizes[1:]) == {3: 3, 7: 6}[chunk_size]  # whole masks for all three images


@pytest.mark.parametrize(("method", "chunk_size"), [("rise", 8), ("rise", 32), ("occlusion", 8)])
def test_images_spread_over_devices_give_the_same_maps(method, chunk_size):
    images, targets = jnp.tile(in_float32(), (4, 1, 1, 1)), np.tile(TARGETS, 4)
    expected = np.tile(SLOW[method](TARGETS, SCORE[method]), (4, 1, 1))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    jitted = jax.jit(lambda x, t: METHODS[method](network, x, t, chunk_size=chunk_size))
    np.testing.assert_allclose(jitted(sharded, targets), expected, atol=2e-6)


@each_method
def test_vmap_over_classes_and_over_images(method):
    def of_class(k):
        return METHODS[method](network, in_float32(), jnp.full(N, k))

    maps = jax.jit(jax.vmap(of_class))(jnp.arange(K))
    np.testing.assert_allclose(maps[4], SLOW[method](np.full(N, 4), SCORE[method]), atol=1e-6)

    def of_image(image, target):
        return METHODS[method](network, image[None], target[None])[0]

    maps = jax.jit(jax.vmap(of_image))(in_float32(), TARGETS)
    np.testing.assert_allclose(maps, SLOW[method](TARGETS, SCORE[method]), atol=1e-6)


@each_method
def test_the_gradient_of_a_loss_on_the_map_is_that_of_finite_differences(method):
    def slow_loss(images):
        return (SLOW[method](TARGETS, SCORE[method], images=images) ** 2).sum()

    direction = np.random.default_rng(1).normal(size=IMAGES.shape)
    with jax.enable_x64(True):
        step = 1e-6 * direction
        slope = (slow_loss(IMAGES + step) - slow_loss(IMAGES - step)) / 2e-6

        def loss(images):
            return (METHODS[method](network, images, TARGETS, chunk_size=2) ** 2).sum()

        gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(IMAGES)))
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("is_gradient", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_never_all_masks_in_memory(method, is_gradient):
    images, targets = jnp.ones((1, 16, 16, 2)), np.array([1])

    def fn(images):
        return jnp.tanh(images).mean((1, 2))

    def needed(masks):
        def maps(x):
            if method == "rise":
                return rise(fn, x, targets, masks=masks, chunk_size=4)
            window = 17 - int(masks**0.5)  # so that there are so many windows
            return occlusion(fn, x, targets, window=window, stride=1, chunk_size=4)

        wanted = jax.grad(lambda x: (maps(x) ** 2).sum()) if is_gradient else maps
        return jax.jit(wanted).lower(images).compile().memory_analysis().temp_size_in_bytes

    more_masks = 225 - 25
    # Under a gradient a step of four masks may keep the sum so far, but no mask and no image.
    kept = more_masks / 4 * (16 * 16 * 4) if is_gradient else 0
    assert needed(225) <= needed(25) + kept + more_masks * 16


@pytest.mark.parametrize(
    ("size", "cells", "keep"), [((9, 12), 3, 0.4), ((10, 7), 4, 0.5), ((5, 5), 1, 0.5)]
)
def test_a_mask_is_the_bilinear_enlargement_of_its_cells(size, cells, keep):
    for index in range(4):
        mask = _random_mask(jax.random.fold_in(KEY, index), size, cells, keep)
        expected = slow_mask(index, cells=cells, keep=keep, size=size)
        np.testing.assert_allclose(mask, expected, atol=1e-6)


def test_masks_keep_the_share_that_is_asked_for_at_every_pixel():
    keys = jax.random.split(KEY, 4000)
    masks = jax.vmap(lambda key: _random_mask(key, (9, 12), 3, 0.3))(keys)
    np.testing.assert_allclose(masks.mean(0), np.full((9, 12), 0.3), atol=0.04)
    assert masks.min() >= 0 and masks.max() <= 1


def test_rise_of_a_constant_score_is_that_score():
    def fn(images):
        return jnp.full((len(images), K), 3.0)

    maps = rise(fn, in_float32(), TARGETS, masks=2000, score="logit")
    np.testing.assert_allclose(maps, np.full((N, H, W), 3.0), rtol=0.15)


def test_rise_peaks_at_the_only_pixel_that_counts():
    def fn(images):
        return images[:, 6, 3]

    maps = rise(fn, jnp.ones((1, H, W, C)), np.array([1]), masks=500, score="logit")
    peak = np.unravel_index(np.argmax(maps[0]), (H, W))
    assert np.abs(np.array(peak) - [6, 3]).max() <= 1


def test_rise_draws_by_its_key():
    one = rise(network, in_float32(), TARGETS)
    np.testing.assert_array_equal(one, rise(network, in_float32(), TARGETS))
    raw = rise(network, in_float32(), TARGETS, key=jax.random.key_data(KEY))
    np.testing.assert_array_equal(one, raw)
    other = rise(network, in_float32(), TARGETS, key=jax.random.key(6))
    assert np.abs(one - other).max() > 0.01


def test_occlusion_of_a_linear_score_is_each_pixels_part():
    """One-pixel windows take out exactly what a pixel contributes over the value put there."""
    head = RNG.normal(size=(H, W, C, K))

    def linear(images):
        return jnp.einsum("nhwc,hwck->nk", images, jnp.asarray(head, images.dtype))

    maps = occlusion(linear, in_float32(), TARGETS, window=1, stride=1)
    weights = np.moveaxis(head[..., TARGETS], -1, 0)
    np.testing.assert_allclose(maps, ((IMAGES - VALUE) * weights).sum(-1), atol=1e-5)


def test_a_window_as_large_as_the_image_gives_one_drop_everywhere():
    maps = occlusion(network, in_float32(), TARGETS, window=(H, W), stride=1)
    gone = network(jnp.broadcast_to(jnp.asarray(VALUE, jnp.float32), (1, H, W, C)))
    drop = np.asarray(network(in_float32()) - gone)[np.arange(N), TARGETS]
    np.testing.assert_allclose(maps, np.broadcast_to(drop[:, None, None], (N, H, W)), atol=1e-5)


@each_method
@pytest.mark.parametrize(("target", "chunk_size"), [(-1, None), (5, 2)])
def test_a_class_that_is_not_there_is_an_error_if_known_else_nan(method, target, chunk_size):
    targets = np.array([4, target, 2])

    def maps(t):
        return METHODS[method](network, in_float32(), t, chunk_size=chunk_size)

    with pytest.raises(ValueError, match=f"target {target} is out of range for 5 classes"):
        maps(targets)
    traced = jax.jit(maps)(targets)
    assert np.isnan(traced[1]).all()
    expected = SLOW[method](TARGETS, SCORE[method])
    np.testing.assert_allclose(traced[2], expected[2], atol=1e-6)


@each_method
@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((N, H, W, C), np.uint8), {}, r"images must be float \[n, h, w, c\], not uint8"),
        (IMAGES[0], {}, r"float \[n, h, w, c\], not float32 \[9, 12, 2\]"),
        (IMAGES, {"score": "logits"}, "unknown score 'logits'; did you mean 'logit'"),
        (IMAGES, {"chunk_size": 0}, "chunk_size is 0; expected a whole number"),
    ],
)
def test_bad_input_is_one_clear_error(method, images, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](network, images, TARGETS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": 0}, "masks is 0; expected a whole number of at least 1"),
        ({"cells": 2.0}, "cells is 2.0; expected a whole number"),
        ({"keep": 0}, r"keep is 0; expected a probability in \(0, 1\]"),
        ({"keep": 1.5}, "keep is 1.5"),
    ],
)
def test_bad_settings_of_rise_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        rise(network, in_float32(), TARGETS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 10}, r"window is \(10, 10\), larger than the images of \(9, 12\) pixels"),
        ({"window": 2, "stride": (2, 3)}, r"stride is \(2, 3\); at more than the window, \(2, 2\)"),
        ({"window": (2, 2, 2)}, r"window is \(2, 2, 2\); expected one number or two"),
        ({"stride": 0}, "stride is 0; expected a whole number"),
        ({"value": np.zeros(3)}, r"value has the shape \[3\].*each of the 2 channels"),
    ],
)
def test_bad_settings_of_occlusion_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        occlusion(network, in_float32(), TARGETS, **options)

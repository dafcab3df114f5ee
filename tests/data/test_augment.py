"""Crop, flip, mixup, cutmix and normalisation against loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnzoom_jax.data.augment import (
    augment,
    center_crop,
    cutmix,
    mixup,
    normalize,
    random_crop,
    random_flip,
    sample_box,
    sample_mix,
)
from attnzoom_jax.data.auto_augment import auto_augment


def coordinates(n, height, width) -> Any:
    """Images whose pixels say where they are: (y + 1, x + 1, 7); zero never occurs."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y + 1, x + 1, np.full_like(x, 7)], -1).astype(np.uint8)
    return np.tile(image, (n, 1, 1, 1))


def noise(n, height, width, seed=0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "padding"), [(None, 3), (8, 0), ((5, 9), 2), ((12, 14), 1), (10, 0), (1, 4)]
)
def test_crop_equals_a_loop(size, padding):
    n, height, width = 300, 10, 12
    rows, columns = (height, width) if size is None else np.broadcast_to(size, 2)
    key = jax.random.key(1)
    crop = jax.jit(lambda images, key: random_crop(images, key, size=size, padding=padding))
    # Where each window lies is read off an image that holds pixel positions, then replayed.
    widths = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    marks = np.pad(coordinates(n, height, width), widths)
    offsets = []
    for mark, found in zip(
        marks, np.asarray(crop(coordinates(n, height, width), key)), strict=True
    ):
        windows = np.lib.stride_tricks.sliding_window_view(mark, (rows, columns, 3))[:, :, 0]
        same = np.argwhere((windows == found).all((-3, -2, -1)))
        assert len(same)
        offsets.append(same[0])
    images = noise(n, height, width)
    expected = [
        np.pad(image, widths[1:])[y : y + rows, x : x + columns]
        for image, (y, x) in zip(images, offsets, strict=True)
    ]
    if (rows, columns) != (1, 1):  # one pixel of padding does not say where it was
        np.testing.assert_array_equal(crop(images, key), expected)


def test_crop_offsets_are_uniform():
    n = 20_000
    out = np.asarray(random_crop(coordinates(n, 6, 7), jax.random.key(2), size=(2, 3)))
    cells = (out[:, 0, 0, 0] - 1) * 5 + out[:, 0, 0, 1] - 1  # 5 x 5 places
    counts = np.bincount(cells, minlength=25)
    assert len(counts) == 25
    assert ((counts - n / 25) ** 2 / (n / 25)).sum() < 51.2  # chi-square, p = 0.001


def test_crop_without_freedom_is_the_identity():
    images = noise(4, 6, 6)
    np.testing.assert_array_equal(random_crop(images, jax.random.key(0)), images)


@pytest.mark.parametrize(
    ("size", "padding", "message"),
    [(9, 0, "crop less or pad more"), ((8, 11), 1, "pad more"), (0, 0, "size"), (4, -1, "padding")],
)
def test_bad_crops(size, padding, message):
    with pytest.raises(ValueError, match=message):
        random_crop(noise(2, 8, 8), jax.random.key(0), size=size, padding=padding)


def test_flip_equals_a_loop_half_of_the_time():
    n = 10_000
    images = noise(n, 2, 3)
    out = np.asarray(random_flip(images, jax.random.key(0)))
    flipped = 0
    for image, found in zip(images, out, strict=True):
        mirrored = np.stack([image[:, 2], image[:, 1], image[:, 0]], 1)
        assert (found == image).all() or (found == mirrored).all()
        flipped += not (found == image).all()
    assert abs(flipped / n - 0.5) < 4 * 0.5 / np.sqrt(n)


def test_augment_is_crop_flip_auto_augment():
    images, key = noise(32, 12, 12), jax.random.key(5)
    everything = augment(
        images, key, crop_padding=2, crop_size=10, flip=True, auto_augment="imagenet"
    )
    keys = jax.random.split(key, 3)
    expected = random_flip(random_crop(images, keys[0], size=10, padding=2), keys[1])
    expected = auto_augment(expected, keys[2], policy="imagenet")
    np.testing.assert_array_equal(everything, expected)
    np.testing.assert_array_equal(augment(images, key), images)


def test_switching_one_off_leaves_the_others():
    # Crops are seen in the first row, flips in the order of columns, Invert in the sign.
    invert = [(("Invert", 0.5, None), ("Invert", 0.0, None))]

    def draws(**on):
        out = augment(coordinates(64, 20, 20), jax.random.key(6), **on)
        out = np.asarray(out).astype(int)
        inverted = out[:, 0, 0, 2] == 255 - 7
        out = np.where(inverted[:, None, None, None], 255 - out, out)
        return out[:, 0, 0, 0], out[:, 0, 1, 1] < out[:, 0, 0, 1], inverted

    top, mirrored, inverted = draws(crop_size=9, flip=True, auto_augment=invert)
    for values in (top, mirrored, inverted):
        assert len(np.unique(values)) > 1
    np.testing.assert_array_equal(draws(crop_size=9)[0], top)
    np.testing.assert_array_equal(draws(flip=True)[1], mirrored)
    np.testing.assert_array_equal(draws(auto_augment=invert)[2], inverted)
    np.testing.assert_array_equal(draws(crop_size=9, auto_augment=invert)[2], inverted)


def test_jit_eager_and_sharded_agree():
    images, key = jnp.asarray(noise(16, 12, 12)), jax.random.key(7)
    policy = [(("ShearX", 0.7, 8), ("Equalize", 0.7, None))]

    def apply(images, key):
        return augment(images, key, crop_padding=2, crop_size=8, flip=True, auto_augment=policy)

    expected = jax.jit(apply)(images, key)
    np.testing.assert_array_equal(apply(images, key), expected)
    np.testing.assert_array_equal(apply(images, jax.random.PRNGKey(7)), expected)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put(images, sharding)
    apart = jax.jit(apply, out_shardings=sharding).lower(sharded, key).compile()
    np.testing.assert_array_equal(apart(sharded, key), expected)
    text = apart.as_text() or ""
    assert "num_partitions=4" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text, "every device augments its own images"


def test_mixing_sharded_equals_one_device():
    rng, key = np.random.default_rng(0), jax.random.key(8)
    images, targets = rng.random((8, 6, 6, 3), np.float32), np.eye(8, dtype=np.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    for function in (mixup, cutmix):
        mix = jax.jit(lambda i, t, key, f=function: f(i, t, key, alpha=1.0))
        expected = mix(images, targets, key)
        got = mix(*jax.device_put((images, targets), sharding), key)
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_normalize():
    images = noise(3, 5, 5)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalize(images, mean=mean, std=std), expected, atol=1e-6)
    low = normalize(images, mean=0.5, std=0.5, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16 and float(low.min()) >= -1 and float(low.max()) <= 1
    for mean, std in (((125.3,) * 3, 0.2), (0.5, 0.0)):
        with pytest.raises(ValueError, match="divide grey levels by 255"):
            normalize(images, mean=mean, std=std)
    with pytest.raises(ValueError, match="expected uint8"):
        normalize(images.astype(np.float32), mean=0.5, std=0.5)


@pytest.mark.parametrize("seed", range(3))
def test_mixup_equals_a_loop(seed):
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    images = rng.random((7, 4, 5, 3), np.float32)
    targets = rng.dirichlet(np.ones(6), 7).astype(np.float32)
    mixed, soft = jax.jit(lambda i, t, k: mixup(i, t, k, alpha=0.8))(images, targets, key)
    share, partner = sample_mix(key, 7, alpha=0.8)
    for i in range(7):
        j, lam = int(partner[i]), float(share)
        np.testing.assert_allclose(mixed[i], lam * images[i] + (1 - lam) * images[j], atol=1e-6)
        np.testing.assert_allclose(soft[i], lam * targets[i] + (1 - lam) * targets[j], atol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(soft.sum(0), targets.sum(0), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_equals_a_loop(seed):
    n, height, width = 6, 9, 14
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    images = rng.random((n, height, width, 3), np.float32)
    targets = np.eye(n, dtype=np.float32)
    mixed, soft = jax.jit(lambda i, t, k: cutmix(i, t, k, alpha=1.0))(images, targets, key)
    key_mix, key_box = jax.random.split(key)
    share, partner = sample_mix(key_mix, n, alpha=1.0)
    y0, x0, y1, x1 = map(int, sample_box(key_box, share, height, width))
    for i in range(n):
        expected, pasted = images[i].copy(), 0
        for y in range(y0, y1):
            for x in range(x0, x1):
                expected[y, x] = images[int(partner[i]), y, x]
                pasted += 1
        np.testing.assert_array_equal(mixed[i], expected)
        label = np.zeros(n)
        label[i] += 1 - pasted / (height * width)
        label[int(partner[i])] += pasted / (height * width)
        np.testing.assert_allclose(soft[i], label, atol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)


def test_boxes():
    height, width, n = 11, 17, 4000
    keys = jax.random.split(jax.random.key(0), n)
    share = np.linspace(0, 1, n, dtype=np.float32)
    draw = jax.vmap(lambda key, share: sample_box(key, share, height, width))
    y0, x0, y1, x1 = np.asarray(draw(keys, share)).T
    for low, high, side in ((y0, y1, height), (x0, x1, width)):
        assert (low >= 0).all() and (low <= high).all() and (high <= side).all()
        full = np.floor(side * np.sqrt(1 - share)).astype(int)
        whole = (low > 0) & (high < side)
        np.testing.assert_array_equal((high - low)[whole], full[whole])
        clipped = (high - low)[~whole]
        assert (clipped >= full[~whole] // 2).all() and (clipped <= full[~whole]).all()
    assert y1[-1] == y0[-1] and x1[-1] == x0[-1]  # share 1 pastes nothing
    # Empty boxes sit at their centre: uniform over the rows.
    rows = np.asarray(draw(keys, jnp.ones(n)))[:, 0]
    counts = np.bincount(rows, minlength=height)
    assert len(counts) == height
    assert ((counts - n / height) ** 2 / (n / height)).sum() < 29.6  # 10 d.o.f., p = 0.001


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mix_distribution(alpha):
    n = 4000
    keys = jax.random.split(jax.random.key(1), n)
    share, partner = jax.jit(jax.vmap(lambda key: sample_mix(key, 5, alpha=alpha)))(keys)
    share, partner = np.asarray(share), np.asarray(partner)
    np.testing.assert_array_equal(np.sort(partner, 1), np.tile(np.arange(5), (n, 1)))
    assert (partner[:, 0] != 0).mean() > 0.75
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 4 * np.sqrt(variance / n)
    assert abs(share.var() / variance - 1) < 0.1


@pytest.mark.parametrize("function", [mixup, cutmix])
def test_bad_mixes(function):
    images, targets, key = np.zeros((2, 4, 4, 3), np.float32), np.eye(2), jax.random.key(0)
    for wrong in ((images.astype(np.uint8), targets), (images, targets.astype(int))):
        with pytest.raises(ValueError, match="expected floats"):
            function(*wrong, key, alpha=1.0)
    with pytest.raises(ValueError, match="with the same n"):
        function(images, np.eye(3), key, alpha=1.0)
    with pytest.raises(ValueError, match="alpha 0"):
        function(images, targets, key, alpha=0)


def test_center_crop_is_the_middle_window():
    images = jnp.arange(2 * 7 * 6 * 1).reshape(2, 7, 6, 1)
    np.testing.assert_array_equal(center_crop(images, size=(3, 4)), np.asarray(images)[:, 2:5, 1:5])
    np.testing.assert_array_equal(center_crop(images), images)
    with pytest.raises(ValueError, match="8 x 8 pixels does not fit images of 7 x 6"):
        center_crop(images, size=8)

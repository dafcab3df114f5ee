"""AutoAugment against PIL, one image at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from attnzoom_jax.data.auto_augment import (
    BLEND_OPS,
    GEOMETRIC_OPS,
    OPS,
    POLICIES,
    POLICY_NAMES,
    Choice,
    apply_choice,
    auto_augment,
    sample_choice,
    to_policy,
)

FILL = (7, 100, 200)
ENHANCERS = {name: getattr(ImageEnhance, name) for name in (*BLEND_OPS, "Brightness")}


def pictures(height, width):
    """Noise and structure: what the histogram operations find easy, hard and degenerate."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    noise = rng.integers(0, 256, (height, width, 3))
    ramp = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 255 - x * 3], -1)
    narrow = rng.integers([100, 7, 251], [131, 9, 256], (height, width, 3))
    flat = np.broadcast_to([0, 128, 255], (height, width, 3))
    checks = np.where((x // 3 + y // 3)[..., None] % 2 == 0, [10, 200, 90], [240, 30, 90])
    blob = 255 * np.exp(-((x - width / 2) ** 2 + (y - height / 3) ** 2) / 40)[..., None]
    spot = np.zeros((height, width, 3))
    spot[height // 2, width // 2] = 255
    dark = rng.integers(0, 256, (height, width, 3)) ** 3 // 255**2
    both = 0.5 * blob * [1, 0.6, 0.2] + 0.4 * ramp
    return np.stack([noise, ramp, narrow, flat, checks, spot, dark, both]).astype(np.uint8)


def slow_blend(degenerate, image, factor):
    """Image.blend: float32 with a rounding after the product, truncated."""
    degenerate, image = np.float32(degenerate), np.float32(image)
    product = np.float32(factor) * (image - degenerate)
    return np.clip(degenerate + product, 0, 255).astype(np.uint8)


def slow_autocontrast(image):
    out = image.copy()
    for channel in range(3):
        low, high = int(image[..., channel].min()), int(image[..., channel].max())
        for index in np.ndindex(image.shape[:2] if high > low else (0, 0)):
            out[(*index, channel)] = 255 * (int(image[(*index, channel)]) - low) // (high - low)
    return out


def slow_op(image, name, index, negative, fill: Any = 0, *, exact=True):
    """One operation by PIL; exact=False leaves also blending and AutoContrast to it."""
    picture = Image.fromarray(image)
    width, height = picture.size
    fill = tuple(np.broadcast_to(fill, 3).tolist())
    part = (index or 0) / 9
    sign = -1 if negative else 1

    def affine(matrix):
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, fillcolor=fill)

    if name in ENHANCERS:
        factor = 1 + sign * 0.9 * part
        enhancer = ENHANCERS[name](picture)
        if exact:
            return slow_blend(np.asarray(enhancer.degenerate), image, factor)
        result = enhancer.enhance(factor)
    elif name == "AutoContrast":
        if exact:
            return slow_autocontrast(image)
        result = ImageOps.autocontrast(picture)
    elif name == "ShearX":
        result = affine((1, sign * 0.3 * part, 0, 0, 1, 0))
    elif name == "ShearY":
        result = affine((1, 0, 0, sign * 0.3 * part, 1, 0))
    elif name == "TranslateX":  # the content moves right for positive magnitudes
        result = affine((1, 0, -sign * int(150 / 331 * width * part), 0, 1, 0))
    elif name == "TranslateY":
        result = affine((1, 0, 0, 0, 1, -sign * int(150 / 331 * height * part)))
    elif name == "Rotate":
        result = picture.rotate(sign * 30 * part, fillcolor=fill)
    elif name == "Posterize":
        result = ImageOps.posterize(picture, (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)[index])
    elif name == "Solarize":
        result = ImageOps.solarize(picture, 255 * (9 - index) / 9)
    else:
        result = {"Equalize": ImageOps.equalize, "Invert": ImageOps.invert}[name](picture)
    return np.asarray(result)


def chosen(*arrays):
    return Choice(*map(jnp.asarray, arrays))


def slow_policy(images, choice, policy):
    out = []
    for image, sub_policy, applied, negative in zip(images, *map(np.asarray, choice), strict=True):
        for slot, (name, _, index) in enumerate(policy[sub_policy]):
            if applied[slot]:
                image = slow_op(image, name, index, negative[slot])
        out.append(image)
    return np.stack(out)


@pytest.mark.parametrize("name", OPS)
def test_op_equals_pil(name):
    images = pictures(20, 28)
    policy = [((name, 1.0, index), ("Invert", 0.0, None)) for index in range(10)]
    cases = [(i, m, s) for i in range(len(images)) for m in range(10) for s in (False, True)]
    which, index, negative = (np.array(column) for column in zip(*cases, strict=True))
    applied = np.tile([True, False], (len(cases), 1))
    choice = chosen(index, applied, np.stack([negative] * 2, 1))
    apply = jax.jit(lambda images, choice: apply_choice(images, choice, policy=policy, fill=FILL))
    got = np.asarray(apply(images[which], choice))

    expected = np.stack([slow_op(images[i], name, m, s, FILL) for i, m, s in cases])
    np.testing.assert_array_equal(got, expected)
    # PIL itself: one level off where its compiler fuses the blend's product and sum, or where
    # AutoContrast's doubles fall below a whole number.
    pil = np.stack([slow_op(images[i], name, m, s, FILL, exact=False) for i, m, s in cases])
    off = np.abs(got.astype(int) - pil)
    assert off.max() <= (name in ENHANCERS or name == "AutoContrast")
    if name in GEOMETRIC_OPS:  # index 0 is the identity
        np.testing.assert_array_equal(got[index == 0], images[which[index == 0]])
    assert (got != images[which]).any()


@pytest.mark.parametrize("size", [(1, 4), (3, 3)])
def test_tiny_images(size):
    images = np.random.default_rng(1).integers(0, 256, (40, *size, 3)).astype(np.uint8)
    policy = [((name, 1.0, 6), (name, 1.0, 9)) for name in OPS]
    choice = sample_choice(jax.random.key(0), 40, policy=policy)
    got = apply_choice(jnp.asarray(images), choice, policy=policy)
    if min(size) == 3:  # PIL's smoothing reads outside smaller ones
        np.testing.assert_array_equal(got, slow_policy(images, choice, to_policy(policy)))
    smooth = np.asarray(choice.sub_policy) == OPS.index("Sharpness")
    np.testing.assert_array_equal(
        got[~smooth],
        slow_policy(images, choice, to_policy(policy))[~smooth],
    )


def test_autocontrast_over_every_range():
    # Each image holds two levels and one between: every lowest level, some highest.
    pairs = [(low, high) for low in range(0, 255, 5) for high in range(low + 1, 256, 4)]
    levels = np.array([(low, (low + high) // 2, high) for low, high in pairs], np.uint8)
    images = np.repeat(levels[:, None, :, None], 3, axis=-1)  # [n, 1, 3, 3]
    policy = [(("AutoContrast", 1.0, None), ("Invert", 0.0, None))]
    got = np.asarray(jax.jit(lambda i, k: auto_augment(i, k, policy=policy))(images, _key()))
    expected = [[0, 255 * (mid - low) // (high - low), 255] for low, mid, high in levels.tolist()]
    np.testing.assert_array_equal(got[:, 0, :, 0], expected)
    pil = [np.asarray(ImageOps.autocontrast(Image.fromarray(image))) for image in images]
    off = got.astype(int) - np.stack(pil)
    assert off.min() == 0 and off.max() == 1 and (off > 0).mean() < 0.1


def _key():
    return jax.random.key(3)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_policy_equals_a_slow_interpreter(policy):
    images = np.tile(pictures(16, 16), (40, 1, 1, 1))
    got = jax.jit(lambda images, key: auto_augment(images, key, policy=policy))(images, _key())
    choice = sample_choice(_key(), len(images), policy=policy)
    assert len(np.unique(choice.sub_policy)) == 25
    np.testing.assert_array_equal(got, slow_policy(images, choice, POLICIES[policy]))


def test_jit_eager_sharded_and_old_keys_agree():
    policy = [
        (("Rotate", 0.8, 5), ("Equalize", 0.8, None)),
        (("AutoContrast", 0.8, None), ("Sharpness", 0.8, 8)),
        (("Contrast", 0.8, 7), ("Color", 0.8, 4)),
    ]
    images = jnp.asarray(np.tile(pictures(16, 16), (2, 1, 1, 1)))
    augment = jax.jit(lambda images, key: auto_augment(images, key, policy=policy))
    expected = augment(images, _key())
    np.testing.assert_array_equal(auto_augment(images, _key(), policy=policy), expected)
    np.testing.assert_array_equal(augment(images, jax.random.PRNGKey(3)), expected)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put(images, sharding)
    apart = jax.jit(augment, out_shardings=sharding).lower(sharded, _key()).compile()
    np.testing.assert_array_equal(apart(sharded, _key()), expected)
    text = apart.as_text() or ""
    assert "num_partitions=4" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text, "every device augments its own images"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_sampling_frequencies(policy):
    n = 50_000
    choice = sample_choice(jax.random.key(0), n, policy=policy)
    sub_policy, applied, negative = map(np.asarray, choice)
    counts = np.bincount(sub_policy, minlength=25)
    assert len(counts) == 25
    assert ((counts - n / 25) ** 2 / (n / 25)).sum() < 51.2  # chi-square, 24 d.o.f., p = 0.001
    for index, pair in enumerate(POLICIES[policy]):
        for slot, (_, probability, _) in enumerate(pair):
            share = applied[sub_policy == index, slot].mean()
            deviation = np.sqrt(probability * (1 - probability) / counts[index])
            assert abs(share - probability) <= 4 * deviation
    assert np.abs(negative.mean(0) - 0.5).max() < 4 * 0.5 / np.sqrt(n)
    # Coins and signs are independent of each other.
    coins = np.stack([*negative.T, sub_policy % 2], 0).astype(float)
    correlation = np.corrcoef(coins) - np.eye(3)
    assert np.abs(correlation).max() < 4 / np.sqrt(n)
    for slot in (0, 1):
        centred = applied[:, slot] - np.array([p[slot][1] for p in POLICIES[policy]])[sub_policy]
        assert abs(np.corrcoef(centred, negative[:, slot])[0, 1]) < 4 / np.sqrt(n)


def test_policies_are_well_formed():
    for policy in POLICIES.values():
        assert len(policy) == 25
        assert to_policy([[list(op) for op in pair] for pair in policy]) == policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("cifar100", "did you mean 'cifar10'"),
        ("ImageNet", "did you mean 'imagenet'"),
        ("mnist", "There is: cifar10, imagenet, svhn"),
        ([(("rotat", 0.5, 3), ("Invert", 0.5, None))], "did you mean 'Rotate'"),
        ([(("Identity", 0.5, 3), ("Invert", 0.5, None))], "unknown AutoAugment operation"),
        ([(("Rotate", 1.5, 3), ("Invert", 0.5, None))], "expected a number in"),
        ([(("Rotate", 0.5, 10), ("Invert", 0.5, None))], "expected one of 0..9"),
        ([(("Rotate", 0.5, None), ("Invert", 0.5, None))], "expected one of 0..9"),
        ([(("Rotate", 0.5, 3),)], "sequence of pairs"),
        ([("Rotate", "Invert")], "expected .op, probability, index"),
        ([], "sequence of pairs"),
        (True, "sequence of pairs"),
    ],
)
def test_bad_policies(policy, message):
    with pytest.raises(ValueError, match=message):
        to_policy(policy)


def test_bad_images_and_fill():
    images = jnp.zeros((2, 4, 4, 3), jnp.uint8)
    choice = chosen(np.zeros(2, int), np.ones((2, 2), bool), np.ones((2, 2), bool))
    for wrong in (images.astype(jnp.float32), images[0], images[..., :1]):
        with pytest.raises(ValueError, match="expected uint8"):
            apply_choice(wrong, choice, policy="svhn")
    for fill in (-1, 256, (0, 0), 0.5):
        with pytest.raises(ValueError, match="fill is"):
            apply_choice(images, choice, policy="svhn", fill=fill)  # pyright: ignore

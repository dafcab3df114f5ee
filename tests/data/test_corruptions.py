import colorsys
import io
import math

import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.data.corruptions import CORRUPTIONS, LEVELS, SEVERITIES, Corrupted
from attnzoom_jax.data.pipeline import Resize

RANDOM = ("gaussian_noise", "salt_and_pepper", "occlusion", "translation")


def photo(h, w, seed=0):
    """Smooth colours with some texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    waves = [np.sin(y / (3 + c) + c) + np.cos(x / (4 - c) - c) for c in range(3)]
    image = 128 + 45 * np.stack(waves, axis=-1) + rng.normal(scale=12, size=(h, w, 3))
    return image.clip(0, 255).astype(np.uint8)


def corrupt(name, image, level, seed=0):
    return CORRUPTIONS[name](image, level, np.random.default_rng(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(32, 32), (60, 44)], ids=str)
def test_images_keep_their_form_and_change_more_with_the_level(name, shape):
    image = photo(*shape)
    before = image.copy()
    changed = []
    for level in LEVELS:
        corrupted = corrupt(name, image, level)
        assert corrupted.shape == image.shape and corrupted.dtype == np.uint8
        assert (corrupt(name, image, level) == corrupted).all()
        changed.append(np.abs(corrupted.astype(float) - image).mean())
    assert (image == before).all()
    assert 0 < changed[0] < changed[-1]
    others = [corrupt(name, image, 5, seed) for seed in (1, 2, 3)]
    assert any((other != corrupted).any() for other in others) == (name in RANDOM)


def test_the_levels_of_image_net_c():
    assert SEVERITIES[224]["gaussian_noise"] == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert SEVERITIES[224]["salt_and_pepper"] == (0.03, 0.06, 0.09, 0.17, 0.27)
    assert SEVERITIES[224]["gaussian_blur"] == (1, 2, 3, 4, 6)
    assert SEVERITIES[224]["brightness"] == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert SEVERITIES[224]["contrast"] == (0.4, 0.3, 0.2, 0.1, 0.05)
    assert SEVERITIES[224]["jpeg"] == (25, 18, 15, 10, 7)
    assert SEVERITIES[32].keys() == SEVERITIES[64].keys() == SEVERITIES[224].keys()


@pytest.mark.parametrize(("side", "table"), [(32, 32), (64, 64), (224, 224), (28, 32), (160, 224)])
def test_noise_has_the_deviation_of_the_nearest_size(side, table):
    grey = np.full((side, side, 3), 128, np.uint8)
    for level in LEVELS[:3]:
        difference = corrupt("gaussian_noise", grey, level).astype(float) - 128
        expected = 255 * SEVERITIES[table]["gaussian_noise"][level - 1]
        assert difference.std() == pytest.approx(expected, rel=0.05)
        assert abs(difference.mean()) < 4 * expected / math.sqrt(difference.size)


@pytest.mark.parametrize("level", LEVELS)
def test_salt_and_pepper_hits_values_one_by_one(level):
    grey = np.full((256, 256, 3), 128, np.uint8)
    corrupted = corrupt("salt_and_pepper", grey, level)
    share = SEVERITIES[224]["salt_and_pepper"][level - 1]
    is_hit = corrupted != 128
    assert set(np.unique(corrupted)) == {0, 128, 255}
    assert is_hit.mean() == pytest.approx(share, rel=0.05)
    assert (corrupted == 255).sum() == pytest.approx((corrupted == 0).sum(), rel=0.06)
    assert (is_hit[..., 0] & is_hit[..., 1]).mean() == pytest.approx(share**2, rel=0.4)


def slow_blur(image, sigma):
    """Each pixel by itself, the border repeated."""
    h, w, _ = image.shape
    radius = int(4 * sigma + 0.5)
    around = np.arange(-radius, radius + 1)
    weights = np.exp(-(around**2) / (2 * sigma**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    blurred = np.zeros(image.shape)
    for y in range(h):
        for x in range(w):
            rows, columns = (y + around).clip(0, h - 1), (x + around).clip(0, w - 1)
            blurred[y, x] = np.tensordot(weights, image[np.ix_(rows, columns)].astype(float), 2)
    return blurred


@pytest.mark.parametrize("level", [1, 5])
def test_blur_equals_a_slow_convolution(level):
    image = photo(30, 34)
    sigma = SEVERITIES[32]["gaussian_blur"][level - 1] * 30 / 32
    difference = corrupt("gaussian_blur", image, level) - slow_blur(image, sigma)
    assert np.abs(difference).max() <= 0.51


def test_the_length_of_blur_grows_with_the_image():
    edge = np.zeros((448, 448, 3), np.uint8)
    edge[:, 224:] = 255
    slope = np.diff(corrupt("gaussian_blur", edge, 4)[0, :, 0].astype(float)) / 255
    deviation = math.sqrt((slope * (np.arange(447) - 223) ** 2).sum())
    assert deviation == pytest.approx(2 * 4, rel=0.02)


@pytest.mark.parametrize("level", LEVELS)
def test_brightness_adds_to_the_value_of_hsv(level):
    image = photo(9, 11)
    image[0, :3] = [[0, 0, 0], [255, 255, 255], [0, 0, 7]]
    added = SEVERITIES[32]["brightness"][level - 1]
    corrupted = corrupt("brightness", image, level)
    for pixel, found in zip(image.reshape(-1, 3), corrupted.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + added))
        assert np.abs(255 * np.array(expected) - found).max() <= 0.51


@pytest.mark.parametrize("level", LEVELS)
def test_contrast_keeps_the_mean_and_shrinks_the_rest(level):
    image = photo(64, 50)
    left = SEVERITIES[64]["contrast"][level - 1]
    corrupted = corrupt("contrast", image, level)
    for channel in range(3):
        mean = np.mean(image[..., channel].astype(np.float64))
        expected = np.clip((image[..., channel] - mean) * left + mean, 0, 255)
        assert np.abs(corrupted[..., channel] - expected).max() <= 0.51


@pytest.mark.parametrize("level", LEVELS)
def test_jpeg_is_what_another_library_makes_of_it(level):
    image = photo(224, 224)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=SEVERITIES[224]["jpeg"][level - 1])
    expected = np.asarray(Image.open(file).convert("RGB"), float)
    found = corrupt("jpeg", image, level).astype(float)
    assert np.abs(found - expected).mean() < 0.1 < np.abs(found - image).mean() / 20


@pytest.mark.parametrize(("level", "share"), [(1, 0.05), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)])
def test_occlusion_covers_one_rectangle_with_the_mean(level, share):
    image = photo(40, 60)
    image[..., 0] |= 1  # an even mean below marks the rectangle
    mean = np.round(image.mean(axis=(0, 1)))
    firsts, lasts = [], []
    for seed in range(200):
        corrupted = corrupt("occlusion", image, level, seed)
        rows, columns = np.nonzero((corrupted != image).any(axis=2))
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        area = (bottom - top + 1) * (right - left + 1)
        assert area == pytest.approx(share * 40 * 60, rel=0.06)
        inside = corrupted[top : bottom + 1, left : right + 1]
        assert (np.abs(inside - mean) <= 0.51).all()
        firsts.append((top, left))
        lasts.append((bottom, right))
    assert np.min(firsts, axis=0).max() <= 1 and (np.max(lasts, axis=0) >= [38, 58]).all()


@pytest.mark.parametrize(("level", "share"), [(1, 0.05), (2, 0.1), (3, 0.15), (4, 0.2), (5, 0.25)])
def test_translation_moves_by_a_share_of_the_side_and_repeats_the_border(level, share):
    y, x = np.mgrid[:40, :40]
    image = np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)  # each pixel says where it was
    angles = []
    for seed in range(60):
        moved = corrupt("translation", image, level, seed).astype(int)
        down, right = y[20, 20] - moved[20, 20, 0], x[20, 20] - moved[20, 20, 1]
        assert (moved[..., 0] == (y - down).clip(0, 39)).all()
        assert (moved[..., 1] == (x - right).clip(0, 39)).all()
        assert abs(math.hypot(down, right) - share * 40) <= 0.71  # half a pixel in y and in x
        angles.append(math.atan2(down, right))
    assert np.histogram(angles, 4, (-math.pi, math.pi))[0].min() > 0


def examples(count=6, side=20):
    return [{"image": photo(side, side + 4, seed), "label": seed} for seed in range(count)]


@pytest.mark.parametrize("name", RANDOM)
def test_an_example_draws_by_seed_level_and_number_alone(name):
    same = [{"image": photo(20, 24), "label": 0}] * 6
    corrupted = Corrupted(same, name, 3, seed=7)
    images = [corrupted[i]["image"] for i in range(6)]
    backwards = [Corrupted(same, name, 3, seed=7)[i]["image"] for i in reversed(range(6))]
    assert (np.array(images) == backwards[::-1]).all() and (
        corrupted[-1]["image"] == images[5]
    ).all()
    assert len({image.tobytes() for image in images}) == 6
    assert (Corrupted(same, name, 3, seed=8)[0]["image"] != images[0]).any()
    assert (Corrupted(same, name, 4, seed=7)[0]["image"] != images[0]).any()


def test_images_are_corrupted_as_the_model_sees_them():
    split = examples()
    corrupted = Corrupted(split, "contrast", 2, resize=Resize("squash", 12), crop_size=8)
    assert len(corrupted) == 6 and corrupted[4]["label"] == 4
    window = Resize("squash", 12)(split[4]["image"])[2:10, 2:10]
    found = corrupted[4]["image"]
    assert found.shape == (12, 12, 3)
    assert (found[2:10, 2:10] == corrupt("contrast", window, 2)).all()
    assert (Resize("squash", 12)(found) == found).all()  # as the pipeline does once more
    whole = Corrupted(split, "contrast", 2, crop_size=8)[4]["image"]
    assert (whole[:6] == photo(20, 24, 4)[:6]).all() and (
        split[4]["image"] == photo(20, 24, 4)
    ).all()


@pytest.mark.parametrize("level", [0, 6, 2.5])
def test_bad_levels_are_told(level):
    with pytest.raises(ValueError, match=r"level .* of a corruption; expected 1, 2, 3, 4 or 5"):
        corrupt("occlusion", photo(8, 8), level)
    with pytest.raises(ValueError, match=r"level .* of a corruption"):
        Corrupted(examples(), "jpeg", level)


def test_bad_names_and_seeds_are_told():
    with pytest.raises(ValueError, match="unknown corruption 'jpg'; did you mean 'jpeg'"):
        Corrupted(examples(), "jpg", 1)
    with pytest.raises(ValueError, match="seed -1 must be 0 or more"):
        Corrupted(examples(), "jpeg", 1, seed=-1)

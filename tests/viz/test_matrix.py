import matplotlib
import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.viz import matrix


def drawn(path, usage, channels):
    names = [f"attribute {i}" for i in range(len(usage))]
    similarity = np.zeros((len(usage), len(usage)))
    matrix.save_attribute_matrices(path, usage, similarity, names=names, channels=channels)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def places(picture, value):
    """Middle (y, x) of what has the colour of a value, above the colour bars, in shares."""
    color = 255 * np.array(matplotlib.colormaps[matrix.COLOR_MAP](value)[:3])
    above = picture[: int(0.7 * len(picture))]
    found = np.argwhere(np.abs(above - color).max(axis=2) < 3)
    return found.mean(axis=0) / above.shape[:2]


def test_columns_are_drawn_in_the_order_of_the_channels(tmp_path):
    usage = np.zeros((3, 4))
    usage[0, 2] = 1.0
    first = places(drawn(tmp_path / "a.png", usage, np.array([2, 0, 1, 3])), 1.0)
    last = places(drawn(tmp_path / "b.png", usage, np.array([0, 1, 3, 2])), 1.0)
    assert last[1] > first[1] + 0.3 and last[0] == pytest.approx(first[0], abs=0.02)
    usage[[0, 2]] = usage[[2, 0]]
    lower = places(drawn(tmp_path / "c.png", usage, np.array([2, 0, 1, 3])), 1.0)
    assert lower[0] > first[0] + 0.3 and lower[1] == pytest.approx(first[1], abs=0.02)


def test_many_attributes_and_channels_stay_within_bounds(tmp_path):
    usage = np.random.default_rng(0).random((312, 512))
    height, width, _ = drawn(tmp_path / "a.png", usage, np.arange(512)).shape
    assert 1500 < height < 4000 and 3000 < width < 7000

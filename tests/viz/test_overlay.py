import matplotlib
import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.viz import overlay

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8)
MAP = RNG.normal(size=(6, 5)).astype(np.float32)


def slow_blend(image, values, top, opacity=0.55):
    """One pixel after the other, in Python numbers."""
    colors = matplotlib.colormaps["inferno"]
    blended = np.zeros(image.shape, np.uint8)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            share = min(max(float(values[y, x]) / top, 0.0), 1.0)
            grey = sum(int(c) for c in image[y, x]) / 3 / 255
            color = colors(share)[:3]
            for c in range(3):
                blended[y, x, c] = round(255 * ((1 - opacity) * grey + opacity * color[c]))
    return blended


@pytest.mark.parametrize("opacity", [0.0, 0.55, 1.0])
def test_blend_equals_a_slow_version(opacity):
    panel = overlay.class_map_panel("grad_cam", MAP)
    got = overlay.blend(IMAGE, panel, opacity=opacity)
    want = slow_blend(IMAGE, np.maximum(MAP, 0), MAP.max(), opacity)
    assert got.dtype == np.uint8
    np.testing.assert_allclose(got.astype(int), want.astype(int), atol=1)  # ties of rounding
    assert (got == want).mean() > 0.95


def test_a_class_map_shows_its_positive_part_up_to_its_own_maximum():
    panel = overlay.class_map_panel("grad_cam", MAP)
    np.testing.assert_array_equal(panel.values, np.maximum(MAP, 0))
    assert panel.top == MAP.max() and panel.note == ""
    scaled = overlay.class_map_panel("grad_cam", 1000 * MAP)
    np.testing.assert_array_equal(overlay.blend(IMAGE, panel), overlay.blend(IMAGE, scaled))


@pytest.mark.parametrize("values", [np.zeros((6, 5)), -np.ones((6, 5)), np.full((6, 5), 1e-20)])
def test_a_map_without_positive_evidence_says_so_and_has_no_hot_spot(values):
    panel = overlay.class_map_panel("grad_cam", values.astype(np.float32))
    assert panel.note == "no positive evidence"
    np.testing.assert_array_equal(overlay.blend(IMAGE, panel), slow_blend(IMAGE, 0 * values, 1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_with_nan_says_so(bad):
    values = MAP.copy()
    values[2, 3] = bad
    panel = overlay.class_map_panel("grad_cam", values)
    assert panel.note == "map holds NaN or infinity"
    mask = overlay.mask_panel("mask stage1/gate", values)
    assert mask.note == "mask holds NaN or infinity"
    np.testing.assert_array_equal(mask.values, 0 * MAP)
    np.testing.assert_array_equal(overlay.blend(IMAGE, panel), slow_blend(IMAGE, 0 * MAP, 1.0))


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (np.ones((6, 5)), "mask is 1 everywhere: it fades nothing"),
        (np.full((6, 5), 1 - 1e-7), "mask is 1 everywhere: it fades nothing"),
        (np.full((6, 5), 0.25), "mask is 0.250 everywhere"),
        (np.zeros((6, 5)), "mask is 0.000 everywhere"),
        (np.where(np.arange(30).reshape(6, 5) == 7, 0.5, 1.0), ""),
    ],
)
def test_a_mask_is_shown_on_the_full_scale_and_says_when_it_does_nothing(values, note):
    panel = overlay.mask_panel("mask stage1/gate", values.astype(np.float32))
    assert panel.note == note and panel.top == 1
    np.testing.assert_array_equal(overlay.blend(IMAGE, panel), slow_blend(IMAGE, values, 1.0))


def explanations(n):
    return [
        overlay.Explanation(
            name=f"image_{i}",
            title=f"disc, cross {i}",
            image=RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8),
            panels=[
                overlay.class_map_panel("grad_cam: disc", RNG.normal(size=(32, 32))),
                overlay.mask_panel("mask stage1/gate", np.ones((32, 32), np.float32)),
            ],
        )
        for i in range(n)
    ]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_pictures_have_the_size_of_their_grid(tmp_path):
    dpi, gap, title, foot, columns = 120, 0.12, 0.34, 0.55, 3
    overlay.save_explanation(tmp_path / "one.png", explanations(1)[0])
    overlay.save_contact_sheet(tmp_path / "sheet.png", explanations(5))
    for name, side, rows, per_row in (("one", 2.6, 1, 1), ("sheet", 1.6, 3, 2)):
        height, width, _ = pixels(tmp_path / f"{name}.png").shape
        assert height == pytest.approx(dpi * (rows * (side + title) + foot), abs=1)
        block = columns * (side + gap) + gap
        assert width == pytest.approx(dpi * (per_row * block + gap), abs=1)


def test_a_picture_shows_the_image_and_the_map_over_it(tmp_path):
    explanation = explanations(1)[0]
    image = np.full((32, 32, 3), (200, 60, 30), np.uint8)
    values = np.zeros((32, 32), np.float32)
    values[:16] = 1  # the upper half is hot
    panel = overlay.class_map_panel("grad_cam", values)
    explanation = overlay.Explanation("a", "a", image, [panel])
    overlay.save_explanation(tmp_path / "a.png", explanation)
    shown = pixels(tmp_path / "a.png")
    side, left, top = int(2.6 * 120), int(0.12 * 120), int(0.34 * 120)
    step = int(2.72 * 120)
    expected = overlay.blend(image, panel)
    at = lambda column, share: shown[  # noqa: E731
        top + int(share * side), left + column * step + side // 2
    ].tolist()
    assert at(0, 0.25) == at(0, 0.75) == [200, 60, 30]
    assert at(1, 0.25) == expected[0, 0].tolist() and at(1, 0.75) == expected[-1, 0].tolist()

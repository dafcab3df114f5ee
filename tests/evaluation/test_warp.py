import numpy as np
import pytest

from attnzoom_jax.evaluation import examples, warp
from attnzoom_jax.ops.warp import dense_grid, saliency_grid, sample, separable_grid, to_saliency

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 8, 6, 3)).astype(np.uint8)
ATTENTION = RNG.uniform(0, 1, (2, 4, 4)).astype(np.float32)


def enlarged(images, factor):
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("grid", ["saliency", "separable"])
def test_uniform_attention_leaves_the_image_as_it_is(value, grid):
    attention = np.full((2, 5, 5), value, np.float32)
    warps = warp.warp_images(IMAGES, attention, options={"grid": grid}, least_side=48)
    np.testing.assert_array_equal(warps.warped, enlarged(IMAGES, 8))
    np.testing.assert_array_equal(warps.magnification, np.ones((2, 64, 48), np.float32))
    y, x = np.meshgrid(np.arange(64), np.arange(48), indexing="ij")
    # The centre of pixel i of the enlarged picture lies at (i + 0.5) / 8 - 0.5 of the image.
    np.testing.assert_allclose(warps.grid[1, ..., 0], (y + 0.5) / 8 - 0.5, atol=1e-6)
    np.testing.assert_allclose(warps.grid[1, ..., 1], (x + 0.5) / 8 - 0.5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cells": 9, "fwhm": 4.0, "temperature": 0.5, "floor": 0.2, "strength": 0.7},
        {"weighting": "softmax", "floor": 0.0},
        {"grid": "separable", "marginal": "sum", "max_zoom": 3.0},
    ],
)
def test_the_warp_is_that_of_the_operations(options):
    warps = warp.warp_images(IMAGES, ATTENTION - 0.2, options=options, least_side=24)
    given = {"cells": 31, "weighting": "power", "temperature": 1.0, "floor": 0.05, **options}
    weights = {key: given[key] for key in ("weighting", "temperature", "floor")}
    positive = np.maximum(ATTENTION - 0.2, 0)
    saliency = to_saliency(positive, (given["cells"],) * 2, **weights)
    size = (32, 24)
    if options.get("grid") == "separable":
        grid = dense_grid(separable_grid(saliency, size, marginal="sum", max_zoom=3.0))
    else:
        strength, fwhm = options.get("strength", 1.0), options.get("fwhm", 13.0)
        grid = saliency_grid(saliency, size, strength=strength, fwhm=fwhm)
    np.testing.assert_allclose(warps.saliency, saliency, rtol=1e-5)
    np.testing.assert_allclose(warps.grid, (grid + 0.5) / 4 - 0.5, atol=1e-4)
    expected = np.asarray(sample(enlarged(IMAGES, 4), grid))
    np.testing.assert_allclose(warps.warped, expected, atol=1)
    assert np.abs(np.asarray(grid) - np.stack(np.indices(size), -1)).max() > 1  # it does move


def test_an_image_of_that_size_is_not_enlarged():
    assert warp.warp_images(IMAGES, ATTENTION, least_side=5).warped.shape == IMAGES.shape


def test_the_magnification_of_known_grids():
    y, x = np.meshgrid(np.arange(7.0), np.arange(5.0), indexing="ij")
    shear = np.stack([0.5 * y + 3, 0.125 * x + 0.4 * y], axis=-1)
    fourfold = warp.magnification(np.stack([shear, np.stack([y, x], -1)]))
    np.testing.assert_allclose(fourfold[0], 4, rtol=1e-6)  # an area becomes 16 times as large
    np.testing.assert_allclose(fourfold[1], 1, rtol=1e-6)


def test_magnification_equals_a_slow_version_and_adds_up_to_the_area():
    warps = warp.warp_images(IMAGES, ATTENTION, least_side=60)
    grid = warps.grid[0].astype(np.float64) * 10
    for y, x in ((3, 5), (40, 30), (77, 11)):
        (ay, ax), (by, bx) = (
            (grid[y + 1, x] - grid[y - 1, x]) / 2,
            (grid[y, x + 1] - grid[y, x - 1]) / 2,
        )
        assert warps.magnification[0, y, x] == pytest.approx((ay * bx - ax * by) ** -0.5, rel=1e-3)
    # What the pixels show adds up to what the border of the grid encloses.
    border = np.concatenate([grid[0], grid[1:, -1], grid[-1, -2::-1], grid[-2:0:-1, 0]])
    (y, x), (next_y, next_x) = border.T, np.roll(border, -1, axis=0).T
    enclosed = abs((y * next_x - x * next_y).sum()) / 2  # in pixels of the enlarged image
    shown = (1 / warps.magnification[0].astype(np.float64) ** 2).mean() * 79 * 59
    assert shown == pytest.approx(enclosed, rel=0.01)


def test_attention_is_magnified_most():
    attention = np.zeros((1, 8, 8), np.float32)
    attention[0, 2, 5] = 1
    warps = warp.warp_images(np.zeros((1, 64, 64, 3), np.uint8), attention)
    peak = np.unravel_index(warps.magnification[0].argmax(), (256, 256))
    where = warps.grid[0][peak]
    assert np.abs(where - [19.5, 43.5]).max() < 4 and warps.magnification.max() > 1.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flor": 0.1}, "unknown option of the warp 'flor'; did you mean 'floor'"),
        ({"reads": "stage1"}, "unknown option of the warp 'reads'"),
        ({"size": 3}, "unknown option of the warp 'size'"),
        ({"floor": 2}, "floor is 2; expected a share in"),
        ({"temperature": "high"}, "option temperature of the warp is 'high'; expected a number"),
        ({"max_zoom": "none"}, "option max_zoom of the warp is 'none'; expected a number"),
        ({"grid": 3}, "option grid of the warp is 3; expected a word such as 'saliency'"),
        ({"grid": "tps"}, "unknown ZoomWarp.grid 'tps'"),
        ({"fwhm": True}, "option fwhm of the warp is True; expected a number"),
        ({"cells": 2.5}, "ZoomWarp.cells is 2.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        warp.warp_images(IMAGES, ATTENTION, options=options)
    assert message in str(error.value) and "\n" not in str(error.value).partition("\n-----")[0]


def test_attention_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="the attention holds NaN or infinity"):
        warp.warp_images(IMAGES, np.full((2, 4, 4), np.nan, np.float32))


def test_what_a_picture_is_warped_by(trained, coarse):
    choose = warp.choose_attention
    assert choose(trained, "", "") == ("", "gate")
    assert choose(trained, "", "gate") == ("", "gate")
    assert choose(trained, "", "conv") == ("grad_cam", "conv")
    assert choose(trained, "layer_cam", "") == ("layer_cam", "gated")
    assert choose(trained, "layer_cam", "gate") == ("layer_cam", "gate")
    assert choose(coarse, "", "") == ("grad_cam", "relu")


def test_the_files_hold_what_was_drawn(trained, tmp_path, capsys):
    chosen = examples.right_and_wrong(trained, "test", 1)
    arrays = warp.draw_warps(trained, chosen, tmp_path / "out", options={"floor": 0.1})
    assert "attention: the mask at tap 'gate'" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"warp.npz", "warp_sheet.png", *(f"warp_{name}.png" for name in chosen.names)}
    with np.load(tmp_path / "out" / "warp.npz") as written:
        assert set(written.files) == set(arrays)
        for name in arrays:
            np.testing.assert_array_equal(written[name], arrays[name])
    assert (arrays["predicted"] == arrays["labels"]).tolist() == [True, False]
    expected = warp.warp_images(chosen.images, arrays["attention"], options={"floor": 0.1})
    np.testing.assert_array_equal(arrays["warped"], expected.warped)
    assert arrays["attention"].shape == (2, 8, 8)
    np.testing.assert_array_equal(arrays["grid"], expected.grid)


def test_without_a_mask_a_class_map_is_what_warps(coarse, tmp_path, capsys):
    few = examples.from_split(coarse, "test", 2)
    options = {"negative": "clamp", "temperature": 0.5}
    arrays = warp.draw_warps(
        coarse, few, tmp_path, method="excitation_backprop", options=options, target="label"
    )
    assert "attention: excitation_backprop at tap 'relu'" in capsys.readouterr().out
    assert (arrays["attention"] >= 0).all() and arrays["attention"].max() > 0
    with pytest.raises(ValueError, match="unknown option of the warp 'negative'"):
        warp.draw_warps(coarse, few, tmp_path, options=options)

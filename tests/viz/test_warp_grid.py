import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.ops.warp import saliency_grid
from attnzoom_jax.viz import overlay, warp_grid

RNG = np.random.default_rng(0)
SALIENCY = RNG.uniform(0.1, 1, (1, 5, 5)).astype(np.float32)
GRID = np.asarray(saliency_grid(SALIENCY, (40, 30), image_size=(20, 15), fwhm=3.0))[0]
NORM = matplotlib.colors.LogNorm(0.5, 2)


def warp(grid=GRID, image=None, **changes):
    height, width = grid.shape[:2]
    image = RNG.integers(0, 256, (20, 15, 3)).astype(np.uint8) if image is None else image
    panel = overlay.class_map_panel("mask", RNG.uniform(size=image.shape[:2]))
    values = {
        "explanation": overlay.Explanation("a", "right: disc 0.90", image, [panel]),
        "warped": np.full((height, width, 3), (200, 60, 30), np.uint8),
        "grid": grid,
        "magnification": RNG.uniform(0.6, 1.8, (height, width)),
    }
    return warp_grid.Warp(**{**values, **changes})


def test_the_lines_are_rows_and_columns_of_the_grid_that_samples():
    lines = warp_grid.grid_lines(GRID, 4)
    assert len(lines) == 8
    for line, row in zip(lines[:4], (0, 13, 26, 39), strict=True):
        np.testing.assert_array_equal(line, GRID[row])
    for line, column in zip(lines[4:], (0, 10, 19, 29), strict=True):
        np.testing.assert_array_equal(line, GRID[:, column])


def drawn(a_warp):
    axes = matplotlib.figure.Figure().add_axes((0, 0, 1, 1))
    warp_grid.draw_grid(axes, a_warp, NORM)
    return axes


def test_lines_are_drawn_in_pixels_of_the_image_and_coloured_by_the_magnification():
    a_warp = warp()
    axes = drawn(a_warp)
    assert axes.get_xlim() == (-0.5, 14.5) and axes.get_ylim() == (19.5, -0.5)
    assert len(axes.collections) == 2 * warp_grid.LINES
    first, last = axes.collections[0], axes.collections[-1]
    for i, segment in enumerate(first.get_segments()):  # the first row, x before y
        np.testing.assert_allclose(segment, GRID[0, i : i + 2, ::-1])
    np.testing.assert_array_equal(first.get_array(), a_warp.magnification[0, 1:])
    for i, segment in enumerate(last.get_segments()):  # the last column
        np.testing.assert_allclose(segment, GRID[i : i + 2, -1, ::-1])
    np.testing.assert_array_equal(last.get_array(), a_warp.magnification[1:, -1])
    assert first.norm is NORM and first.cmap.name == "viridis"


def test_the_identity_is_a_grid_of_straight_lines_from_border_to_border():
    grid = np.asarray(saliency_grid(np.ones((1, 5, 5), np.float32), (40, 30), image_size=(20, 15)))
    axes = drawn(warp(grid[0]))
    rows = [line.get_segments() for line in axes.collections[: warp_grid.LINES]]
    heights = [np.array(row)[..., 1] for row in rows]
    assert all(np.ptp(height) == 0 for height in heights)
    steps = np.diff([height[0, 0] for height in heights])
    assert heights[0][0, 0] == -0.25 and heights[-1][0, 0] == 19.25
    np.testing.assert_allclose(steps, 39 / 24, atol=0.5)  # of whole rows, each half a pixel


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_a_row_is_the_image_the_attention_the_warped_image_and_the_grid(tmp_path):
    image = np.full((20, 20, 3), (30, 60, 200), np.uint8)
    square = np.stack(np.meshgrid(np.arange(40.0), np.arange(40.0), indexing="ij"), -1) / 2
    a_warp = warp(square, image=image)
    warp_grid.save_warps(tmp_path / "a.png", {"": [a_warp]}, side=2.0)
    picture = pixels(tmp_path / "a.png")
    dpi, gap, title = 150, 0.1, 0.18
    middle = int((title + 0.95) * dpi)
    at = lambda column: picture[middle, int((gap + column * 2.1 + 0.97) * dpi)].tolist()  # noqa: E731
    assert at(0) == [30, 60, 200] and at(2) == [200, 60, 30]
    assert at(1) != at(0) and max(at(3)) <= 255
    grey = picture[middle - 20 : middle + 20, int((gap + 6.3) * dpi) :][:, : 2 * dpi]
    assert (np.ptp(grey.astype(int), axis=-1) > 40).any()  # lines in colours over grey
    assert picture.shape[0] == pytest.approx(dpi * (title + 2.0 + 0.5), abs=2)


def test_blocks_without_images_are_left_out_and_colours_reach_the_highest(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        warp_grid,
        "save_sheet",
        lambda path, blocks, scales, side: seen.update(blocks=blocks, scales=scales),
    )
    strong = warp(magnification=np.full(GRID.shape[:2], 3.2))
    warp_grid.save_warps(tmp_path / "a.png", {"right": [warp(), strong], "wrong": []})
    assert [block.title for block in seen["blocks"]] == ["right"]
    assert [len(row) for row in seen["blocks"][0].rows] == [4, 4]
    assert (seen["scales"][3].norm.vmin, seen["scales"][3].norm.vmax) == (0.25, 4)

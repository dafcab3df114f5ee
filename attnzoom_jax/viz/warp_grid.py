"""A warp as a picture: the image, the attention, the warped image, and where its pixels come from.

The grid is drawn over the original image: its lines are rows and columns of the warped picture, at
an even distance there. Where they lie close together, a small area of the image fills much of the
picture; colours say how much longer things become. What no line reaches is not in the picture.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from attnzoom_jax.viz import overlay
from attnzoom_jax.viz.sheet import Block, Cell, Scale, explanation_cells, save_sheet

LINES = 13  # per direction
GRID_COLOR_MAP = "viridis"


@dataclasses.dataclass(frozen=True)
class Warp:
    """A warped image and what warped it.

    Attributes:
        explanation: the image, with the attention as its panel.
        warped: uint8 [height, width, 3].
        grid: [height, width, 2], where each of its pixels comes from, (y, x) in pixels of
            the image.
        magnification: [height, width], of lengths.
    """

    explanation: overlay.Explanation
    warped: np.ndarray
    grid: np.ndarray
    magnification: np.ndarray


def grid_lines(grid: np.ndarray, count: int = LINES) -> list[np.ndarray]:
    """Rows and columns of a grid, evenly chosen, the first and the last among them.

    Args:
        grid: [height, width, 2], (y, x).
        count: lines per direction.

    Returns:
        Lines [m, 2] of points (y, x), rows first.
    """
    rows, columns = (np.linspace(0, m - 1, count).round().astype(int) for m in grid.shape[:2])
    return [grid[row] for row in rows] + [grid[:, column] for column in columns]


def draw_grid(axes: Axes, warp: Warp, norm: matplotlib.colors.Normalize) -> None:
    """Draw the image, grey and dim, and over it the grid, coloured by its magnification.

    Args:
        axes: of Matplotlib.
        warp: of the image.
        norm: of the magnification.
    """
    image = warp.explanation.image
    h, w, _ = image.shape
    grey = 0.6 * image.mean(axis=-1, keepdims=True)
    overlay.show_image(axes, np.repeat(grey.astype(np.uint8), 3, axis=-1))
    for points, color in zip(
        grid_lines(warp.grid), grid_lines(warp.magnification[..., None]), strict=True
    ):
        pieces = np.stack([points[:-1, ::-1], points[1:, ::-1]], axis=1)  # [m - 1, 2, (x, y)]
        look = {"cmap": GRID_COLOR_MAP, "norm": norm, "linewidths": 0.6}
        axes.add_collection(LineCollection(list(pieces), array=color[1:, 0], **look))
    axes.set_xlim(-0.5, w - 0.5)
    axes.set_ylim(h - 0.5, -0.5)


def save_warps(
    path: pathlib.Path, blocks: Mapping[str, Sequence[Warp]], *, side: float = 1.3
) -> None:
    """Write a sheet of warps: a row for each image.

    Args:
        path: of the PNG file.
        blocks: {title: warps}; blocks without any are left out.
        side: of a picture, in inches.
    """
    warps = [warp for block in blocks.values() for warp in block]
    highest = max(float(warp.magnification.max()) for warp in warps)
    top = max(2, math.ceil(highest))
    norm = matplotlib.colors.LogNorm(1 / top, top)
    scales = {
        1: Scale(warps[0].explanation.panels[0].scale),
        3: Scale("magnification", norm, (1 / top, 1, top), GRID_COLOR_MAP),
    }
    rows = {title: [_row(warp, norm) for warp in block] for title, block in blocks.items()}
    save_sheet(path, [Block(*block) for block in rows.items() if block[1]], scales, side=side)


def _row(warp: Warp, norm: matplotlib.colors.Normalize) -> list[Cell]:
    return [
        *explanation_cells(warp.explanation),
        Cell("warped", functools.partial(overlay.show_image, image=warp.warped)),
        Cell("where its pixels come from", functools.partial(draw_grid, warp=warp, norm=norm)),
    ]

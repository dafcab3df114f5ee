"""Two matrices as a picture: which channels attributes use, and how alike they do."""

import pathlib
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

COLOR_MAP = "viridis"  # perceptually uniform, and read by all kinds of colour vision
MOST_WRITTEN = 20  # attributes up to which values are written into the cells
MOST_TICKS = 32  # channels up to which each is named


def save_attribute_matrices(
    path: pathlib.Path,
    usage: np.ndarray,
    similarity: np.ndarray,
    *,
    names: Sequence[str],
    channels: np.ndarray,
    note: str = "",
) -> None:
    """Draw both matrices, with a row for each attribute, beside one another.

    Args:
        path: of the PNG file.
        usage: [a, c], rows in shares, columns in the order of the channels' ids.
        similarity: [a, a], in [0, 1].
        names: of the attributes.
        channels: ids [c] in the order in which they are drawn, from left to right.
        note: what is said behind the first title.
    """
    count = len(names)
    row = float(np.clip(12 / count, 0.05, 0.2))  # inches
    font = min(7.0, 60 * row)
    side = max(2.4, count * row)
    size = (2 * side + 2.4 + 1.4 * font * max(map(len, names)) / 72, side + 1.4)
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1 + 1.2 / side, 1])
    shares = left.imshow(
        usage[:, channels], cmap=COLOR_MAP, vmin=0, aspect="auto", interpolation="nearest"
    )
    left.set_title(
        f"channels that each attribute uses{note and f', {note}'}", fontsize=8, loc="left"
    )
    left.set_yticks(range(count), names, fontsize=font)
    step = -(-len(channels) // MOST_TICKS)
    places = range(0, len(channels), step)
    left.set_xticks(places, [str(channels[i]) for i in places], fontsize=5, rotation=90)
    left.set_xlabel("channel", fontsize=7)
    alike = right.imshow(similarity, cmap=COLOR_MAP, vmin=0, vmax=1, interpolation="nearest")
    right.set_title("similarity by shared channels", fontsize=8, loc="left")
    right.set_yticks(range(count), names, fontsize=font)
    right.set_xticks(range(count), names, fontsize=font, rotation=90)
    if count <= MOST_WRITTEN:
        _write_values(right, similarity)
    for axes, drawn, label in (
        (left, shares, "share of the attribute's contributions"),
        (right, alike, "cosine of the rows at the left"),
    ):
        bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", shrink=0.6, aspect=30)
        bar.ax.tick_params(labelsize=6, length=2)
        bar.set_label(label, fontsize=7)
    figure.savefig(path)


def _write_values(axes: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        color = "black" if value > 0.6 else "white"
        axes.text(
            column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=5, color=color
        )

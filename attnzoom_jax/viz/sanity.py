"""Curves of a sanity check: how alike maps stay while a network's layers become random."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from attnzoom_jax.viz.curves import COLORS, MARKERS

STYLES = ("-", "--", ":")
TITLES = {
    "spearman": "Spearman",
    "spearman_abs": "Spearman of absolute values",
    "ssim": "SSIM",
}
LONGEST = 16  # characters of a layer's name


def save_sanity_curves(path: pathlib.Path, table: Mapping[str, Any]) -> None:
    """Draw the likeness of maps by layer, a panel for each measure, a line for each method.

    Args:
        path: of the PNG file.
        table: as `evaluation.sanity.Sanity` makes it; scores that are missing are left out.

    Raises:
        ValueError: no rows, or more than there are looks.
    """
    rows = table["rows"]
    most = len(COLORS) * len(STYLES)
    if not 1 <= len(rows) <= most:
        raise ValueError(f"{len(rows)} rows; expected 1 to {most}, the looks there are")
    looks = [
        {"color": color, "marker": marker, "linestyle": style, "markersize": 3.5, "linewidth": 1.2}
        for style in STYLES
        for color, marker in zip(COLORS, MARKERS, strict=True)
    ]
    layers = [_short(name) for name in table["layers"]]
    width = 3 * max(2.6, 0.32 * (len(layers) + 3))
    longest = max(len(row["row"]) for row in rows)
    columns = min(len(rows), max(1, int(width / (0.07 * longest + 0.6))))  # inches
    height = 3.4 + 0.2 * -(-len(rows) // columns)
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    for axes, measure in zip(panels, TITLES, strict=True):
        for i, (row, look) in enumerate(zip(rows, looks, strict=False)):
            # Side by side: of many methods nothing is left of the likeness.
            shift = 0.3 * (i + 0.5) / len(rows) - 0.15
            _draw(axes, row, measure, shift, look, has_start=table["mode"] == "cascading")
        _label(axes, TITLES[measure], layers, table["mode"])
    panels[0].set_ylabel("likeness to the map as it was", fontsize=8)
    names = [
        Line2D([], [], label=row["row"], **look) for row, look in zip(rows, looks, strict=False)
    ]
    figure.legend(handles=names, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path)


def _draw(
    axes: Axes,
    row: Mapping[str, Any],
    measure: str,
    shift: float,
    look: Mapping[str, Any],
    *,
    has_start: bool,
) -> None:
    scores = row["random"][measure]
    start = {"value": 1.0, "low": 1.0, "high": 1.0} if has_start else None
    _plot(axes, [(shift, start), *((i + shift, s) for i, s in enumerate(scores, 1))], look)
    _plot(axes, [(len(scores) + 1.5 + shift, row["other_class"][measure])], look)


def _plot(axes: Axes, points: list[tuple[float, Any]], look: Mapping[str, Any]) -> None:
    known = [
        (x, s["value"], s["low"], s["high"]) for x, s in points if s and s["value"] is not None
    ]
    if known:
        x, value, *_ = zip(*known, strict=True)
        axes.plot(x, value, **look)
    bars = [(x, low, high) for x, _, low, high in known if low is not None]
    if bars:
        x, low, high = zip(*bars, strict=True)
        axes.vlines(x, low, high, color=look["color"], linewidth=0.8, alpha=0.7)


def _label(axes: Axes, title: str, layers: list[str], mode: str) -> None:
    axes.set_title(title, fontsize=9)
    ticks = ["trained", *layers, "other class"]
    places = [*range(len(layers) + 1), len(layers) + 1.5]
    if mode != "cascading":
        ticks, places = ticks[1:], places[1:]
    axes.set_xticks(places, ticks, rotation=90)
    axes.tick_params(labelsize=7)
    axes.axvline(len(layers) + 0.75, color="0.8", linewidth=0.8)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "random from the output down to here" if mode == "cascading" else "random alone", fontsize=7
    )


def _short(name: str) -> str:
    """A layer's name, its beginning left out where it is long."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"

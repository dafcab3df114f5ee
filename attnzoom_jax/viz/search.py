"""A picture of a search for hyper-parameters."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator


def save_search(path: pathlib.Path, found: Mapping[str, Any], searched: Mapping[str, Any]) -> None:
    """Draw the values of all trials against each searched key, a panel each.

    Args:
        path: of the PNG file.
        found: the metric, the best trial and all trials, as tools/sweep.py writes them down.
        searched: {config key: `Key` of training/search.py}.
    """
    columns = min(4, len(searched))
    rows = -(-len(searched) // columns)
    size = (3.1 * columns + 0.8, 2.6 * rows + 0.4)
    figure = matplotlib.figure.Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(searched) :]:
        axes.set_axis_off()
    for axes, (name, key) in zip(panels.flat, searched.items(), strict=False):
        points = _draw_panel(axes, name, key, found)
    for axes in panels[:, 0]:
        axes.set_ylabel(found["metric"])
    bar = figure.colorbar(points, ax=panels, aspect=15 * rows, pad=0.01, label="trial")
    bar.locator = MaxNLocator(integer=True)
    count = len(found["trials"])
    figure.suptitle(f"{count} trials; ring: the best one, cross: failed", fontsize=9)
    figure.savefig(path)


def _draw_panel(axes: Axes, name: str, key: Any, found: Mapping[str, Any]) -> Any:
    """Points coloured by trial; the best one in a ring, failed ones as crosses at the bottom."""
    is_choice = key.kind == "choice"
    rows = []
    for trial in found["trials"]:
        value = trial["params"].get(name)
        if is_choice and value in key.values:
            # Beside one another, so that equal values do not hide each other.
            value = key.values.index(value) + 0.08 * (trial["number"] % 5 - 2)
        if value is not None:
            rows.append((value, trial["value"], trial["number"]))
    complete = [row for row in rows if row[1] is not None]
    x, y, number = zip(*complete, strict=True) if complete else ((), (), ())
    look = {"cmap": "viridis", "vmin": 0, "vmax": max(1, len(found["trials"]) - 1)}
    points = axes.scatter(x, y, c=number, s=28, edgecolors="black", linewidths=0.4, **look)
    for row in complete:
        if row[2] == found["best"]["number"]:
            axes.scatter(*row[:2], s=120, facecolors="none", edgecolors="tab:red", linewidths=1.5)
    failed = [row[0] for row in rows if row[1] is None]
    bottom = axes.get_xaxis_transform()
    axes.scatter(failed, [0.05] * len(failed), c="tab:red", marker="x", s=28, transform=bottom)
    if is_choice:
        axes.set_xticks(range(len(key.values)), [str(value) for value in key.values])
        axes.set_xlim(-0.5, len(key.values) - 0.5)
    else:
        axes.set_xscale("log" if key.kind == "log" else "linear")
        low, high = key.values
        ends = (low / 1.5, high * 1.5) if key.kind == "log" else (low, high)
        axes.set_xlim(*ends)
    where = [f"{other} is {' or '.join(map(str, of))}" for other, of in key.only_where.items()]
    axes.set_title(f"where {' and '.join(where)}" if where else "", fontsize=8)
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return points

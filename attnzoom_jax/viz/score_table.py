"""The table of scores of attribution methods: as text, Markdown, CSV, LaTeX and as a figure.

A table is what the evaluator `attribution_table` writes as JSON:

    {"metrics": {metric: {"label": str, "better": "higher" or "lower", "unit": "%" or ""}},
     "rows": [{"row": "grad_cam@stage4", "method": str, "tap": str,
               "scores": {metric: {"value", "low", "high", "count"}}}],
     "counts": {what: int}, "problems": {kind: {"count": int, "first": [str]}}}

Scores of the unit "%" are fractions in it, and percent where a person reads them. A score that is
missing, null or NaN is left blank; one without an interval stands alone.
"""

import csv
import math
import pathlib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.viz.curves import COLORS

BASELINE = "center"  # the row that asks no network
COLUMNS = 6  # panels beside one another
ARROWS = {"higher": "↑", "lower": "↓"}

LINE = {"color": "0.35", "linestyle": "--", "linewidth": 1.0}
DOT = {"color": COLORS[0], "marker": "o", "markersize": 4}
BEST = {"color": COLORS[1], "marker": "D", "markersize": 4.5}
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}

Table = Mapping[str, Any]
Style = Callable[[str, str, bool], str]  # (value, "low, high" or "", whether it is best) -> cell


class _Scores(NamedTuple):
    """The scores of all rows in one metric, [rows] each, in percent where it is; NaN: missing."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    is_best: np.ndarray  # bool, as printed; none where there are not two to compare


def text(table: Table, *, width: int = 120) -> str:
    """The table for a terminal, with what was counted and what went wrong below it.

    Args:
        table: see above.
        width: characters, beyond which further metrics begin a new block of lines.

    Returns:
        Lines.
    """
    rows = ["", "", *(row["row"] for row in table["rows"])]
    columns = [
        [_label(about), f"{about['better']} is better", *_cells(table, metric, _plain)]
        for metric, about in table["metrics"].items()
    ]
    names = max(map(len, rows))
    blocks: list[list[list[str]]] = [[]]
    used = names
    for column in columns:
        needed = 2 + max(map(len, column))
        if blocks[-1] and used + needed > width:
            blocks.append([])
            used = names
        blocks[-1].append([f"  {cell:>{needed - 2}}" for cell in column])
        used += needed
    lines = []
    for block in blocks:
        for name, *cells in zip(rows, *block, strict=True):
            lines.append(f"{name:<{names}}{''.join(cells)}".rstrip())
        lines.append("")
    return "\n".join([*lines, *notes(table)]).rstrip("\n")


def markdown(table: Table, metrics: Sequence[str]) -> str:
    """The table in Markdown, the best of each metric bold.

    Args:
        table: see above.
        metrics: which, in this order.

    Returns:
        Lines.

    Raises:
        ValueError: a metric that the table does not have.
    """
    for metric in metrics:
        if metric not in table["metrics"]:
            raise unknown_name("metric of the table", metric, table["metrics"])
    columns = [_cells(table, metric, _marked) for metric in metrics]
    heads = [_title(table["metrics"][metric]) for metric in metrics]
    lines = [f"| | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
    for row, *cells in zip(table["rows"], *columns, strict=True):
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(table: Table) -> list[str]:
    """What was counted, and which problems there were, a line for each kind."""
    counts = ", ".join(f"{what.replace('_', ' ')}: {n}" for what, n in table["counts"].items())
    lines = [counts] if counts else []
    for kind, found in table["problems"].items():
        first = "; ".join(found["first"])
        rest = found["count"] - len(found["first"])
        more = f"; and {rest} more" if rest > 0 and first else ""
        lines.append(f"{kind.replace('_', ' ')}: {found['count']} ({first}{more})")
    return lines


def write_csv(table: Table, path: pathlib.Path) -> None:
    """Write all numbers, unrounded: a line per row, four columns per metric.

    Args:
        table: see above.
        path: of the file.
    """
    parts = ("value", "low", "high", "count")
    names = [f"{metric}_{part}" for metric in table["metrics"] for part in parts]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "method", "tap", *names])
        for row in table["rows"]:
            scores = [row["scores"].get(metric) or {} for metric in table["metrics"]]
            cells = [score.get(part) for score in scores for part in parts]
            known = ["" if cell is None or math.isnan(cell) else cell for cell in cells]
            writer.writerow([row["row"], row.get("method", ""), row.get("tap", ""), *known])


def write_latex(table: Table, path: pathlib.Path) -> None:
    """Write a tabular for the package booktabs: intervals as subscripts, the best ones bold.

    Args:
        table: see above.
        path: of the file, which a document takes in by `input`.
    """
    heads = [
        f"{_escape(_label(about))} $\\{'up' if about['better'] == 'higher' else 'down'}arrow$"
        for about in table["metrics"].values()
    ]
    lines = [
        "% \\usepackage{booktabs}; in brackets: interval by bootstrap over images",
        f"\\begin{{tabular}}{{l{'r' * len(heads)}}}",
        "\\toprule",
        " & ".join(["", *heads]) + " \\\\",
        "\\midrule",
    ]
    columns = [_cells(table, metric, _mathematics) for metric in table["metrics"]]
    for row, *cells in zip(table["rows"], *columns, strict=True):
        lines.append(" & ".join([_escape(row["row"]), *cells]) + " \\\\")
    path.write_text("\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n")


def draw(table: Table, path: pathlib.Path) -> None:
    """Draw a panel for each metric: a dot and its interval per row, the baseline as a line.

    Args:
        table: see above.
        path: of the file, .png or .pdf.

    Raises:
        ValueError: a table without rows or metrics.
    """
    metrics, rows = table["metrics"], [row["row"] for row in table["rows"]]
    if not rows or not metrics:
        raise ValueError(f"a table of {len(rows)} rows and {len(metrics)} metrics; expected some")
    is_row = np.array([row != BASELINE for row in rows])
    is_row |= not is_row.any()
    names = [row for row, is_drawn in zip(rows, is_row, strict=True) if is_drawn]
    lines = -(-len(metrics) // COLUMNS)
    columns = -(-len(metrics) // lines)
    width = 1.9 * columns + 0.075 * max(map(len, rows)) + 0.2
    size = (max(width, 4.6), (0.2 * len(names) + 0.75) * lines + 0.35)  # 4.6 for the legend
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    for axes, (metric, about) in zip(grid.flat, metrics.items(), strict=False):
        scores = _scores(table, metric)
        for value, low, high, _ in zip(*(part[~is_row] for part in scores), strict=True):
            axes.axvline(value, **LINE)
            axes.axvspan(low, high, color=LINE["color"], alpha=0.12, linewidth=0)
        _draw_dots(axes, _Scores(*(part[is_row] for part in scores)))
        axes.set_title(textwrap.fill(_title(about), 27), fontsize=8.5)
    grid[0, 0].set_yticks(range(len(names)), names)
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)  # and so of all of them
    dot, best = ({"linewidth": 1.4, **look} for look in (DOT, BEST))
    handles = [Line2D([], [], label="score, interval", **dot), Line2D([], [], label="best", **best)]
    if not is_row.all():
        handles.append(Line2D([], [], label=f"baseline: {BASELINE}", **LINE))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)


def _draw_dots(axes: Axes, scores: _Scores) -> None:
    for y, (value, low, high, is_best) in enumerate(zip(*scores, strict=True)):
        look = BEST if is_best else DOT
        axes.plot([low, high], [y, y], color=look["color"], linewidth=1.4, solid_capstyle="butt")
        axes.plot([value], [y], linestyle="none", **look)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _scores(table: Table, metric: str) -> _Scores:
    about = table["metrics"][metric]
    if about["better"] not in ARROWS:
        raise unknown_name(f"direction in which {metric} is better", about["better"], ARROWS)
    scale = 100.0 if about["unit"] == "%" else 1.0
    found = [row["scores"].get(metric) or {} for row in table["rows"]]
    value, low, high = (
        scale * np.array([score.get(part) for score in found], np.float64)  # None is NaN
        for part in ("value", "low", "high")
    )
    low, high = (np.where(np.isnan(value), np.nan, end) for end in (low, high))
    printed = np.round(value, _decimals(about))
    is_best = np.zeros(len(found), bool)
    if np.isfinite(printed).sum() > 1:
        is_best = printed == (np.nanmax if about["better"] == "higher" else np.nanmin)(printed)
    return _Scores(value, low, high, is_best)


def _cells(table: Table, metric: str, style: Style) -> list[str]:
    """How the scores of all rows are written; "" where there is none."""
    decimals = _decimals(table["metrics"][metric])
    cells = []
    for *numbers, is_best in zip(*_scores(table, metric), strict=True):
        value, low, high = (
            "" if np.isnan(number) else f"{np.round(number, decimals) + 0.0:.{decimals}f}"  # no -0
            for number in numbers
        )
        cells.append(
            style(value, f"{low}, {high}" if low and high else "", is_best) if value else ""
        )
    return cells


def _plain(value: str, interval: str, is_best: bool) -> str:
    return f"{value} [{interval}]" if interval else value


def _marked(value: str, interval: str, is_best: bool) -> str:
    return _plain(f"**{value}**" if is_best else value, interval, is_best)


def _mathematics(value: str, interval: str, is_best: bool) -> str:
    shown = f"\\mathbf{{{value}}}" if is_best else value
    return f"${shown}_{{[{interval}]}}$" if interval else f"${shown}$"


def _decimals(about: Mapping[str, str]) -> int:
    return 1 if about["unit"] == "%" else 3


def _label(about: Mapping[str, str]) -> str:
    return f"{about['label']}, {about['unit']}" if about["unit"] else about["label"]


def _title(about: Mapping[str, str]) -> str:
    return f"{_label(about)} {ARROWS[about['better']]}"


def _escape(text: str) -> str:
    """Text as LaTeX writes it."""
    return re.sub(r"[\\~^]|([&%$#_{}])", lambda m: f"\\{m[1]}" if m[1] else SPECIAL[m[0]], text)

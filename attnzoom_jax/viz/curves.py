"""Curves of robustness: accuracy by level of a corruption and by distance of an attack."""

import collections
import pathlib
import re
from collections.abc import Mapping

import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

# Okabe and Ito's colours, grey for their yellow, told apart by all kinds of colour vision; a run
# has its marker, too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dv<>P"
ATTACKS = ("fgsm", "pgd", "random_search", "transfer")
NORMS = {"linf": "distance in 255ths, maximum norm", "l2": "distance, Euclidean norm"}
COLUMNS = 4

Curve = list[tuple[float, float]]  # (level or distance, accuracy), 0 for the clean images
Curves = dict[tuple[str, str], Curve]  # {(corruption or attack, norm or ""): curve}


def save_robustness_curves(
    path: pathlib.Path,
    runs: Mapping[str, Mapping[str, float]],
    *,
    prefix: str,
    lowest: float = 0.0,
) -> None:
    """Draw the accuracy of runs, a panel for each corruption and each attack.

    Args:
        path: of the PNG file.
        runs: {name: metrics}, as the evaluator `robustness` gives them; up to eight.
        prefix: of the metrics' names.
        lowest: accuracy at the foot of the panels, below 1.

    Raises:
        ValueError: no runs or more than there are colours, no such metrics.
    """
    if not 1 <= len(runs) <= len(COLORS):
        raise ValueError(f"{len(runs)} runs; expected 1 to {len(COLORS)}, the colours there are")
    curves = {name: read_curves(metrics, prefix=prefix) for name, metrics in runs.items()}
    panels = list(dict.fromkeys(panel for found in curves.values() for panel in found))
    panels.sort(key=lambda panel: ["", *NORMS].index(panel[1]))  # one norm after the other
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.4 * columns + 0.4, 2.1 * rows + 0.6)
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    looks = [
        {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.2}
        for color, marker in zip(COLORS, MARKERS, strict=True)
    ]
    for axes, panel in zip(grid.flat, panels, strict=False):
        for found, look in zip(curves.values(), looks, strict=False):
            if panel in found:
                axes.plot(*zip(*found[panel], strict=True), **look)
        _label(axes, panel)
    margin = 0.03 * (1 - lowest)
    grid[0, 0].set_ylim(lowest - margin, 1 + margin)  # and so of all of them
    scores = {_score(metrics, prefix) for metrics in runs.values()}
    for axes, (_, norm) in zip(grid[:, 0], panels[::columns], strict=True):
        of_row = "accuracy" if norm else " or ".join(sorted(scores))
        axes.set_ylabel(of_row.replace("_", " "), fontsize=8)
    names = [Line2D([], [], label=n, **look) for n, look in zip(runs, looks, strict=False)]
    figure.legend(
        handles=names, loc="outside lower center", ncols=min(columns, len(names)), fontsize=8
    )
    figure.savefig(path)


def robustness_table(runs: Mapping[str, Mapping[str, float]], *, prefix: str) -> str:
    """The same as a table in Markdown: a row per corruption and per distance, a column per run.

    Args:
        runs: {name: metrics}, as `save_robustness_curves`.
        prefix: of the metrics' names.

    Returns:
        Lines; percent, of a corruption the mean over its levels.

    Raises:
        ValueError: no such metrics.
    """
    cells: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for name, metrics in runs.items():
        curves = read_curves(metrics, prefix=prefix)
        clean = f"{prefix}/clean_{_score(metrics, prefix)}"
        if clean in metrics:
            cells["clean"][name] = metrics[clean]
        for (kind, norm), curve in curves.items():
            points = [(x, y) for x, y in curve if x > 0]
            if norm:
                for x, y in points:
                    cells[f"{_words(kind)}, {norm} {_distance(norm, x)}"][name] = y
            else:
                cells[_words(kind)][name] = sum(y for _, y in points) / len(points)
    lines = [f"| accuracy, % | {' | '.join(runs)} |", f"|---{'|---:' * len(runs)}|"]
    for row, values in cells.items():
        shown = [f"{100 * values[name]:.1f}" if name in values else "" for name in runs]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def read_curves(metrics: Mapping[str, float], *, prefix: str) -> Curves:
    """The curves in the metrics of the evaluator `robustness`.

    Args:
        metrics: {name: value}.
        prefix: of their names.

    Returns:
        {(corruption, "") or (attack, norm): points}, in the order of the metrics, each curve by
        level or distance and from the clean images on. Of attributes those of corruptions are of
        the balanced accuracy: saying no to every attribute is right most of the time.

    Raises:
        ValueError: there are none.
    """
    curves: Curves = collections.defaultdict(list)
    score = _score(metrics, prefix)
    attack = rf"({'|'.join(ATTACKS)})_({'|'.join(NORMS)})_(.+)_accuracy"
    for name, value in metrics.items():
        folder, _, rest = name.rpartition("/")
        if folder != prefix:
            continue
        if found := re.fullmatch(attack, rest):
            kind, norm, distance = found.groups()
            steps, _, of = distance.partition("_")  # 8_255 is 8/255
            curves[kind, norm].append((float(steps) / float(of or 1), value))
        elif found := re.fullmatch(rf"(.+)_([1-5])_{score}", rest):
            curves[found[1], ""].append((float(found[2]), value))
    if not curves:
        raise ValueError(
            f"no metrics of robustness under {prefix!r}; expected such as "
            f"{prefix}/jpeg_1_accuracy or {prefix}/pgd_linf_8_255_accuracy"
        )
    for (_, norm), curve in curves.items():
        clean = metrics.get(
            f"{prefix}/attack_clean_accuracy" if norm else f"{prefix}/clean_{score}"
        )
        if clean is not None:
            curve.append((0.0, clean))
        curve.sort()
    return dict(curves)


def _score(metrics: Mapping[str, float], prefix: str) -> str:
    """What is drawn of corruptions."""
    is_balanced = f"{prefix}/clean_balanced_accuracy" in metrics
    return "balanced_accuracy" if is_balanced else "accuracy"


def _label(axes: Axes, panel: tuple[str, str]) -> None:
    kind, norm = panel
    axes.set_title(_words(kind), fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(NORMS[norm] if norm else "level (0: clean)", fontsize=7)
    if norm:
        places = sorted({float(x) for line in axes.lines for x in line.get_xdata()})  # pyright: ignore
        axes.set_xticks(places, [_distance(norm, place).removesuffix("/255") for place in places])
    else:
        axes.set_xticks(range(6))


def _words(kind: str) -> str:
    return {"fgsm": "FGSM", "pgd": "PGD", "jpeg": "JPEG"}.get(kind, kind.replace("_", " "))


def _distance(norm: str, distance: float) -> str:
    steps = round(255 * distance, 3)
    return f"{steps:g}/255" if norm == "linf" and distance else f"{distance:g}"

"""A sheet of pictures: titled blocks of rows, what each column shows, colour bars below."""

import dataclasses
import functools
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib.colors
import matplotlib.figure
from matplotlib.axes import Axes

from attnzoom_jax.viz import overlay

GAP, LINE, HEADING, NOTE, FOOT = 0.1, 0.1, 0.28, 0.15, 0.5  # inches
LETTER = 0.046  # width of one, on average, at the size of titles
MOST_LINES = 4


@dataclasses.dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        title: wrapped where it is wider than the picture.
        draw: draws it into axes.
    """

    title: str
    draw: Callable[[Axes], None]


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows that belong together.

    Attributes:
        title: of the block, "" for none.
        rows: of cells, at least one, all of one length.
        note: a second line under the title.
    """

    title: str
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Scale:
    """A colour bar.

    Attributes:
        label: what it shows.
        norm: from values to colours; None for [0, 1].
        ticks: values that are named.
        color_map: of Matplotlib.
    """

    label: str
    norm: matplotlib.colors.Normalize | None = None
    ticks: Sequence[float] = (0, 0.5, 1)
    color_map: str = overlay.COLOR_MAP


def explanation_cells(explanation: overlay.Explanation) -> list[Cell]:
    """The cells of an image: itself, then each of its maps over it."""

    def draw(axes: Axes, panel: overlay.Panel) -> None:
        overlay.show_image(axes, overlay.blend(explanation.image, panel))
        if panel.note:
            overlay.write_note(axes, panel.note)

    image = Cell(explanation.title, functools.partial(overlay.show_image, image=explanation.image))
    maps = [Cell(panel.title, functools.partial(draw, panel=panel)) for panel in explanation.panels]
    return [image, *maps]


def save_sheet(
    path: pathlib.Path,
    blocks: Sequence[Block],
    scales: Mapping[int, Scale],
    *,
    side: float = 1.3,
    per_row: int = 2,
) -> None:
    """Write blocks of pictures, `per_row` blocks beside one another.

    Args:
        path: of the PNG file.
        blocks: in reading order.
        scales: {column of a block: its colour bar}.
        side: of a picture, in inches.
        per_row: blocks beside one another.
    """
    columns = len(blocks[0].rows[0])
    titles = {cell.title: _wrap(cell.title, side) for b in blocks for row in b.rows for cell in row}
    title = 0.08 + LINE * max(text.count("\n") + 1 for text in titles.values())
    has_notes = any(block.note for block in blocks)
    heading = HEADING if any(block.title for block in blocks) else 0.0
    heading += NOTE if has_notes else 0.0
    per_row = min(per_row, len(blocks))
    lines = [blocks[i : i + per_row] for i in range(0, len(blocks), per_row)]
    heights = [heading + max(len(block.rows) for block in line) * (side + title) for line in lines]
    block_width = columns * (side + GAP) + 2 * GAP
    width, height = per_row * block_width, sum(heights) + FOOT
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150)

    def axes_at(left: float, bottom: float, w: float, h: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, w / width, h / height))

    top = height
    for line, line_height in zip(lines, heights, strict=True):
        for i, block in enumerate(line):
            left = i * block_width + GAP
            place = {"x": left / width, "va": "top"}
            figure.text(y=(top - 0.15) / height, s=block.title, fontsize=8, weight="bold", **place)
            figure.text(y=(top - 0.15 - NOTE) / height, s=block.note, fontsize=6, **place)
            for row, cells in enumerate(block.rows):
                bottom = top - heading - (row + 1) * (side + title)
                for column, cell in enumerate(cells):
                    axes = axes_at(left + column * (side + GAP), bottom, side, side)
                    axes.set_title(titles[cell.title], fontsize=6, loc="left", pad=2)
                    cell.draw(axes)
        top -= line_height
    for i in range(per_row):
        for column, scale in scales.items():
            left = i * block_width + GAP + column * (side + GAP)
            bar = axes_at(left + 0.1 * side, 0.34, 0.8 * side, 0.07)
            look = {"color_map": scale.color_map, "norm": scale.norm, "ticks": scale.ticks}
            overlay.draw_color_bar(figure, bar, scale.label, **look)
    figure.savefig(path)


def _wrap(title: str, width: float) -> str:
    """A title in lines of `width` inches, cut where it is too long."""
    letters = int(width / LETTER)
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, letters)]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"{lines[MOST_LINES - 1][: letters - 3]}..."]
    return "\n".join(lines)

"""Maps over images: one picture per image, and a contact sheet of many.

Works on NumPy arrays and draws without a screen. The colour map is perceptually uniform and can be
read by colour-blind people.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

COLOR_MAP = "inferno"
EMPTY = 1e-12


@dataclasses.dataclass(frozen=True)
class Panel:
    """One map, ready to be shown over its image.

    Attributes:
        title: what it is.
        values: float [h, w], of the image's size, on the colour scale from 0 to `top`.
        top: value at the upper end of the colour scale.
        scale: what the colour scale shows.
        note: what must be said about it, "" for nothing.
    """

    title: str
    values: np.ndarray
    top: float
    scale: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """An image with its maps.

    Attributes:
        name: of the image, for file names.
        title: what was predicted, what it is.
        image: uint8 [h, w, 3].
        panels: its maps; the same ones for all images of a contact sheet.
    """

    name: str
    title: str
    image: np.ndarray
    panels: Sequence[Panel]


def class_map_panel(title: str, values: np.ndarray) -> Panel:
    """The panel of a class map: its positive part, scaled to its own maximum."""
    scale = "share of the map's maximum"
    positive = np.maximum(values, 0)
    top = float(positive.max())
    if not np.isfinite(top):
        return Panel(title, np.zeros_like(values), 1.0, scale, "map holds NaN or infinity")
    note = "no positive evidence" if top < EMPTY else ""
    return Panel(title, positive, top if top >= EMPTY else 1.0, scale, note)


def mask_panel(title: str, values: np.ndarray) -> Panel:
    """The panel of an attention mask in [0, 1], on the full scale; says when it does nothing."""
    if not np.isfinite(values).all():
        return Panel(title, np.zeros_like(values), 1.0, "mask", "mask holds NaN or infinity")
    note = ""
    if values.min() > 1 - 1e-6:  # resizing may take a rounding error off
        note = "mask is 1 everywhere: it fades nothing"
    elif np.ptp(values) < 1e-6:
        note = f"mask is {values.flat[0]:.3f} everywhere"
    return Panel(title, values, 1.0, "mask", note)


def blend(image: np.ndarray, panel: Panel, *, opacity: float = 0.55) -> np.ndarray:
    """Lay a panel's colours over an image.

    Args:
        image: uint8 [h, w, 3].
        panel: map of the same height and width.
        opacity: of the colours where the map is at its top; 0 shows the image alone.

    Returns:
        uint8 [h, w, 3].
    """
    share = np.clip(panel.values / panel.top, 0, 1)[..., None]  # [h, w, 1]
    colors = matplotlib.colormaps[COLOR_MAP](share[..., 0])[..., :3]
    grey = image.mean(axis=-1, keepdims=True) / 255
    mixed = (1 - opacity) * grey + opacity * colors
    return np.round(np.clip(mixed, 0, 1) * 255).astype(np.uint8)


def save_explanation(path: pathlib.Path, explanation: Explanation) -> None:
    """Write the picture of one image: the image, then each map over it."""
    _save_grid(path, [explanation], side=2.6, per_row=1)


def save_contact_sheet(
    path: pathlib.Path, explanations: Sequence[Explanation], *, per_row: int = 2
) -> None:
    """Write one picture of many images, `per_row` of them beside one another."""
    _save_grid(path, explanations, side=1.6, per_row=min(per_row, len(explanations)))


def _save_grid(
    path: pathlib.Path, explanations: Sequence[Explanation], *, side: float, per_row: int
) -> None:
    """Draw images and maps as squares of `side` inches, with the colour bars below."""
    columns = 1 + len(explanations[0].panels)
    rows = -(-len(explanations) // per_row)
    gap, title, foot = 0.12, 0.34, 0.55
    block = columns * (side + gap) + gap  # width of one explanation
    width, height = per_row * block + gap, rows * (side + title) + foot
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=120)

    def axes_at(left: float, bottom: float, w: float, h: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, w / width, h / height))

    for i, explanation in enumerate(explanations):
        left = gap + (i % per_row) * block
        bottom = height - (i // per_row + 1) * (side + title)
        axes = axes_at(left, bottom, side, side)
        axes.set_title(explanation.title, fontsize=6.5, loc="left", pad=2)
        show_image(axes, explanation.image)
        for column, panel in enumerate(explanation.panels, start=1):
            axes = axes_at(left + column * (side + gap), bottom, side, side)
            axes.set_title(panel.title, fontsize=6.5, loc="left", pad=2)
            show_image(axes, blend(explanation.image, panel))
            if panel.note:
                write_note(axes, panel.note)
    for column, panel in enumerate(explanations[0].panels, start=1):
        bar = axes_at(gap + column * (side + gap) + 0.1 * side, 0.38, 0.8 * side, 0.07)
        draw_color_bar(figure, bar, panel.scale)
    figure.savefig(path)


def show_image(axes: Axes, image: np.ndarray) -> None:
    """Draw an image uint8 [h, w, 3], its pixels as squares."""
    axes.imshow(image, interpolation="nearest")
    axes.set_axis_off()


def write_note(axes: Axes, note: str) -> None:
    """Write a line over the foot of a picture."""
    box = {"facecolor": "black", "alpha": 0.75, "pad": 1.5, "edgecolor": "none"}
    place = {"transform": axes.transAxes, "ha": "center", "va": "bottom"}
    axes.text(0.5, 0.03, note, fontsize=5.5, color="white", bbox=box, **place)


def draw_color_bar(
    figure: matplotlib.figure.Figure,
    axes: Axes,
    label: str,
    *,
    color_map: str = COLOR_MAP,
    norm: matplotlib.colors.Normalize | None = None,
    ticks: Sequence[float] = (0, 0.5, 1),
) -> None:
    """Draw a lying colour bar into axes of its own; the scale is [0, 1] unless `norm` says so."""
    scale = matplotlib.cm.ScalarMappable(norm or matplotlib.colors.Normalize(0, 1), color_map)
    bar = figure.colorbar(scale, cax=axes, orientation="horizontal")
    bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=6, length=2, pad=1)
    bar.ax.set_xlabel(label, fontsize=6, labelpad=1)

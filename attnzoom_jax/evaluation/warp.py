"""Images warped by attention: what a network attends to, shown large.

The warp is that of the layer ZoomWarp (layers/zoom_warp.py), with the attention given. Images are
enlarged first, each pixel to a square, so that one sees what happens to it.

Source: the kind of picture is that of DeAlcala et al. 2025 (AttZoom, arXiv 2508.03625, section
6.2), who give no formula; the warp is that of Recasens et al. 2018 (arXiv 1809.03355).
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax import attribution
from attnzoom_jax.attribution.methods import takes
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.examples import Examples, target_ids
from attnzoom_jax.evaluation.maps import Arrays, as_function, compute_maps, save_arrays
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.layers.zoom_warp import ZoomWarp
from attnzoom_jax.models.taps import default_tap
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.ops.warp import dense_grid
from attnzoom_jax.viz import overlay, warp_grid

# Fields of ZoomWarp that a picture of it can choose.
OPTIONS = (
    *("grid", "cells", "weighting", "temperature", "floor"),
    *("strength", "fwhm", "marginal", "max_zoom"),
)
# A mask or a positive map, on its own scale: the largest value weighs 20 times as much as zero.
DEFAULTS = {"weighting": "power", "floor": 0.05}
MOST = 16.0  # magnification that is told apart


@dataclasses.dataclass(frozen=True)
class Warps:
    """Warped images.

    Attributes:
        warped: uint8 [n, height, width, 3], the enlarged images, warped.
        saliency: float32 [n, cells, cells], what the warp follows; sums to 1.
        grid: float32 [n, height, width, 2], where each pixel comes from: (y, x) in pixels of the
            image before it is enlarged, centres of pixels at whole numbers.
        magnification: float32 [n, height, width], of lengths, in proportion to the enlarged image.
    """

    warped: np.ndarray
    saliency: np.ndarray
    grid: np.ndarray
    magnification: np.ndarray


def warp_images(
    images: np.ndarray,
    attention: np.ndarray,
    *,
    options: Mapping[str, Any] | None = None,
    least_side: int = 256,
) -> Warps:
    """Warp images by maps.

    Args:
        images: uint8 [n, h, w, 3].
        attention: [n, h', w'], any scale; negative values count as none.
        options: fields of ZoomWarp, those in OPTIONS; others than given are DEFAULTS and the
            layer's own.
        least_side: the shorter side is enlarged to at least this, by a whole number.

    Returns:
        The warps. Where attention is the same everywhere, the enlarged images themselves.

    Raises:
        ValueError: unknown option, or one out of range; attention that holds NaN or infinity.
    """
    options = {**DEFAULTS, **(options or {})}
    for name, value in options.items():
        _check_option(name, value)
    if not np.isfinite(attention).all():
        raise ValueError("the attention holds NaN or infinity; nothing can be warped by it")
    _, h, w, _ = images.shape
    factor = max(1, math.ceil(least_side / min(h, w)))
    layer = ZoomWarp(**options)

    @jax.jit
    def warp(large: jax.Array, attention: jax.Array) -> tuple[jax.Array, ...]:
        seen = ops_maps.positive(attention)
        warped, gates = attribution.read_taps(lambda x: layer.apply({}, x, seen), large, ["gate"])
        grid = dense_grid(layer.grid_of(gates["gate"], (factor * h, factor * w)))
        return warped, gates["gate"][..., 0], grid

    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    warped, saliency, grid = map(np.asarray, warp(large, attention))
    return Warps(
        warped=np.round(warped).astype(np.uint8),
        saliency=saliency,
        grid=(grid + 0.5) / factor - 0.5,
        magnification=magnification(grid),
    )


def magnification(grid: np.ndarray) -> np.ndarray:
    """How much longer things become at each pixel of the output, where both sizes are the same.

    Args:
        grid: dense [n, height, width, 2], (y, x) in pixels, at least 2 x 2.

    Returns:
        float32 [n, height, width]: 1 / sqrt(det(d grid / d output)), by differences of
        neighbours; 1 for the identity, 2 where an area of the input takes four times its size. At
        most MOST, also where the grid is folded.
    """
    (yy, yx), (xy, xx) = (np.gradient(grid[..., i], axis=(1, 2)) for i in (0, 1))
    area = np.maximum(yy * xx - yx * xy, MOST**-2)
    return (1 / np.sqrt(area)).astype(np.float32)


def draw_warps(
    trained: TrainedModel,
    examples: Examples,
    out: pathlib.Path,
    *,
    method: str = "",
    options: Mapping[str, Any] | None = None,
    tap: str = "",
    target: str = "predicted",
) -> Arrays:
    """Warp images by what a model attends to; write warp_<image>.png, warp_sheet.png, warp.npz.

    Args:
        trained: the model.
        examples: the images.
        out: folder, is created.
        method: whose map is the attention; "" for the mask at `tap`, Grad-CAM where that is none.
        options: of the warp and of the method; each goes to those that have it.
        tap: "" for the first mask, or with a method for the last spatial tap.
        target: class of the method's map: "predicted", "label" or a class id.

    Returns:
        What warp.npz holds.

    Raises:
        ValueError: unknown method, option, tap or class.
    """
    method, tap = choose_attention(trained, method, tap)
    options = dict(options or {})
    of_method = {name: v for name, v in options.items() if method and takes(method, name)}
    of_warp = {name: v for name, v in options.items() if name in OPTIONS or name not in of_method}
    place = "the image" if method and not takes(method, "tap") else f"tap {tap!r}"
    print(f"attention: {method or 'the mask'} at {place}", flush=True)
    results = compute_maps(
        trained,
        examples.images,
        target_ids(target, examples, trained.class_names),
        methods=[method] if method else [],
        options=of_method,
        tap=tap,
        gates=[] if method else [tap],
    )
    attention = ops_maps.positive(jnp.asarray(results[method or tap]))
    warps = warp_images(examples.images, np.asarray(attention), options=of_warp)
    arrays = {
        "names": np.array(examples.names),
        "labels": examples.labels,
        "predicted": results["predicted"],
        "probability": results["probabilities"].max(axis=1),
        "attention": np.asarray(attention),
        **{field.name: getattr(warps, field.name) for field in dataclasses.fields(warps)},
    }
    out.mkdir(parents=True, exist_ok=True)
    save_arrays(out / "warp.npz", arrays)
    title = method.replace("_", " ") or f"mask {tap}"
    _save_pictures(out, examples, arrays, title, trained.short_names)
    return arrays


def choose_attention(trained: TrainedModel, method: str, tap: str) -> tuple[str, str]:
    """What a picture is warped by.

    Args:
        trained: the model.
        method: "" where none was asked for.
        tap: "" where none was asked for.

    Returns:
        The method, "" for a mask, and the tap: without wishes the first mask, in networks without
        any Grad-CAM at the last spatial tap. A tap that is no mask needs a method, too: Grad-CAM.
    """
    fn, shape = as_function(trained)
    taps = attribution.list_taps(fn, shape)
    masks = attribution.gate_taps(taps)
    if not method and not tap and masks:
        return "", masks[0]
    if not method and tap in masks:
        return "", tap
    return method or "grad_cam", tap or default_tap(trained.model, fn, shape)


def _check_option(name: str, value: Any) -> None:
    """What the warp itself does not check of an option that a person typed: its name and kind."""
    if name not in OPTIONS:
        raise unknown_name("option of the warp", name, OPTIONS)
    default = ZoomWarp.__dataclass_fields__[name].default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value != default and is_number == isinstance(default, str):
        expected = "a number" if not isinstance(default, str) else f"a word such as {default!r}"
        raise ValueError(f"option {name} of the warp is {value!r}; expected {expected}")


def _save_pictures(
    out: pathlib.Path, examples: Examples, arrays: Arrays, title: str, class_names: tuple[str, ...]
) -> None:
    """Write a picture per image, and the sheet with the right and the wrong ones apart."""
    h, w = examples.images.shape[1:3]
    resized = np.asarray(ops_maps.resize(jnp.asarray(arrays["attention"]), (h, w)))
    blocks: dict[str, list[warp_grid.Warp]] = {"right": [], "wrong": [], "": []}
    for i, name in enumerate(examples.names):
        panel = overlay.class_map_panel(title, resized[i])
        if not panel.note and np.ptp(arrays["saliency"][i]) < 1e-5 * arrays["saliency"][i].max():
            panel = dataclasses.replace(panel, note="the same everywhere: nothing moves")
        label, predicted = int(examples.labels[i]), int(arrays["predicted"][i])
        block = "" if label < 0 else "right" if label == predicted else "wrong"
        said = f"{class_names[predicted]} {arrays['probability'][i]:.2f}"
        verdict = {
            "right": f"right: {said}",
            "wrong": f"wrong: predicted\n{said},\nis {class_names[label]}",
            "": f"predicted {said}",
        }[block]
        picture = warp_grid.Warp(
            overlay.Explanation(name, verdict, examples.images[i], [panel]),
            warped=arrays["warped"][i],
            grid=arrays["grid"][i],
            magnification=arrays["magnification"][i],
        )
        warp_grid.save_warps(out / f"warp_{name}.png", {"": [picture]}, side=2.4)
        blocks[block].append(picture)
    warp_grid.save_warps(out / "warp_sheet.png", blocks)

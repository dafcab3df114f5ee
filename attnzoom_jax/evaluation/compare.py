"""Where two networks look on the same images, at the same map resolution.

A network with a zoom inside has finer maps, and finer maps look, and score, differently for that
alone. So the positive parts of both maps are averaged over the pixels of the coarser grid, and are
then shown and scored; the native maps stand beside them. Averaging keeps a map's energy.

Images fall into blocks by who is right, so that nobody can pick: both, neither, only one.

Source: DeAlcala et al. 2025 (AttZoom, arXiv 2508.03625, figure 2) show where both are right and
where both are wrong, at native resolution and without numbers.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.attribution.methods import takes
from attnzoom_jax.evaluation.examples import Examples, join, target_ids
from attnzoom_jax.evaluation.maps import (
    Arrays,
    as_function,
    map_function,
    save_arrays,
    say_progress,
)
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.metrics import localization
from attnzoom_jax.models.taps import default_tap
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.viz import overlay, sheet

SIDES: tuple[str, str] = ("this", "other")
BLOCKS: tuple[str, ...] = (
    "both_right",
    "both_wrong",
    "only_this_right",
    "only_other_right",
    "unlabelled",
)
# What must be the same, so that both networks see the same images.
SAME_DATA = ("name", "resize", "image_size", "crop_size")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two networks on the same images.

    Attributes:
        scores: {name: [n]} of all images: names, labels, targets, blocks, and of each side
            predicted, probability (of the prediction), empty (no positive value in the map) and,
            for each mask, its share of the image, and the share of the map's energy inside it, at
            the common and at the native resolution.
        shown: the first images of each block.
        maps: {side: raw maps [s, h', w']} of those.
        common: {side: [s, a, b]}, their positive parts at the common resolution.
        rows: where in `scores` the shown images are.
    """

    scores: Arrays
    shown: Examples
    maps: Arrays
    common: Arrays
    rows: np.ndarray


def check_comparable(this: TrainedModel, other: TrainedModel) -> None:
    """Raise a ValueError that lists what two runs should have in common and have not."""

    def facts(run: TrainedModel) -> dict[str, Any]:
        names = ", ".join(run.class_names)
        classes = f"{len(run.class_names)} ({names[:60]}{'...' if len(names) > 60 else ''})"
        data = {f"data.{key}": run.config.data[key] for key in SAME_DATA}
        return {"classes": classes, "image shape": run.image_shape, **data}

    ours, theirs = facts(this), facts(other)
    differing = [f"{k} {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    if this.class_names != other.class_names and not differing:
        differing = ["the names of some classes"]
    if differing:
        raise ValueError(
            "--workdir and --other_workdir cannot be compared, they differ in: "
            + "; ".join(differing)
        )


def area_average(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps on a coarser grid: the mean over each of its pixels, parts of pixels by their area.

    Args:
        maps: float [n, h, w].
        size: (rows, columns), at most (h, w).

    Returns:
        float32 [n, rows, columns], of the same mean.
    """
    rows, columns = size
    if rows > maps.shape[1] or columns > maps.shape[2]:
        raise ValueError(f"size is {size}; expected at most {maps.shape[1:]}, that of the maps")
    maps = np.asarray(maps, np.float32)
    small = [cv2.resize(m, (columns, rows), interpolation=cv2.INTER_AREA) for m in maps]
    return np.stack(small)


def at_common_size(maps: Arrays) -> Arrays:
    """The positive parts of maps {name: [n, h, w]} on the coarsest of their grids, per axis."""
    rows, columns = np.min([values.shape[1:] for values in maps.values()], axis=0)
    return {
        name: area_average(np.maximum(values, 0), (int(rows), int(columns)))
        for name, values in maps.items()
    }


def compare(
    this: TrainedModel,
    other: TrainedModel,
    chunks: Iterable[Examples],
    count: int,
    *,
    method: str = "grad_cam",
    options: Mapping[str, Any] | None = None,
    taps: tuple[str, str],
    target: str = "",
    shown: int = 4,
    chunk_size: int = 32,
) -> Comparison:
    """Compare two networks on the same images.

    Args:
        this: one network.
        other: the other one, see `check_comparable`.
        chunks: images, with masks where there are any.
        count: images in all chunks.
        method: a name from attribution's METHODS.
        options: of the method.
        taps: where the maps of the one and of the other are taken.
        target: class of both maps: "predicted" (by `this`), "label" or a class id; "" for the
            label where it is known, else as predicted.
        shown: images of each block to keep.
        chunk_size: images per chunk, and per call of the program.

    Returns:
        The comparison.

    Raises:
        ValueError: unknown method, option, tap or class.
    """
    request = {"methods": [method], "options": options, "chunk_size": chunk_size}
    functions = [
        map_function(r, tap=t, **request) for r, t in zip((this, other), taps, strict=True)
    ]
    lots, kept, rows, room = [], [], [], collections.Counter(dict.fromkeys(BLOCKS, shown))
    for number, chunk in enumerate(say_progress(chunks, count, chunk_size)):
        start = number * chunk_size
        targets = target_ids(target, chunk, this.class_names) if target else chunk.labels
        results = [functions[0](chunk.images, targets, start)]
        results.append(functions[1](chunk.images, results[0]["targets"], start))
        maps: Arrays = dict(zip(SIDES, (result[method] for result in results), strict=True))
        common = at_common_size(maps)
        lots.append(_outcomes(chunk, results) | _energies(chunk, maps, common))
        for i, block in enumerate(lots[-1]["blocks"]):
            if room[block] > 0:
                room[block] -= 1
                rows.append(start + i)
                kept.append([chunk.take([i]), *(_row(m, i) for m in (maps, common))])
    examples, native, coarse = zip(*kept, strict=True)
    return Comparison(
        scores={name: np.concatenate([lot[name] for lot in lots]) for name in lots[0]},
        shown=join(examples),
        maps={side: np.stack([maps[side] for maps in native]) for side in SIDES},
        common={side: np.stack([maps[side] for maps in coarse]) for side in SIDES},
        rows=np.array(rows),
    )


def draw_comparison(
    runs: tuple[TrainedModel, TrainedModel],
    chunks: Iterable[Examples],
    count: int,
    out: pathlib.Path,
    *,
    names: tuple[str, str] = SIDES,
    method: str = "grad_cam",
    taps: tuple[str, str] = ("", ""),
    **request: Any,
) -> Comparison:
    """Compare two networks; write compare.png, compare.npz and compare.json.

    Args:
        runs: both networks.
        chunks: images, with masks where there are any.
        count: images in all chunks.
        out: folder, is created.
        names: of both, in the picture.
        method: a name from attribution's METHODS.
        taps: where the maps are taken; "" for the last spatial tap of that network.
        **request: options, target, shown and chunk_size, as `compare` takes them.

    Returns:
        The comparison.

    Raises:
        ValueError: as `compare`.
    """
    this, other = (
        tap or default_tap(run.model, *as_function(run))
        for run, tap in zip(runs, taps, strict=True)
    )
    places = [f"tap {tap!r}" if takes(method, "tap") else "the image" for tap in (this, other)]
    print(f"{method} at {places[0]} of {names[0]}, {places[1]} of {names[1]}", flush=True)
    result = compare(*runs, chunks, count, method=method, taps=(this, other), **request)
    out.mkdir(parents=True, exist_ok=True)
    shown = {f"{side}_maps": result.maps[side] for side in SIDES}
    shown |= {f"{side}_common_maps": result.common[side] for side in SIDES}
    save_arrays(out / "compare.npz", {**result.scores, **shown, "shown": result.rows})
    table = summarize(result.scores)
    facts = {
        side: {"name": name, "step": run.step, "tap": tap, "map": result.maps[side].shape[1:]}
        for side, name, run, tap in zip(SIDES, names, runs, (this, other), strict=True)
    }
    known = "label" if (result.scores["labels"] >= 0).all() else "predicted"
    facts |= {"method": method, "class": request.get("target") or known}
    facts |= {"common_map": result.common["this"].shape[1:], "blocks": table}
    (out / "compare.json").write_text(json.dumps(facts, indent=2) + "\n")
    blocks = _picture_blocks(result, table, names, runs[0].short_names)
    scale = sheet.Scale("share of the map's maximum")
    sheet.save_sheet(out / "compare.png", blocks, {1: scale})
    return result


def summarize(scores: Arrays) -> dict[str, dict[str, Any]]:
    """Per block the number of images, and the means of what is a number or a yes or no.

    Args:
        scores: as `Comparison` holds them.

    Returns:
        {block: {"count": n, score: mean}}, and the same under "all"; None for a mean over nothing
        and for one that is no number.
    """
    skipped = ("names", "labels", "targets", "blocks", "this_predicted", "other_predicted")
    table = {}
    for block in (*BLOCKS, "all"):
        inside = np.isin(scores["blocks"], BLOCKS if block == "all" else block)
        if block == "unlabelled" and not inside.any():
            continue
        table[block] = {"count": int(inside.sum())}
        for name, values in scores.items():
            if name not in skipped:
                mean = float(values[inside].mean()) if inside.any() else math.nan
                table[block][name] = mean if math.isfinite(mean) else None
    return table


def _row(arrays: Arrays, i: int) -> Arrays:
    return {name: values[i] for name, values in arrays.items()}


def _outcomes(chunk: Examples, results: list[Arrays]) -> Arrays:
    """Who predicts what, and which block each image of a chunk belongs to."""
    right = [result["predicted"] == chunk.labels for result in results]
    blocks = np.select(
        [chunk.labels < 0, right[0] & right[1], right[0], right[1]],
        ["unlabelled", "both_right", "only_this_right", "only_other_right"],
        "both_wrong",
    )
    outcomes = {
        "names": np.array(chunk.names),
        "labels": chunk.labels,
        "targets": results[0]["targets"],
        "blocks": blocks,
    }
    for side, result in zip(SIDES, results, strict=True):
        outcomes[f"{side}_predicted"] = result["predicted"]
        outcomes[f"{side}_probability"] = result["probabilities"].max(axis=1)
    return outcomes


def _energies(chunk: Examples, maps: Arrays, common: Arrays) -> Arrays:
    """How much of each map lies inside of each mask."""
    scores: Arrays = {f"{side}_empty": maps[side].max(axis=(1, 2)) <= 0 for side in SIDES}
    for field, inside in chunk.masks.items():
        name = field.removesuffix("_mask")
        scores[f"{name}_share"] = np.asarray(localization.mask_share(jnp.asarray(inside)))
        for side in SIDES:
            for kind, values in (("energy", common[side]), ("native_energy", maps[side])):
                # The positive part first: the resolution is that of the map that is shown.
                values = ops_maps.resize(ops_maps.positive(jnp.asarray(values)), inside.shape[1:])
                energy = localization.energy_inside(values, jnp.asarray(inside))
                scores[f"{side}_{name}_{kind}"] = np.asarray(energy)
    return scores


def _picture_blocks(
    result: Comparison,
    table: Mapping[str, Mapping[str, Any]],
    names: tuple[str, str],
    class_names: tuple[str, ...],
) -> list[sheet.Block]:
    """The blocks that hold an image, with their numbers in the title."""
    only = [f"only {name} right" for name in names]
    titles = dict(zip(BLOCKS, ("both right", "both wrong", *only, "class unknown"), strict=True))
    rows = {block: [] for block in BLOCKS}
    for position, row in enumerate(result.rows):
        cells = sheet.explanation_cells(_explanation(result, position, row, names, class_names))
        rows[str(result.scores["blocks"][row])].append(cells)
    mask = next(iter(result.shown.masks), "").removesuffix("_mask")
    h, w = result.common["this"].shape[1:]
    blocks = []
    for block in (block for block in BLOCKS if rows[block]):
        note = ""
        if mask:
            means = [table[block][f"{side}_{mask}_energy"] for side in SIDES]
            of = [
                f"{n} {'?' if m is None else f'{m:.2f}'}" for n, m in zip(names, means, strict=True)
            ]
            uniform = table[block][f"{mask}_share"]
            note = f"energy inside {mask}, {h} x {w}: {', '.join(of)} (uniform map {uniform:.2f})"
        title = f"{titles[block]}: {table[block]['count']} images"
        blocks.append(sheet.Block(title, rows[block], note=note))
    return blocks


def _explanation(
    result: Comparison,
    position: int,
    row: int,
    names: tuple[str, str],
    class_names: tuple[str, ...],
) -> overlay.Explanation:
    """An image with the maps of both: at the common resolution, and the finer native ones."""
    image = result.shown.images[position]
    panels = []
    for side, name in zip(SIDES, names, strict=True):
        predicted = class_names[int(result.scores[f"{side}_predicted"][row])]
        said = f"says {predicted} {result.scores[f'{side}_probability'][row]:.2f}"
        common, native = result.common[side][position], result.maps[side][position]
        kinds = [(common, "", said)]
        if native.shape != common.shape:
            kinds.append((native, "natively ", ""))
        for values, kind, line in kinds:
            resized = ops_maps.resize(jnp.asarray(values)[None], image.shape[:2])
            title = f"{name}, {kind}{values.shape[0]} x {values.shape[1]}\n{line}".rstrip()
            panels.append(overlay.class_map_panel(title, np.asarray(resized[0])))
    label, target = int(result.scores["labels"][row]), int(result.scores["targets"][row])
    title = f"is {class_names[label]}" if label >= 0 else ""
    if target != label:
        title += f"\nmaps of {class_names[target]}"
    return overlay.Explanation(result.shown.names[position], title, image, panels)

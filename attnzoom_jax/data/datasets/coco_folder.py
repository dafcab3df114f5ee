"""Images with boxes and segments in a local folder of COCO's official layout.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014 (arXiv 1405.0312).

    FOLDER/annotations/instances_<split>.json
    FOLDER/<split>/<file_name>

Boxes are x, y, width and height in pixels, fractions included. A segment is the union of polygons,
here the pixels whose centres lie inside of one, or run lengths (all crowds, and some single
objects). Crowds count like any object: the pointing game takes all segments of a class. Annotations
of images that the file does not list are not read.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnzoom_jax.data.datasets.annotated_folder import (
    AnnotatedFolder,
    Objects,
    rows_of_split,
    size_problem,
    split_name,
)


def open_folder(folder: str, *, split: str, truth: str) -> AnnotatedFolder:
    """Open one split of a folder; images are read when they are asked for.

    Args:
        folder: FOLDER, see above.
        split: such as "val2014" or "val2014[:100]".
        truth: "boxes", or "segments": the masks too.

    Returns:
        The images with their names and objects, none of which is hard; the classes are in the
        order of their ids.

    Raises:
        ValueError: no such folder, split or truth, or a file of another form.
    """
    root, base = pathlib.Path(folder).expanduser(), split_name(split)
    if truth not in ("boxes", "segments"):
        raise ValueError(f"{root} has no {truth}; it has boxes and segments")
    path = root / "annotations" / f"instances_{base}.json"
    if not path.exists():
        found = sorted(root.glob("annotations/instances_*.json"))
        known = ", ".join(p.stem.removeprefix("instances_") for p in found) or "nothing"
        raise ValueError(f"split {base!r}: there is no {path}; there is: {known}")
    has_masks = truth == "segments"
    try:
        content = json.loads(path.read_bytes(), object_hook=_compact if has_masks else _without)
        categories = {c["id"]: c["name"] for c in content["categories"]}
        images = [
            (i["id"], i["file_name"], (int(i["height"]), int(i["width"])))
            for i in content["images"]
        ]
        things = collections.defaultdict(list)
        for thing in content["annotations"]:
            things[thing["image_id"]].append(thing)
    except (ValueError, TypeError, LookupError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} is no list of instances ({problem})") from error
    images = images[rows_of_split(split, len(images))]
    ids = sorted(categories)
    reader = _Reader(
        images=images,
        things=things,
        labels={key: label for label, key in enumerate(ids)},
        has_masks=has_masks,
    )
    return AnnotatedFolder(
        class_names=tuple(categories[key] for key in ids),
        files=[root / base / name for _, name, _ in images],
        read_objects=reader,
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the objects of image i."""

    images: Sequence[tuple[Any, str, tuple[int, int]]]
    things: Mapping[Any, Sequence[dict[str, Any]]]
    labels: dict[Any, int]
    has_masks: bool

    def __call__(self, position: int, size: tuple[int, int]) -> Objects:
        key, name, told = self.images[position]
        wrong = size_problem(name, told, size)
        if wrong:
            return Objects(problems=(wrong,))
        labels, boxes, masks, problems = [], [], [], []
        for thing in self.things.get(key, ()):
            text = f"{name}: annotation {thing.get('id')}"
            category = thing.get("category_id")
            if category not in self.labels:
                problems.append(("unknown_class", f"{text} of category {category} is left out"))
                continue
            try:
                x, y, width, height = map(float, thing["bbox"])
                if self.has_masks:
                    masks.append(to_mask(thing["segmentation"], size))
            except (ValueError, TypeError, LookupError) as error:
                problem = " ".join(f"{type(error).__name__}: {error}".split())
                problems.append(("bad_annotation", f"{text} is left out ({problem})"))
                continue
            labels.append(self.labels[category])
            boxes.append((y, x, y + height, x + width))
        return Objects(
            labels=labels,
            boxes=boxes,
            is_hard=[False] * len(labels),
            masks=np.array(masks, bool).reshape(-1, *size) if self.has_masks else None,
            problems=tuple(problems),
        )


def to_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The pixels of a segment.

    Args:
        segmentation: polygons [x0, y0, x1, y1, ...] in pixels, or run lengths, {"counts", "size"}.
        size: (height, width) of the image.

    Returns:
        bool [height, width].

    Raises:
        ValueError: no such segment, or one of another size.
    """
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != list(size):
            raise ValueError(f"run lengths of {segmentation['size']} pixels; expected {size}")
        return decode_runs(segmentation["counts"], size)
    if not len(segmentation):
        raise ValueError("a segment without polygons")
    return np.any([_fill(np.asarray(polygon, float), size) for polygon in segmentation], axis=0)


def decode_runs(counts: str | Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """The mask of COCO's run lengths, which count down the columns, outside first.

    Args:
        counts: the lengths; or a text of them: five bits to a character from "0" on, the lowest
            first, while bit 5 says that more follow; bit 4 of the last is the sign. From the fourth
            on, it holds the difference to the length two before.
        size: (height, width).

    Returns:
        bool [height, width].

    Raises:
        ValueError: lengths that do not add up to the size.
    """
    if isinstance(counts, str):
        runs, value, shift = [], 0, 0
        for code in (ord(character) - 48 for character in counts):
            value |= (code & 31) << shift
            shift += 5
            if not code & 32:
                value -= (code >> 4 & 1) << shift
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        counts = runs
    height, width = size
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"run lengths that add up to {sum(counts)}; expected {height * width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def _fill(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in a polygon: an odd number of its edges passes left of them.

    Not cv2.fillPoly, which fills the pixels that the edges touch as well.
    """
    if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
        raise ValueError(f"a polygon of {polygon.size} numbers; expected x, y of 3 or more corners")
    height, width = size
    x0, y0 = polygon.reshape(-1, 2).T[:, :, None]  # [e, 1]
    x1, y1 = np.roll(x0, -1, axis=0), np.roll(y0, -1, axis=0)
    y = np.arange(height) + 0.5
    edge, row = np.nonzero((y0 <= y) != (y1 <= y))  # the edges that pass each row of centres
    x0, y0, x1, y1 = (corner[edge, 0] for corner in (x0, y0, x1, y1))
    x = x0 + (y[row] - y0) * (x1 - x0) / (y1 - y0)
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)  # of the first centre to the right
    mask = np.zeros((height, width), bool)
    if len(row):
        top, bottom, left, right = row.min(), row.max() + 1, column.min(), column.max()
        turns = np.zeros((bottom - top, right - left + 1), bool)
        np.logical_xor.at(turns, (row - top, column - left), True)
        mask[top:bottom, left:right] = np.logical_xor.accumulate(turns, axis=1)[:, :-1]
    return mask


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Polygons as arrays: the numbers of a whole training set take gigabytes as Python's."""
    polygons = entry.get("segmentation")
    if isinstance(polygons, list):
        try:
            entry["segmentation"] = [np.asarray(polygon, np.float32) for polygon in polygons]
        except (ValueError, TypeError):
            pass  # the image's turn comes, and then it is named
    return entry


def _without(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry

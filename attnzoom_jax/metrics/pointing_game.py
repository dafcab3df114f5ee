"""The pointing game: the map of a class points at one pixel, which lies on the class or does not.

A cue is a pair of an image and a class that it shows. A map of the cue, at the size of the image,
points at its maximum; it hits where that point comes nearer than `tolerance` to a pixel of the
class, which is the union of its boxes or of its segments. With the hits h_c among the t_c cues of
class c, and C the classes that have cues,

    accuracy = 1 / |C| sum_{c in C} h_c / t_c

All is measured in pixels of the original image, and images differ in size: `ops.maps.resize_each`
puts maps of n images onto one canvas [n, h, w], each in the upper left corner, and `sizes` [n, 2]
says how much of it is image. Padding boxes are empty, padding masks are 0.

How implementations differ, at 15 pixels: the authors' script cuts a disc around the point with the
polygons (a distance of 15 hits, `inclusive=True`); TorchRay asks for a pixel of the mask at less
than 15 (the default). For a box the latter is the box grown by 15 pixels with round corners, not a
larger box. TorchRay counts a class without cues as 0 (`untested="zero"`), and hits nothing at
tolerance 0, where this asks for a point on the mask.

Source: Zhang et al. 2016 (arXiv 1608.00507), section 4.1.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops import boxes as ops_boxes
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.ops.maximum import first_max

TOLERANCE = 15.0
DIFFICULT_SHARE = 0.25  # of the image; smaller classes are difficult to point at
EMPTY = ("first", "miss")
UNTESTED = ("skip", "zero")

_FAR_AWAY = 46_340

Array = jax.Array | np.ndarray


def points(maps: jax.Array, sizes: Array | None = None, *, empty: str = "first") -> jax.Array:
    """Where maps point: their maximum, the first one in row-major order when several tie.

    Args:
        maps: [n, h, w], any sign, of the size of the images; what lies outside is not looked at.
        sizes: int [n, 2], (height, width) of each image; None where all fill the canvas.
        empty: of a constant map, without a maximum to speak of: "first" points at (0, 0), as the
            first of all ties and as the reference does; "miss" points nowhere.

    Returns:
        float32 [n, 2], (y, x). (-1, -1), which never hits, for a map that holds NaN, and for a
        constant one if it is to miss.

    Raises:
        ValueError: unknown `empty`.
    """
    if empty not in EMPTY:
        raise unknown_name("treatment of empty maps", empty, EMPTY)
    is_inside = ops_maps.is_inside(sizes, maps.shape)
    heat = jnp.where(is_inside, jnp.asarray(maps, jnp.float32), -jnp.inf)
    is_nowhere = jnp.isnan(heat).any(axis=(1, 2))
    if empty == "miss":
        is_nowhere |= is_empty(maps, sizes)
    return jnp.where(is_nowhere[:, None], -1.0, ops_maps.peak(heat).astype(jnp.float32))


def is_empty(maps: jax.Array, sizes: Array | None = None) -> jax.Array:
    """Maps that are constant, most often 0: they point nowhere; to be counted beside the accuracy.

    Args:
        maps: [n, h, w].
        sizes: int [n, 2], (height, width) of each image; None where all fill the canvas.

    Returns:
        bool [n]; False where a map holds NaN.
    """
    is_inside = ops_maps.is_inside(sizes, maps.shape)
    lowest = -first_max(jnp.where(is_inside, -maps, -jnp.inf), axis=(1, 2))
    return first_max(jnp.where(is_inside, maps, -jnp.inf), axis=(1, 2)) == lowest


def center_points(sizes: Array) -> jax.Array:
    """The baseline that points at the middle of every image.

    Args:
        sizes: int [n, 2], (height, width).

    Returns:
        float32 [n, 2], (height / 2, width / 2) as in TorchRay, which is half a pixel below and to
        the right of the middle, as pixel 0 has its centre at 0.
    """
    return jnp.asarray(sizes, jnp.float32) / 2


def hits_boxes(
    points: jax.Array, boxes: Array, *, tolerance: float = TOLERANCE, inclusive: bool = False
) -> jax.Array:
    """Whether points lie on the union of some boxes, or near enough to it.

    Args:
        points: [n, 2], (y, x) in pixels, whole or half ones, pixel 0 having its centre at 0.
        boxes: [n, p, 4], inside of the image; empty ones do not count.
        tolerance: pixels. 0 asks for a point on a pixel of a box; t > 0 for such a pixel at a
            Euclidean distance below t.
        inclusive: a distance of exactly t hits too.

    Returns:
        bool [n]; False where all boxes are empty, and for a point with a negative coordinate, such
        as (-1, -1). Equal to `hits_masks` of `ops.boxes.to_mask`.

    Raises:
        ValueError: a negative or infinite tolerance, shapes that do not fit.
    """
    limit = _limit(tolerance, inclusive)
    _check_shapes(points, "boxes", boxes, "[n, p, 4]")
    points = jnp.asarray(points, jnp.float32)
    first, last = ops_boxes.pixel_range(jnp.asarray(boxes, jnp.float32))  # [n, p, 2] each
    # The nearest pixel of a box; a half point lies between two that are equally near.
    place = points[:, None, :]
    apart = jnp.abs(place - jnp.clip(jnp.floor(place), first, last))
    squares = jnp.where((last >= first).all(axis=2), (apart**2).sum(axis=2), jnp.inf)
    return (squares <= limit).any(axis=1) & (points >= 0).all(axis=1)


def hits_masks(
    points: jax.Array, masks: Array, *, tolerance: float = TOLERANCE, inclusive: bool = False
) -> jax.Array:
    """Whether points lie on masks, or near enough to them.

    Args:
        points: [n, 2], (y, x) in pixels, whole or half ones, pixel 0 having its centre at 0.
        masks: [n, h, w], bool or numbers; inside where above 0.
        tolerance, inclusive: see `hits_boxes`.

    Returns:
        bool [n]; False for an empty mask, and for a point with a negative coordinate.

    Raises:
        ValueError: a negative or infinite tolerance, shapes that do not fit.
    """
    limit = _limit(tolerance, inclusive)
    _check_shapes(points, "masks", masks, "[n, h, w]")
    points = jnp.asarray(points, jnp.float32)
    y, x = (
        (jnp.arange(pixels) - points[:, axis, None]) ** 2
        for axis, pixels in enumerate(masks.shape[1:])
    )  # [n, h], [n, w]
    squares = jnp.where(jnp.asarray(masks) > 0, y[:, :, None] + x[:, None, :], jnp.inf)  # [n, h, w]
    return (squares.min(axis=(1, 2)) <= limit) & (points >= 0).all(axis=1)


def _check_shapes(points: Array, name: str, truth: Array, expected: str) -> None:
    if points.shape != (len(truth), 2) or truth.ndim != 3:
        raise ValueError(
            f"points have shape {points.shape} and {name} {truth.shape}; expected [n, 2] and "
            f"{expected}"
        )


def _limit(tolerance: float, inclusive: bool) -> float:
    """The largest squared distance that hits."""
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance}; expected a distance in pixels, 0 or more")
    # Squared distances of half pixels are quarters, which float32 holds exactly up to 2048 pixels:
    # the largest one that hits, found here, leaves the device no rounding to do.
    near_enough = operator.le if inclusive else operator.lt
    quarters = math.floor(4 * min(tolerance, _FAR_AWAY) ** 2) + 1
    while quarters > 0 and not near_enough(math.sqrt(quarters / 4), tolerance):
        quarters -= 1
    # Half a pixel to both sides: a point between pixels lies on all of them.
    return max(quarters / 4, 0.5)


def pointing_sums(
    hits: Array, classes: Array, mask: Array, *, num_classes: int
) -> dict[str, jax.Array]:
    """Hits and cues of each class in one batch; the sums of batches add up.

    Args:
        hits: bool [n].
        classes: int [n], of the cues, in [0, num_classes).
        mask: [n], 1 = a cue that counts, 0 = padding, or one that is left out.
        num_classes: k.

    Returns:
        float32: "hits" and "cues" [k], and "outside", the cues of classes outside [0, k), which
        `pointing_metrics` refuses. Exact up to 2**24 cues of a class.
    """
    counts = jnp.float32(jnp.asarray(mask) > 0)
    of_class = jax.nn.one_hot(classes, num_classes) * counts[:, None]  # [n, k], 0 outside
    return {
        "hits": jnp.where(jnp.asarray(hits)[:, None], of_class, 0.0).sum(axis=0),
        "cues": of_class.sum(axis=0),
        "outside": counts.sum() - of_class.sum(),
    }


def pointing_metrics(sums: Mapping[str, Array], *, untested: str = "skip") -> dict[str, float]:
    """The metrics of all cues behind some sums; runs on the host, once.

    Args:
        sums: what `pointing_sums` returns, or several of them added up.
        untested: see `mean_accuracy`.

    Returns:
        "accuracy", the unweighted mean over classes, and "hit_rate", the share of all cues that
        are hit, both in [0, 1]; "classes_tested"; "count", of cues.

    Raises:
        ValueError: no cue was counted, one of a class that does not exist, unknown `untested`.
    """
    total = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    hits, cues = total["hits"], total["cues"]
    if total["outside"]:
        raise ValueError(
            f"{int(total['outside'])} cues are of a class outside [0, {len(cues)}); check the "
            "labels against the number of classes"
        )
    if not cues.any():
        raise ValueError("no cue was counted; expected sums over at least one, check the split")
    return {
        "accuracy": float(mean_accuracy(hits, cues, untested=untested)),
        "hit_rate": float(hits.sum() / cues.sum()),
        "classes_tested": int((cues > 0).sum()),
        "count": int(cues.sum()),
    }


def mean_accuracy(hits: np.ndarray, cues: np.ndarray, *, untested: str = "skip") -> np.ndarray:
    """The unweighted mean over classes of the share of cues that are hit.

    Args:
        hits: [..., k]; leading axes may be resamples of the images.
        cues: [..., k].
        untested: a class without cues is left out ("skip"), or counts as 0 ("zero", as in
            TorchRay).

    Returns:
        float64 [...], in [0, 1]; NaN where no class has a cue and those are left out.

    Raises:
        ValueError: unknown `untested`.
    """
    if untested not in UNTESTED:
        raise unknown_name("treatment of untested classes", untested, UNTESTED)
    hits, cues = np.asarray(hits, np.float64), np.asarray(cues, np.float64)
    accuracy = (hits / np.maximum(cues, 1)).sum(axis=-1)
    if untested == "zero":
        return accuracy / cues.shape[-1]
    tested = (cues > 0).sum(axis=-1)
    return np.where(tested > 0, accuracy / np.maximum(tested, 1), np.nan)


def cued_classes(labels: np.ndarray, is_hard: np.ndarray | None = None) -> np.ndarray:
    """The classes that an image is asked about; runs on the host.

    Args:
        labels: int [p], the class of each box; below 0 for padding.
        is_hard: bool [p], boxes that VOC marks as difficult. A class of which all boxes are is not
            asked about; otherwise all its boxes count, the difficult ones too.

    Returns:
        int [m], rising.
    """
    labels = np.asarray(labels)
    asked = labels >= 0 if is_hard is None else (labels >= 0) & ~np.asarray(is_hard, bool)
    return np.unique(labels[asked])


def difficult_cues(masks: Mapping[int, Any]) -> dict[int, bool]:
    """Which cues of an image belong to the difficult subset; runs on the host.

    A cue does if the class covers less than a quarter of the image, and another class is there. The
    paper says "total area"; here the area is that of the union, for boxes as for segments. The
    subset may thus differ by a few cues from the published lists (`parse_difficult`).

    Args:
        masks: {class: [h, w]}, for all classes of the image, above 0 on their segments or boxes
            (`ops.boxes.to_mask`).

    Returns:
        {class: whether the cue is difficult}.
    """
    shares = {name: np.mean(np.asarray(mask) > 0) for name, mask in masks.items()}
    return {
        name: bool(share < DIFFICULT_SHARE) and len(masks) > 1 for name, share in shares.items()
    }


def parse_difficult(text: str, *, num_classes: int) -> dict[str, np.ndarray]:
    """A published list of the difficult subset; runs on the host.

    Args:
        text: a line per image: its name and a flag, 0 or 1, for each class, separated by blanks.
        num_classes: k.

    Returns:
        {name: bool [k]}. TorchRay keeps all cues of an image that the list does not name.

    Raises:
        ValueError: a line of another form.
    """
    flags = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, *values = line.split() or [""]
        if not name:
            continue
        if len(values) != num_classes or not set(values) <= {"0", "1"}:
            raise ValueError(
                f"line {number} of the list of difficult cues, {line[:40]!r}: expected a name and "
                f"{num_classes} flags, 0 or 1"
            )
        flags[name] = np.array(values) == "1"
    return flags

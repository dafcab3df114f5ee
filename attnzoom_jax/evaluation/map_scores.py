"""What the maps of a batch score, and what a table says of the scores of all cues.

A kind of score is a class with the metrics it gives (`metrics`), the values of each cue
(`measure`), which are kept, and what they come to over all cues (`summarize`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax.attribution.methods import METHODS, takes
from attnzoom_jax.evaluation import map_faithfulness
from attnzoom_jax.evaluation.cues import Batch, canvas_of
from attnzoom_jax.evaluation.rows import Row
from attnzoom_jax.metrics import box_localization, localization, pointing_game
from attnzoom_jax.metrics.bootstrap import intervals
from attnzoom_jax.ops import boxes as ops_boxes
from attnzoom_jax.ops import maps as ops_maps

Values = dict[str, np.ndarray]
BASELINES = ("center", "uniform")
HALVES = "halves"


class Score(NamedTuple):
    """A number of the table, with its interval and the number of cues behind it."""

    value: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class View:
    """The maps of one row for one batch of cues.

    Attributes:
        row: what made them.
        maps: raw, [n, h', w']; a baseline's too.
        batch: as of `cues.cue_batches`.
        variables: of the network.
        inputs: the images as the network takes them, float [n, h, w, c].
        targets: the output asked for, int [n].
    """

    row: Row
    maps: Any
    batch: Batch
    variables: Any = None
    inputs: Any = None
    targets: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images as the network sees them."""
        height, width = self.batch["image"].shape[1:3]
        return height, width

    @functools.cached_property
    def at_input(self) -> jax.Array:
        """The maps at the size of the input, [n, h, w]."""
        return _resize(self.maps, self.size)


def baseline_maps(name: str, n: int, size: tuple[int, int]) -> np.ndarray:
    """The maps of a baseline, which do not look at the image.

    Args:
        name: "center", a Gaussian around the middle with a quarter of each side as its standard
            deviation; or "uniform".
        n: number of maps.
        size: (height, width), in pixels.

    Returns:
        float32 [n, height, width].
    """
    rows, columns = (
        np.exp(-0.5 * (((np.arange(side) + 0.5) / side - 0.5) / 0.25) ** 2) for side in size
    )
    heat = np.outer(rows, columns) if name == "center" else np.ones(size)
    return np.broadcast_to(heat.astype(np.float32), (n, *size))


class Pointing:
    """The pointing game, in pixels of the stored images; see `metrics.pointing_game`.

    Args:
        num_classes: of the data set.
        tolerance: in pixels.
        inclusive: a distance of exactly `tolerance` hits.
        untested: "skip" or "zero", what a class without cues counts in the mean.
        empty: "first" or "miss", where a constant map points.
        blur: maps of gradients at the image are smoothed before they point, by a Gaussian with this
            share of the longer side as its standard deviation, as in Zhang et al. 2016; 0: not.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        tolerance: float = pointing_game.TOLERANCE,
        inclusive: bool = False,
        untested: str = "skip",
        empty: str = "first",
        blur: float = 0.02,
    ) -> None:
        self._num_classes, self._untested, self._empty = num_classes, untested, empty
        self._is_hit = {"tolerance": tolerance, "inclusive": inclusive}
        self._blur = blur
        self.metrics = {
            "pointing": {"label": "pointing", "better": "higher", "unit": "%"},
            "pointing_difficult": {"label": "pointing, difficult", "better": "higher", "unit": "%"},
        }

    def measure(self, view: View) -> Values:
        """`hit` [n], 1 or 0, NaN for a baseline without a point."""
        batch, n = view.batch, len(view.maps)
        if view.row.name == "uniform":
            return {"hit": np.full(n, np.nan)}
        if view.row.name == "center":
            points = pointing_game.center_points(batch["size"])
        else:
            heat = _resize_each(
                ops_maps.positive(view.maps), batch["size"], canvas_of(batch["size"])
            )
            if self._blur and is_gradient(view.row.method):
                heat = jnp.asarray(blurred(np.asarray(heat), batch["size"], self._blur))
            points = _points(heat, batch["size"], self._empty)
        if "truth" in batch:
            hits = pointing_game.hits_masks(points, batch["truth"], **self._is_hit)
        else:
            hits = pointing_game.hits_boxes(points, batch["boxes"], **self._is_hit)
        return {"hit": np.asarray(hits, np.float32)}

    def summarize(self, values: Values, cues: Values, **resampling: Any) -> dict[str, Score]:
        """Accuracies, means over classes; of all cues, and of the difficult ones."""
        scores = {}
        for metric, asked in (
            ("pointing", np.ones(len(cues["image"]), bool)),
            ("pointing_difficult", cues["difficult"] > 0),
        ):
            asked = asked & ~np.isnan(values["hit"])
            if asked.any():
                sums = self._sums(values["hit"][asked], cues, asked)
                scores[metric] = _score(sums, self._accuracy, int(asked.sum()), **resampling)
        return scores

    def _sums(self, hits: np.ndarray, cues: Values, asked: np.ndarray) -> Values:
        images, own = np.unique(cues["image"][asked], return_inverse=True)
        classes, column = np.unique(cues["class"][asked], return_inverse=True)
        sums = {
            name: np.zeros((len(images), len(classes)), np.float32) for name in ("hits", "cues")
        }
        np.add.at(sums["hits"], (own, column), hits)
        np.add.at(sums["cues"], (own, column), 1)
        return sums

    def _accuracy(self, sums: Mapping[str, np.ndarray]) -> np.ndarray:
        accuracy = pointing_game.mean_accuracy(sums["hits"], sums["cues"], untested="skip")
        if self._untested == "zero":  # classes without a cue have no column
            accuracy = accuracy * (sums["cues"] > 0).sum(axis=-1) / self._num_classes
        return accuracy


class Energy:
    """Share of the map inside the truth, and of its highest pixels; at the size of the input."""

    metrics = {
        "energy": {"label": "energy inside", "better": "higher", "unit": "%"},
        "rank_accuracy": {"label": "rank accuracy", "better": "higher", "unit": "%"},
    }

    def measure(self, view: View) -> Values:
        """`energy` and `rank_accuracy` [n]; NaN where the map holds NaN."""
        batch, size = view.batch, view.size
        if "truth" in batch:
            masks = [
                cv2.resize(own[:h, :w].astype(np.uint8), size[::-1], interpolation=_NEAREST)
                for own, (h, w) in zip(batch["truth"], batch["size"], strict=True)
            ]
            truth = np.stack(masks) > 0
        else:
            truth = ops_boxes.to_mask(_at(batch, size), size)
        energy, accuracy = _energies(view.at_input, truth)
        return {"energy": np.asarray(energy), "rank_accuracy": np.asarray(accuracy)}

    def summarize(self, values: Values, cues: Values, **resampling: Any) -> dict[str, Score]:
        """Means over the cues whose map holds no NaN."""
        return mean_scores({n: values[n] for n in self.metrics}, cues["image"], **resampling)


class Boxes:
    """The box around what stands out in the map; see `metrics.box_localization`.

    Args:
        by: "max", "mean" or "energy".
        region: "largest", "all" or "each".
        thresholds: that MaxBoxAcc takes the best of; None for 0, 0.05, ..., 0.95, and by the mean
            for 0, 0.5, ..., 10.
        threshold: that the errors are counted at: a number; or "halves": of each half of the images
            (those at even places, those at odd ones) with the threshold that is best on the other.
        at: "input", maps are enlarged to the network's input before the threshold, as in the WSOL
            protocol; "map", after it, as in Zhang et al. 2016.
    """

    def __init__(
        self,
        *,
        by: str = "max",
        region: str = "largest",
        thresholds: Sequence[float] | None = None,
        threshold: float | str = HALVES,
        at: str = "input",
    ) -> None:
        usual = np.arange(21) / 2 if by == "mean" else np.arange(20) / 20
        known = usual if thresholds is None else np.asarray(thresholds, np.float64)
        if at not in ("input", "map"):
            raise ValueError(f"boxes.at is {at!r}; expected input or map")
        if isinstance(threshold, str) and threshold != HALVES:
            raise ValueError(f"boxes.threshold is {threshold!r}; expected a number, or {HALVES}")
        if not isinstance(threshold, str) and threshold not in known:
            known = np.sort(np.append(known, threshold))
        self._thresholds, self._threshold, self._at = known, threshold, at
        self._options: dict[str, Any] = {"by": by, "region": region}
        self.metrics = {
            "max_box_acc": {"label": "MaxBoxAcc (0.5)", "better": "higher", "unit": "%"},
            "max_box_acc_mean": {"label": "MaxBoxAcc (mean)", "better": "higher", "unit": "%"},
            "box_error": {"label": "box error", "better": "lower", "unit": "%"},
            "box_error_top1": {"label": "top-1 box error", "better": "lower", "unit": "%"},
            "box_error_top5": {"label": "top-5 box error", "better": "lower", "unit": "%"},
        }

    def measure(self, view: View) -> Values:
        """`overlap` [n, t], the best IoU at each threshold; 0 where the map holds NaN."""
        maps = np.asarray(view.at_input if self._at == "input" else view.maps)
        boxes = _at(view.batch, maps.shape[1:])
        found = box_localization.overlaps(maps, None, boxes, self._thresholds, **self._options)
        return {"overlap": np.nan_to_num(found).astype(np.float32)}

    def summarize(self, values: Values, cues: Values, **resampling: Any) -> dict[str, Score]:
        """MaxBoxAcc at IoU 0.5 and its mean over 0.3, 0.5, 0.7; errors at the threshold chosen."""
        overlap, image, n = values["overlap"], cues["image"], len(cues["image"])
        right = overlap[:, :, None] >= np.array(box_localization.IOUS)  # [n, t, 3]
        middle = box_localization.IOUS.index(box_localization.IOU)
        sums = _by_image(image, {"right": right, "count": np.ones(n)})

        def best(sums: Mapping[str, np.ndarray]) -> np.ndarray:  # [b, 3]
            return (sums["right"] / sums["count"][..., None, None]).max(axis=-2)

        chosen = self._chosen(overlap, image)
        is_right = chosen >= box_localization.IOU
        wrong = {
            "box_error": ~is_right,
            "box_error_top1": ~(is_right & (cues["rank"] < 1)),
            "box_error_top5": ~(is_right & (cues["rank"] < 5)),
        }
        wrong = {name: np.where(np.isnan(chosen), np.nan, value) for name, value in wrong.items()}
        scores = {
            "max_box_acc": _score(sums, lambda sums: best(sums)[..., middle], n, **resampling),
            "max_box_acc_mean": _score(sums, lambda s: best(s).mean(axis=-1), n, **resampling),
        }
        return scores | mean_scores(wrong, image, **resampling)

    def _chosen(self, overlap: np.ndarray, image: np.ndarray) -> np.ndarray:
        """The overlap [n] of each cue at its threshold; NaN where no other half chooses one."""
        if self._threshold != HALVES:
            return overlap[:, int(np.flatnonzero(self._thresholds == self._threshold)[0])]
        chosen = np.full(len(overlap), np.nan)
        for half in (0, 1):
            own, other = image % 2 == half, image % 2 != half
            if other.any():
                best = box_localization.best_threshold(overlap[other], self._thresholds)
                chosen[own] = overlap[own, int(np.flatnonzero(self._thresholds == best)[0])]
        return chosen


class Faithful:
    """Does the score follow the map? Every name costs passes, see `map_faithfulness`.

    Args:
        apply: (variables, images) -> logits.
        mesh: batches are split over it.
        names: of `map_faithfulness.NAMES`.
        **options: of `map_faithfulness.Faithfulness`.
    """

    def __init__(
        self,
        apply: Callable[[Any, jax.Array], jax.Array],
        mesh: Mesh,
        *,
        names: Sequence[str] = map_faithfulness.ON_DEVICE,
        **options: Any,
    ) -> None:
        self._apply = apply
        self._explained: dict[str, map_faithfulness.Explain] = {}
        self._scores = map_faithfulness.Faithfulness(apply, names=names, mesh=mesh, **options)
        self.metrics = {name: _FAITHFUL[name] for name in self._scores.names}

    def measure(self, view: View) -> Values:
        """The scores asked for, [n]."""
        return self._scores.scores(
            view.variables,
            view.inputs,
            view.at_input,
            view.targets,
            view.batch["mask"],
            explain=self._explain(view.row),
            ids=view.batch["place"],
        )

    def _explain(self, row: Row) -> map_faithfulness.Explain:
        """What makes the row's maps; the same object at every call, as it is compiled by it."""

        def explain(variables: Any, targets: jax.Array, images: jax.Array) -> jax.Array:
            if row.run is None:
                size = (images.shape[1], images.shape[2])
                return jnp.asarray(baseline_maps(row.name, len(images), size))
            fn = functools.partial(self._apply, variables)
            return row.maps(fn, images, targets, jax.random.key(0))

        return self._explained.setdefault(row.name, explain)

    def summarize(self, values: Values, cues: Values, **resampling: Any) -> dict[str, Score]:
        """Means over the cues whose map holds no NaN."""
        return mean_scores({n: values[n] for n in self.metrics}, cues["image"], **resampling)


def is_gradient(method: str) -> bool:
    """Whether a method makes speckled maps at the image, out of its gradient."""
    module = METHODS[method].__module__.rpartition(".")[2]
    return module == "gradient" and not takes(method, "tap")


def blurred(maps: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """Maps smoothed by a Gaussian, with their borders repeated beyond the image.

    Args:
        maps: float32 [n, H, W], each in the upper left corner of the canvas.
        sizes: int [n, 2], (height, width) of each.
        share: standard deviation as a share of the longer side; the kernel ends at four of them.

    Returns:
        float32 [n, H, W], 0 beyond the images.
    """
    smoothed = np.zeros_like(maps)
    for own, map_, (h, w) in zip(smoothed, maps, sizes, strict=True):
        sigma = share * max(h, w)
        side = 2 * math.ceil(4 * sigma) + 1
        own[:h, :w] = cv2.GaussianBlur(
            map_[:h, :w], (side, side), sigma, borderType=cv2.BORDER_REPLICATE
        )
    return smoothed


def mean_scores(values: Values, images: np.ndarray, **resampling: Any) -> dict[str, Score]:
    """The means of values over the cues that have one.

    Args:
        values: {name: [n]}, NaN for a cue without a value.
        images: int [n], of the cues.
        **resampling: options of `metrics.bootstrap.intervals`.

    Returns:
        {name: the mean, with its interval over images}, without the names that have no value.
    """
    scores = {}
    for name, value in values.items():
        known = ~np.isnan(np.asarray(value, np.float64))
        if known.any():
            count = int(known.sum())
            sums = _by_image(images[known], {"total": value[known], "count": np.ones(count)})
            scores[name] = _score(sums, lambda s: s["total"] / s["count"], count, **resampling)
    return scores


def _score(sums: Values, statistic: Any, count: int, **resampling: Any) -> Score:
    found = intervals(sums, statistic, **resampling)
    return Score(*(float(number) for number in found), count=count)


def _by_image(images: np.ndarray, values: Values) -> Values:
    """Values [n, ...] of cues, summed up for each image."""
    names, own = np.unique(images, return_inverse=True)
    sums = {}
    for name, value in values.items():
        sums[name] = np.zeros((len(names), *value.shape[1:]), np.float64)
        np.add.at(sums[name], own, value)
    return sums


def _at(batch: Batch, size: Sequence[int]) -> np.ndarray:
    """The true boxes [n, p, 4], in pixels of the image at another size."""
    before = np.broadcast_to(batch["size"][:, None], (*batch["boxes"].shape[:2], 2))
    return ops_boxes.scale(batch["boxes"], before, np.broadcast_to(np.array(size), before.shape))


_FAITHFUL = {
    "insertion": {"label": "insertion", "better": "higher", "unit": "%"},
    "deletion": {"label": "deletion", "better": "lower", "unit": "%"},
    "average_drop": {"label": "average drop", "better": "lower", "unit": "%"},
    "increase": {"label": "increase", "better": "higher", "unit": "%"},
    "road": {"label": "ROAD, most relevant first", "better": "lower", "unit": "%"},
    "road_lerf": {"label": "ROAD, least relevant first", "better": "higher", "unit": "%"},
    "max_sensitivity": {"label": "max-sensitivity", "better": "lower", "unit": ""},
}
_NEAREST = cv2.INTER_NEAREST_EXACT
_resize = jax.jit(ops_maps.resize, static_argnums=1)
_resize_each = jax.jit(ops_maps.resize_each, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def _points(heat: jax.Array, sizes: jax.Array, empty: str) -> jax.Array:
    return pointing_game.points(heat, sizes, empty=empty)


@jax.jit
def _energies(maps: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (
        localization.energy_inside(maps, truth),
        localization.relevance_rank_accuracy(maps, truth),
    )

"""Phrase localisation: where is "a striped red circle with a cross", by a classifier of tags?

No part of the network reads language. A phrase is cut into the words that are tags of a classifier
(attributes or classes, see data/phrases.py); the positive parts of their maps, each of one output,
are averaged; proposals are ranked by what they hold of that (see metrics/phrases.py). Two baselines
rank the same proposals: a uniform map, which prefers the largest, and a Gaussian in the middle.

The network sees the whole image, resized and never cropped; boxes are compared in pixels of the
image as it is stored.

Source: Zhang et al. 2016 (arXiv 1608.00507), section 4.3, where the tag classifier knows 18,000
words and proposals come from EdgeBoxes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax.data.augment import normalize
from attnzoom_jax.data.phrases import Phrase, index_tags, known_outputs, open_phrases
from attnzoom_jax.data.pipeline import resize_image
from attnzoom_jax.data.split import open_split
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.cues import InputSize
from attnzoom_jax.evaluation.maps import say_progress
from attnzoom_jax.evaluation.rows import at_taps, parse_rows
from attnzoom_jax.metrics import phrases as metrics
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.taps import bind
from attnzoom_jax.ops import boxes as ops_boxes
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training.sharding import check_batch_size, replicated, split_whole

METHOD = "contrastive_excitation_backprop"
MAPS = ("", "uniform_", "center_")
SCORES = (*(f"recall{n}" for n in metrics.AT), "pointing")
COUNTS = ("phrases", "unknown_phrases", "phrases_without_boxes", "images_without_proposals")
UNKNOWN = ("miss", "skip")
CHUNK = 64  # images that are read ahead
SHOWN = 3  # of each kind of problem

Values = dict[str, np.ndarray]


@dataclasses.dataclass
class _Image:
    """An image on its way: phrases to be scored when the maps of all its tags are there."""

    name: str
    pixels: np.ndarray  # as the network sees them
    size: tuple[int, int]  # as stored
    phrases: list[Phrase]  # with boxes
    outputs: list[tuple[int, ...]]  # known to each phrase
    maps: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def wanted(self) -> set[int]:
        """The outputs of all phrases."""
        return {output for outputs in self.outputs for output in outputs}


class Phrases:
    """Localises phrases; every phrase that has a box counts exactly once.

    Args:
        model: images float [n, h, w, c] -> logits.
        data: the config's `data` section; the set needs phrases, see `data.phrases.open_phrases`.
        split: of the data set.
        mesh: batches, pairs of an image and a tag, are split over it.
        method: of attribution's METHODS.
        tap: where maps are taken; "" for the default tap.
        options: of the method.
        class_names: the tags, names of the outputs; empty for those of the data set.
        proposals: npz file with an array [m, 4] for each image, by the name of the image: boxes
            [y0, x0, y1, x1], half-open, in pixels of the image as stored; "" for the sliding set,
            `metrics.phrases.sliding_boxes`.
        gamma: exponent of a box's area in its score.
        truth: "union" or "any" of the boxes of a phrase.
        unknown: phrases without a known word are a "miss", or "skip" leaves them out, for the
            baselines too.
        by_kind: also score each kind of phrase for itself.
        resize, size, multiple: see `cues.InputSize`; "" and 0 for those of `data`.
        prefix: of the metrics' names; "" for the split.

    Attributes:
        tags: names of the outputs.
        problems: after a run, {kind: {"count", "first": the first texts}}.

    Raises:
        ValueError: a data set that is not prepared or has no phrases, tags that are no words, a
            crop, a file of proposals that cannot be read, unknown options.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Any,
        split: str,
        mesh: Mesh,
        method: str = METHOD,
        tap: str = "",
        options: Mapping[str, Any] | None = None,
        class_names: Sequence[str] = (),
        proposals: str = "",
        gamma: float = metrics.GAMMA,
        truth: str = "union",
        unknown: str = "miss",
        by_kind: bool = False,
        resize: str = "",
        size: int = 0,
        multiple: int = 32,
        prefix: str = "",
    ) -> None:
        check_batch_size(data.eval_batch_size, mesh, key="data.eval_batch_size")
        if unknown not in UNKNOWN:
            raise unknown_name("treatment of unknown phrases", unknown, UNKNOWN)
        if truth not in metrics.TRUTHS:
            raise unknown_name("truth", truth, metrics.TRUTHS)
        mode = resize or data.resize
        if mode == "crop" or (data.crop_size and not resize):
            raise ValueError(
                "a crop hides boxes; set the evaluation's resize to squash, or to short_side for a "
                "network that takes images of any size, and its size"
            )
        self.prefix = prefix or split
        (self._row,) = parse_rows([f"{method}@{tap}" if tap else method], {method: options or {}})
        self._input_size = InputSize(mode, size or data.image_size, multiple)
        self._model, self._data, self._mesh = model, data, mesh
        self._source = open_phrases(data.name, split=split, data_dir=data.dir)
        if mode == "none" and None in self._source.image_shape:
            raise ValueError(f"the images of {self._source.name} differ in size; set resize")
        self.tags = tuple(
            class_names or open_split(data, split=split, fields=("label",)).class_names
        )
        self._index = index_tags(self.tags)
        if not self._index:
            raise ValueError(f"no tag of {self.tags[:SHOWN]} could occur in a phrase")
        self._proposals = _open_proposals(proposals)
        self._gamma, self._truth = gamma, truth
        self._skips_unknown, self._by_kind = unknown == "skip", by_kind
        names = [*(f"{kind}{score}" for kind in MAPS for score in SCORES), "recall_all", *COUNTS]
        self.metric_names = [f"{self.prefix}/{name}" for name in names]  # without those by kind
        maps = functools.partial(_word_maps, self._row, model, data)
        self._word_maps = (
            maps if self._row.has_loop else jax.jit(maps, out_shardings=replicated(mesh))
        )

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate.

        Args:
            variables: of the model.

        Returns:
            As fractions of the phrases "<prefix>/recall1", "<prefix>/recall5", "<prefix>/recall10"
            and "<prefix>/pointing", the same with "uniform_" and "center_" for the baselines (of a
            uniform map, which points nowhere, `pointing` is what a random point would hit), and
            "<prefix>/recall_all", what the best order of all proposals would reach. Counts:
            "<prefix>/phrases", those behind the fractions; "<prefix>/unknown_phrases", of them,
            or left out; "<prefix>/phrases_without_boxes", left out;
            "<prefix>/images_without_proposals", whose phrases are missed. With `by_kind` all
            fractions also as "<prefix>/recall1_<kind>". Problems are printed: a line for each kind.

        Raises:
            ValueError: no phrase to score, no image has proposals, no such tap.
        """
        self.problems: dict[str, dict[str, Any]] = {}
        self._counts, self._images = dict.fromkeys(COUNTS, 0), 0
        parts: list[Values] = []
        queues: dict[tuple[int, ...], list[tuple[_Image, int]]] = collections.defaultdict(list)
        variables = jax.device_put(variables, replicated(self._mesh))
        for image in self._read():
            if not image.wanted:
                parts.append(self._score(image))
                continue
            queue = queues[image.pixels.shape]
            queue += [(image, output) for output in sorted(image.wanted)]
            while len(queue) >= self._data.eval_batch_size:
                parts += self._finish(variables, queue)
        for queue in queues.values():
            while queue:
                parts += self._finish(variables, queue)
        if not parts:
            raise ValueError(f"{self._source.name} has no phrase to score: {self._counts}")
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for kind, problem in self.problems.items():
            print(f"{kind}: {problem['count']}, such as {', '.join(problem['first'])}", flush=True)
        return self._metrics(values)

    def _read(self) -> Iterator[_Image]:
        """The images that have phrases with boxes; says how far it is."""
        count = len(self._source)
        with concurrent.futures.ThreadPoolExecutor(max(1, self._data.num_threads)) as pool:
            for start in say_progress(range(0, count, CHUNK), count, CHUNK):
                for example in pool.map(
                    self._source.__getitem__, range(start, min(start + CHUNK, count))
                ):
                    image = self._prepare(example)
                    if image.phrases:
                        yield image

    def _prepare(self, example: Mapping[str, Any]) -> _Image:
        name, pixels = example["name"], example["image"]
        height, width = pixels.shape[:2]
        phrases, known = [], []
        for phrase in example["phrases"]:
            outputs, told = known_outputs(phrase.text, self._index), f"{name}: {phrase.text!r}"
            boxes = np.clip(phrase.boxes, 0, (height, width, height, width))
            if (boxes != phrase.boxes).any():
                self._tell("boxes clipped to the image", told)
            if not ops_boxes.area(boxes).any():
                self._counts["phrases_without_boxes"] += 1
                continue
            if not outputs:
                self._counts["unknown_phrases"] += 1
                self._tell("phrases without a known word", told)
            if outputs or not self._skips_unknown:
                phrases.append(dataclasses.replace(phrase, boxes=boxes))
                known.append(outputs)
        seen = resize_image(pixels, self._input_size(height, width))
        return _Image(name, seen, (height, width), phrases, known)

    def _finish(self, variables: Any, queue: list[tuple[_Image, int]]) -> list[Values]:
        """Make the maps of a batch, taken off the queue; score the images that are complete."""
        batch_size = self._data.eval_batch_size
        batch, queue[:] = queue[:batch_size], queue[batch_size:]
        padded = batch + batch[-1:] * (batch_size - len(batch))
        images = split_whole(np.stack([image.pixels for image, _ in padded]), self._mesh)
        outputs = split_whole(np.array([output for _, output in padded], np.int32), self._mesh)
        maps = jax.device_get(self._word_maps(variables, images, outputs))
        parts = []
        for (image, output), map_ in zip(batch, maps[: len(batch)], strict=True):
            image.maps[output] = map_
            if image.maps.keys() == image.wanted:
                parts.append(self._score(image))
                image.maps.clear()
        return parts

    def _score(self, image: _Image) -> Values:
        """What the phrases of an image score, [p] each."""
        self._images += 1
        p, frame = len(image.phrases), (image.pixels.shape[0], image.pixels.shape[1])
        boxes = np.zeros((p, max(len(phrase.boxes) for phrase in image.phrases), 4))
        for own, phrase in zip(boxes, image.phrases, strict=True):
            own[: len(phrase.boxes)] = phrase.boxes
        found = self._proposals_of(image)
        proposals = np.broadcast_to(found, (p, *found.shape))  # [p, m, 4]
        maps, known = self._phrase_maps(image), np.array([bool(k) for k in image.outputs])
        middle = np.broadcast_to(np.array(image.size) / 2, (p, 2))
        is_right = metrics.overlaps(proposals, boxes, truth=self._truth) >= metrics.IOU
        values = {
            "kind": np.array([phrase.kind for phrase in image.phrases]),
            "recall_all": is_right.any(axis=1),
            "pointing": known
            & metrics.pointing_hits(maps, ops_boxes.scale(boxes, image.size, frame)),
            "uniform_pointing": ops_boxes.to_mask(boxes, image.size).mean(axis=(1, 2)),
            "center_pointing": metrics.contains(boxes, middle),
        }
        seen = ops_boxes.scale(proposals, image.size, frame)
        heats = {
            "": maps,
            "uniform_": np.ones((1, *frame)),
            "center_": metrics.center_map(frame)[None],
        }
        for kind, heat in heats.items():
            scores = metrics.box_scores(heat, seen[: len(heat)], gamma=self._gamma)
            scores = np.broadcast_to(scores, proposals.shape[:2])
            hits = metrics.recall_hits(scores, proposals, boxes, truth=self._truth)
            if not kind:
                hits &= known[:, None]
            values |= {f"{kind}recall{n}": hits[:, i] for i, n in enumerate(metrics.AT)}
        return values

    def _phrase_maps(self, image: _Image) -> np.ndarray:
        """The mean of the maps of its tags for each phrase, [p, h, w]; 0 without a known word."""
        maps = np.zeros((len(image.phrases), *image.pixels.shape[:2]), np.float32)
        for i, (outputs, phrase) in enumerate(zip(image.outputs, image.phrases, strict=True)):
            if outputs:
                maps[i] = np.mean([image.maps[output] for output in outputs], axis=0)
                if not np.isfinite(maps[i]).all():
                    self._tell("maps with NaN, missed", f"{image.name}: {phrase.text!r}")
                elif maps[i].max() <= 0:
                    self._tell("maps without a positive value", f"{image.name}: {phrase.text!r}")
        return maps

    def _proposals_of(self, image: _Image) -> np.ndarray:
        """float64 [m, 4], of one image."""
        if self._proposals is None:
            return _sliding_boxes(image.size)
        if image.name in self._proposals:
            boxes = np.asarray(self._proposals[image.name], np.float64)
            if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
                raise ValueError(
                    f"the proposals of {image.name} have shape {boxes.shape}; expected finite "
                    "numbers [m, 4]"
                )
            if len(boxes):
                return boxes
        self._counts["images_without_proposals"] += 1
        self._tell("images without proposals", image.name)
        return np.zeros((0, 4))

    def _metrics(self, values: Values) -> dict[str, float]:
        """Means over all phrases, and over those of each kind."""
        count = len(values["kind"])
        if self._counts["images_without_proposals"] == self._images:
            names = ", ".join(sorted(self._proposals or ())[:SHOWN])
            told = self.problems["images without proposals"]["first"]
            raise ValueError(
                f"no image has proposals; the file has {names}, ..., and images are called "
                f"{', '.join(told)}, ..."
            )
        kinds = {"": np.ones(count, bool)}
        if self._by_kind:
            kinds |= {f"_{kind}": values["kind"] == kind for kind in np.unique(values["kind"])}
        found: dict[str, float] = {}
        for suffix, where in kinds.items():
            for name in (*(f"{kind}{score}" for kind in MAPS for score in SCORES), "recall_all"):
                found[name + suffix] = float(values[name][where].mean())
        found |= {**self._counts, "phrases": count}
        return {f"{self.prefix}/{name}": value for name, value in found.items()}

    def _tell(self, kind: str, text: str) -> None:
        problem = self.problems.setdefault(kind, {"count": 0, "first": []})
        problem["count"] += 1
        if len(problem["first"]) < SHOWN:
            problem["first"].append(text)


def _word_maps(
    row: Any, model: nn.Module, data: Any, variables: Any, images: jax.Array, outputs: jax.Array
) -> jax.Array:
    """The positive parts of the maps of outputs [n], at the size of the images: [n, h, w]."""
    inputs = normalize(images, mean=data.mean, std=data.std)
    fn = bind(model, variables, **train_argument(model, False))
    (row,) = at_taps([row], model, fn, inputs)
    # Gradients in a loop are slow where the loop is compiled: such a row comes here outside of jit.
    maps = row.maps(jax.jit(fn) if row.has_loop else fn, inputs, outputs, jax.random.key(0))
    return ops_maps.resize(ops_maps.positive(maps), (images.shape[1], images.shape[2]))


@functools.lru_cache(maxsize=64)
def _sliding_boxes(size: tuple[int, int]) -> np.ndarray:
    return metrics.sliding_boxes(size)


def _open_proposals(path: str) -> Mapping[str, np.ndarray] | None:
    if not path:
        return None
    try:
        found = np.load(pathlib.Path(path).expanduser())
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it is no npz file")
    except Exception as error:  # NumPy raises many kinds
        problem = " ".join(str(error).split())
        raise ValueError(
            f"proposals={path} cannot be read ({problem}); expected an npz file with an array "
            "[m, 4] for each image"
        ) from error
    return found

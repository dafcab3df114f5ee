"""The table that a paper on attribution prints: methods by scores, with intervals and baselines.

Every class that is annotated on an image is asked for (a cue): each method makes its map for the
output of the network that stands for the class, and the map is scored against the class's boxes or
masks. Two baselines that do not look at the image, `center` and `uniform`, are always in the table.
"""

import functools
import json
import pathlib
import re
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax.attribution.targets import class_scores
from attnzoom_jax.data.annotated import open_annotated
from attnzoom_jax.data.class_map import class_outputs
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.chunk_store import ChunkStore
from attnzoom_jax.evaluation.cues import (
    Batch,
    Cue,
    InputSize,
    Problem,
    cue_batches,
    read_cues,
)
from attnzoom_jax.evaluation.map_scores import (
    BASELINES,
    Boxes,
    Energy,
    Faithful,
    Pointing,
    Score,
    Values,
    View,
    baseline_maps,
)
from attnzoom_jax.evaluation.maps import say_progress
from attnzoom_jax.evaluation.rows import Row, at_taps, parse_rows
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.metrics.pointing_game import parse_difficult
from attnzoom_jax.metrics.sanity import randomized
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.taps import bind
from attnzoom_jax.training.sharding import check_batch_size, replicated, split_whole
from attnzoom_jax.training.workdir import to_plain
from attnzoom_jax.viz import score_table

KINDS = {"pointing": Pointing, "energy": Energy, "boxes": Boxes, "faithfulness": Faithful}
ADDRESS = re.compile("0x[0-9a-f]+")  # in the text of a program, another one in every process
SHOWN = 5  # texts of a kind of problem in the table


class AttributionTable:
    """Scores attribution methods against boxes or masks; every cue counts exactly once.

    Args:
        model: images float [n, h, w, c] -> logits [n, k], or [n, h', w', k] where it is fully
            convolutional.
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        methods: rows such as "grad_cam@stage4", see `rows.parse_rows`.
        options: {method: {option: value}}.
        scores: {one of KINDS: options of the class in `map_scores`}; None for {"pointing": {}}.
        truth: "boxes", "segments" or "parts", see `data.annotated`.
        outputs: which outputs of the network stand for a class of the data set: "labels", "names",
            or a file, see `data.class_map`. Of several, the one with the largest logit is asked.
        class_names: of the network's outputs; empty where nobody knows.
        resize: "none", "squash" or "short_side", see `cues.InputSize`; "" for data.resize. Images
            are seen whole: data.crop_size does not count.
        size: in pixels; 0 for data.image_size.
        multiple: see `cues.InputSize`.
        difficult: file with a published list of the difficult subset; "" for the rule.
        weights: "given", or "permuted": every array of the network is shuffled, a network that has
            learnt nothing.
        max_images: of the split, the first ones; 0 for all.
        batch_size: cues at a time.
        chunk_images: images whose cues are kept together, see `folder`.
        resamples: of the images, for intervals of 95 %.
        seed: of the resampling, of permuted weights, and of the methods that sample, which draw by
            the place in the batch too.
        prefix: of the metrics' names; "" for the split.
        folder: where finished chunks are kept, those of each request apart, and the table is
            written (table.json, .csv, .tex, .png, .pdf); None for neither.

    Raises:
        ValueError: whatever cannot be understood, in one line.
    """

    prints_itself = True

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Any,
        split: str,
        mesh: Mesh,
        methods: Sequence[str],
        options: Mapping[str, Any] | None = None,
        scores: Mapping[str, Any] | None = None,
        truth: str = "boxes",
        outputs: str = "labels",
        class_names: Sequence[str] = (),
        resize: str = "",
        size: int = 0,
        multiple: int = 32,
        difficult: str = "",
        weights: str = "given",
        max_images: int = 0,
        batch_size: int = 16,
        chunk_images: int = 64,
        resamples: int = 1000,
        seed: int = 0,
        prefix: str = "",
        folder: pathlib.Path | None = None,
    ) -> None:
        check_batch_size(batch_size, mesh, key="batch_size")
        if weights not in ("given", "permuted"):
            raise unknown_name("weights", weights, ("given", "permuted"))
        self.prefix, self.folder = prefix or split, folder
        self._input_size = _input_size(data, resize, size, multiple)
        data = data.copy_and_resolve_references()
        data.crop_size = 0  # images are seen whole
        self._model, self._data, self._mesh = model, data, mesh
        self._rows = parse_rows([*BASELINES, *methods], options, baselines=BASELINES)
        self._source = open_annotated(data, split=split, truth=truth)
        self._apply = jax.jit(lambda variables, inputs: self._bind(variables)(inputs))
        self._kinds = self._create_scores({"pointing": {}} if scores is None else to_plain(scores))
        self.metrics = {n: m for kind in self._kinds.values() for n, m in kind.metrics.items()}
        self.metric_names = [
            f"{self.prefix}/{row.name}/{metric}" for row in self._rows for metric in self.metrics
        ]
        self._whole = jax.jit(lambda maps: maps, out_shardings=replicated(mesh))
        self._rule, self._class_names = outputs, tuple(class_names)
        self._difficult = None
        if difficult:
            text = pathlib.Path(difficult).expanduser().read_text()
            self._difficult = parse_difficult(text, num_classes=len(self._source.class_names))
        self._weights, self._seed = weights, seed
        self._count = min(max_images or len(self._source), len(self._source))
        self._batch_size, self._chunk_images = batch_size, chunk_images
        self._resampling = {"resamples": resamples, "seed": seed}
        self._request = {
            "methods": [row.name for row in self._rows],
            "options": to_plain(options or {}),
            "scores": to_plain(scores or {}),
            "data": {k: v for k, v in to_plain(data).items() if k not in ("dir", "num_threads")},
            "source": [self._source.name, len(self._source), self._count],
            "truth": truth,
            "difficult": _crc(self._difficult or {}),
            "input": list(map(str, (resize, size, multiple))),
            "weights": weights,
            "batch": [batch_size, chunk_images, seed],
        }

    def run(self, variables: Any) -> dict[str, float]:
        """Make the table.

        Args:
            variables: of the model.

        Returns:
            {"<prefix>/<row>/<metric>": value}; the attribute `table` has the intervals besides, see
            `viz.score_table`.

        Raises:
            ValueError: no image has a class that the network knows, no such tap.
        """
        if self._weights == "permuted":
            names, key = list(variables["params"]), jax.random.key(self._seed)
            *_, (_, variables) = randomized(variables, names, key=key, redraw="permute")
        variables = jax.device_put(variables, replicated(self._mesh))
        inputs = jnp.zeros((1, *self._nominal_size(), 3))
        fn = self._bind(variables)
        rows = at_taps(self._rows, self._model, fn, inputs)
        num_outputs = jax.eval_shape(fn, inputs).shape[-1]
        names = self._class_names or tuple(map(str, range(num_outputs)))
        outputs = class_outputs(self._rule, self._source.class_names, names)
        program = jax.make_jaxpr(lambda variables, x: self._bind(variables)(x))(variables, inputs)
        request = {
            **self._request,
            "network": [_crc_of_text(ADDRESS.sub("", str(program))), _crc(variables)],
            "outputs": [of_class.tolist() for of_class in outputs],
        }
        store = ChunkStore(self.folder / "chunks" if self.folder else None, request)
        explain = jax.jit(
            functools.partial(self._explain, rows), out_shardings=replicated(self._mesh)
        )
        parts = []
        chunks = range(0, self._count, self._chunk_images)
        for i, start in enumerate(say_progress(chunks, self._count, self._chunk_images)):
            part = store.load(i)
            if part is None:
                begin = time.monotonic()
                places = range(start, min(start + self._chunk_images, self._count))
                cues, problems = self._read(places, outputs)
                batches = cue_batches(cues, batch_size=self._batch_size, num_outputs=num_outputs)
                key = jax.random.fold_in(jax.random.key(self._seed), start)
                part = _cue_columns(cues)
                for number, batch in enumerate(batches):
                    own_key = jax.random.fold_in(key, number)
                    found = self._maps(explain, rows, variables, batch, own_key)
                    _fill(part, batch, self._score(rows, variables, batch, found))
                part["problems"] = np.array(["\t".join(found) for found in problems], np.str_)
                part["seconds"] = np.array([time.monotonic() - begin])
                store.save(i, part)
            parts.append(part)
        self.table = {
            **self._summarize(rows, parts),
            "minutes": round(sum(float(part["seconds"][0]) for part in parts) / 60, 2),
        }
        if jax.process_index() == 0:
            print(score_table.text(self.table), flush=True)
            if self.folder:
                _write(self.table, self.folder)
        return {
            f"{self.prefix}/{row['row']}/{metric}": score["value"]
            for row in self.table["rows"]
            for metric, score in row["scores"].items()
        }

    def _bind(self, variables: Any) -> Any:
        return bind(self._model, variables, **train_argument(self._model, False))

    def _nominal_size(self) -> tuple[int, int]:
        """(height, width) of an image as the network may see it."""
        if self._input_size.mode == "none":
            height, width = self._source[0]["image"].shape[:2]
            return height, width
        return self._input_size(self._input_size.size, self._input_size.size)

    def _read(
        self, places: Sequence[int], outputs: Sequence[np.ndarray]
    ) -> tuple[list[Cue], list[Problem]]:
        return read_cues(
            self._source,
            places,
            class_names=self._source.class_names,
            outputs=outputs,
            input_size=self._input_size,
            difficult=self._difficult,
            num_threads=self._data.num_threads,
        )

    def _explain(
        self,
        rows: Sequence[Row],
        variables: Any,
        images: jax.Array,
        outputs: jax.Array,
        key: jax.Array,
    ) -> dict[str, Any]:
        """The output that each cue asks for, its rank, its probability, and most rows' maps."""
        inputs, fn = to_input(images, self._data), self._bind(variables)
        scores = class_scores(fn(inputs))
        own = jnp.where(outputs, scores, -jnp.inf)
        best, target = own.max(axis=1), own.argmax(axis=1)
        return {
            "output": target,
            "rank": jnp.where(  # the last, where the score is no number
                jnp.isfinite(best), (scores > best[:, None]).sum(axis=1), scores.shape[1]
            ),
            "probability": jnp.exp(best - jax.nn.logsumexp(scores, axis=1)),
            "maps": {
                row.name: row.maps(fn, inputs, target, key)
                for row in rows
                if row.run is not None and not row.has_loop
            },
        }

    def _maps(
        self, explain: Any, rows: Sequence[Row], variables: Any, batch: Batch, key: jax.Array
    ) -> dict[str, Any]:
        """What `_explain` returns, with the maps of all rows, on the host."""
        images, outputs = (split_whole(batch[name], self._mesh) for name in ("image", "outputs"))
        found = explain(variables, images, outputs, key)
        loops = [row for row in rows if row.has_loop]
        if loops:  # gradients in a loop are slow where the loop is compiled
            inputs, fn = to_input(images, self._data), functools.partial(self._apply, variables)
            target = split_whole(np.asarray(found["output"]), self._mesh)
            maps = {row.name: row.maps(fn, inputs, target, key) for row in loops}
            found["maps"] |= self._whole(maps)
        found = jax.device_get(found)
        n, size = len(batch["image"]), (batch["image"].shape[1], batch["image"].shape[2])
        found["maps"] |= {name: baseline_maps(name, n, size) for name in BASELINES}
        return found

    def _score(
        self, rows: Sequence[Row], variables: Any, batch: Batch, found: Mapping[str, Any]
    ) -> Values:
        """Columns [n, ...] of one batch: the network's answer, and the scores of every row."""
        inputs = to_input(jnp.asarray(batch["image"]), self._data)
        values = {name: value for name, value in found.items() if name != "maps"}
        for row in rows:
            maps = found["maps"][row.name]
            view = View(row, maps, batch, variables, inputs, found["output"])
            values[f"{row.name}|not_finite"] = ~np.isfinite(maps).all(axis=(1, 2))
            highest, lowest = (np.maximum(end(maps, axis=(1, 2)), 0) for end in (np.max, np.min))
            values[f"{row.name}|empty"] = (highest == lowest) & (row.run is not None)
            for kind in self._kinds.values():
                for name, value in kind.measure(view).items():
                    values[f"{row.name}|{name}"] = value
        return values

    def _summarize(self, rows: Sequence[Row], parts: Sequence[Values]) -> dict[str, Any]:
        """The table, as `viz.score_table` has it."""
        asked = [part for part in parts if len(part["image"])]
        problems = _problems(text for part in parts for text in part["problems"].tolist())
        if not asked:
            what = "; ".join(f"{name} ({p['first'][0]})" for name, p in problems.items())
            raise ValueError(f"{self._source.name}: no cue to score ({what})")
        columns = {
            name: np.concatenate([part[name] for part in asked])
            for name in asked[0]
            if name not in ("problems", "seconds")
        }
        table_rows = []
        for row in rows:
            mark = f"{row.name}|"
            own = {n.removeprefix(mark): v for n, v in columns.items() if n.startswith(mark)}
            for kind in ("not_finite", "empty"):
                where = np.flatnonzero(own[kind])
                if len(where):
                    first = [f"{row.name}: {columns['name'][i]}" for i in where[:SHOWN]]
                    problems[f"{kind}_map ({row.name})"] = {"count": len(where), "first": first}
            scores: dict[str, Score] = {}
            for kind in self._kinds.values():
                scores |= kind.summarize(own, columns, **self._resampling)
            table_rows.append(
                {
                    "row": row.name,
                    "method": row.method,
                    "tap": row.tap,
                    "scores": {name: _plain(score) for name, score in scores.items()},
                }
            )
        return {
            "metrics": {
                name: about
                for name, about in self.metrics.items()
                if any(name in row["scores"] for row in table_rows)
            },
            "rows": table_rows,
            "counts": {
                "images": self._count,
                "images_with_cues": len(np.unique(columns["image"])),
                "cues": len(columns["image"]),
                "difficult_cues": int(columns["difficult"].sum()),
                "classes": len(np.unique(columns["class"])),
                "top1": int((columns["rank"] == 0).sum()),
            },
            "problems": problems,
        }

    def _create_scores(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        kinds: dict[str, Any] = {}
        for name in wanted:
            if name not in KINDS:
                raise unknown_name("score", name, KINDS)
        for name in (name for name in KINDS if name in wanted):  # a ConfigDict sorts its keys
            own: dict[str, Any] = {}
            if name == "pointing":
                own = {"num_classes": len(self._source.class_names)}
            elif name == "faithfulness":
                own = {"apply": self._apply, "mesh": self._mesh}
            try:
                kinds[name] = KINDS[name](**own, **wanted[name])
            except TypeError as error:
                raise ValueError(f"scores.{name}: {error}") from error
        if not kinds:
            raise ValueError(f"scores is empty; expected some of {', '.join(KINDS)}")
        return kinds


def _write(table: Mapping[str, Any], folder: pathlib.Path) -> None:
    """The table for programs, for spreadsheets, for papers and to look at."""
    (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    score_table.write_csv(table, folder / "table.csv")
    score_table.write_latex(table, folder / "table.tex")
    for ending in ("png", "pdf"):
        score_table.draw(table, folder / f"table.{ending}")


def _input_size(data: Any, resize: str, size: int, multiple: int) -> InputSize:
    mode = resize or data.resize
    if mode == "crop":
        raise ValueError(
            "a crop hides a part of the truth; set the evaluation's resize to squash, or to "
            "short_side for a network that takes images of any size"
        )
    return InputSize(mode, size or data.image_size, multiple)


def _cue_columns(cues: Sequence[Cue]) -> Values:
    return {
        "image": np.array([cue.place for cue in cues], np.int64),
        "name": np.array([cue.name for cue in cues], np.str_),
        "class": np.array([cue.class_id for cue in cues], np.int32),
        "difficult": np.array([cue.is_difficult for cue in cues], bool),
    }


def _fill(columns: Values, batch: Batch, values: Mapping[str, np.ndarray]) -> None:
    """Put the values of a batch where its cues are; padding has no place."""
    real = batch["mask"] > 0
    for name, value in values.items():
        shape = (len(columns["image"]), *value.shape[1:])
        column = columns.setdefault(name, np.zeros(shape, value.dtype))
        column[batch["cue"][real]] = value[real]


def _problems(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Each kind of problem with its count and the first texts."""
    problems: dict[str, dict[str, Any]] = {}
    for line in lines:
        kind, _, text = line.partition("\t")
        problem = problems.setdefault(kind, {"count": 0, "first": []})
        problem["count"] += 1
        if len(problem["first"]) < SHOWN:
            problem["first"].append(text)
    return problems


def _plain(score: Score) -> dict[str, Any]:
    """As JSON knows it, which has no NaN."""
    return {name: x if np.isfinite(x) else None for name, x in score._asdict().items()}


def _crc(tree: Any) -> str:
    """A checksum of all numbers."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).tobytes(), total)
    return f"{total:08x}"


def _crc_of_text(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"

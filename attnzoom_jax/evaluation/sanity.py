"""Sanity of attribution methods: do their maps change with the network's weights, and the class?

The weights are drawn anew layer after layer, from the output down, and each map is compared with
that of the network as it was: see `metrics.sanity`. A method that passes loses the likeness; one
that does not explains the image (Adebayo et al. 2018). Beside it stands the likeness of the maps of
two classes, of the network as it was: near 1, the method explains no class (Sixt et al. 2020).

The class is the one that the network predicts, so that any network can be asked on any images.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from attnzoom_jax.attribution.program import trace
from attnzoom_jax.attribution.targets import class_scores
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.maps import say_progress
from attnzoom_jax.evaluation.rows import Row, at_taps, parse_rows
from attnzoom_jax.evaluation.split import Batch, choose, open_batches, spread, to_input
from attnzoom_jax.metrics.bootstrap import intervals
from attnzoom_jax.metrics.sanity import (
    MODES,
    REDRAWS,
    leaf_names,
    other_classes,
    randomized,
)
from attnzoom_jax.metrics.similarity import MEASURES, WINDOW, similarity
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.taps import bind
from attnzoom_jax.models.two_stream import with_fields
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training.sharding import replicated
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.workdir import Workdir
from attnzoom_jax.viz.sanity import save_sanity_curves

CONTAINERS = ("backbone", "inserted")  # where a model keeps another one, or its inserted layers


class Sanity:
    """Compares maps with those of the same network with random weights, and of another class.

    Args:
        model: images float [n, h, w, c] -> logits [n, k], or [n, h', w', k] where it is fully
            convolutional.
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        methods: rows such as "grad_cam@stage4", see `rows.parse_rows`.
        options: {method: {option: value}}.
        mode: "cascading", each time one layer more, or "independent", one layer at a time.
        redraw: "permute" or "normal", see `metrics.sanity.randomized`; or "init", as a new network.
        layers: names of branches of the variables, from the output down; () for `layer_order`.
        images: how many of the split, at even distances; 0 for all.
        size: side in pixels at which maps are compared; 0 for the size of the images.
        seed: of the weights, of the other classes, and of the methods that sample.
        prefix: of the metrics' names; "" for the split.
        folder: where sanity.json and sanity.png are written; None for neither.

    Raises:
        ValueError: unknown method, option, mode or redraw, a size below the window of SSIM, more
            images than there are, data set not prepared, unknown split, a batch size that does not
            fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Any,
        split: str,
        mesh: Mesh,
        methods: Sequence[str] = ("grad_cam", "gradient", "guided_backprop"),
        options: Mapping[str, Any] | None = None,
        mode: str = "cascading",
        redraw: str = "permute",
        layers: Sequence[str] = (),
        images: int = 64,
        size: int = 0,
        seed: int = 0,
        prefix: str = "",
        folder: pathlib.Path | None = None,
    ) -> None:
        redraws = (*REDRAWS, "init")
        for name, value, known in (("mode", mode, MODES), ("redraw", redraw, redraws)):
            if value not in known:
                raise unknown_name(name, value, known)
        if size and size < WINDOW:
            raise ValueError(f"size is {size}; expected 0, or at least {WINDOW}, SSIM's window")
        self.prefix, self.folder = prefix or split, folder
        self._model = with_fields(model, eval_patch="first")  # the maps have one patch per image
        self._rows = parse_rows(methods, options)
        self._mode, self._redraw, self._layers = mode, redraw, tuple(layers)
        self._size, self._seed, self._mesh = size, seed, mesh
        self._data = data.copy_and_resolve_references()
        if images > 0:  # no batch of which most is padding
            whole = mesh.shape["data"] * -(-images // mesh.shape["data"])
            self._data.eval_batch_size = min(data.eval_batch_size, whole)
        self._source, batches = open_batches(self._data, split, mesh, ("image",))
        self._places = spread(len(self._source), images, "images", self._source.name)
        self._batches = functools.partial(batches, lambda source: choose(source, self._places))
        scores = [*MEASURES, *(f"class_{measure}" for measure in MEASURES), "nan_maps"]
        self.metric_names = [
            f"{self.prefix}/{row.name}/{score}" for row in self._rows for score in scores
        ]

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate; prints how far it is. `table` then has every layer, with intervals.

        Args:
            variables: of the model.

        Returns:
            Means over the images, for each row: "<prefix>/<row>/spearman", ".../spearman_abs" and
            ".../ssim", the likeness of the maps when all layers are random, or in the mode
            "independent" the mean over the layers, one of which is; ".../class_spearman" and so on,
            of the maps of the predicted and of a random other class; ".../nan_maps", of how many
            images a map held NaN or infinity: such a pair of maps is left out.

        Raises:
            ValueError: unknown tap or layer, with near matches; fewer than two classes.
        """
        rows, layers, size, num_classes = self._prepare(variables)
        key = jax.random.key(self._seed)
        states = randomized(
            variables, layers, key=key, mode=self._mode, redraw=self._redraw_function(variables)
        )
        # All of them lie where the variables do, so that one program serves all.
        states = [variables, *(state for _, state in states)]
        placed = [self._place(state, variables) for state in states]
        values = self._measure(placed, rows, size, num_classes)
        self.table: dict[str, Any] = {
            "mode": self._mode,
            "redraw": self._redraw,
            "seed": self._seed,
            "split": self._source.name,
            "images": len(self._places),
            "size": list(size),
            "layers": list(layers),
            "rows": [],
            "problems": {},
        }
        metrics: dict[str, float] = {}
        for row, of_row in zip(rows, values, strict=True):
            found = self._summarize(row, of_row)
            metrics |= {f"{self.prefix}/{row.name}/{name}": found[name] for name in found}
        self._write()
        return metrics

    def _prepare(self, variables: Any) -> tuple[list[Row], list[str], tuple[int, int], int]:
        """The rows at their taps, the layers, the size of the maps and the number of classes."""
        batch = next(iter(self._batches()))
        images = jax.eval_shape(functools.partial(to_input, data=self._data), batch["image"])
        rows = at_taps(self._rows, self._model, self._bound(variables, batch), images)

        def scores(variables: Any, images: jax.Array) -> jax.Array:
            return class_scores(self._bound(variables, batch)(images))

        self._image_shape = tuple(images.shape[1:])
        num_classes = jax.eval_shape(scores, variables, images).shape[1]
        layers = list(self._layers) or layer_order(scores, variables, images)
        height, width = (self._size,) * 2 if self._size else images.shape[1:3]
        return rows, layers, (height, width), num_classes

    def _bound(self, variables: Any, batch: Batch) -> Any:
        inputs = {**extra_inputs(batch), **train_argument(self._model, False)}
        return bind(self._model, variables, **inputs)

    def _place(self, state: Any, like: Any) -> Any:
        def place(leaf: jax.Array, like: jax.Array) -> jax.Array:
            is_placed = isinstance(getattr(like, "sharding", None), NamedSharding)
            return jax.device_put(leaf, like.sharding if is_placed else replicated(self._mesh))

        return jax.tree.map(place, state, like)

    def _redraw_function(self, variables: Any) -> Any:
        if self._redraw != "init":
            return self._redraw

        def init(key: jax.Array) -> Any:
            del key  # of the seed as well
            new = jax.jit(lambda: init_variables(self._model, self._image_shape, self._seed))()
            return {name: new[name] for name in variables}

        return init

    def _measure(
        self, states: Sequence[Any], rows: Sequence[Row], size: tuple[int, int], num_classes: int
    ) -> list[np.ndarray]:
        """Of each row [images, measures, states]: state 0, the network as it was, of two classes.

        The other states are compared with state 0. NaN where one of the two maps is not finite.
        """
        whole = replicated(self._mesh)
        key = jax.random.key(self._seed)

        @jax.jit(out_shardings=whole)
        def classes_of(variables: Any, batch: Batch, ids: Any) -> tuple[jax.Array, jax.Array]:
            scores = class_scores(
                self._bound(variables, batch)(to_input(batch["image"], self._data))
            )
            predicted = scores.argmax(axis=1)
            return predicted, other_classes(predicted, num_classes, key=key, ids=ids)

        @jax.jit(out_shardings=whole)
        def compare(maps: jax.Array, others: jax.Array) -> jax.Array:
            alike = [similarity(maps, others, measure=measure) for measure in MEASURES]
            # Of an infinite value Spearman would know the rank alone.
            is_known = jnp.isfinite(maps + others).all(axis=(1, 2))
            return jnp.where(is_known[:, None], jnp.stack(alike, axis=1), jnp.nan)  # [n, measures]

        explain = [self._explain(row, size) for row in rows]
        n, count = self._data.eval_batch_size, len(self._places)
        # An image counts as often as it is explained.
        passes = -(-count // n) * len(rows) * (len(states) + 1)
        passes = iter(say_progress(range(passes), passes * n, n))
        parts: list[list[np.ndarray]] = [[] for _ in rows]
        for i, batch in enumerate(self._batches()):
            predicted, others = classes_of(states[0], batch, n * i + np.arange(n))
            of_batch = jax.random.fold_in(key, i)
            for maps_of, part in zip(explain, parts, strict=True):
                next(passes)
                maps, found = maps_of(states[0], batch, predicted, of_batch), []
                for state in states:
                    next(passes)
                    asked = others if state is states[0] else predicted
                    found.append(compare(maps, maps_of(state, batch, asked, of_batch)))
                part.append(np.stack(jax.device_get(found), axis=2)[: count - n * i])
        return [np.concatenate(part) for part in parts]

    def _explain(self, row: Row, size: tuple[int, int]) -> Any:
        """(variables, batch, class ids, key) -> maps [n, *size], one program for all weights."""

        def maps_of(variables: Any, batch: Batch, targets: jax.Array, key: jax.Array) -> jax.Array:
            images = to_input(batch["image"], self._data)
            maps = row.maps(self._bound(variables, batch), images, targets, key)
            return ops_maps.resize(maps, size)

        return maps_of if row.has_loop else jax.jit(maps_of)

    def _summarize(self, row: Row, values: np.ndarray) -> dict[str, float]:
        """Enter a row into the table; its metrics."""
        is_known = ~np.isnan(values)
        sums = {"alike": np.where(is_known, values, 0), "images": is_known}
        found = intervals(sums, lambda s: s["alike"] / s["images"], seed=self._seed)
        counts = is_known.sum(axis=0)

        def score(measure: int, state: int) -> dict[str, Any]:
            ends = {name: float(getattr(found, name)[measure, state]) for name in found._fields}
            ends = {name: end if np.isfinite(end) else None for name, end in ends.items()}
            return {**ends, "count": int(counts[measure, state])}

        states = range(1, values.shape[2])
        self.table["rows"].append(
            {
                "row": row.name,
                "method": row.method,
                "tap": row.tap,
                "random": {
                    name: [score(m, state) for state in states] for m, name in enumerate(MEASURES)
                },
                "other_class": {name: score(m, 0) for m, name in enumerate(MEASURES)},
            }
        )
        is_nan = ~is_known.all(axis=(1, 2))
        if is_nan.any():
            problem = self.table["problems"].setdefault("nan_map", {"count": 0, "first": []})
            problem["count"] += int(is_nan.sum())
            problem["first"].append(f"{row.name}: {is_nan.sum()} of {len(values)} images")
        random = found.value[:, 1:]
        random = random[:, -1] if self._mode == "cascading" else random.mean(axis=1)
        return {
            **dict(zip(MEASURES, random.tolist(), strict=True)),
            **{f"class_{name}": float(found.value[m, 0]) for m, name in enumerate(MEASURES)},
            "nan_maps": int(is_nan.sum()),
        }

    def _write(self) -> None:
        for text in self.table["problems"].get("nan_map", {}).get("first", ()):
            print(f"warning: maps with NaN are left out: {text}", flush=True)
        if self.folder is not None and jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            Workdir(str(self.folder)).write("sanity.json", self.table)
            save_sanity_curves(self.folder / "sanity.png", self.table)


def layer_order(fn: Any, variables: Any, images: Any) -> list[str]:
    """The layers of a network from the output down.

    A layer is a branch at the top of the variables. What holds a `backbone` or is one, `inserted`,
    and a branch that is alone are none: the branches in them are. Where a layer stands is read from
    the program: the later its variables are first used, the nearer it is to the output.

    Args:
        fn: (variables, images) -> an array.
        variables: a tree of arrays, those of a Flax model by collection.
        images: [n, h, w, c], or their shape; nothing is computed.

    Returns:
        Names for `metrics.sanity.randomized`. Variables that are not used have none.

    Raises:
        ValueError: no variable is used.
    """
    program = trace(fn, variables, images, open_calls=True)
    names = leaf_names(variables)
    leaf_of = dict(zip(program.inputs, names, strict=False))  # the images come behind
    first_use: dict[str, int] = {}
    for i, step in enumerate(program.steps):
        for ref in step.inputs:
            if isinstance(ref, int) and ref in leaf_of:
                first_use.setdefault(leaf_of[ref], i)
    if not first_use:
        raise ValueError("the network uses none of its variables; there is nothing to draw anew")
    tree: dict[str, Any] = {}
    for name in first_use:
        branch = tree
        for part in name.split("/"):
            branch = branch.setdefault(part, {})

    def depth(layer: str) -> int:
        return min(i for name, i in first_use.items() if f"{name}/".startswith(f"{layer}/"))

    return sorted(_layers_in(tree), key=depth, reverse=True)


def _layers_in(branch: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[str]:
    found = []
    for part, below in branch.items():
        is_alone = len(branch) == 1 and path[-1:] != ("inserted",) and any(below.values())
        if part in CONTAINERS or is_alone or any(name in CONTAINERS for name in below):
            found += _layers_in(below, (*path, part))
        else:
            found.append("/".join((*path, part)))
    return found

"""Faithfulness and sensitivity of the maps of a batch, by the functions of metrics/.

    name              value of an image                             passes of the network per image
    insertion         area under the curve of insertion                     steps + 1
    deletion          area under the curve of deletion                      steps + 1
    average_drop      share of the probability lost under the map           2, with increase
    increase          1 where the probability rises under the map           2, with average_drop
    road              mean score, the most relevant pixels removed first    one per share
    road_lerf         mean score, the least relevant pixels removed first   one per share
    max_sensitivity   largest relative change of the map near the image     samples + 1 maps

All but ROAD run on the devices that hold the batch, as one program per batch size. ROAD solves a
sparse system per image and share on the host, one image after the other, so that its time hardly
shrinks with more devices, and needs all images on one process.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from attnzoom_jax.attribution.targets import class_scores
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.metrics.faithfulness import confidence, deletion, insertion
from attnzoom_jax.metrics.road import road
from attnzoom_jax.metrics.sensitivity import max_sensitivity
from attnzoom_jax.training.sharding import check_batch_size, replicated, split_by_example

ON_DEVICE = ("insertion", "deletion", "average_drop", "increase")
ROAD_ORDERS = {"road": "morf", "road_lerf": "lerf"}
NAMES = (*ON_DEVICE, *ROAD_ORDERS, "max_sensitivity")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# (variables, class ids [n], images [n, h, w, c]) -> raw maps [n, h', w']
Explain = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Faithfulness:
    """Scores maps of one network; compiled once per shape of a batch, whatever the weights.

    Args:
        apply: (variables, images [n, h, w, c]) -> logits [n, k], or [n, h', w', k] where the
            network is fully convolutional. The weights are its argument, no part of the program.
        names: of NAMES.
        mesh: batches are split over it.
        steps: of insertion and deletion, see `metrics.faithfulness.deletion`.
        shares: of the pixels that ROAD removes, rising, in (0, 1).
        samples: of max-sensitivity.
        radius: of max-sensitivity, in units of the images: a number, or one per channel.
        score: "probability", "logit" or "correct", of insertion, deletion and ROAD.
        chunk_size: images per pass of the network in insertion and deletion, at most, but never
            fewer than the batch has; memory does not grow with `steps`.
        seed: of ROAD's noise and of the samples of max-sensitivity.

    Raises:
        ValueError: unknown or no names; ROAD on several processes.
    """

    def __init__(
        self,
        apply: Callable[[Any, jax.Array], jax.Array],
        *,
        names: Sequence[str],
        mesh: Mesh,
        steps: int = 100,
        shares: Sequence[float] = SHARES,
        samples: int = 10,
        radius: Any = 0.02,
        score: str = "probability",
        chunk_size: int | None = 32,
        seed: int = 0,
    ) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(f"names is {names!r}; expected a tuple of some of {', '.join(NAMES)}")
        for name in names:
            if name not in NAMES:
                raise unknown_name("score of faithfulness", name, NAMES)
        if jax.process_count() > 1 and set(names) & set(ROAD_ORDERS):
            raise ValueError(
                "ROAD needs all images on one process; leave out road and road_lerf, or run one"
            )
        self.names, self._mesh = tuple(names), mesh
        self._shares, self._samples, self._radius = tuple(shares), samples, radius
        self._score, self._key = score, jax.random.key(seed)
        shared: Any = {"steps": steps, "score": score, "chunk_size": chunk_size}

        def logits(variables: Any, images: jax.Array) -> jax.Array:
            return class_scores(apply(variables, images))

        def on_device(
            variables: Any, images: jax.Array, maps: jax.Array, targets: jax.Array
        ) -> dict[str, jax.Array]:
            fn, found = Partial(logits, variables), {}
            if "insertion" in names:
                found["insertion"] = insertion(fn, images, maps, targets, **shared).area
            if "deletion" in names:
                found["deletion"] = deletion(fn, images, maps, targets, **shared).area
            if "average_drop" in names or "increase" in names:
                seen = confidence(fn, images, maps, targets)
                found |= {"average_drop": seen.drop, "increase": seen.increase}
            return found

        # Whole on every device: a process could not read what lies on those of another one.
        whole = replicated(mesh)
        self._on_device = jax.jit(on_device, out_shardings=whole)
        self._logits = jax.jit(logits, out_shardings=whole)
        self._to_whole = jax.jit(lambda values: values, out_shardings=whole)

    def scores(
        self,
        variables: Any,
        images: Any,
        maps: Any,
        targets: Any,
        mask: Any,
        *,
        explain: Explain | None = None,
        ids: Any = None,
    ) -> dict[str, np.ndarray]:
        """The scores of a batch; sums, means and counts are the caller's.

        Args:
            variables: of the network, on all devices.
            images: float [n, h, w, c], normalised as the network takes them, so that 0 is the mean
                colour; n a multiple of the devices.
            maps: [n, h, w], resized to the images, any sign.
            targets: class ids int [n].
            mask: [n], above 0 for real examples, 0 for padding.
            explain: what made the maps, for max_sensitivity alone, which makes them anew and takes
                them at their own size. It is jitted, once if it is the same object at every call.
            ids: int [n], by which the images draw noise and samples; None for 0, 1, ...

        Returns:
            {name: float32 [n]} on the host. NaN for padding, and where the map holds NaN or the
            class id is out of range.

        Raises:
            ValueError: as the functions of metrics/; a batch that does not fit the devices,
                max_sensitivity without `explain`.
        """
        if "max_sensitivity" in self.names and explain is None:
            raise ValueError("max_sensitivity asks for maps of other images; give explain=")
        check_batch_size(len(images), self._mesh, key="images of a batch of maps")
        batch = jax.device_put(
            (jnp.asarray(images), jnp.asarray(maps), jnp.asarray(targets)),
            split_by_example(self._mesh),
        )
        ids = np.arange(len(mask)) if ids is None else np.asarray(ids)
        found = {}
        if set(self.names) & set(ON_DEVICE):
            found |= self._on_device(variables, *batch)
        for name, order in ROAD_ORDERS.items():
            if name in self.names:
                found[name] = self._road(variables, batch, ids, order)
        if explain is not None and "max_sensitivity" in self.names:
            values = max_sensitivity(
                Partial(explain, variables, batch[2]),
                batch[0],
                key=self._key,
                radius=self._radius,
                samples=self._samples,
                ids=jax.device_put(ids, split_by_example(self._mesh)),
            )
            found["max_sensitivity"] = self._to_whole(values)
        is_real = np.asarray(mask) > 0
        return {
            name: np.where(is_real, np.asarray(found[name], np.float32), np.nan)
            for name in self.names
        }

    def _road(self, variables: Any, batch: Any, ids: np.ndarray, order: str) -> jax.Array:
        def fn(images: jax.Array) -> jax.Array:
            return self._logits(variables, jax.device_put(images, split_by_example(self._mesh)))

        images, maps, targets = batch
        return road(
            fn,
            images,
            maps,
            jax.device_put(targets, replicated(self._mesh)),
            key=self._key,
            ids=ids,
            order=order,
            shares=self._shares,
            score=self._score,
        ).mean

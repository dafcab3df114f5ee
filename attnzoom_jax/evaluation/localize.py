"""Localisation: does the network look at the object, and at the part that decides its class?

Grad-CAM of the true class at a tap, its positive part resized to the image, against the masks that
the data set has. A map that ignores the image has the mask's share of its energy inside the mask.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax import attribution
from attnzoom_jax.data.augment import normalize
from attnzoom_jax.data.pipeline import Resize, eval_batches
from attnzoom_jax.data.source import open_source
from attnzoom_jax.metrics import localization
from attnzoom_jax.models.taps import bind
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training.sharding import prefetch


class Localize:
    """Scores Grad-CAM of the true class against masks; every example counts exactly once.

    Args:
        model: images float [n, h, w, c] -> logits [n, k].
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        tap: where the map is taken; "" for the last spatial tap.
        masks: fields of the data set, [h, w, 1], above 0 inside.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Any,
        split: str,
        mesh: Mesh,
        tap: str = "",
        masks: tuple[str, ...] = ("object_mask", "part_mask"),
    ) -> None:
        self.split, self.masks = split, tuple(masks)
        self._mesh, self._data = mesh, data
        fields = ("image", "label", *self.masks)
        self._source = open_source(data.name, split=split, data_dir=data.dir, fields=fields)

        def add_batch(sums: Any, variables: Any, batch: dict[str, jax.Array]) -> Any:
            images = normalize(batch["image"], mean=data.mean, std=data.std)
            fn = bind(model, variables, train=False)
            where = tap or attribution.default_tap(attribution.list_taps(fn, images))
            maps = attribution.grad_cam(fn, images, batch["label"], tap=where)
            maps = ops_maps.resize(ops_maps.positive(maps), images.shape[1:3])
            new = _sums(maps, {name: batch[name][..., 0] for name in self.masks}, batch["mask"])
            return new if sums is None else jax.tree.map(jnp.add, sums, new)

        self._add_batch = jax.jit(add_batch)

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate.

        Args:
            variables: of the model.

        Returns:
            For every mask field, say `object_mask`, as fractions: "<split>/object_energy" (share of
            the map's energy inside), "<split>/object_share" (the mask's share of the image),
            "<split>/object_energy_ratio" (the one by the other; 1 = no better than a uniform map),
            "<split>/object_pointing" (peak inside) and "<split>/object_center" (image centre
            inside); and "<split>/empty_maps" (maps without any positive value).
        """
        batches = eval_batches(
            self._source,
            batch_size=self._data.eval_batch_size,
            resize=Resize(self._data.resize, self._data.image_size),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self._data.num_threads,
        )
        sums = None
        for batch in prefetch(batches, self._mesh):
            sums = self._add_batch(sums, variables, batch)
        total = {name: float(np.asarray(value)) for name, value in jax.device_get(sums).items()}
        count = total.pop("count")
        metrics = {f"{self.split}/{name}": value / count for name, value in total.items()}
        for mask in self.masks:
            name = f"{self.split}/{mask.removesuffix('_mask')}"
            share = metrics[f"{name}_share"]
            metrics[f"{name}_energy_ratio"] = metrics[f"{name}_energy"] / share if share else 0.0
        return metrics


def _sums(maps: jax.Array, masks: dict[str, jax.Array], real: jax.Array) -> dict[str, jax.Array]:
    h, w = maps.shape[1:]
    center = jnp.zeros_like(maps).at[:, h // 2, w // 2].set(1.0)
    values = {"empty_maps": maps.max(axis=(1, 2)) <= 0}
    for mask, inside in masks.items():
        name = mask.removesuffix("_mask")
        values[f"{name}_energy"] = localization.energy_inside(maps, inside)
        values[f"{name}_share"] = localization.mask_share(inside)
        values[f"{name}_pointing"] = localization.pointing_hit(maps, inside)
        values[f"{name}_center"] = localization.pointing_hit(center, inside)
    sums = {name: jnp.where(real > 0, value, 0).sum() for name, value in values.items()}
    return {**sums, "count": real.sum()}

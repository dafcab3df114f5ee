"""Localisation: does the network look at the object, and at the part that decides its class?

Grad-CAM of the true class at a tap, its positive part resized to the image, against the masks that
the data set has. A map that ignores the image has the mask's share of its energy inside the mask.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from attnzoom_jax import attribution
from attnzoom_jax.data.augment import center_crop
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.evaluation.split import EvalSplit, Sums, to_input
from attnzoom_jax.metrics import localization
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.taps import bind, default_tap
from attnzoom_jax.ops import maps as ops_maps

SCORES = ("energy", "energy_ratio", "share", "pointing", "center")


class Localize:
    """Scores Grad-CAM of the true class against masks; every example counts exactly once.

    Args:
        model: images float [n, h, w, c] -> logits [n, k].
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        tap: where the map is taken; "" for the last spatial tap.
        masks: fields of the data set, [h, w, 1], above 0 inside.
        prefix: of the metrics' names; "" for the split.
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
        prefix: str = "",
    ) -> None:
        self.prefix, self.masks = prefix or split, tuple(masks)
        names = ["empty_maps"]
        for mask in self.masks:
            names += [f"{mask.removesuffix('_mask')}_{score}" for score in SCORES]
        self.metric_names = [f"{self.prefix}/{name}" for name in names]  # without those of gates

        def batch_sums(variables: Any, batch: dict[str, jax.Array]) -> Sums:
            images = to_input(batch["image"], data)
            inputs = {**extra_inputs(batch), **train_argument(model, False)}
            fn = bind(model, variables, **inputs)
            taps = attribution.list_taps(fn, images)
            maps = attribution.grad_cam(
                fn, images, batch["label"], tap=tap or default_tap(model, fn, images)
            )
            _, masks = attribution.read_taps(fn, images, attribution.gate_taps(taps))
            crop = data.crop_size or None
            inside = {name: center_crop(batch[name], size=crop)[..., 0] for name in self.masks}
            values = _scores("", ops_maps.positive(maps), inside)
            for gate, mask in masks.items():
                name = "gate_" + gate.removeprefix("inserted/").replace("/gate", "") + "_"
                values |= _scores(name.replace("/", "."), mask.mean(axis=-1), inside)
            sums = {name: jnp.where(batch["mask"] > 0, v, 0).sum() for name, v in values.items()}
            return {**sums, "count": batch["mask"].sum()}

        self._split = EvalSplit(
            data=data,
            split=split,
            mesh=mesh,
            fields=("image", "label", *self.masks),
            batch_sums=batch_sums,
        )

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate.

        Args:
            variables: of the model.

        Returns:
            For every mask field, say `object_mask`, as fractions: "<prefix>/object_energy" (share
            of the map's energy inside), "<prefix>/object_share" (the mask's share of the image),
            "<prefix>/object_energy_ratio" (the one by the other; 1 = no better than a uniform map),
            "<prefix>/object_pointing" (peak inside) and "<prefix>/object_center" (image centre
            inside); "<prefix>/empty_maps": maps without any positive value. The mask of the layer
            inserted at a path is scored like the map, under "<prefix>/gate_<path>_object_energy"
            and so on, with "<prefix>/gate_<path>_saturated", the share of it that is 1.
        """
        total = {name: float(value) for name, value in self._split.run(variables).items()}
        count = total.pop("count")
        metrics = {name: value / count for name, value in total.items()}
        for mask in self.masks:
            energy = f"{mask.removesuffix('_mask')}_energy"
            share = metrics[f"{mask.removesuffix('_mask')}_share"]
            for name in [name for name in metrics if name.endswith(energy)]:
                metrics[f"{name}_ratio"] = metrics[name] / share if share else 0.0
        return {f"{self.prefix}/{name}": metrics[name] for name in sorted(metrics)}


def _scores(kind: str, maps: jax.Array, masks: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scores [n] of maps [n, h', w'] against masks [n, h, w], named `<kind><score>`."""
    if kind:
        scores = {f"{kind}saturated": (maps == 1).mean(axis=(1, 2))}
    else:
        scores = {"empty_maps": maps.max(axis=(1, 2)) <= 0}
    for mask, inside in masks.items():
        _, h, w = inside.shape
        name = kind + mask.removesuffix("_mask")
        resized = ops_maps.resize(maps, (h, w))
        scores[f"{name}_energy"] = localization.energy_inside(resized, inside)
        scores[f"{name}_pointing"] = localization.pointing_hit(resized, inside)
        if not kind:  # of the data alone, whatever the map
            scores[f"{name}_share"] = localization.mask_share(inside)
            scores[f"{name}_center"] = inside[:, h // 2, w // 2] > 0
    return scores

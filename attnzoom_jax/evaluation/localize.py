"""Localisation: does the network look at the object, and at the part that decides its class?

Grad-CAM of the true class at a tap, its positive part resized to the image, against the masks that
the data set has. A map that ignores the image has the mask's share of its energy inside the mask.

A model whose taps are those of `TwoStream` has two such maps. The object stream looks at a patch:
its map, at `object_trunk`, is resized into the patch's box, with 0 outside of it. So is whatever
is computed between the taps `boxes` and `object_trunk`: masks of layers there lie in the patch too.
"""

from collections.abc import Mapping
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
from attnzoom_jax.models.two_stream import with_fields
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.ops.patches import paste_boxes

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
        self.metric_names = [f"{self.prefix}/{name}" for name in names]  # without gates, patches
        model = with_fields(model, eval_patch="first")  # the maps have one patch per image

        def batch_sums(variables: Any, batch: dict[str, jax.Array]) -> Sums:
            images = to_input(batch["image"], data)
            inputs = {**extra_inputs(batch), **train_argument(model, False)}
            fn = bind(model, variables, **inputs)
            taps = attribution.list_taps(fn, images)
            gates, (trunk, in_patch) = attribution.gate_taps(taps), _object_stream(taps)
            looks = {"": tap or default_tap(model, fn, images)}
            if trunk:
                looks["patch_"] = trunk
            maps = attribution.grad_cam(
                fn, images, batch["label"], tap=list(dict.fromkeys(looks.values()))
            )
            _, read = attribution.read_taps(fn, images, [*gates, *in_patch[:1]])
            boxes = read[in_patch[0]] if trunk else None
            size = (images.shape[1], images.shape[2])
            crop = data.crop_size or None
            inside = {name: center_crop(batch[name], size=crop)[..., 0] for name in self.masks}
            values = _scores_of_data(inside, boxes)
            for kind, name in looks.items():
                heat = ops_maps.positive(maps[name])
                values[f"{kind}empty_maps"] = heat.max(axis=(1, 2)) <= 0
                heat = _on_image(heat, size, boxes if name in in_patch else None)
                values |= _scores_of_map(kind, heat, inside)
            for name in gates:
                mask = read[name].mean(axis=-1)
                path = name.removeprefix("inserted/").replace("/gate", "").replace("/", ".")
                values[f"gate_{path}_saturated"] = (mask == 1).mean(axis=(1, 2))
                mask = _on_image(mask, size, boxes if name in in_patch else None)
                values |= _scores_of_map(f"gate_{path}_", mask, inside)
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

            With an object stream also "<prefix>/patch_object_energy", "..._energy_ratio" and
            "..._pointing" of its map, "<prefix>/patch_empty_maps", "<prefix>/patch_share" (the
            box's share of the image) and "<prefix>/patch_object_covered": the share of the mask
            that lies in the box, which is all that the stream can see of it. Of several boxes per
            image the first is taken. A map that is uniform in its box has an energy ratio of about
            `patch_object_covered` over `patch_share`.
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


def _object_stream(taps: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The tap `object_trunk` of a stream that looks at patches, and all taps from `boxes` to it."""
    names = list(taps)
    for i, name in enumerate(names):
        trunk = f"{name.removesuffix('boxes')}object_trunk"
        if name.split("/")[-1] == "boxes" and trunk in taps:
            return trunk, names[i : names.index(trunk) + 1]
    return "", []


def _on_image(maps: jax.Array, size: tuple[int, int], boxes: jax.Array | None) -> jax.Array:
    """Maps [n, h', w'] of the whole image, or of its box, at the size of the image."""
    return ops_maps.resize(maps, size) if boxes is None else paste_boxes(maps, boxes, size)


def _scores_of_map(
    kind: str, maps: jax.Array, masks: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Scores [n] of maps [n, h, w] against masks [n, h, w], named `<kind><mask>_<score>`."""
    scores = {}
    for mask, inside in masks.items():
        name = kind + mask.removesuffix("_mask")
        scores[f"{name}_energy"] = localization.energy_inside(maps, inside)
        scores[f"{name}_pointing"] = localization.pointing_hit(maps, inside)
    return scores


def _scores_of_data(
    masks: Mapping[str, jax.Array], boxes: jax.Array | None
) -> dict[str, jax.Array]:
    """What masks [n, h, w] and boxes [n, 4] score whatever the map."""
    scores = {}
    for mask, inside in masks.items():
        n, h, w = inside.shape
        name = mask.removesuffix("_mask")
        scores[f"{name}_share"] = localization.mask_share(inside)
        scores[f"{name}_center"] = inside[:, h // 2, w // 2] > 0
        if boxes is not None:
            in_box = paste_boxes(jnp.ones((n, 1, 1)), boxes, (h, w))
            scores["patch_share"] = localization.mask_share(in_box)
            scores[f"patch_{name}_covered"] = localization.energy_inside(inside > 0, in_box)
    return scores

"""Attributes: how well each is told, and whether its mask lies on the pixels that decide it.

What is told is scored from the logits of the whole split, see `metrics/attributes.py`. Where the
data set has the pixels that decide each attribute (bit k of the field `attribute_bits`, on the
labelled object: `object_mask`), two kinds of maps are scored against them: the masks of a model
with the tap `attention/gate`, the channels averaged, and Grad-CAM of each attribute's logit, its
positive part. Maps are resized to the image. A map that ignores the image has the pixels' share of
its energy on them, an energy ratio of 1.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnzoom_jax import attribution
from attnzoom_jax.data.augment import center_crop
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.evaluation.split import Batch, EvalExamples, to_input
from attnzoom_jax.metrics import localization
from attnzoom_jax.metrics.attributes import (
    attribute_metrics,
    attribute_sums,
    average_precision,
    mean_and_each,
    mean_difference,
)
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.taps import bind, default_tap
from attnzoom_jax.ops import maps as ops_maps

GATE = "attention/gate"
MEANS = ("accuracy", "balanced_accuracy", "average_precision")
COUNTS = ("attributes_scored", "count")
PIXELS = ("attribute_bits", "object_mask")
MOST_BITS = 16  # in the field `attribute_bits`


class Attributes:
    """Evaluates a model of attributes on a split: every example counts exactly once.

    Args:
        model: images float [n, h, w, c] -> logits [n, a].
        data: the config's `data` section, with `data.labels` "attributes".
        split: of the data set.
        mesh: batches are split over it.
        prefix: of the metrics' names; "" for the split.
        masks: also score masks and maps; the data set needs `attribute_bits` and `object_mask`.
        tap: where the maps are taken; "" for the last spatial tap.

    Raises:
        ValueError: more attributes than bits, a tap without `masks`, data set not prepared, unknown
            split or field, a batch size that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Any,
        split: str,
        mesh: Mesh,
        prefix: str = "",
        masks: bool = False,
        tap: str = "",
    ) -> None:
        if tap and not masks:
            raise ValueError(f"tap={tap!r} is where maps are taken; set masks=True as well")
        self.prefix = prefix or split

        def outputs(variables: Any, batch: Batch) -> dict[str, jax.Array]:
            images = to_input(batch["image"], data)
            inputs = {**extra_inputs(batch), **train_argument(model, False)}
            fn = bind(model, variables, **inputs)
            gate = gate_of(attribution.list_taps(fn, images)) if masks else ""
            logits, read = attribution.read_taps(fn, images, [gate] if gate else [])
            values = {"logits": logits, "labels": batch["label"]}
            if masks:
                inside = deciding_pixels(batch, logits.shape[1], data.crop_size or None)
                place = tap or default_tap(model, fn, images)
                values["share"] = inside.mean(axis=(2, 3)).T
                values["map_energy"] = _energy(_maps(fn, images, len(inside), place), inside)
            if gate:
                values |= _scores_of_gate(read[gate], inside)
            return values

        self._split = EvalExamples(
            data=data,
            split=split,
            mesh=mesh,
            fields=("image", "label", *(PIXELS if masks else ())),
            outputs=outputs,
        )
        self._names = self._split.source.class_names
        if masks and len(self._names) > MOST_BITS:
            raise ValueError(
                f"masks=True: {self._split.source.name} has {len(self._names)} attributes, and "
                f"attribute_bits has {MOST_BITS} bits; leave masks away"
            )
        names = [*MEANS, *(["map_energy", "map_energy_ratio"] if masks else []), *COUNTS]
        # Without those of each attribute, which it may lack, and those of a gate.
        self.metric_names = [f"{self.prefix}/{name}" for name in names]

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate.

        Args:
            variables: of the model.

        Returns:
            "<prefix>/accuracy", "<prefix>/balanced_accuracy" and "<prefix>/average_precision", the
            means over the attributes in [0, 1], and of each "<prefix>/accuracy_<attribute>" and so
            on; "<prefix>/attributes_scored" and "<prefix>/count", see `attribute_metrics`.

            With `masks`, of Grad-CAM: "<prefix>/map_energy", the share of its energy on the
            deciding pixels, over the images that have such pixels, and "<prefix>/map_energy_ratio",
            that by the share of the image which they are (1 = no better than a uniform map); means
            over the attributes, and "..._<attribute>". Of the masks likewise "<prefix>/mask_energy"
            and so on, with "<prefix>/mask_spread_attributes", the mean absolute difference between
            the masks of two attributes at the same place and channel, and
            "<prefix>/mask_spread_channels", between two channels; 0 where they share one mask.
        """
        values = {k: np.asarray(v, np.float64) for k, v in self._split.run(variables).items()}
        logits, labels = values["logits"], values["labels"]
        sums = attribute_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.ones(len(logits)))
        metrics = attribute_metrics(sums, self._names)
        precision = average_precision(logits, labels)
        metrics |= mean_and_each("average_precision", precision, self._names)
        for kind in ("map_energy", "mask_energy"):
            if kind in values:
                metrics |= self._energies(kind, values[kind], values["share"])
        spreads = [name for name in values if name.startswith("mask_spread")]
        metrics |= {name: float(values[name].mean()) for name in spreads}
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}

    def _energies(self, kind: str, energy: np.ndarray, share: np.ndarray) -> dict[str, float]:
        """Metrics of energies [n, a] on the deciding pixels, and of their shares of the image.

        Both are 0 in an image without such pixels, which does not count.
        """
        count = (share > 0).sum(axis=0)
        counted = np.where(count > 0, count, np.nan)  # [a]
        mean_energy, mean_share = energy.sum(axis=0) / counted, share.sum(axis=0) / counted
        return {
            **mean_and_each(kind, mean_energy, self._names),
            **mean_and_each(f"{kind}_ratio", mean_energy / mean_share, self._names),
        }


def gate_of(taps: Mapping[str, tuple[int, ...]]) -> str:
    """The tap of the masks of each attribute, [n, h, w, a, c].

    Args:
        taps: {name: shape}, as `attribution.list_taps` returns them.

    Returns:
        Its name; "" where there is none.
    """
    found = [name for name, shape in taps.items() if name.endswith(GATE) and len(shape) == 5]
    return found[0] if found else ""


def deciding_pixels(batch: Mapping[str, Any], count: int, crop_size: int | None) -> jax.Array:
    """Where the pixels lie that decide each attribute.

    Args:
        batch: the fields PIXELS of images, [n, h, w, 1].
        count: a, of attributes.
        crop_size: of the central crop; None: none.

    Returns:
        bool [a, n, h', w'].
    """
    bits, on_object = (center_crop(batch[name], size=crop_size)[..., 0] for name in PIXELS)
    attributes = jnp.arange(count, dtype=bits.dtype)[:, None, None, None]
    return ((bits >> attributes) & 1 > 0) & (on_object > 0)


def _maps(fn: Any, images: jax.Array, count: int, tap: str) -> jax.Array:
    """Grad-CAM of each attribute's logit, [a, n, h', w']; in turn, as memory holds one of them."""
    return jax.lax.map(
        lambda k: attribution.grad_cam(fn, images, jnp.full(len(images), k), tap=tap),
        jnp.arange(count),
    )


def _energy(maps: jax.Array, inside: jax.Array) -> jax.Array:
    """Share of the energy of maps [a, n, h', w'] inside of masks [a, n, h, w], as [n, a]."""
    a, n, h, w = inside.shape
    maps = ops_maps.positive(maps).reshape(a * n, *maps.shape[2:])
    resized = ops_maps.resize(maps, (h, w))  # [an, h, w]
    return localization.energy_inside(resized, inside.reshape(a * n, h, w)).reshape(a, n).T


def _scores_of_gate(gate: jax.Array, inside: jax.Array) -> dict[str, jax.Array]:
    """Scores of masks [n, h', w', a or 1, c or 1], of each example."""
    a, n = inside.shape[:2]
    masks = jnp.moveaxis(gate.mean(axis=-1), -1, 0)  # [a or 1, n, h', w']
    between_attributes = mean_difference(gate, axis=3).reshape(n, -1)
    between_channels = mean_difference(gate, axis=4).reshape(n, -1)
    return {
        "mask_energy": _energy(jnp.broadcast_to(masks, (a, *masks.shape[1:])), inside),
        "mask_spread_attributes": between_attributes.mean(axis=1),
        "mask_spread_channels": between_channels.mean(axis=1),
    }

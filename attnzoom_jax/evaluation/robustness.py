"""Robustness: what a model still gets right when its images are corrupted or attacked.

Every corruption of data/corruptions.py at every level, and the attacks of metrics/robustness.py,
which differentiate through the whole model, masks and zooms included.

PGD stops early where a gradient vanishes, and its accuracy is then too good. So a search without
gradients, and the PGD examples of another model, are tried at the same distance: neither should
leave a lower accuracy than PGD does (Athalye et al. 2018, arXiv 1802.00420).
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from attnzoom_jax.data.augment import center_crop
from attnzoom_jax.data.corruptions import CORRUPTIONS, LEVELS, Corrupted
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.data.pipeline import Resize
from attnzoom_jax.data.source import Source
from attnzoom_jax.data.split import labels_of
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.maps import say_progress
from attnzoom_jax.evaluation.restore import TrainedModel, restore_model
from attnzoom_jax.evaluation.split import Batch, EvalSplit, Sums, choose, spread, to_input
from attnzoom_jax.metrics.attributes import attribute_metrics, attribute_sums
from attnzoom_jax.metrics.classification import classification_metrics, classification_sums
from attnzoom_jax.metrics.robustness import check_attack, count_wrong, fgsm, pgd, random_search
from attnzoom_jax.models.insert import train_argument

ATTACKS = ("fgsm", "pgd", "random_search")
BLACK_BOX = ("random_search", "transfer")  # attacks that do not see the model's gradient


class Robustness:
    """Evaluates a model on corrupted and on attacked images of a split.

    Args:
        model: images float [n, h, w, c] -> logits [n, k].
        data: the config's `data` section.
        split: of the data set.
        mesh: batches are split over it.
        prefix: of the metrics' names; "" for the split.
        corruptions: names in CORRUPTIONS; () for none.
        levels: of each, of 1..5.
        attacks: of "fgsm" (in linf alone), "pgd" and "random_search"; () for none.
        linf: distances of the attacks in the maximum norm, in pixels of the range [0, 1].
        l2: distances in the Euclidean norm, likewise.
        steps: of PGD.
        queries: of the random search.
        count: images that are corrupted, at even distances in the split; 0: all.
        attack_count: images that are attacked, likewise; an attack costs a pass per step.
        seed: of everything that is drawn, 0 or more; each image draws for itself.
        transfer_from: folder of another run on the same data; its PGD examples are tried on this
            model, as the attack "transfer". "": none.

    Raises:
        ValueError: unknown corruption, level or attack, a distance or number out of range, a run
            that does not fit, data set not prepared, unknown split, a batch size that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Any,
        split: str,
        mesh: Mesh,
        prefix: str = "",
        corruptions: Sequence[str] = tuple(CORRUPTIONS),
        levels: Sequence[int] = LEVELS,
        attacks: Sequence[str] = ATTACKS,
        linf: Sequence[float] = (2 / 255, 8 / 255),
        l2: Sequence[float] = (0.5,),
        steps: int = 20,
        queries: int = 200,
        count: int = 0,
        attack_count: int = 0,
        seed: int = 0,
        transfer_from: str = "",
    ) -> None:
        self.prefix, self._data, self._seed = prefix or split, data, seed
        given = {"corruptions": corruptions, "levels": levels, "attacks": attacks}
        for option, values in (given | {"linf": linf, "l2": l2}).items():
            if not isinstance(values, list | tuple):
                raise ValueError(f"{option} is {values!r}; expected a tuple, such as ({values!r},)")
        self._steps, self._queries = steps, queries
        self._attacks = tuple(attacks)
        self._settings = [("linf", epsilon) for epsilon in linf] + [("l2", e) for e in l2]
        self._conditions = list(itertools.product(corruptions, levels))
        for name, level in self._conditions:  # before anything is read
            Corrupted((), name, level, seed=seed)
        for name in attacks:
            if name not in ATTACKS:
                raise unknown_name("attack", name, ATTACKS)
        for norm, epsilon in self._settings:
            check_attack(norm=norm, epsilon=epsilon, steps=steps, queries=queries)
        if (corruptions and not levels) or (attacks and not self._settings):
            raise ValueError(
                "corruptions need levels, and attacks distances, linf or l2; to leave them out, "
                "set corruptions or attacks to ()"
            )

        self._logits = _logits_of(model)

        def batch_sums(variables: Any, batch: Batch) -> Sums:
            images = to_input(batch["image"], data)
            logits = self._logits(variables, extra_inputs(batch), images)
            score = attribute_sums if batch["label"].ndim == 2 else classification_sums
            return score(logits, batch["label"], batch["mask"])

        self._split = EvalSplit(
            data=data, split=split, mesh=mesh, fields=("image", "label"), batch_sums=batch_sums
        )
        source = self._split.source
        self._rows = spread(len(source), count, "count", source.name)
        self._attack_rows = spread(len(source), attack_count, "attack_count", source.name)
        self._to_input = jax.jit(lambda images: to_input(images, data))
        self._other = _restore_other(transfer_from, source, data, mesh) if transfer_from else None
        self._other_logits = _logits_of(self._other.model) if self._other else None
        self.metric_names = [f"{self.prefix}/{name}" for name in self._names()]

    def run(self, variables: Any) -> dict[str, float]:
        """Evaluate; prints how far it is.

        Args:
            variables: of the model.

        Returns:
            As fractions, of `count` images: "<prefix>/clean_accuracy",
            "<prefix>/<corruption>_<level>_accuracy", "<prefix>/<corruption>_accuracy" (mean over
            the levels) and "<prefix>/corruption_accuracy" (mean over the corruptions).

            Of `attack_count` images: "<prefix>/attack_clean_accuracy";
            "<prefix>/<attack>_<norm>_<distance>_accuracy", the distance as in linf_8_255, which is
            8/255, and l2_0.5; "<prefix>/attack_accuracy", the mean of PGD's;
            "<prefix>/gradient_masking", the most by which an attack without gradients leaves less
            accuracy than PGD at the same distance: above 0, PGD's figures say little. An image that
            is wrong as it is counts as wrong under PGD, random search and transfer.

            With attributes an accuracy is the share of right decisions about attributes; there is
            also "..._balanced_accuracy" of clean and corrupted images. Attacks look for the image
            with the most wrong decisions. PGD climbs a smooth stand-in for that, which is not the
            same, so a gap of single decisions is no sign of a masked gradient there.
        """
        metrics = {**self._run_corruptions(variables), **self._run_attacks(variables)}
        return {f"{self.prefix}/{name}": metrics[name] for name in self._names()}

    def _names(self) -> list[str]:
        has_attributes = labels_of(self._data) == "attributes"
        names = ["count"]
        for score in ("accuracy", "balanced_accuracy") if has_attributes else ("accuracy",):
            names += [f"clean_{score}"]
            names += [f"{name}_{level}_{score}" for name, level in self._conditions]
            names += [f"{name}_{score}" for name in dict(self._conditions)]
            names += [f"corruption_{score}"] if self._conditions else []
        kinds = [*self._attacks, *(["transfer"] if self._other else [])]
        if kinds:
            names += ["attack_count", "attack_clean_accuracy"]
        for kind in kinds:
            names += [
                f"{kind}_{setting_name(norm, epsilon)}_accuracy"
                for norm, epsilon in self._settings
                if kind != "fgsm" or norm == "linf"
            ]
        if "pgd" in kinds:
            names += ["attack_accuracy"]
            names += ["gradient_masking"] if set(kinds) & set(BLACK_BOX) else []
        return names

    def _run_corruptions(self, variables: Any) -> dict[str, float]:
        count = len(self._rows)
        data, conditions = self._data, [("", 0), *self._conditions]
        metrics: dict[str, float] = {"count": count}
        for name, level in say_progress(conditions, count * len(conditions), count):

            def change(source: Source, name: str = name, level: int = level) -> Source:
                if name:
                    source = corrupted(source, data, name, level, seed=self._seed)
                return choose(source, self._rows)

            scores = self._scores(self._split.run(variables, change))
            condition = f"{name}_{level}" if name else "clean"
            metrics |= {f"{condition}_{score}": value for score, value in scores.items()}
        for score in scores:
            of_each = collections.defaultdict(list)
            for name, level in self._conditions:
                of_each[name].append(metrics[f"{name}_{level}_{score}"])
            means = {name: float(np.mean(values)) for name, values in of_each.items()}
            metrics |= {f"{name}_{score}": mean for name, mean in means.items()}
            if means:
                metrics[f"corruption_{score}"] = float(np.mean(list(means.values())))
        return metrics

    def _scores(self, sums: dict[str, Any]) -> dict[str, float]:
        if "top1" in sums:
            return {"accuracy": classification_metrics(sums)["top1"]}
        metrics = attribute_metrics(sums, self._split.source.class_names)
        return {score: metrics[score] for score in ("accuracy", "balanced_accuracy")}

    def _run_attacks(self, variables: Any) -> dict[str, float]:
        if not (self._attacks or self._other):
            return {}
        rows, size = self._attack_rows, self._data.eval_batch_size
        batches = self._split.batches(lambda source: choose(source, rows))
        wrong: dict[str, float] = collections.defaultdict(float)
        for i, batch in enumerate(say_progress(batches, len(rows), size)):
            ids = np.zeros(size, np.int32)
            part = rows[i * size : (i + 1) * size]
            ids[: len(part)] = part
            for name, counts in self._attack(variables, batch, ids).items():
                wrong[name] += float(_share(counts, batch["label"], batch["mask"]))
        metrics = {f"{name}_accuracy": 1 - total / len(rows) for name, total in wrong.items()}
        metrics["attack_count"] = len(rows)
        if "pgd" in self._attacks:
            of_pgd = [value for name, value in metrics.items() if name.startswith("pgd_")]
            metrics["attack_accuracy"] = float(np.mean(of_pgd))
        gaps = _masking_gaps(metrics, self._settings)
        if gaps:
            metrics["gradient_masking"] = max(gaps)
        return metrics

    def _attack(self, variables: Any, batch: Batch, ids: np.ndarray) -> dict[str, jax.Array]:
        """Wrong decisions [n] about a batch under each attack."""
        inputs, labels = extra_inputs(batch), batch["label"]
        images, fn = self._to_input(batch["image"]), Partial(self._logits, variables, inputs)
        space = {"mean": self._data.mean, "std": self._data.std}
        start_key, search_key = jax.random.split(jax.random.key(self._seed))
        clean = count_wrong(fn, images, labels)
        found = {"attack_clean": clean}
        for norm, epsilon in self._settings:
            setting = setting_name(norm, epsilon)
            shared: Any = {"epsilon": epsilon, "norm": norm, "ids": ids}
            of_pgd: Any = {**shared, "steps": self._steps, "key": start_key}
            if "fgsm" in self._attacks and norm == "linf":
                found[f"fgsm_{setting}"] = fgsm(fn, images, labels, epsilon=epsilon, **space).wrong
            if "pgd" in self._attacks:
                found[f"pgd_{setting}"] = pgd(fn, images, labels, **of_pgd, **space).wrong
            if "random_search" in self._attacks:
                of_search: Any = {**shared, "queries": self._queries, "key": search_key, **space}
                found[f"random_search_{setting}"] = random_search(
                    fn, images, labels, **of_search
                ).wrong
            if self._other is not None:
                theirs = self._other.config.data
                other_space = {"mean": theirs.mean, "std": theirs.std}
                other: Any = Partial(self._other_logits, self._other.variables, inputs)
                moved = _renormalize(images, space, other_space)
                moved = pgd(other, moved, labels, **of_pgd, **other_space).images
                missed = count_wrong(fn, _renormalize(moved, other_space, space), labels)
                found[f"transfer_{setting}"] = jnp.maximum(clean, missed)
        return found


def corrupted(source: Source, data: Any, name: str, level: int, *, seed: int) -> Source:
    """A split whose images are corrupted at the size at which the model sees them.

    Args:
        source: the split.
        data: the config's `data` section.
        name: of the corruption.
        level: 1..5.
        seed: 0 or more.

    Returns:
        The split.

    Raises:
        ValueError: unknown corruption or level, negative seed.
    """
    resize = Resize(data.resize, data.image_size)
    options = {"seed": seed, "resize": resize, "crop_size": data.crop_size}
    return dataclasses.replace(source, examples=Corrupted(source.examples, name, level, **options))


def setting_name(norm: str, epsilon: float) -> str:
    """A norm and a distance as metrics name them: linf_8_255 for a whole number of 255ths."""
    steps = round(255 * epsilon)
    is_whole = norm == "linf" and steps and abs(steps / 255 - epsilon) < 1e-6
    return f"{norm}_{steps}_255" if is_whole else f"{norm}_{epsilon:g}"


def _logits_of(model: nn.Module) -> Any:
    def logits(variables: Any, inputs: dict[str, Any], images: jax.Array) -> Any:
        return model.apply(variables, images, **inputs, **train_argument(model, False))

    return logits


def _restore_other(workdir: str, source: Source, data: Any, mesh: Mesh) -> TrainedModel:
    """Another run, if it knows the same classes and takes images of the same size."""
    other = restore_model(workdir, mesh=mesh)
    image = Resize(data.resize, data.image_size)(source[0]["image"])
    shape = center_crop(image[None], size=data.crop_size or None).shape[1:]
    if other.class_names != source.class_names or other.image_shape != shape:
        raise ValueError(
            f"transfer_from={workdir} is a model of {len(other.class_names)} classes and images of "
            f"{list(other.image_shape)}; expected the {len(source.class_names)} classes of "
            f"{source.name} and {list(shape)}"
        )
    return other


@jax.jit
def _share(wrong: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum over a batch of each image's share of wrong decisions."""
    decisions = labels.shape[1] if labels.ndim == 2 else 1
    return jnp.where(mask > 0, wrong, 0).sum() / decisions


@jax.jit
def _renormalize(images: jax.Array, old: dict[str, Any], new: dict[str, Any]) -> jax.Array:
    pixels = images * jnp.asarray(old["std"]) + jnp.asarray(old["mean"])
    return (pixels - jnp.asarray(new["mean"])) / jnp.asarray(new["std"])


def _masking_gaps(metrics: dict[str, float], settings: Sequence[tuple[str, float]]) -> list[float]:
    """By how much attacks without gradients beat PGD at each distance; warns where one does."""
    gaps = []
    for norm, epsilon in settings:
        setting = f"{setting_name(norm, epsilon)}_accuracy"
        black_box = {k: metrics[f"{k}_{setting}"] for k in BLACK_BOX if f"{k}_{setting}" in metrics}
        if not black_box or f"pgd_{setting}" not in metrics:
            continue
        best = min(black_box, key=lambda kind: black_box[kind])
        left, of_pgd = black_box[best], metrics[f"pgd_{setting}"]
        gaps.append(of_pgd - left)
        if left < of_pgd:
            print(
                f"warning: gradient masking? {best} leaves an accuracy of {left:.4f} at "
                f"{norm} {epsilon:.4g}, PGD {of_pgd:.4f}: do not take PGD's for robustness",
                flush=True,
            )
    return gaps

"""One update of the parameters, a pure function of (state, batch), and several in one call."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from attnzoom_jax.data import augment
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.training.losses import one_hot_targets
from attnzoom_jax.training.objective import total_loss
from attnzoom_jax.training.sharding import replicated, split_by_example
from attnzoom_jax.training.state import TrainState
from attnzoom_jax.training.terms import CrossEntropy, Term

Metrics = dict[str, jax.Array]
NO_STEP = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a batch becomes a loss; field names are the config's.

    Attributes:
        seed: of augmentation and dropout.
        mean: of the pixels per channel, in [0, 1].
        std: of the pixels per channel, in [0, 1].
        crop_padding: pixels of zero padding before a random crop; 0 with no crop_size: no crop.
        crop_size: side of the random crop; None keeps the size.
        flip: mirror half of the images.
        auto_augment: name of a policy, or "".
        mixup: alpha of mixup; 0 = off.
        cutmix: alpha of CutMix; 0 = off. With both on, each step takes one of them at random.
        label_smoothing: in [0, 1).
        losses: {name: term of the loss}.
        ema_decay: of the averaged parameters; 0 = off.
        remat: paths of modules that the backward pass computes again, see models/remat.py.
    """

    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    crop_size: int | None = None
    flip: bool = False
    auto_augment: str = ""
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    losses: Mapping[str, Term] = dataclasses.field(
        default_factory=lambda: {"cross_entropy": CrossEntropy()}
    )
    ema_decay: float = 0.0
    remat: tuple[str, ...] = ()


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, recipe: Recipe, *, num_classes: int
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Build the update of a classifier.

    Args:
        model: images float [n, h, w, c] -> logits [n, k].
        optimizer: what turns gradients into updates.
        recipe: augmentation and loss.
        num_classes: k.

    Returns:
        A pure function (state, batch) -> (state, metrics) with the batch {"image": uint8
        [n, h, w, c], "label": int [n], or of attributes float [n, k]} and what `extra_inputs`
        knows. Metrics are summed over steps: `loss` and `top1`, or of attributes `accuracy`, the
        share that the signs of the logits have right (means of the batch), `loss/<name>` of each
        term where there are several (means of the batch before the weight), `grad_norm`, `steps`
        (1), and `bad_step`: the first step, counted from 1, whose loss or update was not finite,
        else NO_STEP.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        augment_key, mix_key, dropout_key = jax.random.split(key, 3)
        images, targets = _prepare(batch, recipe, augment_key, mix_key, num_classes)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Metrics, jax.Array, Any]]:
            return total_loss(
                recipe.losses,
                model,
                {"params": params, "batch_stats": state.batch_stats},
                images,
                targets,
                inputs=extra_inputs(batch),
                label_smoothing=recipe.label_smoothing,
                key=dropout_key,
                remat=recipe.remat,
            )

        grads, (loss, parts, logits, batch_stats) = _with_value(loss_fn, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - recipe.ema_decay)
        # A finite loss may have an infinite gradient, and the checkpoint would hold the damage.
        is_good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
        if _score_name(batch["label"]) == "accuracy":
            is_right = (logits > 0) == (targets > 0.5)
        else:
            is_right = logits.argmax(-1) == targets.argmax(-1)
        metrics = {
            "loss": loss,
            _score_name(batch["label"]): jnp.mean(is_right, dtype=jnp.float32),
            "grad_norm": optax.tree.norm(grads),
            "steps": jnp.ones((), jnp.int32),
            "bad_step": jnp.where(is_good, NO_STEP, state.step + 1),
            **{name: parts[term] for name, term in _part_names(parts).items()},
        }
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=ema_params,
        )
        return state, metrics

    return train_step


def jit_train_step(train_step: Any, mesh: Mesh, *, place: Any = None) -> Any:
    """Compile a train step for batches that are split over a mesh; the state is donated.

    `place` is the sharding of the state, one or a tree of them; None: whole on every device.
    """
    everywhere = replicated(mesh)
    place = everywhere if place is None else place
    return jax.jit(
        train_step,
        in_shardings=(place, split_by_example(mesh)),
        out_shardings=(place, everywhere),
        donate_argnums=0,
    )


def jit_steps_on_device(
    train_step: Any, mesh: Mesh, *, losses: Iterable[str] = (), place: Any = None
) -> Any:
    """Compile several train steps in one call, on a split that lies on the devices.

    Args:
        train_step: as `make_train_step` returns it.
        mesh: the split is replicated over it, each batch is split over it.
        losses: names of the terms of the loss.
        place: as `jit_train_step` takes it.

    Returns:
        A function (state, split, indices int32 [s, b], count) -> (state, metrics) that does the
        first `count` <= s steps; one compilation serves every count. The state is donated.
    """
    everywhere, by_example = replicated(mesh), split_by_example(mesh)
    place = everywhere if place is None else place

    def run(state: TrainState, split: Any, indices: jax.Array, count: jax.Array) -> Any:
        def one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            batch = jax.tree.map(lambda column: column[indices[i]], split)
            batch = jax.lax.with_sharding_constraint(batch, by_example)
            state, new = train_step(state, batch)
            return state, add_metrics(metrics, new)

        zeros = zero_metrics(losses, score=_score_name(split["label"]))
        return jax.lax.fori_loop(0, count, one, (state, zeros))

    return jax.jit(
        run,
        in_shardings=(place, everywhere, everywhere, None),
        out_shardings=(place, everywhere),
        donate_argnums=0,
    )


def zero_metrics(losses: Iterable[str] = (), *, score: str = "top1") -> Metrics:
    """The metrics of no step, for a loss with terms of these names; `score` may be "accuracy"."""
    return {
        "loss": jnp.zeros(()),
        score: jnp.zeros(()),
        "grad_norm": jnp.zeros(()),
        "steps": jnp.zeros((), jnp.int32),
        "bad_step": jnp.full((), NO_STEP, jnp.int32),
        **{name: jnp.zeros(()) for name in _part_names(losses)},
    }


def add_metrics(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of the steps of both."""
    total = jax.tree.map(jnp.add, a, b)
    return {**total, "bad_step": jnp.minimum(a["bad_step"], b["bad_step"])}


def _score_name(label: jax.Array) -> str:
    """What the share of right answers is called: of class ids [n], or of attributes [n, a]."""
    return "top1" if label.ndim == 1 else "accuracy"


def _part_names(losses: Iterable[str]) -> dict[str, str]:
    """{metric: term} of a loss with several terms; a single one is the loss."""
    names = list(losses)
    return {f"loss/{name}": name for name in names} if len(names) > 1 else {}


def _prepare(
    batch: dict[str, jax.Array],
    recipe: Recipe,
    augment_key: jax.Array,
    mix_key: jax.Array,
    num_classes: int,
) -> tuple[jax.Array, jax.Array]:
    images = augment.augment(
        batch["image"],
        augment_key,
        crop_padding=recipe.crop_padding,
        crop_size=recipe.crop_size,
        flip=recipe.flip,
        auto_augment=recipe.auto_augment or None,
    )
    images = augment.normalize(images, mean=recipe.mean, std=recipe.std)
    targets = one_hot_targets(batch["label"], num_classes=num_classes)
    choice_key, key = jax.random.split(mix_key)
    if recipe.mixup and recipe.cutmix:
        return jax.lax.cond(
            jax.random.bernoulli(choice_key),
            lambda: augment.mixup(images, targets, key, alpha=recipe.mixup),
            lambda: augment.cutmix(images, targets, key, alpha=recipe.cutmix),
        )
    if recipe.mixup:
        return augment.mixup(images, targets, key, alpha=recipe.mixup)
    if recipe.cutmix:
        return augment.cutmix(images, targets, key, alpha=recipe.cutmix)
    return images, targets


def _with_value(loss_fn: Any, params: Any) -> tuple[Any, tuple[jax.Array, Metrics, jax.Array, Any]]:
    (loss, others), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return grads, (loss, *others)

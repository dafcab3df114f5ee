"""From a config to the parts of a run."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from attnzoom_jax.data.auto_augment import POLICY_NAMES
from attnzoom_jax.data.bad_examples import watch_examples
from attnzoom_jax.data.patches import extra_inputs
from attnzoom_jax.data.pipeline import Resize, check_one_size, check_train_batch
from attnzoom_jax.data.source import Source
from attnzoom_jax.data.split import labels_of, open_split
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.models import create_model
from attnzoom_jax.training.objective import create_terms, total_loss
from attnzoom_jax.training.optimizer import create_optimizer
from attnzoom_jax.training.schedule import create_schedule
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.step import Recipe
from attnzoom_jax.training.terms import CrossEntropy

CACHES = ("host", "device")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes, before anything runs.

    Attributes:
        source: training split.
        resize: how images become one size on the host.
        image_shape: [h, w, c] of what the model sees.
        model: classifier.
        param_shapes: of its parameters.
        recipe: augmentation and loss.
        schedule: learning rate by step.
        optimizer: what updates the parameters.
        total_steps: length of the run.
        eval_every: steps between evaluations.
    """

    source: Source
    resize: Resize
    image_shape: tuple[int, int, int]
    model: nn.Module
    param_shapes: Any
    recipe: Recipe
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    total_steps: int
    eval_every: int


def create_experiment(config: Any, *, source: Source | None = None) -> Experiment:
    """Build the parts of a run; nothing is trained, no array is made.

    Args:
        config: a ConfigDict with the keys of configs/default.py.
        source: training split; None opens the config's. Only its length, name, class names and
            image shape are read here.

    Returns:
        The parts.

    Raises:
        ValueError: data set not prepared, unknown model, layer, path, optimiser, schedule or cache,
            a length given twice or not at all, a batch larger than the split, a metric that no
            evaluation while training has, a term of the loss that is unknown or reads a tap that
            is not there.
    """
    _check_values(config)
    if source is None:
        source = watch_examples(
            open_split(config.data, split=config.data.train_split),
            config.data.get("on_bad_example", "stop"),
        )
    resize = Resize(config.data.resize, config.data.image_size)
    check_one_size(source, resize)
    image_shape = _image_shape(config, source)
    model = create_model(num_classes=len(source.class_names), **config.model.to_dict())
    check_train_batch(
        len(source), batch_size=config.data.batch_size, seed=config.seed, name=source.name
    )
    _check_evals(config)
    steps_per_epoch = len(source) / config.data.batch_size
    total_steps = _steps(config, "total", steps_per_epoch)
    schedule = create_schedule(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    variables = jax.eval_shape(lambda: init_variables(model, image_shape, 0))
    recipe = _recipe(config)
    _check_boxes(config)
    shape = (config.data.batch_size, *image_shape)
    _check_losses(recipe, model, variables, shape, source, config.data)
    return Experiment(
        source=source,
        resize=resize,
        image_shape=image_shape,
        model=model,
        param_shapes=variables["params"],
        recipe=recipe,
        schedule=schedule,
        optimizer=create_optimizer(config, variables["params"], schedule=schedule),
        total_steps=total_steps,
        eval_every=min(_steps(config, "eval_every", steps_per_epoch), total_steps),
    )


def _check_values(config: Any) -> None:
    """Choices and ranges of the keys that no other part checks before it runs."""
    for key, value, choices in (
        ("data.cache", config.data.cache, CACHES),
        ("best_mode", config.best_mode, ("max", "min")),
        ("augment.auto_augment", config.augment.auto_augment, ("", *POLICY_NAMES)),
    ):
        if value not in choices:
            raise unknown_name(key, value, choices)
    for key, value, low, high in (
        ("log_every_steps", config.log_every_steps, 1, math.inf),
        ("keep_checkpoints", config.keep_checkpoints, 1, math.inf),
        ("data.steps_per_call", config.data.steps_per_call, 1, math.inf),
        ("data.num_threads", config.data.num_threads, 0, math.inf),
        ("early_stopping", config.early_stopping, 0, math.inf),
        ("ema_decay", config.ema_decay, 0, 1),
        ("label_smoothing", config.label_smoothing, 0, 1),
        ("augment.crop_padding", config.augment.crop_padding, 0, math.inf),
        ("augment.mixup", config.augment.mixup, 0, math.inf),
        ("augment.cutmix", config.augment.cutmix, 0, math.inf),
    ):
        if not low <= value < high:
            raise ValueError(f"{key} is {value}; expected a number in [{low}, {high})")
    if config.profile_steps:
        _check_profile(config.profile_steps)
    if config.get("network"):
        raise ValueError(
            f"network={config.network!r} is evaluated, by eval.py, and not trained; leave it empty"
        )
    if config.data.resize == "none" and config.data.image_size:
        raise ValueError(
            f"data.image_size={config.data.image_size} without data.resize does nothing; set "
            "data.resize to squash or crop, or data.image_size to 0"
        )
    if len(config.data.mean) != 3 or len(config.data.std) != 3 or min(config.data.std) <= 0:
        raise ValueError(
            f"data.mean={config.data.mean} and data.std={config.data.std}; expected three numbers "
            "each, in [0, 1], std above 0"
        )


def _check_profile(steps: Any) -> None:
    is_range = len(steps) == 2 and all(isinstance(step, int) for step in steps)
    if not is_range or not 1 <= steps[0] <= steps[1]:
        raise ValueError(
            f"profile_steps is {tuple(steps)}; expected the first step and the last one, such as "
            "(10, 12)"
        )


def _check_evals(config: Any) -> None:
    """Every metric that the run watches must come from an evaluation that runs while training."""
    for name in config.train_evals:
        if name not in config.evals:
            raise unknown_name("evaluation in train_evals", name, config.evals)
    evals = [config.evals[name] for name in config.train_evals]
    prefixes = [evaluation.get("prefix") or evaluation.split for evaluation in evals]
    watched = {"best_metric": config.best_metric, "schedule.metric": config.schedule.get("metric")}
    if config.schedule.name == "plateau" and not config.schedule.get("metric"):
        raise ValueError(f"schedule.metric is missing; expected one of {', '.join(prefixes)}/...")
    for key, metric in watched.items():
        if metric and metric.rpartition("/")[0] not in prefixes:
            raise ValueError(
                f"{key}={metric!r} is of no evaluation that runs while training; expected a metric "
                f"of {' or '.join(f'{prefix}/' for prefix in prefixes)}, or a further name in "
                "train_evals"
            )


def _check_boxes(config: Any) -> None:
    """Boxes come with the data exactly where the model takes them, and stay where they are."""
    default = "boxes" if config.model.name == "two_stream" else None
    patch_source = config.model.get("patch_source") or default
    takes_boxes = patch_source == "boxes"
    if takes_boxes != bool(config.data.patches):
        raise ValueError(
            f"data.patches is {config.data.patches!r} and model.patch_source is "
            f"{patch_source!r}; a folder of boxes goes together with "
            "patch_source=boxes of the model two_stream"
        )
    moving = ("crop_padding", "flip", "auto_augment", "mixup", "cutmix")
    moved = [key for key in moving if config.augment[key]] if takes_boxes else []
    if moved:
        raise ValueError(
            f"augment.{moved[0]} moves or mixes the images, and not the boxes of data.patches; "
            "switch it off, or set model.patch_source to cam"
        )


def _check_losses(
    recipe: Recipe,
    model: nn.Module,
    variables: Any,
    shape: tuple[int, ...],
    source: Source,
    data: Any,
) -> None:
    """Terms of the loss must fit the labels, and find taps with the shapes that they need."""
    softmax = [name for name, term in recipe.losses.items() if isinstance(term, CrossEntropy)]
    if labels_of(data) == "attributes" and softmax:
        raise ValueError(
            f"losses.{softmax[0]} is a softmax over classes, of which an image has one, and "
            "data.labels is attributes; set its name to binary_cross_entropy"
        )
    plain = all(term == CrossEntropy(weight=term.weight) for term in recipe.losses.values())
    if plain and not recipe.remat:
        return

    # Only a set with boxes is read, for how many there are.
    example = extra_inputs(source[0]) if data.patches else {}
    inputs = {k: jax.ShapeDtypeStruct((shape[0], *v.shape), v.dtype) for k, v in example.items()}
    loss = functools.partial(
        total_loss, recipe.losses, model, label_smoothing=0.0, remat=recipe.remat
    )
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    targets = jax.ShapeDtypeStruct((shape[0], len(source.class_names)), jnp.float32)
    jax.eval_shape(loss, variables, images, targets, inputs=inputs, key=jax.random.key(0))


def _recipe(config: Any) -> Recipe:
    return Recipe(
        seed=config.seed,
        mean=config.data.mean,
        std=config.data.std,
        label_smoothing=config.label_smoothing,
        losses=create_terms(config.losses.to_dict()),
        ema_decay=config.ema_decay,
        crop_size=config.data.crop_size or None,
        remat=tuple(config.remat),
        **config.augment.to_dict(),
    )


def _image_shape(config: Any, source: Source) -> tuple[int, int, int]:
    stored, size = source.image_shape, config.data.crop_size or config.data.image_size
    h, w, c = stored
    if config.data.resize != "none" or config.data.crop_size:
        h = w = size
    return (int(h or 0), int(w or 0), int(c or 3))


def _steps(config: Any, key: str, steps_per_epoch: float) -> int:
    """`<key>_steps`, or `<key>_epochs` in steps."""
    steps, epochs = config[f"{key}_steps"], config[f"{key}_epochs"]
    if (steps > 0) == (epochs > 0):
        raise ValueError(
            f"{key}_steps is {steps} and {key}_epochs is {epochs}; set exactly one of them above 0"
        )
    return int(steps) if steps > 0 else max(1, round(epochs * steps_per_epoch))

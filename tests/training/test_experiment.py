from typing import Any

import jax
import pytest

from attnzoom_jax.training.experiment import create_experiment
from attnzoom_jax.training.state import init_variables
from configs import demo


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}
    base.update_from_flattened_dict(changes)
    return base


def create(**changes):
    return create_experiment(config(**changes))


def test_the_parts_are_what_the_config_says():
    parts = create(
        **{
            "augment.crop_padding": 4,
            "augment.mixup": 0.2,
            "label_smoothing": 0.1,
            "ema_decay": 0.9,
            "seed": 3,
        }
    )
    assert len(parts.source) == 240 and parts.image_shape == (32, 32, 3)
    assert parts.total_steps == 4 and parts.eval_every == 2
    recipe = parts.recipe
    assert (recipe.mixup, recipe.label_smoothing, recipe.ema_decay, recipe.seed) == (
        0.2,
        0.1,
        0.9,
        3,
    )
    assert recipe.flip and recipe.crop_size is None and recipe.crop_padding == 4
    params = jax.eval_shape(lambda: init_variables(parts.model, parts.image_shape, 0))["params"]
    head = params["head"]["kernel"]
    assert head.shape[-1] == len(parts.source.class_names) >= 12
    assert jax.eval_shape(parts.optimizer.init, params)


def test_epochs_become_steps():
    epochs = {"total_steps": 0, "total_epochs": 2.5, "data.batch_size": 100}
    parts = create(**epochs, eval_every_steps=0, eval_every_epochs=0.5)
    assert (parts.total_steps, parts.eval_every) == (6, 1)
    assert create(**epochs, eval_every_steps=50).eval_every == 6  # once, at the end


def test_sizes():
    squashed = {"data.resize": "squash", "data.image_size": 24}
    assert create(**squashed).image_shape == (24, 24, 3)
    assert create(**squashed, **{"data.crop_size": 16}).image_shape == (16, 16, 3)
    assert create(**{"data.crop_size": 16}).image_shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_epochs": 1.0}, "total_steps is 4 and total_epochs is 1.0; set exactly one"),
        ({"log_every_steps": 0}, r"log_every_steps is 0; expected a number in \[1, inf\)"),
        ({"data.steps_per_call": 0}, "data.steps_per_call is 0"),
        ({"ema_decay": 1.5}, r"ema_decay is 1.5; expected a number in \[0, 1\)"),
        ({"best_mode": "maximum"}, "unknown best_mode 'maximum'.*max, min"),
        ({"augment.auto_augment": "cifar100"}, "'cifar100'; did you mean 'cifar10'"),
        ({"data.image_size": 16}, "data.image_size=16 without data.resize does nothing"),
        ({"data.mean": (0.5, 0.5)}, r"data.mean=\(0.5, 0.5\).*three numbers"),
        ({"total_steps": 0}, "total_steps is 0 and total_epochs is 0.0; set exactly one"),
        ({"eval_every_steps": 0}, "eval_every_steps is 0 and eval_every_epochs is 0.0"),
        ({"data.cache": "gpu"}, "unknown data.cache 'gpu'.*here is: host, device"),
        ({"data.name": "imagenet2012"}, "is not prepared in .* run: python tools/prepare_data.py"),
        ({"data.name": "fine_shapes/tny"}, "'fine_shapes/tny'; did you mean 'fine_shapes/tiny'"),
        ({"data.train_split": "trian"}, "unknown split .* 'trian'; did you mean 'train'"),
        ({"data.batch_size": 248}, r"batch_size 248 is not in 1\.\.240"),
        ({"data.resize": "sqash"}, "unknown resize mode 'sqash'; did you mean 'squash'"),
        ({"model.name": "resnet19"}, "unknown model 'resnet19'; did you mean 'resnet18'"),
        ({"optimizer.name": "admw"}, "unknown optimizer 'admw'; did you mean 'adamw'"),
        ({"schedule.name": "one_cicle"}, "unknown schedule 'one_cicle'; did you mean 'one_cycle'"),
        ({"train_evals": ("vlidation",)}, "train_evals 'vlidation'; did you mean 'validation'"),
        (
            {"best_metric": "test/top1"},
            "best_metric='test/top1' is of no evaluation .* validation/",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        create(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"widht": 4}, "unknown option of resnet 'widht'; did you mean 'width'"),
        ({"insert": {"stage9": {"name": "attention_zoom"}}}, "unknown path .* 'stage9'; did you"),
        ({"insert": {"stage1": {"name": "attention_zom"}}}, "'attention_zom'; did you mean"),
        (
            {"insert": {"stage1": {"name": "attention_zoom", "thresh": 0.5}}},
            "'thresh'; did you mean 'threshold'",
        ),
    ],
)
def test_what_the_model_does_not_know_is_one_line(model, message):
    settings = config()
    settings.model.update(model)
    with pytest.raises(ValueError, match=message) as error:
        create_experiment(settings)
    assert "\n" not in str(error.value)


def test_the_plateau_watches_a_metric_that_there_is():
    settings = config()
    plateau = {"name": "plateau", "mode": "max"}
    settings.schedule = plateau
    with pytest.raises(ValueError, match=r"schedule\.metric is missing"):
        create_experiment(settings)
    settings.schedule = {**plateau, "metric": "test/top1"}
    with pytest.raises(ValueError, match="is of no evaluation that runs while training"):
        create_experiment(settings)
    settings.schedule = {**plateau, "metric": "validation/top1"}
    create_experiment(settings)
    settings.best_metric = ""
    create_experiment(settings)

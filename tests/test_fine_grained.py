"""The photographs that TFDS prepares by name, in the configs that offer them."""

import importlib
from typing import Any

import pytest

from attnzoom_jax.data.split import open_split
from attnzoom_jax.training.experiment import create_experiment
from tests.data import tfds_sets

CLASSES = {"caltech_birds2011": 200, "stanford_dogs": 120}


def load(name, mode) -> Any:
    return importlib.import_module(f"configs.{name}").get_config(mode)


@pytest.mark.parametrize("dataset", CLASSES)
@pytest.mark.parametrize("name", ["recursive_attention", "recursive_zoom", "cam_guided"])
def test_a_tenth_of_train_is_for_validation(name, dataset, tmp_path):
    tfds_sets.prepare_photos(dataset, tmp_path, count=40)
    config = load(name, f"dataset={dataset}")
    config.data.dir = str(tmp_path)
    parts = create_experiment(config)
    assert len(parts.source.class_names) == CLASSES[dataset]
    assert parts.image_shape == (448, 448, 3)

    def names(split):
        fields = ("image/filename",)
        return [e["image/filename"] for e in open_split(config.data, split=split, fields=fields)]

    train, validation = names(config.data.train_split), names(config.evals.validation.split)
    assert (len(train), len(validation)) == (36, 4)
    assert len({*train, *validation}) == 40
    assert len(open_split(config.data, split=config.evals.test.split)) == 40


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16_bn"])
def test_guides_of_the_same_birds_weigh_the_same(backbone):
    weights = [
        load("cam_guided", f"dataset={dataset},backbone={backbone}").losses.guide.weight
        for dataset in ("cub200", "caltech_birds2011")
    ]
    assert weights[0] == weights[1]

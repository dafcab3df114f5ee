"""Attributes, with a mask of its own for each feature and attribute, and how robust that is.

    python train.py --config=configs/multi_channel.py:dataset=fine_shapes --workdir=runs/attributes
    python eval.py --workdir=runs/attributes
    python tools/tune_masks.py --workdir=runs/attributes

    python tools/prepare_data.py celeb_a     # needs the network, and TensorFlow just for this
    python train.py --config=configs/multi_channel.py --workdir=runs/celeb_a

`dataset` is celeb_a (40 attributes), cub200 (312) or fine_shapes (13); `masks` attribute_channel,
attribute (one mask for all channels), single (one for all attributes too) or none (one linear
layer); `application` product or residual, see layers/multi_channel.py.

After Kimura and Tanaka 2019 (arXiv 1905.02719), whose recipe could not be read: all of it is ours.
tools/tune_masks.py chooses the intentional transformation of each attribute's masks on validation
images, and evaluates it. To train through one, set it in a config file of your own:
config.model.transform = {"name": "power", "exponent": 2.0}.

Hardware and time: one GPU for the photographs, not yet timed by us; fine_shapes on two CPU cores,
minutes. Expected: on fine_shapes no better than one linear layer, and transforms of the masks do
less than a shift of the logits (docs/reproduce.md); of celeb_a and cub200 not known yet.
`:tiny`, also after the choices, runs in seconds, offline.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import default

CHOICES = {
    "dataset": ("celeb_a", "cub200", "fine_shapes"),
    "masks": ("attribute_channel", "attribute", "single", "none"),
    "application": ("product", "residual"),
}


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    choices = {"dataset": "celeb_a", "masks": "attribute_channel", "application": "product"}
    rest = default.choose(mode, choices, CHOICES)
    config = default.get_config()
    config.model.update({"name": "multi_channel", "granularity": choices["masks"]})
    config.model.application = choices["application"]
    config.model.update({"rank": placeholder(int), "hidden": placeholder(int)})
    config.data.labels = "attributes"
    config.losses = {"attributes": {"name": "binary_cross_entropy"}}
    config.best_metric = "validation/balanced_accuracy"
    robustness = {"name": "robustness", "split": "test", "prefix": "robustness"}
    if choices["dataset"] == "fine_shapes" or rest:
        default.use_fine_shapes(config)
        config.model.update({"backbone": "resnet10", "stem": "small", "width": 16})
        config.model.tap = "stage3"
        robustness |= {"levels": (1, 3, 5), "linf": (2 / 255,), "l2": (), "steps": 10}
        robustness |= {"queries": 100, "count": 250, "attack_count": 100}
        if rest:
            robustness |= {"corruptions": ("contrast",), "levels": (3,), "steps": 2, "queries": 2}
            robustness |= {"count": 16, "attack_count": 16}
    else:
        _use_photos(config, choices["dataset"])
        robustness |= {"count": 2000, "attack_count": 200}
    has_pixels = bool(choices["dataset"] == "fine_shapes" or rest)
    validation = config.evals.validation
    config.evals = {
        "validation": {**validation, "name": "attributes"},
        "test": {"name": "attributes", "split": "test", "masks": has_pixels},
        "robustness": robustness,
    }
    return default.in_mode(config, rest)


def _use_photos(config: ml_collections.ConfigDict, name: str) -> None:
    if name == "cub200":
        default.use_fine_grained(config, name)
        config.data.update({"resize": "squash", "image_size": 256, "crop_size": 224})
        config.model.backbone, config.total_epochs, config.data.batch_size = "resnet50", 50.0, 32
        # The masks of 256 images, 312 x 2048 x 7 x 7 each, would take 60 GiB.
        config.data.eval_batch_size = 32
    else:
        config.data.update({"name": name, "resize": "crop", "image_size": 128})
        config.model.backbone, config.total_epochs = "resnet18", 10.0
    config.data.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    config.augment.flip = True
    config.optimizer.update({"name": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-4})
    config.schedule.update({"name": "cosine", "warmup_epochs": 0.5})

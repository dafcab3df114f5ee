"""Every key of a config with its simplest value; the experiments change what they need."""

from collections.abc import Iterable, Mapping

import ml_collections
from ml_collections.config_dict import placeholder

from attnzoom_jax.errors import unknown_name


def get_config() -> ml_collections.ConfigDict:
    """The base of every config."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,  # of parameters, order, augmentation
            "platform": "",  # "": whatever JAX finds; "cpu", "gpu", "tpu": that or stop
            "compile_cache": "",  # folder for compiled programs; "": none
            "mesh": {  # devices along each axis; -1: what remains
                "data": -1,  # a batch is split over them
                "model": 1,  # wide parameters are, by the rules below
            },
            "sharding": (),  # (pattern, axes) pairs such as (".*head/kernel", (None, "model"))
            "total_steps": 0,  # length of the run in updates, or ...
            "total_epochs": 0.0,  # ... in epochs; one of the two
            "data": {
                "name": "",  # TFDS name, with the config where there are several
                "dir": "",  # of prepared sets; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
                "labels": "label",  # what is learnt: class ids, or "attributes", 0 or 1 each
                "train_split": "train",
                "batch_size": 128,  # of all devices and processes together
                "eval_batch_size": 256,
                "cache": "host",  # "device": the whole training split on the device
                "steps_per_call": 50,  # with cache "device": updates per call of the program
                "num_threads": 4,  # that read and decode
                "on_bad_example": "stop",  # of training, that cannot be read; "skip": leave it out
                "resize": "none",  # on the host: "none", "squash" or "crop" to image_size
                "image_size": 0,
                "crop_size": 0,  # side of what the model sees: random crop in training, central
                # crop elsewhere; 0: the whole image
                "patches": "",  # folder of precomputed boxes, see data/patches.py; "": none
                "mean": (0.5, 0.5, 0.5),  # of the pixels per channel, in [0, 1]
                "std": (0.25, 0.25, 0.25),
            },
            "augment": {  # on the device, in this order
                "crop_padding": 0,  # zero padding before a random crop, in pixels
                "flip": False,  # mirror half of the images
                "auto_augment": "",  # "cifar10", "imagenet", "svhn"
                "mixup": 0.0,  # alpha; 0: off
                "cutmix": 0.0,
            },
            "losses": {  # {name: {"name": term, "weight": 1.0, **its options}}, see
                "cross_entropy": {"name": "cross_entropy"},  # training/objective.py
            },
            "label_smoothing": 0.0,
            "model": {  # None: what the name stands for
                "name": "",
                "stem": placeholder(str),  # "imagenet", "cifar", "small"
                "width": placeholder(int),  # channels of the first stage
                "stage_sizes": placeholder(tuple),  # of the free-form model "resnet", as is block
                "block": placeholder(str),  # "basic", "bottleneck"
                "shortcut": placeholder(str),  # "projection", "pad"
                "zero_init_residual": placeholder(bool),
                "dropout": placeholder(float),  # of VGG, MobileNet, WRN
                "drop_path": placeholder(float),  # of ConvNeXt
                "padding": placeholder(str),  # of MobileNets: "torch", "tf"
                "activation": placeholder(str),  # of MobileNets: "relu6", "relu"
                "dtype": placeholder(str),  # of the computation: "float32", "bfloat16"
                "fully_convolutional": placeholder(bool),  # of VGG: logits of every place
                "insert": {},  # {path: {"name": layer, **its fields}}
            },
            "pretrained": "",  # file of weights to begin with, see models/pretrained.py; "": none
            "network": "",  # FILE.py:NAME, to evaluate any JAX function, see models/function.py
            "class_names": "",  # of a network not trained here: text file, a name per line
            "optimizer": {  # see training/optimizer.py; None: its default
                "name": "sgd",  # "sgd", "adam", "adamw", "lamb"
                "learning_rate": 0.1,
                "weight_decay": placeholder(float),
                "weight_decay_mask": placeholder(str),  # pattern of parameter paths
                "clip_norm": placeholder(float),
                "learning_rate_multipliers": placeholder(tuple),  # (pattern, factor) pairs
                "momentum": placeholder(float),  # of sgd
                "nesterov": placeholder(bool),
                "b1": placeholder(float),  # of the others
                "b2": placeholder(float),
                "eps": placeholder(float),
            },
            "schedule": {  # see training/schedule.py; None: its default
                "name": "cosine",  # "constant", "cosine", "step", "one_cycle", "plateau"
                "warmup_steps": placeholder(int),
                "warmup_epochs": placeholder(float),
                "decay_steps": placeholder(int),  # of "step"
                "decay_epochs": placeholder(float),
                "boundary_steps": placeholder(tuple),
                "boundary_epochs": placeholder(tuple),
                "factor": placeholder(float),  # of "step" and "plateau"
                "patience": placeholder(int),  # of "plateau", in evaluations
                "threshold": placeholder(float),
                "mode": placeholder(str),  # "min", "max"
                "metric": placeholder(str),
                "pct_start": placeholder(float),  # of "one_cycle"
                "div_factor": placeholder(float),
                "final_div_factor": placeholder(float),
            },
            "remat": (),  # paths of modules, as ("stage1", "stage2"), of which the backward pass
            # computes the inside again: less memory, more time; see models/remat.py
            "ema_decay": 0.0,  # of averaged parameters, with which is evaluated; 0: off
            "log_every_steps": 50,
            "profile_steps": (),  # (first, last): of these a trace for XProf, in WORKDIR/profile
            "eval_every_steps": 0,  # evaluation and checkpoint; 0: ...
            "eval_every_epochs": 1.0,  # ... counted in epochs
            "evals": {  # what eval.py runs, each with its evaluator's arguments
                "validation": {"name": "classify", "split": "validation"},
                "test": {"name": "classify", "split": "test"},
            },
            "train_evals": ("validation",),  # which of them run while training
            "best_metric": "validation/top1",  # decides which checkpoint is the best
            "best_mode": "max",
            "early_stopping": 0,  # evaluations without a better one; 0: never stop early
            "keep_checkpoints": 2,  # the last ones; the best one stays besides
        }
    )


def use_cifar100(config: ml_collections.ConfigDict) -> None:
    """CIFAR-100 with the last 1,000 training images as validation split."""
    config.data.update(
        {
            "name": "cifar100",
            "train_split": "train[:98%]",
            "mean": (0.5071, 0.4865, 0.4409),
            "std": (0.2673, 0.2564, 0.2762),
        }
    )
    config.evals.validation = {
        "name": "classify",
        "split": "train[98%:]",
        "prefix": "validation",
    }


def use_tiny_imagenet(config: ml_collections.ConfigDict) -> None:
    """Tiny ImageNet; its validation set is the test set here, as everywhere that reports it."""
    config.data.update(
        {
            "name": "tiny_imagenet",
            "train_split": "train[:98%]",
            "mean": (0.4802, 0.4481, 0.3975),
            "std": (0.2770, 0.2691, 0.2821),
        }
    )
    config.evals.validation = {
        "name": "classify",
        "split": "train[98%:]",
        "prefix": "validation",
    }
    config.evals.test.split = "validation"
    config.evals.test.prefix = "test"


def use_fine_shapes(config: ml_collections.ConfigDict) -> None:
    """fine_shapes with the recipe of the demonstration, and where the network looks."""
    config.total_steps = 1000
    config.data.update({"name": "fine_shapes", "batch_size": 32})
    config.augment.flip = True
    config.optimizer.update({"name": "adam", "learning_rate": 3e-3})
    config.schedule.update({"name": "one_cycle"})
    config.log_every_steps = 100
    config.eval_every_steps, config.eval_every_epochs = 500, 0.0
    config.evals.localization = {"name": "localize", "split": "test", "tap": ""}


def use_fine_grained(config: ml_collections.ConfigDict, name: str) -> None:
    """CUB-200-2011, Stanford Cars, Stanford Dogs or FGVC-Aircraft, with images for validation.

    Papers choose the epoch by the test set. Here it is a tenth of train, or the validation split of
    FGVC-Aircraft, and the test set is looked at once.
    """
    has_validation = name == "fgvc_aircraft"
    config.data.update({"name": name, "train_split": "train" if has_validation else "train[:90%]"})
    config.evals.validation = {
        "name": "classify",
        "split": "validation" if has_validation else "train[90%:]",
        "prefix": "validation",
    }


def choose(mode: str, choices: dict[str, str], known: Mapping[str, Iterable[str]]) -> str:
    """Read `key=value,key=value` into choices; return what is left of it, the plain words."""
    rest = []
    for word in filter(None, mode.split(",")):
        key, equals, value = word.partition("=")
        if not equals:
            rest.append(word)
        elif key not in choices:
            raise unknown_name("choice", key, choices)
        elif value not in known[key]:
            raise unknown_name(key, value, known[key])
        else:
            choices[key] = value
    return ",".join(rest)


def in_mode(config: ml_collections.ConfigDict, mode: str) -> ml_collections.ConfigDict:
    """The config itself for "", or for "tiny" at a size that trains in seconds, offline."""
    if mode not in ("", "tiny"):
        raise ValueError(f"unknown mode {mode!r}; there is: tiny, as in --config=FILE.py:tiny")
    if not mode:
        return config
    config.data.update(
        {"name": "fine_shapes/tiny", "train_split": "train", "batch_size": 16, "resize": "none"}
    )
    config.data.eval_batch_size = 16
    config.data.crop_size = 0
    config.model.width = 8
    config.update({"total_steps": 4, "total_epochs": 0.0, "log_every_steps": 2})
    config.update({"eval_every_steps": 2, "eval_every_epochs": 0.0})
    config.schedule.update({"warmup_steps": None, "warmup_epochs": None})
    config.evals.validation.split = "validation"
    config.evals.test.split = "test"
    return config

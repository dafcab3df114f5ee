"""Focus Longer: a global stream, and an object stream that looks at a patch again and again.

    python tools/prepare_data.py cub200 --from_archive=CUB_200_2011.tgz
    python train.py --config=configs/recursive_attention.py --workdir=runs/recursive_attention \
        --config.pretrained=vgg19.pth
    python train.py --config=configs/recursive_attention.py:dataset=fine_shapes,steps=4 ...

`dataset` is cub200, stanford_cars, fgvc_aircraft or fine_shapes, or one that TFDS prepares by its
name, caltech_birds2011 (the images of cub200) or stanford_dogs:

    python tools/prepare_data.py stanford_dogs
    python train.py --config=configs/recursive_attention.py:dataset=stanford_dogs ...

`backbone` is vgg19 or resnet50 (not of fine_shapes); `steps` of the LSTM; `patches` boxes, cam,
random or whole. With boxes, `--config.data.patches` is the folder of the authors' arrays
(data/patches.py).

Shroff et al. 2020 (arXiv 2005.10979), as in their code: images squashed to 448, patches 224, two
VGG-19, 10 steps, batch 32, SGD with 0.001, x 0.1 at epochs 30 and 60, no augmentation, the sum of
both cross-entropies. Their patches are stored ones, of which evaluation too draws one; ours lie
around the class map, and of given boxes evaluation takes the first (model.eval_patch). Theirs are
500 epochs of which the test set chooses the best; ours are 90, and a tenth of the training set
chooses. The paper says up to 2 % over the baseline; its tables could not be read.

Hardware and time: one GPU for the photographs, not yet timed by us; fine_shapes on two CPU cores,
minutes. Expected: on fine_shapes no gain over the backbone, whatever the steps (docs/reproduce.md);
of the photographs not known yet.
`:tiny`, also after the choices but for patches=boxes, runs in seconds, offline.
"""

import ml_collections

from configs import default

PHOTOS = ("cub200", "stanford_cars", "fgvc_aircraft", "caltech_birds2011", "stanford_dogs")
CHOICES = {
    "dataset": (*PHOTOS, "fine_shapes"),
    "backbone": ("vgg19", "resnet50"),
    "steps": tuple(map(str, range(1, 21))),
    "patches": ("cam", "boxes", "random", "whole"),
}


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    choices = {"dataset": "cub200", "backbone": "vgg19", "steps": "10", "patches": "cam"}
    rest = default.choose(mode, choices, CHOICES)
    config = default.get_config()
    config.model.update({"name": "two_stream", "steps": int(choices["steps"])})
    config.model.patch_source = choices["patches"]
    config.losses = {
        "global": {"name": "cross_entropy", "tap": "global_head", "weight": 1.0},
        "object": {"name": "cross_entropy", "tap": "object_head", "weight": 1.0},
    }
    if choices["dataset"] == "fine_shapes" or rest:
        if choices["patches"] == "boxes":
            raise ValueError("patches=boxes needs photographs: take dataset=cub200, without tiny")
        default.use_fine_shapes(config)
        config.model.update({"backbone": "resnet10", "stem": "small", "width": 16})
        config.model.update({"hidden": 64, "add_on": 0, "patch_size": 32})
        if rest:
            config.model.steps = min(config.model.steps, 2)
        return default.in_mode(config, rest)
    default.use_fine_grained(config, choices["dataset"])
    config.total_epochs = 90.0
    config.data.update({"batch_size": 32, "resize": "squash", "image_size": 448})
    config.data.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    config.model.backbone = choices["backbone"]
    config.optimizer.update({"name": "sgd", "learning_rate": 1e-3, "momentum": 0.9})
    config.optimizer.update({"weight_decay": 5e-4, "weight_decay_mask": ".*"})
    config.schedule.update({"name": "step", "boundary_epochs": (30.0, 60.0), "factor": 0.1})
    return config

"""Attribution methods side by side: where do their maps point, on boxes or masks that people drew?

Of a network that was never trained here:

    python eval.py --config=configs/attribution_table.py:network=mobilenet_v2,data=voc_folder \
        --config.pretrained=WEIGHTS.npz --config.data.dir=VOC2007 --workdir=runs/table

Of a run, on its own data set:

    python eval.py --config=configs/attribution_table.py --workdir=runs/demo \
        --config.evals.table.truth=parts --config.evals.table.scores.pointing.tolerance=2.0

The table is printed and stands in WORKDIR/tables/table/ as JSON, CSV, LaTeX, PNG and PDF. A killed
evaluation goes on where it was. Anything is a flag: --config.evals.table.split=val,
--config.evals.table.methods="('grad_cam@stage3','gradient')", .max_images=200, .weights=permuted.

`network` is `run`; mobilenet_v2, squeezenet or squeezenet_linear (configs/networks/imagenet.py); or
a model with published weights: resnet50, vgg16. `data` is `run`; voc_folder or coco_folder, in
their official layouts; voc, coco, tiny_imagenet, cub200 or imagenet_folder (ImageNet's own layout).
Networks with 1000 outputs and no names, as resnet50, need --config.class_names=FILE for `names`.
With `methods=all` every method has a row, the slow ones with few samples (`SLOW`).
With `view=short_side` images keep their aspect, the shorter side at the network's size.

Hardware and time: two CPU cores, about 8 minutes for 10 rows of MobileNetV2 on 200 images.
Expected: docs/reproduce.md. `:tiny` runs in seconds:

    python train.py --config=configs/attribution_table.py:tiny --workdir=runs/tiny
"""

import ml_collections

from attnzoom_jax.attribution.methods import METHODS, takes
from configs import default
from configs.networks import imagenet

NETWORKS = {  # the last taps of two resolutions, the finer one first
    "run": ("", ""),
    "mobilenet_v2": ("conv39", "conv51"),
    "squeezenet": ("fire6/concat", "fire9/concat"),
    "squeezenet_linear": ("fire6/concat", "fire9/concat"),
    "resnet50": ("stage3", "stage4"),
    "vgg16": ("stage4", "stage5"),
}
MAPS = "configs/class_maps"
DATA = {  # name, split, which outputs of an ImageNet network stand for a class
    "run": ("", "test", "labels"),
    "voc_folder": ("voc_folder", "test", f"{MAPS}/voc_to_imagenet.json"),
    "coco_folder": ("coco_folder", "val2014", f"{MAPS}/coco_to_imagenet.json"),
    "imagenet_folder": ("voc_folder", "val", "names"),
    "voc": ("voc/2007", "test", f"{MAPS}/voc_to_imagenet.json"),
    "coco": ("coco/2014", "validation", f"{MAPS}/coco_to_imagenet.json"),
    "tiny_imagenet": ("tiny_imagenet", "validation", "names"),
    "cub200": ("cub200", "test", f"{MAPS}/cub_to_imagenet.json"),
}
SLOW = {  # passes of the network, of a few hundred or thousand in the papers
    "integrated_gradients": {"steps": 8},
    "rise": {"masks": 64},
    "smooth_grad": {"samples": 8},
}
CHOICES = {
    "network": NETWORKS,
    "data": DATA,
    "methods": ("usual", "all"),
    "view": ("squash", "short_side"),
}


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    choices = {"network": "run", "data": "run", "methods": "usual", "view": "squash"}
    rest = default.choose(mode, choices, CHOICES)
    config = default.get_config()
    fine, coarse = NETWORKS[choices["network"]]
    name, split, outputs = DATA[choices["data"]]
    config.data.name = name
    config.evals = {"table": _table(fine, coarse, split, outputs)}
    if choices["methods"] == "all":
        at_image = [name for name in METHODS if not takes(name, "tap")]
        at_tap = [f"{name}@{coarse}" if coarse else name for name in METHODS if takes(name, "tap")]
        config.evals.table.update({"methods": (*at_tap, *at_image), "options": SLOW})
    config.train_evals, config.best_metric = (), ""
    if rest or choices["network"] == "run":
        return _of_run(config, rest)
    if choices["network"] in imagenet.INPUTS:
        imagenet.use(config, choices["network"], weights="")
    else:
        config.model.name = choices["network"]
        config.data.update({"resize": "squash", "image_size": 224})
        config.data.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
        if choices["network"] == "vgg16" and choices["view"] == "short_side":
            config.model.fully_convolutional = True
    config.evals.table.resize = choices["view"]
    return config


def _table(fine: str, coarse: str, split: str, outputs: str) -> dict:
    """Methods at two resolutions, and those at the image."""
    fine, coarse = (f"@{tap}" if tap else "" for tap in (fine, coarse))
    excitation = ("excitation_backprop", "contrastive_excitation_backprop")
    methods = (
        *(f"{method}{coarse}" for method in ("grad_cam", "grad_cam_plus_plus", "layer_cam")),
        *(f"{method}{tap}" for tap in dict.fromkeys((coarse, fine)) for method in excitation),
        *("gradient", "input_x_gradient", "guided_backprop"),
    )
    return {
        "name": "attribution_table",
        "split": split,
        "methods": methods,
        "options": {},
        "scores": {"pointing": {"tolerance": 15.0}, "energy": {}, "boxes": {}},
        "truth": "boxes",
        "outputs": outputs,
        "weights": "given",
        "resize": "",
        "max_images": 0,
        "batch_size": 16,
    }


def _of_run(config: ml_collections.ConfigDict, mode: str) -> ml_collections.ConfigDict:
    """Without a model of its own, eval.py takes that of the run, and its data set."""
    if not mode:
        return config
    evals = config.evals.to_dict()
    evals["table"] |= {"split": "test[:12]", "truth": "parts", "batch_size": 4, "prefix": "table"}
    default.use_fine_shapes(config)
    config.evals.update(evals)
    config.evals.validation = {"name": "classify", "split": "validation"}
    config.evals.test = {"name": "classify", "split": "test"}
    config.train_evals, config.best_metric = ("validation",), "validation/top1"
    config.model.update({"name": "resnet10", "stem": "small"})
    return default.in_mode(config, mode)

"""The demonstration: a small residual net with AttentionZoom learns where to look.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python eval.py --workdir=runs/demo
    python explain.py --workdir=runs/demo

The data set fine_shapes has 16 classes, shape family x small mark: the mark decides, and the family
alone gives a quarter. The layer stands on a map of 16 x 16, where the zoom costs little; with its
threshold at 0.5 the mask is soon 1 nearly everywhere, at 0.9 it finds the marks.

Hardware and time: two CPU cores, about two minutes. Expected: test top-1 of at least 0.80.
`:tiny` runs in seconds.
"""

import ml_collections

from configs import default

METHODS = (
    *("grad_cam", "grad_cam_plus_plus", "layer_cam"),
    *("excitation_backprop", "contrastive_excitation_backprop"),
    *("gradient", "input_x_gradient", "guided_backprop"),
)


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    config = default.get_config()
    default.use_fine_shapes(config)
    config.model.update(
        {
            "name": "resnet10",
            "stem": "small",
            "width": 16,
            "insert": {
                "stage2": {"name": "attention_zoom", "threshold": 0.9, "zoom_init": "bilinear"}
            },
        }
    )
    # Which method finds the mark that decides? Half a pixel of the 8 x 8 map is 4 pixels.
    config.evals.table = {
        "name": "attribution_table",
        "split": "test",
        "methods": METHODS[:1] if mode else METHODS,
        "scores": {"pointing": {"tolerance": 4.0}, "energy": {}},
        "truth": "parts",
        "max_images": 8 if mode else 500,
        "batch_size": 8 if mode else 32,
        "prefix": "table",
    }
    return default.in_mode(config, mode)

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
    return default.in_mode(config, mode)

"""The demonstration: a small residual net with AttentionZoom on the embedded data set.

python train.py --config=configs/demo.py --workdir=runs/demo
"""

import ml_collections

from configs import default


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    config = default.get_config()
    config.data.update({"name": "fine_shapes", "batch_size": 64})
    config.augment.update({"flip": True, "crop_padding": 4})
    config.model = {
        "name": "resnet18",
        "stem": "small",
        "width": 16,
        "stage_sizes": (2, 2, 2),
        "insert": {
            "stage2": {"name": "attention_zoom", "threshold": 0.5, "zoom_init": "lecun_normal"}
        },
    }
    config.optimizer = {"name": "adam", "learning_rate": 3e-3}
    config.schedule = {"name": "one_cycle"}
    config.total_steps = 400
    config.eval_every_steps, config.eval_every_epochs = 200, 0.0
    config.evals.localization = {"name": "localize", "split": "test", "tap": ""}
    return default.in_mode(config, mode)

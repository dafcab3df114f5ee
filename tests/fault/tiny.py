"""A run of some seconds in which everything is on that has randomness or a memory."""

from configs import demo


def get_config(mode: str = ""):
    config = demo.get_config("tiny")
    config.model = {
        "name": "resnet",
        "stem": "small",
        "width": 4,
        "stage_sizes": (1,),
        "insert": {"stage1": {"name": "attention_zoom"}},
    }
    config.optimizer = {"name": "adam", "learning_rate": 3e-3, "clip_norm": 1.0}
    config.schedule = {"name": "plateau", "metric": "validation/top1", "mode": "max", "patience": 1}
    config.augment.update({"flip": True, "crop_padding": 4, "mixup": 0.2})
    config.data.cache = mode or "host"
    config.data.update({"steps_per_call": 2, "num_threads": 1})
    config.update({"total_steps": 60, "log_every_steps": 7, "eval_every_steps": 4})
    config.update({"ema_decay": 0.9, "best_metric": "validation/top1", "keep_checkpoints": 2})
    config.evals = {"validation": {"name": "classify", "split": "validation"}}
    return config

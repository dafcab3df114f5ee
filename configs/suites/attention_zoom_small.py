"""AttZoom and its controls on real CIFAR-100, at a size that two CPU cores manage in two hours.

    python tools/run_suite.py --suite=attention_zoom_small --workdir=runs/attention_zoom_small

One recipe for all five variants, unlike the paper's tables: ResNet-18 of a quarter of the width
with the ImageNet stem, the first 10,000 training images, 10 epochs, crop and flip, Adam. The last
1,000 training images choose the checkpoint; the 10,000 test images are looked at once.
"""

from configs.attention_zoom import VARIANTS


def get_suite() -> dict:
    return {
        "runs": {
            variant: f"configs/attention_zoom.py:backbone=resnet50,variant={variant}"
            for variant in VARIANTS
        },
        "overrides": {
            "model.name": "resnet18",
            "model.width": 16,
            "data.train_split": "train[:10000]",
            "data.batch_size": 64,
            "augment.auto_augment": "",
            "total_epochs": 10.0,
            "early_stopping": 0,
            "optimizer.learning_rate": 1e-3,
            "optimizer.weight_decay": 1e-4,
            "log_every_steps": 100,
        },
        "seeds": (0, 1, 2),
    }

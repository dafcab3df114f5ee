"""ResNet-18 on CIFAR-100, the plain recipe that most papers compare with.

    python tools/prepare_data.py cifar100      # TFDS needs TensorFlow for this; training does not
    python train.py --config=configs/cifar100_resnet18.py --workdir=runs/cifar100_resnet18
    python eval.py --workdir=runs/cifar100_resnet18

Hardware and time: one GPU; 200 epochs of a 0.56 GFLOP network, not yet timed by us. On a laptop CPU
reduce it (docs/reproduce.md has the run that we did):
    --config.model.width=16 --config.total_epochs=12
Expected: others report about 77 % test top-1 for this recipe; we have not run it in full.
`:tiny` runs in seconds, offline, on the embedded data set.
"""

import ml_collections

from configs import default


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    config = default.get_config()
    default.use_cifar100(config)
    config.total_epochs = 200.0
    config.augment.update({"crop_padding": 4, "flip": True})
    config.model.update({"name": "resnet18", "stem": "cifar", "width": 64})
    config.optimizer.update(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "weight_decay_mask": ".*",
        }
    )
    config.schedule.update({"name": "cosine", "warmup_epochs": 1.0})
    return default.in_mode(config, mode)

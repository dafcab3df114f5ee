r"""Phrase localisation: does the map of a phrase's words find its box, among many?

    python train.py --config=configs/multi_channel.py:dataset=fine_shapes,masks=none \
        --workdir=runs/tags
    python eval.py --config=configs/phrases.py --workdir=runs/tags

The network of the run tells attributes; those that a phrase names are asked for, their maps
averaged, and boxes ranked by the attention in them over the root of their area (Zhang et al. 2016).
Four methods, at the default tap. On Flickr30k Entities:

    python tools/prepare_data.py flickr30k --from_archive=FOLDER
    python eval.py --config=configs/phrases.py:data=flickr30k --workdir=RUN

Hardware and time: two CPU cores, about 2 minutes. Expected: docs/reproduce.md.
`:tiny` trains and evaluates in seconds:

    python train.py --config=configs/phrases.py:tiny --workdir=runs/tiny
"""

import ml_collections

from configs import default

METHODS = (
    *("contrastive_excitation_backprop", "excitation_backprop"),
    *("grad_cam", "gradient"),
)


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    choices = {"data": "run"}
    mode = default.choose(mode, choices, {"data": ("run", "flickr30k")})
    config = default.get_config()
    config.train_evals, config.best_metric = (), ""
    config.evals = {
        method: {"name": "phrases", "split": "test", "method": method, "prefix": method}
        for method in METHODS
    }
    if choices["data"] == "flickr30k":  # photographs, whole
        config.data.name = "flickr30k"
        for one in config.evals.values():
            one.resize = "squash"
    if mode:
        from configs import multi_channel

        evals = config.evals.to_dict()
        config = multi_channel.get_config(f"dataset=fine_shapes,masks=none,{mode}")
        config.evals.update({name: {**one, "split": "test[:8]"} for name, one in evals.items()})
    return config

"""Masks for each feature and attribute on fine_shapes: better, more robust, in the right place?

    python tools/run_suite.py --suite=attributes --workdir=runs/attributes

One small ResNet, data set, recipe and number of steps for every run. `base` has no masks, all heads
share the features; `single` has one mask for all attributes, `multi_channel` one for each attribute
and channel. Its masks are then transformed as tools/tune_masks.py chooses on validation images;
`multi_channel_best` takes the best transform of all for each attribute.
"""


def get_suite() -> dict:
    masks = "configs/multi_channel.py:dataset=fine_shapes,masks="
    return {
        "runs": {
            "base": f"{masks}none",
            "single": f"{masks}single",
            "multi_channel": f"{masks}attribute_channel",
        },
        "tuned": ("multi_channel",),
        "overrides": {},
        "seeds": (0, 1, 2),
    }

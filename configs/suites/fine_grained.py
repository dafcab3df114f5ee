"""Fine-grained attention on fine_shapes: does recursion, zoom or guidance help, and look right?

    python tools/run_suite.py --suite=fine_grained --workdir=runs/fine_grained

The same small ResNet, data, recipe and number of steps for every run. `localization` scores
Grad-CAM, and the masks that a model has, against the mark that decides the class.
"""


def get_suite() -> dict:
    guided = "configs/cam_guided.py:dataset=fine_shapes,guide="
    recursive = "configs/recursive_attention.py:dataset=fine_shapes,steps="
    return {
        "runs": {
            "base": "configs/recursive_zoom.py:dataset=fine_shapes,steps=1",  # the backbone itself
            **{f"recursive_{t}": f"{recursive}{t}" for t in (1, 2, 4, 8)},
            "recursive_zoom_2": "configs/recursive_zoom.py:dataset=fine_shapes,steps=2",
            "guided_by_nothing": f"{guided}none",
            "guided_by_channels": f"{guided}channels",
            "guided_by_excitation_backprop": f"{guided}excitation_backprop",
        },
        "overrides": {},
        "seeds": (0, 1, 2),
    }

"""Every layer of the package, by name, for configs."""

import dataclasses
from typing import Any

import flax.linen as nn

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.attention_zoom import AttentionZoom
from attnzoom_jax.layers.cam_guided import CamGuidedAttention
from attnzoom_jax.layers.channel_spatial import CBAM, ECA, SqueezeExcite
from attnzoom_jax.layers.multi_channel import MultiChannelAttention
from attnzoom_jax.layers.recursive import RecursiveAttention
from attnzoom_jax.layers.zoom_warp import ZoomWarp

_LAYERS: dict[str, type[nn.Module]] = {
    "attention_zoom": AttentionZoom,
    "squeeze_excite": SqueezeExcite,
    "eca": ECA,
    "cbam": CBAM,
    "cam_guided": CamGuidedAttention,
    "multi_channel": MultiChannelAttention,
    "recursive_attention": RecursiveAttention,  # of vectors [n, d], not maps
    "zoom_warp": ZoomWarp,
}
LAYER_NAMES: tuple[str, ...] = tuple(_LAYERS)


def create_layer(name: str, **options: Any) -> nn.Module:
    """Build a layer by name.

    Args:
        name: one of LAYER_NAMES.
        **options: fields of the layer.

    Returns:
        A linen module, called `layer(x)`.

    Raises:
        ValueError: unknown name or option, with near matches.
    """
    if name not in _LAYERS:
        raise unknown_name("layer", name, LAYER_NAMES)
    # `parent` and `name` are linen's own fields.
    fields = [f.name for f in dataclasses.fields(_LAYERS[name]) if f.name not in ("parent", "name")]
    for option in options:
        if option not in fields:
            raise unknown_name(f"option of {name}", option, fields)
    return _LAYERS[name](**options)

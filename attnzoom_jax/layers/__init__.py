"""Attention layers for any Flax CNN."""

from attnzoom_jax.layers.attention_zoom import AttentionZoom
from attnzoom_jax.layers.cam_guided import CamGuidedAttention
from attnzoom_jax.layers.channel_spatial import CBAM, ECA, SqueezeExcite
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.layers.multi_channel import MultiChannelAttention
from attnzoom_jax.layers.recursive import RecursiveAttention
from attnzoom_jax.layers.tap import Tap
from attnzoom_jax.layers.zoom_warp import ZoomWarp

__all__ = [
    "CBAM",
    "ECA",
    "AttentionZoom",
    "CamGuidedAttention",
    "Gate",
    "MultiChannelAttention",
    "RecursiveAttention",
    "SqueezeExcite",
    "Tap",
    "ZoomWarp",
]

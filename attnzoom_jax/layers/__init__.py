"""Attention layers for any Flax CNN."""

from attnzoom_jax.layers.attention_zoom import AttentionZoom
from attnzoom_jax.layers.gate import Gate

__all__ = ["AttentionZoom", "Gate"]

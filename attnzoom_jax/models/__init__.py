"""Backbones, and what makes any linen CNN of them one with attention layers and named taps."""

from attnzoom_jax.models.factory import MODEL_NAMES, create_model
from attnzoom_jax.models.fold import fold_batch_norm
from attnzoom_jax.models.insert import Insert
from attnzoom_jax.models.pretrained import load_pretrained
from attnzoom_jax.models.taps import bind

__all__ = ["MODEL_NAMES", "Insert", "bind", "create_model", "fold_batch_norm", "load_pretrained"]

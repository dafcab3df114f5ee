"""Backbones, and what makes any linen CNN of them one with attention layers and named taps."""

from attnzoom_jax.models.attribute import AttributeModel, with_transform
from attnzoom_jax.models.factory import MODEL_NAMES, WRAPPER_NAMES, create_model
from attnzoom_jax.models.features import Features
from attnzoom_jax.models.fold import fold_batch_norm
from attnzoom_jax.models.function import FunctionModel, Network, load_function
from attnzoom_jax.models.insert import Insert
from attnzoom_jax.models.pretrained import count_classes, load_pretrained
from attnzoom_jax.models.recursive_zoom import RecursiveZoom
from attnzoom_jax.models.taps import bind
from attnzoom_jax.models.two_stream import TwoStream

__all__ = [
    "MODEL_NAMES",
    "WRAPPER_NAMES",
    "AttributeModel",
    "Features",
    "FunctionModel",
    "Insert",
    "Network",
    "RecursiveZoom",
    "TwoStream",
    "bind",
    "count_classes",
    "create_model",
    "fold_batch_norm",
    "load_function",
    "load_pretrained",
    "with_transform",
]

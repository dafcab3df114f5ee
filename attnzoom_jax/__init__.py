"""Attention layers, attribution and localisation metrics for CNNs in JAX.

The subpackages are imported by name (`attnzoom_jax.models`, `.layers`, `.attribution`, ...), so
that importing one of them never pays for the others.
"""

__version__ = "0.1.0"

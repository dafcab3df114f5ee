"""Attention layers, attribution and localisation metrics for CNNs in JAX.

The subpackages are imported by name (`attnzoom_jax.models`, `.layers`, `.attribution`, ...), so
that importing one of them never pays for the others.
"""

import os

__version__ = "0.1.0"

# OpenCV reads it when it is imported. Its own limit is 1 gigapixel, which a file of some kB can
# have; this one is that of Pillow.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2 * 89_478_485))

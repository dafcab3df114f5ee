"""Where does a network look: maps from any JAX function, at named taps."""

from attnzoom_jax.attribution.cam import grad_cam
from attnzoom_jax.attribution.program import default_tap, gate_taps, list_taps, read_taps

__all__ = ["default_tap", "gate_taps", "grad_cam", "list_taps", "read_taps"]

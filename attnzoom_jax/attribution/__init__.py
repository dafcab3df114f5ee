"""Where does a network look: maps from any JAX function, at named taps."""

from attnzoom_jax.attribution.cam import (
    finer_cam,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    xgrad_cam,
)
from attnzoom_jax.attribution.excitation import (
    contrastive_excitation_backprop,
    excitation_backprop,
    relevance_balance,
)
from attnzoom_jax.attribution.gradient import (
    gradient,
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
    linear_approximation,
    smooth_grad,
)
from attnzoom_jax.attribution.perturbation import occlusion, rise
from attnzoom_jax.attribution.taps import default_tap, gate_taps, list_taps, read_taps, tap_depths

__all__ = [
    "contrastive_excitation_backprop",
    "default_tap",
    "excitation_backprop",
    "finer_cam",
    "gate_taps",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient",
    "guided_backprop",
    "hires_cam",
    "input_x_gradient",
    "integrated_gradients",
    "layer_cam",
    "linear_approximation",
    "list_taps",
    "occlusion",
    "read_taps",
    "relevance_balance",
    "rise",
    "smooth_grad",
    "tap_depths",
    "xgrad_cam",
]

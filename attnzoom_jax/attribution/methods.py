"""Every attribution method by its name, with one call for all of them."""

import inspect
from collections.abc import Callable
from typing import Any

import jax

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
from attnzoom_jax.errors import unknown_name

METHODS: dict[str, Callable[..., Any]] = {
    method.__name__: method
    for method in (
        *(excitation_backprop, contrastive_excitation_backprop),
        *(grad_cam, grad_cam_plus_plus, hires_cam, layer_cam, xgrad_cam, finer_cam),
        *(gradient, input_x_gradient, smooth_grad, integrated_gradients, guided_backprop),
        *(linear_approximation, rise, occlusion),
    )
}


def takes(method: str, argument: str) -> bool:
    """Whether a method has an argument: `tap`, `key`, or one of its options.

    Args:
        method: a name from METHODS.
        argument: the argument's name.

    Returns:
        True if it has.

    Raises:
        ValueError: unknown method, with near matches.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    return argument in inspect.signature(METHODS[method]).parameters


def create_method(name: str, **options: Any) -> Callable[..., jax.Array]:
    """A method as a function that every method can be called as.

    Args:
        name: from METHODS.
        **options: the method's own options, such as negative="clamp" or samples=20.

    Returns:
        `maps(fn, images, targets, *, tap, key)`, raw maps [n, h', w']; methods at the images do
        not look at the tap, and only stochastic ones at the key.

    Raises:
        ValueError: unknown method or option, with near matches.
    """
    known = {"tap", "key"}
    for option in options:
        if not takes(name, option) or option in known:
            parameters = inspect.signature(METHODS[name]).parameters.values()
            own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in known]
            raise unknown_name(f"option of {name}", option, own)

    def maps(
        fn: Callable[[jax.Array], Any],
        images: jax.Array,
        targets: jax.Array,
        *,
        tap: str,
        key: jax.Array,
    ) -> jax.Array:
        given = {"tap": tap, "key": key}
        arguments = {argument: value for argument, value in given.items() if takes(name, argument)}
        return METHODS[name](fn, images, targets, **arguments, **options)

    return maps

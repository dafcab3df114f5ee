"""A classifier up to one of its taps, without editing it.

    Features(create_model("vgg19", num_classes=1), tap="stage5")

The backbone runs until the tap is met; an exception then carries the value out of it. What would
come after is neither computed nor has parameters.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.taps import visit_taps


class Features(nn.Module):
    """The part of a backbone up to a tap: images in, the value at the tap out.

    The backbone's variables keep the tree they have alone, under `backbone`; those of what comes
    after the tap are missing, and are not looked at where they are given.

    Seen through `bind`, the last tap inside is `backbone/<tap>`. It is marked here rather than
    found there, so that a layer is inserted at the whole (the path of this module) instead. If the
    backbone is an `Insert`, a layer whose path comes after the tap, or does not exist, is ignored.

    Attributes:
        backbone: any linen module, called as `backbone(images)`, with `train=` where it accepts it.
        tap: name of a tap of the backbone as `models.taps` has them: `stage4`, `stage5/relu4`,
            `path#1` for a repeated call, `path/0` for a leaf of a tuple.

    Raises:
        ValueError: from init or apply, for an unknown tap (the nearest are named), and for one
            inside a lifted transformation, out of which its value cannot be taken.
    """

    backbone: nn.Module
    tap: str = "stage4"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """The value at the tap.

        Args:
            images: [n, h, w, c].
            train: passed on to the backbone.

        Returns:
            What the module at the tap returns.
        """
        return run_to_tap(self.backbone, self.tap, images, train=train)


class _Reached(Exception):  # noqa: N818 (it is no error)
    """Carries the value at a tap out of the backbone that has met it."""

    def __init__(self, value: jax.Array, owner: Any) -> None:
        super().__init__("the tap is met")
        self.value = value
        self.owner = owner


def run_to_tap(backbone: nn.Module, tap: str, images: jax.Array, *, train: bool) -> jax.Array:
    """Run a submodule until one of its taps is met.

    Args:
        backbone: a bound module, called as `backbone(images)`, with `train=` where it accepts it.
        tap: name of a tap below it.
        images: [n, h, w, c].
        train: passed on to the backbone.

    Returns:
        The value, marked as the tap `<path of the backbone>/<tap>`.

    Raises:
        ValueError: unknown tap, or one inside a lifted transformation.
    """
    names: list[str] = []

    def visit(name: str, value: jax.Array, module: nn.Module) -> jax.Array:
        names.append(name)
        if name == tap:
            check_outside(name, module, backbone)
            raise _Reached(value, visit)
        return value

    try:
        with visit_taps(visit, backbone.path):
            backbone(images, **train_argument(backbone, train))
    except _Reached as reached:
        if reached.owner is not visit:  # on its way to another one around this
            raise
        return checkpoint_name(reached.value, "/".join((*backbone.path, tap)))
    raise unknown_name("tap of the backbone", tap, names)


def check_outside(tap: str, module: nn.Module, backbone: nn.Module) -> None:
    """Raise a ValueError where a tap's value cannot leave the transformation that it is made in.

    Args:
        tap: name of the tap.
        module: the one that returns its value, while it is called.
        backbone: where the value is to be used.
    """
    assert module.scope is not None and backbone.scope is not None  # both are being called
    if module.scope.trace_level != backbone.scope.trace_level:
        raise ValueError(
            f"the tap {tap!r} lies inside a lifted transformation (nn.jit, nn.scan, nn.remat, "
            "nn.vmap), out of which its value cannot be taken; take a tap outside of it"
        )

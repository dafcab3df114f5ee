"""Insert attention layers into any linen CNN by path, without editing it.

    Insert(backbone, layers={"stage1": AttentionZoom()})

The layer receives what the module at `stage1` returns, and the rest of the backbone receives what
the layer returns. The backbone's variables keep the tree they have alone, under `backbone`; the
layers' variables live under `inserted/<path with . for />`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.models.taps import visit_taps

INPUT = "input"


class Insert(nn.Module):
    """A backbone with layers inserted at its taps.

    Attributes:
        backbone: any linen module, called as `backbone(images, *args, **kwargs)`.
        layers: {tap of the backbone: layer}. A tap is a module path such as `stage1/block2`,
            `path#1` for a repeated call, `path/0` for a leaf of a tuple, or `input` for the images.
            A layer is called as `layer(x)`, with `train=` where it accepts it and the call has it.

    Seen through `bind`, the tap `backbone/<path>` is the value after the layer and
    `backbone/<path>/before` the one before it.

    Raises:
        ValueError: from init or apply, for an unknown path (the nearest are named), and for a path
          inside nn.jit, nn.scan, nn.remat or another lifted transformation, where the variables of
          a layer would leak.
    """

    backbone: nn.Module
    layers: Mapping[str, nn.Module]

    @nn.compact
    def __call__(self, *args: Any, train: bool | None = None, **kwargs: Any) -> Any:
        """Run the backbone with its layers; arguments and result are the backbone's own.

        `train` reaches the backbone and those layers that accept it, also where it is given by
        position, as the backbone's own signature has it.
        """
        if train is None:
            train = _positional_train(self.backbone, args, kwargs)
        else:
            kwargs.update(train_argument(self.backbone, train))
        inserted = InsertedLayers(self.layers, name="inserted")
        root = self.backbone.path
        taps = [INPUT]

        def visit(path: str, value: Any, module: nn.Module) -> Any:
            taps.append(path)
            if path not in self.layers:
                return value
            assert self.scope is not None and module.scope is not None  # both are being called
            if module.scope.trace_level != self.scope.trace_level:
                raise ValueError(
                    f"Insert at {path!r}: this module runs inside a lifted transformation (nn.jit, "
                    "nn.scan, nn.remat, nn.vmap), where the layer's variables would leak; insert "
                    "at a module outside of it"
                )
            if path == INPUT and module is not self:
                raise ValueError(
                    f"Insert at {INPUT!r} means the images, and the backbone has a module of that "
                    "name; rename it"
                )
            value = checkpoint_name(value, "/".join((*root, path, "before")))
            return inserted(path, value, train=train)

        if INPUT in self.layers:
            if not args:
                raise ValueError(f"Insert at {INPUT!r}: pass the images as the first argument")
            args = (visit(INPUT, args[0], self), *args[1:])
        with visit_taps(visit, root):
            output = self.backbone(*args, **kwargs)
        for path in self.layers:
            if path not in taps:
                raise unknown_name("path for Insert", path, taps)
        return output


class InsertedLayers(nn.Module):
    """Holds the inserted layers, so that their variables stand together under one name."""

    layers: Mapping[str, nn.Module]

    @nn.compact
    def __call__(self, path: str, value: Any, *, train: bool | None) -> Any:
        """Call the layer inserted at `path`."""
        layer = self.layers[path].clone(parent=self, name=path.replace("/", "."))
        return layer(value, **({} if train is None else train_argument(layer, train)))


def train_argument(module: nn.Module, train: bool) -> dict[str, Any]:
    """{"train": train} for a module whose call has a parameter of that name, else {}."""
    takes = "train" in inspect.signature(module.__call__).parameters
    return {"train": train} if takes else {}


def _positional_train(backbone: nn.Module, args: Any, kwargs: Any) -> bool | None:
    """The value of the backbone's parameter `train` in this call; None where it is not given."""
    try:
        return inspect.signature(backbone.__call__).bind(*args, **kwargs).arguments.get("train")
    except TypeError:  # the call itself will say what is wrong with the arguments
        return None

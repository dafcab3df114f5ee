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
    def __call__(self, images: Any, *args: Any, train: bool | None = None, **kwargs: Any) -> Any:
        """Run the backbone with its layers; arguments and result are the backbone's own.

        `train` reaches the backbone and those layers that accept it.
        """
        if train is not None:
            kwargs.update(train_argument(self.backbone, train))
        inserted = InsertedLayers(self.layers, name="inserted")
        root = (*self.path, "backbone")
        taps = []

        def visit(path: str, value: Any, module: nn.Module) -> Any:
            taps.append(path)
            if path not in self.layers:
                return value
            assert self.scope is not None and module.scope is not None  # both are being called
            if module.scope.trace_level != self.scope.trace_level:
                raise ValueError(
                    f"Insert at {path!r}: this module runs inside a lifted transformation (nn.jit, "
                    "nn.scan, nn.remat, nn.vmap), where the layer's variables would leak; insert "
                    "at the transformed module itself or outside of it"
                )
            value = checkpoint_name(value, "/".join((*root, path, "before")))
            return inserted(path, value, train=train)

        images = visit(INPUT, images, self)
        with visit_taps(visit, root):
            output = self.backbone(images, *args, **kwargs)
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
    """{"train": train} for a module whose call accepts it, else {}."""
    parameters = inspect.signature(module.__call__).parameters.values()
    takes = any(p.name == "train" or p.kind == p.VAR_KEYWORD for p in parameters)
    return {"train": train} if takes else {}

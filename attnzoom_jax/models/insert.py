"""Insert attention layers into any linen CNN by path, without editing it.

    Insert(backbone, layers={"stage1": AttentionZoom()})

The layer receives what the module at `stage1` returns, and the rest of the backbone receives what
the layer returns. The backbone's variables keep the tree they have alone, under `backbone`; the
layers' variables live under `inserted/<path with . for />`.

A layer with a field `reads` also receives the values of the taps that it names, which must come
before it:

    Insert(backbone, layers={"stage2": AttentionZoom(), "stage3": ZoomWarp(reads="stage2/gate")})
"""

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.models.taps import visit_taps

INPUT = "input"


class Insert(nn.Module):
    """A backbone with layers inserted at its taps.

    Attributes:
        backbone: any linen module, called as `backbone(images, *args, **kwargs)`.
        layers: {tap of the backbone: layer}. A tap is a module path such as `stage1/block2`,
            `path#1` for a repeated call, `path/0` for a leaf of a tuple, or `input` for the images.
            A layer is called as `layer(x)`, with `train=` where it accepts it and the call has it.
            One with a field `reads`, a name or several, is called as `layer(x, *values)` with the
            values of those taps: `input`, a tap of the backbone (after the layer inserted there;
            `path/before` is the value before it), or the mask of an inserted layer,
            `<where it is inserted>/gate`. They must come earlier in the same call.

    Seen through `bind`, the tap `backbone/<path>` is the value after the layer and
    `backbone/<path>/before` the one before it. What a layer reads leaves the backbone before `bind`
    marks it: a gradient at the tap `backbone/<path>` is without the way through the reader, which
    counts as given there. Masks are marked first, and theirs is complete.

    Raises:
        ValueError: from init or apply, for an unknown path (the nearest are named), for a path
          inside nn.jit, nn.scan, nn.remat or another lifted transformation, where the variables of
          a layer would leak, and for a name in `reads` that is unknown, comes later, or lies inside
          such a transformation.
    """

    backbone: nn.Module
    layers: Mapping[str, nn.Module]

    @property
    def default_tap(self) -> str:
        """Where maps are taken if the backbone has a wish, see `models.taps.default_tap`."""
        inner = getattr(self.backbone, "default_tap", "")
        return inner and f"backbone/{inner}"

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
        places: list[str] = []
        taps = _Taps({name for layer in self.layers.values() for name in reads_of(layer)})

        def visit(path: str, value: Any, module: nn.Module) -> Any:
            assert self.scope is not None and module.scope is not None  # both are being called
            is_outside = module.scope.trace_level == self.scope.trace_level
            if path in self.layers:
                if not is_outside:
                    raise ValueError(
                        f"Insert at {path!r}: this module runs inside a lifted transformation "
                        "(nn.jit, nn.scan, nn.remat, nn.vmap), where the layer's variables would "
                        "leak; insert at a module outside of it"
                    )
                if path == INPUT and module is not self:
                    raise ValueError(
                        f"Insert at {INPUT!r} means the images, and the backbone has a module of "
                        "that name; rename it"
                    )
                value = checkpoint_name(value, "/".join((*root, path, "before")))
                taps.meet(f"{path}/before", value)
                read = taps.read(path, reads_of(self.layers[path]))
                if read is not None:
                    with _visit_gates(taps, self.scope, (*inserted.path, _key(path)), path):
                        value = inserted(path, value, read, train=train)
            places.append(path)
            taps.meet(path, value, is_outside)
            return value

        if INPUT in self.layers and not args:
            raise ValueError(f"Insert at {INPUT!r}: pass the images as the first argument")
        if args:
            args = (visit(INPUT, args[0], self), *args[1:])
        try:
            with visit_taps(visit, root), _visit_gates(taps, self.scope, root):
                output = self.backbone(*args, **kwargs)
        except Exception as error:
            if not taps.unread:
                raise
            # It may have failed for want of a layer.
            raise taps.unread_error() from error
        if taps.unread:
            raise taps.unread_error()
        for path in self.layers:
            if path not in places:
                raise unknown_name("path for Insert", path, places)
        return output


class InsertedLayers(nn.Module):
    """Holds the inserted layers, so that their variables stand together under one name."""

    layers: Mapping[str, nn.Module]

    @nn.compact
    def __call__(self, path: str, value: Any, read: Sequence[Any], *, train: bool | None) -> Any:
        """Call the layer inserted at `path` with the value there and what it reads."""
        layer = self.layers[path].clone(parent=self, name=_key(path))
        return layer(value, *read, **({} if train is None else train_argument(layer, train)))


class _Taps:
    """The taps that one call has met so far, and the values of those that layers read."""

    def __init__(self, wanted: Collection[str]) -> None:
        self.wanted = wanted
        self.names: list[str] = []
        self.values: dict[str, Any] = {}
        self.unread: list[tuple[str, str]] = []

    def meet(self, name: str, value: Any, is_outside: bool = True) -> None:
        """Note a tap; the value of one inside a lifted transformation would leak."""
        self.names.append(name)
        if name not in self.wanted or not is_outside:
            return
        if name in self.values:
            raise ValueError(
                f"Insert: a layer reads {name!r}, which two values are called here; rename the "
                "backbone's module, or read another tap"
            )
        self.values[name] = value

    def read(self, path: str, names: Sequence[str]) -> list[Any] | None:
        """The values for the layer at `path`; None where some are not there.

        The call then goes on without the layer, to learn which names there are.
        """
        missing = [(path, name) for name in names if name not in self.values]
        self.unread += missing
        return None if missing else [self.values[name] for name in names]

    def unread_error(self) -> ValueError:
        """What is wrong with the first name that could not be read, after the call."""
        path, name = self.unread[0]
        if name not in self.names:
            return unknown_name(f"tap that the layer at {path!r} reads", name, self.names)
        problem = f"Insert: the layer at {path!r} reads {name!r}, which "
        if path == INPUT:
            return ValueError(
                problem + "comes later: the images come before every tap; read 'input/before', or "
                "insert the layer further up"
            )
        if name not in self.values:
            return ValueError(
                problem + "lies inside a lifted transformation (nn.jit, nn.scan, nn.remat, "
                "nn.vmap), out of which its value cannot be taken; read a tap outside of it"
            )
        before = self.names[: self.names.index(f"{path}/before") + 1]
        return ValueError(
            problem + f"comes later or is its own result; the last taps that it can read: "
            f"{', '.join(before[-4:])}"
        )


@contextmanager
def _visit_gates(
    taps: _Taps, scope: Any, root: tuple[str, ...], prefix: str = ""
) -> Iterator[None]:
    """Note the masks that are marked below `root`, as `<prefix>/<path below root>`."""
    calls: list[tuple[str, Any]] = []

    def interceptor(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        module = context.module
        if isinstance(module, Gate) and module.path[: len(root)] == root:
            assert module.scope is not None  # it is being called
            name = "/".join((*filter(None, [prefix]), *module.path[len(root) :]))
            calls.append((name, module.scope.trace_level))
            repeat = calls.count(calls[-1]) - 1
            is_outside = module.scope.trace_level == scope.trace_level
            taps.meet(f"{name}#{repeat}" if repeat else name, output, is_outside)
        return output

    with nn.intercept_methods(interceptor):
        yield


def _key(path: str) -> str:
    """The name of the layer inserted at a path, among the variables."""
    return path.replace("/", ".")


def reads_of(layer: nn.Module) -> tuple[str, ...]:
    """The names in a layer's field `reads`: none, one or several."""
    reads = getattr(layer, "reads", ())
    return tuple(filter(None, [reads])) if isinstance(reads, str) else tuple(reads)


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

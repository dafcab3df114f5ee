"""Taps: a name for every array that a submodule of a Flax model returns, without editing the model.

A tap's name is the module's path. Rules, in one place for all who read, mark or replace taps:

    path      the array that the module at `path` returns; `root` for the model itself
    path/0    the first array of a tuple or other pytree that it returns (its leaves in order)
    path#1    the second call of the same module

Arrays only: other leaves pass untouched and get no name. Flax's `nn.intercept_methods` calls us
after every `__call__`; nothing is stored on the model and nothing remains afterwards.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax import attribution
from attnzoom_jax.layers.gate import Gate

Visit = Callable[[str, jax.Array, nn.Module], Any]


@contextmanager
def visit_taps(visit: Visit, root: tuple[str, ...] = ()):
    """Pass every tap below `root` through `visit` while the context is open.

    Args:
        visit: called as `visit(name, value, module)`; what it returns takes the value's place.
        root: the path below which modules are visited; names are relative to it.
    """
    calls: list[tuple[tuple[str, ...], Any]] = []

    def interceptor(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        module = context.module
        path = module.path
        is_below = path[: len(root)] == root
        if context.method_name != "__call__" or not is_below or isinstance(module, Gate):
            return output
        # A lifted transformation (nn.remat, nn.scan) may trace its body several times: a call is
        # repeated only where the same trace sees it again.
        trace = module.scope.trace_level
        repeat = sum((path, trace) == call for call in calls)
        calls.append((path, trace))
        name = "/".join(path[len(root) :]) or "root"
        if repeat:
            name = f"{name}#{repeat}"
        if isinstance(output, jax.Array):
            return visit(name, output, module)
        leaves, treedef = jax.tree.flatten(output)
        leaves = [
            visit(f"{name}/{i}", leaf, module) if isinstance(leaf, jax.Array) else leaf
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, leaves)

    with nn.intercept_methods(interceptor):
        yield


def bind(model: nn.Module, variables: Any, **call_kwargs: Any) -> Callable[..., Any]:
    """Turn a Flax model into a plain function whose every module output is a named tap.

    Args:
        model: any linen module.
        variables: its variables, as `model.init` returns them.
        **call_kwargs: keyword arguments of every call, for example `train=False`.

    Returns:
        A function `images [n, h, w, c] -> model output`. Its taps can be listed with
        `attribution.list_taps`, and used under jit, vmap and grad.

    Raises:
        ValueError: from the call, where a module runs inside `nn.jit`: that caches its trace, so
            that a tap could be missing, or stale, another time.
    """

    def mark(name: str, value: jax.Array, module: nn.Module) -> jax.Array:
        if _is_inside_nn_jit():
            raise ValueError(
                f"the module {name!r} runs inside nn.jit, where a tap may be missing or stale; "
                "take nn.jit out of the model and put jax.jit around the whole function"
            )
        return checkpoint_name(value, name)

    def fn(*args: Any) -> Any:
        with visit_taps(mark):
            return model.apply(variables, *args, **call_kwargs)

    return fn


def default_tap(model: nn.Module, fn: Callable[..., Any], images: Any) -> str:
    """Where a map of a model is taken if nobody says: a tap whose places are those of the images.

    Args:
        model: one with an attribute `default_tap` names it itself, because its last tap lies in a
            patch or in a view; "" and all other models leave it to `attribution.default_tap`.
        fn: the model, bound.
        images: [n, h, w, c], or their shape.

    Returns:
        The name of the tap.
    """
    return getattr(model, "default_tap", "") or attribution.default_tap(fn, images)


def _is_inside_nn_jit() -> bool:
    """Whether the caller is being traced by `nn.jit` (Flax offers no other way to ask)."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "jitted" and code.co_filename.endswith("flax/core/lift.py"):
            return True
        frame = frame.f_back
    return False

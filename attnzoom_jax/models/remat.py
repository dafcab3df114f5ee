"""Gradient checkpointing of a Flax model's modules, by path, without editing the model.

    with rematerialized(model, ("stage1", "stage2")):
        logits = model.apply(variables, images, train=True, ...)

A module named there keeps nothing of its inside for the backward pass, which computes it again from
what the module was given: less memory for about a third more time. While it does so it needs all of
that one module: name several stages, or blocks, rather than one path that holds most. Values,
gradients, random numbers and variables are those of the model as it is.

The body of the module's call is put into `nn.remat`, inside of whatever looks at its output: a tap
or an inserted layer at the path itself works as ever, inside of it `Insert` raises. XLA for CPUs
merges the second computation with the first one again, and there memory stays what it was.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.models.insert import Insert


@contextmanager
def rematerialized(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Have modules of a model recomputed in the backward pass, in calls inside this context.

    Args:
        model: that is called, once.
        paths: of modules; of a model with inserted layers, of its backbone, as `insert` names them.

    Raises:
        ValueError: at the end, for a path that was not called (the nearest are named).
    """
    if not paths:
        yield
        return
    prefix = ("backbone",) if isinstance(model, Insert) else ()
    wanted = {(*prefix, *path.split("/")): path for path in paths}
    parents = {path[:-1] for path in wanted}
    called: set[tuple[str, ...]] = set()

    # Flax has the interceptor that was opened last nearest to the method. Others are opened while
    # the model is called (bind, Insert); so `remat` opens when the module's parent is called.
    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        called.add(context.module.path)
        if context.method_name != "__call__" or context.module.path not in parents:
            return next_fun(*args, **kwargs)
        with nn.intercept_methods(remat):
            return next_fun(*args, **kwargs)

    def remat(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or context.module.path not in wanted:
            return next_fun(*args, **kwargs)
        method = _unbound(next_fun, wanted[context.module.path])

        # `train` and the like are Python values: they stay outside of what is traced.
        def body(module: nn.Module, *args: Any) -> Any:
            return method(module, *args, **kwargs)

        return nn.remat(body)(context.module, *args)

    with nn.intercept_methods(watch):
        yield
    missing = [path for key, path in wanted.items() if key not in called]
    if missing:
        known = ["/".join(path[len(prefix) :]) for path in sorted(called) if path[len(prefix) :]]
        raise unknown_name("path in remat", missing[0], known)


def _unbound(bound: Any, path: str) -> Any:
    """The method itself, of what Flax hands to the interceptor that is nearest to it."""
    if not isinstance(bound, functools.partial):
        raise ValueError(
            f"remat at {path!r}: the module that calls it looks at its calls itself "
            "(nn.intercept_methods); take a path further up or down"
        )
    return bound.func

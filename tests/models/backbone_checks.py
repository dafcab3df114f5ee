"""What the tests of the backbones share: one training step, and where relevance goes."""

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.attribution import relevance_balance
from attnzoom_jax.models import bind


def training_step(model, variables, images):
    """A jitted function of a key: (loss, new statistics or {}), gradients."""

    def loss_fn(params, key):
        logits, updates = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        weights = jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)  # no two alike
        return (weights * logits).sum(), updates.get("batch_stats", {})

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return lambda seed: step(variables["params"], jax.random.key(seed))


def every_value_is_reached(gradients):
    """Whether no parameter tensor has a gradient that is zero everywhere, or not finite."""
    return all(np.any(g != 0) and np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def every_value_changed(before, after):
    """Whether two trees differ in every single value."""
    same = jax.tree.map(lambda a, b: np.any(a == b), before, after)
    return not any(jax.tree.leaves(same))


def plain_variables(model, images, *, seed=0):
    """He-normal kernels, norms that do nothing yet: a network before its first step."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            value = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        else:
            value = np.full(leaf.shape, float(kind in ("scale", "var")))
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def relevance_at(tap, *, model, images, negative="raw", targets=None):
    """A jitted function of the variables: (at_tap, absolute, dropped) of the targets.

    Without these, of class i in image i.
    """
    targets = jnp.arange(len(images)) if targets is None else jnp.asarray(targets)

    def measure(variables, images):
        fn = bind(model, variables, train=False)
        found = relevance_balance(fn, images, targets, tap=tap, negative=negative)
        return found.at_tap, found.absolute, found.dropped

    measure = jax.jit(measure)
    return lambda variables: measure(variables, images)

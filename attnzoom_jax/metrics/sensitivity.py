"""Do maps change where images hardly do? Max-sensitivity (Yeh et al. 2019).

    max_sensitivity(x) = max_{y: |y - x| <= r} |map(y) - map(x)|_2

over a ball of the maximum norm, estimated by the largest of some random y, uniform in the ball: a
lower bound that rises with their number. Relative to |map(x)|_2, methods of different scales can
be compared.

Each sample is one compiled program and the loop over them is Python's, as gradients of convolutions
in a compiled loop are slow on a CPU. `explain` may be a `jax.tree_util.Partial` of a function and
its arrays: then all batches and all calls share the program, where another closure is another one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


def max_sensitivity(
    explain: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    key: jax.Array,
    radius: Any = 0.02,
    samples: int = 10,
    is_relative: bool = True,
    ids: Any = None,
) -> jax.Array:
    """The largest change of each map when its image moves a little.

    Args:
        explain: images -> maps [n, ...] of the classes that do not move along: it holds the targets
            of this batch. Each map depends on its image alone.
        images: float [n, h, w, c].
        key: PRNG key of the samples.
        radius: of the ball, in units of `images`, above 0: a number, or one per channel [c], such
            as 0.02 / std for pixels in [0, 1] that were normalised. Samples are not clipped.
        samples: at least 1. Those of fewer samples are among those of more.
        is_relative: divide by the Euclidean norm of the map.
        ids: int [n], by which the images draw; None for 0, 1, ...

    Returns:
        [n], at least float32, 0 or more, the smaller the more stable. Relative, NaN for a map that
        is 0 everywhere; NaN where any map of the image holds NaN.

    Raises:
        ValueError: images that are no floats, a radius that is not above 0, samples below 1, no map
            for every image.

    Source: Yeh et al. 2019 (arXiv 1901.09392); the ball, its radius of 0.02, ten samples and the
    division by the norm are as in Captum.
    """
    if jnp.ndim(images) != 4 or not jnp.issubdtype(jnp.result_type(images), jnp.floating):
        raise ValueError(
            f"images are {jnp.result_type(images)} {list(jnp.shape(images))}; expected float "
            "[n, h, w, c], normalised as the function takes them"
        )
    if samples != int(samples) or samples < 1:
        raise ValueError(f"samples is {samples}; expected a whole number from 1 on")
    if np.shape(radius) not in ((), images.shape[3:]) or not (np.asarray(radius) > 0).all():
        raise ValueError(
            f"radius is {radius}; expected a number above 0, or one for each of the "
            f"{images.shape[3]} channels"
        )
    explain = explain if isinstance(explain, Partial) else Partial(explain)
    radius = jnp.asarray(radius, images.dtype)
    ids = jnp.arange(len(images)) if ids is None else jnp.asarray(ids)
    maps = _explained(explain, images)
    worst = jnp.zeros(len(images), maps.dtype)
    for i in range(samples):
        worst = _step(explain, images, maps, worst, radius, jax.random.fold_in(key, i), ids)
    if not is_relative:
        return worst
    length = _length(maps)
    return worst / jnp.where(length > 0, length, jnp.nan)


@jax.jit
def _explained(explain: Any, images: jax.Array) -> jax.Array:
    maps = explain(images)
    if maps.ndim < 2 or len(maps) != len(images):
        raise ValueError(
            f"explain returned {maps.shape} for {len(images)} images; expected a map for each"
        )
    return maps.astype(jnp.promote_types(maps.dtype, jnp.float32))


@jax.jit
def _step(
    explain: Any,
    images: jax.Array,
    maps: jax.Array,
    worst: jax.Array,
    radius: jax.Array,
    key: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """The largest change so far, one more sample among them."""
    shape, dtype = images.shape[1:], images.dtype

    def draw(id: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, id), shape, dtype, minval=-1, maxval=1)

    moved = images + radius * jax.vmap(draw)(ids)
    return jnp.maximum(worst, _length(_explained(explain, moved) - maps))


def _length(maps: jax.Array) -> jax.Array:
    """Euclidean length of each map, [n]."""
    values = maps.reshape(len(maps), -1)
    # Divided by the largest value first: squares of tiny gradients would vanish.
    largest = jnp.abs(values).max(axis=1)
    scaled = values / jnp.where(largest > 0, largest, 1)[:, None]
    return largest * jnp.sqrt(jnp.square(scaled).sum(axis=1))

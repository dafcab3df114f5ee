"""Adversarial attacks on any function of images, through everything inside of it.

Of pixels x in [0, 1] with the loss L, an attack looks for x' near x whose loss is large:

    fgsm            x' = x + epsilon sign(grad L(x))
    pgd             x_i+1 = P(x_i + step d(grad L(x_i))), from a random place near x
    random_search   x' = x_i with a random square of it changed; kept where it is no better for fn

P projects onto the ball of radius epsilon around x, then onto [0, 1]. In the norm linf the ball
holds |x' - x| <= epsilon in every pixel and d is the sign; in l2 the ball is that of the length
over all pixels and channels, and d is the gradient over its length. The random search needs no
gradient: where it beats PGD, the gradient is masked, and PGD's figure is no sign of robustness.

Images come as fn takes them, (x - mean) / std, and epsilon is stated in pixels. Each step is one
compiled program and the loop over them is Python's, as gradients of convolutions in a compiled loop
are slow on a CPU. `fn` may be a `jax.tree_util.Partial` of a function and its arrays: then all
batches and all calls share the programs, where another closure is another program.

Sources: FGSM, Goodfellow et al. 2015 (arXiv 1412.6572); PGD, Madry et al. 2018 (arXiv 1706.06083);
the random search is a simple one in the spirit of Square Attack, Andriushchenko et al. 2020 (arXiv
1912.00049), with the first query and the schedule of sizes of their published code.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from attnzoom_jax.errors import unknown_name

NORMS = ("linf", "l2")
# Shares of all queries after which the squares' area is halved.
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
Fn = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attacked:
    """What an attack found.

    Attributes:
        images: float32 [n, h, w, c], as the function takes them.
        wrong: int32 [n], wrong decisions of the function on them: 0 or 1 for class ids, up to a
            for attributes. NaN among the logits makes all of them wrong.
        score: float32 [n], what the attack made large: the loss, in the random search the margin.
    """

    images: jax.Array
    wrong: jax.Array
    score: jax.Array


def fgsm(
    fn: Fn, images: jax.Array, labels: jax.Array, *, epsilon: float, mean: Any = 0.0, std: Any = 1.0
) -> Attacked:
    """One step of epsilon along the sign of the gradient; no choice between before and after.

    Args:
        fn: images -> logits [n, k]; each image counts for itself.
        images: float [n, h, w, c], as fn takes them: (pixels in [0, 1] - mean) / std.
        labels: class ids int [n], or attributes float [n, k], 0 or 1 each.
        epsilon: in pixels, in (0, 1].
        mean, std: of the normalisation, per channel.

    Returns:
        The images after the step.

    Raises:
        ValueError: images that are not normalised, epsilon out of range, labels that do not fit.

    Source: Goodfellow et al. 2015 (arXiv 1412.6572).
    """
    check_attack(epsilon=epsilon)
    fn, space, clean = _prepare(fn, images, labels, mean, std)
    start = _look(fn, clean, labels, space)
    _, moved = _pgd_step(fn, start, clean, clean, labels, epsilon, epsilon, space, norm="linf")
    return _normalized(_look(fn, moved, labels, space), space)


def pgd(
    fn: Fn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float,
    norm: str = "linf",
    steps: int = 20,
    step_size: float = 0.0,
    key: jax.Array | None = None,
    ids: Any = None,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Attacked:
    """Projected gradient ascent of the loss; the worst of all iterates for each image.

    The worst is that with the most wrong decisions, and among equals that with the largest loss.
    The image itself is one of them.

    Args:
        fn: images -> logits [n, k]; each image counts for itself.
        images: float [n, h, w, c], as fn takes them: (pixels in [0, 1] - mean) / std.
        labels: class ids int [n], or attributes float [n, k], 0 or 1 each. The loss is the softmax
            cross-entropy; for attributes the sum of m / (1 + |m|), m the logit towards the wrong
            side: the cross-entropy would go on to raise what is wrong already.
        epsilon: in pixels; in (0, 1] for linf, above 0 for l2.
        norm: "linf" or "l2".
        steps: at least 1.
        step_size: in pixels; 0 for 2.5 epsilon / steps.
        key: of a random start, uniform in the ball; None starts at the images.
        ids: int [n], by which the images draw; None for 0, 1, ...
        mean, std: of the normalisation, per channel.

    Returns:
        The worst images found. They are not rounded to whole grey values.

    Raises:
        ValueError: as `fgsm`; unknown norm, steps below 1, negative step size.

    Source: Madry et al. 2018 (arXiv 1706.06083); to keep the worst iterate is ours.
    """
    check_attack(epsilon=epsilon, norm=norm, steps=steps)
    if step_size < 0:
        raise ValueError(f"step_size is {step_size}; expected a length in pixels, or 0 for its own")
    fn, space, clean = _prepare(fn, images, labels, mean, std)
    step_size = step_size or 2.5 * epsilon / steps
    worst, pixels = _look(fn, clean, labels, space), clean
    ids = np.arange(len(clean)) if ids is None else ids
    if key is not None:
        pixels = _random_start(clean, key, ids, epsilon, norm=norm)
    for _ in range(steps):
        worst, pixels = _pgd_step(
            fn, worst, pixels, clean, labels, epsilon, step_size, space, norm=norm
        )
    return _normalized(_worse(worst, _look(fn, pixels, labels, space)), space)


def random_search(
    fn: Fn,
    images: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float,
    key: jax.Array,
    norm: str = "linf",
    queries: int = 200,
    ids: Any = None,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Attacked:
    """Change random squares, and keep what serves; fn is only called, never differentiated.

    The first query changes all of an image, with a random sign per column and channel. Any other
    sets a window at a random place, of the image's own shape, to x +- epsilon (linf) or adds one of
    length epsilon (l2), with a random sign per channel. It is kept where the wrong decisions, then
    the margin, do not fall. The margin is the best other class's logit less the label's; over
    attributes it is the sum of those logits, negative, that are still right. Unlike the loss it
    tells saturated logits apart.

    Args:
        fn: images -> logits [n, k]; each image counts for itself.
        images: float [n, h, w, c], as fn takes them: (pixels in [0, 1] - mean) / std.
        labels: class ids int [n], or attributes float [n, k], 0 or 1 each.
        epsilon: in pixels; in (0, 1] for linf, above 0 for l2.
        key: of the windows.
        norm: "linf" or "l2".
        queries: at least 1; each is a call of fn.
        ids: int [n], by which the images draw; None for 0, 1, ...
        mean, std: of the normalisation, per channel.

    Returns:
        The worst images found.

    Raises:
        ValueError: as `fgsm`; unknown norm, queries below 1.
    """
    check_attack(epsilon=epsilon, norm=norm, queries=queries)
    fn, space, clean = _prepare(fn, images, labels, mean, std)
    worst = _look(fn, clean, labels, space, score="margin")
    ids = np.arange(len(clean)) if ids is None else ids
    for i in range(queries):
        area = 0.3 / 2 ** np.searchsorted(HALVINGS, i / queries, side="right")
        worst = _search_step(
            fn, worst, clean, labels, key, ids, i, math.sqrt(area), epsilon, space, norm=norm
        )
    return _normalized(worst, space)


def count_wrong(fn: Fn, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Wrong decisions of a function on each image.

    Args:
        fn: images -> logits [n, k].
        images: float [n, h, w, c], as fn takes them.
        labels: class ids int [n], or attributes float [n, k], 0 or 1 each.

    Returns:
        int32 [n], as `Attacked.wrong`.

    Raises:
        ValueError: images that are not normalised, labels that do not fit.
    """
    fn, _, _ = _prepare(fn, images, labels, 0.0, 1.0)
    return _look(fn, images, labels, (0.0, 1.0)).wrong


def check_attack(*, epsilon: float, norm: str = "linf", steps: int = 1, queries: int = 1) -> None:
    """Raise a ValueError for an attack out of range, or an unknown norm with near matches."""
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    most = 1 if norm == "linf" else math.inf
    if not isinstance(epsilon, int | float) or not 0 < epsilon <= most:
        raise ValueError(
            f"epsilon of an attack is {epsilon!r}; expected a distance above 0 in pixels of the "
            f"range [0, 1]{', at most 1' if most == 1 else ''}, such as 8/255"
        )
    for name, value in (("steps", steps), ("queries", queries)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name} of an attack is {value}; expected a whole number from 1 on")


Space = tuple[Any, Any]  # mean and std of the normalisation


def _prepare(fn: Fn, images: Any, labels: Any, mean: Any, std: Any) -> tuple[Any, Space, jax.Array]:
    """The function as a pytree, mean and std, and the pixels; raises what can be said at once."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"an attack got {images.dtype} images; expected float ones as the model takes them: "
            "normalise them first, (images / 255 - mean) / std, and give the attack mean and std"
        )
    is_ids = jnp.issubdtype(labels.dtype, jnp.integer)
    if images.ndim != 4 or labels.ndim != (1 if is_ids else 2) or len(labels) != len(images):
        raise ValueError(
            f"an attack got images {list(images.shape)} and labels {labels.dtype}"
            f"{list(labels.shape)}; expected [n, h, w, c], and class ids int [n] or attributes "
            "float [n, k]"
        )
    space = (np.asarray(mean, np.float32), np.asarray(std, np.float32))
    if np.min(space[1]) <= 0:
        raise ValueError(f"std of an attack is {std}; expected numbers above 0")
    fn = fn if isinstance(fn, Partial) else Partial(fn)
    return fn, space, _to_pixels(images, space)


@jax.jit
def _to_pixels(images: jax.Array, space: Space) -> jax.Array:
    return (images.astype(jnp.float32) * space[1] + space[0]).clip(0, 1)


@jax.jit
def _normalized(attacked: Attacked, space: Space) -> Attacked:
    return dataclasses.replace(attacked, images=(attacked.images - space[0]) / space[1])


@functools.partial(jax.jit, static_argnames="score")
def _look(
    fn: Any, pixels: jax.Array, labels: jax.Array, space: Space, *, score: str = "loss"
) -> Attacked:
    """How wrong the function is about pixels."""
    logits = fn((pixels - space[0]) / space[1]).astype(jnp.float32)
    if logits.ndim != 2 or labels.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"an attack got logits {list(logits.shape)} and labels {list(labels.shape)}; expected "
            "[n, k], and class ids [n] or attributes [n, k]"
        )
    if labels.ndim == 1:
        wrong = (logits.argmax(axis=1) != labels)[:, None]  # [n, 1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        is_own = jnp.arange(logits.shape[1]) == labels[:, None]  # [n, k]
        own = jnp.where(is_own, logits, 0).sum(axis=1)
        margin = jnp.where(is_own, -jnp.inf, logits).max(axis=1) - own
    else:
        is_there = labels > 0.5  # [n, a]
        wrong = (logits > 0) != is_there
        loss = jax.nn.soft_sign(jnp.where(is_there, -logits, logits)).sum(axis=1)
        margin = jnp.minimum(jnp.where(is_there, -logits, logits), 0).sum(axis=1)
    wrong |= jnp.isnan(logits).any(axis=1, keepdims=True)
    found = loss if score == "loss" else margin
    return Attacked(pixels, wrong.sum(axis=1, dtype=jnp.int32), found)


@functools.partial(jax.jit, static_argnames="norm")
def _pgd_step(
    fn: Any,
    worst: Attacked,
    pixels: jax.Array,
    clean: jax.Array,
    labels: jax.Array,
    epsilon: Any,
    step_size: Any,
    space: Space,
    *,
    norm: str,
) -> tuple[Attacked, jax.Array]:
    """The worst so far, `pixels` among them, and the next pixels."""

    def total_loss(pixels: jax.Array) -> tuple[jax.Array, Attacked]:
        attacked = _look(fn, pixels, labels, space)
        return attacked.score.sum(), attacked

    gradient, attacked = jax.grad(total_loss, has_aux=True)(pixels)
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
    direction = jnp.sign(gradient) if norm == "linf" else _to_length(gradient, 1.0)
    moved = _project(pixels + step_size * direction, clean, epsilon, norm)
    return _worse(worst, attacked), moved


@functools.partial(jax.jit, static_argnames="norm")
def _search_step(
    fn: Any,
    worst: Attacked,
    clean: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    ids: jax.Array,
    query: Any,
    side: Any,
    epsilon: Any,
    space: Space,
    *,
    norm: str,
) -> Attacked:
    """The worst so far, after one more query."""
    h, w, c = clean.shape[1:]

    def propose(id: jax.Array) -> tuple[jax.Array, jax.Array]:
        place, sign = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, query), id))
        is_inside = jnp.ones((), bool)
        for size, at, axes in ((h, 0, (1, 2)), (w, 1, (0, 2))):
            length = jnp.maximum(jnp.round(side * size), 1)
            start = jnp.floor(jax.random.uniform(place, (2,))[at] * (size - length + 1))
            along = jnp.arange(size)
            is_within = (along >= start) & (along < start + length)
            is_inside = is_inside & jnp.expand_dims(is_within, axes)
        signs = jax.random.rademacher(sign, (1, w, c), jnp.float32)
        is_first = query == 0
        return is_inside | is_first, jnp.where(is_first, signs, signs[:, :1])

    is_inside, signs = jax.vmap(propose)(ids)  # [n, h, w, 1], [n, 1, w, c]
    if norm == "linf":
        moved = jnp.where(is_inside, clean + epsilon * signs, worst.images)
    else:
        moved = worst.images + _to_length(is_inside * signs, epsilon)
    pixels = _project(moved, clean, epsilon, norm)
    return _worse(worst, _look(fn, pixels, labels, space, score="margin"))


@functools.partial(jax.jit, static_argnames="norm")
def _random_start(
    clean: jax.Array, key: jax.Array, ids: jax.Array, epsilon: Any, *, norm: str
) -> jax.Array:
    """Pixels drawn uniformly from the ball, then clipped to [0, 1]."""
    shape = clean.shape[1:]

    def draw(id: jax.Array) -> jax.Array:
        direction, radius = jax.random.split(jax.random.fold_in(key, id))
        if norm == "linf":
            return jax.random.uniform(direction, shape, minval=-1, maxval=1)
        within = jax.random.uniform(radius) ** (1 / math.prod(shape))
        return within * _to_length(jax.random.normal(direction, shape)[None], 1.0)[0]

    return _project(clean + epsilon * jax.vmap(draw)(ids), clean, epsilon, norm)


@jax.jit
def _worse(old: Attacked, new: Attacked) -> Attacked:
    """For each image what has more wrong decisions, or as many and no lower score."""
    is_new = (new.wrong == old.wrong) & (new.score >= old.score) | (new.wrong > old.wrong)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(is_new, tuple(range(1, new.ndim))), new, old)

    return jax.tree.map(choose, new, old)


def _project(pixels: jax.Array, clean: jax.Array, epsilon: Any, norm: str) -> jax.Array:
    change = pixels - clean
    if norm == "linf":
        change = change.clip(-epsilon, epsilon)
    else:
        change = jnp.where(_length(change) > epsilon, _to_length(change, epsilon), change)
    # Clean pixels are in [0, 1]: clipping brings every value nearer to its own.
    return (clean + change).clip(0, 1)


def _length(values: jax.Array) -> jax.Array:
    """Euclidean length of each image, [n, 1, 1, 1]."""
    return jnp.sqrt(jnp.square(values).sum(axis=(1, 2, 3), keepdims=True))


def _to_length(values: jax.Array, length: Any) -> jax.Array:
    """Each image scaled to a length; one that is 0 everywhere stays so."""
    # Divided by the largest value first: squares of tiny gradients would vanish.
    largest = jnp.abs(values).max(axis=(1, 2, 3), keepdims=True)
    values = values / jnp.where(largest > 0, largest, 1)
    own = _length(values)
    return values * (length / jnp.where(own > 0, own, 1))

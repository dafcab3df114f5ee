"""Does the score follow the map? Change the pixels that a map calls important, and look.

Deletion and insertion (RISE, Petsiuk et al. 2018): pixels are ordered by the map, the largest value
first. Deletion replaces them by a baseline, insertion brings them back into a blurred image. With
the score f_i after step i of s, and the share u_i of the pixels changed by then,

    area = sum_{i=1..s} (u_i - u_{i-1}) (f_{i-1} + f_i) / 2

is small for deletion and large for insertion where the map is faithful.

Average drop and increase (Grad-CAM++, Chattopadhay et al. 2018): of the probability y of the class
and o, that of the image under the map, with the map scaled so that its maximum is 1,

    drop = max(0, y - o) / y,    increase = [o > y]

ROAD (Rong et al. 2022) is in `metrics.road`: its removed pixels are solved for, on the host.

Everywhere here an image comes as the function takes it, and a baseline is in the same units: in
normalised images 0 is the mean colour. A map that holds NaN has NaN scores, whatever its image.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.ops.smooth import smooth

SCORES = ("probability", "logit", "correct")
Fn = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curve:
    """Scores along a path of images, more and more pixels of which are changed.

    Attributes:
        shares: float32 [s], the share of the pixels that is changed, rising.
        scores: [n, s], at least float32.
    """

    shares: jax.Array
    scores: jax.Array

    @property
    def area(self) -> jax.Array:
        """Area under each curve by the trapezoidal rule, over the width of its shares: [n]."""
        widths = jnp.diff(self.shares)
        means = (self.scores[:, 1:] + self.scores[:, :-1]) / 2
        return (means * widths).sum(axis=1) / widths.sum()

    @property
    def mean(self) -> jax.Array:
        """Mean of each curve's scores: [n]."""
        return self.scores.mean(axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Confidence:
    """Probabilities of the class, of images and of what their maps leave of them.

    Attributes:
        full: [n] in [0, 1], of the image, y.
        masked: [n] in [0, 1], of the image under its map, o.
    """

    full: jax.Array
    masked: jax.Array

    @property
    def drop(self) -> jax.Array:
        """Share of the probability that is lost, [n] in [0, 1]; 0 where there was none."""
        lost = jax.nn.relu(self.full - self.masked)
        return lost / jnp.where(self.full > 0, self.full, 1)

    @property
    def increase(self) -> jax.Array:
        """1 where the probability rises, else 0, NaN where there is no probability: [n]."""
        gain = self.masked - self.full
        return jnp.where(jnp.isnan(gain), gain, gain > 0)


def deletion(
    fn: Fn,
    images: jax.Array,
    maps: jax.Array,
    targets: jax.Array,
    *,
    steps: int = 100,
    baseline: Any = 0.0,
    score: str = "probability",
    chunk_size: int | None = 32,
) -> Curve:
    """The score while pixels are removed, the most important ones first.

    Call it under jit: outside, its loop is compiled at every call.

    Args:
        fn: images [m, h, w, c] -> logits [m, k]; it is only called, and each image's logits depend
            on that image alone.
        images: float [n, h, w, c].
        maps: [n, h, w], any sign; only their order counts. Pixels of equal value go in row-major
            order, so a constant map removes row by row.
        targets: class ids int [n].
        steps: of about h w / steps pixels each, at most h w. RISE takes 224 pixels per step.
        baseline: what a removed pixel becomes: a number, one per channel [c], or images
            [n, h, w, c].
        score: "probability" (softmax over the classes), "logit", or "correct" (1 where the class
            has the largest logit, else 0).
        chunk_size: images per call of fn, at most, but never fewer than n: states of all n images
            are seen at a time as many as fit. None for all states in one call.

    Returns:
        steps + 1 points, from the untouched image (share 0) to the baseline (share 1); `area` is
        the metric, the smaller the better. NaN where the map holds NaN or the class id is out of
        range.

    Raises:
        ValueError: images that are no floats, maps, targets, logits or a baseline of another shape,
            unknown score, steps or chunk_size out of range.

    Source: Petsiuk et al. 2018 (arXiv 1806.07421), with the removal to zeros and the trapezoidal
    rule of the authors' code.
    """
    check_request(images, maps, targets, score)
    end = _like_images("baseline", baseline, images)
    return _walk(fn, images, end, maps, targets, steps, score, chunk_size)


def insertion(
    fn: Fn,
    images: jax.Array,
    maps: jax.Array,
    targets: jax.Array,
    *,
    steps: int = 100,
    baseline: Any = None,
    score: str = "probability",
    chunk_size: int | None = 32,
) -> Curve:
    """The score while pixels are brought back, the most important ones first.

    Args:
        fn: as for `deletion`.
        images: float [n, h, w, c].
        maps: [n, h, w], as for `deletion`.
        targets: class ids int [n].
        steps: as for `deletion`.
        baseline: what the walk begins with: a number, one per channel [c], or images [n, h, w, c];
            None for blur(images).
        score: as for `deletion`.
        chunk_size: as for `deletion`.

    Returns:
        steps + 1 points, from the baseline (share 0) to the image (share 1); `area` is the metric,
        the larger the better. NaN as for `deletion`.

    Raises:
        ValueError: as `deletion`.

    Source: Petsiuk et al. 2018 (arXiv 1806.07421).
    """
    check_request(images, maps, targets, score)
    start = blur(images) if baseline is None else _like_images("baseline", baseline, images)
    return _walk(fn, start, images, maps, targets, steps, score, chunk_size)


def confidence(
    fn: Fn, images: jax.Array, maps: jax.Array, targets: jax.Array, *, baseline: Any = 0.0
) -> Confidence:
    """Probability of the class of each image, and of the image multiplied by its map.

    Args:
        fn: as for `deletion`; called twice, with n images.
        images: float [n, h, w, c].
        maps: [n, h, w], any sign; the positive part over its maximum is the weight of a pixel. A
            map without any positive value leaves the baseline alone.
        targets: class ids int [n].
        baseline: what a pixel of weight 0 becomes, as for `deletion`.

    Returns:
        Both probabilities. The mean of `drop` over images is the average drop (the smaller the
        better), that of `increase` the increase in confidence (the larger the better). `masked`,
        and so these, are NaN where the map holds NaN; all are for a class id out of range.

    Raises:
        ValueError: as `deletion`.

    Source: Chattopadhay et al. 2018 (Grad-CAM++, arXiv 1710.11063).
    """
    check_request(images, maps, targets, "probability")
    weights = ops_maps.normalize(ops_maps.positive(maps), "max").astype(images.dtype)[..., None]
    kept = weights * images + (1 - weights) * _like_images("baseline", baseline, images)
    full, masked = (class_score(fn(seen), targets, "probability") for seen in (images, kept))
    return Confidence(full, jnp.where(has_nan(maps), jnp.nan, masked))


def blur(images: jax.Array, *, size: int = 11, sigma: float = 5.0) -> jax.Array:
    """Blurred images, from which insertion begins.

    Args:
        images: float [n, h, w, c].
        size: of the kernel in pixels, odd.
        sigma: of the Gaussian in pixels, above 0.

    Returns:
        [n, h, w, c]. The kernel is the Gaussian folded back at its borders, as the authors make it
        (a point in a size x size image, filtered): for 11 and 5 nearly a uniform one. Beyond the
        border lie zeros.

    Raises:
        ValueError: an even size, a sigma that is not above 0.

    Source: the authors' code of Petsiuk et al. 2018 (arXiv 1806.07421).
    """
    if size != int(size) or size < 1 or size % 2 == 0:
        raise ValueError(f"size of the blur is {size}; expected an odd number of pixels")
    if not 0 < sigma < np.inf:
        raise ValueError(f"sigma of the blur is {sigma}; expected a length above 0 in pixels")
    from scipy import ndimage  # 0.3 seconds

    half = size // 2
    point = np.zeros(size)
    point[half] = 1
    around = ((0, 0), (half, half), (half, half), (0, 0))
    return smooth(jnp.pad(images, around), ndimage.gaussian_filter1d(point, sigma))


def ranks(maps: jax.Array) -> jax.Array:
    """The place of each pixel in the order of a map, 0 for the largest value.

    Args:
        maps: [n, h, w], any sign.

    Returns:
        int32 [n, h, w], a permutation of 0 to h w - 1 for each map. Equal values rank in row-major
        order; NaN ranks last.
    """
    n, h, w = maps.shape
    order = jnp.argsort(-maps.reshape(n, h * w), axis=1, stable=True)
    return jnp.argsort(order, axis=1).astype(jnp.int32).reshape(n, h, w)


def class_score(logits: jax.Array, targets: jax.Array, score: str) -> jax.Array:
    """The score of a class.

    Args:
        logits: [n, k].
        targets: class ids int [n].
        score: "probability", "logit" or "correct", as for `deletion`.

    Returns:
        [n], at least float32; NaN for a class id out of range, and where a logit is NaN.

    Raises:
        ValueError: logits of another shape, unknown score.
    """
    if score not in SCORES:
        raise unknown_name("score", score, SCORES)
    if jnp.ndim(logits) != 2 or len(logits) != len(targets):
        raise ValueError(
            f"the function returned {jnp.shape(logits)} for {len(targets)} images; expected logits "
            "[n, k], for a fully convolutional one take their mean over h and w first"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    is_own = jnp.arange(logits.shape[1]) == targets[:, None]  # [n, k]
    if score == "correct":
        values = (logits.argmax(axis=1) == targets).astype(logits.dtype)
    else:
        values = jax.nn.softmax(logits) if score == "probability" else logits
        values = jnp.where(is_own, values, 0).sum(axis=1)
    unknown = ~is_own.any(axis=1) | jnp.isnan(logits).any(axis=1)
    return jnp.where(unknown, jnp.nan, values)


def has_nan(maps: jax.Array) -> jax.Array:
    """Whether a map [n, h, w] holds NaN: bool [n]."""
    return jnp.isnan(maps).any(axis=(1, 2))


def check_request(images: Any, maps: Any, targets: Any, score: str) -> None:
    """Raise a ValueError unless images, maps and class ids fit, and the score is known."""
    shape, dtype = jnp.shape(images), jnp.result_type(images)
    if len(shape) != 4 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"images are {dtype} {list(shape)}; expected float [n, h, w, c], normalised as the "
            "function takes them"
        )
    if jnp.shape(maps) != shape[:3]:
        raise ValueError(
            f"maps have shape {jnp.shape(maps)} for images {shape}; expected {shape[:3]}, resize "
            "the maps to the images with ops.maps.resize"
        )
    if jnp.shape(targets) != shape[:1] or not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(
            f"targets are {jnp.result_type(targets)} {list(jnp.shape(targets))}; expected class "
            f"ids int [{shape[0]}]"
        )
    if score not in SCORES:
        raise unknown_name("score", score, SCORES)


def _like_images(name: str, value: Any, images: jax.Array) -> jax.Array:
    if jnp.shape(value) not in ((), images.shape[3:], images.shape):
        raise ValueError(
            f"{name} has the shape {list(jnp.shape(value))}; expected one number, one for each of "
            f"the {images.shape[3]} channels, or images {list(images.shape)}"
        )
    return jnp.broadcast_to(jnp.asarray(value, images.dtype), images.shape)


def _walk(
    fn: Fn,
    before: jax.Array,
    after: jax.Array,
    maps: jax.Array,
    targets: jax.Array,
    steps: int,
    score: str,
    chunk_size: int | None,
) -> Curve:
    """Scores from `before` to `after`, the pixels changed in the order of the maps."""
    n, h, w, _ = before.shape
    if steps != int(steps) or not 1 <= steps <= h * w:
        raise ValueError(f"steps is {steps}; expected a whole number from 1 to {h * w}, the pixels")
    if chunk_size is not None and (chunk_size != int(chunk_size) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size}; expected a whole number from 1 on, or None")
    counts = np.round(np.linspace(0, h * w, steps + 1)).astype(np.int32)  # [s]
    at_once = (
        len(counts) if chunk_size is None else min(len(counts), max(1, chunk_size // max(1, n)))
    )
    surplus = -len(counts) % at_once
    chunks = np.append(counts, np.repeat(counts[-1:], surplus)).reshape(-1, at_once)
    places = ranks(maps)

    # Images outermost: where they are spread over devices, each device changes its own.
    def scores_of(counts: jax.Array) -> jax.Array:  # [p] -> [n, p]
        is_changed = places[:, None] < counts[:, None, None]  # [n, p, h, w]
        seen = jnp.where(is_changed[..., None], after[:, None], before[:, None])
        logits = fn(seen.reshape(n * at_once, *before.shape[1:]))
        return class_score(logits, jnp.repeat(targets, at_once), score).reshape(n, at_once)

    scores = jnp.moveaxis(jax.lax.map(scores_of, chunks), 0, 1)  # [n, chunks, p]
    scores = scores.reshape(n, -1)[:, : len(counts)]
    scores = jnp.where(has_nan(maps)[:, None], jnp.nan, scores)
    return Curve(jnp.asarray(counts / (h * w), jnp.float32), scores)

"""AutoAugment for a whole batch at once, on the device, inside jit.

Cubuk et al. 2019, "AutoAugment: Learning Augmentation Strategies from Data", section 3 and
appendix A. A policy is a table of sub-policies; a sub-policy is two operations in order, each with
a probability and a magnitude index. Every image draws its own sub-policy, its own two coins and its
own two signs.

Branching on an operation under vmap would run all fourteen on every image. Instead each of the two
slots does three things to every image, at most one of which is not the identity:
1. an affine warp by the image's own inverse matrix, nearest neighbour (ShearX/Y, TranslateX/Y,
   Rotate), in 16.16 fixed point, the arithmetic PIL uses;
2. a lookup table per image and channel (Brightness, Posterize, Solarize, Invert, AutoContrast,
   Equalize);
3. a blend with a degenerate image (Color: grey; Contrast: mean grey; Sharpness: smoothed).
All that depends on the policy and the image size alone is computed once, in NumPy, at trace time.

Conventions are those of torchvision's `AutoAugment` on PIL images. Ten levels, index m in 0..9:
| operation | magnitude at index m | sign |
|---|---|---|
| ShearX, ShearY | 0.3 m/9, origin at the corner | random |
| TranslateX, TranslateY | int(150/331 * side * m/9) pixels | random |
| Rotate | 30 m/9 degrees about the centre | random |
| Brightness, Color, Contrast, Sharpness | factor 1 +- 0.9 m/9 | random |
| Posterize | keep 8 - round(4 m/9) bits | |
| Solarize | invert from 255 - 255 m/9 on | |
| AutoContrast, Equalize, Invert | none | |

Results equal PIL's bit for bit, except AutoContrast, which divides exactly in integers where PIL's
double precision may fall just below a whole number and truncate to one grey level less.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.data.policies import POLICIES, Op, Policy
from attnzoom_jax.errors import unknown_name

LEVELS = 10
GEOMETRIC_OPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
LOOKUP_OPS = ("Brightness", "Posterize", "Solarize", "Invert", "AutoContrast", "Equalize")
BLEND_OPS = ("Color", "Contrast", "Sharpness")
OPS = GEOMETRIC_OPS + LOOKUP_OPS + BLEND_OPS
SIGNED_OPS = (*GEOMETRIC_OPS, *BLEND_OPS, "Brightness")
OPS_WITHOUT_MAGNITUDE = ("Invert", "AutoContrast", "Equalize")

IDENTITY: Op = ("Identity", 0.0, None)  # of an image whose coin said no; not for policies

POLICY_NAMES = tuple(POLICIES)


class Choice(NamedTuple):
    """What every image of a batch drew: int32 [n], bool [n, 2], bool [n, 2]."""

    sub_policy: jax.Array
    applied: jax.Array
    negative: jax.Array


def auto_augment(
    images: jax.Array,
    key: jax.Array,
    *,
    policy: str | Sequence,
    fill: int | Sequence[int] = 0,
) -> jax.Array:
    """Applies to every image a sub-policy of its own.

    Args:
        images: uint8 [n, h, w, 3], RGB.
        key: PRNG key.
        policy: a name of `POLICY_NAMES`, or sub-policies ((op, probability, magnitude index),
            (op, probability, magnitude index)) with operations of `OPS`, probabilities in [0, 1]
            and indices in 0..9 (None where the operation takes none).
        fill: grey level in 0..255, or one per channel, of pixels drawn from outside the image.

    Returns:
        uint8 [n, h, w, 3].

    Raises:
        ValueError: images that are not uint8 [n, h, w, 3], a policy that does not exist, or a fill
            outside 0..255.

    Source: Cubuk et al. 2019; magnitudes and signs as in torchvision (see the module's table).
    """
    policy = to_policy(policy)
    choice = sample_choice(key, len(images), policy=policy)
    return apply_choice(images, choice, policy=policy, fill=fill)


def sample_choice(key: jax.Array, n: int, *, policy: str | Sequence) -> Choice:
    """Draws for each of n images a sub-policy, and for its two operations whether and which sign.

    Args:
        key: PRNG key.
        n: number of images.
        policy: as for `auto_augment`.

    Returns:
        A Choice: sub_policy int32 [n], applied bool [n, 2], negative bool [n, 2]. A sign matters to
        `SIGNED_OPS` only.

    Raises:
        ValueError: a policy that does not exist.
    """
    policy = to_policy(policy)
    probabilities = np.array([[op[1] for op in pair] for pair in policy], np.float32)  # [s, 2]
    key_policy, key_applied, key_sign = jax.random.split(key, 3)
    sub_policy = jax.random.randint(key_policy, (n,), 0, len(policy))
    applied = jax.random.uniform(key_applied, (n, 2)) < jnp.asarray(probabilities)[sub_policy]
    return Choice(sub_policy, applied, jax.random.bernoulli(key_sign, 0.5, (n, 2)))


def apply_choice(
    images: jax.Array,
    choice: Choice,
    *,
    policy: str | Sequence,
    fill: int | Sequence[int] = 0,
) -> jax.Array:
    """Applies what `sample_choice` drew; deterministic.

    Args:
        images: uint8 [n, h, w, 3], RGB.
        choice: as `sample_choice` returns it, drawn from the same policy.
        policy: as for `auto_augment`.
        fill: as for `auto_augment`.

    Returns:
        uint8 [n, h, w, 3].

    Raises:
        ValueError: images that are not uint8 [n, h, w, 3], a policy that does not exist, or a fill
            outside 0..255.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise ValueError(
            f"AutoAugment got images {images.dtype} {list(images.shape)}, expected uint8 "
            "[n, h, w, 3]: augment before normalising, and repeat a grey channel three times"
        )
    levels = tuple(np.ravel(fill).tolist())
    if len(levels) not in (1, 3) or any(level not in range(256) for level in levels):
        raise ValueError(f"fill is {fill}, expected a grey level in 0..255 or one for each channel")
    policy = to_policy(policy)
    identity = 2 * len(policy)
    for slot in (0, 1):
        row = 2 * choice.sub_policy + choice.negative[:, slot]
        row = jnp.where(choice.applied[:, slot], row, identity)
        images = _apply_slot(images, row, tuple(pair[slot] for pair in policy), levels)
    return images


def to_policy(policy: str | Sequence) -> Policy:
    """Looks up a policy's name, or checks a user's own and makes it tuples.

    Args:
        policy: as for `auto_augment`; lists do as well as tuples.

    Returns:
        A tuple of sub-policies, hashable.

    Raises:
        ValueError: an unknown name or operation (naming the nearest), or a malformed sub-policy.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise unknown_name("AutoAugment policy", policy, POLICY_NAMES)
        return POLICIES[policy]
    is_list = isinstance(policy, Sequence) and len(policy) > 0
    if not is_list or any(isinstance(pair, str) or len(pair) != 2 for pair in policy):
        raise ValueError(
            f"AutoAugment policy is {policy!r}, expected one of {', '.join(POLICY_NAMES)} or a "
            "sequence of pairs ((op, probability, index), (op, probability, index))"
        )
    return tuple((_to_op(first), _to_op(second)) for first, second in policy)


def _to_op(op: Sequence) -> Op:
    if isinstance(op, str) or len(op) != 3:
        raise ValueError(f"AutoAugment operation is {op!r}, expected (op, probability, index)")
    name, probability, index = op
    if name not in OPS:
        raise unknown_name("AutoAugment operation", name, OPS)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability of {name} is {probability}, expected a number in [0, 1]")
    if name in OPS_WITHOUT_MAGNITUDE:
        return name, float(probability), None
    if index not in range(LEVELS):
        raise ValueError(f"magnitude index of {name} is {index}, expected one of 0..{LEVELS - 1}")
    return name, float(probability), int(index)


# Tables, in NumPy at trace time. Row 2 s + negative is sub-policy s with that sign; the last row is
# the identity.


def _magnitude(op: Op, negative: bool, size: int) -> float:
    """An operation's signed magnitude: fraction, pixels of a side `size`, degrees, or bits."""
    name, _, index = op
    index, last = index or 0, LEVELS - 1
    if name == "Posterize":
        return 8 - round(4 * index / last)
    if name == "Solarize":
        return 255 * (last - index) / last
    if name in ("TranslateX", "TranslateY"):
        magnitude = float(150 * size * index // (331 * last))
    else:
        ranges = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0}
        magnitude = ranges.get(name, 0.9) * index / last
    return -magnitude if negative else magnitude


def _inverse_matrix(op: Op, negative: bool, height: int, width: int) -> list[int]:
    """From output to input pixels: x' = a x + b y + c, y' = d x + e y + f, in 16.16 fixed point."""
    name = op[0]
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    magnitude = _magnitude(op, negative, width if name.endswith("X") else height)
    if name == "ShearX":
        b = magnitude
    elif name == "ShearY":
        d = magnitude
    elif name == "TranslateX":
        c = -magnitude
    elif name == "TranslateY":
        f = -magnitude
    elif name == "Rotate":  # counter-clockwise for positive angles
        angle = -math.radians(magnitude)
        a, b, d, e = math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
        c = width / 2 - a * width / 2 - b * height / 2
        f = height / 2 - d * width / 2 - e * height / 2
    # A pixel's centre lies half a pixel in, hence the halves in the offsets.
    values = (a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2)
    return [math.floor(value * 65536 + 0.5) for value in values]


def _lookup_table(op: Op, negative: bool) -> np.ndarray:
    """The operation's grey levels where they do not depend on the image; else the identity."""
    levels = np.arange(256)
    magnitude = _magnitude(op, negative, 0)
    if op[0] == "Invert":
        levels = 255 - levels
    elif op[0] == "Posterize":
        levels = levels >> (8 - int(magnitude)) << (8 - int(magnitude))
    elif op[0] == "Solarize":
        levels = np.where(levels < magnitude, levels, 255 - levels)
    elif op[0] == "Brightness":
        levels = np.minimum(np.float32(1 + magnitude) * levels.astype(np.float32), 255)
    return levels.astype(np.uint8)


def _factor(op: Op, negative: bool) -> float:
    """How much of the image remains beside the degenerate one."""
    return 1.0 + _magnitude(op, negative, 0) if op[0] in BLEND_OPS else 1.0


# The device's part.


@functools.partial(jax.jit, static_argnames=("ops", "fill"))  # for those who call it eagerly
def _apply_slot(
    images: jax.Array, row: jax.Array, ops: tuple[Op, ...], fill: tuple[int, ...]
) -> jax.Array:
    """Applies operation `row` [n] of a slot to each image; kinds of no sub-policy are left out."""
    n, height, width, channels = images.shape
    rows = [(op, negative) for op in ops for negative in (False, True)] + [(IDENTITY, False)]
    kind = jnp.array([(*OPS, "Identity").index(op[0]) for op, _ in rows])[row]  # [n]
    names = {op[0] for op in ops}

    def drew(name: str) -> jax.Array:
        return kind == OPS.index(name)

    if names & set(GEOMETRIC_OPS):
        matrix = jnp.array([_inverse_matrix(*entry, height, width) for entry in rows], jnp.int32)
        images = _warp(images, matrix[row], fill)
    if names & set(LOOKUP_OPS):
        table = jnp.array([_lookup_table(*entry) for entry in rows])[row]  # [n, 256]
        table = jnp.broadcast_to(table[:, None], (n, channels, 256))
        for name, function in (("AutoContrast", _autocontrast), ("Equalize", _equalize)):
            if name in names:
                table = jnp.where(drew(name)[:, None, None], function(images), table)
        images = _look_up(images, table)
    if names & set(BLEND_OPS):
        factor = jnp.array([_factor(*entry) for entry in rows], jnp.float32)[row]
        degenerate = images.astype(jnp.int32)
        for name, function in (("Color", _grey), ("Contrast", _mean_grey), ("Sharpness", _smooth)):
            if name in names:
                picked = drew(name)[:, None, None, None]
                degenerate = jnp.where(picked, function(images), degenerate)
        images = _blend(degenerate, images, factor)
    return images


def _warp(images: jax.Array, matrix: jax.Array, fill: tuple[int, ...]) -> jax.Array:
    """Nearest neighbour at the fixed-point positions that matrix [n, 6] sends output pixels to."""
    n, height, width, channels = images.shape
    y, x = jnp.mgrid[:height, :width]
    a, b, c, d, e, f = (matrix[:, i, None, None] for i in range(6))
    source_x = (a * x + b * y + c) >> 16  # [n, h, w]
    source_y = (d * x + e * y + f) >> 16
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = jnp.where(inside, source_y * width + source_x, 0).reshape(n, height * width)
    flat = images.reshape(n, height * width, channels)
    warped = jax.vmap(lambda image, i: image.at[i].get(mode="promise_in_bounds"))(flat, index)
    outside = jnp.broadcast_to(jnp.asarray(fill, jnp.uint8), (channels,))
    return jnp.where(inside[..., None], warped.reshape(images.shape), outside)


def _look_up(images: jax.Array, table: jax.Array) -> jax.Array:
    """Grey levels through table uint8 [n, c, 256]."""
    n, _, _, channels = images.shape
    index = images.astype(jnp.int32) + 256 * jnp.arange(channels)  # into [c * 256]
    table = table.reshape(n, channels * 256)
    return jax.vmap(lambda t, i: t.at[i].get(mode="promise_in_bounds"))(table, index)


def _autocontrast(images: jax.Array) -> jax.Array:
    """Tables [n, c, 256] that stretch each channel's range to 0..255."""
    low = jnp.min(images, axis=(1, 2)).astype(jnp.int32)[..., None]  # [n, c, 1]
    high = jnp.max(images, axis=(1, 2)).astype(jnp.int32)[..., None]
    levels = jnp.arange(256)
    stretched = _divide(jnp.maximum(levels - low, 0) * 255, jnp.maximum(high - low, 1))
    return jnp.where(high > low, jnp.minimum(stretched, 255), levels).astype(jnp.uint8)


def _equalize(images: jax.Array) -> jax.Array:
    """Tables [n, c, 256] that flatten each channel's histogram, PIL's integer version."""
    histogram = _histogram(images)  # [n, c, 256]
    below = jnp.cumsum(histogram, axis=-1) - histogram
    # All pixels but those at the brightest level are spread over 255 steps.
    step = jnp.max(jnp.where(histogram > 0, below, 0), axis=-1, keepdims=True) // 255
    table = jnp.minimum(_divide(step // 2 + below, jnp.maximum(step, 1)), 255)
    return jnp.where(step > 0, table, jnp.arange(256)).astype(jnp.uint8)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """floor(a / b) of non-negative integers, exact while a < 2**20."""
    # XLA runs this once per pixel inside the lookup, where integer division is the slowest part.
    # The half keeps the quotient clear of whole numbers, so that its rounding cannot matter.
    return jnp.floor((a.astype(jnp.float32) + 0.5) / b.astype(jnp.float32)).astype(jnp.int32)


def _histogram(images: jax.Array) -> jax.Array:
    """Pixels per grey level, int32 [n, c, 256]."""
    n, _, _, channels = images.shape
    index = images.astype(jnp.int32) + 256 * jnp.arange(channels)
    zeros = jnp.zeros((n, channels * 256), jnp.int32)
    counts = jax.vmap(lambda z, i: z.at[i].add(1, mode="promise_in_bounds"))(zeros, index)
    return counts.reshape(n, channels, 256)


def _grey(images: jax.Array) -> jax.Array:
    """ITU-R 601 luma, int32 [n, h, w, 1], in PIL's 16-bit fixed point, rounded."""
    weights = jnp.array([19595, 38470, 7471])
    return (jnp.sum(images * weights, axis=-1, keepdims=True) + 32768) >> 16


def _mean_grey(images: jax.Array) -> jax.Array:
    """The image's mean luma, rounded, int32 [n, 1, 1, 1]."""
    count = images.shape[1] * images.shape[2]
    total = jnp.sum(_grey(images), axis=(1, 2), keepdims=True)
    return total // count + (2 * (total % count) >= count)


def _smooth(images: jax.Array) -> jax.Array:
    """3x3 mean with weight 5 at the centre, rounded, uint8; the border stays as it is."""
    pixels = images.astype(jnp.uint16)  # sums reach 13 * 255; four times faster than int32
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * pixels[:, 1:-1, 1:-1]
    mean = jax.lax.div(total + 6, jnp.uint16(13))  # rounds: 13 is odd, so nothing ties
    return images.at[:, 1:-1, 1:-1].set(mean.astype(jnp.uint8))


def _blend(degenerate: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns degenerate + factor (images - degenerate), clipped, truncated; factor [n]."""
    # The product is rounded before the sum, as PIL does, and no compiler may fuse them: the factor
    # is split in two parts of at most 14 bits, so that both partial products are exact.
    high = jnp.round(factor * 2**13) / 2**13
    low = factor - high
    difference = (images.astype(jnp.int32) - degenerate).astype(jnp.float32)
    product = high[:, None, None, None] * difference + low[:, None, None, None] * difference
    return jnp.clip(degenerate.astype(jnp.float32) + product, 0, 255).astype(jnp.uint8)

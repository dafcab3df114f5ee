"""Attention masks: from logits to weights in [0, 1], and monotone transforms of such weights.

A transform emphasises what a mask finds important; M is a weight in [0, 1]:

| name           | T(M)                                        | identity | gradient              |
|----------------|---------------------------------------------|----------|-----------------------|
| identity       | M                                           |          | 1                     |
| power          | M^g, exponent g > 0                         | g = 1    | g M^(g-1)             |
| contrast       | (s(k(M-c)) - s(-kc)) / (s(k(1-c)) - s(-kc)) | k = 0    | k s'(k(M-c)) / (same) |
| soft_threshold | max(M - t, 0) / (1 - t), t in [0, 1)        | t = 0    | 1/(1-t) above t, or 0 |
| hard_threshold | M where M >= t, else 0                      | t = 0    | 1 from t on, or 0     |
| gain           | M (1 + r (M - mean M)), r in [0, 1]         | r = 0    | 1 + r (2M - mean M)   |
| saturation     | 1 where M >= t, else M                      | t = 1    | 0 from t on, or 1     |

with the sigmoid s, slope k and centre c. Values lie in [0, 1], those of gain in [0, 1 + r]. None
ever decreases in M, where the mean of gain, over places and channels, is held constant, in its
gradient too. With its default parameters each is the identity. Where thresholds jump they have the
gradient of the upper side.

The idea of emphasising, on purpose, the features that matter for an attribute is that of Kimura and
Tanaka, "Intentional Attention Mask Transformation for Robust CNN Classification", 2019 (arXiv
1905.02719); the formulas are ours. Saturation is the one of AttZoom (arXiv 2508.03625).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.errors import unknown_name

LEAST_SLOPE = 1e-2  # of contrast; below, its two differences of sigmoids are mostly rounding
LEAST_WEIGHT = 1e-30  # inside of a power


def saturated_sigmoid(
    logits: jax.Array, *, threshold: float, straight_through: bool = False
) -> jax.Array:
    """Sigmoid that jumps to one where it reaches a threshold.

    f(a) = 1 if sigmoid(a) >= threshold, else sigmoid(a). What matters passes untouched, the rest
    fades. Its gradient is sigmoid(a) (1 - sigmoid(a)) below the threshold and 0 from there on.

    Args:
        logits: any shape, any real values.
        threshold: at or below 0 every weight is 1; above 1 this is the plain sigmoid.
        straight_through: the same values with the gradient of the sigmoid everywhere, so that a
            mask of ones can still learn; ours, not the paper's.

    Returns:
        float32 weights shaped like `logits`, in (0, threshold) or exactly 1.

    Source: AttZoom (arXiv 2508.03625), attention module, thresholded sigmoid.
    """
    weights = jax.nn.sigmoid(logits.astype(jnp.float32))
    saturated = saturation(weights, threshold=threshold)
    if straight_through:
        return jax.lax.stop_gradient(saturated) + (weights - jax.lax.stop_gradient(weights))
    return saturated


def identity(mask: jax.Array) -> jax.Array:
    """The mask itself."""
    return mask


def power(mask: jax.Array, *, exponent: Any = 1.0) -> jax.Array:
    """M^g: above 1 the strong weights stand out, below 1 the weak ones are lifted."""
    # The gradient of 0^g is infinite for g < 1, and NaN where it is then multiplied by zero.
    is_zero = mask < LEAST_WEIGHT
    return jnp.where(is_zero, 0.0, jnp.where(is_zero, 1.0, mask) ** exponent)


def contrast(mask: jax.Array, *, slope: Any = 0.0, center: Any = 0.5) -> jax.Array:
    """A sigmoid of the weights around a centre, stretched to [0, 1]."""
    is_flat = jnp.asarray(slope) < LEAST_SLOPE
    steep = jnp.where(is_flat, 1.0, slope)
    low, high = jax.nn.sigmoid(-steep * center), jax.nn.sigmoid(steep * (1 - jnp.asarray(center)))
    curve = (jax.nn.sigmoid(steep * (mask - center)) - low) / (high - low)
    return jnp.where(is_flat, mask, curve)


def soft_threshold(mask: jax.Array, *, threshold: Any = 0.0) -> jax.Array:
    """Nothing below the threshold, and what is above it stretched to [0, 1]."""
    return jnp.where(mask >= threshold, mask - threshold, 0.0) / (1 - jnp.asarray(threshold))


def hard_threshold(mask: jax.Array, *, threshold: Any = 0.0) -> jax.Array:
    """Nothing below the threshold, the weight itself from there on."""
    return jnp.where(mask >= threshold, mask, 0.0)


def gain(mask: jax.Array, *, amount: Any = 0.0) -> jax.Array:
    """More of what is above the mean of an attribute's mask [n, h, w, a, c], less of the rest."""
    mean = jax.lax.stop_gradient(mask.mean(axis=(1, 2, 4), keepdims=True))
    return mask * (1 + amount * (mask - mean))


def saturation(mask: jax.Array, *, threshold: Any = 1.0) -> jax.Array:
    """One from the threshold on, the weight itself below."""
    return jnp.where(mask >= threshold, 1.0, mask)


@dataclasses.dataclass(frozen=True)
class Transform:
    """A transform and what its parameters may be.

    Attributes:
        function: (mask, *, parameters) -> mask; parameters broadcast against it.
        parameters: {name: (value of the identity, lowest, highest)}; an end that is excluded is
            given as the number next to it.
    """

    function: Callable[..., jax.Array]
    parameters: Mapping[str, tuple[float, float, float]]


# Masks are float32, in which the ends must differ from what they exclude.
_ABOVE_0, _BELOW_1 = float(np.finfo(np.float32).tiny), float(np.nextafter(np.float32(1), 0))
_MOST = float(np.finfo(np.float32).max)
TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(identity, {}),
    "power": Transform(power, {"exponent": (1.0, _ABOVE_0, _MOST)}),
    "contrast": Transform(contrast, {"slope": (0.0, 0.0, _MOST), "center": (0.5, 0.0, 1.0)}),
    "soft_threshold": Transform(soft_threshold, {"threshold": (0.0, 0.0, _BELOW_1)}),
    "hard_threshold": Transform(hard_threshold, {"threshold": (0.0, 0.0, 1.0)}),
    "gain": Transform(gain, {"amount": (0.0, 0.0, 1.0)}),
    "saturation": Transform(saturation, {"threshold": (1.0, 0.0, 1.0)}),
}

# One transform for all attributes, or one for each: {"name": one of TRANSFORMS, **parameters}.
Transforms = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def transform_masks(masks: jax.Array, transforms: Transforms) -> jax.Array:
    """Apply a transform to every mask, or to each attribute's its own.

    Args:
        masks: [n, h, w, a, c], in [0, 1].
        transforms: {"name": one of TRANSFORMS, **parameters}, or a of these; a parameter that is
            left out is that of the identity.

    Returns:
        [n, h, w, a, c].

    Raises:
        ValueError: see `check_transforms`.
    """
    check_transforms(transforms, masks.shape[3])
    if isinstance(transforms, Mapping):
        return _apply(masks, transforms["name"], [transforms])
    result = masks
    for name in dict.fromkeys(transform["name"] for transform in transforms):  # one pass for each
        is_own = [transform["name"] == name for transform in transforms]
        own = [t if own else {} for t, own in zip(transforms, is_own, strict=True)]
        result = jnp.where(jnp.array(is_own)[:, None], _apply(masks, name, own), result)
    return result


def check_transforms(transforms: Transforms, count: int | None = None) -> None:
    """Raise a ValueError for transforms that are unknown, out of their range, or not as many.

    Args:
        transforms: as `transform_masks` takes them.
        count: of the masks; None where it is not known yet.

    Raises:
        ValueError: an unknown transform or parameter, one out of its range, or several transforms
            that are not `count`.
    """
    is_one = isinstance(transforms, Mapping)
    if not is_one and count is not None and len(transforms) != count:
        raise ValueError(
            f"{len(transforms)} transforms for {count} masks; expected one for each attribute, or "
            'a single {"name": ...} for all'
        )
    for given in [transforms] if is_one else transforms:
        if not isinstance(given, Mapping) or "name" not in given:
            raise ValueError(
                f"transform is {given!r}; expected its name and parameters, such as "
                '{"name": "power", "exponent": 2.0}'
            )
        if given["name"] not in TRANSFORMS:
            raise unknown_name("transform", given["name"], TRANSFORMS)
        known = TRANSFORMS[given["name"]].parameters
        for parameter, value in given.items():
            if parameter == "name":
                continue
            if parameter not in known:
                raise unknown_name(f"parameter of {given['name']}", parameter, known or ["name"])
            _, low, high = known[parameter]
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"{parameter}={value!r} of {given['name']}: expected a number")
            if not low <= value <= high:
                raise ValueError(
                    f"{parameter}={value} of {given['name']}: expected a number {_range(low, high)}"
                )


def _range(low: float, high: float) -> str:
    at_least = "above 0" if low == _ABOVE_0 else f"of at least {low:g}"
    if high == _MOST:
        return at_least
    return f"{at_least} and {'below 1' if high == _BELOW_1 else f'at most {high:g}'}"


def _apply(masks: jax.Array, name: str, given: Sequence[Mapping[str, Any]]) -> jax.Array:
    """One transform, with the parameters of each attribute [a, 1], or those of all [1, 1]."""
    known = TRANSFORMS[name].parameters
    values = {
        parameter: jnp.array([one.get(parameter, default) for one in given], masks.dtype)[:, None]
        for parameter, (default, _, _) in known.items()
    }
    return TRANSFORMS[name].function(masks, **values)

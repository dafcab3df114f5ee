"""Terms of a training loss that pull attention towards an attribution map of the same pass.

What guides is held constant. It is computed in training mode too, from the value at its tap on, so
that the backbone runs once, where all that follows looks at that tap; what reaches the output past
it (a shortcut around a tap inside of a block) is computed a second time. Methods without a tap look
at the image, and run the whole model again; those that change the image also change, in a norm over
the batch, the statistics.

A gradient in training mode is that of the sum over the batch: through a norm over the batch it
holds what one image does to the others, as in the authors' code. Where linear maps alone follow the
last such norm, only what differs between the classes of a batch is left: if all images have the
same class the gradient is zero, and w uniform.

channel_guidance, for the activations Y of a CamGuidedAttention layer, its attention a over the
channels and the score y of a class before the softmax (Xu et al., MLSP 2021, as coded):

    beta_c = mean_hw dy/dY_c,    w = softmax over channels (beta / temperature),    KL(a || w)

guidance, for a map R and a mask S, both >= 0 and scaled to shares that sum to 1: the distance of S
from R, such as KL(R || S). It carries the idea from channels over to any mask and any map, and is
of no paper.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from attnzoom_jax.attribution.cam import gradients_at_taps
from attnzoom_jax.attribution.methods import create_method, takes
from attnzoom_jax.attribution.taps import INPUT
from attnzoom_jax.attribution.targets import target_score
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops import maps
from attnzoom_jax.training.forward import Forward
from attnzoom_jax.training.terms import Term

TARGETS = ("predicted", "label")
DIRECTIONS = ("attention_to_cam", "cam_to_attention", "symmetric")
PLACES = ("output", "input")
REDUCTIONS = ("sum", "mean")
DISTANCES = ("kl", "mse", "cosine")
LEAST_SHARE = 1e-12  # of a mask, inside of a logarithm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelGuidance(Term):
    """Channel attention of a CamGuidedAttention layer towards the channel weights of Grad-CAM.

    The defaults are those of the authors' code, except for an error in it that `faithful` repeats.

    Attributes:
        layer: path of the layer, as `list_taps` has it, such as `inserted/stage4`.
        temperature: divides the pooled gradients before their softmax. They are small: at 1 that
            softmax is nearly uniform, and so becomes the attention.
        direction: "attention_to_cam" is KL(a || w), "cam_to_attention" KL(w || a), "symmetric" the
            mean of both.
        target: the class that is explained, "predicted" or "label" (under mixup, its weights).
        at: the gradient is taken at the layer's "output" or at its "input".
        reduction: "sum" over the batch, or "mean": the sum is n times as large.
        faithful: also descend on the sum of the largest logits of the batch, with this term's
            weight, as the published script does because it does not clear the gradients of its
            first backward pass. The reported value does not hold it. Only with the other options at
            their defaults.
    """

    layer: str
    temperature: float = 1.0
    direction: str = "attention_to_cam"
    target: str = "predicted"
    at: str = "output"
    reduction: str = "sum"
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        _check_choices(
            direction=(self.direction, DIRECTIONS),
            target=(self.target, TARGETS),
            at=(self.at, PLACES),
            reduction=(self.reduction, REDUCTIONS),
        )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a number above 0")
        plain = ChannelGuidance(layer=self.layer, weight=self.weight) if self.faithful else None
        if plain and dataclasses.replace(self, faithful=False) != plain:
            raise ValueError(
                "faithful=True is the published script: leave temperature, direction, target, at "
                "and reduction at their defaults, or set faithful=False"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """The logits of the attention, and where the gradient is taken."""
        return self._logits, self._features

    @property
    def _logits(self) -> str:
        return f"{self.layer}/channel_attention/fc2"

    @property
    def _features(self) -> str:
        return self.layer if self.at == "output" else f"{self.layer}/input"

    def __call__(self, forward: Forward) -> jax.Array:
        """The divergence of each example, [n]; n times it for the sum."""
        cued, tap = forward.cued(self.target), self._features
        found = gradients_at_taps(forward.fn_from(tap), forward.images, cued, taps=[tap])
        beta = found[tap][1].mean(axis=(1, 2))  # [n, c]
        log_w = jax.nn.log_softmax(beta / self.temperature)
        log_a = jax.nn.log_softmax(forward.taps[self._logits])
        to_cam, to_attention = _divergence(log_a, log_w), _divergence(log_w, log_a)
        values = {
            "attention_to_cam": to_cam,
            "cam_to_attention": to_attention,
            "symmetric": (to_cam + to_attention) / 2,
        }[self.direction]
        if self.faithful:
            largest = target_score(forward.logits, cued)
            values += largest - jax.lax.stop_gradient(largest)
        return values * len(values) if self.reduction == "sum" else values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(Term):
    """A mask towards an attribution map of the same pass.

    The mask is averaged over its channels, the map brought to its grid; both are cut at zero and
    scaled to shares that sum to 1. An example whose map or mask is zero everywhere has the value
    0. The gradient flows into what makes the mask, and nowhere else.

    Attributes:
        mask: tap [n, h, w, c], such as `inserted/stage2/gate`. Its places must be those of the
            map: a map of a patch or of a zoomed view says nothing of a mask of the image.
        method: name of an attribution method, from attribution/methods.py.
        tap: where the map is taken; "" for a method that looks at the image.
        target: the class that is explained, "predicted" or "label" (under mixup, its weights).
        distance: "kl", KL(map || mask); "mse", the mean squared difference of map and mask, both
            scaled to the mean 1, so that it does not depend on the grid; "cosine", 1 - cosine.
        options: of the method.
    """

    mask: str
    method: str = "grad_cam"
    tap: str = ""
    target: str = "predicted"
    distance: str = "kl"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        _check_choices(target=(self.target, TARGETS), distance=(self.distance, DISTANCES))
        create_method(self.method, **self.options)
        if takes(self.method, "tap") != bool(self.tap):
            raise ValueError(
                f"{self.method} explains the image; leave tap away"
                if self.tap
                else f"{self.method} explains a tap; set tap, such as 'backbone/stage3'"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """The mask, and where the map is taken."""
        return (self.mask,) if self.tap in ("", INPUT) else (self.mask, self.tap)

    def __call__(self, forward: Forward) -> jax.Array:
        """The distance of each example, [n]."""
        mask = _spatial(self.mask, forward.taps[self.mask], len(forward.images))
        if self.tap in forward.taps:
            _spatial(self.tap, forward.taps[self.tap], len(forward.images))
        found = create_method(self.method, **self.options)(
            forward.fn_from(self.tap),
            forward.images,
            forward.cued(self.target),
            tap=self.tap,
            key=forward.key,
        )
        guide = maps.resize(maps.positive(found), (mask.shape[1], mask.shape[2]))
        return _distance(maps.positive(mask), guide, self.distance)


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for option, (given, known) in choices.items():
        if given not in known:
            raise unknown_name(option, given, known)


def _divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) [n], of logarithms of distributions [n, c]."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _spatial(tap: str, value: jax.Array, n: int) -> jax.Array:
    """A tap as maps [n, h, w], the mean over its channels; raises where it has no extent."""
    if value.ndim != 4 or len(value) != n or value.shape[1] * value.shape[2] == 1:
        raise ValueError(
            f"guidance: tap {tap!r} has the shape {list(value.shape)}; expected [n, h, w, c] with "
            f"n = {n} and more than one position"
        )
    return value.mean(axis=-1)


def _distance(mask: jax.Array, guide: jax.Array, distance: str) -> jax.Array:
    """Distance of maps [n, h, w] >= 0 from others, as shares of the whole; 0 where one is empty."""
    n, h, w = mask.shape
    (m, no_mask), (g, no_guide) = (_shares(x.reshape(n, h * w)) for x in (mask, guide))  # [n, hw]
    if distance == "kl":
        values = (xlogy(g, g) - g * jnp.log(jnp.maximum(m, LEAST_SHARE))).sum(axis=-1)
    elif distance == "mse":
        values = jnp.square(h * w * (m - g)).mean(axis=-1)
    else:
        squares = (m * m).sum(axis=-1) * (g * g).sum(axis=-1)
        values = 1 - (m * g).sum(axis=-1) * jax.lax.rsqrt(jnp.where(squares == 0, 1, squares))
    return jnp.where(no_mask | no_guide, 0, values)


def _shares(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row divided by its sum, and which rows sum to zero."""
    total = x.sum(axis=-1)
    is_empty = total == 0
    return x / jnp.where(is_empty, 1, total)[:, None], is_empty

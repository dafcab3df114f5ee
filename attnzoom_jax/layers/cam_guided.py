"""CamGuidedAttention: a spatial mask from channel attention that a class map may guide.

Input X [n, h, w, c], one weight per channel and image, one mask per image:

    a = softmax over channels of  W2 ReLU(W1 g + b1) + b2,   g = mean_hw X
    M = sum_c a_c X_c
    S = sigmoid(M),  or the softmax of M over the positions
    Y = X * S

The channels are not weighted by a themselves: a acts through the mask alone. After a ReLU M is not
negative, so that sigmoid(M) lies in [0.5, 1): it fades, and no place to less than half. The softmax
sums to 1 over the positions: Y is then smaller than X by a factor of about h * w, which a norm or a
larger learning rate behind the layer has to make up for.

What makes the attention follow a class map is a term of the training loss, `channel_guidance` in
training/guidance.py: it pulls a towards the channel weights of Grad-CAM. Without that term the
layer learns from the classes alone.

Source: Xu, Chang, Xie, Ma, "Grad-CAM Guided Channel-Spatial Attention Module for Fine-Grained
Visual Classification", MLSP 2021, as in the authors' code; the softmax over the positions is that
of their spatial attention alone. Kernels start as torch starts them, biases at zero.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.channel_spatial import check, excite
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.layers.tap import Tap

SPATIAL = ("sigmoid", "softmax")


class CamGuidedAttention(nn.Module):
    """Weights every place by a mask that attention over the channels makes of the features.

    Parameters: `channel_attention/fc1` and `channel_attention/fc2`, with biases. Taps:
    `<path>/input` X [n, h, w, c], `<path>/channel_attention` a [n, c] with `fc2` below it its
    logits, `<path>/gate` S [n, h, w, 1], and `<path>` Y. Attention and mask are float32.

    Attributes:
        reduction: channels of the input per hidden unit; there is at least one hidden unit.
        spatial: what makes a mask of M, "sigmoid" or "softmax" over the positions; the scale of
            the output differs, see the top of this file.
        dtype: type of the output; None: that of the input.
    """

    reduction: int = 16
    spatial: str = "sigmoid"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Weight the places.

        Args:
            x: features [n, h, w, c].

        Returns:
            [n, h, w, c].

        Raises:
            ValueError: a field out of range, or an input that is not [n, h, w, c].
        """
        check(self, x, "reduction")
        if self.spatial not in SPATIAL:
            raise unknown_name("CamGuidedAttention.spatial", self.spatial, SPATIAL)
        x = Tap(name="input")(x)
        values = x.astype(jnp.float32)
        attention = _ChannelAttention(self.reduction, name="channel_attention")(values)  # [n, c]
        # A product and a sum: a matrix product is rounded to fewer bits on accelerators.
        logits = (values * attention[:, None, None, :]).sum(axis=-1, keepdims=True)  # [n, h, w, 1]
        is_sigmoid = self.spatial == "sigmoid"
        mask = nn.sigmoid(logits) if is_sigmoid else nn.softmax(logits, axis=(1, 2))
        return (x * Gate(name="gate")(mask)).astype(self.dtype or x.dtype)


class _ChannelAttention(nn.Module):
    """A softmax over the channels, from their means."""

    reduction: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.softmax(excite(x.mean(axis=(1, 2)), self.reduction))  # [n, c]

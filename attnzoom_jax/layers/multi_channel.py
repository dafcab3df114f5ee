"""MultiChannelAttention: a mask of its own for every feature, and for every attribute.

From features F [n, h, w, c], for the attributes k = 1 ... a:

    H    = ReLU(norm(conv_3x3 F))                     [n, h, w, hidden], shared
    u_k  = ReLU(U_k H + b)                            [n, h, w, rank], a sub-network for each k
    M_k  = sigmoid(V_k u_k + b')                      [n, h, w, c] in (0, 1)
    G_k  = T(M_k) * F,  or  (1 + T(M_k)) * F          application "product" or "residual"

with an intentional transformation T of the mask, see ops/masks.py; the identity unless it is set.
All U_k are one matrix product and all V_k one batched product, whatever the number of attributes;
what grows with it is the work on the a x c masks themselves.

Coarser masks are for comparison: one for each attribute that all channels share, or a single one
for all attributes.

Source: after Kimura and Tanaka, "Intentional Attention Mask Transformation for Robust CNN
Classification", 2019 (arXiv 1905.02719), and their "Interpretation of Feature Space using
Multi-Channel Attentional Sub-Networks", CVPR Workshops 2019 (arXiv 1904.13078): a mask in feature
space for each feature and for each attribute, transformed to emphasise. Formulas ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.channel_spatial import check, he_normal
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.ops.masks import check_transforms, transform_masks

GRANULARITIES = ("attribute_channel", "attribute", "single")
APPLICATIONS = ("product", "residual")


class MultiChannelAttention(nn.Module):
    """Weights every channel at every place by a mask of its own, once for each attribute.

    Parameters: `conv/kernel` [3, 3, c, hidden], `norm`, `reduce/{kernel,bias}` [hidden, a rank],
    `expand/kernel` [a, rank, c] and `expand/bias` [a, c]; c is 1 with granularity "attribute", and
    a too with "single". The transformed masks are the tap `<path>/gate`, float32 [n, h, w, a, c];
    relevance goes to F, never to the mask.

    Attributes:
        attributes: a, how many sets of masks, at least 1; None: one, without the attributes' axis,
            so that the output is shaped like the input and the layer can be inserted anywhere. It
            is not neutral at first: masks start around 1/2.
        granularity: "attribute_channel"; "attribute", one mask [n, h, w, a, 1] for all channels;
            "single", one [n, h, w, 1, 1] for all attributes too.
        application: "product" or "residual".
        transform: {"name": one of ops.masks.TRANSFORMS, **parameters}, or one for each attribute;
            None: the identity.
        hidden: channels of H; None: c.
        rank: channels of each sub-network.
        dtype: type of the convolution and of the output; None: that of the input. Masks are
            float32.
    """

    attributes: int | None = None
    granularity: str = "attribute_channel"
    application: str = "product"
    transform: Any = None
    hidden: int | None = None
    rank: int = 8
    dtype: Dtype | None = None

    def __post_init__(self):
        for field, known in (("granularity", GRANULARITIES), ("application", APPLICATIONS)):
            if getattr(self, field) not in known:
                raise unknown_name(field, getattr(self, field), known)
        if self.transform is not None:
            check_transforms(self.transform)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Weight the features.

        Args:
            x: features F [n, h, w, c].
            train: normalise with the statistics of this batch, and update the running ones.

        Returns:
            G [n, h, w, a, c]; a is 1 with granularity "single". Without attributes, [n, h, w, c].

        Raises:
            ValueError: a field out of range, or an input that is not [n, h, w, c].
        """
        optional = [f for f in ("attributes", "hidden") if getattr(self, f) is not None]
        check(self, x, "rank", *optional)
        masks = self._masks(x, train)  # [n, h, w, a, c]
        if self.transform is not None:
            masks = transform_masks(masks, self.transform)
        if self.attributes is None:
            masks, signal = masks[..., 0, :], x
        else:
            signal = x[..., None, :]  # [n, h, w, 1, c]
        masked = signal * Gate(name="gate")(masks)
        if self.application == "residual":
            masked = signal + masked
        return masked.astype(self.dtype or x.dtype)

    def _masks(self, x: jax.Array, train: bool) -> jax.Array:
        n, h, w, c = x.shape
        a = 1 if self.granularity == "single" else self.attributes or 1
        channels = c if self.granularity == "attribute_channel" else 1
        hidden = nn.Conv(
            self.hidden or c,
            (3, 3),
            use_bias=False,
            kernel_init=he_normal,
            dtype=self.dtype or x.dtype,
            name="conv",
        )(x)
        hidden = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=jnp.float32,
            name="norm",
        )(hidden)
        reduced = nn.relu(
            nn.Dense(a * self.rank, dtype=jnp.float32, name="reduce")(nn.relu(hidden))
        )
        reduced = reduced.reshape(n, h, w, a, self.rank)
        return nn.sigmoid(_Expand(channels, name="expand")(reduced))


class _Expand(nn.Module):
    """The last layers of all sub-networks, [n, h, w, a, rank] to [n, h, w, a, channels]."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *_, a, rank = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
        kernel = self.param("kernel", init, (a, rank, self.channels))
        bias = self.param("bias", nn.initializers.zeros, (a, self.channels))
        return jnp.einsum("nhwar,arc->nhwac", x, kernel) + bias

"""Gates over channels and places: squeeze-and-excitation, efficient channel attention, CBAM.

Input x [n, h, w, c]; each layer multiplies it by gates in (0, 1) that it computes from x, and
returns the same shape.

    SqueezeExcite   z = mean_hw x,  x' = x sigmoid(W2 ReLU(W1 z + b1) + b2)

    ECA             x' = x sigmoid(conv_k z)    one kernel of k taps slides along the channels of z
                    k = the odd number nearest to (log2 c + 1) / 2, of two the larger

    CBAM            M(z) = W2 ReLU(W1 z + b1) + b2, one M for both
                    x'  = x sigmoid(M(mean_hw x) + M(max_hw x))
                    x'' = x' sigmoid(norm(conv_KxK [max_c x', mean_c x']))

W1 goes from c channels to c / reduction, W2 back. Convolutions are padded with zeros and have no
bias.

A sigmoid is never exactly 1, so none of these layers can leave a network's output unchanged at
step 0 in its published form. `identity_init=True` takes the gate 2 sigmoid(a), with range (0, 2),
and starts at a = 0: the last weights before the gate are zeros (W2; the kernel of ECA; the scale of
CBAM's norm). Every gate is then exactly 1, and nothing is dead, for those weights have a gradient
and the others follow after the first step. Such a layer may amplify as well as fade.

Sources: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018 (arXiv 1709.01507), equations
2-4; Wang et al., "ECA-Net", CVPR 2020 (arXiv 1910.03151), equations 9 and 12 (gamma 2, b 1); Woo,
Park, Lee, Kweon, "CBAM", ECCV 2018 (arXiv 1807.06521), equations 2-3, and the authors' code for the
spatial norm, which the paper does not mention.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer

from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.ops.maximum import first_max

# As torch starts a linear layer: uniform within 1 / sqrt(fan_in). Biases start at zero.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class SqueezeExcite(nn.Module):
    """Weights every channel by a gate that a small network computes from the means of all.

    Parameters: `fc1` and `fc2`, with biases (`se.fc1`, `se.fc2` in timm, there as 1x1
    convolutions). The mask is the tap `<path>/gate`, float32 [n, 1, 1, c].

    Attributes:
        reduction: channels of the input per hidden unit; there is at least one hidden unit.
        identity_init: gates 2 sigmoid(a) that are exactly 1 at first; see the top of this file.
        dtype: type of the output; None: that of the input. Logits and mask are float32 always.
    """

    reduction: int = 16
    identity_init: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Weight the channels.

        Args:
            x: features [n, h, w, c].

        Returns:
            [n, h, w, c].

        Raises:
            ValueError: a field out of range, or an input that is not [n, h, w, c].
        """
        check(self, x, "reduction")
        means = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        logits = excite(means, self.reduction, self.identity_init)
        return _gated(self, x, logits[:, None, None, :])


class ECA(nn.Module):
    """Weights every channel by a gate computed from the means of the few channels next to it.

    Parameters: `conv/kernel` [k, 1, 1] (`conv.weight` of the authors' code and of timm). The mask
    is the tap `<path>/gate`, float32 [n, 1, 1, c].

    Attributes:
        kernel: taps along the channels, an odd number; None: from the number of channels, as the
            paper has it (3 for 64 channels, 5 for 256, 7 for 2048). The ResNets of the authors'
            code have 3 everywhere.
        identity_init: gates 2 sigmoid(a) that are exactly 1 at first; see the top of this file.
        dtype: type of the output; None: that of the input. Logits and mask are float32 always.
    """

    kernel: int | None = None
    identity_init: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Weight the channels.

        Args:
            x: features [n, h, w, c].

        Returns:
            [n, h, w, c].

        Raises:
            ValueError: a field out of range, or an input that is not [n, h, w, c].
        """
        check(self, x, *(() if self.kernel is None else ("kernel",)))
        size = eca_kernel(x.shape[-1]) if self.kernel is None else self.kernel
        means = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        logits = nn.Conv(
            1,
            (size,),
            padding=size // 2,
            use_bias=False,
            kernel_init=_last_init(torch_uniform, self.identity_init),
            dtype=jnp.float32,
            name="conv",
        )(means[:, :, None])  # [n, c, 1]
        return _gated(self, x, logits[:, None, None, :, 0])


def eca_kernel(channels: int) -> int:
    """The odd number nearest to (log2 channels + 1) / 2; of two that are equally near the larger.

    Args:
        channels: at least 1.

    Returns:
        Taps along the channels, odd, at least 1.

    Source: ECA-Net, equation 12 with gamma 2 and b 1; of ties, the authors' code.
    """
    return 2 * math.floor((math.log2(channels) + 1) / 4) + 1


class CBAM(nn.Module):
    """Weights every channel, then every place.

    | path                          | authors' code (torch)          | shape                       |
    |-------------------------------|--------------------------------|-----------------------------|
    | channel/fc1, channel/fc2      | ChannelGate.mlp.1, .mlp.3      | c -> c / reduction -> c     |
    | spatial/conv                  | SpatialGate.spatial.conv       | [K, K, 2, 1], max then mean |
    | spatial/norm                  | SpatialGate.spatial.bn         | one channel                 |

    The masks are the taps `<path>/channel/gate` [n, 1, 1, c] and `<path>/spatial/gate`
    [n, h, w, 1], float32. The scale of the spatial norm starts at 0, as in the authors' code: the
    spatial gate starts at 0.5 everywhere, and differs between places after the first update.

    Attributes:
        reduction: channels of the input per hidden unit; there is at least one hidden unit.
        kernel: taps per axis of the spatial convolution, an odd number.
        identity_init: gates 2 sigmoid(a) that are exactly 1 at first; see the top of this file.
        dtype: type of the output; None: that of the input. Logits and masks are float32 always.
    """

    reduction: int = 16
    kernel: int = 7
    identity_init: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Weight the channels, then the places.

        Args:
            x: features [n, h, w, c].
            train: normalise the spatial logits with the statistics of this batch and update the
                running ones (`mutable=["batch_stats"]`) rather than use the running ones.

        Returns:
            [n, h, w, c].

        Raises:
            ValueError: a field out of range, or an input that is not [n, h, w, c].
        """
        check(self, x, "reduction", "kernel")
        x = _ChannelGate(self.reduction, self.identity_init, self.dtype, name="channel")(x)
        spatial = _SpatialGate(self.kernel, self.identity_init, self.dtype, name="spatial")
        return spatial(x, train=train)


class _ChannelGate(nn.Module):
    reduction: int
    identity_init: bool
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        values = x.astype(jnp.float32)
        pooled = jnp.stack(
            [values.mean((1, 2)), first_max(values, axis=(1, 2))], axis=1
        )  # [n, 2, c]
        logits = excite(pooled, self.reduction, self.identity_init).sum(axis=1)  # [n, c]
        return _gated(self, x, logits[:, None, None, :])


class _SpatialGate(nn.Module):
    kernel: int
    identity_init: bool
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        values = x.astype(jnp.float32)
        pooled = jnp.stack([first_max(values, axis=-1), values.mean(-1)], axis=-1)  # [n, h, w, 2]
        logits = nn.Conv(
            1,
            (self.kernel, self.kernel),
            padding=self.kernel // 2,
            use_bias=False,
            kernel_init=he_normal,
            dtype=jnp.float32,
            name="conv",
        )(pooled)
        # torch counts momentum the other way round: the authors' 0.01 is 0.99 here.
        logits = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.99,
            epsilon=1e-5,
            scale_init=nn.initializers.zeros,
            dtype=jnp.float32,
            name="norm",
        )(logits)
        return _gated(self, x, logits)


def excite(pooled: jax.Array, reduction: int, identity_init: bool = False) -> jax.Array:
    """W2 ReLU(W1 z + b1) + b2, of the calling module's submodules `fc1` and `fc2`.

    Args:
        pooled: z, float32 [..., c].
        reduction: channels per hidden unit; there is at least one hidden unit.
        identity_init: whether W2 starts at zero.

    Returns:
        float32 [..., c].
    """
    c = pooled.shape[-1]
    hidden = nn.Dense(
        max(c // reduction, 1), kernel_init=torch_uniform, dtype=jnp.float32, name="fc1"
    )(pooled)
    last_init = _last_init(torch_uniform, identity_init)
    return nn.Dense(c, kernel_init=last_init, dtype=jnp.float32, name="fc2")(nn.relu(hidden))


def _last_init(published: Initializer, identity_init: bool) -> Initializer:
    return nn.initializers.zeros if identity_init else published


def _gated(
    layer: SqueezeExcite | ECA | _ChannelGate | _SpatialGate, x: jax.Array, logits: jax.Array
):
    """The product of x and its gate, in the layer's dtype; called inside of the layer."""
    mask = jax.nn.sigmoid(logits) * (2 if layer.identity_init else 1)
    return (x * Gate(name="gate")(mask)).astype(layer.dtype or x.dtype)


def check(layer: nn.Module, x: jax.Array, *fields: str) -> None:
    """Raise a ValueError unless x is [n, h, w, c] and these fields of the layer are counts."""
    kind = type(layer).__name__
    if x.ndim != 4:
        raise ValueError(
            f"{kind} takes features [n, h, w, c], got shape {x.shape}: insert it before the "
            "pooling, or add the batch axis."
        )
    for field in fields:
        value = getattr(layer, field)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_count or (field == "kernel" and value % 2 == 0):
            expected = "an odd number" if field == "kernel" else "a whole number of at least 1"
            raise ValueError(
                f"{kind}.{field} is {value!r}, expected {expected}; "
                f"try {type(layer).__dataclass_fields__[field].default}."
            )

"""AttZoom: fade what the attention mask finds unimportant, then zoom the map with a learned kernel.

Input F [n, h, w, c]; W_A is one learned kernel c -> 1, W_E a learned kernel c -> c.

    A    = W_A * F                                      logits [n, h, w, 1], stride 1, zero padding
    f(A) = 1 if sigmoid(A) >= threshold else sigmoid(A) mask
    F_W  = F f(A)                                       the same mask for every channel
    Up   = zero insertion of F_W                        Up[s i, s j] = F_W[i, j], zero elsewhere
    F_E  = W_E * Up                                     [n, s h, s w, c], stride 1, zero padding

There is no skip path, normalisation or activation. The paper gives neither threshold, kernel
sizes, biases, initialisation nor whether W_E is depthwise (its printed shape) or full; they are
fields here, and their defaults are ours.

Source: DeAlcala, Morales, Fierrez, Tolosana, "AttZoom: Attention Zoom for Better Visual Features",
ICCV Workshops 2025 (arXiv 2508.03625), section on the method and Algorithm 1.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.ops.masks import saturated_sigmoid
from attnzoom_jax.ops.zoom import bilinear_kernel, zoom_conv

MASKS = ("saturated", "straight_through", "ones")
ZOOM_CONVS = ("depthwise", "full", "bilinear")
ZOOM_INITS = ("lecun_normal", "bilinear")


class AttentionZoom(nn.Module):
    """Weights a feature map by a thresholded sigmoid mask and enlarges it `factor` times.

    The module's docstring has the equations. Parameters: `attention_conv` (W_A) and `zoom` (W_E),
    each with `kernel` and, on request, `bias`. The mask is the tap `<path>/gate`, float32.

    Where the mask is 1 it sends no gradient to W_A, and a mask of ones everywhere never learns.
    So W_A must not start at zero: sigmoid(0) = 0.5 reaches the default threshold. The default
    start is random, which is fine.

    With factor 2 and a 3x3 kernel the four output phases see 1, 2, 2 and 4 inputs: a random W_E
    starts with a checkerboard. `zoom_init="bilinear"` or a `zoom_kernel` divisible by `factor`
    evens it out.

    Controls, each one field away from the layer: `mask="ones"` zooms without attention (no W_A);
    `factor=1` attends without zoom (W_E stays, at the resolution of the input); `zoom_conv=
    "bilinear"` zooms by a fixed bilinear kernel (no W_E), with `mask="ones"` too it is nothing but
    the resolution.

    The layer itself is cheap, but everything after it runs on `factor`^2 times as many pixels:
    time and memory of the rest of the network grow by as much.

    Attributes:
        mask: "saturated", the paper's f(A); "straight_through", its values with the gradient of the
            sigmoid; "ones", no attention.
        threshold: weights that reach it become 1. At or below 0 the mask is all ones, above 1 it
            is the plain sigmoid.
        factor: zoom factor along each axis, at least 1.
        attention_kernel: taps per axis of W_A. An even kernel reaches (K - 1) // 2 pixels back
            and K // 2 ahead.
        zoom_kernel: taps per axis of W_E on the zoomed map, even ones likewise.
        zoom_conv: "depthwise" (K x K x c weights), "full" (K x K x c x c), or "bilinear" (none).
        use_bias: whether both convolutions add a bias.
        zoom_init: start of W_E: "lecun_normal" or "bilinear", which makes the layer a bilinear
            zoom of the masked map at first; that needs zoom_kernel >= 2 * factor - 1.
        dtype: type of the zoom and of the output; None: that of the input. Logits and mask are
            float32 always.
    """

    mask: str = "saturated"
    threshold: float = 0.5
    factor: int = 2
    attention_kernel: int = 3
    zoom_kernel: int = 3
    zoom_conv: str = "depthwise"
    use_bias: bool = False
    zoom_init: str = "lecun_normal"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attend, then zoom.

        Args:
            x: features [n, h, w, c].

        Returns:
            [n, factor * h, factor * w, c].

        Raises:
            ValueError: a field out of range, or an input that is not [n, h, w, c].
        """
        self._check(x)
        dtype = x.dtype if self.dtype is None else self.dtype
        weighted = (x if self.mask == "ones" else x * self._mask(x)).astype(dtype)
        if self.zoom_conv == "bilinear":
            triangle = bilinear_kernel(self.factor, 2 * self.factor - 1)[:, :, None, None]
            kernel = jnp.broadcast_to(triangle, (*triangle.shape[:3], x.shape[-1])).astype(dtype)
            return zoom_conv(weighted, kernel, factor=self.factor)
        return _Zoom(
            factor=self.factor,
            size=self.zoom_kernel,
            depthwise=self.zoom_conv == "depthwise",
            use_bias=self.use_bias,
            kernel_init=self._zoom_init(),
            dtype=dtype,
            name="zoom",
        )(weighted)

    def _mask(self, x: jax.Array) -> jax.Array:
        logits = nn.Conv(
            1,
            (self.attention_kernel, self.attention_kernel),
            padding="SAME",
            use_bias=self.use_bias,
            dtype=jnp.float32,
            name="attention_conv",
        )(x)  # [n, h, w, 1]
        straight_through = self.mask == "straight_through"
        mask = saturated_sigmoid(
            logits, threshold=self.threshold, straight_through=straight_through
        )
        return Gate(name="gate")(mask)

    def _zoom_init(self) -> Initializer:
        if self.zoom_init == "lecun_normal":
            return nn.initializers.lecun_normal()

        def bilinear(key, shape, dtype=jnp.float32):
            del key
            triangle = bilinear_kernel(self.factor, self.zoom_kernel)
            # Depthwise: each channel has its own triangle; full: channel i feeds output i alone.
            channels = jnp.ones(shape[2:]) if shape[2] == 1 else jnp.eye(*shape[2:])
            return (triangle[:, :, None, None] * channels).astype(dtype)

        return bilinear

    def _check(self, x: jax.Array) -> None:
        if x.ndim != 4:
            raise ValueError(
                f"AttentionZoom takes features [n, h, w, c], got shape {x.shape}: insert it before "
                "the pooling, or add the batch axis."
            )
        for field in ("factor", "attention_kernel", "zoom_kernel"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"AttentionZoom.{field} is {value!r}, expected a whole number of at least 1; "
                    f"try {AttentionZoom.__dataclass_fields__[field].default}."
                )
        if not isinstance(self.threshold, int | float) or math.isnan(self.threshold):
            raise ValueError(
                f"AttentionZoom.threshold is {self.threshold!r}, expected a number; try 0.5."
            )
        for field, choices in (
            ("mask", MASKS),
            ("zoom_conv", ZOOM_CONVS),
            ("zoom_init", ZOOM_INITS),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise unknown_name(f"AttentionZoom.{field}", value, choices)


class _Zoom(nn.Module):
    """Parameters of W_E, and the zoom with them."""

    factor: int
    size: int
    depthwise: bool
    use_bias: bool
    kernel_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        shape = (self.size, self.size, 1 if self.depthwise else c, c)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = (
            self.param("bias", nn.initializers.zeros, (c,), jnp.float32) if self.use_bias else None
        )
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return zoom_conv(x, kernel, bias, factor=self.factor)

"""Residual networks for ImageNet-like and for CIFAR-like images.

A block adds what it computes to what it was given and ends in a ReLU (He et al. 2016, equation 1):

    y = ReLU(F(x) + shortcut(x))

    basic        F = conv 3x3 stride s, norm, ReLU; conv 3x3, norm
    bottleneck   F = conv 1x1, norm, ReLU; conv 3x3 stride s, norm, ReLU; conv 1x1, norm
                 (the last with 4 times the channels)

The stride of the bottleneck sits on its 3x3 convolution ("v1.5", as torchvision has it; the paper
puts it on the first 1x1). Where shape changes, shortcut(x) is

    projection   conv 1x1 stride s, norm                               (option B of the paper)
    pad          x[:, ::s, ::s] with zero channels, no parameters      (option A)

Every convolution and pool is padded explicitly and alike on both sides, as in PyTorch: "SAME" would
pad a strided convolution of an even map on one side only, and converted weights would then give
other values.

Sources: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1
(ImageNet) and section 4.2 (CIFAR); Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1
(stride of the bottleneck, last norm of a block initialised to zero).

Names are an interface, for checkpoints and for taps:

    stem/{conv1,norm1,relu1}
    stage1/block1/{conv1,norm1,relu1,conv2,norm2,relu2[,conv3,norm3,relu3][,shortcut_conv,shortcut_norm]}
    head

The last ReLU of a block, of its stage's last block and the stage end at the same value: `stage3`,
`stage3/block6` and `stage3/block6/relu3` are one map of ResNet-50.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.errors import unknown_name

STEMS = ("imagenet", "cifar", "small")
BLOCKS = ("basic", "bottleneck")
SHORTCUTS = ("projection", "pad")
DTYPES = ("float32", "bfloat16", "float16")

BOTTLENECK_EXPANSION = 4

# A plain normal, not a truncated one, as torch's `kaiming_normal_(mode="fan_out")`.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=_he_normal)
# torch counts momentum the other way round: its 0.1 is 0.9 here.
_Norm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class ReLU(nn.Module):
    """ReLU as a module without parameters, so that its output has a path and can be tapped."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns max(x, 0), of the shape and dtype of x."""
        return nn.relu(x)


class Stem(nn.Module):
    """The layers before the first stage; ends after the ReLU, or the pool where there is one.

    Attributes:
        kind: "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2 (maps a
            quarter as high and wide as the image), "small" a 3x3 convolution of stride 2 (half),
            "cifar" a 3x3 convolution of stride 1 (as large as the image).
        channels: channels of the output, at least 1.
        dtype: dtype of the computation.
    """

    kind: str
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [n, h, w, c] to features [n, h', w', channels]."""
        size, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[self.kind]
        conv = _Conv(
            self.channels, (size, size), stride, padding=size // 2, dtype=self.dtype, name="conv1"
        )
        norm = _Norm(use_running_average=not train, dtype=self.dtype, name="norm1")
        x = ReLU(name="relu1")(norm(conv(x)))
        if self.kind == "imagenet":
            # Pads with -inf, as torch does. The annotation in Flax has no room for explicit pads.
            pads: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)
        return x


class Block(nn.Module):
    """One residual block, basic or bottleneck.

    Attributes:
        kind: one of BLOCKS.
        channels: channels of the 3x3 convolutions, at least 1; a bottleneck's output has 4 times as
            many.
        stride: spatial stride of the block, 1 or 2.
        shortcut: one of SHORTCUTS, used only where the block changes the shape.
        zero_init_residual: start the scale of the last norm at 0, so that the block starts as the
            ReLU of its shortcut.
        dtype: dtype of the computation.
    """

    kind: str
    channels: int
    stride: int = 1
    shortcut: str = "projection"
    zero_init_residual: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), c']."""
        norm = functools.partial(_Norm, use_running_average=not train, dtype=self.dtype)
        c, s = self.channels, self.stride
        if self.kind == "basic":
            layers = [(c, 3, s), (c, 3, 1)]  # channels, kernel size, stride
        else:
            layers = [(c, 1, 1), (c, 3, s), (c * BOTTLENECK_EXPANSION, 1, 1)]

        y = x
        for i, (channels, size, stride) in enumerate(layers, start=1):
            y = _Conv(
                channels, (size, size), stride, padding=size // 2, dtype=self.dtype, name=f"conv{i}"
            )(y)
            if i < len(layers):
                y = ReLU(name=f"relu{i}")(norm(name=f"norm{i}")(y))
        init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = norm(scale_init=init, name=f"norm{len(layers)}")(y)

        # Asked of the fields rather than of y: a layer inserted into the block may change the size
        # of y, and must not change which parameters there are.
        c_out = layers[-1][0]
        if s != 1 or x.shape[-1] != c_out:
            if self.shortcut == "projection":
                x = _Conv(c_out, (1, 1), s, padding=0, dtype=self.dtype, name="shortcut_conv")(x)
                x = norm(name="shortcut_norm")(x)
            else:
                x = pad_shortcut(x, channels=c_out, stride=s)
        return ReLU(name=f"relu{len(layers)}")(x + y)


def pad_shortcut(x: jax.Array, *, channels: int, stride: int) -> jax.Array:
    """The shortcut without parameters: every stride-th pixel, with channels of zeros added.

    The paper does not say where the zeros go; they are split evenly, the odd one last, as in the
    PyTorch implementations whose CIFAR weights are in circulation.

    Args:
        x: features [n, h, w, c].
        channels: channels of the result, at least c.
        stride: spatial stride, at least 1.

    Returns:
        [n, ceil(h/stride), ceil(w/stride), channels].

    Source: He et al. 2016, section 3.3, option A.
    """
    extra = channels - x.shape[-1]
    if extra < 0:
        raise ValueError(
            f"a padded shortcut cannot go from {x.shape[-1]} channels down to {channels}; "
            'use shortcut="projection"'
        )
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class Stage(nn.Module):
    """A run of blocks on maps of one size; the first block carries the stride.

    Attributes:
        size: number of blocks, at least 1.
        stride: stride of the first block.
        kind, channels, shortcut, zero_init_residual, dtype: as in Block.
    """

    size: int
    stride: int
    kind: str
    channels: int
    shortcut: str = "projection"
    zero_init_residual: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), c']."""
        for i in range(self.size):
            x = Block(
                kind=self.kind,
                channels=self.channels,
                stride=self.stride if i == 0 else 1,
                shortcut=self.shortcut,
                zero_init_residual=self.zero_init_residual,
                dtype=self.dtype,
                name=f"block{i + 1}",
            )(x, train=train)
        return x


class ResNet(nn.Module):
    """A residual network: stem, stages, global average pool, linear head.

    Parameters and batch statistics are float32. Norms and the pool work in float32, and the head
    computes in float32 whatever `dtype` is.

    | attribute          | meaning                                                  | default      |
    |--------------------|----------------------------------------------------------|--------------|
    | num_classes        | logits per image, at least 1                             |              |
    | stem               | "imagenet", "cifar" or "small", see `Stem`               | "imagenet"   |
    | stage_sizes        | blocks of each stage, each at least 1                    | (2, 2, 2, 2) |
    | block              | "basic" or "bottleneck"                                  | "basic"      |
    | shortcut           | "projection" or "pad", see the top of this file          | "projection" |
    | width              | channels of stem and stage1; doubles at every next stage | 64           |
    | zero_init_residual | the last norm scale of each block starts at 0            | False        |
    | dtype              | compute: "float32", "bfloat16", "float16", or that dtype | float32      |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: He et al. 2016, table 1 and section 4.2.
    """

    num_classes: int
    stem: str = "imagenet"
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    block: str = "basic"
    shortcut: str = "projection"
    width: int = 64
    zero_init_residual: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        _check_choice("stem", self.stem, STEMS)
        _check_choice("block", self.block, BLOCKS)
        _check_choice("shortcut", self.shortcut, SHORTCUTS)
        try:
            dtype_name = jnp.dtype(self.dtype).name
        except TypeError:
            dtype_name = str(self.dtype)
        _check_choice("dtype", dtype_name, DTYPES)
        for field in ("num_classes", "width"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(
                    f"{field}={getattr(self, field)}: expected an integer of at least 1"
                )
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(
                f"stage_sizes={self.stage_sizes}: expected the number of blocks of each stage, "
                "each at least 1, such as (2, 2, 2, 2)"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c].
            train: normalise with the statistics of this batch and update the running ones
                (apply with `mutable=["batch_stats"]`) rather than use the running ones.

        Returns:
            Logits, float32 [n, k].

        Raises:
            ValueError: images are not [n, h, w, c].
        """
        if images.ndim != 4:
            raise ValueError(
                f"images of shape {images.shape}: expected a batch [n, h, w, c]; "
                "add the batch axis of a single image with images[None]"
            )
        x = Stem(self.stem, self.width, self.dtype, name="stem")(images, train=train)
        for i, size in enumerate(self.stage_sizes):
            x = Stage(
                size=size,
                stride=1 if i == 0 else 2,
                kind=self.block,
                channels=self.width * 2**i,
                shortcut=self.shortcut,
                zero_init_residual=self.zero_init_residual,
                dtype=self.dtype,
                name=f"stage{i + 1}",
            )(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)


def _check_choice(field: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise unknown_name(field, value, choices)

"""Residual networks, ResNeXt, and residual networks with attention in every block.

A block adds what it computes to what it was given and ends in a ReLU (He et al. 2016, equation 1):

    y = ReLU(F(x) + shortcut(x))

    basic        F = conv 3x3 stride s, norm, ReLU; conv 3x3, norm
    bottleneck   F = conv 1x1, norm, ReLU; conv 3x3 stride s, norm, ReLU; conv 1x1, norm
                 (the last with 4 times the channels)

The stride of the bottleneck sits on its 3x3 convolution ("v1.5", as torchvision has it; the paper
puts it on the first 1x1). Where shape changes, shortcut(x) is

    projection   conv 1x1 stride s, norm                               (option B of the paper)
    pad          x[:, ::s, ::s] with zero channels, no parameters      (option A)

ResNeXt is the bottleneck with a grouped 3x3 convolution, of `groups` times
int(channels * width_per_group / 64) channels. An attention layer stands at the end of F, before the
sum.

Every convolution and pool is padded explicitly and alike on both sides, as in PyTorch: "SAME" would
pad a strided convolution of an even map on one side only, and converted weights would then give
other values.

Sources: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1
(ImageNet) and section 4.2 (CIFAR); Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1
(stride of the bottleneck, last norm of a block initialised to zero); Xie et al., "Aggregated
Residual Transformations for Deep Neural Networks", CVPR 2017, table 1; Hu et al., "Squeeze-and-
Excitation Networks", CVPR 2018, figure 3, and Woo et al., "CBAM", ECCV 2018, figure 3 (where the
attention stands).

Names are an interface, for checkpoints and for taps. In torchvision, and for attention in timm
(`seresnet50`, `ecaresnet50`, not the legacy ones, which stride elsewhere) or the authors' code:

| path                                        | torch                                            |
|---------------------------------------------|--------------------------------------------------|
| stem/{conv1,norm1}, stem/relu1              | conv1, bn1                                       |
| stage1/block1/{conv1,norm1}, .../relu1      | layer1.0.{conv1,bn1}; likewise 2, and 3 if there |
| stage1/block1/attention                     | layer1.0.se, .eca, .cbam                         |
| stage1/block1/{shortcut_conv,shortcut_norm} | layer1.0.downsample.{0,1}                        |
| head                                        | fc                                               |

The last ReLU of a block, of its stage's last block and the stage end at the same value: `stage3`,
`stage3/block6` and `stage3/block6/relu3` are one map of ResNet-50.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.layers.channel_spatial import CBAM, ECA, SqueezeExcite
from attnzoom_jax.models.blocks import (
    Conv,
    Norm,
    ReLU,
    Stem,
    check_fields,
    check_images,
    check_stages,
)
from attnzoom_jax.models.insert import train_argument

BLOCKS = ("basic", "bottleneck")
SHORTCUTS = ("projection", "pad")
ATTENTIONS = {"squeeze_excite": SqueezeExcite, "eca": ECA, "cbam": CBAM}  # "": none

BOTTLENECK_EXPANSION = 4


class Block(nn.Module):
    """One residual block, basic or bottleneck.

    Attributes:
        kind: one of BLOCKS.
        channels: channels of the basic block's convolutions, at least 1, and a quarter of those of
            a bottleneck's output.
        stride: spatial stride of the block, 1 or 2.
        shortcut: one of SHORTCUTS, used only where the block changes the shape.
        zero_init_residual: start the scale of the last norm at 0, so that the block starts as the
            ReLU of its shortcut.
        groups: groups of the bottleneck's 3x3 convolution.
        width_per_group: its channels in each group, for 64 channels; in proportion for others, at
            least 1.
        attention: one of ATTENTIONS, or "".
        dtype: dtype of the computation.
    """

    kind: str
    channels: int
    stride: int = 1
    shortcut: str = "projection"
    zero_init_residual: bool = False
    groups: int = 1
    width_per_group: int = 64
    attention: str = ""
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), c']."""
        norm = functools.partial(Norm, use_running_average=not train, dtype=self.dtype)
        c, s = self.channels, self.stride
        if self.kind == "basic":
            layers = [(c, 3, s, 1), (c, 3, 1, 1)]  # channels, kernel size, stride, groups
        else:
            inner = max(c * self.width_per_group // 64, 1) * self.groups
            layers = [
                (inner, 1, 1, 1),
                (inner, 3, s, self.groups),
                (c * BOTTLENECK_EXPANSION, 1, 1, 1),
            ]

        y = x
        for i, (channels, size, stride, groups) in enumerate(layers, start=1):
            y = Conv(
                channels,
                (size, size),
                stride,
                padding=size // 2,
                feature_group_count=groups,
                dtype=self.dtype,
                name=f"conv{i}",
            )(y)
            if i < len(layers):
                y = ReLU(name=f"relu{i}")(norm(name=f"norm{i}")(y))
        init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = norm(scale_init=init, name=f"norm{len(layers)}")(y)
        if self.attention:
            attention = ATTENTIONS[self.attention](name="attention")
            y = attention(y, **train_argument(attention, train))

        # Asked of the fields rather than of y: a layer inserted into the block may change the size
        # of y, and must not change which parameters there are.
        c_out = layers[-1][0]
        if s != 1 or x.shape[-1] != c_out:
            if self.shortcut == "projection":
                x = Conv(c_out, (1, 1), s, padding=0, dtype=self.dtype, name="shortcut_conv")(x)
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
        kind, channels, shortcut, zero_init_residual, groups, width_per_group, attention, dtype: as
            in Block.
    """

    size: int
    stride: int
    kind: str
    channels: int
    shortcut: str = "projection"
    zero_init_residual: bool = False
    groups: int = 1
    width_per_group: int = 64
    attention: str = ""
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
                groups=self.groups,
                width_per_group=self.width_per_group,
                attention=self.attention,
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
    | groups             | of the bottleneck's 3x3 convolution, at least 1          | 1            |
    | width_per_group    | its channels per group in stage1 of width 64, at least 1 | 64           |
    | attention          | "squeeze_excite", "eca", "cbam" in every block; "": none | ""           |
    | dtype              | compute: "float32", "bfloat16", "float16", or that dtype | float32      |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: He et al. 2016, table 1 and section 4.2; Xie et al. 2017, table 1.
    """

    num_classes: int
    stem: str = "imagenet"
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    block: str = "basic"
    shortcut: str = "projection"
    width: int = 64
    zero_init_residual: bool = False
    groups: int = 1
    width_per_group: int = 64
    attention: str = ""
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_fields(self, block=BLOCKS, shortcut=SHORTCUTS, attention=("", *ATTENTIONS))
        check_stages(self.stage_sizes, (2, 2, 2, 2))
        for field in ("groups", "width_per_group"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value}: expected an integer of at least 1")
        if self.block == "basic" and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(
                f"groups={self.groups} and width_per_group={self.width_per_group} are for the 3x3 "
                'convolution of bottlenecks; set block="bottleneck", or keep 1 and 64'
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
        check_images(images)
        x = Stem(self.stem, self.width, self.dtype, name="stem")(images, train=train)
        for i, size in enumerate(self.stage_sizes):
            x = Stage(
                size=size,
                stride=1 if i == 0 else 2,
                kind=self.block,
                channels=self.width * 2**i,
                shortcut=self.shortcut,
                zero_init_residual=self.zero_init_residual,
                groups=self.groups,
                width_per_group=self.width_per_group,
                attention=self.attention,
                dtype=self.dtype,
                name=f"stage{i + 1}",
            )(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)

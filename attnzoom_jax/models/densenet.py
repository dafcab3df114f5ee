"""DenseNet-BC: every block adds a few channels to all that came before.

    block       x_l = [x_{l-1}, H(x_{l-1})]
                H = norm, ReLU, conv 1x1 to 4k channels, norm, ReLU, conv 3x3 to k
    transition  norm, ReLU, conv 1x1 to half the channels, average pool 2x2

(equation 2 and section 3 of the paper); k is the growth rate, and the stem gives 2k channels. The
pool of a transition stands before its convolution here: both are linear and the convolution sees
one pixel at a time, so the values are the same for a quarter of the work, and what is averaged is
not negative.

A block returns x_l, all channels so far; `stage1/block3/conv2` are the new ones alone. A transition
opens the stage that follows it, so that stages end on the maps that the blocks share; stage4 ends
after the last norm and ReLU. The other stages end unnormalised, with values of either sign.

| stem       | what comes first (`Stem`)            | maps of stage1..4, parts of the image |
|------------|--------------------------------------|---------------------------------------|
| "imagenet" | conv 7x7, stride 2; max pool 3x3     | 4th, 8th, 16th, 32nd                  |
| "small"    | conv 3x3, stride 2                   | half, 4th, 8th, 16th                  |
| "cifar"    | conv 3x3, stride 1                   | all, half, 4th, 8th                   |

Names, and what they are in torchvision (below `features`, but for the classifier), in its order:

    stem/{conv1,norm1,relu1}                               conv0, norm0
    stage1/block2/{norm1,relu1,conv1,norm2,relu2,conv2}    denseblock1.denselayer2.{norm1,...}
    stage2/transition/{norm1,relu1,conv1}                  transition1.{norm,conv}
    stage4/{norm1,relu1}                                   norm5
    head                                                   classifier

Sources: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR
2017, section 3 and table 1. Convolutions start He-normal by fan-out as in the authors' code.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.models.blocks import (
    Conv,
    Norm,
    ReLU,
    Stem,
    check_fields,
    check_images,
    check_stages,
)

BOTTLENECK_EXPANSION = 4


class Block(nn.Module):
    """One layer of a dense stage.

    Attributes:
        growth: channels that it adds, at least 1.
        dtype: dtype of the computation.
    """

    growth: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h, w, c + growth], the given ones first."""
        norm = functools.partial(Norm, use_running_average=not train, dtype=self.dtype)
        conv = functools.partial(Conv, dtype=self.dtype)
        y = ReLU(name="relu1")(norm(name="norm1")(x))
        y = conv(BOTTLENECK_EXPANSION * self.growth, (1, 1), padding=0, name="conv1")(y)
        y = ReLU(name="relu2")(norm(name="norm2")(y))
        y = conv(self.growth, (3, 3), padding=1, name="conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Half the channels, half the size."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h // 2, w // 2, c // 2]."""
        c = x.shape[-1]
        x = Norm(use_running_average=not train, dtype=self.dtype, name="norm1")(x)
        x = ReLU(name="relu1")(x)
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return Conv(c // 2, (1, 1), padding=0, dtype=self.dtype, name="conv1")(x)


class Stage(nn.Module):
    """A dense stage: blocks on maps of one size.

    Attributes:
        size: number of blocks, at least 1.
        growth: as in Block.
        is_first: whether there is no transition before it.
        is_last: whether a norm and a ReLU end it.
        dtype: dtype of the computation.
    """

    size: int
    growth: int
    is_first: bool = False
    is_last: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h', w', c' + size * growth]."""
        if not self.is_first:
            x = Transition(self.dtype, name="transition")(x, train=train)
        for i in range(1, self.size + 1):
            x = Block(self.growth, self.dtype, name=f"block{i}")(x, train=train)
        if self.is_last:
            x = Norm(use_running_average=not train, dtype=self.dtype, name="norm1")(x)
            x = ReLU(name="relu1")(x)
        return x


class DenseNet(nn.Module):
    """A DenseNet-BC: stem, dense stages, global average pool, linear head.

    Parameters and batch statistics are float32. Norms and the global pool work in float32, and the
    head computes in float32 whatever `dtype` is.

    | attribute   | meaning                                                     | default         |
    |-------------|-------------------------------------------------------------|-----------------|
    | num_classes | logits per image, at least 1                                |                 |
    | stem        | "imagenet", "cifar" or "small", see the top of this file    | "imagenet"      |
    | stage_sizes | blocks of each stage, each at least 1                       | (6, 12, 24, 16) |
    | width       | channels of the stem, twice the growth rate; an even number | 64              |
    | dtype       | compute: "float32", "bfloat16", "float16", or that dtype    | float32         |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: Huang et al. 2017, table 1.
    """

    num_classes: int
    stem: str = "imagenet"
    stage_sizes: tuple[int, ...] = (6, 12, 24, 16)
    width: int = 64
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_fields(self)
        check_stages(self.stage_sizes, (6, 12, 24, 16))
        if self.width % 2:
            raise ValueError(
                f"width={self.width}: expected an even number, twice the growth rate, such as 64"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c], large enough that the transitions leave
                a pixel.
            train: normalise with the statistics of this batch and update the running ones
                (apply with `mutable=["batch_stats"]`) rather than use the running ones.

        Returns:
            Logits, float32 [n, k].

        Raises:
            ValueError: images are not [n, h, w, c], or so small that a pool leaves nothing.
        """
        check_images(images)
        x = Stem(self.stem, self.width, self.dtype, name="stem")(images, train=train)
        for i, size in enumerate(self.stage_sizes, start=1):
            x = Stage(
                size=size,
                growth=self.width // 2,
                is_first=i == 1,
                is_last=i == len(self.stage_sizes),
                dtype=self.dtype,
                name=f"stage{i}",
            )(x, train=train)
        if 0 in x.shape[1:3]:
            raise ValueError(
                f"images of shape {images.shape}: the pools of the transitions leave nothing of "
                'them; give larger ones, or take stem="cifar"'
            )
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)

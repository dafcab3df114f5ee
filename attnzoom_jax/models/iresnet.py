"""Improved residual networks: ResNet's bottlenecks with other norms, ReLUs and shortcuts.

The blocks of a stage differ by where they stand in it. All compute

    F = conv 1x1, norm, ReLU; conv 3x3 stride s, norm, ReLU; conv 1x1      (4 times the channels)

    start        y = norm(F(x)) + projection(x)      with norm, as the projection has one
    middle       y = F(ReLU(norm(x))) + x            no norm before the first ReLU of a stage, whose
                                                     x is the sum of two normalised values
    end          y = ReLU(norm(F(ReLU(norm(x))) + x))

so that nothing but the last ReLU of a stage stands on the way from block to block; that way has
values of either sign. Where a stage halves the map, the projection is

    projection   max pool 3x3 stride s, conv 1x1, norm     (no pool where s = 1)

which looks at every pixel, as ResNet's 1x1 convolution of stride 2 does not. There is no pool in
the stem: stage1 halves the map instead. The parameters are as many as ResNet's.

| stem       | stem                 | stride of stage1 | maps of stage1..4, parts of the image |
|------------|----------------------|------------------|---------------------------------------|
| "imagenet" | conv 7x7, stride 2   | 2                | 4th, 8th, 16th, 32nd                  |
| "small"    | conv 3x3, stride 2   | 1                | half, 4th, 8th, 16th                  |
| "cifar"    | conv 3x3, stride 1   | 1                | all, half, 4th, 8th                   |

Names, and what they are in the authors' code (in its order, where norm0 stands first and the
shortcut last):

    stem/{conv1,norm1,relu1}                                conv1, bn1
    stage1/block1/{conv1,norm1,relu1,...,conv3,norm3}       layer1.0.{conv1,bn1,...,conv3,bn3}
    stage1/block1/{shortcut_conv,shortcut_norm}             layer1.0.downsample.{1,2}, or .{0,1}
                                                            where the projection has no pool
    stage1/block2/{relu0,conv1,...,conv3}                   layer1.1.{conv1,...,conv3}
    stage2/block3/{norm0,relu0,conv1,...,conv3}             layer2.2.{bn0,conv1,...,conv3}
    stage1/block3/{norm0,relu0,conv1,...,norm3,relu3}       layer1.2.{bn0,conv1,...,bn3}
    head                                                    fc

Source: Duta, Liu, Zhu, Shao, "Improved Residual Networks for Image and Video Recognition", ICPR
2020 (arXiv 2004.04989), sections on the flow of information and on the projection shortcut; details
from the authors' code. Its third proposal, the ResGroup block, is another network.
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
    """One bottleneck block.

    Attributes:
        place: "start", "middle" or "end" of its stage.
        channels: channels of the 3x3 convolution, at least 1; the output has 4 times as many.
        stride: spatial stride of a start block.
        norm_first: whether a norm precedes the first ReLU of a middle or end block.
        dtype: dtype of the computation.
    """

    place: str
    channels: int
    stride: int = 1
    norm_first: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), 4 * channels]."""
        norm = functools.partial(Norm, use_running_average=not train, dtype=self.dtype)
        conv = functools.partial(Conv, dtype=self.dtype)
        c, c_out = self.channels, self.channels * BOTTLENECK_EXPANSION
        y = x
        if self.place != "start":
            y = norm(name="norm0")(y) if self.norm_first else y
            y = ReLU(name="relu0")(y)
        y = conv(c, (1, 1), padding=0, name="conv1")(y)
        y = ReLU(name="relu1")(norm(name="norm1")(y))
        y = conv(c, (3, 3), self.stride, padding=1, name="conv2")(y)
        y = ReLU(name="relu2")(norm(name="norm2")(y))
        y = conv(c_out, (1, 1), padding=0, name="conv3")(y)
        if self.place == "start":
            y = norm(name="norm3")(y)
            if self.stride != 1:
                pads: Any = ((1, 1), (1, 1))  # Flax's annotation has no room for explicit pads
                x = nn.max_pool(x, (3, 3), strides=(self.stride, self.stride), padding=pads)
            x = conv(c_out, (1, 1), padding=0, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        y = x + y
        if self.place == "end":
            y = ReLU(name="relu3")(norm(name="norm3")(y))
        return y


class Stage(nn.Module):
    """A start block, middle blocks, an end block.

    Attributes:
        size: number of blocks, at least 2.
        channels, stride, dtype: as in Block.
    """

    size: int
    channels: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), 4 * channels]."""
        for i, place in enumerate(("start", *("middle",) * (self.size - 2), "end")):
            x = Block(
                place=place,
                channels=self.channels,
                stride=self.stride if place == "start" else 1,
                norm_first=i > 1,
                dtype=self.dtype,
                name=f"block{i + 1}",
            )(x, train=train)
        return x


class IResNet(nn.Module):
    """An improved residual network: stem, stages, global average pool, linear head.

    Parameters and batch statistics are float32. Norms and the pool work in float32, and the head
    computes in float32 whatever `dtype` is.

    | attribute   | meaning                                                         | default      |
    |-------------|-----------------------------------------------------------------|--------------|
    | num_classes | logits per image, at least 1                                    |              |
    | stem        | "imagenet", "cifar" or "small", see the top of this file        | "imagenet"   |
    | stage_sizes | blocks of each stage, each at least 2                           | (3, 4, 6, 3) |
    | width       | channels of the stem, and of the 3x3 convolutions of stage1;    | 64           |
    |             | they double at every next stage                                 |              |
    | dtype       | compute: "float32", "bfloat16", "float16", or that dtype        | float32      |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: Duta et al. 2020.
    """

    num_classes: int
    stem: str = "imagenet"
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_fields(self)
        check_stages(self.stage_sizes, (3, 4, 6, 3), least=2, why=" (a start and an end)")
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
        stem = Stem(self.stem, self.width, self.dtype, pool=False, name="stem")
        x = stem(images, train=train)
        for i, size in enumerate(self.stage_sizes):
            x = Stage(
                size=size,
                channels=self.width * 2**i,
                stride=1 if i == 0 and self.stem != "imagenet" else 2,
                dtype=self.dtype,
                name=f"stage{i + 1}",
            )(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)

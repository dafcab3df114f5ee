"""Wide residual networks: few, wide blocks, with norm and ReLU before each convolution.

    a = ReLU(norm(x))
    y = conv 3x3 (dropout(ReLU(norm(conv 3x3 stride s (a))))) + shortcut

The shortcut is x; where the channels change it is a convolution 1x1 of stride s of a, not of x, and
without a norm. A network of depth 6 N + 4 has three stages of N blocks with width * widen channels,
twice and four times as many; a norm and a ReLU close the last stage.

A sum has no ReLU after it: the ends of stage1 and stage2, and of every block, have values of either
sign. stage3 ends after its ReLU.

| stem       | what comes first                            | maps of stage1..3, parts of the image |
|------------|---------------------------------------------|---------------------------------------|
| "imagenet" | conv 7x7, stride 2; max pool 3x3, stride 2  | 4th, 8th, 16th                        |
| "small"    | conv 3x3, stride 2                          | half, 4th, 8th                        |
| "cifar"    | conv 3x3, stride 1 (the paper's)            | all, half, 4th                        |

The first two are ours. No norm follows the stem's convolution: the first block begins with one.

Names, and what they are in the authors' PyTorch code, in its order but for the norms:

    stem/conv1                                                     conv0
    stage1/block1/{norm1,conv1,norm2,conv2,shortcut_conv}          group0.block0.{bn0,conv0,bn1,
                                                                   conv1,convdim}
    stage1/block1/{relu1,relu2,dropout1}                           (no parameters)
    stage3/norm1, stage3/relu1                                     bn
    head                                                           fc

Source: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv 1605.07146), figure 1 d,
table 1 and section 2.4 (dropout; 0.3 in its experiments on CIFAR); initialisation as in the
authors' Lua code, He-normal by fan-out.
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
    check_dropout,
    check_fields,
    check_images,
    check_stages,
)


class Stem(nn.Module):
    """The convolution before the first stage, and a pool where there is one.

    Attributes:
        kind: "imagenet", "cifar" or "small", see the top of this file.
        channels: channels of the output, at least 1.
        dtype: dtype of the computation.
    """

    kind: str
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [n, h, w, c] to features [n, h', w', channels]."""
        size, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[self.kind]
        x = Conv(
            self.channels, (size, size), stride, padding=size // 2, dtype=self.dtype, name="conv1"
        )(x)
        if self.kind == "imagenet":
            pads: Any = ((1, 1), (1, 1))  # Flax's annotation has no room for explicit pads
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)
        return x


class Block(nn.Module):
    """One residual block with norm and ReLU first.

    Attributes:
        channels: channels of both convolutions, at least 1.
        stride: spatial stride of the first convolution; other than 1 only where the channels
            change.
        dropout: fraction of the units between the convolutions that training drops.
        dtype: dtype of the computation.
    """

    channels: int
    stride: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), channels]."""
        norm = functools.partial(Norm, use_running_average=not train, dtype=self.dtype)
        conv = functools.partial(Conv, self.channels, dtype=self.dtype)
        a = ReLU(name="relu1")(norm(name="norm1")(x))
        y = conv((3, 3), self.stride, padding=1, name="conv1")(a)
        y = ReLU(name="relu2")(norm(name="norm2")(y))
        y = nn.Dropout(self.dropout, deterministic=not train, name="dropout1")(y)
        y = conv((3, 3), padding=1, name="conv2")(y)
        if x.shape[-1] != self.channels:
            x = conv((1, 1), self.stride, padding=0, name="shortcut_conv")(a)
        return x + y


class Stage(nn.Module):
    """A run of blocks on maps of one size; the first block carries the stride.

    Attributes:
        size: number of blocks, at least 1.
        channels, stride, dropout, dtype: as in Block, stride of the first.
        is_last: close with a norm and a ReLU.
    """

    size: int
    channels: int
    stride: int = 1
    dropout: float = 0.0
    is_last: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), channels]."""
        for i in range(self.size):
            stride = self.stride if i == 0 else 1
            block = Block(self.channels, stride, self.dropout, self.dtype, name=f"block{i + 1}")
            x = block(x, train=train)
        if self.is_last:
            norm = Norm(use_running_average=not train, dtype=self.dtype, name="norm1")
            x = ReLU(name="relu1")(norm(x))
        return x


class WideResNet(nn.Module):
    """A wide residual network: stem, stages, global average pool, linear head.

    Parameters and batch statistics are float32. Norms and the pool work in float32, and the head
    computes in float32 whatever `dtype` is.

    | attribute   | meaning                                                         | default   |
    |-------------|-----------------------------------------------------------------|-----------|
    | num_classes | logits per image, at least 1                                    |           |
    | stem        | "imagenet", "cifar" or "small", see the top of this file        | "cifar"   |
    | stage_sizes | blocks of each stage, each at least 1; the paper's N, thrice    | (4, 4, 4) |
    | widen       | channels of stage1 per channel of the stem, at least 1; the     | 10        |
    |             | paper's k                                                       |           |
    | width       | channels of the stem; those of a stage double at every next one | 16        |
    | dropout     | fraction dropped between a block's convolutions, in [0, 1]      | 0.0       |
    | dtype       | compute: "float32", "bfloat16", "float16", or that dtype        | float32   |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: Zagoruyko and Komodakis 2016, table 1.
    """

    num_classes: int
    stem: str = "cifar"
    stage_sizes: tuple[int, ...] = (4, 4, 4)
    widen: int = 10
    width: int = 16
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_fields(self)
        check_stages(self.stage_sizes, (4, 4, 4))
        if not isinstance(self.widen, int) or self.widen < 1:
            raise ValueError(f"widen={self.widen}: expected an integer of at least 1, such as 10")
        check_dropout(self.dropout, 0.3)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c].
            train: drop units (the rng "dropout", needed where dropout > 0), and normalise with the
                statistics of this batch and update the running ones (apply with
                `mutable=["batch_stats"]`) rather than use the running ones.

        Returns:
            Logits, float32 [n, k].

        Raises:
            ValueError: images are not [n, h, w, c].
        """
        check_images(images)
        x = Stem(self.stem, self.width, self.dtype, name="stem")(images)
        for i, size in enumerate(self.stage_sizes):
            x = Stage(
                size=size,
                channels=self.width * self.widen * 2**i,
                stride=1 if i == 0 else 2,
                dropout=self.dropout,
                is_last=i == len(self.stage_sizes) - 1,
                dtype=self.dtype,
                name=f"stage{i + 1}",
            )(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)

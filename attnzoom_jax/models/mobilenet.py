"""MobileNets: 3x3 convolutions that see one channel each, and 1x1 convolutions between them.

    separable (v1)          conv 3x3 depthwise stride s, norm, ReLU6; conv 1x1, norm, ReLU6
    inverted residual (v2)  F = conv 1x1 to t times the channels, norm, ReLU6 (none where t = 1);
                                conv 3x3 depthwise stride s, norm, ReLU6; conv 1x1, norm
                            y = F(x), plus x where s = 1 and the channels stay

No activation follows the last norm of an inverted residual, nor the sum: v2's stages end with
values of either sign, but for stage4, which ends after v2's last convolution. The activation is
ReLU6 in both, as in the authors' code and in the weights in circulation; v1's paper says ReLU, as
does `activation="relu"`.

A stage ends where the next block makes the map smaller; the blocks before the first of these, on
maps of the stem's size, belong to stage1. The field `stem` chooses strides, never parameters:

| stem       | stride of the stem, of stage1 | maps of stage1..4, parts of the image |
|------------|-------------------------------|---------------------------------------|
| "imagenet" | 2, 2                          | 4th, 8th, 16th, 32nd                  |
| "small"    | 2, 1                          | half, 4th, 8th, 16th                  |
| "cifar"    | 1, 1                          | all, half, 4th, 8th                   |

A strided convolution of an even map needs one row and column more than there are. torch pads both
sides and ignores the last; TensorFlow pads at the bottom and right alone, so that the same weights
give other values. The field `padding` says for which of the two the weights are; on odd maps, and
where the stride is 1, both are the same.

Channels, in widths w (32), and strides, where not 1:

    stage   v1                  v2: blocks of t, channels
    1       2, 4 (2), 4         1 of 1, w/2; 2 of 6, 3w/4 (2)
    2       8 (2), 8            3 of 6, w (2)
    3       16 (2), 5 of 16     4 of 6, 2w (2); 3 of 6, 3w
    4       32 (2), 32          3 of 6, 5w (2); 1 of 6, 10w; conv 1x1 to 40w, norm, ReLU6

Names of v1, and what they are in timm (`mobilenetv1_100`), in its order:

    stem/{conv1,norm1,relu1}                              conv_stem, bn1
    stage1/block1/{conv1,norm1,relu1,conv2,norm2,relu2}   blocks.0.0.{conv_dw,bn1,conv_pw,bn2}
    stage1/block2, block3                                 blocks.1.0, 1.1
    stage2, stage3, stage4                                blocks.2, 3, 4
    head                                                  classifier

Names of v2, and what they are in torchvision, in its order:

    stem/{conv1,norm1,relu1}                              features.0.{0,1}
    stage1/block1/{conv2,norm2,relu2,conv3,norm3}         features.1.conv.{0.0,0.1,-,1,2}
    stage1/block2/{conv1,norm1,relu1,conv2,norm2,relu2,conv3,norm3}
                                                          features.2.conv.{0.0,0.1,-,1.0,1.1,-,2,3}
    stage2/block1, stage3/block1, stage4/block1           features.4, 7, 14
    stage4/{conv1,norm1,relu1}                            features.18.{0,1}
    head                                                  classifier.1

In every inverted residual conv2 is the depthwise convolution.

Sources: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", 2017 (arXiv 1704.04861), table 1; Sandler, Howard, Zhu, Zhmoginov, Chen,
"MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, tables 1 and 2. Batch norms are
torch's; convolutions start as in timm (v1) and torchvision (v2).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.models.blocks import Conv, Norm, ReLU, check_dropout, check_fields, check_images

PADDINGS: dict[str, Any] = {"torch": 1, "tf": "SAME"}  # of a 3x3 convolution
ACTIVATIONS = ("relu6", "relu")

STRIDES = {"imagenet": (2, 2), "small": (2, 1), "cifar": (1, 1)}  # of the stem, of stage1

# (channels in widths, stride) of every block of a stage.
SEPARABLE_STAGES = (
    ((2, 1), (4, 2), (4, 1)),
    ((8, 2), (8, 1)),
    ((16, 2), *((16, 1),) * 5),
    ((32, 2), (32, 1)),
)
# (expansion t, channels in quarters of the width, stride) of every block of a stage.
INVERTED_STAGES = (
    ((1, 2, 1), (6, 3, 2), (6, 3, 1)),
    ((6, 4, 2), *((6, 4, 1),) * 2),
    ((6, 8, 2), *((6, 8, 1),) * 3, *((6, 12, 1),) * 3),
    ((6, 20, 2), *((6, 20, 1),) * 2, (6, 40, 1)),
)
LAST_CONV = 40  # channels of v2's last convolution, in widths

# The fan-out of one group, which is 3 x 3 for a depthwise kernel: what Flax calls its fan-in.
he_normal_of_group = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class ReLU6(nn.Module):
    """ReLU6 as a module without parameters, so that its output has a path and can be tapped."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns min(max(x, 0), 6), of the shape and dtype of x."""
        return nn.relu6(x)


class Stem(nn.Module):
    """The first convolution, norm and activation.

    Attributes:
        channels: channels of the output, at least 1.
        stride: 1 or 2.
        dtype: dtype of the computation.
        padding: one of PADDINGS.
        activation: one of ACTIVATIONS.
    """

    channels: int
    stride: int
    dtype: Any = jnp.float32
    padding: str = "torch"
    activation: str = "relu6"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [n, h, w, c] to features [n, ceil(h/stride), ceil(w/stride), channels]."""
        padding = PADDINGS[self.padding]
        x = Conv(
            self.channels, (3, 3), self.stride, padding=padding, dtype=self.dtype, name="conv1"
        )(x)
        x = Norm(use_running_average=not train, dtype=self.dtype, name="norm1")(x)
        return _activation(self.activation, "relu1")(x)


class SeparableBlock(nn.Module):
    """A depthwise separable convolution, the block of v1.

    Attributes:
        channels: channels of the output, at least 1.
        stride: of its 3x3 convolution, 1 or 2.
        dtype: dtype of the computation.
        padding, activation: as in Stem.
    """

    channels: int
    stride: int = 1
    dtype: Any = jnp.float32
    padding: str = "torch"
    activation: str = "relu6"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), channels]."""
        norm = functools.partial(Norm, use_running_average=not train, dtype=self.dtype)
        c = x.shape[-1]
        x = Conv(
            c,
            (3, 3),
            self.stride,
            padding=PADDINGS[self.padding],
            feature_group_count=c,
            kernel_init=he_normal_of_group,
            dtype=self.dtype,
            name="conv1",
        )(x)
        x = _activation(self.activation, "relu1")(norm(name="norm1")(x))
        x = Conv(self.channels, (1, 1), padding=0, dtype=self.dtype, name="conv2")(x)
        return _activation(self.activation, "relu2")(norm(name="norm2")(x))


class InvertedResidual(nn.Module):
    """The block of v2: wide inside, narrow outside, and linear where it is narrow.

    Attributes:
        expansion: how many times wider it is inside, at least 1.
        channels: channels of the output, at least 1.
        stride: of its 3x3 convolution, 1 or 2.
        dtype: dtype of the computation.
        padding, activation: as in Stem.
    """

    expansion: int
    channels: int
    stride: int = 1
    dtype: Any = jnp.float32
    padding: str = "torch"
    activation: str = "relu6"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, ceil(h/stride), ceil(w/stride), channels]."""
        norm = functools.partial(Norm, use_running_average=not train, dtype=self.dtype)
        conv = functools.partial(Conv, dtype=self.dtype)
        c = self.expansion * x.shape[-1]
        y = x
        if self.expansion > 1:
            y = conv(c, (1, 1), padding=0, name="conv1")(y)
            y = _activation(self.activation, "relu1")(norm(name="norm1")(y))
        padding = PADDINGS[self.padding]
        y = conv(c, (3, 3), self.stride, padding=padding, feature_group_count=c, name="conv2")(y)
        y = _activation(self.activation, "relu2")(norm(name="norm2")(y))
        y = conv(self.channels, (1, 1), padding=0, name="conv3")(y)
        y = norm(name="norm3")(y)
        # Asked of the fields rather than of y, whose size a layer inserted above may have changed.
        return x + y if self.stride == 1 and x.shape[-1] == self.channels else y


class SeparableStage(nn.Module):
    """A stage of v1.

    Attributes:
        blocks: (channels, stride) of each.
        dtype: dtype of the computation.
        padding, activation: as in Stem.
    """

    blocks: tuple[tuple[int, int], ...]
    dtype: Any = jnp.float32
    padding: str = "torch"
    activation: str = "relu6"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h', w', c'], c' the channels of its last block."""
        for i, (channels, stride) in enumerate(self.blocks, start=1):
            block = SeparableBlock(
                channels, stride, self.dtype, self.padding, self.activation, name=f"block{i}"
            )
            x = block(x, train=train)
        return x


class InvertedStage(nn.Module):
    """A stage of v2.

    Attributes:
        blocks: (expansion, channels, stride) of each.
        last_channels: channels of the 1x1 convolution, norm and activation after them; 0 for none.
        dtype: dtype of the computation.
        padding, activation: as in Stem.
    """

    blocks: tuple[tuple[int, int, int], ...]
    last_channels: int = 0
    dtype: Any = jnp.float32
    padding: str = "torch"
    activation: str = "relu6"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h', w', c'], c' the channels of what comes last."""
        for i, (expansion, channels, stride) in enumerate(self.blocks, start=1):
            block = InvertedResidual(
                expansion,
                channels,
                stride,
                self.dtype,
                self.padding,
                self.activation,
                name=f"block{i}",
            )
            x = block(x, train=train)
        if self.last_channels:
            x = Conv(self.last_channels, (1, 1), padding=0, dtype=self.dtype, name="conv1")(x)
            x = Norm(use_running_average=not train, dtype=self.dtype, name="norm1")(x)
            x = _activation(self.activation, "relu1")(x)
        return x


class MobileNetV1(nn.Module):
    """MobileNet, first version: stem, four stages, global average pool, linear head.

    Parameters and batch statistics are float32. Norms and the pool work in float32, and the head
    computes in float32 whatever `dtype` is.

    | attribute   | meaning                                                  | default    |
    |-------------|----------------------------------------------------------|------------|
    | num_classes | logits per image, at least 1                             |            |
    | stem        | "imagenet", "cifar" or "small", see the top of this file | "imagenet" |
    | width       | channels of the stem; the paper's multiplier is width/32 | 32         |
    | dropout     | fraction of the pooled features dropped, in [0, 1]       | 0.0        |
    | dtype       | compute: "float32", "bfloat16", "float16", or that dtype | float32    |
    | padding     | "torch" or "tf": where the weights come from, see the    | "torch"    |
    |             | top of this file                                         |            |
    | activation  | "relu6" or "relu"                                        | "relu6"    |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: Howard et al. 2017, table 1.
    """

    num_classes: int
    stem: str = "imagenet"
    width: int = 32
    dropout: float = 0.0
    dtype: Any = jnp.float32
    padding: str = "torch"
    activation: str = "relu6"

    def __post_init__(self):
        check_fields(self, padding=tuple(PADDINGS), activation=ACTIVATIONS)
        check_dropout(self.dropout, 0.2)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c].
            train: drop features (the rng "dropout", needed where dropout > 0), and normalise with
                the statistics of this batch and update the running ones (apply with
                `mutable=["batch_stats"]`).

        Returns:
            Logits, float32 [n, k].

        Raises:
            ValueError: images are not [n, h, w, c].
        """
        check_images(images)
        stem_stride, first_stride = STRIDES[self.stem]
        fields = (self.dtype, self.padding, self.activation)
        x = Stem(self.width, stem_stride, *fields, name="stem")(images, train=train)
        for i, blocks in enumerate(SEPARABLE_STAGES, start=1):
            most = first_stride if i == 1 else 2
            plan = tuple((self.width * c, min(stride, most)) for c, stride in blocks)
            x = SeparableStage(plan, *fields, name=f"stage{i}")(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)


class MobileNetV2(nn.Module):
    """MobileNet, second version: stem, four stages, global average pool, linear head.

    Parameters and batch statistics are float32. Norms and the pool work in float32, and the head
    computes in float32 whatever `dtype` is.

    | attribute   | meaning                                                  | default    |
    |-------------|----------------------------------------------------------|------------|
    | num_classes | logits per image, at least 1                             |            |
    | stem        | "imagenet", "cifar" or "small", see the top of this file | "imagenet" |
    | width       | channels of the stem, a multiple of 4; all others follow | 32         |
    |             | exactly (the authors round narrow ones to multiples of 8)|            |
    | dropout     | fraction of the pooled features dropped, in [0, 1]       | 0.2        |
    | dtype       | compute: "float32", "bfloat16", "float16", or that dtype | float32    |
    | padding     | "torch" or "tf": where the weights come from, see the    | "torch"    |
    |             | top of this file                                         |            |
    | activation  | "relu6" or "relu"                                        | "relu6"    |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: Sandler et al. 2018, table 2; dropout as in torchvision.
    """

    num_classes: int
    stem: str = "imagenet"
    width: int = 32
    dropout: float = 0.2
    dtype: Any = jnp.float32
    padding: str = "torch"
    activation: str = "relu6"

    def __post_init__(self):
        check_fields(self, padding=tuple(PADDINGS), activation=ACTIVATIONS)
        check_dropout(self.dropout, 0.2)
        if self.width % 4:
            raise ValueError(f"width={self.width}: expected a multiple of 4, such as 32")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c].
            train: drop features (the rng "dropout", needed where dropout > 0), and normalise with
                the statistics of this batch and update the running ones (apply with
                `mutable=["batch_stats"]`).

        Returns:
            Logits, float32 [n, k].

        Raises:
            ValueError: images are not [n, h, w, c].
        """
        check_images(images)
        stem_stride, first_stride = STRIDES[self.stem]
        quarter = self.width // 4
        fields = (self.dtype, self.padding, self.activation)
        x = Stem(self.width, stem_stride, *fields, name="stem")(images, train=train)
        for i, blocks in enumerate(INVERTED_STAGES, start=1):
            most = first_stride if i == 1 else 2
            plan = tuple((t, quarter * c, min(stride, most)) for t, c, stride in blocks)
            last = LAST_CONV * self.width if i == len(INVERTED_STAGES) else 0
            x = InvertedStage(plan, last, *fields, name=f"stage{i}")(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            dtype=jnp.float32,
            name="head",
        )(x)


def _activation(kind: str, name: str) -> nn.Module:
    return {"relu6": ReLU6, "relu": ReLU}[kind](name=name)

"""ConvNeXt: a convolutional network with the proportions and the parts of a vision transformer.

A block adds what it computes to what it was given, and no activation follows:

    y = x + s * dense2(GELU(dense1(LayerNorm(conv(x)))))

conv is depthwise, 7x7; dense1 has 4 times the channels; s is one learned factor per channel, small
at first (layer scale). LayerNorm works over the channels of each pixel. From the second stage on
a stage opens with LayerNorm and a 2x2 convolution of stride 2.

| stem       | what comes first              | maps of stage1..4, parts of the image |
|------------|-------------------------------|---------------------------------------|
| "imagenet" | conv 4x4, stride 4, LayerNorm | 4th, 8th, 16th, 32nd                  |
| "small"    | conv 2x2, stride 2, LayerNorm | half, 4th, 8th, 16th                  |
| "cifar"    | conv 3x3, stride 1, LayerNorm | all, half, 4th, 8th                   |

Patches are not padded: rows and columns over are left out, as in torch.

Names, and what they are in torchvision (below `features`), in its order but for layer_scale, which
comes first in a block there:

    stem/{conv1,norm1}                  0.{0,1}
    stage2/downsample/{norm1,conv1}     2.{0,1}, and 4, 6 for the stages 3, 4
    stage1/block2/{conv1,norm1,dense1,gelu1,dense2,layer_scale,drop_path}
                                        1.1.{block.0, block.2, block.3, -, block.5, layer_scale, -},
                                        and 3, 5, 7 for the stages 2, 3, 4
    head_norm, head                     classifier.0, classifier.2

Sources: Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, "A ConvNet for the 2020s", CVPR 2022, section 2
and appendix A; Touvron et al., "Going deeper with Image Transformers", ICCV 2021 (layer scale);
Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016 (drop path).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.models.blocks import check_fields, check_images, check_stages

LAYER_SCALE = 1e-6
MLP_EXPANSION = 4

# The paper's truncated normal is cut off at 100 deviations: a plain one.
narrow_normal = nn.initializers.normal(0.02)
Conv = functools.partial(nn.Conv, kernel_init=narrow_normal)
Dense = functools.partial(nn.Dense, kernel_init=narrow_normal)
# The mean of the squares less the square of the mean would lose digits.
Norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class GELU(nn.Module):
    """GELU as a module without parameters, so that its output has a path and can be tapped."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x Phi(x), exactly rather than by tanh, of the shape and dtype of x."""
        return nn.gelu(x, approximate=False)


class LayerScale(nn.Module):
    """One learned factor per channel; the product is taken in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x [n, h, w, c] times `scale` [c], of the shape and dtype of x."""
        init = nn.initializers.constant(LAYER_SCALE)
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return (x * scale).astype(x.dtype)


class Stem(nn.Module):
    """The convolution that the images meet, and a norm.

    Attributes:
        kind: "imagenet", "small" or "cifar", see the top of this file.
        channels: channels of the output, at least 1.
        dtype: dtype of the computation.
    """

    kind: str
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [n, h, w, c] to features [n, h', w', channels]."""
        size, stride, pad = {"imagenet": (4, 4, 0), "small": (2, 2, 0), "cifar": (3, 1, 1)}[
            self.kind
        ]
        x = Conv(self.channels, (size, size), stride, padding=pad, dtype=self.dtype, name="conv1")(
            x
        )
        return Norm(dtype=self.dtype, name="norm1")(x)


class Downsample(nn.Module):
    """A norm, then patches of 2x2 pixels to one.

    Attributes:
        channels: channels of the output.
        dtype: dtype of the computation.
    """

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h // 2, w // 2, channels]."""
        x = Norm(dtype=self.dtype, name="norm1")(x)
        return Conv(self.channels, (2, 2), 2, padding=0, dtype=self.dtype, name="conv1")(x)


class Block(nn.Module):
    """One block; see the top of this file.

    Attributes:
        drop_path: probability that training leaves the branch out, for each image on its own; what
            stays is divided by 1 - drop_path.
        dtype: dtype of the computation.
    """

    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h, w, c]."""
        c = x.shape[-1]
        y = Conv(c, (7, 7), padding=3, feature_group_count=c, dtype=self.dtype, name="conv1")(x)
        y = Norm(dtype=self.dtype, name="norm1")(y)
        y = GELU(name="gelu1")(Dense(MLP_EXPANSION * c, dtype=self.dtype, name="dense1")(y))
        y = Dense(c, dtype=self.dtype, name="dense2")(y)
        y = LayerScale(name="layer_scale")(y)
        per_image = (1, 2, 3)
        y = nn.Dropout(
            self.drop_path, broadcast_dims=per_image, deterministic=not train, name="drop_path"
        )(y)
        return x + y


class Stage(nn.Module):
    """A run of blocks on maps of one size.

    Attributes:
        channels: of its maps.
        drop_paths: `drop_path` of each block; their number is that of the blocks.
        is_first: whether there is nothing to make smaller before it.
        dtype: dtype of the computation.
    """

    channels: int
    drop_paths: tuple[float, ...]
    is_first: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h', w', channels]."""
        if not self.is_first:
            x = Downsample(self.channels, self.dtype, name="downsample")(x)
        for i, drop_path in enumerate(self.drop_paths, start=1):
            x = Block(drop_path, self.dtype, name=f"block{i}")(x, train=train)
        return x


class ConvNeXt(nn.Module):
    """A ConvNeXt: stem, stages, global average pool, norm, linear head.

    Parameters are float32; there are no batch statistics. Norms and the pool work in float32, and
    the last norm and the head compute in float32 whatever `dtype` is.

    | attribute   | meaning                                                        | default      |
    |-------------|----------------------------------------------------------------|--------------|
    | num_classes | logits per image, at least 1                                   |              |
    | stem        | "imagenet", "cifar" or "small", see the top of this file       | "imagenet"   |
    | stage_sizes | blocks of each stage, each at least 1                          | (3, 3, 9, 3) |
    | width       | channels of stem and stage1; doubles at every next stage       | 96           |
    | drop_path   | probability that training drops the last block's branch, in    | 0.0          |
    |             | [0, 1]; rises in equal steps from 0 at the first               |              |
    | dtype       | compute: "float32", "bfloat16", "float16", or that dtype       | float32      |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: Liu et al. 2022, section 2 and appendix A (the paper trains the tiny one on ImageNet-1K
    with drop_path=0.1).
    """

    num_classes: int
    stem: str = "imagenet"
    stage_sizes: tuple[int, ...] = (3, 3, 9, 3)
    width: int = 96
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_fields(self)
        check_stages(self.stage_sizes, (3, 3, 9, 3))
        if not 0 <= self.drop_path <= 1:
            raise ValueError(
                f"drop_path={self.drop_path}: expected a probability in [0, 1], such as 0.1"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c], large enough that the patches leave a
                pixel.
            train: drop branches (the rng "dropout", needed where drop_path > 0).

        Returns:
            Logits, float32 [n, k].

        Raises:
            ValueError: images are not [n, h, w, c], or smaller than a patch somewhere.
        """
        check_images(images)
        x = Stem(self.stem, self.width, self.dtype, name="stem")(images)
        last = max(sum(self.stage_sizes) - 1, 1)
        done = 0
        for i, size in enumerate(self.stage_sizes):
            x = Stage(
                channels=self.width * 2**i,
                drop_paths=tuple(self.drop_path * j / last for j in range(done, done + size)),
                is_first=i == 0,
                dtype=self.dtype,
                name=f"stage{i + 1}",
            )(x, train=train)
            done += size
        if 0 in x.shape[1:3]:
            raise ValueError(
                f"images of shape {images.shape}: the patches leave nothing of them; give larger "
                'ones, or take stem="cifar"'
            )
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        x = Norm(dtype=jnp.float32, name="head_norm")(x)
        return Dense(self.num_classes, dtype=jnp.float32, name="head")(x)

"""VGG: stages of 3x3 convolutions, each ended by a 2x2 max pool, and a wide classifier.

    stage i    stage_sizes[i - 1] times (conv 3x3 with bias[, batch norm], ReLU), max pool 2x2
    classifier linear 64 w, ReLU, dropout, linear 64 w, ReLU, dropout   (w = width, 4096 at 64)

The channels are w, 2w, 4w, 8w, 8w. The classifier takes a map of 7x7, and any other is averaged to
that size (`adaptive_average_pool`), as torchvision does: images of any size do, and a zoom inside.

With `fully_convolutional` nothing is averaged: the classifier slides over the map, fc1 as a 7x7
convolution of the same parameters, and gives logits [n, h', w', k] of every place, one on images of
224x224, where they are those of the ordinary network (Zhang et al. 2016, arXiv 1608.00507).

There is no stem: stage1 sees the images. What the field `stem` chooses is the end:

| stem            | after stage5, whose map is a 32nd as high and wide as the image      |
|-----------------|----------------------------------------------------------------------|
| "imagenet"      | average to 7x7, classifier, head                                     |
| "cifar" "small" | average to 1x1, head; no classifier (alike: the stages do not change) |

Names, and what they are in torchvision (`features.N` counts convolutions, norms, ReLUs and pools):

    stage1/{conv1[,norm1],relu1,conv2[,norm2],relu2}    features.0 ...
    classifier/{fc1,relu1,dropout1,fc2,relu2,dropout2}  classifier.0 ... classifier.5
    head                                                classifier.6

The parameters come in the same order, and every kernel is the torch weight with its axes moved:
the 7x7 map is flattened channels first, so that this holds for fc1 too. A stage ends after its
pool; the map before the last pool is `stage5/relu3` of VGG-16.

Sources: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
ICLR 2015, table 1 (D: 16 layers, E: 19); batch norm, adaptive pool and initialisation as in
torchvision.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from attnzoom_jax.models.blocks import (
    Conv,
    Norm,
    ReLU,
    check_dropout,
    check_fields,
    check_images,
    check_stages,
)

NORMS = ("none", "batch")

POOLED = 7  # side of the map that the classifier takes
HIDDEN = 64  # units of its layers, in widths

# Of torch's linear layers; their biases start at 0.
narrow_normal = nn.initializers.normal(0.01)


class Stage(nn.Module):
    """Convolutions on maps of one size, then the pool that halves them.

    Attributes:
        size: number of convolutions, at least 1.
        channels: of each.
        norm: one of NORMS, what follows each convolution.
        dtype: dtype of the computation.
    """

    size: int
    channels: int
    norm: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h // 2, w // 2, channels]."""
        for i in range(1, self.size + 1):
            x = Conv(
                self.channels,
                (3, 3),
                padding=1,
                use_bias=True,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            if self.norm == "batch":
                x = Norm(use_running_average=not train, dtype=self.dtype, name=f"norm{i}")(x)
            x = ReLU(name=f"relu{i}")(x)
        return nn.max_pool(x, (2, 2), strides=(2, 2))


class WindowDense(nn.Module):
    """The linear layer of every 7x7 window of a map, as a convolution.

    Its parameters are those that nn.Dense has on such a window, flattened channels first.

    Attributes:
        features: units of the layer.
        dtype: dtype of the computation.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, h, w, c] to [n, h - 6, w - 6, features]."""
        c, shape = x.shape[-1], (x.shape[-1] * POOLED**2, self.features)
        kernel = self.param("kernel", narrow_normal, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = kernel.reshape(c, POOLED, POOLED, self.features).transpose(1, 2, 0, 3)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return y + bias


class Classifier(nn.Module):
    """The two wide layers before the head.

    Attributes:
        hidden: units of each.
        dropout: fraction of the units of each that training drops.
        dtype: dtype of the computation.
        slides: whether it takes maps, of 7x7 or more, and classifies every window of them.
    """

    hidden: int
    dropout: float
    dtype: Any = jnp.float32
    slides: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [n, c] to [n, hidden], or [n, h, w, c] to [n, h - 6, w - 6, hidden]."""
        dense = functools.partial(nn.Dense, kernel_init=narrow_normal)
        for i in (1, 2):
            layer = WindowDense if self.slides and i == 1 else dense
            x = layer(self.hidden, dtype=self.dtype, name=f"fc{i}")(x)
            x = ReLU(name=f"relu{i}")(x)
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return x


class VGG(nn.Module):
    """A VGG: five stages or as many as given, and the end that `stem` chooses.

    Parameters and batch statistics are float32. Norms and the average work in float32, and the head
    computes in float32 whatever `dtype` is.

    | attribute           | meaning                                           | default         |
    |---------------------|---------------------------------------------------|-----------------|
    | num_classes         | logits per image, at least 1                      |                 |
    | stem                | "imagenet", "cifar" or "small", see the top       | "imagenet"      |
    | stage_sizes         | convolutions of each stage, each at least 1       | (2, 2, 3, 3, 3) |
    | norm                | "none" or "batch", after each convolution         | "none"          |
    | width               | channels of stage1; doubles up to 8 times as many | 64              |
    | dropout             | fraction dropped in the classifier, in [0, 1]     | 0.5             |
    | dtype               | compute: "float32", "bfloat16" or "float16"       | float32         |
    | fully_convolutional | the "imagenet" end at every place, see the top    | False           |

    Raises:
        ValueError: a field holds a value outside its row of the table.

    Source: Simonyan and Zisserman 2015, table 1.
    """

    num_classes: int
    stem: str = "imagenet"
    stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
    norm: str = "none"
    width: int = 64
    dropout: float = 0.5
    dtype: Any = jnp.float32
    fully_convolutional: bool = False

    def __post_init__(self):
        check_fields(self, norm=NORMS)
        if self.fully_convolutional and self.stem != "imagenet":
            raise ValueError(
                f"fully_convolutional with stem={self.stem!r}, which has no classifier that could "
                'slide; expected stem="imagenet"'
            )
        check_stages(self.stage_sizes, (2, 2, 3, 3, 3), unit="convolutions")
        check_dropout(self.dropout, 0.5)
        super().__post_init__()

    @property
    def default_tap(self) -> str:
        """Where maps are taken: not in a classifier that slides, whose maps are coarser."""
        return f"stage{len(self.stage_sizes)}" if self.fully_convolutional else ""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c], h and w at least 32 (2 to the power of
                the number of stages), of a fully convolutional network 7 times that.
            train: drop units (the rng "dropout"), and normalise with the statistics of this batch
                and update the running ones (apply with `mutable=["batch_stats"]`).

        Returns:
            Logits, float32 [n, k], or [n, h', w', k] of a fully convolutional network.

        Raises:
            ValueError: images are not [n, h, w, c], or so small that a pool leaves nothing.
        """
        check_images(images)
        x = images
        for i, size in enumerate(self.stage_sizes):
            x = Stage(
                size=size,
                channels=self.width * min(2**i, 8),
                norm=self.norm,
                dtype=self.dtype,
                name=f"stage{i + 1}",
            )(x, train=train)
        least = POOLED if self.fully_convolutional else 1
        if min(x.shape[1:3]) < least:
            left = f"less than {POOLED}x{POOLED}" if self.fully_convolutional else "nothing"
            raise ValueError(
                f"images of shape {images.shape}: {len(self.stage_sizes)} pools leave {left} of "
                "them; expected a height and width of at least "
                f"{least * 2 ** len(self.stage_sizes)}"
            )
        if self.stem == "imagenet":
            if not self.fully_convolutional:
                x = adaptive_average_pool(x, size=POOLED)
                x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # [n, c * 49], as torch has it
            classifier = Classifier(
                hidden=HIDDEN * self.width,
                dropout=self.dropout,
                dtype=self.dtype,
                slides=self.fully_convolutional,
                name="classifier",
            )
            x = classifier(x, train=train)
        else:
            x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # [n, c]
        return nn.Dense(
            self.num_classes, kernel_init=narrow_normal, dtype=jnp.float32, name="head"
        )(x)


def adaptive_average_pool(x: jax.Array, *, size: int) -> jax.Array:
    """Averages a map of any size to size x size.

    Row i of the result is the mean of the rows from floor(i h / size) up to, but not including,
    ceil((i + 1) h / size), and so for the columns: windows overlap where size does not divide h,
    and repeat where h is smaller.

    Args:
        x: features [n, h, w, c], h and w at least 1.
        size: side of the result, at least 1.

    Returns:
        float32 [n, size, size, c].

    Source: torch's AdaptiveAvgPool2d.
    """
    _, h, w, _ = x.shape
    x = x.astype(jnp.float32)
    if (h, w) == (size, size):
        return x
    # The products are means: on a TPU they are not to be rounded to bfloat16.
    precision = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,nhwc->niwc", _window_means(h, size), x, precision=precision)
    return jnp.einsum("jw,niwc->nijc", _window_means(w, size), x, precision=precision)


def _window_means(length: int, size: int) -> jax.Array:
    """The matrix [size, length] that takes the means of the windows along one axis."""
    first = jnp.arange(size) * length // size
    end = -(-(jnp.arange(size) + 1) * length // size)  # rounded up
    place = jnp.arange(length)
    inside = (first[:, None] <= place) & (place < end[:, None])
    return inside / (end - first)[:, None]

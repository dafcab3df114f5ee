"""What the backbones have in common: convolution, norm, activation, stem, and checks of fields.

Every convolution is padded explicitly and alike on both sides, as in PyTorch: "SAME" would pad a
strided convolution of an even map on one side only, and converted weights would then give other
values.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.errors import unknown_name

STEMS = ("imagenet", "cifar", "small")
DTYPES = ("float32", "bfloat16", "float16")

# A plain normal, not a truncated one, as torch's `kaiming_normal_(mode="fan_out")`.
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal)
# torch counts momentum the other way round: its 0.1 is 0.9 here.
Norm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


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
        pool: whether "imagenet" ends with its pool.
    """

    kind: str
    channels: int
    dtype: Any = jnp.float32
    pool: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [n, h, w, c] to features [n, h', w', channels]."""
        size, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[self.kind]
        conv = Conv(
            self.channels, (size, size), stride, padding=size // 2, dtype=self.dtype, name="conv1"
        )
        norm = Norm(use_running_average=not train, dtype=self.dtype, name="norm1")
        x = ReLU(name="relu1")(norm(conv(x)))
        if self.kind == "imagenet" and self.pool:
            # Pads with -inf, as torch does. The annotation in Flax has no room for explicit pads.
            pads: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)
        return x


def check_fields(model: Any, **choices: tuple[str, ...]) -> None:
    """Raise a ValueError for a field of a model that is out of range.

    Args:
        model: a module with the fields num_classes, stem, width, dtype.
        **choices: {field: what it may be}, of its other fields.
    """
    for field, known in ({"stem": STEMS} | choices).items():
        if getattr(model, field) not in known:
            raise unknown_name(field, getattr(model, field), known)
    try:
        dtype_name = jnp.dtype(model.dtype).name
    except TypeError:
        dtype_name = str(model.dtype)
    if dtype_name not in DTYPES:
        raise unknown_name("dtype", dtype_name, DTYPES)
    for field in ("num_classes", "width"):
        value = getattr(model, field)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{field}={value}: expected an integer of at least 1")


def check_stages(
    sizes: tuple[int, ...],
    such_as: tuple[int, ...],
    *,
    unit: str = "blocks",
    least: int = 1,
    why: str = "",
) -> None:
    """Raise a ValueError for stages that are none, or too short.

    Args:
        sizes: the field stage_sizes of a model, what each stage has of its unit.
        such_as: sizes for the message.
        unit: of which a stage is made.
        least: of them in a stage.
        why: so many, for the message.
    """
    if not sizes or min(sizes) < least:
        raise ValueError(
            f"stage_sizes={sizes}: expected the number of {unit} of each stage, each at least "
            f"{least}{why}, such as {such_as}"
        )


def check_dropout(dropout: float, such_as: float) -> None:
    """Raise a ValueError for a share of units that is none; `such_as` is one for the message."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout}: expected a fraction in [0, 1], such as {such_as}")


def check_images(images: jax.Array) -> None:
    """Raise a ValueError unless images are a batch [n, h, w, c]."""
    if images.ndim != 4:
        raise ValueError(
            f"images of shape {images.shape}: expected a batch [n, h, w, c]; "
            "add the batch axis of a single image with images[None]"
        )

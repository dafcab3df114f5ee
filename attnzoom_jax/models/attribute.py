"""Recognition of attributes: a backbone's features, seen through one set of masks per attribute.

    F        = the backbone at a tap                       [n, h, w, c]
    G_k      = MultiChannelAttention(F), of attribute k    [n, h, w, c]
    logit_k  = w_k . mean_hw G_k + b_k

The sigmoid of logit k is the probability of attribute k. With the classes of a single label in
place of the attributes, and their softmax, it is a classifier with masks for each class.

After Kimura and Tanaka 2019 (arXiv 1905.02719); formulas ours, see layers/multi_channel.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.multi_channel import GRANULARITIES, MultiChannelAttention
from attnzoom_jax.models.blocks import check_images
from attnzoom_jax.models.features import run_to_tap
from attnzoom_jax.models.insert import Insert
from attnzoom_jax.ops.masks import check_transforms

MASKS = (*GRANULARITIES, "none")


class AttributeModel(nn.Module):
    """A backbone up to a tap, masks for each attribute, and a linear head for each.

    | tap             | value                                                        |
    |-----------------|--------------------------------------------------------------|
    | backbone/<tap>  | F                                                            |
    | attention/gate  | the transformed masks, float32 [n, h, w, a, c], see `granularity` |
    | attention       | G, [n, h, w, a, c]                                           |
    | heads           | the logits [n, a]                                            |

    Parameters: `backbone`, the tree that it has alone, without what comes after the tap;
    `attention`, see `MultiChannelAttention`; `heads/kernel` [a, c] and `heads/bias` [a].

    Attributes:
        backbone: any linen classifier.
        attributes: a, logits per image.
        tap: the backbone's tap whose value is masked.
        granularity: of the masks: "attribute_channel", "attribute", "single", or "none", where all
            heads see the same means of F: the backbone with one linear layer.
        application: "product" or "residual".
        transform: of the masks, see `MultiChannelAttention`.
        hidden: channels of the convolution that all masks share; None: c.
        rank: channels of each attribute's sub-network.

    Raises:
        ValueError: a field out of range, transforms that are not as many as the masks; from init or
            apply, an unknown tap (the nearest are named), or one whose value is not [n, h, w, c].
    """

    backbone: nn.Module
    attributes: int
    tap: str = "stage4"
    granularity: str = "attribute_channel"
    application: str = "product"
    transform: Any = None
    hidden: int | None = None
    rank: int = 8

    def __post_init__(self):
        if self.granularity not in MASKS:
            raise unknown_name("granularity", self.granularity, MASKS)
        count = self.attributes
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"attributes={count!r}: expected a whole number of at least 1")
        if self.granularity == "none" and self.transform is not None:
            raise ValueError(
                'granularity="none" has no masks to transform; leave transform away, or set '
                "granularity to attribute_channel"
            )
        if self.transform is not None:
            check_transforms(self.transform, 1 if self.granularity == "single" else count)
        super().__post_init__()

    @property
    def default_tap(self) -> str:
        """The features that the masks weight."""
        return f"backbone/{self.tap}"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """The logits of a batch of images.

        Args:
            images: normalised images, float [n, h, w, c].
            train: passed on to the backbone and the masks.

        Returns:
            float32 [n, a].
        """
        check_images(images)
        features = run_to_tap(self.backbone, self.tap, images, train=train)
        if features.ndim != 4:
            raise ValueError(
                f"AttributeModel: the tap {self.tap!r} has shape {features.shape}; expected "
                "features [n, h, w, c]: take a tap before the pooling, such as the last stage"
            )
        if self.granularity == "none":
            masked = features[..., None, :]
        else:
            masked = MultiChannelAttention(
                self.attributes,
                granularity=self.granularity,
                application=self.application,
                transform=self.transform,
                hidden=self.hidden,
                rank=self.rank,
                name="attention",
            )(features, train=train)
        means = masked.astype(jnp.float32).mean(axis=(1, 2))  # [n, a or 1, c]
        return _Heads(self.attributes, name="heads")(means)


class _Heads(nn.Module):
    """A linear head for each attribute: means [n, a, c], or [n, 1, c] for all, to logits [n, a]."""

    attributes: int

    @nn.compact
    def __call__(self, means: jax.Array) -> jax.Array:
        n, _, c = means.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", 1, 0)
        kernel = self.param("kernel", init, (self.attributes, c))
        bias = self.param("bias", nn.initializers.zeros, (self.attributes,))
        means = jnp.broadcast_to(means, (n, self.attributes, c))
        return jnp.einsum("nac,ac->na", means, kernel) + bias


def attribute_model(backbone: nn.Module, **fields: Any) -> AttributeModel:
    """An `AttributeModel` around a classifier of this package, with as many logits.

    Args:
        backbone: it has `num_classes`.
        **fields: of `AttributeModel`.

    Returns:
        The model.
    """
    classifier: Any = backbone
    return AttributeModel(backbone, classifier.num_classes, **fields)


def with_transform(model: nn.Module, transform: Any) -> nn.Module:
    """A model whose masks are transformed otherwise; its variables stay the same.

    Args:
        model: an `AttributeModel`, or an `Insert` around one.
        transform: as `AttributeModel.transform`.

    Returns:
        The model.

    Raises:
        ValueError: a model without such masks; a transform that is unknown or out of range.
    """
    if isinstance(model, Insert):
        return model.clone(backbone=with_transform(model.backbone, transform))
    if not isinstance(model, AttributeModel) or model.granularity == "none":
        raise ValueError(
            f"{type(model).__name__} has no masks to transform; a model with "
            'config.model.name="multi_channel" has, unless its granularity is "none"'
        )
    return model.clone(transform=transform)

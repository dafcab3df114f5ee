"""Two streams: one classifies the image, one looks at a patch of it again and again.

    global    F   = trunk(image); two 1x1 convolutions with ReLU     [n, h, w, c]
              z_g = W_g mean(F) + b_g
    object    x   = mean(trunk'(patch))                              [n, d]
              m   = RecursiveAttention(x)                            [n, hidden]
              z_p = W_p m + b_p
    output    z_g + lambda z_p                                       raw logits, not probabilities

trunk' is a network of its own or the global one. The authors train with the sum of the two
cross-entropies of z_g and z_p; both are taps.

Source: Shroff, Chen, Wei, Wang, "Focus Longer to See Better: Recursively Refined Attention for
Fine-Grained Image Classification", CVPR Workshops 2020 (arXiv 2005.10979), layers as in the
authors' code: two VGG-19, of which the global one keeps its last pool and the other does not.
Theirs are stored patches, ten per image, of which each access draws one, also when testing; boxes
from the network's own map, random ones and the whole image are ours.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.recursive import AGGREGATIONS, RecursiveAttention
from attnzoom_jax.layers.tap import Tap
from attnzoom_jax.models.blocks import Conv, ReLU, check_images
from attnzoom_jax.models.features import Features
from attnzoom_jax.models.insert import Insert, train_argument
from attnzoom_jax.models.taps import visit_taps
from attnzoom_jax.models.vgg import VGG, narrow_normal
from attnzoom_jax.ops.patches import check_boxes, crop_boxes, percentile_boxes, random_boxes

PATCH_SOURCES = ("boxes", "cam", "random", "whole")
EVAL_PATCHES = ("first", "mean", "random")


class AddOn(nn.Module):
    """Two 1x1 convolutions, each followed by a ReLU.

    Attributes:
        channels: of both.
    """

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features [n, h, w, c] to [n, h, w, channels]."""
        for i in (1, 2):
            conv = Conv(self.channels, (1, 1), use_bias=True, dtype=x.dtype, name=f"conv{i}")
            x = ReLU(name=f"relu{i}")(conv(x))
        return x


class TwoStream(nn.Module):
    """The global and the object stream, and the sum of their logits.

    | tap                            | value                                                     |
    |--------------------------------|-----------------------------------------------------------|
    | global_trunk                   | features of the image [n, h, w, c]                        |
    | add_on/{conv1,relu1,...,relu2} | the two convolutions on them                              |
    | global_head, object_head       | z_g and z_p, [n, k]                                       |
    | boxes                          | where the patches are, float32 [n, 4]                     |
    | patch                          | the patches [n, s, s, 3]                                  |
    | object_trunk                   | features of the patches [n, h', w', d]                    |
    | recursive, recursive/states    | m [n, hidden]; the state of each step [n, t, hidden]      |
    | recursive/gate                 | weights of the steps [n, t, 1] (aggregation "attention")  |
    | step_logits                    | the object head on each state, [n, t, k]                  |

    With eval_patch="mean" and p boxes per image the taps from `boxes` to `step_logits`, but for
    `object_head`, hold n p rows instead of n: the patches of the first image, of the second, ...

    Parameters: `global_trunk`, `object_trunk`, `add_on`, `global_head`, `recursive`, `object_head`;
    a shared trunk is `global_trunk`, and its batch statistics are updated twice in a training step.
    For 200 classes the authors' pair of VGG-19 has 46,134,289.

    Chance comes from the rng stream "patches", else "dropout", else from a fixed key: evaluation
    without rngs is the same every time for the same batches (what is drawn goes by the place in the
    batch, so another batch size draws otherwise), and training needs one of the two.

    Attributes:
        global_trunk: any linen module, images [n, h, w, c] to features [n, h', w', c'].
        object_trunk: likewise, for the patches; None: the global one, with the same parameters.
            As ever in linen, what is one object in both trunks has one set of parameters.
        num_classes: logits per image, k.
        steps: how often the object stream looks.
        hidden: units of its LSTM.
        aggregation: of the steps, see `RecursiveAttention`.
        patch_source: "boxes", given to the call; "cam", around the highest twentieth of the global
            stream's class activation map of the class that it predicts; "random", see
            `ops.patches.random_boxes`; "whole", the image.
        eval_patch: which of several given boxes evaluation takes: "first", "mean" (the mean of
            their logits z_p) or "random" (the authors'). Training draws one.
        patch_size: side s of the resized patches, in pixels.
        add_on: channels of the two convolutions; 0: none.
        object_weight: lambda.

    Raises:
        ValueError: a field out of range.
    """

    global_trunk: nn.Module
    object_trunk: nn.Module | None
    num_classes: int
    steps: int = 10
    hidden: int = 512
    aggregation: str = "attention"
    patch_source: str = "boxes"
    eval_patch: str = "first"
    patch_size: int = 224
    add_on: int = 1024
    object_weight: float = 1.0

    def __post_init__(self):
        for field, known in (
            ("aggregation", AGGREGATIONS),
            ("patch_source", PATCH_SOURCES),
            ("eval_patch", EVAL_PATCHES),
        ):
            if getattr(self, field) not in known:
                raise unknown_name(field, getattr(self, field), known)
        for field, least in (
            *(("num_classes", 1), ("steps", 1), ("hidden", 1), ("patch_size", 1)),
            ("add_on", 0),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field}={value}: expected an integer of at least {least}")
        super().__post_init__()

    @property
    def default_tap(self) -> str:
        """The last features of the whole image: those of the object stream lie in its patch."""
        return "add_on/relu2" if self.add_on else "global_trunk"

    @nn.compact
    def __call__(
        self, images: jax.Array, *, boxes: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c].
            boxes: [n, 4] or [n, p, 4], [y0, x0, y1, x1] half-open in pixels of the images; only
                with patch_source="boxes", which needs them but for `init`.
            train: passed on to the trunks, and draw one of the boxes.

        Returns:
            Logits z_g + lambda z_p, float32 [n, k].

        Raises:
            ValueError: images that are not [n, h, w, c]; boxes that are missing, not asked for, of
                another shape or, where their values are known, not inside of the images; a trunk
                that does not return [n, h, w, c].
        """
        check_images(images)
        trunk = self.global_trunk
        features = _features("global_trunk", trunk, images, train)
        if self.add_on:
            features = AddOn(self.add_on, name="add_on")(features)
        head = _head(self.num_classes, "global_head")
        global_logits = head(_mean(features))
        if self.patch_source == "boxes":
            boxes = self._given_boxes(images, boxes, train)  # [n, p, 4]
        else:
            weights = head.variables["params"]["kernel"].T[global_logits.argmax(axis=-1)]  # [n, c]
            boxes = self._own_boxes(images, boxes, features, weights)
        n, p = boxes.shape[:2]
        size = (self.patch_size, self.patch_size)
        patches = jnp.stack([crop_boxes(images, boxes[:, i], size) for i in range(p)], axis=1)
        Tap(name="boxes")(boxes.reshape(n * p, 4).astype(jnp.float32))
        patches = Tap(name="patch")(patches.reshape(n * p, *patches.shape[2:]))
        if self.object_trunk is not None:
            features = _features("object_trunk", self.object_trunk, patches, train)
        else:
            shared = _features("global_trunk", trunk, patches, train)
            features = Tap(name="object_trunk")(shared)
        fused, states = self._refine(_mean(features))
        head = _head(self.num_classes, "object_head")
        # The head is linear: of the mean it gives the mean of the logits.
        object_logits = head(fused.reshape(n, p, -1).mean(axis=1) if p > 1 else fused)
        weights = head.variables["params"]
        Tap(name="step_logits")(states @ weights["kernel"] + weights["bias"])
        return global_logits + self.object_weight * object_logits

    def _refine(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The recursive attention's result, and the states that it is made of, [n, t, hidden]."""
        recursive = RecursiveAttention(
            self.steps, self.hidden, aggregation=self.aggregation, name="recursive"
        )
        found: dict[str, jax.Array] = {}

        def visit(name: str, value: jax.Array, module: nn.Module) -> jax.Array:
            found[name] = value
            return value

        with visit_taps(visit, recursive.path):
            fused = recursive(x)
        return fused, found["states"]

    def _own_boxes(
        self, images: jax.Array, boxes: jax.Array | None, features: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """One box per image [n, 1, 4]; `weights` [n, c] are those of the predicted class."""
        if boxes is not None:
            raise ValueError(
                f"boxes are given, but patch_source={self.patch_source!r} makes its own; leave "
                'them out, or set patch_source="boxes"'
            )
        n, h, w, _ = images.shape
        if self.patch_source == "random":
            return random_boxes(self._key(), n, (h, w))[:, None]
        if self.patch_source == "whole":
            return _whole(images)
        cam = jnp.einsum("nhwc,nc->nhw", features.astype(jnp.float32), weights)
        return percentile_boxes(jax.lax.stop_gradient(cam), (h, w))[:, None]

    def _given_boxes(self, images: jax.Array, boxes: jax.Array | None, train: bool) -> jax.Array:
        """Those of the boxes given that are to be cut out now, [n, p, 4]."""
        n = len(images)
        if boxes is None and self.is_initializing():
            return _whole(images)
        if boxes is None:
            raise ValueError(
                'patch_source="boxes" needs them: call model(images, boxes=boxes) with boxes '
                '[n, 4] or [n, p, 4], or set patch_source to "cam", "random" or "whole"'
            )
        shape = jnp.shape(boxes)
        if len(shape) not in (2, 3) or shape[0] != n or shape[-1] != 4 or 0 in shape:
            raise ValueError(
                f"boxes of shape {shape}: expected [n, 4] or [n, p, 4], [y0, x0, y1, x1] for each "
                f"of n = {n} images"
            )
        check_boxes(boxes, (images.shape[1], images.shape[2]))  # while their values are known
        boxes = jnp.asarray(boxes).reshape(n, -1, 4)
        if not train and self.eval_patch == "mean":
            return boxes
        if not train and self.eval_patch == "first":
            return boxes[:, :1]
        choice = jax.random.randint(self._key(), (n, 1, 1), 0, boxes.shape[1])
        return jnp.take_along_axis(boxes, choice, axis=1)

    def _key(self) -> jax.Array:
        for stream in ("patches", "dropout"):
            if self.has_rng(stream):
                return self.make_rng(stream)
        return jax.random.key(0)


def two_stream(
    backbone: nn.Module, *, shared: bool = False, tap: str = "", **fields: Any
) -> TwoStream:
    """Two streams around a classifier of this package.

    Args:
        backbone: what the trunks are made of; it has `num_classes` and stages.
        shared: whether one trunk serves both streams.
        tap: where both trunks end; "": after the last stage. The object trunk of a VGG then ends
            before the last pool, unless it is shared.
        **fields: of `TwoStream`.

    Returns:
        The model.
    """
    classifier: Any = backbone
    last = f"stage{len(classifier.stage_sizes)}"
    global_tap, object_tap = tap or last, tap or last
    if isinstance(classifier, VGG) and not tap:
        object_tap = f"{last}/relu{classifier.stage_sizes[-1]}"
    return TwoStream(
        Features(classifier.clone(), global_tap),
        None if shared else Features(classifier.clone(), object_tap),
        classifier.num_classes,
        **fields,
    )


def with_fields(model: nn.Module, **fields: Any) -> nn.Module:
    """A model with other fields of the `TwoStream` that it is, or that its inserts are around.

    Args:
        model: any; one without a `TwoStream` is returned as it is.
        **fields: of `TwoStream`.

    Returns:
        The model; its variables stay the same.
    """
    if isinstance(model, Insert):
        return model.clone(backbone=with_fields(model.backbone, **fields))
    return model.clone(**fields) if isinstance(model, TwoStream) else model


def _features(name: str, trunk: nn.Module, images: jax.Array, train: bool) -> jax.Array:
    features = trunk(images, **train_argument(trunk, train))
    if features.ndim != 4:
        raise ValueError(
            f"{name} returns shape {features.shape}; expected features [n, h, w, c]: end it before "
            "the pooling, as Features(backbone, tap) does"
        )
    return features


def _whole(images: jax.Array) -> jax.Array:
    n, h, w, _ = images.shape
    return jnp.broadcast_to(jnp.asarray([0, 0, h, w]), (n, 1, 4))


def _mean(features: jax.Array) -> jax.Array:
    return features.astype(jnp.float32).mean(axis=(1, 2))  # [n, c]


def _head(num_classes: int, name: str) -> nn.Dense:
    return nn.Dense(num_classes, kernel_init=narrow_normal, dtype=jnp.float32, name=name)

"""Recursive zoom: look, zoom to where one looked, look again; then classify what all looks saw.

    view_1     = the images;  L_0 = 0
    for t = 1 ... T:
        F_t    = the backbone at a tap, of view_t                          [n, h, w, c]
        A_t    = attention logits, a learned 1x1 convolution of F_t, or its channel mean
        L_t    = L_{t-1} + A_t where it lies in the image                  [n, cells, cells]
        view_t+1 = the images at the saliency grid of softmax(L_t / temperature)
    a          = softmax over t of u . mean(F_t)
    logits     = the rest of the backbone, of sum_t a_t F_t

A_t lives in pixels of view_t, whose grid says for each where in the image it is taken from. Cell j
of L has a centre in the image; the inverse of the grid (`warp_points`) says where in view_t that
is, and A_t is read there, bilinear; what view_t does not show takes the value at its border. Every
view is a single resampling of the images themselves, nothing is resampled twice. Logits add up, so
that what all looks agree upon weighs most, and a look without preference keeps the zoom it has.
The inverse counts as given: no gradient runs through the places, only through the values of A_t.

The convolution and u start at zero: the grids are then the identity, all views the images, and the
model is its backbone. With T = 1 it is the backbone whatever they are, bit for bit.

This is ours: a recursion of the saliency sampler (Recasens et al. 2018, arXiv 1809.03355) on the
network's own features, with the fusion of steps of Shroff et al. 2020 (arXiv 2005.10979).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.layers.tap import Tap
from attnzoom_jax.models.blocks import check_images
from attnzoom_jax.models.features import check_outside, run_to_tap
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.models.taps import visit_taps
from attnzoom_jax.ops.warp import Size, saliency_grid, sample, to_saliency
from attnzoom_jax.ops.warp_points import warp_points

ATTENTIONS = ("learned", "activation")


class RecursiveZoom(nn.Module):
    """A backbone that looks `steps` times, each time closer to where it looked.

    | tap                                  | value                                               |
    |--------------------------------------|-----------------------------------------------------|
    | view, view#1, ...                    | what each step sees, [n, h, w, c]                   |
    | backbone/<tap>, backbone/<tap>#1 ... | F_t of each step, then their weighted sum last: T+1 |
    | attention, attention#1, ...          | A_t in pixels of view_t, float32 [n, h', w', 1]     |
    | saliency, saliency#1, ...            | of view_2, view_3, ..., over the image: T - 1 times |
    |                                      | [n, cells, cells, 1] of sum 1                       |
    | step_weights                         | a, float32 [n, t]                                   |

    Saliency and weights are gates too (`saliency/gate`, `step_weights/gate`): relevance goes to the
    views' pixels and to F_t. The grid of a view is `grid_of` its saliency.

    The backbone's taps before `tap` are met T times as well, `backbone/stage1`,
    `backbone/stage1#1`, ...; a layer that is to stand in every look is inserted into the backbone,
    `RecursiveZoom(Insert(backbone, ...))`, one around the whole model stands at one of these calls.

    Parameters: the backbone's own tree under `backbone`, the same as alone; `attention/kernel`
    [1, 1, c, 1] with attention "learned"; `step_weights/score/kernel` [c, 1]. There are no biases:
    both softmaxes do not change with a constant.

    The backbone's parameters are shared by all steps. In training, a norm before the tap updates
    its running statistics once per step, from each view in turn; those after the tap once. Time
    grows with the number of steps, but for what comes after the tap.

    Attributes:
        backbone: any linen classifier, called as `backbone(images)`, with `train=` where it accepts
            it.
        steps: T, at least 1.
        tap: the backbone's tap whose value is attended and fused, [n, h, w, c].
        attention: "learned", or "activation": the mean over the channels, over its largest absolute
            value, without parameters.
        cells: rows and columns of L and of the saliency.
        fwhm: of the saliency grid's kernel, in cells; see `ops.warp.saliency_grid`.
        temperature: of the softmax over the cells, above 0; a lower one zooms more.
        strength: of the warp, in [0, 1].

    Raises:
        ValueError: a field out of range; from init or apply, an unknown tap (the nearest are
            named), one inside a lifted transformation, or one whose value is not [n, h, w, c].
    """

    backbone: nn.Module
    steps: int = 2
    tap: str = "stage4"
    attention: str = "learned"
    cells: int = 31
    fwhm: float = 13.0
    temperature: float = 1.0
    strength: float = 1.0

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise unknown_name("attention", self.attention, ATTENTIONS)
        for field, example in (("steps", 2), ("cells", 31)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"{field}={value}: expected an integer of at least 1, as {example}"
                )
        super().__post_init__()

    @property
    def default_tap(self) -> str:
        """The features of the first look: those of later ones lie in their views."""
        return f"backbone/{self.tap}"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies a batch of images.

        Args:
            images: normalised images, float [n, h, w, c].
            train: passed on to the backbone.

        Returns:
            What the backbone returns.
        """
        check_images(images)
        image_size = (images.shape[1], images.shape[2])
        # Made here, where they are this module's own, for some are called inside of the backbone.
        attend = self._attention()
        mark_view = Tap(name="view")
        to_cells = _Saliency(self.cells, self.temperature, name="saliency")
        weigh = _StepWeights(name="step_weights")
        looks: list[jax.Array] = []

        def look(features: jax.Array) -> jax.Array:
            self._check(features)
            looks.append(features)
            return attend(features)

        total, grid, view = 0.0, None, images
        for _ in range(self.steps - 1):
            features = run_to_tap(self.backbone, self.tap, mark_view(view), train=train)
            total += self._in_image(look(features), grid, image_size)
            grid = self.grid_of(to_cells(total), image_size)
            view = sample(images, grid)

        def fuse(features: jax.Array) -> jax.Array:
            look(checkpoint_name(features, "/".join((*self.backbone.path, self.tap))))
            weights = weigh(jnp.stack([f.astype(jnp.float32).mean((1, 2)) for f in looks], axis=1))
            parts = [weights[:, t, None, None, None] * f for t, f in enumerate(looks)]
            return sum(parts[1:], parts[0]).astype(features.dtype)

        return self._run_through(fuse, mark_view(view), train)

    def grid_of(self, saliency: jax.Array, image_size: Size) -> jax.Array:
        """The grid of a view, to draw it, undo it, or move points with it (`ops.warp_points`).

        Args:
            saliency: [n, cells, cells, 1], as the taps `saliency` hold it.
            image_size: (h, w) of the images.

        Returns:
            Dense [n, h, w, 2], in pixels of the images.
        """
        return saliency_grid(saliency[..., 0], image_size, fwhm=self.fwhm, strength=self.strength)

    def _attention(self) -> Callable[[jax.Array], jax.Array]:
        """Features [n, h, w, c] to logits [n, h, w, 1], at the tap `attention`."""
        if self.attention == "learned":
            return nn.Conv(
                1,
                (1, 1),
                use_bias=False,
                kernel_init=nn.initializers.zeros,
                dtype=jnp.float32,
                name="attention",
            )
        mark = Tap(name="attention")

        def activation(features: jax.Array) -> jax.Array:
            mean = features.astype(jnp.float32).mean(axis=-1, keepdims=True)
            top = lax.stop_gradient(jnp.abs(mean).max(axis=(1, 2), keepdims=True))
            return mark(mean / jnp.where(top == 0, 1.0, top))

        return activation

    def _in_image(
        self, attention: jax.Array, grid: jax.Array | None, image_size: Size
    ) -> jax.Array:
        """Attention [n, h', w', 1] of a view as [n, cells, cells] of the image."""
        centres = [(jnp.arange(self.cells) + 0.5) * m / self.cells - 0.5 for m in image_size]
        places = jnp.stack(jnp.meshgrid(*centres, indexing="ij"), axis=-1)  # [cells, cells, 2]
        places = jnp.broadcast_to(places, (len(attention), *places.shape))
        if grid is not None:
            points = places.reshape(len(attention), -1, 2)
            places = warp_points(points, lax.stop_gradient(grid)).reshape(places.shape)
        scale = jnp.asarray(attention.shape[1:3]) / jnp.asarray(image_size)
        return sample(attention, (places + 0.5) * scale - 0.5)[..., 0]

    def _run_through(
        self, fuse: Callable[[jax.Array], jax.Array], view: jax.Array, train: bool
    ) -> jax.Array:
        """The whole backbone, with `fuse` applied to the value at the tap."""
        names: list[str] = []

        def visit(name: str, value: jax.Array, module: nn.Module) -> jax.Array:
            names.append(name)
            if name != self.tap:
                return value
            check_outside(name, module, self.backbone)
            return fuse(value)

        with visit_taps(visit, self.backbone.path):
            output = self.backbone(view, **train_argument(self.backbone, train))
        if self.tap not in names:
            raise unknown_name("tap of the backbone", self.tap, names)
        return output

    def _check(self, features: jax.Array) -> None:
        if features.ndim != 4:
            raise ValueError(
                f"RecursiveZoom: the tap {self.tap!r} has shape {features.shape}; expected "
                "features [n, h, w, c]: take a tap before the pooling, such as the last stage"
            )


class _Saliency(nn.Module):
    """Logits of cells as saliency."""

    cells: int
    temperature: float

    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        size = (self.cells, self.cells)
        saliency = to_saliency(logits, size, temperature=self.temperature)
        return Gate(name="gate")(saliency[..., None])


class _StepWeights(nn.Module):
    """The averaged features of every step [n, t, c] to the weights of the steps [n, t]."""

    @nn.compact
    def __call__(self, means: jax.Array) -> jax.Array:
        score = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros, name="score")
        return Gate(name="gate")(nn.softmax(score(means)[..., 0], axis=1))

"""ZoomWarp: look closer where attention is high, by resampling the map itself.

Attention of any origin becomes saliency S on a coarse grid of cells; a sampler turns S into a grid
of places, and the map is read at those places with bilinear weights (all in `ops.warp`):

    S    = normalise(floor + (1 - floor) exp((A - max A) / temperature))
    grid = saliency sampler of S (curved), or per axis the inverse distribution of S (separable)
    out  = x at grid

Without attention of its own to read, the layer computes logits A = W * x with one learned kernel
c -> 1, as the saliency network of the saliency sampler does at its end. W starts at zero: S is then
uniform, the grid exactly the identity, and the layer returns x bit for bit, while W does have a
gradient.

Sources: Recasens et al. 2018 (arXiv 1809.03355) for the saliency grid, Zheng et al. 2019 (TASN,
arXiv 1903.06150) for the separable one. That attention may come from any earlier layer is ours, as
is the warp of an AttZoom mask, which that paper (arXiv 2508.03625, section 6.2) shows without a
formula.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.ops.warp import Grid, Size, saliency_grid, sample, separable_grid, to_saliency

GRIDS = ("saliency", "separable")


class ZoomWarp(nn.Module):
    """Magnifies what attention marks, at the expense of the rest.

    The saliency that it warps by is the tap `<path>/gate`, float32 [n, cells, cells, 1], and sums
    to 1: relevance goes to x, never to what chose the places. Parameters: `saliency_conv` with
    `kernel`, only where the layer is given no attention.

    As preprocessing by any map, without parameters, call `ops.warp` yourself: `to_saliency`, a
    grid, `sample`; the grid also moves points and boxes (`ops.warp_points`).

    Attributes:
        reads: names of earlier taps from which `Insert` passes the attention, one or several:
            `stage2/gate`, `stage1`, `input`. Empty for logits of the layer's own.
        grid: "saliency" (curved) or "separable" (rows and columns stay straight).
        size: (height, width) of the output in pixels; None: that of the input.
        cells: rows and columns of the saliency.
        weighting: of the attention, "softmax" or "power"; see `ops.warp.to_saliency`.
        temperature: of the weighting, above 0; a lower one sharpens.
        floor: least weight of a place, as a share of the largest one.
        strength: 0 for none of the warp, 1 for all of it.
        fwhm: of the saliency grid's kernel, in cells. Wider ones magnify wider areas.
        marginal: of the separable grid, "max" or "sum".
        max_zoom: bound on the separable grid's magnification, above 1; None for no bound.
        head_kernel: taps per axis of the layer's own kernel W.
    """

    reads: str | tuple[str, ...] = ()
    grid: str = "saliency"
    size: Size | None = None
    cells: int = 31
    weighting: str = "softmax"
    temperature: float = 1.0
    floor: float = 0.0
    strength: float = 1.0
    fwhm: float = 13.0
    marginal: str = "max"
    max_zoom: float | None = None
    head_kernel: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, *attention: jax.Array) -> jax.Array:
        """Warp.

        Args:
            x: images or features [n, h, w, c].
            *attention: maps [n, h', w'] or [n, h', w', c'], one per name in `reads`, each of any
                size; channels are averaged, and so are the saliencies of several maps.

        Returns:
            [n, height, width, c], of the type of x.

        Raises:
            ValueError: a field out of range, an input that is not [n, h, w, c], attention that is
                missing, of another batch, or without a spatial extent.
        """
        self._check(x, attention)
        if not attention:
            logits = nn.Conv(
                1,
                (self.head_kernel, self.head_kernel),
                padding="SAME",
                use_bias=False,  # the weights do not change with a constant
                kernel_init=nn.initializers.zeros,
                dtype=jnp.float32,
                name="saliency_conv",
            )(x)  # [n, h, w, 1]
            attention = (logits,)
        parts = [self._saliency(values) for values in attention]
        saliency = Gate(name="gate")(sum(parts[1:], parts[0])[..., None] / len(parts))
        return sample(x, self.grid_of(saliency, (x.shape[1], x.shape[2])))

    def grid_of(self, saliency: jax.Array, image_size: Size) -> Grid:
        """The grid by which the layer warps, to draw it, undo it, or move points with it.

        Args:
            saliency: [n, cells, cells, 1], as the tap `<path>/gate` holds it.
            image_size: (h, w) of the layer's input.

        Returns:
            Dense [n, height, width, 2] or separable (y [n, height], x [n, width]), in pixels of
            the input.
        """
        size = self.size or image_size
        options = {"image_size": image_size, "strength": self.strength}
        if self.grid == "saliency":
            return saliency_grid(saliency[..., 0], size, fwhm=self.fwhm, **options)
        bounds = {"marginal": self.marginal, "max_zoom": self.max_zoom}
        return separable_grid(saliency[..., 0], size, **bounds, **options)

    def _saliency(self, attention: jax.Array) -> jax.Array:
        maps = jnp.asarray(attention, jnp.float32)
        return to_saliency(
            maps if maps.ndim == 3 else maps.mean(axis=-1),
            (self.cells, self.cells),
            weighting=self.weighting,
            temperature=self.temperature,
            floor=self.floor,
        )

    def _check(self, x: jax.Array, attention: tuple[jax.Array, ...]) -> None:
        if self.grid not in GRIDS:
            raise unknown_name("ZoomWarp.grid", self.grid, GRIDS)
        for field in ("cells", "head_kernel"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"ZoomWarp.{field} is {value!r}, expected a whole number of at least 1; try "
                    f"{ZoomWarp.__dataclass_fields__[field].default}."
                )
        if x.ndim != 4:
            raise ValueError(
                f"ZoomWarp takes images or features [n, h, w, c], got shape {x.shape}: insert it "
                "before the pooling, or add the batch axis."
            )
        if self.reads and not attention:
            raise ValueError(
                f"ZoomWarp reads {self.reads!r} and was called without attention: insert it with "
                "`Insert`, which passes what it reads, or call layer(x, attention)."
            )
        for values in attention:
            is_map = values.ndim in (3, 4) and values.shape[0] == x.shape[0]
            if not is_map or values.shape[1] * values.shape[2] < 2:
                raise ValueError(
                    f"ZoomWarp takes attention [n, h', w'] or [n, h', w', c'] with n = "
                    f"{x.shape[0]} and more than one place, got shape {values.shape}: read a tap "
                    "before the pooling; gates over channels have no places."
                )

"""Image augmentation for a whole batch at once, on the device, inside jit.

Every function is pure, keeps static shapes and draws from the key alone, so that the same key gives
the same images under jit, eagerly and on any number of devices. Crops, flips and AutoAugment work
on uint8 images and come before `normalize`; mixup and cutmix mix float images and targets after it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax.data.auto_augment import auto_augment as auto_augment_images


def augment(
    images: jax.Array,
    key: jax.Array,
    *,
    crop_padding: int = 0,
    crop_size: int | tuple[int, int] | None = None,
    flip: bool = False,
    auto_augment: str | Sequence | None = None,
) -> jax.Array:
    """Applies those augmentations that are on: crop, then flip, then AutoAugment.

    Each has a key of its own, so switching one off leaves the others' randomness as it was.

    Args:
        images: uint8 [n, h, w, 3].
        key: PRNG key.
        crop_padding: zero pixels added on each side before a random crop.
        crop_size: side of the crop in pixels, or (height, width); None: the images' size. Without
            it and without padding nothing is cropped.
        flip: whether to mirror half of the images.
        auto_augment: policy of `auto_augment.auto_augment`, a name or sub-policies; None: off.

    Returns:
        uint8 [n, h', w', 3], h' and w' being crop_size.

    Raises:
        ValueError: as the three functions do.
    """
    key_crop, key_flip, key_auto = jax.random.split(key, 3)
    if crop_padding or crop_size is not None:
        images = random_crop(images, key_crop, size=crop_size, padding=crop_padding)
    if flip:
        images = random_flip(images, key_flip)
    if auto_augment is not None:
        images = auto_augment_images(images, key_auto, policy=auto_augment)
    return images


def random_crop(
    images: jax.Array,
    key: jax.Array,
    *,
    size: int | tuple[int, int] | None = None,
    padding: int = 0,
) -> jax.Array:
    """Pads with zeros and cuts a window at a uniformly random place, another for every image.

    Args:
        images: [n, h, w, c], any dtype.
        key: PRNG key.
        size: side of the window in pixels, or (height, width); None: the images' size.
        padding: pixels added on each side, >= 0.

    Returns:
        [n, h', w', c], the dtype of images.

    Raises:
        ValueError: images that are not [n, h, w, c], negative padding, or a window that is empty or
            larger than the padded image.
    """
    _check_images(images, "random_crop")
    n, height, width, channels = images.shape
    rows, columns = (height, width) if size is None else np.broadcast_to(size, 2).tolist()
    if padding < 0:
        raise ValueError(f"random_crop got padding {padding}, expected pixels >= 0")
    spare_y, spare_x = height + 2 * padding - rows, width + 2 * padding - columns
    if min(rows, columns) < 1 or min(spare_y, spare_x) < 0:
        raise ValueError(
            f"random_crop got size {(rows, columns)}, expected 1 <= size <= "
            f"{(height + 2 * padding, width + 2 * padding)}, the image with padding {padding}: "
            "crop less or pad more"
        )
    key_y, key_x = jax.random.split(key)
    y = jax.random.randint(key_y, (n,), 0, spare_y + 1)
    x = jax.random.randint(key_x, (n,), 0, spare_x + 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def window(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (y, x, 0), (rows, columns, channels))

    return jax.vmap(window)(padded, y, x)


def center_crop(images: Any, *, size: int | tuple[int, int] | None = None) -> Any:
    """Cuts the central window, as evaluation does where training crops at random.

    Args:
        images: [n, h, w, c], any dtype, of JAX or NumPy.
        size: side of the window in pixels, or (height, width); None: the images' size.

    Returns:
        [n, h', w', c], of the same kind and dtype.

    Raises:
        ValueError: a window that is empty or larger than the image.
    """
    h, w = images.shape[1:3]
    height, width = (h, w) if size is None else (size, size) if isinstance(size, int) else size
    if not (0 < height <= h and 0 < width <= w):
        raise ValueError(
            f"a window of {height} x {width} pixels does not fit images of {h} x {w}; "
            "take a smaller crop_size, or a larger image_size"
        )
    top, left = (h - height) // 2, (w - width) // 2
    return images[:, top : top + height, left : left + width]


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half.

    Args:
        images: [n, h, w, c], any dtype.
        key: PRNG key.

    Returns:
        [n, h, w, c], the dtype of images.

    Raises:
        ValueError: images that are not [n, h, w, c].
    """
    _check_images(images, "random_flip")
    mirrored = jax.random.bernoulli(key, 0.5, (len(images),))[:, None, None, None]
    return jnp.where(mirrored, images[:, :, ::-1], images)


def normalize(
    images: jax.Array,
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Grey levels to floats: (images / 255 - mean) / std, computed in float32.

    Args:
        images: uint8 [n, h, w, c].
        mean: per channel or for all, as a fraction of white, in [0, 1].
        std: likewise, in (0, 1].
        dtype: of the result.

    Returns:
        [n, h, w, c] of dtype.

    Raises:
        ValueError: images that are not uint8, or statistics outside their ranges.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"normalize got {images.dtype} images, expected uint8: normalise once")
    center, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if np.any((center < 0) | (center > 1)) or np.any((scale <= 0) | (scale > 1)):
        raise ValueError(
            f"normalize got mean {mean} and std {std}, expected fractions of white, mean in [0, 1] "
            "and std in (0, 1]: divide grey levels by 255"
        )
    return ((images.astype(jnp.float32) / 255 - center) / scale).astype(dtype)


def mixup(
    images: jax.Array, targets: jax.Array, key: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Averages each image, and its target, with a partner's: lambda x + (1 - lambda) x'.

    Args:
        images: float [n, h, w, c].
        targets: float [n, k], for example one-hot.
        key: PRNG key.
        alpha: > 0; lambda ~ Beta(alpha, alpha), one for the whole batch as in the paper.

    Returns:
        Images [n, h, w, c] and targets [n, k], dtypes as given.

    Raises:
        ValueError: integer images or targets, differing n, or alpha <= 0.

    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", section 2.
    """
    _check_mixable(images, targets, "mixup")
    share, partner = sample_mix(key, len(images), alpha=alpha)
    return _mix(images, images[partner], share), _mix(targets, targets[partner], share)


def cutmix(
    images: jax.Array, targets: jax.Array, key: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Pastes a partner's box into each image and mixes the targets by the area that was pasted.

    The box has the whole image's aspect, its centre is uniform over the pixels; what lies outside
    the image is cut off, and the targets' lambda is computed from the rest.

    Args:
        images: float [n, h, w, c].
        targets: float [n, k], for example one-hot.
        key: PRNG key.
        alpha: > 0; lambda ~ Beta(alpha, alpha), one lambda and one box for the whole batch.

    Returns:
        Images [n, h, w, c] and targets [n, k], dtypes as given.

    Raises:
        ValueError: integer images or targets, differing n, or alpha <= 0.

    Source: Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with
        Localizable Features", section 3 and algorithm A1.
    """
    _check_mixable(images, targets, "cutmix")
    n, height, width, _ = images.shape
    key_mix, key_box = jax.random.split(key)
    share, partner = sample_mix(key_mix, n, alpha=alpha)
    y0, x0, y1, x1 = sample_box(key_box, share, height, width)
    y, x = jnp.mgrid[:height, :width]
    inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)  # [h, w]
    images = jnp.where(inside[None, :, :, None], images[partner], images)
    kept = 1 - (y1 - y0) * (x1 - x0) / (height * width)
    return images, _mix(targets, targets[partner], kept)


def sample_mix(key: jax.Array, n: int, *, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Draws what mixup and cutmix share: lambda and every image's partner.

    Args:
        key: PRNG key.
        n: number of images.
        alpha: > 0; lambda ~ Beta(alpha, alpha).

    Returns:
        lambda, float32 [], in [0, 1], the share an image keeps; partners, a permutation int32 [n].

    Raises:
        ValueError: alpha <= 0.
    """
    if not alpha > 0:
        raise ValueError(f"mixing got alpha {alpha}, expected > 0: to switch it off, do not call")
    key_share, key_partner = jax.random.split(key)
    return jax.random.beta(key_share, alpha, alpha), jax.random.permutation(key_partner, n)


def sample_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Draws a box of area (1 - share) height width, then cuts off what lies outside the image.

    Args:
        key: PRNG key.
        share: lambda in [0, 1], float [].
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        int32 [4], [y0, x0, y1, x1] half-open, within the image.

    Source: Yun et al. 2019, equation 2.
    """
    size = jnp.array([height, width])
    box = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32)
    start = jax.random.randint(key, (2,), 0, size) - box // 2
    return jnp.concatenate([jnp.clip(start, 0, size), jnp.clip(start + box, 0, size)])


def _mix(ours: jax.Array, theirs: jax.Array, share: jax.Array) -> jax.Array:
    return (share * ours + (1 - share) * theirs).astype(ours.dtype)


def _check_images(images: jax.Array, name: str) -> None:
    if images.ndim != 4:
        raise ValueError(f"{name} got shape {list(images.shape)}, expected images [n, h, w, c]")


def _check_mixable(images: jax.Array, targets: jax.Array, name: str) -> None:
    _check_images(images, name)
    if not (_is_float(images) and _is_float(targets)):
        raise ValueError(
            f"{name} got {images.dtype} images and {targets.dtype} targets, expected floats: "
            "normalise the images and make the labels one-hot first"
        )
    if targets.ndim != 2 or len(targets) != len(images):
        raise ValueError(
            f"{name} got images {list(images.shape)} and targets {list(targets.shape)}, "
            "expected [n, h, w, c] and [n, k] with the same n"
        )


def _is_float(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))

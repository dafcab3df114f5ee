"""Common corruptions of images, at five levels each, on the host.

A corruption is a pure function of an image, a level and random numbers. Where ImageNet-C defines
one, its definition and levels hold; its authors have other levels for smaller images, which would
otherwise be beyond recognition: CIFAR-10-C at 32 pixels and Tiny-ImageNet-C at 64. The levels are
those of the nearest of the three sizes, and lengths grow with the image from there.

    corrupted = dataclasses.replace(source, examples=Corrupted(source, "jpeg", level=3))

Two things differ from the authors' files: theirs were rounded down, and stored as JPEG once more.

Source: Hendrycks, Dietterich 2019 (arXiv 1903.12261), the levels from the authors' published code.
Occlusion and translation are ours.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from attnzoom_jax.data.augment import center_crop
from attnzoom_jax.data.pipeline import Resize
from attnzoom_jax.errors import unknown_name

LEVELS = (1, 2, 3, 4, 5)
# {side of the image: {corruption: its five levels}}: CIFAR-10-C, Tiny-ImageNet-C, ImageNet-C.
SEVERITIES: dict[int, dict[str, tuple[float, ...]]] = {
    32: {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "salt_and_pepper": (0.01, 0.02, 0.03, 0.05, 0.07),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "jpeg": (80, 65, 58, 50, 40),
    },
    64: {
        "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
        "salt_and_pepper": (0.01, 0.02, 0.05, 0.08, 0.14),
        "gaussian_blur": (0.5, 0.75, 1.0, 1.25, 1.5),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (65, 58, 50, 40, 25),
    },
    224: {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "salt_and_pepper": (0.03, 0.06, 0.09, 0.17, 0.27),
        "gaussian_blur": (1, 2, 3, 4, 6),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (25, 18, 15, 10, 7),
    },
}
OCCLUDED = (0.05, 0.1, 0.2, 0.3, 0.4)  # shares of the area
MOVED = (0.05, 0.1, 0.15, 0.2, 0.25)  # shares of the side


def gaussian_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise to every value, then clip.

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; standard deviation .08 .12 .18 .26 .38 of the range at 224 pixels.
        rng: random numbers.

    Returns:
        uint8 [h, w, 3].
    """
    sigma, _ = _severity("gaussian_noise", level, image)
    return _to_uint8(image / 255 + rng.normal(scale=sigma, size=image.shape))


def salt_and_pepper(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Set values, each channel for itself, to 0 or 255 (ImageNet-C's impulse noise).

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; share of the values .03 .06 .09 .17 .27 at 224 pixels.
        rng: random numbers.

    Returns:
        uint8 [h, w, 3].
    """
    share, _ = _severity("salt_and_pepper", level, image)
    is_hit, is_salt = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return np.where(is_hit, np.where(is_salt, 255, 0), image).astype(np.uint8)


def gaussian_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a Gaussian, cut at four standard deviations; the border is repeated.

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; standard deviation 1 2 3 4 6 pixels at 224 pixels.
        rng: not used.

    Returns:
        uint8 [h, w, 3].
    """
    sigma, side = _severity("gaussian_blur", level, image)
    sigma *= min(image.shape[:2]) / side
    width = 2 * int(4 * sigma + 0.5) + 1
    blurred = cv2.GaussianBlur(
        image / 255, (width, width), sigmaX=sigma, borderType=cv2.BORDER_REPLICATE
    )
    return _to_uint8(blurred)


def brightness(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Add to the value of HSV, the largest channel; hue and saturation stay.

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; .1 .2 .3 .4 .5 are added at 224 pixels.
        rng: not used.

    Returns:
        uint8 [h, w, 3].
    """
    added, _ = _severity("brightness", level, image)
    value = image.max(axis=2, keepdims=True) / 255  # [h, w, 1]
    brighter = np.minimum(value + added, 1)
    # Black has no hue: it becomes grey.
    return _to_uint8(np.where(value > 0, image / 255 / np.maximum(value, 1 / 255), 1) * brighter)


def contrast(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Shrink the distance of every value to its channel's mean.

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; what is left of the distance, .4 .3 .2 .1 .05 at 224 pixels.
        rng: not used.

    Returns:
        uint8 [h, w, 3].
    """
    left, _ = _severity("contrast", level, image)
    mean = image.mean(axis=(0, 1), keepdims=True)
    return _to_uint8(((image - mean) * left + mean) / 255)


def jpeg(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Encode as JPEG, colours at half the resolution, and decode.

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; quality 25 18 15 10 7 at 224 pixels.
        rng: not used.

    Returns:
        uint8 [h, w, 3].
    """
    quality, _ = _severity("jpeg", level, image)
    settings = [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    decoded: Any = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def occlusion(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Cover a rectangle of the image's own shape, anywhere inside, with the image's mean colour.

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; .05 .1 .2 .3 .4 of the area are covered.
        rng: random numbers.

    Returns:
        uint8 [h, w, 3].
    """
    h, w, _ = image.shape
    side = math.sqrt(OCCLUDED[_check_level(level) - 1])
    rows, columns = round(side * h), round(side * w)
    top, left = rng.integers(h - rows + 1), rng.integers(w - columns + 1)
    covered = image.copy()
    covered[top : top + rows, left : left + columns] = _to_uint8(image.mean(axis=(0, 1)) / 255)
    return covered


def translation(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Move the image by whole pixels in any direction; the border is repeated where it left.

    Black instead of the border would be a second corruption.

    Args:
        image: uint8 [h, w, 3].
        level: 1..5; by .05 .1 .15 .2 .25 of the height or width.
        rng: random numbers.

    Returns:
        uint8 [h, w, 3].
    """
    h, w, _ = image.shape
    share, angle = MOVED[_check_level(level) - 1], rng.uniform(0, 2 * math.pi)
    down, right = round(share * h * math.sin(angle)), round(share * w * math.cos(angle))
    rows = np.clip(np.arange(h) - down, 0, h - 1)
    columns = np.clip(np.arange(w) - right, 0, w - 1)
    return image[rows[:, None], columns]


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    function.__name__: function
    for function in (
        *(gaussian_noise, salt_and_pepper, gaussian_blur, brightness),
        *(contrast, jpeg, occlusion, translation),
    )
}


@dataclasses.dataclass(frozen=True)
class Corrupted(Sequence[dict[str, Any]]):
    """The examples of a split with corrupted images, other fields as they are.

    Images are resized first, and only the window that the model sees is corrupted, as if it were
    all. The random numbers depend on (seed, corruption, level, number of the example) alone: not on
    the batch, nor on devices and processes.

    Attributes:
        examples: with images uint8 [h, w, 3].
        corruption: a name in CORRUPTIONS.
        level: 1..5.
        seed: 0 or more.
        resize: how images become one size.
        crop_size: side of the central window that the model sees; 0: the whole image.

    Raises:
        ValueError: unknown corruption or level, negative seed.
    """

    examples: Sequence[dict[str, Any]]
    corruption: str
    level: int
    seed: int = 0
    resize: Resize = dataclasses.field(default_factory=Resize)
    crop_size: int = 0

    def __post_init__(self) -> None:
        if self.corruption not in CORRUPTIONS:
            raise unknown_name("corruption", self.corruption, CORRUPTIONS)
        _check_level(self.level)
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be 0 or more")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        example = self.examples[index]
        number = range(len(self))[index]
        image = self.resize(example["image"]).copy()
        window = center_crop(image[None], size=self.crop_size or None)[0]  # a view
        numbers = [self.seed, zlib.crc32(self.corruption.encode()), self.level, number]
        rng = np.random.default_rng(numbers)
        window[:] = CORRUPTIONS[self.corruption](window, self.level, rng)
        return {**example, "image": image}


def _severity(name: str, level: int, image: np.ndarray) -> tuple[float, int]:
    """What a level means for an image, and the side of images that it was chosen for."""
    least = min(image.shape[:2])
    side = min(SEVERITIES, key=lambda side: abs(math.log(side / least)))
    return SEVERITIES[side][name][_check_level(level) - 1], side


def _check_level(level: int) -> int:
    if level not in LEVELS:
        raise ValueError(f"level {level} of a corruption; expected 1, 2, 3, 4 or 5")
    return int(level)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)

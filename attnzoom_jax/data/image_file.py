"""An image file as people see it: 8 bits, three colours, upright or as it is stored."""

import pathlib

import numpy as np
from PIL import Image, ImageOps


def read_image(path: str | pathlib.Path, *, upright: bool = True) -> np.ndarray:
    """Read an image file.

    Args:
        path: of the file, in any format that Pillow knows.
        upright: turn it as its EXIF tag says. False: pixels as they are stored, where annotations
            count them so.

    Returns:
        uint8 [h, w, 3]: grey repeated, alpha dropped, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: no readable image, or one so large that Pillow suspects a bomb.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file) if upright else file
            if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        raise ValueError(f"{path} is no readable image ({' '.join(str(error).split())})") from error

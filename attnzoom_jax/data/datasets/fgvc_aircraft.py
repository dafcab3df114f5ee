"""FGVC-Aircraft: 100 variants of aircraft, one box for each image.

Maji, Kannala, Rahtu, Blaschko and Vedaldi, "Fine-Grained Visual Classification of Aircraft",
arXiv:1306.5151, 2013. Published: 10,000 images, 3,334 in train, 3,333 in validation and 3,333 in
test; results are mostly reported for training on both, "train+validation". Terms: the photographs
belong to their takers; non-commercial research only.

    python tools/prepare_data.py fgvc_aircraft --from_archive=fgvc-aircraft-2013b.tar.gz

Fields of an example:

- image: uint8 [h, w, 3], of different sizes, without the banner
- label: the variant in the order of variants.txt, such as "737-700"
- family, manufacturer: the same aircraft in coarser classes, "Boeing 737" and "Boeing"
- box: int32 [y0, x0, y1, x1], half-open, in pixels, clipped to the image. The published boxes give
  the first and the last pixel, counted from 1
- file_name: such as 0034309.jpg

The bottom 20 rows of every published photograph are a banner that names its author; they are cut
off, as its readme asks. The rest is encoded anew with the file's own quantisation tables, which
changed pixels of other photographs by 0.1 to 0.2 of 255 in the mean.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, JpegImagePlugin

from attnzoom_jax.data.datasets import image_folder
from attnzoom_jax.data.datasets.archive import Archive, ArchiveSet, Contents, half_open

BANNER = 20  # pixels
SPLITS = {"train": "train", "validation": "val", "test": "test"}
LEVELS = {"label": "variant", "family": "family", "manufacturer": "manufacturer"}
CLASSES = {"variant": "variants", "family": "families", "manufacturer": "manufacturers"}


def scan(archive: Archive) -> Contents:
    """The examples of train, validation and test; see `ArchiveSet.scan`."""
    root = archive.root("images_box.txt")
    boxes = {name: box for name, *box in archive.table(f"{root}images_box.txt", str, *[int] * 4)}
    names = {
        field: [name for (name,) in archive.table(f"{root}{CLASSES[level]}.txt", str)]
        for field, level in LEVELS.items()
    }
    splits = {}
    for split, word in SPLITS.items():
        images: dict[str, dict] = {}
        for field, level in LEVELS.items():
            list_path = f"{root}images_{level}_{word}.txt"
            for image, name in archive.table(list_path, str, str):
                if name not in names[field]:
                    raise ValueError(
                        f"{archive.path}: {list_path} has the class {name!r}, which is not in "
                        f"{root}{CLASSES[level]}.txt"
                    )
                images.setdefault(image, {})[field] = names[field].index(name)
        for image, fields in images.items():
            if image not in boxes or len(fields) < len(LEVELS):
                raise ValueError(
                    f"{archive.path}: {image} is not in all of images_box.txt and images_*_"
                    f"{word}.txt in {root or 'it'}"
                )
            fields["file_name"] = f"{image}.jpg"
            fields["box"] = half_open(*boxes[image], first=1)
        splits[split] = {f"{root}images/{image}.jpg": images[image] for image in images}
    features = {
        **{field: tfds.features.ClassLabel(names=names[field]) for field in LEVELS},
        "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "file_name": tfds.features.Text(),
    }
    return Contents(splits, features, encode=cut_banner)


def cut_banner(data: bytes) -> bytes:
    """A JPEG file without its bottom 20 rows."""
    with Image.open(io.BytesIO(image_folder.encode(data, upright=False))) as image:
        picture = image.crop((0, 0, image.width, image.height - BANNER))
        file = io.BytesIO()
        # The blocks begin at the top, so the same tables round to nearly the same values.
        picture.save(
            file,
            "JPEG",
            qtables=image.quantization,  # pyright: ignore[reportAttributeAccessIssue]
            subsampling=JpegImagePlugin.get_sampling(image),
        )
    return file.getvalue()


FGVC_AIRCRAFT = ArchiveSet(
    archive="fgvc-aircraft-2013b.tar.gz",
    needs="fgvc-aircraft-2013b.tar.gz, published by Oxford's Visual Geometry Group",
    description=(
        "100 variants of aircraft with boxes (Maji et al., Fine-Grained Visual Classification of "
        "Aircraft, 2013). Non-commercial research only."
    ),
    lists=(
        *("images_box.txt", "variants.txt", "families.txt", "manufacturers.txt"),
        *("_train.txt", "_val.txt", "_test.txt"),
    ),
    scan=scan,
)

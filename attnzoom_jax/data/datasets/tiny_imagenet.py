"""Tiny ImageNet: 200 classes of ImageNet at 64x64 pixels, one box for each image.

Le and Yang, "Tiny ImageNet Visual Recognition Challenge", CS231n, Stanford, 2015. Published:
100,000 images in train (500 per class), 10,000 in validation (50 per class), 10,000 in test. The
test images have no labels, so they are left out; papers report the validation split. Terms: those
of ImageNet, for non-commercial research and education only.

    python tools/prepare_data.py tiny_imagenet --from_archive=tiny-imagenet-200.zip

Fields of an example:

- image: uint8 [64, 64, 3]; files that are grey come out as RGB
- label: in the order of wnids.txt, which is not alphabetical; named by the first of the words in
  words.txt, with the wnid behind it where two classes share that word
- wnid: the class in WordNet, such as n01443537
- box: int32 [y0, x0, y1, x1], half-open, in pixels
- file_name: such as val/images/val_0.JPEG

The lists give the first and the last pixel of a box, both from 0 to 63: the published validation
boxes touch 63 as they touch 0, and some have x0 = x1. So the ends here are one more.
"""

import collections

import numpy as np
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets.archive import Archive, ArchiveSet, Contents, half_open

SIZE = 64
BOX = (int, int, int, int)  # x0, y0, x1, y1


def scan(archive: Archive) -> Contents:
    """The examples of train and validation, where they are; see `ArchiveSet.scan`."""
    root = archive.root("wnids.txt")
    wnids = [wnid for (wnid,) in archive.table(f"{root}wnids.txt", str)]
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    splits: dict[str, dict[str, dict]] = {}
    notes = []

    def add(split: str, file_name: str, wnid: str, box: tuple[int, int, int, int]) -> None:
        x0, y0, x1, y1 = box
        if not (0 <= x0 <= x1 < SIZE and 0 <= y0 <= y1 < SIZE):
            raise ValueError(
                f"{archive.path}: the box of {file_name} is x0, y0, x1, y1 = {x0}, {y0}, {x1}, "
                f"{y1}; expected 0 <= x0 <= x1 < {SIZE}, and y likewise"
            )
        splits.setdefault(split, {})[root + file_name] = {
            "file_name": file_name,
            "label": labels[wnid],
            "wnid": wnid,
            "box": half_open(*box, first=0),
        }

    if archive.has(f"{root}train"):
        for wnid in wnids:
            for name, *box in archive.table(f"{root}train/{wnid}/{wnid}_boxes.txt", str, *BOX):
                add("train", f"train/{wnid}/images/{name}", wnid, tuple(box))
    if archive.has(f"{root}val"):
        annotations = f"{root}val/val_annotations.txt"
        for name, wnid, *box in archive.table(annotations, str, str, *BOX):
            if wnid not in labels:
                raise ValueError(
                    f"{archive.path}: {annotations} has the class {wnid!r}, which is not in "
                    f"{root}wnids.txt"
                )
            add("validation", f"val/images/{name}", wnid, tuple(box))
    for folder, split in (("train", "train"), ("val", "validation")):
        if split not in splits:
            notes.append(f"{archive.path} holds no {root}{folder}/; the split {split} is left out")
    if not splits:
        raise ValueError(f"{archive.path} holds neither {root}train/ nor {root}val/ with images")
    if archive.has(f"{root}test"):
        notes.append("the test images have no labels and are left out")
    features = {
        "label": tfds.features.ClassLabel(names=_class_names(archive, root, wnids)),
        "wnid": tfds.features.Text(),
        "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "file_name": tfds.features.Text(),
    }
    return Contents(splits, features, image_shape=(SIZE, SIZE, 3), notes=tuple(notes))


def _class_names(archive: Archive, root: str, wnids: list[str]) -> list[str]:
    words = dict(archive.table(f"{root}words.txt", str, str))
    names = [words.get(wnid, wnid).partition(",")[0] for wnid in wnids]
    count = collections.Counter(names)
    return [
        f"{name} ({wnid})" if count[name] > 1 else name
        for name, wnid in zip(names, wnids, strict=True)
    ]


TINY_IMAGENET = ArchiveSet(
    archive="tiny-imagenet-200.zip",
    needs="tiny-imagenet-200.zip, published by Stanford's course CS231n",
    description=(
        "200 classes of ImageNet at 64x64 pixels with boxes (Le and Yang, Tiny ImageNet Visual "
        "Recognition Challenge, 2015). Non-commercial research and education only."
    ),
    lists=("wnids.txt", "words.txt", "_boxes.txt", "val_annotations.txt"),
    scan=scan,
)

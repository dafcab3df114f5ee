"""Small prepared sets in the exact features of TFDS's own builders, without their downloads."""

import io
from typing import Any
from unittest import mock

import cv2
import numpy as np
import tensorflow_datasets as tfds

DOGS = ("n02085620-chihuahua", "n02085782-japanese_spaniel", "n02085936-maltese_dog")


def image(shape, *, seed=0, extension=".jpg") -> io.BytesIO:
    """A file of smooth random pixels, [h, w, c]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, shape[2])).astype(np.uint8)
    pixels = cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return io.BytesIO(cv2.imencode(extension, pixels)[1].tobytes())


def prepare(name: str, splits, data_dir, *, class_names=()) -> Any:
    """Write {split: examples} as TFDS would the set of this name; returns the builder."""
    own: Any = tfds.builder_cls(name)

    def split_generators(self, dl_manager):
        if class_names:  # some builders find them in the archive
            self.info.features["label"].names = class_names
        return {split: [(str(i), e) for i, e in enumerate(of)] for split, of in splits.items()}

    with mock.patch.object(own, "_split_generators", split_generators):
        builder = own(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    return builder


def birds(count: int) -> list[dict]:
    """Examples of caltech_birds2011, of species 0, 1 and 2."""
    return [
        {
            "image": image((20 + i, 30, 3), seed=i),
            "image/filename": f"CUB_200_2011/images/00{i % 3 + 1}.Bird_{i % 3}/{i}.jpg",
            "label": i % 3,
            "label_name": f"bird_{i % 3}",
            "bbox": tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.9, xmax=1.0),
            "segmentation_mask": image((20 + i, 30, 1), seed=i, extension=".png"),
        }
        for i in range(count)
    ]


def dogs(count: int) -> list[dict]:
    """Examples of stanford_dogs, of its first three breeds."""
    box = tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.9, xmax=1.0)
    return [
        {
            "image": image((20, 30 + i, 3), seed=i),
            "image/filename": f"Images/{DOGS[i % 3]}/{DOGS[i % 3][:9]}_{i}.jpg",
            "label": DOGS[i % 3],
            "objects": [{"bbox": box}] * (1 + i % 2),
        }
        for i in range(count)
    ]


def prepare_photos(name: str, data_dir, *, count: int) -> None:
    """Write caltech_birds2011 or stanford_dogs with as many examples of train and test."""
    if name == "caltech_birds2011":
        prepare(name, {"train": birds(count), "test": birds(count)}, data_dir)
    else:
        names = sorted([*DOGS, *(f"n1{i:07}-breed" for i in range(117))])
        prepare(name, {"train": dogs(count), "test": dogs(count)}, data_dir, class_names=names)

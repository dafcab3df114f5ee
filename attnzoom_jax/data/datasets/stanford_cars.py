"""Stanford Cars: 196 makes, models and years of cars, one box for each image.

Krause, Stark, Deng and Fei-Fei, "3D Object Representations for Fine-Grained Categorization", 3dRR
workshop of ICCV, 2013. Published: 8,144 images in train, 8,041 in test. Terms: the photographs
belong to their takers; non-commercial research only. TFDS's own `cars196` downloads it from its
first site, which was not reachable for long times; this one reads what you have.

    python tools/prepare_data.py stanford_cars --from_archive=FOLDER

FOLDER, or an archive of it, holds what the published files unpack to: cars_train/ and cars_test/
with images, devkit/ with cars_meta.mat and cars_train_annos.mat, and cars_test_annos_withlabels.mat
beside or in devkit/. Fields of an example:

- image: uint8 [h, w, 3], of different sizes; some files are grey
- label: in the order of cars_meta.mat, such as "Audi TT RS Coupe 2012"
- box: int32 [y0, x0, y1, x1], half-open, in pixels, clipped to the image. The published boxes give
  the first and the last pixel, counted from 1 as in MATLAB; the devkit does not say so, but many
  begin at 1 and none of the first 500 at 0
- file_name: such as cars_train/00001.jpg; the same number is used in both splits
"""

import io
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets.archive import Archive, ArchiveSet, Contents, half_open

META = "devkit/cars_meta.mat"
SPLITS = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def scan(archive: Archive) -> Contents:
    """The examples of train and test, where they are; see `ArchiveSet.scan`."""
    root = archive.root(META)
    names = [str(name) for name in np.atleast_1d(_read(archive, root + META, "class_names"))]
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    notes = []
    for split, list_name in SPLITS.items():
        folder, list_path = f"{root}cars_{split}", archive.find(list_name)
        if list_path is None or not archive.has(folder):
            missing = list_name if list_path is None else f"{folder}/"
            notes.append(f"{archive.path} holds no {missing}; the split {split} is left out")
            continue
        splits[split] = {}
        for record in np.atleast_1d(_read(archive, list_path, "annotations")):
            try:
                file_name = f"cars_{split}/{record['fname']}"
                label = int(record["class"]) - 1
                box = half_open(*(int(record[side]) for side in BOX), first=1)
            except (ValueError, TypeError, IndexError) as error:  # NumPy's, for fields it lacks
                raise ValueError(f"{archive.path}: {list_path} is not as expected ({error})") from (
                    error
                )
            if not 0 <= label < len(names):
                raise ValueError(
                    f"{archive.path}: {list_path} has the class {label + 1} for {file_name}; "
                    f"expected 1 to {len(names)}"
                )
            splits[split][root + file_name] = {"file_name": file_name, "label": label, "box": box}
    if not splits:
        raise ValueError(f"{archive.path} holds no split: {'; '.join(notes)}")
    features = {
        "label": tfds.features.ClassLabel(names=names),
        "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "file_name": tfds.features.Text(),
    }
    return Contents(splits, features, notes=tuple(notes))


def _read(archive: Archive, name: str, variable: str) -> Any:
    from scipy.io import loadmat  # 0.3 seconds

    try:
        return loadmat(io.BytesIO(archive.lists[name]), squeeze_me=True)[variable]
    except Exception as error:  # SciPy raises many kinds
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{archive.path}: {name} is no MATLAB file with {variable!r} ({problem})"
        ) from error


STANFORD_CARS = ArchiveSet(
    archive="FOLDER",
    needs=(
        "a folder with what cars_train.tgz, cars_test.tgz, car_devkit.tgz and "
        "cars_test_annos_withlabels.mat, published by the Stanford AI Lab, unpack to"
    ),
    description=(
        "196 makes, models and years of cars with boxes (Krause et al., 3D Object Representations "
        "for Fine-Grained Categorization, 2013). Non-commercial research only."
    ),
    lists=(META, *SPLITS.values()),
    scan=scan,
)

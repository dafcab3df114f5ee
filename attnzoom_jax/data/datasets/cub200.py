"""CUB-200-2011: 200 species of birds with boxes, parts and attributes.

Wah, Branson, Welinder, Perona and Belongie, "The Caltech-UCSD Birds-200-2011 Dataset", Caltech
CNS-TR-2011-001, 2011. Published: 11,788 images, 5,994 in train and 5,794 in test. Terms: no
licence; the photographs belong to their takers on Flickr, and are used for non-commercial research.

    python tools/prepare_data.py cub200 --from_archive=CUB_200_2011.tgz

Fields of an example, n attributes being 312:

- image: uint8 [h, w, 3], of different sizes
- label: the species in the order of classes.txt; all 200, also where an archive holds fewer
- box: float32 [y0, x0, y1, x1], half-open, in pixels; x, y, width and height as published, clipped
  to the image (some boxes reach one pixel beyond)
- parts: float32 [15, 3], (y, x, visible) of each part in the order of metadata["part_names"];
  pixels as published, visible 0 or 1, and (0, 0, 0) for a part that is not visible
- attributes, attribute_certainty: uint8 [n], whether people saw the attribute in this image, 0 or
  1, and how sure they were: 1 not visible, 2 guessing, 3 probably, 4 definitely, 0 not asked; where
  there is image_attribute_labels.txt
- class_attributes: float32 [n] in [0, 1], how often people saw the attribute in images of this
  species; where there is class_attribute_labels_continuous.txt
- object_mask: uint8 [h, w, 1], 1 where the published mask has at least half of its brightest value,
  that is, where about half of the people or more saw the bird; where the folder `segmentations`,
  published apart, was put beside or into CUB_200_2011
- file_name: such as 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg

`tfds.builder_from_directory(...).info.metadata` has part_names and, where attributes.txt is there
(beside or in CUB_200_2011), attribute_names.
"""

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from attnzoom_jax.data.datasets.archive import Archive, ArchiveSet, Contents

ATTRIBUTES = 312
IMAGE_ATTRIBUTES = "attributes/image_attribute_labels.txt"
CLASS_ATTRIBUTES = "attributes/class_attribute_labels_continuous.txt"


def scan(archive: Archive) -> Contents:
    """The examples of train and test; see `ArchiveSet.scan`."""
    root = archive.root("train_test_split.txt")
    files = dict(archive.table(f"{root}images.txt", int, str))  # {image id: file name}
    classes = dict(archive.table(f"{root}classes.txt", int, str))

    def of_images(name: str, *kinds: Callable[[str], Any]) -> dict[int, tuple]:
        rows = {key: row for key, *row in archive.table(root + name, int, *kinds)}
        return {key: tuple(_get(archive, root + name, rows, key)) for key in files}

    labels = {class_id: label for label, class_id in enumerate(classes)}
    class_ids = of_images("image_class_labels.txt", int)
    boxes = of_images("bounding_boxes.txt", float, float, float, float)
    is_train = of_images("train_test_split.txt", int)
    part_names, parts = _read_parts(archive, root, files)
    images: dict[int, dict[str, Any]] = {}
    for key, file_name in files.items():
        x, y, width, height = boxes[key]
        images[key] = {
            "file_name": file_name,
            "label": _get(archive, f"{root}classes.txt", labels, class_ids[key][0]),
            "box": (y, x, y + height, x + width),
            "parts": parts[key],
        }
    names = [name.partition(".")[2].replace("_", " ") or name for name in classes.values()]
    features: dict[str, Any] = {
        "label": tfds.features.ClassLabel(names=names),
        "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
        "parts": tfds.features.Tensor(shape=(len(part_names), 3), dtype=np.float32),
        "file_name": tfds.features.Text(),
    }
    metadata = {"part_names": part_names}
    notes = _add_attributes(archive, root, images, features, metadata)
    _add_masks(archive, images, features)
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    for split, wanted in (("train", 1), ("test", 0)):
        found = [key for key in files if is_train[key] == (wanted,)]
        if found:
            splits[split] = {f"{root}images/{files[key]}": images[key] for key in found}
        else:
            notes.append(f"{root}train_test_split.txt has no image of {split}; it is left out")
    return Contents(splits, features, notes=tuple(notes), metadata=metadata)


def _get(archive: Archive, name: str, rows: dict[int, Any], key: int) -> Any:
    if key not in rows:
        raise ValueError(f"{archive.path}: {name} has no line that begins with {key}")
    return rows[key]


def _read_parts(
    archive: Archive, root: str, files: dict[int, str]
) -> tuple[list[str], dict[int, np.ndarray]]:
    """The names of the parts, and float32 [parts, 3] (y, x, visible) for each image."""
    names = dict(archive.table(f"{root}parts/parts.txt", int, str))
    places = {part: place for place, part in enumerate(names)}
    parts = {key: np.zeros((len(names), 3), np.float32) for key in files}
    lines = archive.table(f"{root}parts/part_locs.txt", int, int, float, float, int)
    for key, part, x, y, visible in lines:
        if key in parts:
            place = _get(archive, f"{root}parts/parts.txt", places, part)
            parts[key][place] = (y, x, visible)
    return list(names.values()), parts


def _add_attributes(
    archive: Archive, root: str, images: dict, features: dict, metadata: dict
) -> list[str]:
    """Add what is known of attributes to the images, features and metadata; returns notes."""
    names = archive.find("attributes.txt")
    if names:
        metadata["attribute_names"] = [name for _, name in archive.table(names, int, str)]
    numbers = tfds.features.Tensor(shape=(ATTRIBUTES,), dtype=np.uint8)
    if root + IMAGE_ATTRIBUTES in archive.names:
        # Columns image, attribute, present, certainty, time; some published lines have one more.
        rows = _numbers(archive, root + IMAGE_ATTRIBUTES, np.int32, usecols=(0, 1, 2, 3))
        if len(rows) and not (1 <= rows[:, 1].min() and rows[:, 1].max() <= ATTRIBUTES):
            raise ValueError(
                f"{archive.path}: {root}{IMAGE_ATTRIBUTES} has attributes outside of 1.."
                f"{ATTRIBUTES}"
            )
        order = {key: place for place, key in enumerate(images)}
        places = np.array([order.get(key, -1) for key in rows[:, 0].tolist()], np.int32)
        rows, places = rows[places >= 0], places[places >= 0]
        values = np.zeros((len(images), ATTRIBUTES, 2), np.uint8)
        values[places, rows[:, 1] - 1] = rows[:, 2:]
        for fields, value in zip(images.values(), values, strict=True):
            fields["attributes"], fields["attribute_certainty"] = value[:, 0], value[:, 1]
        features["attributes"] = features["attribute_certainty"] = numbers
    if root + CLASS_ATTRIBUTES in archive.names:
        shares = _numbers(archive, root + CLASS_ATTRIBUTES, np.float32) / 100  # from percent
        wanted = (features["label"].num_classes, ATTRIBUTES)
        if shares.shape != wanted:
            raise ValueError(
                f"{archive.path}: {root}{CLASS_ATTRIBUTES} has {shares.shape} lines and columns; "
                f"expected {wanted}"
            )
        for fields in images.values():
            fields["class_attributes"] = shares[fields["label"]]
        features["class_attributes"] = tfds.features.Tensor(shape=(ATTRIBUTES,), dtype=np.float32)
    if "attributes" not in features and "class_attributes" not in features:
        return [f"{archive.path} holds no attributes; they are left out"]
    return [] if names else [f"{archive.path} holds no attributes.txt with their names"]


def _numbers(archive: Archive, name: str, dtype: Any, **options: Any) -> np.ndarray:
    try:  # a hundred megabytes, so not through `Archive.table`
        return np.loadtxt(io.StringIO(archive.text(name)), dtype=dtype, ndmin=2, **options)
    except (ValueError, IndexError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{archive.path}: {name} is no table of numbers ({problem})") from error


def _add_masks(archive: Archive, images: dict, features: dict) -> None:
    """Add the masks to the images and features, where there are any."""
    names = {key: f"{fields['file_name'].rpartition('.')[0]}.png" for key, fields in images.items()}
    first = next(iter(names.values()), "")
    found = archive.find(f"segmentations/{first}")
    if found is None:
        return
    folder = found.removesuffix(first)
    for key, name in tqdm(names.items(), desc="looking at masks", unit="mask", disable=None):
        archive.require(folder + name)
        try:
            mask = np.asarray(Image.open(io.BytesIO(archive.lists[folder + name])).convert("L"))
        except Exception as error:  # Pillow raises many kinds
            problem = " ".join(str(error).split())
            raise ValueError(
                f"{archive.path}: {folder}{name} is no readable image ({problem})"
            ) from error
        data = cv2.imencode(".png", (mask >= 128).astype(np.uint8))[1].tobytes()
        images[key]["object_mask"] = io.BytesIO(data)
    features["object_mask"] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")


CUB200 = ArchiveSet(
    archive="CUB_200_2011.tgz",
    needs="CUB_200_2011.tgz, published in Caltech's data repository",
    description=(
        "200 species of birds with boxes, parts and attributes (Wah et al., The Caltech-UCSD "
        "Birds-200-2011 Dataset, 2011). No licence; used for non-commercial research."
    ),
    lists=(
        *("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt"),
        *("bounding_boxes.txt", "parts.txt", "part_locs.txt", "attributes.txt"),
        *("image_attribute_labels.txt", "class_attribute_labels_continuous.txt", ".png"),
    ),
    scan=scan,
)

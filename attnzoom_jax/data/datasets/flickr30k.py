"""Flickr30k Entities: photographs with captions, and boxes for the phrases in them.

Plummer, Wang, Cervantes, Caicedo, Hockenmaier and Lazebnik, "Flickr30k Entities: Collecting
Region-to-Phrase Correspondences for Richer Image-to-Sentence Models", ICCV 2015 and IJCV 123, 2017;
the photographs and captions are those of Flickr30k (Young et al., TACL 2, 2014). Published: 31,783
images with five captions each, 1,000 of them in val and 1,000 in test. Terms: those of Flickr; the
photographs belong to their takers, and are for non-commercial research and education only.

    python tools/prepare_data.py flickr30k --from_archive=FOLDER

FOLDER, or an archive of it, holds Annotations/ and Sentences/ (which annotations.zip unpacks to),
train.txt, val.txt and test.txt, and the images in flickr30k-images/. A split is left out where none
of its images is there. Fields of an example:

- image: uint8 [h, w, 3], of different sizes
- phrases: of all captions, in order: `text`, such as "a brown dog"; `entity`, the number of its
  coreference chain; `types`, such as "animals" or "people/clothing"; `sentence`, from 0
- boxes: `box` int32 [y0, x0, y1, x1], half-open, in pixels, and the `entity` that it belongs to; an
  object of two entities comes twice, and so do objects that share an entity
- file_name: such as flickr30k-images/1000092795.jpg

The published corners are the first and the last pixel, counted from 1. A box that reaches beyond
the image is clipped to it, one that has no pixel in it left out, and both are told. Phrases without
a box are kept: they stand for a scene, for what is not to be seen, or are marked "notvisual".
"""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets.archive import Archive, ArchiveSet, Contents, half_open

SPLITS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
CORNERS = ("xmin", "ymin", "xmax", "ymax")
PHRASE = re.compile(r"\[/EN#(\d+)/(\S+) ([^\[\]]+)\]")


def scan(archive: Archive) -> Contents:
    """The examples of train, validation and test, where they are; see `ArchiveSet.scan`."""
    annotations = _folder(archive, "Annotations", ".xml")
    sentences = _folder(archive, "Sentences", ".txt")
    images = _folder(archive, "flickr30k-images", ".jpg")
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    notes: list[str] = []
    clipped: list[str] = []
    left_out: list[str] = []
    for split, list_name in SPLITS.items():
        path = archive.find(list_name)
        names = [name for (name,) in archive.table(path, str)] if path else []
        if not any(f"{images}{name}.jpg" in archive.names for name in names):
            missing = f"image of {list_name}" if names else list_name
            notes.append(f"{archive.path} holds no {missing}; the split {split} is left out")
            continue
        splits[split] = {
            f"{images}{name}.jpg": {
                "file_name": f"flickr30k-images/{name}.jpg",
                "phrases": _read_phrases(archive, f"{sentences}{name}.txt"),
                "boxes": _read_boxes(archive, f"{annotations}{name}.xml", clipped, left_out),
            }
            for name in names
        }
    if not splits:
        raise ValueError(f"{archive.path} holds no split: {'; '.join(notes)}")
    told = ("reach beyond the image and are clipped", "have no pixel in it and are left out")
    for problem, found in zip(told, (clipped, left_out), strict=True):
        if found:
            notes.append(f"boxes that {problem}: {len(found)}, such as {', '.join(found[:3])}")
    features = {
        "phrases": tfds.features.Sequence(
            {
                "text": tfds.features.Text(),
                "entity": tfds.features.Scalar(np.int32),
                "types": tfds.features.Text(),
                "sentence": tfds.features.Scalar(np.int32),
            }
        ),
        "boxes": tfds.features.Sequence(
            {
                "entity": tfds.features.Scalar(np.int32),
                "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
            }
        ),
        "file_name": tfds.features.Text(),
    }
    return Contents(splits, features, notes=tuple(notes))


def _folder(archive: Archive, name: str, ending: str) -> str:
    """The path of a folder that holds such files, with its slash; the shortest of several."""
    found = {path.rpartition("/")[0] for path in archive.names if path.endswith(ending)}
    folders = [folder for folder in found if f"/{folder}".endswith(f"/{name}")]
    if not folders:
        raise ValueError(
            f"{archive.path} holds no folder {name}/ with {ending} files; is it complete, and is "
            "its layout the official one?"
        )
    return f"{min(folders, key=lambda folder: (folder.count('/'), folder))}/"


def _read_phrases(archive: Archive, name: str) -> list[dict[str, Any]]:
    """The phrases of a file of captions, one caption per line."""
    phrases = []
    for sentence, line in enumerate(archive.text(name).splitlines()):
        found = PHRASE.findall(line)
        if len(found) != line.count("[/EN#"):
            raise ValueError(
                f"{archive.path}: line {sentence + 1} of {name} is {line[:60]!r}; expected phrases "
                "of the form [/EN#123/people a man]"
            )
        phrases += [
            {"text": text, "entity": int(entity), "types": types, "sentence": sentence}
            for entity, types, text in found
        ]
    return phrases


def _read_boxes(
    archive: Archive, name: str, clipped: list[str], left_out: list[str]
) -> list[dict[str, Any]]:
    """{entity, box} for each box and entity; what is cut or left out is added to the lists."""
    boxes = []
    text = archive.text(name)
    try:
        if "<!DOCTYPE" in text:  # entities that a document declares may grow without bound
            raise ValueError("it declares a DOCTYPE, which is not read")
        root = ElementTree.fromstring(text)
        height, width = (_number(root, f"size/{side}") for side in ("height", "width"))
        for thing in root.iter("object"):
            if thing.find("bndbox") is None:
                continue  # a scene, or not to be seen
            corners = [_number(thing, f"bndbox/{corner}") for corner in CORNERS]
            whole = half_open(*corners, first=1)
            box = np.clip(whole, 0, (height, width, height, width)).tolist()
            told = f"{name} ({', '.join(map(str, corners))} in {width} x {height})"
            if box[0] >= box[2] or box[1] >= box[3]:
                left_out.append(told)
                continue
            if tuple(box) != whole:
                clipped.append(told)
            boxes += [{"entity": int(e.text or ""), "box": box} for e in thing.findall("name")]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{archive.path}: {name} is no annotation ({error})") from error
    return boxes


def _number(element: ElementTree.Element, path: str) -> int:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"it has no {path}")
    return int(text)


FLICKR30K = ArchiveSet(
    archive="FOLDER",
    needs=(
        "a folder with Annotations/, Sentences/, train.txt, val.txt and test.txt of Flickr30k "
        "Entities, and the images of Flickr30k in flickr30k-images/"
    ),
    description=(
        "Photographs with captions, and boxes for the phrases in them (Plummer et al., Flickr30k "
        "Entities, 2015). Non-commercial research and education only."
    ),
    lists=(".txt", ".xml"),
    scan=scan,
)

"""Images with boxes in a local folder of PASCAL VOC's layout, or ImageNet's variant of it.

PASCAL VOC (Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010):

    FOLDER/ImageSets/Main/<split>.txt        a name per line; of dog_val.txt, those not marked -1
    FOLDER/ImageSets/Segmentation/<split>.txt       the split with segments, where it is there
    FOLDER/JPEGImages/<name>.jpg
    FOLDER/Annotations/<name>.xml            first and last pixel of each box, counted from 1
    FOLDER/SegmentationObject/<name>.png     segments: i on object i of the XML file, 255 unknown

ImageNet's localisation (Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge",
IJCV 2015):

    FOLDER/ImageSets/CLS-LOC/<split>.txt     a name and a number per line
    FOLDER/Data/CLS-LOC/<folder>/<name>.JPEG          or FOLDER/<folder>, FOLDER/JPEGImages
    FOLDER/Annotations/CLS-LOC/<folder>/<name>.xml    pixels counted from 0; <folder> is val of val
    FOLDER/LOC_synset_mapping.txt            the classes, a WordNet id and words per line; optional

The classes are those that have lists of their own (dog_val.txt) or stand in LOC_synset_mapping.txt,
else all that the split's files name, sorted: of the 1000 ImageNet classes that is their usual
order. Where all are of VOC's 20 they are those 20, in VOC's order.

An XML file with a DOCTYPE is not read: nothing official has one, and its entities may grow without
bounds.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from attnzoom_jax.data.datasets.annotated_folder import (
    AnnotatedFolder,
    Objects,
    rows_of_split,
    size_problem,
    split_name,
)
from attnzoom_jax.data.datasets.archive import half_open

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
SUFFIXES = (".jpg", ".JPEG", ".jpeg", ".png")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAPPING = "LOC_synset_mapping.txt"


def open_folder(folder: str, *, split: str, truth: str) -> AnnotatedFolder:
    """Open one split of a folder; images are read when they are asked for.

    Args:
        folder: FOLDER, see above.
        split: such as "test", "dog_val" or "val[:100]".
        truth: "boxes", or "segments": the masks too, of the images that have them.

    Returns:
        The images with their names and objects; "difficult" ones are hard.

    Raises:
        ValueError: no such folder, split or truth, or nothing in it.
    """
    root, base = pathlib.Path(folder).expanduser(), split_name(split)
    layout = _find_layout(root, base)
    if truth != "boxes" and not (truth == "segments" and (root / "SegmentationObject").is_dir()):
        raise ValueError(f"{root} has no {truth}; segments would be in {root}/SegmentationObject")
    ids = _read_list(layout, base, truth)
    names, shown = _find_classes(root, layout, base, ids)
    ids = ids[rows_of_split(split, len(ids))]
    reader = _Reader(
        root=root,
        ids=ids,
        annotations=layout.annotations,
        first=layout.first,
        labels={name: label for label, name in enumerate(names)},
        has_masks=truth == "segments",
    )
    files = [_find_image(layout.images, name) for name in ids]
    return AnnotatedFolder(class_names=shown, files=files, read_objects=reader)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where lists, annotations and images are, and how the first pixel is counted."""

    lists: pathlib.Path
    annotations: pathlib.Path
    images: pathlib.Path
    first: int


def _find_layout(root: pathlib.Path, base: str) -> _Layout:
    if not root.is_dir():
        raise ValueError(f"data.dir: there is no folder {root}")
    voc, imagenet = root / "ImageSets/Main", root / "ImageSets/CLS-LOC"
    if voc.is_dir():
        return _Layout(voc, root / "Annotations", root / "JPEGImages", first=1)
    if not imagenet.is_dir():
        raise ValueError(
            f"{root} has neither ImageSets/Main (PASCAL VOC, as in VOCdevkit/VOC2007) nor "
            "ImageSets/CLS-LOC (ImageNet); is data.dir one level too high or too low?"
        )
    folder = base.partition("_")[0]  # the lists train_loc and train_cls are of the folder train
    places = (root / "Data/CLS-LOC" / folder, root / folder, root / "JPEGImages")
    images = next((place for place in places if place.is_dir()), None)
    if images is None:
        raise ValueError(f"there is no folder of images: {', '.join(map(str, places))}")
    return _Layout(imagenet, root / "Annotations/CLS-LOC" / folder, images, first=0)


def _read_list(layout: _Layout, base: str, truth: str) -> list[str]:
    """The names of the split's images."""
    path = layout.lists / f"{base}.txt"
    of_segments = layout.lists.parent / "Segmentation" / path.name
    path = of_segments if truth == "segments" and of_segments.exists() else path
    if not path.exists():
        known = ", ".join(sorted(found.stem for found in layout.lists.glob("*.txt"))[:12])
        raise ValueError(f"split {base!r}: there is no {path}; there is: {known or 'nothing'}")
    lines = [line.split() for line in path.read_text().splitlines()]
    return [words[0] for words in lines if words and words[1:] != ["-1"]]


def _find_classes(
    root: pathlib.Path, layout: _Layout, base: str, ids: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What classes are called in the files, and what they are shown as."""
    mapping = next((p for p in (root / MAPPING, root.parent / MAPPING) if p.exists()), None)
    if layout.first == 0 and mapping:
        lines = [line.partition(" ") for line in mapping.read_text().splitlines() if line.strip()]
        return tuple(line[0] for line in lines), tuple(line[2].strip() for line in lines)
    names = set()
    for path in layout.lists.glob(f"*_{base}.txt"):
        if len(path.read_text().partition("\n")[0].split()) == 2:  # a name and 1, 0 or -1
            names.add(path.stem.removesuffix(f"_{base}"))
    for name in [] if names else ids:
        try:
            names |= {found for found, *_ in _parse(layout.annotations / f"{name}.xml")[1]}
        except (OSError, ValueError):
            continue  # the image's turn comes, and then it is named
    if not names:
        raise ValueError(f"{layout.annotations} names no class for any image of {base!r}")
    ordered = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    return ordered, ordered


def _find_image(folder: pathlib.Path, name: str) -> pathlib.Path:
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.exists()), paths[0])


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the objects of image i."""

    root: pathlib.Path
    ids: Sequence[str]
    annotations: pathlib.Path
    first: int
    labels: dict[str, int]
    has_masks: bool

    def __call__(self, position: int, size: tuple[int, int]) -> Objects:
        name = self.ids[position]
        path = self.annotations / f"{name}.xml"
        segments = self.root / "SegmentationObject" / f"{name}.png"
        try:
            told, things = _parse(path)
            ids = _read_segments(segments, size) if self.has_masks else None
        except FileNotFoundError as error:
            return Objects(problems=(("no_annotation", f"{name}: no {error.filename}"),))
        except (OSError, ValueError) as error:
            return Objects(problems=(("bad_annotation", f"{name}: {error}"),))
        wrong = size_problem(name, told, size) if told else None
        if wrong:
            return Objects(problems=(wrong,))
        known = [i for i, thing in enumerate(things) if thing[0] in self.labels]
        problems = tuple(
            ("unknown_class", f"{name}: an object of class {thing[0]!r} is left out")
            for thing in things
            if thing[0] not in self.labels
        )
        return Objects(
            labels=[self.labels[things[i][0]] for i in known],
            boxes=[half_open(*things[i][1], first=self.first) for i in known],
            is_hard=[things[i][2] for i in known],
            # The number of an object in the PNG file is its place in the XML file.
            masks=None if ids is None else ids == np.array(known, int)[:, None, None] + 1,
            problems=problems,
        )


def _parse(path: pathlib.Path) -> tuple[tuple[int, int] | None, list[tuple[str, Any, bool]]]:
    """(height, width) where it is told; name, x0, y0, x1, y1 as written, and difficult of each."""
    content = path.read_bytes()
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_WithoutDoctype()))
        things = []
        for thing in root.iterfind("object"):
            name = _text(thing, "name")
            box = tuple(float(_text(thing, f"bndbox/{corner}")) for corner in CORNERS)
            things.append((name, box, thing.findtext("difficult", "").strip() == "1"))
        height, width = (int(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    return (height, width) if height and width else None, things


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, *_: Any) -> None:
        raise ValueError("it has a DOCTYPE, which is not read")


def _text(thing: ElementTree.Element, name: str) -> str:
    text = (thing.findtext(name) or "").strip()
    if not text:
        raise ValueError(f"an object without {name}")
    return text


def _read_segments(path: pathlib.Path, size: tuple[int, int]) -> np.ndarray:
    """The numbers of the objects, [h, w]."""
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.asarray(image)  # numbers, not the colours they are shown in
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if mode not in ("P", "L") or ids.shape != size:
        raise ValueError(
            f"{path} is {mode}, {' x '.join(map(str, ids.shape[:2]))}; expected a palette or grey "
            f"image of {size[0]} x {size[1]}"
        )
    return ids

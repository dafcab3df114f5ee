"""Images with boxes or masks of what they show, from prepared sets and from local folders.

Every example is checked: what is wrong with it stands in its `problems`, pairs of a kind and a line
that names the image, so that whoever scores can count them.

    unreadable_image    the image is a black pixel, without objects
    no_annotation       there is none for this image (voc_folder)
    bad_annotation      it cannot be read: of the whole image (voc_folder) or one object
    other_size          it is of an image of another size: without objects
    unknown_class       an object is left out
    empty_box           a box outside of the image, or that holds no pixel: the object is left out
    empty_mask          a segment or part without pixels: the object is left out
    clipped_box         it reaches more than a pixel beyond the image, and is clipped; less is how
                        people count
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets import coco_folder, voc_folder
from attnzoom_jax.data.datasets.annotated_folder import BLACK, Objects, unreadable
from attnzoom_jax.data.source import Source, data_root, open_builder, open_source
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.ops import boxes as ops_boxes

TRUTHS = ("boxes", "segments", "parts")
FOLDERS = {"coco_folder": coco_folder.open_folder, "voc_folder": voc_folder.open_folder}
NAMES = ("file_name", "image/filename")  # fields

Raw = tuple[np.ndarray, str, Objects]  # image, name, what is annotated

_BEYOND = 1.0  # pixels


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which fields of a prepared set hold what; "" where it has no such.

    Attributes:
        boxes: [y0, x0, y1, x1]: a TFDS BBoxFeature, shares of the image, or else pixels.
        objects: the field that is a sequence of objects; boxes, is_hard and label are looked for in
            it. Without one the example is its only object.
        is_hard: whether an object is one that evaluations leave out.
        first: 1 where a box was divided as first and last pixel, counted from 1.
        segments: mask [h, w, 1] of the only object.
        parts: mask of the part that decides its class.
        inside: the lowest value of a mask that counts as inside.
    """

    boxes: str = ""
    objects: str = ""
    is_hard: str = ""
    first: int = 0
    segments: str = ""
    parts: str = ""
    inside: int = 1


# By the name of the set, without its config. What is not here may have `box` or `bbox`,
# `object_mask` and `part_mask`: so have cub200, tiny_imagenet, fine_shapes (of its labelled object)
# and others.
LAYOUTS = {
    "caltech_birds2011": Layout(boxes="bbox", segments="segmentation_mask", inside=128),
    "coco": Layout(objects="objects", boxes="bbox"),
    "stanford_dogs": Layout(objects="objects", boxes="bbox"),
    "voc": Layout(objects="objects", boxes="bbox", is_hard="is_difficult", first=1),
}


def open_annotated(data: Any, *, split: str, truth: str = "boxes") -> Source:
    """Open one split of a set with boxes or masks.

    TFDS's coco has no segments; the pointing game is played on them, see coco_folder. In both,
    crowds count like any object.

    Args:
        data: the config's `data` section. `data.name` is a prepared set, as of `open_source`, or
            "voc_folder" or "coco_folder"; then `data.dir` is the folder, see those files.
        split: of the data set, or a slice of it.
        truth: "boxes"; "segments", the masks of the objects; or "parts", of what decides the class.

    Returns:
        The source. An example has

        - image: uint8 [h, w, 3], as stored
        - labels: int32 [p], places in `class_names`
        - boxes: float32 [p, 4], half-open, in pixels, inside of the image: those of the set; tight
          around the masks where it has none, and around the parts if those are the truth
        - is_hard: bool [p], VOC's "difficult"
        - masks: bool [p, h, w], of segments and parts
        - name: of the file, or such as "test[17]"
        - problems: see above; () when all is well.

    Raises:
        ValueError: as `open_source`; unknown truth, or one that the set does not have.
    """
    if truth not in TRUTHS:
        raise unknown_name("truth", truth, TRUTHS)
    if data.name in FOLDERS:
        folder = FOLDERS[data.name](data.dir, split=split, truth=truth)
        source = Source(f"{data.name}:{split}", folder.class_names, (None, None, 3), ())
        read: Sequence[Raw] = folder
    else:
        source, read = _open_prepared(data.name, data.dir, split, truth)
    has_masks = truth != "boxes"
    return dataclasses.replace(source, examples=_Checked(read, source.class_names, has_masks))


def _open_prepared(
    name: str, data_dir: str, split: str, truth: str
) -> tuple[Source, Sequence[Raw]]:
    all_features: Any = open_builder(name, data_root(data_dir)).info.features
    features: dict[str, Any] = dict(all_features.items())
    layout = LAYOUTS.get(name.partition("/")[0]) or Layout(
        boxes="box" if "box" in features else "bbox", segments="object_mask", parts="part_mask"
    )
    sequence = features.get(layout.objects)
    within = dict(sequence.feature.items()) if sequence else {} if layout.objects else features
    masks = {truth: getattr(layout, truth) for truth in ("segments", "parts")}
    has = {truth: field in features for truth, field in masks.items()}
    has_boxes = layout.boxes in within
    has["boxes"] = has_boxes or has["segments"]
    if not has[truth]:
        found = " and ".join(known for known in TRUTHS if has[known]) or "none of these"
        raise ValueError(
            f"{name} has no {truth}, it has {found}; its fields are {', '.join(sorted(features))}. "
            "Fields of other names need a line in LAYOUTS, data/annotated.py"
        )
    label: Any = within.get("label", features.get("label"))
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(f"the label of {name} is {label}; expected a ClassLabel")
    kind: Any = within.get(layout.boxes)
    is_share = isinstance(kind, tfds.features.BBoxFeature)
    usual = tfds.features.BBoxFeature().bbox_format
    if is_share and kind.bbox_format not in (None, usual):
        raise ValueError(f"the boxes of {name} are {kind.bbox_format}; expected {usual}")
    mask = masks["segments"] if truth == "boxes" and not has_boxes else masks.get(truth, "")
    wanted = ["image", "label", layout.objects or layout.boxes, mask, *NAMES]
    fields = [field for field in wanted if field in features]
    source = open_source(name, split=split, data_dir=data_dir, fields=fields)
    reader = _Prepared(
        examples=source.examples,
        split=split,
        layout=layout,
        boxes=layout.boxes if has_boxes and truth != "parts" else "",
        is_share=is_share,
        mask=mask,
    )
    return dataclasses.replace(source, class_names=tuple(label.names)), reader


@dataclasses.dataclass(frozen=True)
class _Prepared(Sequence[Raw]):
    """Examples of a prepared set; boxes and mask are the fields to read, "" for none."""

    examples: Sequence[dict[str, Any]]
    split: str
    layout: Layout
    boxes: str
    is_share: bool
    mask: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Raw:
        position = range(len(self))[index]
        name = f"{self.split}[{position}]"
        try:
            example = self.examples[position]
        except ValueError as error:
            return BLACK, name, unreadable(error)
        name = next((example[field].decode() for field in NAMES if field in example), name)
        return example["image"], name, self._objects(example, name)

    def _objects(self, example: dict[str, Any], name: str) -> Objects:
        size = example["image"].shape[:2]
        things = example[self.layout.objects] if self.layout.objects else example
        masks = None
        if self.mask:
            masks = np.asarray(example[self.mask])[None, ..., 0] >= self.layout.inside
            if masks.shape[1:] != size:
                text = f"{name} has {size} pixels, its {self.mask} {masks.shape[1:]}; left out"
                return Objects(problems=(("other_size", text),))
        if self.boxes:
            boxes = np.asarray(things[self.boxes], np.float64).reshape(-1, 4)
            if self.is_share:  # in float32: whole numbers shall be whole again
                boxes = np.round(boxes * [*size, *size], 3)
            boxes = boxes - [self.layout.first, self.layout.first, 0, 0]
        else:
            assert masks is not None
            boxes = np.array([_tight(mask) for mask in masks])
        label = (things if "label" in things else example)["label"]
        labels = np.broadcast_to(label, len(boxes))
        is_hard = np.broadcast_to(things.get(self.layout.is_hard, False), len(boxes))
        return Objects(labels=labels, boxes=boxes, is_hard=is_hard, masks=masks)


def _tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if len(rows) else (0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class _Checked(Sequence[dict[str, Any]]):
    """Examples as `open_annotated` returns them."""

    read: Sequence[Raw]
    class_names: tuple[str, ...]
    has_masks: bool

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        image, name, objects = self.read[index]
        height, width = image.shape[:2]
        labels = np.array(objects.labels, np.int32)
        boxes = np.array(objects.boxes, np.float64).reshape(-1, 4)
        inside = np.clip(boxes, 0, [height, width, height, width]).astype(np.float32)
        first, last = ops_boxes.pixel_range(inside)
        is_empty: np.ndarray = ~(last >= first).all(axis=1)  # NaN too
        is_far = np.abs(inside - boxes).max(axis=1) > _BEYOND
        is_kept = np.ones(len(boxes), bool)
        problems = list(objects.problems)
        for i, label in enumerate(labels):
            if not 0 <= label < len(self.class_names):
                found = "unknown_class", f"an object has label {label}; it is left out"
            elif objects.masks is not None and not objects.masks[i].any():
                found = "empty_mask", f"a {self.class_names[label]} has no pixel; it is left out"
            elif is_empty[i] or is_far[i]:
                box = ", ".join(f"{corner:g}" for corner in boxes[i])
                what = "holds no pixel" if is_empty[i] else "reaches outside"
                text = f"the box [{box}] of a {self.class_names[label]} {what} of the {height} x "
                text += f"{width} image; it is {'left out' if is_empty[i] else 'clipped'}"
                found = "empty_box" if is_empty[i] else "clipped_box", text
            else:
                continue
            is_kept[i] = found[0] == "clipped_box"
            problems.append((found[0], f"{name}: {found[1]}"))
        example = {
            "image": image,
            "labels": labels[is_kept],
            "boxes": inside[is_kept],
            "is_hard": np.array(objects.is_hard, bool)[is_kept],
            "name": name,
            "problems": tuple(problems),
        }
        if self.has_masks:  # there are none where a problem left no object
            masks = np.zeros((0, height, width), bool) if objects.masks is None else objects.masks
            example["masks"] = masks[is_kept]
        return example

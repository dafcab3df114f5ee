"""Boxes and masks of prepared sets, in the layouts of TFDS and of our own, and what is reported."""

import io
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnzoom_jax.data.annotated import open_annotated
from attnzoom_jax.data.datasets import fine_shapes
from attnzoom_jax.data.datasets.annotated_folder import rows_of_split
from attnzoom_jax.data.source import open_source
from tests.data import tfds_sets
from tests.data.test_source import LABEL, Things, build_things, png

BBox = tfds.features.BBox
BOX = tfds.features.Tensor(shape=(4,), dtype=np.float32)
MASK = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
PHOTO = np.zeros((20, 30, 3))


def data(name, folder):
    return types.SimpleNamespace(name=name, dir=str(folder))


def read(name, folder, split="train", truth="boxes"):
    source = open_annotated(data(name, folder), split=split, truth=truth)
    return {example["name"]: example for example in source}


def kinds(example):
    return [kind for kind, _ in example["problems"]]


# Layouts


def voc_object(label, box, *, is_difficult=False):
    ymin, xmin, ymax, xmax = box  # as TFDS divides them: first and last pixel, counted from 1
    return {
        "label": label,
        "bbox": BBox(ymin / 20, xmin / 30, ymax / 20, xmax / 30),
        "pose": "unspecified",
        "is_truncated": False,
        "is_difficult": is_difficult,
    }


def test_voc_of_tfds(tmp_path):
    objects = [
        voc_object("dog", (1, 1, 20, 30)),
        voc_object("aeroplane", (7, 3, 7, 11), is_difficult=True),
    ]
    examples = [
        {
            "image": tfds_sets.image((20, 30, 3)),
            "image/filename": f"{i}.jpg",
            "objects": of,
            "labels": [],
            "labels_no_difficult": [],
        }
        for i, of in enumerate((objects, []))
    ]
    tfds_sets.prepare("voc", {"test": examples}, tmp_path)
    found = read("voc", tmp_path, "test")
    first, empty = found["0.jpg"], found["1.jpg"]
    assert first["image"].shape == (20, 30, 3) and first["image"].dtype == np.uint8
    # Half-open: the whole image, and one row of nine pixels.
    np.testing.assert_array_equal(first["boxes"], [[0, 0, 20, 30], [6, 2, 7, 11]])
    np.testing.assert_array_equal(first["labels"], [11, 0])
    np.testing.assert_array_equal(first["is_hard"], [False, True])
    assert (first["boxes"].dtype, first["labels"].dtype) == (np.float32, np.int32)
    assert "masks" not in first
    assert (empty["boxes"].shape, empty["labels"].shape) == ((0, 4), (0,))
    assert first["problems"] == empty["problems"] == ()
    source = open_annotated(data("voc/2007", tmp_path), split="test[:1]")
    assert (len(source), source.class_names[11]) == (1, "dog")
    with pytest.raises(ValueError, match=r"voc/2007 has no segments, it has boxes; its fields are"):
        open_annotated(data("voc/2007", tmp_path), split="test", truth="segments")


class Coco(Things, skip_registration=True):
    """The name of TFDS's own, whose features cannot be made without TensorFlow."""


def test_coco_of_tfds(tmp_path):
    thing = {
        "id": np.int64,
        "area": np.int64,
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(names=["person", "bicycle"]),
        "is_crowd": np.bool_,
    }
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(thing),
    }
    x, y, width, height = 3.25, 1.5, 20.5, 10.0
    box = BBox(y / 20, x / 30, (y + height) / 20, (x + width) / 30)
    objects = [
        {"id": 7, "area": 9, "bbox": box, "label": 1, "is_crowd": False},
        {"id": 8, "area": 9, "bbox": BBox(0.0, 0.0, 1.0, 1.0), "label": 0, "is_crowd": True},
    ]
    example = {"image": tfds_sets.image((20, 30, 3)), "image/filename": "a.jpg", "image/id": 1}
    builder = Coco(
        features,
        [{**example, "objects": objects}],
        data_dir=tmp_path,
        file_format="array_record",
    )
    builder.download_and_prepare()
    found = read("coco", tmp_path)["a.jpg"]
    np.testing.assert_array_equal(found["boxes"], [[1.5, 3.25, 11.5, 23.75], [0, 0, 20, 30]])
    np.testing.assert_array_equal(found["labels"], [1, 0])
    np.testing.assert_array_equal(found["is_hard"], [False, False])  # crowds count
    assert open_annotated(data("coco", tmp_path), split="train").class_names == (
        "person",
        "bicycle",
    )


def test_caltech_birds_of_tfds(tmp_path):
    birds = tfds_sets.birds(2)
    votes = np.zeros((20, 30, 1), np.uint8)
    votes[3:6, 4:9] = 153  # three of five people
    votes[10:12, 4:9] = 102
    birds[0]["segmentation_mask"] = png(votes[..., 0])
    tfds_sets.prepare("caltech_birds2011", {"test": birds}, tmp_path)
    found = read("caltech_birds2011", tmp_path, "test", "segments")
    first = found[birds[0]["image/filename"]]
    np.testing.assert_array_equal(first["boxes"], [[2, 6, 18, 30]])
    np.testing.assert_array_equal(first["masks"], votes[None, ..., 0] == 153)
    np.testing.assert_array_equal(first["labels"], [0])


def test_stanford_dogs_of_tfds(tmp_path):
    tfds_sets.prepare_photos("stanford_dogs", tmp_path, count=2)
    source = open_annotated(data("stanford_dogs", tmp_path), split="test")
    for example in source:
        name = example["name"].split("/")[1]
        assert [source.class_names[label] for label in example["labels"]] == [name] * len(
            example["boxes"]
        )
    assert sorted(len(example["boxes"]) for example in source) == [1, 2]


def test_the_labelled_object_of_fine_shapes(shapes_dir):
    fields = ("image", "label", "objects", "object_ids", "part_ids", "attribute_bits")
    whole = open_source("fine_shapes/mini", split="test", data_dir=shapes_dir, fields=fields)
    for truth in ("boxes", "segments", "parts"):
        source = open_annotated(data("fine_shapes/mini", shapes_dir), split="test", truth=truth)
        assert source.class_names == whole.class_names
        for i, (example, stored) in enumerate(zip(source, whole, strict=True)):
            expected = fine_shapes.annotations(stored)
            boxes, masks = ("boxes", "object_masks")
            if truth == "parts":
                boxes, masks = ("part_boxes", "part_masks")
            np.testing.assert_array_equal(example["boxes"], expected[boxes][:1])
            np.testing.assert_array_equal(example["labels"], expected["labels"][:1])
            np.testing.assert_array_equal(example["image"], stored["image"])
            assert (example["name"], example["problems"]) == (f"test[{i}]", ())
            if truth == "boxes":
                assert "masks" not in example
            else:
                np.testing.assert_array_equal(example["masks"], expected[masks][:1])


@pytest.mark.parametrize(
    "field, kind, box",
    [
        ("box", tfds.features.Tensor(shape=(4,), dtype=np.int32), [2, 3, 9, 8]),
        ("bbox", tfds.features.BBoxFeature(), BBox(2 / 20, 3 / 30, 9 / 20, 8 / 30)),
    ],
)
def test_a_set_of_no_known_name(tmp_path, field, kind, box):
    mask = np.zeros((20, 30))
    mask[4:6, 5:7] = 1
    features = {"image": tfds.features.Image(), "label": LABEL, field: kind, "object_mask": MASK}
    example = {"image": png(PHOTO), "label": 1, field: box, "object_mask": png(mask)}
    build_things(tmp_path, features, [example])
    for truth in ("boxes", "segments"):
        found = read("things", tmp_path, truth=truth)["train[0]"]
        np.testing.assert_array_equal(found["boxes"], [[2, 3, 9, 8]])
        np.testing.assert_array_equal(found["labels"], [1])
    np.testing.assert_array_equal(found["masks"][0], mask == 1)
    with pytest.raises(ValueError, match=r"things has no parts, it has boxes and segments; its fi"):
        open_annotated(data("things", tmp_path), split="train", truth="parts")


def test_a_set_without_boxes(tmp_path):
    build_things(
        tmp_path,
        {"image": tfds.features.Image(), "label": LABEL},
        [{"image": png(PHOTO), "label": 0}],
    )
    with pytest.raises(ValueError, match=r"things has no boxes, it has none of these; its fields"):
        open_annotated(data("things", tmp_path), split="train")
    with pytest.raises(ValueError, match=r"unknown truth 'box'; did you mean 'boxes'"):
        open_annotated(data("things", tmp_path), split="train", truth="box")


def test_boxes_in_another_order(tmp_path):
    kind = tfds.features.BBoxFeature(bbox_format="REL_XYXY")
    features = {"image": tfds.features.Image(), "label": LABEL, "bbox": kind}
    box = np.array([0.1, 0.2, 0.5, 0.6])
    build_things(tmp_path, features, [{"image": png(PHOTO), "label": 1, "bbox": box}])
    with pytest.raises(ValueError, match=r"boxes of things are .*REL_XYXY; expected .*REL_YXYX"):
        open_annotated(data("things", tmp_path), split="train")


# What is wrong is named


@pytest.mark.parametrize(
    "box, expected, kind",
    [
        ([2, 3, 9, 8], [2, 3, 9, 8], None),
        ([-1, 3, 21, 8], [0, 3, 20, 8], None),  # a pixel beyond is how people count
        ([-1.5, 3, 9, 8], [0, 3, 9, 8], "clipped_box"),
        ([2, 3, 9, 500], [2, 3, 9, 30], "clipped_box"),
        ([2, 30, 9, 40], None, "empty_box"),
        ([-9, 3, -2, 8], None, "empty_box"),
        ([9, 3, 2, 8], None, "empty_box"),
        ([2, 3, 9, 3], None, "empty_box"),
        ([2, 3.6, 9, 4.4], None, "empty_box"),  # between the centres of pixels 3 and 4
        ([2, 3.4, 9, 4.4], [2, 3.4, 9, 4.4], None),
        ([2, np.nan, 9, 8], None, "empty_box"),
        ([2, 3, np.inf, 8], [2, 3, 20, 8], "clipped_box"),
    ],
)
def test_boxes_outside_and_empty(tmp_path, box, expected, kind):
    features = {"image": tfds.features.Image(), "label": LABEL, "box": BOX}
    examples = [
        {"image": png(PHOTO), "label": 1, "box": np.array(b, np.float32)}
        for b in ([0, 0, 20, 30], box)
    ]
    build_things(tmp_path, features, examples)
    example = read("things", tmp_path)["train[1]"]
    wanted = np.array([] if expected is None else [expected], np.float32).reshape(-1, 4)
    np.testing.assert_array_equal(example["boxes"], wanted)
    assert len(example["labels"]) == len(example["is_hard"]) == len(wanted)
    assert kinds(example) == ([kind] if kind else [])
    for _, text in example["problems"]:
        assert text.startswith("train[1]: the box [") and "20 x 30" in text and "\n" not in text


def test_an_empty_mask_and_one_of_another_size(tmp_path):
    features = {"image": tfds.features.Image(), "label": LABEL, "object_mask": MASK}
    masks = [np.ones((20, 30)), np.zeros((20, 30)), np.ones((20, 31))]
    examples = [{"image": png(PHOTO), "label": 1, "object_mask": png(mask)} for mask in masks]
    build_things(tmp_path, features, examples)
    for truth in ("segments", "boxes"):
        found = list(read("things", tmp_path, truth=truth).values())
        assert [kinds(example) for example in found] == [[], ["empty_mask"], ["other_size"]]
        assert [len(example["boxes"]) for example in found] == [1, 0, 0]
        assert all(example["problems"][0][1].startswith("train[") for example in found[1:])
    np.testing.assert_array_equal(found[0]["boxes"], [[0, 0, 20, 30]])


def test_an_unreadable_image_and_an_unknown_label(tmp_path):
    features = {"image": tfds.features.Image(), "label": LABEL, "box": BOX}
    box = np.array([0, 0, 5, 5], np.float32)

    examples = [
        {"image": io.BytesIO(b"no image"), "label": 1, "box": box},
        {"image": png(PHOTO), "label": -1, "box": box},
    ]
    build_things(tmp_path, features, examples)
    found = read("things", tmp_path)
    broken, unknown = found["train[0]"], found["train[1]"]
    assert kinds(broken) == ["unreadable_image"]
    assert "example 0 of things:train" in broken["problems"][0][1]
    np.testing.assert_array_equal(broken["image"], np.zeros((1, 1, 3)))
    assert broken["boxes"].shape == (0, 4) and broken["labels"].shape == (0,)
    assert kinds(unknown) == ["unknown_class"] and len(unknown["labels"]) == 0


@pytest.mark.parametrize("name", ["val", "all", "val2014"])
def test_a_slice_of_a_list_of_any_name(name):
    assert range(20)[rows_of_split(f"{name}[10%:50%]", 20)] == range(2, 10)
    assert range(3)[rows_of_split(name, 3)] == range(3)

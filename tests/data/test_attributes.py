"""Attributes as labels: what they are in each kind of data set, and what is refused."""

import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder as celeb_a

from attnzoom_jax.data.attributes import open_attributes
from attnzoom_jax.data.datasets.fine_shapes import annotations
from attnzoom_jax.data.datasets.fine_shapes_renderer import ATTRIBUTES
from attnzoom_jax.data.device import load_split
from attnzoom_jax.data.pipeline import Resize, eval_batches, train_batches
from attnzoom_jax.data.source import open_source
from attnzoom_jax.data.split import open_split
from tests.data import tfds_sets
from tests.data.test_source import LABEL, build_things, png


def data(name, folder="", **changes):
    settings = {"name": name, "dir": str(folder), "patches": "", "labels": "attributes"}
    return types.SimpleNamespace(**{**settings, **changes})


def first_batch(source, resize=None):
    return next(train_batches(source, batch_size=4, seed=0, resize=resize, num_threads=0))


# What is read


def test_those_of_fine_shapes_are_of_the_labelled_object():
    source = open_split(data("fine_shapes/tiny"), split="test")
    fields = ("objects", "object_ids", "part_ids", "attribute_bits", "image", "label")
    whole = open_source("fine_shapes/tiny", split="test", fields=fields)
    assert source.class_names == ATTRIBUTES
    for found, example in zip(source, whole, strict=True):
        assert set(found) == {"image", "label"}
        assert found["label"].dtype == np.float32
        np.testing.assert_array_equal(found["label"], annotations(example)["attributes"][0])
        np.testing.assert_array_equal(found["image"], example["image"])
        family, mark = whole.class_names[int(example["label"])].split("_")
        assert found["label"][[ATTRIBUTES.index(family), ATTRIBUTES.index(mark)]].all()


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder with celeb_a as TFDS prepares it, its attributes, and its images as files."""
    folder = tmp_path_factory.mktemp("faces")
    values = np.random.default_rng(0).integers(0, 2, (6, 40)).astype(bool)
    files = [tfds_sets.image((218, 178, 3), seed=i) for i in range(6)]
    examples = [
        {
            "image": files[i],
            "attributes": dict(zip(celeb_a.ATTR_HEADINGS, values[i].tolist(), strict=True)),
            "landmarks": dict.fromkeys(celeb_a.LANDMARK_HEADINGS, i),
            "identity": {"Identity_No": i},
        }
        for i in range(6)
    ]
    splits = {"train": examples[:4], "validation": examples[4:5], "test": examples[5:]}
    tfds_sets.prepare("celeb_a", splits, folder)
    return folder, values


def test_those_of_celeb_a_are_in_their_published_order(faces):
    folder, values = faces
    found = {}
    for split in ("train", "validation", "test"):
        source = open_split(data("celeb_a", folder), split=split, fields=("label", "identity"))
        assert source.class_names == tuple(celeb_a.ATTR_HEADINGS)
        assert source.image_shape == (218, 178, 3)
        found |= {int(e["identity"]["Identity_No"]): (split, e["label"]) for e in source}
    assert [found[i][0] for i in range(6)] == ["train"] * 4 + ["validation", "test"]
    np.testing.assert_array_equal([found[i][1] for i in range(6)], values)


def test_images_of_celeb_a_make_batches(faces):
    folder, values = faces
    source = open_split(data("celeb_a", folder), split="train")
    batch = first_batch(source)
    assert batch["image"].shape == (4, 218, 178, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4, 40) and batch["label"].dtype == np.float32
    assert sorted(map(tuple, batch["label"])) == sorted(map(tuple, values[:4].astype(float)))
    assert first_batch(source, Resize("crop", 64))["image"].shape == (4, 64, 64, 3)


def test_batches_of_both_data_paths_are_the_same():
    source = open_split(data("fine_shapes/tiny"), split="test[:10]")
    whole = load_split(source, num_threads=0)
    batches = list(eval_batches(source, batch_size=8, num_threads=0))
    labels = np.concatenate([batch["label"] for batch in batches])
    assert labels.shape == (16, 13) and whole["label"].dtype == np.float32
    np.testing.assert_array_equal(labels[:10], whole["label"])
    assert not labels[10:].any()


def test_celeb_a_has_no_classes(faces):
    with pytest.raises(ValueError, match="unknown field of celeb_a 'label'"):
        open_split(data("celeb_a", faces[0], labels="label"), split="train")


def test_a_vector_without_names_has_numbers(tmp_path):
    vector = tfds.features.Tensor(shape=(3,), dtype=np.int64)
    build_things(tmp_path, {"attributes": vector}, [{"attributes": [0, 1, 1]}])
    source = open_attributes("things", split="train", data_dir=str(tmp_path), fields=("label",))
    assert source.class_names == ("attribute_1", "attribute_2", "attribute_3")
    np.testing.assert_array_equal(source[0]["label"], [0, 1, 1])
    assert source.image_shape == ()


def test_no_more_images_are_decoded_than_asked_for(monkeypatch):
    decoded = []
    original = image_feature.cv2.imdecode
    monkeypatch.setattr(
        image_feature.cv2, "imdecode", lambda *args: decoded.append(1) or original(*args)
    )
    for fields, count in ((("label",), 0), (("image",), 1), (("image", "label", "part_mask"), 2)):
        decoded.clear()
        example = open_split(data("fine_shapes/tiny"), split="test", fields=fields)[0]
        assert tuple(example) == fields
        assert len(decoded) == count


# What is refused


def test_unknown_labels_are_named():
    with pytest.raises(ValueError, match=r"unknown data.labels 'attribute'; did you mean 'attribu"):
        open_split(data("fine_shapes/tiny", labels="attribute"), split="test")


def test_a_set_without_attributes_is_told(tmp_path):
    build_things(
        tmp_path,
        {"image": tfds.features.Image(), "label": LABEL},
        [{"image": png(np.zeros((2, 2, 3))), "label": 0}],
    )
    with pytest.raises(ValueError, match=r"things has none .* its fields are image, label$"):
        open_split(data("things", tmp_path), split="train")


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        (tfds.features.FeaturesDict({"a": np.int64}), {"a": 1}, r"they are .*'a': int64"),
        (tfds.features.FeaturesDict({"a": {"b": np.bool_}}), {"a": {"b": True}}, "they are"),
        (tfds.features.Tensor(shape=(2, 2), dtype=np.uint8), np.eye(2, dtype=np.uint8), r"2, 2"),
        (tfds.features.Text(), "striped", r"they are Text"),
    ],
)
def test_attributes_of_another_kind_are_told(tmp_path, feature, value, message):
    build_things(tmp_path, {"attributes": feature}, [{"attributes": value}])
    with pytest.raises(ValueError, match=message) as error:
        open_split(data("things", tmp_path), split="train", fields=("label",))
    assert "\n" not in str(error.value)


def test_attributes_other_than_0_and_1_are_told(tmp_path):
    vector = tfds.features.Tensor(shape=(2,), dtype=np.int64)
    build_things(tmp_path, {"attributes": vector}, [{"attributes": [-1, 1]}])
    source = open_split(data("things", tmp_path), split="train", fields=("label",))
    with pytest.raises(ValueError, match=r"example 0 of things:train .*\[-1\. +1\.\]"):
        source[0]

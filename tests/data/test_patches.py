"""Precomputed boxes find their images, whatever the order in which a set is stored."""

import types

import numpy as np
import pytest

from attnzoom_jax.data.datasets import image_folder
from attnzoom_jax.data.pipeline import Resize, train_batches
from attnzoom_jax.data.split import open_split
from tests.data import tfds_sets
from tests.data.official_archives import photo


@pytest.fixture
def prepared(tmp_path):
    """12 images of 2 classes as a prepared set, and boxes of which each tells its image."""
    paths = sorted(f"train/{'ab'[i % 2]}/{i}.jpg" for i in range(12))
    for i, path in enumerate(paths):
        photo(tmp_path / "photos" / path, size=(9, 12), seed=i)
    folder = image_folder.scan(tmp_path / "photos")
    image_folder.build(folder, "photos", data_dir=tmp_path / "sets")
    rows = np.zeros((12, 2, 5))
    for i, path in enumerate(paths):
        rows[i] = [[i, i + 10, 2 * i, 448, "ab".index(path[6])], [0, 448, 0, 448, i >= 6]]
    np.save(tmp_path / "train_patches.npy", rows)
    return tmp_path, paths, rows


def data(tmp_path, **changes):
    settings = {"name": "photos", "dir": str(tmp_path / "sets"), "patches": str(tmp_path)}
    settings["labels"] = "label"
    settings |= {"resize": "squash", "image_size": 224, "crop_size": 0}
    return types.SimpleNamespace(**{**settings, **changes})


@pytest.mark.parametrize("split", ["train", "train[:7]", "train[50%:]"])
def test_every_image_has_its_own_boxes_in_its_own_pixels(prepared, split):
    tmp_path, paths, rows = prepared
    fields = ("image", "label", "file_name")
    source = open_split(data(tmp_path), split=split, fields=fields)
    assert len(source) < 12 or split == "train"
    for example in source:
        name = example["file_name"].decode()
        row = rows[next(i for i, path in enumerate(paths) if path.endswith(name))]
        y0, y1, x0, x1 = row[:, :4].T
        np.testing.assert_array_equal(example["boxes"], np.stack([y0, x0, y1, x1], axis=1) / 2)
        assert example["boxes"].dtype == np.float32


def test_without_patches_nothing_is_added(prepared):
    source = open_split(data(prepared[0], patches=""), split="train")
    assert set(source[0]) == {"image", "label"}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (1, 449, r"box 0 of row 3 .*\[3\.0, 449\.0, 6\.0, 448\.0\]"),
        (0, -1, "expected 0 <= y0 < y1 <= 448"),
        (2, 448, "0 <= x0 < x1"),
        (0, np.nan, "box 0 of row 3"),
        (4, 7, "row 3 has the label 7, its image .* the label"),
    ],
)
def test_bad_boxes_are_named(prepared, column, value, message):
    tmp_path, _, rows = prepared
    rows[3, 0, column] = value
    np.save(tmp_path / "train_patches.npy", rows)
    with pytest.raises(ValueError, match=message):
        open_split(data(tmp_path), split="train")


def test_other_layouts_are_named(prepared):
    tmp_path, _, rows = prepared
    for array, message in ((rows[:, :, :4], "shape .*expected .*5"), (rows[1:], "11 images")):
        np.save(tmp_path / "train_patches.npy", array)
        with pytest.raises(ValueError, match=message):
            open_split(data(tmp_path), split="train")
    (tmp_path / "train_patches.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="cannot be read as an array of boxes"):
        open_split(data(tmp_path), split="train")


@pytest.mark.parametrize("changes", [{"resize": "crop"}, {"crop_size": 128}])
def test_images_that_are_not_squashed_are_refused(prepared, changes):
    with pytest.raises(ValueError, match=r"set data\.resize to squash .*data\.crop_size to 0"):
        open_split(data(prepared[0], **changes), split="train")


@pytest.mark.parametrize("name", ["caltech_birds2011", "stanford_dogs"])
def test_boxes_find_the_images_of_sets_of_tfds(tmp_path, name):
    tfds_sets.prepare_photos(name, tmp_path / "sets", count=12)
    examples = tfds_sets.birds(12) if name == "caltech_birds2011" else tfds_sets.dogs(12)
    paths = sorted(example["image/filename"] for example in examples)
    classes = sorted({path.split("/")[-2] for path in paths})
    rows = [[[i, i + 10, 2 * i, 448, classes.index(p.split("/")[-2])]] for i, p in enumerate(paths)]
    np.save(tmp_path / "train_patches.npy", np.array(rows))
    settings = data(tmp_path, name=name)
    source = open_split(settings, split="train[:9]", fields=("image", "label", "image/filename"))
    for example in source:
        i = paths.index(example["image/filename"].decode())
        np.testing.assert_array_equal(example["boxes"], [[i / 2, i, i / 2 + 5, 224]])
        assert example["label"] == rows[i][0][4]
    resize = Resize("squash", 224)
    source = open_split(settings, split="train[:9]")
    batch = next(train_batches(source, batch_size=4, seed=0, resize=resize, num_threads=0))
    assert batch["image"].shape == (4, 224, 224, 3) and batch["boxes"].shape == (4, 1, 4)


def test_a_set_without_file_names_is_told(shapes_dir, tmp_path):
    settings = data(tmp_path, name="fine_shapes/mini", dir=shapes_dir)
    with pytest.raises(
        ValueError, match=r"fine_shapes/mini have no file names.* there is: attribute_bits,"
    ):
        open_split(settings, split="train")

"""CUB-200-2011 from small archives in its layout, and from ten of its classes."""

import types
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from attnzoom_jax.data.attributes import open_attributes
from attnzoom_jax.data.datasets.archive import open_archive
from attnzoom_jax.data.datasets.cub200 import ATTRIBUTES, CUB200
from attnzoom_jax.data.source import open_source
from attnzoom_jax.data.split import open_split
from tests.attribution.imported_networks import DATA
from tests.data import official_archives
from tests.data.official_archives import photo, pixels, write

# {image id: (file name, class, is in train, (x, y, width, height))}
BIRDS = {
    3: ("002.Blue_Jay/a.jpg", 2, 1, (1.0, 2.0, 8.0, 5.0)),
    4: ("001.Sooty_Tern/b.jpg", 1, 1, (0.0, 0.0, 12.5, 9.0)),  # over the right edge
    9: ("002.Blue_Jay/c.jpg", 2, 0, (2.0, 3.0, 4.0, 4.0)),
    12: ("001.Sooty_Tern/d.jpg", 1, 0, (5.0, 1.0, 2.0, 3.0)),
}
SIZE = (10, 12)
PARTS = ("back", "beak")


@pytest.fixture
def folder(tmp_path):
    """Two species, four images: one turned by its EXIF tag, one grey."""
    root = tmp_path / "CUB"
    cub = root / "CUB_200_2011"
    turned = Image.Exif()
    turned[0x0112] = 6
    for i, (name, *_) in enumerate(BIRDS.values()):
        options = {"exif": turned} if i == 1 else {}
        mode = "L" if i == 2 else "RGB"
        photo(cub / "images" / name, size=SIZE, seed=i, mode=mode, **options)
    write(cub / "images.txt", [(key, bird[0]) for key, bird in BIRDS.items()])
    write(cub / "image_class_labels.txt", [(key, bird[1]) for key, bird in BIRDS.items()])
    write(cub / "train_test_split.txt", [(key, bird[2]) for key, bird in BIRDS.items()])
    write(cub / "bounding_boxes.txt", [(key, *bird[3]) for key, bird in BIRDS.items()])
    write(cub / "classes.txt", ["1 001.Sooty_Tern", "2 002.Blue_Jay", "3 003.No_Image"])
    write(cub / "parts" / "parts.txt", [(i + 1, name) for i, name in enumerate(PARTS)])
    locations = [(key, p, 10.0 * key + p, 5.0 + p, p - 1) for key in BIRDS for p in (1, 2)]
    write(cub / "parts" / "part_locs.txt", [*locations, (99, 1, 0.0, 0.0, 0)])
    write(root / "attributes.txt", [(i + 1, f"has::{i}") for i in range(ATTRIBUTES)])
    shares = np.random.default_rng(0).uniform(0, 100, (3, ATTRIBUTES)).round(3)
    write(cub / "attributes" / "class_attribute_labels_continuous.txt", map(tuple, shares))
    return root


def add_image_attributes(folder):
    """Random answers, one line with a stray column as in the published file; returns them."""
    answers = np.random.default_rng(1).integers((0, 1), (2, 5), (len(BIRDS), ATTRIBUTES, 2))
    lines = [
        (key, a + 1, *answers[i, a], *((0,) if a == 9 else ()), 2.5)
        for i, key in enumerate(BIRDS)
        for a in range(ATTRIBUTES)
    ]
    file = folder / "CUB_200_2011" / "attributes" / "image_attribute_labels.txt"
    write(file, [*lines, (99, 1, 1, 1, 0.0)])
    return dict(zip(BIRDS, answers, strict=True))


def add_masks(folder):
    """Masks of random grey levels in `segmentations`; returns them by image id."""
    rng = np.random.default_rng(2)
    masks = {key: rng.integers(0, 6, SIZE).astype(np.uint8) * 51 for key in BIRDS}
    for key, mask in masks.items():
        file = folder / "segmentations" / BIRDS[key][0].replace(".jpg", ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)
    return masks


def scan(path):
    return CUB200.scan(open_archive(path, lists=CUB200.lists))


def read(sets, fields):
    """The examples of both splits by image id."""
    keys = {bird[0]: key for key, bird in BIRDS.items()}
    found = {}
    for split, wanted in (("train", 1), ("test", 0)):
        examples = official_archives.read("cub200", split, sets, fields)
        assert all(BIRDS[keys[name]][2] == wanted for name in examples)
        found |= {keys[name]: example for name, example in examples.items()}
    assert found.keys() == BIRDS.keys()
    return found


@pytest.mark.parametrize("kind", official_archives.KINDS)
def test_everything_comes_back(folder, tmp_path, kind):
    answers, masks = add_image_attributes(folder), add_masks(folder)
    path = official_archives.pack(folder, kind)
    contents = official_archives.build("cub200", path, tmp_path / "sets")
    assert contents.notes == ()
    fields = ("image", "label", "box", "parts", "attributes", "attribute_certainty")
    fields += ("class_attributes", "object_mask")
    for key, example in read(tmp_path / "sets", fields).items():
        name, class_id, _, (x, y, w, h) = BIRDS[key]
        file = folder / "CUB_200_2011" / "images" / name
        np.testing.assert_array_equal(example["image"], pixels(file))  # not turned: [10, 12, 3]
        assert example["image"].shape == (*SIZE, 3)
        assert int(example["label"]) == class_id - 1
        np.testing.assert_array_equal(example["box"], [y, x, y + h, min(x + w, SIZE[1])])
        parts = [(5 + p, 10 * key + p, p - 1) for p in (1, 2)]
        np.testing.assert_array_equal(example["parts"], parts)
        np.testing.assert_array_equal(example["attributes"], answers[key][:, 0])
        np.testing.assert_array_equal(example["attribute_certainty"], answers[key][:, 1])
        np.testing.assert_array_equal(example["object_mask"][..., 0], masks[key] >= 128)
        lists = folder / "CUB_200_2011" / "attributes"
        lines = (lists / "class_attribute_labels_continuous.txt").read_text().splitlines()
        percent = [float(word) for word in lines[class_id - 1].split()]
        np.testing.assert_allclose(example["class_attributes"] * 100, percent, rtol=1e-6)
    source = open_source("cub200", split="train", data_dir=str(tmp_path / "sets"))
    assert source.class_names == ("Sooty Tern", "Blue Jay", "No Image")


def test_names_are_in_the_metadata(folder, tmp_path):
    official_archives.build("cub200", folder, tmp_path)
    info: Any = tfds.builder_from_directory(tmp_path / "cub200" / "1.0.0").info
    assert info.metadata["part_names"] == list(PARTS)
    assert info.metadata["attribute_names"] == [f"has::{i}" for i in range(ATTRIBUTES)]


def test_attributes_are_labels_where_they_are_asked_for(folder, tmp_path):
    answers = add_image_attributes(folder)
    official_archives.build("cub200", folder, tmp_path / "sets")
    keys = {bird[0]: key for key, bird in BIRDS.items()}
    settings = {"name": "cub200", "dir": str(tmp_path / "sets"), "patches": ""}
    data = types.SimpleNamespace(**settings, labels="attributes")
    source = open_split(data, split="train", fields=("label", "file_name", "attributes"))
    assert source.class_names == tuple(f"has::{i}" for i in range(ATTRIBUTES))
    assert len(source) == 2
    for example in source:
        key = keys[example["file_name"].decode()]
        np.testing.assert_array_equal(example["label"], answers[key][:, 0])
        np.testing.assert_array_equal(example["attributes"], answers[key][:, 0])
        assert example["label"].dtype == np.float32


def test_names_that_are_not_as_many_as_the_attributes(folder, tmp_path):
    add_image_attributes(folder)
    write(folder / "attributes.txt", ["1 has::beak"])
    official_archives.build("cub200", folder, tmp_path / "sets")
    with pytest.raises(ValueError, match="cub200 has 312 attributes, and 1 names for them"):
        open_attributes("cub200", split="train", data_dir=str(tmp_path / "sets"))


def test_an_archive_without_attributes_of_images(folder, tmp_path):
    official_archives.build("cub200", folder, tmp_path)
    with pytest.raises(ValueError, match=r"cub200 has none .* fields are box, class_attributes"):
        open_attributes("cub200", split="train", data_dir=str(tmp_path))


def test_what_is_optional(folder):
    contents = scan(folder / "CUB_200_2011")
    assert contents.notes == (f"{folder}/CUB_200_2011 holds no attributes.txt with their names",)
    assert "class_attributes" in contents.features
    assert not {"attributes", "object_mask"} & contents.features.keys()
    for file in (folder / "CUB_200_2011" / "attributes").iterdir():
        file.unlink()
    contents = scan(folder)
    assert contents.notes == (f"{folder} holds no attributes; they are left out",)
    assert contents.features.keys() == {"label", "box", "parts", "file_name"}


def test_a_split_without_an_image_is_left_out_and_told(folder):
    write(folder / "CUB_200_2011" / "train_test_split.txt", [(key, 1) for key in BIRDS])
    contents = scan(folder)
    assert list(contents.splits) == ["train"]
    assert "has no image of test" in contents.notes[0]


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("bounding_boxes.txt", ["3 0 0 1 1"], "bounding_boxes.txt has no line .* with 4$"),
        ("classes.txt", ["2 002.Blue_Jay"], "classes.txt has no line that begins with 1$"),
        ("parts/parts.txt", ["1 back"], "parts/parts.txt has no line that begins with 2$"),
        ("parts/part_locs.txt", ["3 1 5"], "line 1 of .*part_locs.txt is '3 1 5'"),
        ("attributes/image_attribute_labels.txt", ["3 1 yes 1 0"], "is no table of numbers"),
        ("attributes/image_attribute_labels.txt", ["3 313 1 1 0"], "outside of 1..312"),
        ("attributes/image_attribute_labels.txt", ["3 1"], "is no table of numbers"),
        (
            "attributes/class_attribute_labels_continuous.txt",
            ["1 2", "3 4"],
            r"has \(2, 2\) lines and columns; expected \(3, 312\)",
        ),
    ],
)
def test_lists_that_are_wrong(folder, file, lines, message):
    write(folder / "CUB_200_2011" / file, lines)
    with pytest.raises(ValueError, match=message) as error:
        scan(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_masks_that_are_missing_or_broken(folder):
    add_masks(folder)
    file = folder / "segmentations" / "002.Blue_Jay" / "c.png"
    file.write_text("no image")
    with pytest.raises(ValueError, match=r"segmentations/002.Blue_Jay/c.png is no readable image"):
        scan(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds no segmentations/002.Blue_Jay/c.png"):
        scan(folder)


REAL = DATA / "cub200_subset10" / "CUB_200_2011_subset10.tar.gz"


@pytest.mark.data
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} in {DATA} (ATTNZOOM_DATA)")
def test_ten_published_classes(tmp_path):
    contents = official_archives.build("cub200", REAL, tmp_path)
    assert contents.notes == ()
    assert {split: len(images) for split, images in contents.splits.items()} == {
        "train": 299,
        "test": 288,
    }
    fields = ("image", "box", "parts", "label", "class_attributes")
    examples: dict[str, dict] = {}
    for split in contents.splits:
        examples |= official_archives.read("cub200", split, tmp_path, fields)
    example = examples["001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"]
    np.testing.assert_array_equal(example["box"], [27, 60, 331, 385])
    beak, crown = contents.metadata["part_names"].index("beak"), 4
    np.testing.assert_array_equal(example["parts"][beak], [182, 312, 1])
    np.testing.assert_array_equal(example["parts"][crown], [45, 186, 1])
    assert len(contents.metadata["attribute_names"]) == ATTRIBUTES
    assert set(range(0, 200, 20)) == {int(example["label"]) for example in examples.values()}
    for example in examples.values():
        h, w, _ = example["image"].shape
        y0, x0, y1, x1 = example["box"]
        assert 0 <= y0 < y1 <= h and 0 <= x0 < x1 <= w
        points = example["parts"][example["parts"][:, 2] == 1, :2]
        assert len(points)
        # People's clicks: every part lies in the box, give or take a pixel.
        assert (points > [y0 - 1, x0 - 1]).all() and (points < [y1 + 1, x1 + 1]).all()
        assert example["class_attributes"].max() <= 1
    yellow = contents.metadata["attribute_names"].index("has_underparts_color::yellow")
    shares = {int(e["label"]): e["class_attributes"][yellow] for e in examples.values()}
    assert max(shares, key=lambda label: shares[label]) == 160  # the Blue-winged Warbler
    assert shares[160] > 0.9

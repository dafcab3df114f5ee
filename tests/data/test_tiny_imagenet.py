"""Tiny ImageNet from small archives in its layout, and from the published validation split."""

import numpy as np
import pytest

from attnzoom_jax.data.datasets.archive import open_archive
from attnzoom_jax.data.datasets.tiny_imagenet import TINY_IMAGENET
from attnzoom_jax.data.source import open_source
from tests.attribution.imported_networks import DATA
from tests.data import official_archives
from tests.data.official_archives import photo, pixels, write

WNIDS = ("n03", "n01", "n02")
FIELDS = ("image", "label", "wnid", "box")


@pytest.fixture
def folder(tmp_path):
    """Three classes of two training images, four validation images, one test image."""
    root = tmp_path / "tiny-imagenet-200"
    write(root / "wnids.txt", WNIDS)
    words = ["n00\tthing", "n01\tcrane, lifting device", "n02\tcrane", "n03\tgoldfish, Carassius"]
    write(root / "words.txt", words)
    for i, wnid in enumerate(WNIDS):
        names = [f"{wnid}_{j}.JPEG" for j in range(2)]
        for j, name in enumerate(names):
            photo(root / "train" / wnid / "images" / name, seed=2 * i + j)
        boxes = [f"{name}\t{i}\t{j}\t63\t60" for j, name in enumerate(names)]
        write(root / "train" / wnid / f"{wnid}_boxes.txt", boxes)
    for i in range(4):
        mode = "L" if i == 3 else "RGB"
        photo(root / "val" / "images" / f"val_{i}.JPEG", seed=10 + i, mode=mode)
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t5\t{i}\t5\t63" for i in range(4)]
    write(root / "val" / "val_annotations.txt", lines)
    photo(root / "test" / "images" / "test_0.JPEG")
    return root


def scan(path):
    return TINY_IMAGENET.scan(open_archive(path, lists=TINY_IMAGENET.lists))


@pytest.mark.parametrize("kind", official_archives.KINDS)
def test_everything_comes_back(folder, tmp_path, kind):
    path = official_archives.pack(folder, kind)
    contents = official_archives.build("tiny_imagenet", path, tmp_path / "sets")
    assert contents.notes == ("the test images have no labels and are left out",)
    train = official_archives.read("tiny_imagenet", "train", tmp_path / "sets", FIELDS)
    validation = official_archives.read("tiny_imagenet", "validation", tmp_path / "sets", FIELDS)
    # Boxes half-open, in the order of y and x.
    expected = {
        f"train/{wnid}/images/{wnid}_{j}.JPEG": (i, [j, i, 61, 64])
        for i, wnid in enumerate(WNIDS)
        for j in range(2)
    }
    expected |= {f"val/images/val_{i}.JPEG": (i % 3, [i, 5, 64, 6]) for i in range(4)}
    assert {**train, **validation}.keys() == expected.keys()
    assert len(validation) == 4
    for name, example in {**train, **validation}.items():
        label, box = expected[name]
        assert int(example["label"]) == label
        assert example["wnid"].decode() == WNIDS[label]
        assert example["box"].dtype == np.int32
        np.testing.assert_array_equal(example["box"], box)
        np.testing.assert_array_equal(example["image"], pixels(folder / name))


def test_class_names_are_words_and_unique(folder, tmp_path):
    official_archives.build("tiny_imagenet", folder, tmp_path / "sets")
    source = open_source("tiny_imagenet", split="train", data_dir=str(tmp_path / "sets"))
    assert source.class_names == ("goldfish", "crane (n01)", "crane (n02)")
    assert source.image_shape == (64, 64, 3)


@pytest.mark.parametrize(("gone", "split"), [("train", "validation"), ("val", "train")])
def test_a_split_that_is_not_there_is_left_out_and_told(folder, tmp_path, gone, split):
    (folder / gone).rename(tmp_path / "away")
    contents = scan(folder)
    assert list(contents.splits) == [split]
    assert f"{folder} holds no {gone}/; the split " in contents.notes[0]


def test_without_any_split(folder, tmp_path):
    (folder / "train").rename(tmp_path / "away")
    (folder / "val").rename(tmp_path / "away" / "val")
    with pytest.raises(ValueError, match="holds neither train/ nor val/ with images"):
        scan(folder)


def test_an_unknown_class(folder):
    write(folder / "val" / "val_annotations.txt", ["val_0.JPEG\tn09\t0\t0\t1\t1"])
    with pytest.raises(ValueError, match=r"val_annotations.txt has the class 'n09', which is not"):
        scan(folder)


def test_an_image_of_another_size(folder, tmp_path):
    photo(folder / "val" / "images" / "val_1.JPEG", size=(64, 48))
    with pytest.raises(ValueError, match=r"val_1.JPEG has 64 x 48 pixels; expected 64 x 64"):
        official_archives.build("tiny_imagenet", folder, tmp_path / "sets")
    assert not list((tmp_path / "sets").glob("tiny_imagenet/*"))


REAL = DATA / "tiny_imagenet_val" / "tiny-imagenet-200-val.tar.gz"


@pytest.mark.data
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} in {DATA} (ATTNZOOM_DATA)")
def test_the_published_validation_split(tmp_path):
    contents = official_archives.build("tiny_imagenet", REAL, tmp_path)
    assert list(contents.splits) == ["validation"]
    assert "the split train is left out" in contents.notes[0]
    source = open_source(
        "tiny_imagenet", split="validation", data_dir=str(tmp_path), fields=("label", "box", "wnid")
    )
    assert len(source) == 10_000
    assert len(set(source.class_names)) == 200
    assert source.class_names[0] == "Egyptian cat"
    examples = list(source.examples)
    labels = np.array([example["label"] for example in examples])
    np.testing.assert_array_equal(np.bincount(labels), [50] * 200)
    boxes = np.array([example["box"] for example in examples])
    assert (boxes[:, :2] < boxes[:, 2:]).all()  # as inclusive ends some would be empty
    assert boxes.min() == 0 and boxes.max() == 64
    # An edge lies on the image's border as often on the right as on the left.
    share = [np.mean(boxes[:, 1] == 0), np.mean(boxes[:, 3] == 64)]
    assert 0.3 < min(share) and max(share) < 0.5
    images = open_source("tiny_imagenet", split="validation[:500]", data_dir=str(tmp_path))
    shapes = {example["image"].shape for example in images.examples}
    assert shapes == {(64, 64, 3)}  # though 168 of the 10,000 files are grey


@pytest.mark.parametrize("box", ["50 50 10 10", "0 0 64 5", "-1 0 3 5"])
def test_a_box_that_is_none_is_named(folder, box):
    lines = [f"val_{i}.JPEG {WNIDS[0]} {box}".replace(" ", "\t") for i in range(4)]
    write(folder / "val" / "val_annotations.txt", lines)
    with pytest.raises(ValueError, match=r"the box of val/images/val_0\.JPEG is x0, y0, x1, y1 = "):
        scan(folder)

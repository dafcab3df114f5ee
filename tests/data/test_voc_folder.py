"""Boxes and segments of a folder in PASCAL VOC's layout, and in ImageNet's variant of it."""

import csv
import tarfile
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.data.annotated import open_annotated
from attnzoom_jax.data.datasets.voc_folder import VOC_CLASSES
from tests.attribution.imported_networks import DATA
from tests.data.official_archives import photo, pixels, write

SIZE = (20, 30)
BOMB = '<!DOCTYPE a [<!ENTITY b "bbb"><!ENTITY c "&b;&b;&b;">]>'


def xml(*things, size=SIZE, head=""):
    """An annotation of (name, xmin, ymin, xmax, ymax, difficult)."""
    lines = [head, "<annotation>"]
    if size:
        lines += [f"<size><width>{size[1]}</width><height>{size[0]}</height></size>"]
    for name, *corners, difficult in things:
        lines += [f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"]
        tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        lines += [f"<{tag}>{corner}</{tag}>" for tag, corner in tags]
        lines += ["</bndbox></object>"]
    return [*lines, "</annotation>"]


@pytest.fixture
def folder(tmp_path):
    """Three images: two objects, one difficult; none; a cat. The second has no segments."""
    root = tmp_path / "VOC2007"
    turned = Image.Exif()
    turned[0x0112] = 6
    for i, name in enumerate(("000001", "000002", "000003")):
        options: dict[str, Any] = (
            {"exif": turned} if i == 0 else {}
        )  # boxes are of the pixels as they are stored
        photo(root / "JPEGImages" / f"{name}.jpg", size=SIZE, seed=i, **options)
    write(root / "Annotations/000001.xml", xml(("dog", 1, 1, 30, 20, 0), ("person", 3, 5, 9, 5, 1)))
    write(root / "Annotations/000002.xml", xml())
    write(root / "Annotations/000003.xml", xml(("cat", 4.5, 2, 8, 6.25, 0), size=None))
    write(root / "ImageSets/Main/val.txt", ["000001", "000002", "", "000003"])
    write(root / "ImageSets/Main/dog_val.txt", ["000001  1", "000002 -1", "000003 -1"])
    write(root / "ImageSets/Main/person_val.txt", ["000001  0", "000002 -1", "000003 -1"])
    write(root / "ImageSets/Main/cat_val.txt", ["000001 -1", "000002 -1", "000003  1"])
    return root


def data(folder):
    return types.SimpleNamespace(name="voc_folder", dir=str(folder))


def read(folder, split="val", truth="boxes"):
    return {e["name"]: e for e in open_annotated(data(folder), split=split, truth=truth)}


def kinds(example):
    return [kind for kind, _ in example["problems"]]


def spoil(path, lines):
    path.unlink()
    write(path, lines)


def test_boxes(folder):
    source = open_annotated(data(folder), split="val")
    assert source.class_names == VOC_CLASSES
    assert (source.name, source.image_shape) == ("voc_folder:val", (None, None, 3))
    found = {example["name"]: example for example in source}
    assert list(found) == ["000001.jpg", "000002.jpg", "000003.jpg"]
    first, none, cat = found.values()
    np.testing.assert_array_equal(first["image"], pixels(folder / "JPEGImages/000001.jpg"))
    assert first["image"].shape == (*SIZE, 3)
    # Counted from 1, both ends: the whole image, and one row of seven pixels.
    np.testing.assert_array_equal(first["boxes"], [[0, 0, 20, 30], [4, 2, 5, 9]])
    assert [VOC_CLASSES[label] for label in first["labels"]] == ["dog", "person"]
    np.testing.assert_array_equal(first["is_hard"], [False, True])
    assert none["boxes"].shape == (0, 4)
    np.testing.assert_array_equal(cat["boxes"], [[1, 3.5, 6.25, 8]])
    assert all(example["problems"] == () and "masks" not in example for example in found.values())


def test_splits(folder):
    assert list(read(folder, "val[1:]")) == ["000002.jpg", "000003.jpg"]
    assert list(read(folder, "val[:34%]")) == ["000001.jpg"]
    assert list(read(folder, "person_val")) == ["000001.jpg"]  # 0: all of them difficult


def test_classes(folder):
    for path in folder.glob("ImageSets/Main/*_val.txt"):
        path.unlink()
    assert open_annotated(data(folder), split="val").class_names == VOC_CLASSES
    spoil(folder / "Annotations/000003.xml", xml(("hat", 4, 2, 8, 6, 0)))
    source = open_annotated(data(folder), split="val[:1]")
    assert source.class_names == ("dog", "hat", "person")  # those of the whole split
    np.testing.assert_array_equal(source[0]["labels"], [0, 2])


def test_segments(folder):
    ids = np.zeros(SIZE, np.uint8)
    ids[2:5, 3:9], ids[8:12, 3:9], ids[5] = 1, 2, 255
    (folder / "SegmentationObject").mkdir()
    picture = Image.fromarray(ids)
    picture.putpalette([value for value in range(256) for _ in range(3)])  # now it is "P"
    picture.save(folder / "SegmentationObject/000001.png")
    picture.save(folder / "SegmentationObject/000003.png")
    Image.fromarray(ids).save(folder / "SegmentationObject/000002.png")
    found = read(folder, truth="segments")
    first = found["000001.jpg"]
    np.testing.assert_array_equal(first["masks"], [ids == 1, ids == 2])
    np.testing.assert_array_equal(first["boxes"][0], [0, 0, 20, 30])
    assert found["000002.jpg"]["masks"].shape == (0, *SIZE)
    assert all(example["problems"] == () for example in found.values())
    # An unknown class: its object is left out, the segments of the others stay theirs.
    things = (("dgo", 1, 1, 30, 20, 0), ("person", 3, 5, 9, 5, 1))
    spoil(folder / "Annotations/000001.xml", xml(*things))
    person = read(folder, truth="segments")["000001.jpg"]
    np.testing.assert_array_equal(person["masks"], [ids == 2])
    assert kinds(person) == ["unknown_class"]
    # Only some images have segments, and they have a list.
    (folder / "SegmentationObject/000003.png").unlink()
    assert kinds(read(folder, truth="segments")["000003.jpg"]) == ["no_annotation"]
    write(folder / "ImageSets/Segmentation/val.txt", ["000001"])
    assert list(read(folder, truth="segments")) == ["000001.jpg"]


@pytest.mark.parametrize("kind", ["colours", "size", "broken"])
def test_segments_that_are_none(folder, kind):
    path = folder / "SegmentationObject/000001.png"
    path.parent.mkdir()
    if kind == "broken":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    else:
        shape = (*SIZE, 3) if kind == "colours" else (SIZE[0], SIZE[1] + 1)
        Image.fromarray(np.zeros(shape, np.uint8)).save(path)
    example = read(folder, "val[:1]", truth="segments")["000001.jpg"]
    assert kinds(example) == ["bad_annotation"]
    assert "000001.png" in example["problems"][0][1]
    assert len(example["labels"]) == len(example["masks"]) == 0


@pytest.mark.parametrize(
    "lines, kind, text",
    [
        (None, "no_annotation", r"000001: no .*000001.xml"),
        (["<annotation>"], "bad_annotation", r"000001: .*000001.xml cannot be read \(no element"),
        (["no XML"], "bad_annotation", r"cannot be read \(syntax error"),
        (xml(("dog", 1, 1, 30, 20, 0), head=BOMB), "bad_annotation", r"it has a DOCTYPE"),
        (xml(("dog", 1, 1, "x", 20, 0)), "bad_annotation", r"could not convert .* 'x'"),
        (xml(("", 1, 1, 5, 5, 0)), "bad_annotation", r"an object without name"),
        (["<a><object><name>dog</name></object></a>"], "bad_annotation", r"without bndbox/xmin"),
        (xml(("dgo", 1, 1, 5, 5, 0)), "unknown_class", r"000001: an object of class 'dgo' is left"),
        (xml(("dog", 1, 1, 5, 5, 0), size=(30, 20)), "other_size", r"20 x 30 .* of 30 x 20"),
        (xml(("dog", 31, 1, 40, 5, 0)), "empty_box", r"000001.jpg: the box \[0, 30, 5, 40\] of a"),
        (xml(("dog", 9, 1, 5, 5, 0)), "empty_box", r"holds no pixel of the 20 x 30 image"),
        (xml(("dog", 1, -9, 40, 5, 0)), "clipped_box", r"\[-10, 0, 5, 40\] of a dog reaches outs"),
    ],
)
def test_annotations_that_are_wrong(folder, lines, kind, text):
    path = folder / "Annotations/000001.xml"
    path.unlink()
    if lines is not None:
        write(path, lines)
    found = read(folder)
    example = found["000001.jpg"]
    assert kinds(example) == [kind]
    np.testing.assert_equal(len(example["labels"]), int(kind == "clipped_box"))
    assert example["image"].shape == (*SIZE, 3)
    ((_, message),) = example["problems"]
    assert "\n" not in message and message.startswith("000001")
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(message)
    assert kinds(found["000003.jpg"]) == []  # the others are not touched


def test_a_doctype_in_another_encoding(folder):
    text = "\n".join(xml(("dog", 1, 1, 30, 20, 0), head=BOMB))
    text = f'<?xml version="1.0" encoding="utf-16"?>{text}'
    (folder / "Annotations/000001.xml").write_bytes(text.encode("utf-16"))
    ((kind, message),) = read(folder)["000001.jpg"]["problems"]
    assert kind == "bad_annotation" and "DOCTYPE" in message


def test_an_unreadable_image(folder):
    path = folder / "JPEGImages/000001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    (folder / "JPEGImages/000003.jpg").unlink()
    found = read(folder)
    for name in ("000001.jpg", "000003.jpg"):
        ((kind, message),) = found[name]["problems"]
        assert kind == "unreadable_image" and name in message
        np.testing.assert_array_equal(found[name]["image"], np.zeros((1, 1, 3)))
        assert found[name]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    "split, truth, message",
    [
        ("test", "boxes", r"split 'test': there is no .*Main/test.txt; there is: cat_val, dog_val"),
        ("val", "segments", r"has no segments; segments would be in .*/SegmentationObject"),
        ("val", "parts", r"VOC2007 has no parts"),
        ("val[:9]", "boxes", r"split 'val\[:9\]': .*incompatible with 3 examples"),
        ("val[3:]", "boxes", r"split 'val\[3:\]' holds no image"),
        ("val[", "boxes", r"split 'val\[': Error parsing split"),
        ("val+dog_val", "boxes", r"a folder is read one split at a time"),
    ],
)
def test_what_is_not_there(folder, split, truth, message):
    with pytest.raises(ValueError, match=message) as error:
        open_annotated(data(folder), split=split, truth=truth)
    assert "\n" not in str(error.value)


def test_folders_of_another_layout(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"neither ImageSets/Main .* one level too high or too low"
    ):
        open_annotated(data(folder.parent), split="val")
    with pytest.raises(ValueError, match=r"data.dir: there is no folder .*nowhere"):
        open_annotated(data(tmp_path / "nowhere"), split="val")
    write(folder / "ImageSets/Main/own.txt", ["000009"])
    with pytest.raises(ValueError, match=r"Annotations names no class for any image of 'own'"):
        open_annotated(data(folder), split="own")


# ImageNet

WNIDS = ("n01440764", "n02102040")


@pytest.fixture
def imagenet(tmp_path):
    """Two images of val and one of train, whose lists carry numbers."""
    root = tmp_path / "ILSVRC"
    names = ["ILSVRC2012_val_00000002", "ILSVRC2012_val_00000001"]
    for i, name in enumerate(names):
        photo(root / "Data/CLS-LOC/val" / f"{name}.JPEG", size=SIZE, seed=i, format="JPEG")
        path = root / "Annotations/CLS-LOC/val" / f"{name}.xml"
        write(path, xml((WNIDS[1 - i], 0, 3 + i, 29, 5, 0)))
    write(root / "ImageSets/CLS-LOC/val.txt", [(name, 9 - i) for i, name in enumerate(names)])
    name = f"{WNIDS[0]}/{WNIDS[0]}_7"
    photo(root / "Data/CLS-LOC/train" / f"{name}.JPEG", size=SIZE, format="JPEG")
    write(root / "Annotations/CLS-LOC/train" / f"{name}.xml", xml((WNIDS[0], 2, 2, 2, 2, 0)))
    write(root / "ImageSets/CLS-LOC/train_loc.txt", [(name, 1)])
    return root


def test_imagenet(imagenet):
    source = open_annotated(data(imagenet), split="val")
    assert source.class_names == WNIDS
    first, second = source
    assert first["name"] == "ILSVRC2012_val_00000002.JPEG"
    np.testing.assert_array_equal(first["boxes"], [[3, 0, 6, 30]])  # counted from 0, both ends
    np.testing.assert_array_equal(second["boxes"], [[4, 0, 6, 30]])
    assert (first["labels"], second["labels"]) == ([1], [0])
    (train,) = open_annotated(data(imagenet), split="train_loc")
    np.testing.assert_array_equal(train["boxes"], [[2, 2, 3, 3]])
    lines = [f"{WNIDS[0]} tench, Tinca tinca", "n01443537 goldfish", f"{WNIDS[1]} springer"]
    write(imagenet.parent / "LOC_synset_mapping.txt", lines)
    source = open_annotated(data(imagenet), split="val[:1]")
    assert source.class_names == ("tench, Tinca tinca", "goldfish", "springer")
    np.testing.assert_array_equal(source[0]["labels"], [2])


def test_imagenet_with_its_images_elsewhere(imagenet):
    (imagenet / "Data/CLS-LOC/val").rename(imagenet / "val")
    assert len(open_annotated(data(imagenet), split="val")[0]["labels"]) == 1
    (imagenet / "val").rename(imagenet / "photos")
    with pytest.raises(ValueError, match=r"no folder of images: .*Data/CLS-LOC/val, .*JPEGImages"):
        open_annotated(data(imagenet), split="val")


# Real photographs

REAL = DATA / "coco256" / "coco256.tar"
AS_VOC = {
    **{"airplane": "aeroplane", "motorcycle": "motorbike", "dining table": "diningtable"},
    **{"potted plant": "pottedplant", "couch": "sofa", "tv": "tvmonitor"},
}


@pytest.mark.data
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} in {DATA} (ATTNZOOM_DATA)")
def test_photographs_of_coco_as_voc(tmp_path):
    with tarfile.open(REAL) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "coco256"
    expected: dict[str, list] = {}
    for row in csv.DictReader((root / "boxes_all_80classes.csv").read_text().splitlines()):
        name = AS_VOC.get(row["class"], row["class"])
        if name in VOC_CLASSES:
            box = [float(row[key]) for key in ("y0", "x0", "y1", "x1")]
            expected.setdefault(row["file"], []).append((VOC_CLASSES.index(name), box))
    count = 0
    for split, images in (("train", 97), ("test", 100)):
        found = read(root, split)
        assert len(found) == images
        for name, example in found.items():
            text = (root / "Annotations" / name.replace(".jpg", ".xml")).read_text()
            assert len(example["labels"]) == text.count("<object>")
            assert example["problems"] == ()
            count += len(example["labels"])
            for label, box in zip(example["labels"], example["boxes"], strict=True):
                same = [other for of, other in expected[name] if of == label]
                assert min(np.abs(box - other).max() for other in same) <= 1  # whole numbers in XML
            h, w, _ = example["image"].shape
            low, high = example["boxes"][:, :2], example["boxes"][:, 2:]
            assert (low >= 0).all() and (low < high).all() and (high <= [h, w]).all()
    assert count == sum(map(len, expected.values())) == 974

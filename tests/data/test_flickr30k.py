"""Flickr30k Entities from small archives in its layout, and the words of phrases."""

import numpy as np
import pytest

from attnzoom_jax.data.datasets.archive import open_archive
from attnzoom_jax.data.datasets.flickr30k import FLICKR30K
from attnzoom_jax.data.phrases import index_tags, known_outputs, open_phrases
from tests.data import official_archives
from tests.data.official_archives import photo, pixels, write

SIZES = {"11": (40, 60), "22": (50, 30), "33": (40, 40), "44": (30, 50)}
SENTENCES = {
    "11": [
        "[/EN#7/people A man] walks [/EN#8/animals two brown dogs] in [/EN#9/scene the park] .",
        "[/EN#7/people/other The man 's hat] and nothing else",
        "No phrase here .",
    ],
    "22": ["[/EN#0/notvisual the air] of [/EN#5/bodyparts her hand]"],
    "33": ["[/EN#1/clothing A hat] ."],
    "44": ["[/EN#2/vehicles A cart] ."],
}
# Corners are the first and the last pixel, counted from 1.
OBJECTS = {
    "11": [
        (["7"], (1, 1, 60, 40)),
        (["8"], (11, 21, 20, 30)),
        (["8", "7"], (31, 21, 31, 21)),
        (["9"], None),
    ],
    "22": [(["5"], (2, 3, 4, 5))],
    "33": [],
    "44": [(["2"], (5, 6, 7, 8))],
}


def annotation(size, objects) -> list[str]:
    height, width = size
    lines = [f"<annotation><size><width>{width}</width><height>{height}</height></size>"]
    for names, box in objects:
        lines.append("<object>" + "".join(f"<name>{name}</name>" for name in names))
        if box is None:
            lines.append("<scene>1</scene><nobndbox>0</nobndbox></object>")
            continue
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        inner = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
        lines.append(f"<bndbox>{inner}</bndbox></object>")
    return [*lines, "</annotation>"]


@pytest.fixture
def folder(tmp_path):
    """Two images of train, one each of val and test."""
    root = tmp_path / "flickr30k"
    write(root / "train.txt", ["11", "22"])
    write(root / "val.txt", ["33"])
    write(root / "test.txt", ["44"])
    write(root / "README.md", ["no list"])
    for seed, (name, size) in enumerate(SIZES.items()):
        photo(root / "flickr30k-images" / f"{name}.jpg", size=size, seed=seed)
        write(root / "Sentences" / f"{name}.txt", SENTENCES[name])
        write(root / "Annotations" / f"{name}.xml", annotation(size, OBJECTS[name]))
    return root


def scan(path):
    return FLICKR30K.scan(open_archive(path, lists=FLICKR30K.lists))


@pytest.mark.parametrize("kind", official_archives.KINDS)
def test_everything_comes_back(folder, tmp_path, kind):
    path = official_archives.pack(folder, kind)
    contents = official_archives.build("flickr30k", path, tmp_path / "sets")
    assert not contents.notes
    for split, names in {"train": ("11", "22"), "validation": ("33",), "test": ("44",)}.items():
        found = open_phrases("flickr30k", split=split, data_dir=str(tmp_path / "sets"))
        examples = {example["name"]: example for example in found}
        assert examples.keys() == {f"flickr30k-images/{name}.jpg" for name in names}
        for name, example in examples.items():
            np.testing.assert_array_equal(example["image"], pixels(folder / name))
    train = open_phrases("flickr30k", split="train", data_dir=str(tmp_path / "sets"))
    phrases = {example["name"][-6:-4]: example["phrases"] for example in train}
    assert [(p.text, p.kind, p.boxes.tolist()) for p in phrases["11"]] == [
        ("A man", "people", [[0, 0, 40, 60], [20, 30, 21, 31]]),
        ("two brown dogs", "animals", [[20, 10, 30, 20], [20, 30, 21, 31]]),
        ("the park", "scene", []),
        ("The man 's hat", "people", [[0, 0, 40, 60], [20, 30, 21, 31]]),
    ]
    assert [(p.text, p.boxes.tolist()) for p in phrases["22"]] == [
        ("the air", []),
        ("her hand", [[2, 1, 5, 4]]),
    ]
    # An image without any box.
    (hat,) = open_phrases("flickr30k", split="validation", data_dir=str(tmp_path / "sets"))
    assert [(p.text, p.boxes.shape) for p in hat["phrases"]] == [("A hat", (0, 4))]


def test_a_box_outside_is_clipped_or_left_out_and_told(folder):
    objects = [
        (["7"], (50, 1, 61, 40)),
        (["8"], (61, 1, 70, 40)),
        (["8"], (9, 9, 8, 9)),
        (["8"], (9, 9, 9, 9)),
    ]
    write(folder / "Annotations" / "11.xml", annotation(SIZES["11"], objects))
    contents = scan(folder)
    (example,) = (e for e in contents.splits["train"].values() if "11" in e["file_name"])
    assert example["boxes"] == [
        {"entity": 7, "box": [0, 49, 40, 60]},
        {"entity": 8, "box": [8, 8, 9, 9]},
    ]
    assert contents.notes == (
        "boxes that reach beyond the image and are clipped: 1, such as Annotations/11.xml "
        "(50, 1, 61, 40 in 60 x 40)",
        "boxes that have no pixel in it and are left out: 2, such as Annotations/11.xml "
        "(61, 1, 70, 40 in 60 x 40), Annotations/11.xml (9, 9, 8, 9 in 60 x 40)",
    )


@pytest.mark.parametrize("missing", ["Annotations/22.xml", "Sentences/22.txt"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"holds no {missing}; is it complete"):
        scan(folder)


def test_a_missing_image_is_named(folder, tmp_path):
    (folder / "flickr30k-images" / "22.jpg").unlink()
    with pytest.raises(ValueError, match=r"holds no flickr30k-images/22\.jpg"):
        official_archives.build("flickr30k", folder, tmp_path / "sets")
    assert not list((tmp_path / "sets").glob("flickr30k/*"))


@pytest.mark.parametrize("missing", ["Annotations", "Sentences", "flickr30k-images"])
def test_a_missing_folder_is_named(folder, tmp_path, missing):
    (folder / missing).rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"holds no folder {missing}/ with"):
        scan(folder)


def test_a_split_without_images_is_left_out_and_told(folder):
    for name in ("11", "22"):
        (folder / "flickr30k-images" / f"{name}.jpg").unlink()
    (folder / "val.txt").unlink()
    contents = scan(folder)
    assert list(contents.splits) == ["test"]
    assert [note.partition(" holds ")[2] for note in contents.notes] == [
        "no image of train.txt; the split train is left out",
        "no val.txt; the split validation is left out",
    ]
    (folder / "test.txt").unlink()
    with pytest.raises(ValueError, match="holds no split: "):
        scan(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<annotation>", "no element found"),
        ("<annotation></annotation>", "it has no size/height"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "it declares a DOCTYPE"),
    ],
    ids=["cut", "no_size", "doctype"],
)
def test_a_bad_annotation_is_named(folder, text, problem):
    write(folder / "Annotations" / "33.xml", [text])
    with pytest.raises(ValueError, match=f"Annotations/33.xml is no annotation .*{problem}"):
        scan(folder)


@pytest.mark.parametrize("entity", ["", "x"])
def test_an_entity_that_is_no_number_is_named(folder, entity):
    write(folder / "Annotations" / "33.xml", annotation((40, 40), [([entity], (1, 1, 2, 2))]))
    with pytest.raises(ValueError, match=r"Annotations/33\.xml is no annotation"):
        scan(folder)


def test_a_caption_of_another_form_is_named(folder):
    write(folder / "Sentences" / "44.txt", ["A cart .", "[/EN#2/vehicles A cart"])
    with pytest.raises(ValueError, match=r"line 2 of Sentences/44.txt is '\[/EN#2/vehicles A cart"):
        scan(folder)


def test_phrases_of_fine_shapes():
    source = open_phrases("fine_shapes/tiny", split="test[:20]")
    assert len(source) == 20
    example = source[3]
    assert example["name"] == "test[:20][3]"
    assert example["phrases"][0].kind == "labelled"
    assert {p.kind for e in source for p in e["phrases"][1:]} == {"other"}
    text = example["phrases"][0].text
    assert text.split()[2] in ("circle", "square", "triangle", "star") and " with " in text
    for phrase in example["phrases"]:
        ((y0, x0, y1, x1),) = phrase.boxes
        assert 0 <= y0 < y1 <= 32 and 0 <= x0 < x1 <= 32


def test_a_set_without_phrases(folder, tmp_path):
    official_archives.build("flickr30k", folder, tmp_path / "sets")
    set_folder = next((tmp_path / "sets" / "flickr30k").glob("*"))
    info = (set_folder / "features.json").read_text()
    (set_folder / "features.json").write_text(info.replace('"phrases"', '"captions"'))
    with pytest.raises(ValueError, match=r"flickr30k has no phrases .* boxes, captions, file_name"):
        open_phrases("flickr30k", split="train", data_dir=str(tmp_path / "sets"))


TAGS = (
    "dog",
    "hot dog, frankfurter",
    "grass",
    "circle_cross",
    "Bars",
    "glasses",
    "golden retrievers",
    "dog",
    "the",
    "horse",
)


@pytest.mark.parametrize(
    ("phrase", "known"),
    [
        ("A DOG", (0, 7)),
        ("two Dogs, running", (0, 7)),
        ("a hot-dog", (1,)),
        ("a hot brown dog", (0, 7)),
        ("frankfurters", (1,)),
        ("the grass", (2,)),
        ("plain red circle with a cross", (3,)),
        ("circle with a red cross", ()),
        ("square with two bars", (4,)),
        ("a bar", (4,)),
        ("his glass", (5,)),
        ("a golden retriever and another dog", (0, 6, 7)),
        ("golden dog", (0, 7)),
        ("horses on grass", (2, 9)),
        ("the", ()),
        ("", ()),
        ("doghouse", ()),
    ],
)
def test_known_words(phrase, known):
    assert known_outputs(phrase, index_tags(TAGS)) == known

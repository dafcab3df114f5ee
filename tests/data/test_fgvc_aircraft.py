"""FGVC-Aircraft from small archives in its layout."""

import io

import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.data.datasets.archive import open_archive
from attnzoom_jax.data.datasets.fgvc_aircraft import FGVC_AIRCRAFT, cut_banner
from attnzoom_jax.data.source import open_source
from tests.data import official_archives
from tests.data.official_archives import photo, pixels, write

SIZE = (60, 80)  # with the banner
VARIANTS = ["737-700", "F/A-18", "DC-9-30", "Cessna 172"]
FAMILIES = ["Boeing 737", "F/A-18", "DC-9", "Cessna 172"]
MANUFACTURERS = ["Boeing", "McDonnell Douglas", "Cessna"]
# {split of the files: [(image, variant, manufacturer, (xmin, ymin, xmax, ymax) from 1)]}
AIRCRAFT = {
    "train": [("0034309", 0, 0, (1, 1, 80, 60)), ("1340192", 1, 1, (11, 6, 70, 35))],
    "val": [("0056978", 2, 1, (5, 5, 6, 7))],
    "test": [("0698580", 3, 2, (2, 3, 79, 45)), ("0450014", 0, 0, (1, 1, 81, 20))],
}


@pytest.fixture
def folder(tmp_path):
    """Five aircraft of four variants."""
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    write(data / "variants.txt", VARIANTS)
    write(data / "families.txt", FAMILIES)
    write(data / "manufacturers.txt", MANUFACTURERS)
    boxes = []
    for split, aircraft in AIRCRAFT.items():
        for i, (name, *_) in enumerate(aircraft):
            photo(data / "images" / f"{name}.jpg", size=SIZE, seed=i + len(split))
        write(data / f"images_variant_{split}.txt", [(a[0], VARIANTS[a[1]]) for a in aircraft])
        write(data / f"images_family_{split}.txt", [(a[0], FAMILIES[a[1]]) for a in aircraft])
        write(
            data / f"images_manufacturer_{split}.txt",
            [(a[0], MANUFACTURERS[a[2]]) for a in aircraft],
        )
        boxes += [(name, *box) for name, _, _, box in aircraft]
    write(data / "images_box.txt", boxes)
    return data.parent


def scan(path):
    return FGVC_AIRCRAFT.scan(open_archive(path, lists=FGVC_AIRCRAFT.lists))


@pytest.mark.parametrize("kind", official_archives.KINDS)
def test_everything_comes_back(folder, tmp_path, kind):
    path = official_archives.pack(folder, kind)
    official_archives.build("fgvc_aircraft", path, tmp_path / "sets")
    for split, word in (("train", "train"), ("validation", "val"), ("test", "test")):
        fields = ("image", "label", "family", "manufacturer", "box")
        examples = official_archives.read("fgvc_aircraft", split, tmp_path / "sets", fields)
        assert examples.keys() == {f"{name}.jpg" for name, *_ in AIRCRAFT[word]}
        for name, variant, manufacturer, (xmin, ymin, xmax, ymax) in AIRCRAFT[word]:
            example = examples[f"{name}.jpg"]
            original = pixels(folder / "data" / "images" / f"{name}.jpg")[:40]  # 20 rows less
            assert example["image"].shape == (40, 80, 3)
            assert np.abs(example["image"].astype(int) - original).mean() < 1
            assert int(example["label"]) == int(example["family"]) == variant
            assert int(example["manufacturer"]) == manufacturer
            box = [ymin - 1, xmin - 1, min(ymax, 40), min(xmax, 80)]
            np.testing.assert_array_equal(example["box"], box)
    source = open_source("fgvc_aircraft", split="train+validation", data_dir=str(tmp_path / "sets"))
    assert len(source) == 3
    assert source.class_names == tuple(VARIANTS)


@pytest.mark.parametrize("options", [{}, {"quality": 60}, {"quality": 90, "subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_cutting_the_banner_hardly_touches_the_rest(mode, options):
    rng = np.random.default_rng(0)
    detail = rng.integers(-50, 50, (72, 96, 1))  # as in photographs, colours vary less
    colours = Image.fromarray(rng.integers(50, 206, (3, 4, 3)).astype(np.uint8))
    smooth = np.asarray(colours.resize((96, 72), Image.Resampling.BICUBIC)).astype(int)
    original = Image.fromarray((smooth + detail).clip(0, 255).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    original.save(file, "JPEG", **options)
    before = pixels_of(file.getvalue())[:52]
    after = pixels_of(cut_banner(file.getvalue()))
    assert after.shape == before.shape
    loss = np.abs(after - before).mean()
    lost_before = np.abs(before - np.asarray(original.convert("RGB"))[:52]).mean()
    assert loss < 0.1 * lost_before  # with Pillow's default tables it is more than that


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def unknown_variant(data):
    write(data / "images_variant_val.txt", ["0056978 Concorde"])
    return "images_variant_val.txt has the class 'Concorde', which is not in .*data/variants.txt"


def no_box(data):
    write(data / "images_box.txt", ["0034309 1 1 2 2"])
    return "1340192 is not in all of images_box.txt and images_.*_train.txt"


def no_family(data):
    write(data / "images_family_test.txt", ["0698580 Cessna 172"])
    return "0450014 is not in all of images_box.txt and images_.*_test.txt"


def no_list(data):
    (data / "images_manufacturer_val.txt").unlink()
    return "holds no data/images_manufacturer_val.txt"


@pytest.mark.parametrize("spoil", [unknown_variant, no_box, no_family, no_list])
def test_lists_that_are_wrong(folder, spoil):
    message = spoil(folder / "data")
    with pytest.raises(ValueError, match=message) as error:
        scan(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_annotations_alone_are_not_enough(folder, tmp_path):
    (folder / "data" / "images").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"holds no data/images/0034309.jpg"):
        official_archives.build("fgvc_aircraft", folder, tmp_path / "sets")

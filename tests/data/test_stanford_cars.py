"""Stanford Cars from small archives in its layout."""

import numpy as np
import pytest
from scipy.io import savemat

from attnzoom_jax.data.datasets.archive import open_archive
from attnzoom_jax.data.datasets.stanford_cars import STANFORD_CARS
from attnzoom_jax.data.source import open_source
from tests.data import official_archives
from tests.data.official_archives import photo, pixels

NAMES = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo 2012"]
SIZE = (10, 16)
# {split: [(file, class from 1, (x1, y1, x2, y2) from 1)]}
CARS = {
    "train": [
        ("00001.jpg", 3, (1, 1, 16, 10)),
        ("00002.jpg", 1, (3, 2, 9, 8)),
        ("00003.jpg", 2, (5, 5, 17, 11)),
    ],
    "test": [("00001.jpg", 2, (4, 3, 4, 3))],
}


def annotate(path, cars, fields=("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")):
    """A struct array of one row, as MATLAB stores it."""
    records = np.empty((1, len(cars)), [(field, object) for field in fields])
    for place, (name, label, box) in enumerate(cars):
        records[0, place] = (*box, label, name)[: len(fields)]
    savemat(path, {"annotations": records})


@pytest.fixture
def folder(tmp_path):
    """Four cars of three kinds, one in grey."""
    root = tmp_path / "cars"
    for split, cars in CARS.items():
        for i, (name, *_) in enumerate(cars):
            mode = "L" if i == 2 else "RGB"
            photo(root / f"cars_{split}" / name, size=SIZE, seed=i + len(split), mode=mode)
    (root / "devkit").mkdir()
    cells = np.array([[*NAMES]], dtype=object)  # a cell array
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells})
    annotate(root / "devkit" / "cars_train_annos.mat", CARS["train"])
    annotate(root / "cars_test_annos_withlabels.mat", CARS["test"])
    return root


def scan(path):
    return STANFORD_CARS.scan(open_archive(path, lists=STANFORD_CARS.lists))


@pytest.mark.parametrize("kind", official_archives.KINDS)
def test_everything_comes_back(folder, tmp_path, kind):
    path = official_archives.pack(folder, kind)
    contents = official_archives.build("stanford_cars", path, tmp_path / "sets")
    assert contents.notes == ()
    for split, cars in CARS.items():
        fields = ("image", "label", "box")
        examples = official_archives.read("stanford_cars", split, tmp_path / "sets", fields)
        assert examples.keys() == {f"cars_{split}/{name}" for name, *_ in cars}
        for name, label, (x1, y1, x2, y2) in cars:
            example = examples[f"cars_{split}/{name}"]
            np.testing.assert_array_equal(example["image"], pixels(folder / f"cars_{split}" / name))
            assert int(example["label"]) == label - 1
            # The pixels from the first to the last, those outside of the image left out.
            inside = np.zeros((20, 20), bool)
            inside[y1 - 1 : y2, x1 - 1 : x2] = True
            inside[SIZE[0] :], inside[:, SIZE[1] :] = False, False
            found = np.zeros((20, 20), bool)
            top, left, bottom, right = example["box"]
            found[top:bottom, left:right] = True
            np.testing.assert_array_equal(found, inside)
    source = open_source("stanford_cars", split="train", data_dir=str(tmp_path / "sets"))
    assert source.class_names == tuple(NAMES)


def test_the_labels_of_test_may_lie_in_devkit(folder):
    name = "cars_test_annos_withlabels.mat"
    (folder / name).rename(folder / "devkit" / name)
    assert list(scan(folder).splits) == ["train", "test"]


@pytest.mark.parametrize(
    ("gone", "split", "note"),
    [
        (
            "cars_test_annos_withlabels.mat",
            "train",
            "cars_test_annos_withlabels.mat; the split test",
        ),
        ("cars_test", "train", "holds no cars_test/; the split test is left out"),
        ("cars_train", "test", "holds no cars_train/; the split train is left out"),
    ],
)
def test_a_split_that_is_not_there_is_left_out_and_told(folder, tmp_path, gone, split, note):
    (folder / gone).rename(tmp_path / "away")
    contents = scan(folder)
    assert list(contents.splits) == [split]
    assert note in contents.notes[0]


def no_split(folder):
    for split in CARS:
        (folder / f"cars_{split}").rename(folder / f"other_{split}")
    return "holds no split: "


def no_names(folder):
    (folder / "devkit" / "cars_meta.mat").unlink()
    return "holds no devkit/cars_meta.mat"


def broken_list(folder):
    file = folder / "devkit" / "cars_train_annos.mat"
    file.write_bytes(file.read_bytes()[:150])
    return "cars_train_annos.mat is no MATLAB file with 'annotations'"


def another_variable(folder):
    savemat(folder / "devkit" / "cars_meta.mat", {"names": [1]})
    return "cars_meta.mat is no MATLAB file with 'class_names'"


def a_list_without_classes(folder):
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    annotate(folder / "cars_test_annos_withlabels.mat", CARS["test"], fields)
    return "cars_test_annos_withlabels.mat is not as expected "


def an_unknown_class(folder):
    annotate(folder / "cars_test_annos_withlabels.mat", [("00001.jpg", 4, (1, 1, 2, 2))])
    return "has the class 4 for cars_test/00001.jpg; expected 1 to 3"


@pytest.mark.parametrize(
    "spoil",
    [no_split, no_names, broken_list, another_variable, a_list_without_classes, an_unknown_class],
)
def test_what_is_missing_or_broken_is_named(folder, spoil):
    message = spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        scan(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)

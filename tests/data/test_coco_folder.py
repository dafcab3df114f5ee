"""Boxes and segments of a folder in COCO's layout."""

import csv
import json
import tarfile
import types

import numpy as np
import pytest

from attnzoom_jax.data.annotated import open_annotated
from attnzoom_jax.data.datasets.coco_folder import decode_runs, to_mask
from tests.attribution.imported_networks import DATA
from tests.data.official_archives import photo

SIZE = (20, 30)
SPLIT = "val2014"
POLYGON = [3.0, 2.0, 9.0, 2.0, 9.0, 7.0, 3.0, 7.0]  # rows 2 to 6, columns 3 to 8


def annotation(number, image, category, bbox, segmentation=(POLYGON,), is_crowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "segmentation": segmentation,
        "iscrowd": is_crowd,
        "area": 1.0,
    }


CONTENT = {
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
    "images": [
        {"id": 42, "file_name": "b.jpg", "height": 20, "width": 30},
        {"id": 7, "file_name": "a.jpg", "height": 20, "width": 30},
    ],
    "annotations": [
        annotation(1, 42, 90, [3.0, 2.0, 6.0, 5.0]),
        annotation(2, 99, 90, [3.0, 2.0, 6.0, 5.0]),  # of an image that is not listed
        annotation(
            3, 42, 1, [0.25, 0.5, 10, 1.5], {"size": [20, 30], "counts": [20, 3, 577]}, is_crowd=1
        ),
    ],
}


def save(root, content):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"annotations/instances_{SPLIT}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    """Two images, the first with an object and a crowd."""
    root = tmp_path / "coco"
    save(root, CONTENT)
    for i, name in enumerate(("a.jpg", "b.jpg")):
        photo(root / SPLIT / name, size=SIZE, seed=i)
    return root


def data(folder):
    return types.SimpleNamespace(name="coco_folder", dir=str(folder))


def read(folder, split=SPLIT, truth="boxes"):
    return {e["name"]: e for e in open_annotated(data(folder), split=split, truth=truth)}


def changed(**changes):
    """The content with another first annotation."""
    first = {k: v for k, v in {**CONTENT["annotations"][0], **changes}.items() if v is not None}
    return {**CONTENT, "annotations": [first]}


@pytest.mark.parametrize("truth", ["boxes", "segments"])
def test_objects(folder, truth):
    source = open_annotated(data(folder), split=SPLIT, truth=truth)
    assert source.class_names == ("person", "toothbrush")  # in the order of the ids
    first, second = source
    assert (first["name"], second["name"]) == ("b.jpg", "a.jpg")
    assert first["image"].shape == (*SIZE, 3)
    np.testing.assert_array_equal(first["boxes"], [[2, 3, 7, 9], [0.5, 0.25, 2, 10.25]])
    np.testing.assert_array_equal(first["labels"], [1, 0])
    np.testing.assert_array_equal(first["is_hard"], [False, False])
    assert first["problems"] == second["problems"] == ()
    assert len(second["labels"]) == 0
    assert ("masks" in first) == ("masks" in second) == (truth == "segments")
    if truth == "segments":
        expected = np.zeros((2, *SIZE), bool)
        expected[0, 2:7, 3:9] = True
        expected[1, :3, 1] = True  # runs go down the columns
        np.testing.assert_array_equal(first["masks"], expected)
        assert second["masks"].shape == (0, *SIZE)


def test_slices(folder):
    assert list(read(folder, f"{SPLIT}[:1]")) == ["b.jpg"]
    assert list(read(folder, f"{SPLIT}[50%:]")) == ["a.jpg"]


# Segments


def inside(polygon, size):
    """Whether the centre of each pixel lies in a polygon: how often a ray to the left meets it."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    mask = np.zeros(size, bool)
    for row, column in np.ndindex(*size):
        x, y = column + 0.5, row + 0.5
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (y0 <= y < y1) or (y1 <= y < y0):
                mask[row, column] ^= x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x
    return mask


def test_polygons():
    rng = np.random.default_rng(0)
    for corners in (3, 4, 9):
        polygon = rng.uniform(-4, 22, 2 * corners).tolist()  # also beyond the image
        np.testing.assert_array_equal(
            to_mask([polygon], (13, 17)), inside(polygon, (13, 17)), err_msg=str(polygon)
        )
    # The union of several, not what an odd number of them covers.
    other = [5.0, 4.0, 12.0, 4.0, 12.0, 9.0, 5.0, 9.0]
    expected = inside(POLYGON, SIZE) | inside(other, SIZE)
    np.testing.assert_array_equal(to_mask([POLYGON, other], SIZE), expected)
    assert expected.sum() == 30 + 35 - 12


def encode(mask):
    """COCO's text of a mask: lengths of runs down the columns, five bits to a character."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat.astype(int), prepend=1 - flat[0], append=2))
    runs = np.diff(ends).tolist()
    runs = [0, *runs] if flat[0] else runs
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            is_last = value == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if is_last else 32))
            if is_last:
                break
    return runs, text


def test_run_lengths():
    rng = np.random.default_rng(0)
    for size, share in (((7, 5), 0.5), ((40, 61), 0.1), ((300, 200), 0.001), ((3, 4), 0.0)):
        mask = rng.random(size) < share
        mask[: size[0] // 2, : size[1] // 3] |= share > 0
        runs, text = encode(mask)
        np.testing.assert_array_equal(decode_runs(runs, size), mask)
        np.testing.assert_array_equal(decode_runs(text, size), mask)
    # A pair that pycocotools makes: the square of 5 pixels.
    square = np.zeros((40, 40), bool)
    square[5:10, 6:11] = True
    runs = [245, 5, 35, 5, 35, 5, 35, 5, 35, 5, 1190]
    np.testing.assert_array_equal(decode_runs(runs, (40, 40)), square)
    np.testing.assert_array_equal(decode_runs("e75S10000000ST1", (40, 40)), square)


# What is wrong is named


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"category_id": 5}, "unknown_class", "b.jpg: annotation 1 of category 5 is left out"),
        ({"bbox": [1, 2, 3]}, "bad_annotation", "b.jpg: annotation 1 is left out (ValueError"),
        ({"bbox": None}, "bad_annotation", "(KeyError: 'bbox')"),
        ({"segmentation": None}, "bad_annotation", "(KeyError: 'segmentation')"),
        ({"segmentation": []}, "bad_annotation", "a segment without polygons"),
        ({"segmentation": [[1, 2, 3, 4]]}, "bad_annotation", "a polygon of 4 numbers"),
        ({"segmentation": [[1, 2, 3, "x", 5, 6]]}, "bad_annotation", "'x'"),
        (
            {"segmentation": {"size": [20, 30], "counts": [20, 3]}},
            "bad_annotation",
            "add up to 23; expected 600",
        ),
        (
            {"segmentation": {"size": [30, 20], "counts": [600]}},
            "bad_annotation",
            "run lengths of [30, 20] pixels; expected (20, 30)",
        ),
        ({"segmentation": [[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]]}, "empty_mask", "has no pixel"),
        ({"bbox": [3, 2, 0, 5]}, "empty_box", "b.jpg: the box [2, 3, 7, 3] of a toothbrush"),
        ({"bbox": [31, 2, 4, 5]}, "empty_box", "holds no pixel of the 20 x 30 image"),
        ({"bbox": [3, 2, 40, 5]}, "clipped_box", "[2, 3, 7, 43] of a toothbrush reaches outside"),
    ],
)
def test_annotations_that_are_wrong(folder, changes, kind, text):
    save(folder, changed(**changes))
    example = read(folder, truth="segments")["b.jpg"]
    ((found, message),) = example["problems"]
    assert found == kind and text in message and "\n" not in message
    count = int(kind == "clipped_box")
    assert len(example["labels"]) == len(example["boxes"]) == len(example["masks"]) == count


def test_images_that_are_wrong(folder):
    (folder / SPLIT / "a.jpg").unlink()
    photo(folder / SPLIT / "b.jpg", size=SIZE[::-1])
    found = read(folder, truth="segments")
    ((kind, text),) = found["a.jpg"]["problems"]
    assert kind == "unreadable_image" and "a.jpg" in text
    assert found["a.jpg"]["masks"].shape == (0, 1, 1)
    ((kind, text),) = found["b.jpg"]["problems"]
    assert kind == "other_size"
    assert text == "b.jpg has 30 x 20 pixels, its annotation is of 20 x 30; it is left out"
    assert len(found["b.jpg"]["labels"]) == 0


@pytest.mark.parametrize(
    "split, truth, message",
    [
        ("val2017", "boxes", r"split 'val2017': there is no .*_val2017.json; there is: val2014"),
        (SPLIT, "parts", r"coco has no parts; it has boxes and segments"),
        (f"{SPLIT}[5:]", "boxes", r"incompatible with 2 examples"),
    ],
)
def test_what_is_not_there(folder, split, truth, message):
    with pytest.raises(ValueError, match=message):
        open_annotated(data(folder), split=split, truth=truth)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"instances_val2014.json is no list of instances \(JSONDecodeError"),
        ("[]", r"no list of instances \(TypeError"),
        ('{"images": [], "annotations": []}', r"\(KeyError: 'categories'\)"),
        (json.dumps({**CONTENT, "images": []}), r"incompatible|holds no image"),
    ],
)
def test_files_that_are_none(folder, content, message):
    (folder / f"annotations/instances_{SPLIT}.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_annotated(data(folder), split=SPLIT)
    assert "\n" not in str(error.value)


# Real photographs

REAL = DATA / "coco256" / "coco256.tar"


@pytest.mark.data
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} in {DATA} (ATTNZOOM_DATA)")
def test_photographs_of_coco(tmp_path):
    with tarfile.open(REAL) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "coco256"
    content = json.loads((root / "coco_instances_train2017_128.json").read_text())
    (root / "annotations").mkdir()
    (root / "coco_instances_train2017_128.json").rename(
        root / "annotations/instances_train2017.json"
    )
    (root / "JPEGImages").rename(root / "train2017")
    source = open_annotated(data(root), split="train2017", truth="segments")
    assert (len(source), len(source.class_names)) == (128, 80)
    expected: dict[str, list] = {}
    for row in csv.DictReader((root / "boxes_all_80classes.csv").read_text().splitlines()):
        if row["split"] == "train2017":
            box = [float(row[key]) for key in ("y0", "x0", "y1", "x1")]
            expected.setdefault(row["file"], []).append((row["class"], box))
    areas: dict[int, list] = {}
    for thing in content["annotations"]:
        areas.setdefault(thing["image_id"], []).append((thing["area"], thing["iscrowd"]))
    count, shares = 0, []
    for image, example in zip(content["images"], source, strict=True):
        assert (example["name"], example["problems"]) == (image["file_name"], ())
        found = sorted(
            (source.class_names[label], box.tolist())
            for label, box in zip(example["labels"], example["boxes"], strict=True)
        )
        known = sorted(expected.get(example["name"], []))
        assert [name for name, _ in found] == [name for name, _ in known]
        np.testing.assert_allclose(
            [box for _, box in found] or [[0] * 4], [box for _, box in known] or [[0] * 4], atol=0.1
        )
        count += len(found)
        of_image = areas.get(image["id"], [])
        for (area, is_crowd), mask in zip(of_image, example["masks"], strict=True):
            if area > 200 and not is_crowd:
                shares.append(mask.sum() / area)
    assert count == len(content["annotations"]) == 939
    # The file has the polygons' areas.
    assert abs(np.mean(shares) - 1) < 2e-3 and np.std(shares) < 0.02

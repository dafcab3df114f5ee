import shutil

import ml_collections
import numpy as np
import pytest

from attnzoom_jax.data.fingerprint import ENDS, fingerprint


@pytest.fixture
def folder(shapes_dir, tmp_path):
    """A copy of fine_shapes/mini."""
    return shutil.copytree(f"{shapes_dir}/fine_shapes/mini", tmp_path / "fine_shapes" / "mini")


def of(folder, patches=""):
    data = {"name": "fine_shapes/mini", "dir": str(folder.parent.parent), "patches": str(patches)}
    return fingerprint(ml_collections.ConfigDict(data))


def test_a_set_is_named_and_counted(folder, tmp_path):
    found = of(folder)
    assert found["name"] == "fine_shapes/mini/1.0.0"
    assert found["examples"] == {"train": 30, "validation": 10, "test": 10}
    assert found["bytes"] > 1000 and len(found["sha256"]) == 64
    # Another place and another date are the same set.
    copy = shutil.copytree(folder, tmp_path / "moved" / "fine_shapes" / "mini")
    for path in copy.rglob("*"):
        path.touch()
    (copy / "1.0.0" / "dataset_info.json").write_text(
        (copy / "1.0.0" / "dataset_info.json").read_text() + " "
    )
    assert of(copy) == found


@pytest.mark.parametrize("place", [0, -1, 1000])
def test_other_ends_of_a_file_are_another_set(folder, place):
    before = of(folder)
    (file,) = folder.glob("*/*validation.array_record*")
    content = bytearray(file.read_bytes())
    assert len(content) > ENDS / 100
    content[place] ^= 1
    file.write_bytes(content)
    after = of(folder)
    assert after["sha256"] != before["sha256"]
    assert {**after, "sha256": ""} == {**before, "sha256": ""}


def test_boxes_belong_to_it(folder, tmp_path):
    patches = tmp_path / "patches"
    patches.mkdir()
    found = [of(folder)]
    for seed in (0, 1):
        boxes = np.random.default_rng(seed).random((3, 1, 5))
        np.save(patches / "train_patches.npy", boxes)
        found.append(of(folder, patches))
    assert len({of["sha256"] for of in found}) == 3

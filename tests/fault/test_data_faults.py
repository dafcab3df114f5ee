"""What befalls the data of a run: the example, file or set is named, and nothing is lost."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.data.datasets.archive import open_archive
from attnzoom_jax.data.image_file import read_image
from attnzoom_jax.data.patches import read_boxes
from attnzoom_jax.data.source import data_root, open_source
from attnzoom_jax.training.writer import read_metrics
from tests.data import tfds_sets
from tests.fault.conftest import Run, goes_on, is_one_line
from tests.fault.run_kills import differences, end_of

SET = "fine_shapes/tiny"


@pytest.fixture
def data(tmp_path, whole):
    """A copy of the data set, to be damaged."""
    shutil.copytree(data_root("") / SET, tmp_path / "data" / SET)
    return tmp_path / "data"


def flip_bit(data, split, place):
    (file,) = data.glob(f"{SET}/*/*-{split}.array_record*")
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_record_stops_the_run_by_default(programmes, whole, data, tmp_path, record):
    run = Run(programmes, tmp_path / "run", data)
    good = (tmp_path / "good", tmp_path / "data")
    shutil.copytree(data, good[0])
    flip_bit(data, "train", 0.5)
    ended = run.go()
    assert ended.code == 1 and is_one_line(ended), ended.err
    shutil.rmtree(data)
    good[0].rename(data)
    said = ended.err.partition("(")[0] + "(...)"
    record("damaged record in the data", ended, lost=goes_on(run, whole), said=said[7:])


@pytest.mark.slow
def test_a_damaged_record_may_be_left_out(programmes, whole, data, tmp_path, record):
    flip_bit(data, "train", 0.5)
    runs = [Run(programmes, tmp_path / name, data) for name in ("run", "again")]
    skip = "--config.data.on_bad_example=skip"
    ended = [
        run.go(skip, f"--config.data.num_threads={threads}")
        for run, threads in zip(runs, (1, 3), strict=True)
    ]
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert differences(end_of(runs[0].folder), end_of(runs[1].folder)) == []
    assert differences(end_of(runs[0].folder), end_of(whole.folder)) != []
    left_out = json.loads((runs[0].folder / "run.json").read_text())["left_out"]
    assert len(left_out) == 1
    said = ended[0].err.partition("(")[0].strip() + " (...)"
    fault = "damaged record in the data, on_bad_example=skip"
    record(fault, ended[0], lost=[], said=said)


@pytest.mark.slow
def test_another_data_set_is_refused(programmes, data, tmp_path, record):
    run = Run(programmes, tmp_path / "run", data)
    assert run.go("--config.total_steps=4").code == 0
    before = read_metrics(run.folder)
    flip_bit(data, "test", 0.01)
    ended = run.go("--config.total_steps=4")
    assert ended.code == 1 and ended.err.startswith("error: ")
    lines = ended.err.splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == ["sha256", "sha256"]
    assert read_metrics(run.folder) == before
    flip_bit(data, "test", 0.01)
    again = run.go("--config.total_steps=4")
    assert again.code == 0 and "nothing to do" in again.out
    said = f"{lines[0][7:]} - sha256 = ... + sha256 = ... {lines[-1]}"
    record("data set changed under a run", ended, lost=[], said=said)


def refuses(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_numbers_that_are_none(tmp_path, note):
    boxes = np.zeros((1, 1, 5), np.float32)
    boxes[0, 0] = (np.nan, 10, 0, 10, 0)
    np.save(tmp_path / "train_patches.npy", boxes)
    said = refuses(read_boxes, tmp_path / "train_patches.npy", [("a.jpg", 0)])
    note("NaN in the boxes of the data", said)


def test_a_member_of_an_archive_that_leads_outside(tmp_path, note):
    path = tmp_path / "archive.tar"
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("../../etc/passwd"), io.BytesIO())
    note("path traversal in an archive", refuses(lambda: open_archive(path, lists=())))


def test_an_image_that_unpacks_to_gigabytes(tmp_path, note):
    """Black, 200 million pixels in some kB: neither OpenCV nor Pillow unpacks it."""
    folder = tmp_path / "photos" / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("1", (20_000, 10_000)).save(folder / "bomb.png")
    said = refuses(read_image, folder / "bomb.png")
    assert "decompression bomb" in said
    bird = tfds_sets.birds(1)[0] | {"image": io.BytesIO((folder / "bomb.png").read_bytes())}
    data = tmp_path / "data"
    tfds_sets.prepare("caltech_birds2011", {"train": [bird], "test": [bird]}, data)
    source = open_source("caltech_birds2011", split="train", data_dir=str(data))
    assert "pixels <= CV_IO_MAX_IMAGE_PIXELS" in refuses(source.__getitem__, 0)
    note("decompression-bomb image", said)

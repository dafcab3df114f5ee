"""tools/prepare_data.py: folders of images, embedded sets, TFDS by name, and what goes wrong."""

import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

import cv2
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image

from attnzoom_jax.data.source import ARCHIVES, open_source, prepare_command
from tests.data import official_archives

FILE = pathlib.Path(__file__).parent.parent.parent / "tools" / "prepare_data.py"


@pytest.fixture(scope="session")
def tool():
    spec = importlib.util.spec_from_file_location("prepare_data", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepare(tool, tmp_path, capsys):
    """Run the tool on a folder of prepared sets; returns exit code, stdout and stderr."""

    def run(*arguments):
        code = tool.main([*arguments, f"--data_dir={tmp_path / 'sets'}"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def sets(tmp_path):
    return str(tmp_path / "sets")


def noise(h=6, w=8, seed=0, channels=3):
    shape = (h, w, channels) if channels > 1 else (h, w)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Two splits, three classes, ten images of one size."""
    folder = tmp_path / "photos"
    for i, (split, kind) in enumerate([("train", "cat"), ("train", "dog"), ("test", "cat")] * 3):
        write(folder / split / kind / f"{i}.png", noise(seed=i))
    write(folder / "test" / "dog" / "9.PNG", noise(seed=9), format="PNG")
    return folder


def read(name, split, sets):
    fields = ("image", "label", "file_name")
    source = open_source(name, split=split, data_dir=sets, fields=fields)
    examples = {example["file_name"].decode(): example for example in source.examples}
    assert len(examples) == len(source)
    return source, examples


# Folders of images


def test_a_folder_comes_back_as_it_was(prepare, photos, sets):
    code, out, err = prepare("my_photos", f"--from_folder={photos}")
    assert (code, err) == (0, "")
    assert "ready: my_photos with 4 test, 6 train examples, 2 classes" in out
    for split in ("train", "test"):
        source, examples = read("my_photos", split, sets)
        assert source.class_names == ("cat", "dog")
        assert source.image_shape == (6, 8, 3)
        files = [file for file in (photos / split).rglob("*") if file.is_file()]
        assert set(examples) == {file.relative_to(photos).as_posix() for file in files}
        for file in files:
            example = examples[file.relative_to(photos).as_posix()]
            np.testing.assert_array_equal(example["image"], np.asarray(Image.open(file)))
            assert source.class_names[int(example["label"])] == file.parent.name


def test_no_class_is_lost_in_a_slice(prepare, tmp_path, sets):
    for i in range(60):
        write(tmp_path / "many" / "train" / "abc"[i // 20] / f"{i}.png", noise(2, 2, seed=i))
    assert prepare("many", f"--from_folder={tmp_path / 'many'}")[0] == 0
    for split in ("train[:50%]", "train[50%:]"):  # stored in the order of files, c would be absent
        source = open_source("many", split=split, data_dir=sets)
        assert {int(example["label"]) for example in source.examples} == {0, 1, 2}


def test_unusual_images_come_out_as_a_viewer_shows_them(prepare, tmp_path, sets):
    folder, rgb, grey = tmp_path / "odd" / "train" / "x", noise(), noise(channels=1)
    write(folder / "grey.png", grey)
    write(folder / "alpha.png", np.dstack([rgb, grey]))
    Image.fromarray(rgb).quantize(16).save(folder / "palette.png")
    Image.fromarray(grey > 99).save(folder / "bits.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep_grey.png")
    cv2.imwrite(str(folder / "deep_rgb.png"), rgb[..., ::-1].astype(np.uint16) * 257)
    write(folder / "deeper" / "nested.png", rgb)
    write(folder / "png_called.jpg", rgb, format="PNG")
    write(folder / "webp_called.png", rgb, format="WEBP", lossless=True)
    write(folder / ".hidden.png", rgb)
    write(folder / ".cache" / "thumbnail.png", rgb)
    (folder / "notes.txt").write_text("no image")
    code, out, _ = prepare("odd", f"--from_folder={tmp_path / 'odd'}")
    assert code == 0
    assert f"left out: 1 other files, the first is {folder / 'notes.txt'}" in out
    _, examples = read("odd", "train", sets)
    as_rgb = np.repeat(grey[..., None], 3, axis=-1)
    palette = np.asarray(Image.open(folder / "palette.png").convert("RGB"))
    expected = {
        "grey.png": as_rgb,
        "alpha.png": rgb,
        "palette.png": palette,
        "bits.png": np.where(as_rgb > 99, 255, 0),
        "deep_grey.png": as_rgb,
        "deep_rgb.png": rgb,
        "deeper/nested.png": rgb,
        "png_called.jpg": rgb,
        "webp_called.png": rgb,
    }
    assert set(examples) == {f"train/x/{name}" for name in expected}
    for name, image in expected.items():
        np.testing.assert_array_equal(examples[f"train/x/{name}"]["image"], image, err_msg=name)


def test_jpeg_files_are_kept_or_turned_upright(prepare, tmp_path, sets):
    folder = tmp_path / "jpegs" / "train" / "x"
    ramp = np.add.outer(np.arange(40) * 4, np.arange(24) * 2).astype(np.uint8)  # taller than wide
    image = np.dstack([ramp, ramp // 2, 255 - ramp])
    write(folder / "plain.jpg", image)
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying on its side
    write(folder / "turned.JPEG", np.rot90(image).copy(), format="JPEG", exif=turned, quality=95)
    Image.fromarray(image).convert("CMYK").save(folder / "print.jpg", quality=95)
    assert prepare("jpegs", f"--from_folder={tmp_path / 'jpegs'}")[0] == 0
    source, examples = read("jpegs", "train", sets)
    assert source.image_shape == (40, 24, 3)
    for name in ("plain.jpg", "turned.JPEG", "print.jpg"):
        error = np.abs(examples[f"train/x/{name}"]["image"].astype(int) - image)
        assert error.mean() < 4, name
    stored: Any = source.examples
    assert any((folder / "plain.jpg").read_bytes() in record for record in stored.records)


def test_images_of_several_sizes(prepare, photos, sets):
    write(photos / "train" / "cat" / "large.png", noise(30, 20))
    assert prepare("mixed", f"--from_folder={photos}")[0] == 0
    assert open_source("mixed", split="train", data_dir=sets).image_shape == (None, None, 3)


def spoil(photos):
    """A text file called png, and a PNG and a JPEG that break off; returns their paths."""
    cut = photos / "train" / "cat" / "cut.png"
    write(cut, noise(40, 40))
    cut.write_bytes(cut.read_bytes()[:2000])
    half = photos / "train" / "dog" / "half.jpg"
    write(half, noise(40, 40))
    half.write_bytes(half.read_bytes()[:-700])
    text = photos / "test" / "dog" / "text.png"
    text.write_text("this is no image")
    return [cut, half, text]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_broken_image_stops_and_is_named(prepare, photos, sets, which):
    broken = spoil(photos)
    path = broken.pop(which)
    for other in broken:
        other.unlink()
    code, _, err = prepare("my_photos", f"--from_folder={photos}")
    assert code == 1
    assert err.startswith(f"error: {path} is no readable image (")
    assert "--skip_broken" in err
    assert err.count("\n") == 1
    assert not list(pathlib.Path(sets).glob("my_photos/*"))


def test_broken_images_can_be_left_out(prepare, photos, sets):
    broken = spoil(photos)
    code, out, err = prepare("my_photos", f"--from_folder={photos}", "--skip_broken")
    assert (code, err) == (0, "")
    for path in broken:
        assert out.count(f"left out: {path} is no readable image") == 1
    assert "left out: 3 unreadable images" in out
    assert "ready: my_photos with 4 test, 6 train examples" in out


def test_a_split_of_broken_images_alone_is_an_error(prepare, photos):
    for path in (photos / "test").rglob("*.*"):
        path.write_text("no image")
    code, _, err = prepare("my_photos", f"--from_folder={photos}", "--skip_broken")
    assert code == 1
    assert f"the split 'test' in {photos} has no readable image" in err


def test_a_class_that_a_split_lacks_is_told(prepare, photos):
    write(photos / "train" / "emu" / "1.png", noise())
    _, out, _ = prepare("my_photos", f"--from_folder={photos}")
    assert "note: test has no image of emu" in out


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("x", "nowhere", "there is no folder"),
        ("x", "photos/train", "is the level of splits or of classes missing?"),
        ("x", "photos/train/cat", "is the level of splits or of classes missing?"),
        ("My-Photos", "photos", "expected a word in lower case"),
        ("a/b", "photos", "expected a word in lower case"),
        ("fine_shapes", "photos", "the name of an embedded data set"),
    ],
)
def test_bad_folders_and_names(prepare, photos, name, folder, message):
    code, _, err = prepare(name, f"--from_folder={photos.parent / folder}")
    assert code == 1
    assert err.startswith("error: ")
    assert message in err


def test_a_split_must_be_a_word(prepare, photos):
    (photos / "test").rename(photos / "test-2")
    code, _, err = prepare("my_photos", f"--from_folder={photos}")
    assert code == 1
    assert "the split 'test-2'" in err


def test_what_is_prepared_stays(prepare, photos, sets):
    prepare("my_photos", f"--from_folder={photos}")
    write(photos / "train" / "cat" / "new.png", noise())
    code, out, _ = prepare("my_photos", f"--from_folder={photos}")
    assert code == 0
    assert "my_photos is already prepared: " in out
    assert f"nothing was read from {photos}" in out
    assert len(open_source("my_photos", split="train", data_dir=sets)) == 6
    assert prepare("my_photos")[0] == 0


# Official archives; what they hold is tested in tests/data


@pytest.fixture
def tiny_imagenet(tmp_path):
    """The validation half of Tiny ImageNet's layout, two images."""
    folder = tmp_path / "tiny-imagenet-200"
    for i in range(2):
        write(folder / "val" / "images" / f"val_{i}.JPEG", noise(64, 64, seed=i))
    lists = {
        "wnids.txt": ["n02", "n01"],
        "words.txt": ["n01\tcat", "n02\tdog"],
        "val/val_annotations.txt": [f"val_{i}.JPEG\tn0{i + 1}\t0\t1\t2\t3" for i in range(2)],
    }
    for name, lines in lists.items():
        official_archives.write(folder / name, lines)
    return folder


@pytest.mark.parametrize("kind", official_archives.KINDS)
def test_an_official_archive(prepare, tiny_imagenet, sets, kind):
    path = official_archives.pack(tiny_imagenet, kind)
    code, out, err = prepare("tiny_imagenet", f"--from_archive={path}")
    assert (code, err) == (0, "")
    assert "validation: 2 images\n" in out
    assert "the split train is left out\n" in out
    assert "ready: tiny_imagenet with 2 validation examples, 2 classes" in out
    source, examples = read("tiny_imagenet", "validation", sets)
    assert source.class_names == ("dog", "cat")
    assert {int(example["label"]) for example in examples.values()} == {0, 1}
    code, out, _ = prepare("tiny_imagenet", f"--from_archive={path}")
    assert code == 0
    assert "tiny_imagenet is already prepared: " in out
    assert f"nothing was read from {path}; move that set away" in out
    assert prepare("tiny_imagenet")[0] == 0


def test_a_broken_archive(prepare, tiny_imagenet, sets):
    (tiny_imagenet / "val" / "images" / "val_1.JPEG").write_text("no image")
    path = official_archives.pack(tiny_imagenet, "zip")
    code, _, err = prepare("tiny_imagenet", f"--from_archive={path}")
    assert code == 1
    assert err.startswith(
        f"error: {path}: tiny-imagenet-200/val/images/val_1.JPEG is no readable image ("
    )
    assert err.count("\n") == 1
    assert not list(pathlib.Path(sets).glob("tiny_imagenet/*"))


@pytest.mark.parametrize("name", ARCHIVES)
def test_without_its_archive_it_is_said_what_is_needed(prepare, tool, sets, name):
    code, _, err = prepare(name)
    assert code == 1
    assert f"'{name}' is not prepared in {sets}; it is read from {ARCHIVES[name].needs};" in err
    command = f"python tools/prepare_data.py {name} --data_dir={sets} --from_archive="
    assert err.endswith(f"{command}{ARCHIVES[name].archive}\n")
    assert err.count("\n") == 1
    assert name in tool.__doc__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_imagnet", "--from_archive=x.zip"], "did you mean 'tiny_imagenet'"),
        (["cifar100", "--from_archive=x.zip"], "unknown data set with an official archive"),
        (["fine_shapes", "--from_archive=x.zip"], "unknown data set with an official archive"),
        (["tiny_imagnet"], "did you mean 'tiny_imagenet'"),
        (["tiny_imagenet/small"], "did you mean 'tiny_imagenet'"),
        (["tiny_imagenet", "--from_archive=x.zip"], "there is no archive or folder x.zip"),
        (["tiny_imagenet", "--from_folder=x"], "the name of a data set with an official archive"),
        (["tiny_imagenet", "--from_folder=x", "--from_archive=x"], "exclude each other"),
        (["tiny_imagenet", "--from_archive=x", "--skip_broken"], "must be whole"),
    ],
)
def test_wrong_arguments_for_archives(prepare, arguments, message):
    code, _, err = prepare(*arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert ("--from_folder=FOLDER" in err) == (arguments == ["tiny_imagnet"])


# Embedded and TFDS sets


def test_the_printed_command_works(tmp_path, root):
    command = prepare_command("fine_shapes/tiny", tmp_path / "two words")
    words = shlex.split(command)
    assert words[0] == "python"
    for expected in ("building the embedded data set", "is already prepared: "):
        result = subprocess.run(
            [sys.executable, *words[1:]], cwd=root, capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert expected in result.stdout
        assert "240 train, 60 validation, 60 test examples, 16 classes" in result.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1000", "did you mean 'cifar100'"),
        ("fine_shapes/tinny", "did you mean 'fine_shapes/tiny'"),
        ("cifar100/no_such_config", "preparing cifar100/no_such_config failed: "),
    ],
)
def test_unknown_names(prepare, name, message):
    code, _, err = prepare(name)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_download_that_fails_says_so_soon(prepare, monkeypatch, sets):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # nobody listens
        monkeypatch.setenv(f"{scheme}_proxy".upper(), "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    original = requests.Session.request
    start = time.monotonic()
    code, _, err = prepare("cifar100")
    assert time.monotonic() - start < 20
    assert code == 1
    assert err.startswith("error: preparing cifar100 failed: ")
    assert "cifar-100-binary.tar.gz" in err
    assert err.count("\n") == 1
    assert requests.Session.request is original
    assert not list(pathlib.Path(sets).glob("cifar100/*"))


def test_a_silent_server_is_given_up(prepare, tool, monkeypatch):
    import socket

    server = socket.create_server(("127.0.0.1", 0))  # takes connections, and never answers
    monkeypatch.setattr(tool, "TIMEOUT_S", (0.2, 0.2))
    monkeypatch.setattr(tool, "RETRIES", 1)

    def builder(*args, **kwargs):
        with requests.Session() as session:
            session.get(f"http://127.0.0.1:{server.getsockname()[1]}/data.zip")

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start = time.monotonic()
    code, _, err = prepare("cifar100")
    server.close()
    assert time.monotonic() - start < 10
    assert code == 1
    assert "ReadTimeout" in err


def test_a_module_that_is_missing_is_named(prepare, monkeypatch, sets):
    def builder(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder", builder)
    code, _, err = prepare("cifar100")
    assert code == 1
    assert "No module named 'tensorflow'" in err
    assert f"run: tfds build cifar100 --file_format=array_record --data_dir={sets}" in err


def test_a_set_without_random_access_is_not_called_prepared(prepare, photos, sets):
    prepare("my_photos", f"--from_folder={photos}")
    folder = pathlib.Path(sets) / "my_photos" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    for file in folder.glob("*.array_record-*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    code, _, err = prepare("my_photos")
    assert code == 1
    assert "without random access; move it away and run: " in err

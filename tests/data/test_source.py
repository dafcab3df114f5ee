"""Prepared data sets as sources: what is read, what is refused, and what the refusal says."""

import io
import json
import os
import pathlib
import shlex
import shutil
import socket
import time
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from attnzoom_jax.data.datasets import fine_shapes
from attnzoom_jax.data.source import (
    build_embedded,
    data_root,
    find_prepared,
    open_builder,
    open_source,
    prepare_command,
)

NAME = "fine_shapes/mini"
LABEL = tfds.features.ClassLabel(names=["a", "b"])


class Things(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Any features and examples, in one split."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, features, examples, **kwargs):
        self._features, self._given = features, examples
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": enumerate(self._given)}

    def _generate_examples(self):
        raise NotImplementedError


def build_things(folder, features, examples, file_format="array_record", **settings):
    builder = Things(features, examples, data_dir=folder, file_format=file_format)
    config = tfds.download.DownloadConfig(**settings)
    builder.download_and_prepare(download_config=config)
    return builder


def png(array):
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(file, "PNG")
    return io.BytesIO(file.getvalue())


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def copy(shapes_dir, tmp_path):
    """A copy of the prepared set, to be spoilt: the data_dir and the set's own folder."""
    shutil.copytree(shapes_dir, tmp_path / "sets")
    return str(tmp_path / "sets"), tmp_path / "sets" / NAME / "1.0.0"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What is read


def test_examples_are_those_of_tfds(shapes_dir):
    source = open_source(NAME, split="train", data_dir=shapes_dir, fields=("image", "part_mask"))
    folder = pathlib.Path(shapes_dir) / NAME / "1.0.0"
    builder: Any = tfds.builder_from_directory(folder)
    expected = list(builder.as_data_source(split="train"))
    assert len(source) == 30
    assert source.name == "fine_shapes/mini:train"
    assert source.class_names == tuple(fine_shapes.CLASS_NAMES)
    assert source.image_shape == (32, 32, 3)
    for found, example in zip(source.examples, expected, strict=True):
        assert set(found) == {"image", "part_mask"}
        np.testing.assert_array_equal(found["image"], example["image"])
        np.testing.assert_array_equal(found["part_mask"], example["part_mask"])


def test_only_the_fields_asked_for_are_decoded(shapes_dir, monkeypatch):
    from tensorflow_datasets.core.features import image_feature

    decoded = []
    original = image_feature.cv2.imdecode
    monkeypatch.setattr(
        image_feature.cv2, "imdecode", lambda *args: decoded.append(1) or original(*args)
    )
    for fields, count in ((("label",), 0), (("image", "label"), 1), (("image", "part_mask"), 2)):
        decoded.clear()
        example = open_source(NAME, split="test", data_dir=shapes_dir, fields=fields)[0]
        assert set(example) == set(fields)
        assert len(decoded) == count


def test_a_source_is_a_sequence(shapes_dir):
    source = open_source(NAME, split="test", data_dir=shapes_dir, fields=("label",))
    labels = [int(example["label"]) for example in source.examples]
    assert [int(source[i]["label"]) for i in range(-10, 0)] == labels
    assert len(list(source)) == 10
    with pytest.raises(IndexError):
        source[10]


SPLITS = {
    "train[:50%]": lambda train, test: train[:15],
    "train[7:9]": lambda train, test: train[7:9],
    "train[-4:]": lambda train, test: train[-4:],
    "train[90%:]": lambda train, test: train[27:],
    "train+test": lambda train, test: train + test,
    "train[20:]+test[:3]": lambda train, test: train[20:] + test[:3],
    "train[:3]+train[28:]": lambda train, test: train[:3] + train[28:],
}


@pytest.fixture(scope="module")
def parquet_dir(tmp_path_factory):
    """The same set as Parquet, every split in three files."""
    folder = str(tmp_path_factory.mktemp("parquet"))
    config = fine_shapes.FineShapesConfig(
        name="mini", image_size=32, train=30, validation=10, test=10
    )
    builder = fine_shapes.FineShapes(data_dir=folder, config=config, file_format="parquet")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    return folder


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("storage", ["array_record", "parquet"])
def test_slices_and_sums_of_splits(shapes_dir, parquet_dir, storage, split):
    folder = {"array_record": shapes_dir, "parquet": parquet_dir}[storage]

    def images(split, folder):
        source = open_source(NAME, split=split, data_dir=folder, fields=("image",))
        return [example["image"].tobytes() for example in source.examples]

    expected = SPLITS[split](images("train", shapes_dir), images("test", shapes_dir))
    assert images(split, folder) == expected


def test_images_come_out_as_rgb(tmp_path):
    grey = np.arange(12).reshape(3, 4) * 20
    rgb = np.random.default_rng(0).integers(0, 256, (3, 4, 3))
    rgba = np.concatenate([rgb, np.full((3, 4, 1), 77)], axis=-1)
    as_rgb = np.repeat(grey[..., None], 3, axis=-1)
    for channels, given, expected in (
        (1, [grey], [as_rgb]),
        (3, [rgb, grey, rgba], [rgb, as_rgb, rgb]),
        (4, [rgba], [rgb]),
    ):
        folder = str(tmp_path / str(channels))
        image = tfds.features.Image(shape=(None, None, channels))
        examples = [{"image": png(array), "label": "b"} for array in given]
        build_things(folder, {"image": image, "label": LABEL}, examples)
        source = open_source("things", split="train", data_dir=folder)
        assert source.image_shape == (None, None, 3)
        for found, array in zip(source.examples, expected, strict=True):
            assert found["image"].dtype == np.uint8
            np.testing.assert_array_equal(found["image"], array)
            assert int(found["label"]) == 1


def test_a_set_without_labels_can_be_read_but_not_as_a_classifier(tmp_path):
    features = {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
    build_things(tmp_path, features, [{"image": png(np.zeros((2, 2, 3))), "label": 7}])
    source = open_source("things", split="train", data_dir=str(tmp_path), fields=("image",))
    assert source.class_names == ()
    with pytest.raises(ValueError, match=r"label of things is .*expected a ClassLabel"):
        open_source("things", split="train", data_dir=str(tmp_path))


def test_deep_images_are_refused(tmp_path):
    image = tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16)
    deep = io.BytesIO()
    Image.fromarray(np.full((2, 2), 999, np.uint16)).save(deep, "PNG")
    examples = [{"image": io.BytesIO(deep.getvalue()), "label": 0}]
    build_things(tmp_path, {"image": image, "label": LABEL}, examples)
    with pytest.raises(ValueError, match=r"uint16.*expected uint8"):
        open_source("things", split="train", data_dir=str(tmp_path))


# Where it is looked for


def test_data_root(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/variable")
    assert data_root("~/given") == pathlib.Path.home() / "given"
    assert data_root("") == pathlib.Path("/from/variable")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert data_root("") == pathlib.Path.home() / "tensorflow_datasets"


def test_the_newest_version_wins(copy):
    data_dir, folder = copy
    for version in ("1.9.0", "1.10.0", "incomplete.ABC_2.0.0", "backup"):
        shutil.copytree(folder, folder.parent / version)
        edit_json(folder.parent / version / "dataset_info.json", version="1.10.0")
    assert find_prepared(NAME, pathlib.Path(data_dir)) == folder.parent / "1.10.0"
    assert str(open_builder(NAME, pathlib.Path(data_dir)).version) == "1.10.0"


def test_a_half_written_version_is_none(copy, no_network):
    data_dir, folder = copy
    folder.rename(folder.parent / "incomplete.ABC_1.0.0")
    with pytest.raises(ValueError, match="unknown data set"):
        open_source(NAME, split="train", data_dir=data_dir)


def test_configs(copy):
    data_dir, folder = copy
    root = pathlib.Path(data_dir)
    for config in ("big", "small"):
        shutil.copytree(folder, root / "zoo" / config / "1.0.0")
    assert find_prepared("zoo/small", root) == root / "zoo" / "small" / "1.0.0"
    assert find_prepared("zoo/medium", root) is None
    with pytest.raises(ValueError, match=r"several configs.*zoo/big, zoo/small"):
        open_source("zoo", split="train", data_dir=data_dir)
    (root / "zoo" / ".config").mkdir()
    (root / "zoo" / ".config" / "metadata.json").write_text('{"default_config_name": "small"}')
    assert find_prepared("zoo", root) == root / "zoo" / "small" / "1.0.0"


def test_an_embedded_set_is_its_default_config_and_no_other(copy, monkeypatch):
    data_dir, _ = copy  # holds fine_shapes/mini alone
    asked = []

    def prepare(self, **kwargs):
        asked.append(self.builder_config.name)
        raise OSError("disk full")

    monkeypatch.setattr(fine_shapes.FineShapes, "download_and_prepare", prepare)
    with pytest.raises(OSError, match="disk full"):
        open_source("fine_shapes", split="train", data_dir=data_dir)
    assert asked == ["default"]


def test_an_embedded_set_builds_itself_once(tmp_path, capsys):
    said = []
    for _ in range(2):
        source = open_source("fine_shapes/tiny", split="test", data_dir=str(tmp_path))
        assert len(source) == 60
        said.append(capsys.readouterr().out)
    assert "building the embedded data set fine_shapes/tiny" in said[0]
    assert said[1] == ""


def test_another_process_may_build_the_embedded_set_meanwhile(tmp_path, monkeypatch):
    original = fine_shapes.FineShapes.download_and_prepare

    def too_late(self, **kwargs):
        original(self, **kwargs)
        raise OSError("directory not empty")

    monkeypatch.setattr(fine_shapes.FineShapes, "download_and_prepare", too_late)
    assert build_embedded("fine_shapes/tiny", tmp_path).is_prepared()


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100", "'cifar100' is not prepared in .*run: python tools/prepare_data.py cifar100 "),
        ("imagenet2012", "run: python tools/prepare_data.py imagenet2012 --data_dir="),
        ("cifar1000", "did you mean 'cifar100'"),
        ("fine_shape", "did you mean 'fine_shapes'"),
        ("fine_shapes/tinny", "did you mean 'fine_shapes/tiny'"),
        ("phots", "did you mean 'photos'.*--from_folder=FOLDER"),
        ("", "unknown data set ''"),
        ("../cifar100", "unknown data set"),
    ],
)
def test_a_missing_set_is_an_error_within_a_second(tmp_path, no_network, name, message):
    (tmp_path / "photos" / "1.0.0").mkdir(parents=True)
    (tmp_path / "photos" / "1.0.0" / "dataset_info.json").write_text("{}")
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        open_source(name, split="train", data_dir=str(tmp_path))
    assert time.monotonic() - start < 1
    assert "\n" not in str(error.value)


def test_the_command_survives_a_shell():
    command = prepare_command("my set", pathlib.Path("/data sets/it's"))
    words = shlex.split(command)
    assert words[2:] == ["my set", "--data_dir=/data sets/it's", "--from_folder=FOLDER"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian", "unknown split of fine_shapes/mini 'trian'; did you mean 'train'"),
        ("validation+tset", "did you mean 'test'"),
        ("train[:foo]", "Unrecognized split format"),
        ("train[:99]", "incompatible with 30 examples"),
        ("train[:0]", "holds no example"),
        ("train[9:3]", "holds no example"),
    ],
)
def test_bad_splits(shapes_dir, split, message):
    with pytest.raises(ValueError, match=message) as error:
        open_source(NAME, split=split, data_dir=shapes_dir)
    assert "\n" not in str(error.value)


def test_unknown_field(shapes_dir):
    with pytest.raises(ValueError, match="'object_msk'; did you mean 'object_mask'"):
        open_source(NAME, split="train", data_dir=shapes_dir, fields=("image", "object_msk"))


def test_tfrecord_has_no_random_access(copy):
    data_dir, folder = copy
    edit_json(folder / "dataset_info.json", fileFormat="tfrecord")
    for file in folder.glob("*.array_record-*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    message = "stored as tfrecord, without random access; move it away and run: python tools/"
    with pytest.raises(ValueError, match=message):
        open_source(NAME, split="train", data_dir=data_dir)


def record_file(folder):
    return next(folder.glob("*-train.array_record-*"))


def truncate(folder):
    file = record_file(folder)
    file.write_bytes(file.read_bytes()[:-1000])


def empty(folder):
    record_file(folder).write_bytes(b"")


def overwrite(folder):
    file = record_file(folder)
    file.write_bytes(bytes(np.random.default_rng(0).bytes(file.stat().st_size)))


def remove(folder):
    record_file(folder).unlink()


def exchange(folder):
    shutil.copy(next(folder.glob("*-test.array_record-*")), record_file(folder))


@pytest.mark.parametrize("spoil", [truncate, empty, overwrite, remove, exchange])
def test_damaged_files_are_named_when_the_split_is_opened(copy, spoil):
    data_dir, folder = copy
    spoil(folder)
    message = r"fine_shapes-train.array_record-00000-of-00001.*run: python tools/prepare_data.py"
    with pytest.raises(ValueError, match=message) as error:
        open_source(NAME, split="train[:5]", data_dir=data_dir)
    assert "\n" not in str(error.value)
    assert len(open_source(NAME, split="test", data_dir=data_dir)) == 10


def test_a_damaged_example_is_named_and_the_others_are_read(copy):
    data_dir, folder = copy
    file = record_file(folder)
    data = bytearray(file.read_bytes())
    data[70_000:71_000] = bytes(1000)
    file.write_bytes(data)
    source = open_source(NAME, split="train", data_dir=data_dir)
    damaged = []
    for i in range(len(source)):
        try:
            assert source[i]["image"].shape == (32, 32, 3)
        except ValueError as error:
            damaged.append(i)
            assert f"example {i} of fine_shapes/mini:train in {folder}" in str(error)
            assert "\n" not in str(error)
    assert 1 <= len(damaged) <= 3


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    features = {"image": tfds.features.Image(), "label": LABEL}
    build_things(tmp_path, features, [{"image": io.BytesIO(b"no image"), "label": 0}])
    source = open_source("things", split="train", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"example 0 of things:train in .* cannot be read"):
        source[0]


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_metadata(copy, file):
    data_dir, folder = copy
    (folder / file).write_text((folder / file).read_text()[:50])
    with pytest.raises(ValueError, match=r"mini/1.0.0 cannot be read: .*; move it away and run: "):
        open_source(NAME, split="train", data_dir=data_dir)


def test_damaged_metadata_of_an_embedded_set(tmp_path):
    folder = pathlib.Path(build_embedded("fine_shapes/tiny", tmp_path).data_path)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"fine_shapes/tiny cannot be read: .*; move it away and"):
        open_source("fine_shapes/tiny", split="train", data_dir=str(tmp_path))


# Real data


@pytest.mark.data
def test_real_cifar100():
    places = [os.environ["TFDS_DATA_DIR"], pathlib.Path("~/tensorflow_datasets").expanduser()]
    root = next((p for p in places if find_prepared("cifar100", pathlib.Path(p))), None)
    if root is None:
        pytest.skip("CIFAR-100 is not prepared here")
    train = open_source("cifar100", split="train[:98%]", data_dir=str(root))
    rest = open_source("cifar100", split="train[98%:]", data_dir=str(root))
    assert (len(train), len(rest)) == (49_000, 1_000)
    assert train.image_shape == train[48_999]["image"].shape == (32, 32, 3)
    assert len(train.class_names) == 100
    test = open_source("cifar100", split="test", data_dir=str(root), fields=("label",))
    labels = np.bincount([int(example["label"]) for example in test.examples])
    np.testing.assert_array_equal(labels, [100] * 100)

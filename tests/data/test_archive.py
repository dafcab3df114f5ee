"""Official archives read in place: the same from every kind, and what is refused."""

import io
import pathlib
import stat
import tarfile
import zipfile

import pytest
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets import archive
from attnzoom_jax.data.datasets.archive import Archive, Contents, half_open, open_archive
from attnzoom_jax.data.source import open_source
from tests.data import official_archives
from tests.data.official_archives import photo, write

COUNT = 12


def scan(opened: Archive) -> Contents:
    root = opened.root("list.txt")
    images = {
        f"{root}{name}": {"file_name": name, "label": label}
        for name, label in opened.table(f"{root}list.txt", str, int)
    }
    features = {
        "label": tfds.features.ClassLabel(num_classes=2),
        "file_name": tfds.features.Text(),
    }
    return Contents({"train": images}, features, metadata={"words": ["a", "b"]})


BIRDS = archive.ArchiveSet("birds.zip", "birds.zip of ours", "Birds.", ("list.txt",), scan)


def build(path, data_dir):
    opened = open_archive(path, lists=BIRDS.lists)
    return archive.build("birds", BIRDS, opened, scan(opened), data_dir=data_dir)


@pytest.fixture
def birds(tmp_path):
    """A list, and twelve images in a folder."""
    folder = tmp_path / "birds"
    for i in range(COUNT):
        photo(folder / "images" / f"{i}.jpg", size=(6, 8 + i), seed=i)
    write(folder / "list.txt", [(f"images/{i}.jpg", i % 2) for i in range(COUNT)])
    return folder


def refused(path, data_dir, match):
    """Building fails with one line that names the archive, and leaves no set behind."""
    with pytest.raises(ValueError, match=match) as error:
        build(path, data_dir)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(pathlib.Path(data_dir).glob("birds/*"))


def records(data_dir):
    source = open_source("birds", split="train", data_dir=str(data_dir), fields=("file_name",))
    return list(source.examples.records)  # pyright: ignore[reportAttributeAccessIssue]


# What is read


def test_every_kind_gives_the_same_records(birds, tmp_path):
    paths = {kind: official_archives.pack(birds, kind) for kind in official_archives.KINDS}
    (tmp_path / "outer").mkdir()
    paths["tgz"] = paths["gztar"].rename(tmp_path / "birds.tgz")
    del paths["gztar"]
    for kind, path in paths.items():
        build(path, tmp_path / kind)
    expected = records(tmp_path / "folder")
    assert len(expected) == COUNT
    for kind in paths:
        assert records(tmp_path / kind) == expected, kind
    birds.rename(tmp_path / "outer" / "birds")
    build(tmp_path / "outer", tmp_path / "from_outer")
    assert records(tmp_path / "from_outer") == expected


def test_the_metadata_is_kept(birds, tmp_path):
    build(birds, tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "birds" / archive.VERSION)
    assert dict(builder.info.metadata or {}) == {"words": ["a", "b"]}
    assert builder.info.description == "Birds."


def test_members_may_begin_with_a_dot_and_come_twice(birds, tmp_path):
    path = tmp_path / "dots.tar"
    with tarfile.open(path, "w") as file:
        for _ in range(2):
            file.add(birds, ".")
    build(path, tmp_path / "sets")
    assert len(records(tmp_path / "sets")) == COUNT


def test_find_takes_the_shortest_path(tmp_path):
    for name in ("b/list.txt", "a/deep/list.txt", "a/mylist.txt"):
        write(tmp_path / "many" / name, ["x"])
    opened = open_archive(tmp_path / "many", lists=("list.txt",))
    assert opened.find("list.txt") == "b/list.txt"
    assert opened.find("deep/list.txt") == "a/deep/list.txt"
    assert opened.find("no.txt") is None
    assert opened.root("deep/list.txt") == "a/"
    assert opened.lists == {name: b"x\n" for name in opened.names}


def test_half_open_boxes():
    assert half_open(0, 1, 63, 1, first=0) == (1, 0, 2, 64)
    assert half_open(1, 1, 300, 200, first=1) == (0, 0, 200, 300)


# What is refused


@pytest.mark.parametrize("name", ["/list.txt", "birds/../../list.txt", "..\\list.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_lead_outside(birds, tmp_path, kind, name):
    path = official_archives.pack(birds, kind)
    if kind == "zip":
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, "x")
    else:
        with tarfile.open(path, "a") as file:
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    refused(path, tmp_path / "sets", "which leads outside; not read")


def link_in_folder(birds, target):
    (birds / "images" / "0.jpg").symlink_to(target)
    return birds


def folder_is_a_link(birds, target):
    (birds / "images").rename(birds.parent / "elsewhere")
    (birds / "images").symlink_to(birds.parent / "elsewhere")
    return birds


def link_in_zip(birds, target):
    path = official_archives.pack(birds, "zip")
    with zipfile.ZipFile(path, "a") as file:
        info = zipfile.ZipInfo("birds/images/0.jpg")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, str(target))
    return path


def link_in_tar(birds, target, kind=tarfile.SYMTYPE):
    path = official_archives.pack(birds, "tar")
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("birds/images/0.jpg")
        info.type, info.linkname = kind, str(target)
        file.addfile(info)
    return path


def hard_link_in_tar(birds, target):
    return link_in_tar(birds, "birds/images/1.jpg", tarfile.LNKTYPE)


@pytest.mark.parametrize(
    "make", [link_in_folder, folder_is_a_link, link_in_zip, link_in_tar, hard_link_in_tar]
)
def test_links_are_not_followed(birds, tmp_path, make):
    target = tmp_path / "target.jpg"
    (birds / "images" / "0.jpg").rename(target)
    refused(make(birds, target), tmp_path / "sets", r"images(/0.jpg)? is a link or a special file")


def test_a_link_that_nothing_needs_does_no_harm(birds, tmp_path):
    (birds / "latest").symlink_to(birds)  # followed, this would go round for ever
    build(birds, tmp_path / "sets")
    assert len(records(tmp_path / "sets")) == COUNT


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_that_breaks_off(birds, tmp_path, kind, share):
    path = official_archives.pack(birds, kind)
    data = path.read_bytes()
    if kind == "tar":
        data = data.rstrip(b"\0")  # which is filled up with zeros
    path.write_bytes(data[: int(share * len(data))])
    refused(path, tmp_path / "sets", "is it complete")


def test_a_zip_file_with_a_flipped_bit(birds, tmp_path):
    path = official_archives.pack(birds, "zip")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(path, tmp_path / "sets", "cannot be read; is it complete|is no readable image")


def no_list(birds):
    (birds / "list.txt").unlink()
    return "holds no list.txt; is it complete"


def no_image(birds):
    (birds / "images" / "7.jpg").unlink()
    return "holds no images/7.jpg; is it complete"


def broken_image(birds):
    file = birds / "images" / "7.jpg"
    file.write_bytes(file.read_bytes()[:-50])
    return "images/7.jpg is no readable image"


def text_for_an_image(birds):
    (birds / "images" / "7.jpg").write_text("no image")
    return "images/7.jpg is no readable image"


def too_few_columns(birds):
    write(birds / "list.txt", [("images/0.jpg", 0), "images/1.jpg"])
    return "line 2 of list.txt is 'images/1.jpg'; expected the columns str, int"


def a_word_for_a_number(birds):
    write(birds / "list.txt", [("images/0.jpg", 0), "", ("images/1.jpg", "one")])
    return "line 3 of list.txt is 'images/1.jpg one'"


def a_list_of_bytes(birds):
    (birds / "list.txt").write_bytes(b"\xff\xfe")
    return "list.txt is no text"


@pytest.mark.parametrize(
    "spoil",
    [
        no_list,
        no_image,
        broken_image,
        text_for_an_image,
        too_few_columns,
        a_word_for_a_number,
        a_list_of_bytes,
    ],
)
def test_what_is_missing_or_broken_is_named(birds, tmp_path, spoil):
    refused(birds, tmp_path / "sets", spoil(birds))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "there is no archive or folder"), ("birds/list.txt", "neither a folder nor an")],
)
def test_no_archive(birds, tmp_path, name, message):
    refused(tmp_path / name, tmp_path / "sets", message)

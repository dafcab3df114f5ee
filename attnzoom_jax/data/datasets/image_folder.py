"""A folder of images, DIR/<split>/<class>/*.png|jpg, as a prepared TFDS set (array_record).

TFDS's own ImageFolder needs TensorFlow, and reads the files again in every epoch.
"""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from tqdm import tqdm

VERSION = "1.0.0"
SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder of images holds.

    Attributes:
        root: the folder.
        splits: {split: files}, sorted.
        class_names: sorted names of the class folders of all splits.
        others: files in class folders that are no .png, .jpg or .jpeg.
    """

    root: pathlib.Path
    splits: dict[str, list[pathlib.Path]]
    class_names: list[str]
    others: list[pathlib.Path]


def scan(root: str | pathlib.Path) -> Folder:
    """List the images DIR/<split>/<class>/**; names that begin with a dot are left out.

    Args:
        root: the folder DIR.

    Returns:
        What it holds.

    Raises:
        ValueError: no such folder, no image where images are expected, or a split whose name TFDS
            cannot take.
    """
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    splits: dict[str, list[pathlib.Path]] = {}
    names: set[str] = set()
    others: list[pathlib.Path] = []
    for split in _folders(root):
        files: list[pathlib.Path] = []
        for class_folder in _folders(split):
            found = [path for path in sorted(class_folder.rglob("*")) if path.is_file()]
            found = [path for path in found if "/." not in path.relative_to(root).as_posix()]
            images = [path for path in found if path.suffix.lower() in SUFFIXES]
            others += [path for path in found if path.suffix.lower() not in SUFFIXES]
            names |= {class_folder.name} if images else set()
            files += images
        if files:
            splits[split.name] = files
    if not splits:
        raise ValueError(
            f"{root} holds no image at <split>/<class>/*.png or *.jpg, "
            "for example train/cat/1.png; is the level of splits or of classes missing?"
        )
    for split in splits:
        if not re.fullmatch(r"[A-Za-z_]\w*", split):
            raise ValueError(f"the split {split!r} in {root} must be a word, such as train or test")
    return Folder(root, splits, sorted(names), others)


def build(
    folder: Folder,
    name: str,
    *,
    data_dir: str | pathlib.Path,
    on_broken: Callable[[str], None] | None = None,
) -> tfds.core.DatasetBuilder:
    """Write a folder of images as a TFDS set with the features image, label and file_name.

    Files are kept byte for byte where they are 8-bit grey or RGB; others (alpha, palette, CMYK, 16
    bit, or turned by their EXIF tag) become RGB as a viewer shows them. Nothing is left behind
    when it fails.

    Args:
        folder: from `scan`.
        name: of the data set, a word in lower case.
        data_dir: folder of prepared sets.
        on_broken: called for each unreadable image with a line that names it; the image is then
            left out. None: an unreadable image is an error.

    Returns:
        The builder of the prepared set.

    Raises:
        ValueError: a name that TFDS cannot take, an unreadable image, or a split without any
            readable one.
    """
    if not re.fullmatch(r"[a-z]\w*", name):
        raise ValueError(f"data set name {name!r}: expected a word in lower case, like my_photos")

    def leave_out(problem: str) -> None:
        if on_broken is None:
            raise ValueError(f"{problem}; mend it, or pass --skip_broken to leave such files out")
        on_broken(problem)

    sizes, splits = set(), {}
    for split, paths in folder.splits.items():
        splits[split] = []
        for path in tqdm(paths, desc=f"looking at {split}", unit="image", disable=None):
            try:
                sizes.add(_size(path))
                splits[split].append(path)
            except Exception as error:  # Pillow raises many kinds
                leave_out(_problem(path, error))
    readable = dataclasses.replace(folder, splits=splits)
    height, width = sizes.pop() if len(sizes) == 1 else (None, None)
    builder = _Builder(
        readable, name, (height, width, 3), leave_out, data_dir=data_dir, file_format="array_record"
    )
    tfds.disable_progress_bar()  # ours knows how many there are
    builder.download_and_prepare()
    return builder


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        folder: Folder,
        name: str,
        shape: tuple[int | None, ...],
        leave_out: Callable[[str], None],
        **kwargs,
    ):
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]  # TFDS's own ad-hoc way
        self._folder, self._shape, self._leave_out = folder, shape, leave_out
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of a local folder, by class.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=self._shape),
                    "label": tfds.features.ClassLabel(names=self._folder.class_names),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _log_download_bytes(self) -> None:
        """Nothing: TFDS would tell of a download of unknown size."""

    def _log_download_done(self) -> None:
        """Nothing, for the same reason."""

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self._folder.splits}

    def _generate_examples(self, split) -> Iterator[tuple[str, dict]]:
        count = 0
        paths = self._folder.splits[split]
        for path in tqdm(paths, desc=f"writing {split}", unit="image", disable=None):
            try:
                data = encode(path.read_bytes())
            except Exception as error:  # Pillow raises many kinds
                self._leave_out(_problem(path, error))
                continue
            name = path.relative_to(self._folder.root / split)
            count += 1
            yield (
                name.as_posix(),
                {
                    "image": io.BytesIO(data),  # bytes go through TFDS without TensorFlow
                    "label": name.parts[0],
                    "file_name": f"{split}/{name.as_posix()}",
                },
            )
        if not count:
            raise ValueError(f"the split {split!r} in {self._folder.root} has no readable image")


def _problem(path: pathlib.Path, error: Exception) -> str:
    return f"{path} is no readable image ({' '.join(str(error).split())})"


def _size(path: pathlib.Path) -> tuple[int, int]:
    """Height and width in pixels, upright, from the file's header."""
    with Image.open(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def encode(data: bytes, *, upright: bool = True) -> bytes:
    """An image file that every decoder shows alike: the given one if it is such, else a new one.

    Args:
        data: the file's content, in any format that Pillow knows.
        upright: turn what the EXIF tag says. False: pixels as they are stored, where annotations
            count them so.

    Returns:
        The content of an 8-bit grey or RGB file, JPEG from JPEG, else PNG.

    Raises:
        Exception: of any kind, for an unreadable or incomplete image.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # whole: OpenCV takes the first half of a JPEG for a picture
        is_jpeg = image.format in _JPEG
        is_deep = image.format == "PNG" and data[_PNG_BIT_DEPTH] == 16
        is_turned = upright and _orientation(image) != 1
        if (is_jpeg or image.format == "PNG") and image.mode in ("L", "RGB") and not is_deep:
            if not is_turned:
                return data
        picture = ImageOps.exif_transpose(image) if is_turned else image
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG" if is_jpeg else "PNG", quality=95)
    return file.getvalue()


_JPEG = ("JPEG", "MPO")  # MPO: JPEG files of some telephones
_PNG_BIT_DEPTH = 24  # where a PNG file says it
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height are exchanged


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1) if image.format in _JPEG else 1


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(folder.glob("[!.]*")) if path.is_dir()]

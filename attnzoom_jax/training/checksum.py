"""Checksums of the files in a folder, so that a flipped bit is found before it is used.

The list has the format of coreutils: `sha256sum --check SHA256SUMS` in the folder looks as well.
"""

import hashlib
import pathlib

NAME = "SHA256SUMS"


def write_sums(folder: pathlib.Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """Write down the checksum of every file in a folder.

    Args:
        folder: that is complete.
        leave_out: paths in it of files that may still change.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    lines = [f"{_sum(folder / name)}  {name}\n" for name in names if name not in leave_out]
    (folder / NAME).write_text("".join(lines))


def find_damage(folder: pathlib.Path) -> str:
    """What is not as it was written.

    Args:
        folder: with or without a list of checksums.

    Returns:
        The first file that is missing or differs from its checksum, "" if there is none. A folder
        without a list is taken as it is.

    Raises:
        OSError: a file may not be read.
    """
    sums = folder / NAME
    if not sums.exists():
        return ""
    for line in sums.read_text(errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name
        if not name or not path.is_file():
            return f"{name or NAME} is missing or damaged"
        if _sum(path) != expected:
            return f"{name} differs from its checksum"
    return ""


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != NAME]


def _sum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

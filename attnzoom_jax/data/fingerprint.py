"""What a prepared data set is, in a few lines: a resumed run must find the one it began with.

Another copy of a set may hold other images, or the same ones in another order, and so give other
batches.
"""

import hashlib
import pathlib
from typing import Any

from attnzoom_jax.data.source import data_root, open_builder

ENDS = 65536  # bytes at both ends of a file that are looked at; a whole set would take minutes


def fingerprint(data: Any) -> dict[str, Any]:
    """Describe the prepared set of a config.

    Args:
        data: the config's `data` section.

    Returns:
        `name` with config and version, `examples`, their number by split, `bytes` of all files, and
        `sha256` of the names, sizes and ends of the files with examples, and of those with boxes.

    Raises:
        ValueError: as `open_builder`.
    """
    builder = open_builder(data.name, data_root(data.dir))
    info = builder.info
    folder = pathlib.Path(builder.data_path)
    # Beside the examples there are descriptions, which another TFDS may word otherwise.
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".json"]
    if data.patches:
        files += pathlib.Path(data.patches).expanduser().glob("*.npy")
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return {
        "name": info.full_name,
        "examples": {name: split.num_examples for name, split in info.splits.items()},
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": digest.hexdigest(),
    }

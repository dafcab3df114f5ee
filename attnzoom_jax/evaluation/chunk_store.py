"""Finished chunks of a long evaluation on disk, so that a killed one goes on where it stopped."""

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnzoom_jax.training.workdir import differences, to_plain

Arrays = dict[str, np.ndarray]


class ChunkStore:
    """A folder with one file per finished chunk, all of one request.

    Args:
        folder: of the chunks; need not exist. None keeps nothing.
        request: what decides the numbers, as plain values: chunks of another one are refused.

    Raises:
        ValueError: the folder holds chunks of another request (the differences are listed), or
            cannot be written.
    """

    def __init__(self, folder: pathlib.Path | None, request: Mapping[str, Any]) -> None:
        self._folder = folder
        if folder is None:
            return
        path, ours = folder / "request.json", json.loads(json.dumps(to_plain(request)))
        if path.exists():
            changed = differences(json.loads(path.read_text()), ours)
            if changed:
                raise ValueError(
                    f"{folder} holds the begun work of another request (- there, + given):\n  "
                    + "\n  ".join(changed)
                    + "\ndelete that folder, or give the evaluation another name"
                )
        elif jax.process_index() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _replace(path, json.dumps(ours, indent=1).encode())
            except OSError as error:
                raise ValueError(f"cannot write into {folder}: {error.strerror}") from error

    def load(self, index: int) -> Arrays | None:
        """The arrays of a chunk; None where it is not finished, or its file is damaged."""
        if self._folder is None or not self._path(index).exists():
            return None
        try:
            with self._path(index).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            print(f"{self._path(index)} is damaged; the chunk is computed again", flush=True)
            return None

    def save(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a finished chunk; of several processes the first one writes."""
        if self._folder is None or jax.process_index() != 0:
            return
        path = self._path(index)
        unfinished = path.with_name(f"{path.name}.tmp")
        content: dict[str, Any] = dict(arrays)
        with unfinished.open("wb") as file:
            np.savez(file, **content)
        os.replace(unfinished, path)

    def _path(self, index: int) -> pathlib.Path:
        assert self._folder is not None
        return self._folder / f"chunk_{index:05d}.npz"


def _replace(path: pathlib.Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)

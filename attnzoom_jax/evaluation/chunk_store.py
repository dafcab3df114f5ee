"""Finished chunks of a long evaluation on disk, so that a killed one goes on where it stopped."""

import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnzoom_jax.training.workdir import to_plain

Arrays = dict[str, np.ndarray]


class ChunkStore:
    """A folder with one file per finished chunk, for every request one of its own.

    Args:
        folder: of all requests; need not exist. None keeps nothing.
        request: what decides the numbers, as plain values; written beside the chunks.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: pathlib.Path | None, request: Mapping[str, Any]) -> None:
        self._folder = None
        if folder is None:
            return
        text = json.dumps(to_plain(request), indent=1, sort_keys=True)
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        if jax.process_index() == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / "request.json").write_text(text)
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

"""Chunks on disk."""

import numpy as np
import pytest

from attnzoom_jax.evaluation.chunk_store import ChunkStore

ARRAYS = {"a|b": np.arange(3), "text": np.array(["ä", "bc"])}


def test_what_is_saved_comes_back(tmp_path):
    store = ChunkStore(tmp_path / "x", {"methods": ("a", "b")})
    assert store.load(0) is None
    store.save(0, ARRAYS)
    again = ChunkStore(tmp_path / "x", {"methods": ["a", "b"]})
    loaded = again.load(0)
    assert loaded is not None and loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert again.load(1) is None


def test_another_request_has_chunks_of_its_own(tmp_path):
    ChunkStore(tmp_path, {"methods": ["a"], "seed": 0}).save(0, ARRAYS)
    assert ChunkStore(tmp_path, {"methods": ["a"], "seed": 1}).load(0) is None
    assert ChunkStore(tmp_path, {"seed": 0, "methods": ("a",)}).load(0) is not None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", None])
def test_a_damaged_chunk_is_computed_again(tmp_path, content, capsys):
    store = ChunkStore(tmp_path, {})
    store.save(3, ARRAYS)
    (file,) = tmp_path.glob("*/chunk_*.npz")
    file.write_bytes(file.read_bytes()[:-60] if content is None else content)
    assert store.load(3) is None
    assert "is damaged" in capsys.readouterr().out


def test_an_unfinished_chunk_does_not_count(tmp_path):
    store = ChunkStore(tmp_path, {})
    store.save(0, ARRAYS)
    (file,) = tmp_path.glob("*/chunk_*.npz")
    file.rename(f"{file}.tmp")
    assert store.load(0) is None


def test_without_a_folder_nothing_is_kept():
    store = ChunkStore(None, {"any": 1})
    store.save(0, ARRAYS)
    assert store.load(0) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into"):
        ChunkStore(tmp_path / "file" / "x", {})

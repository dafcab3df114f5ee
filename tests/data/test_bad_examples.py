import itertools
from typing import Any

import numpy as np
import pytest

from attnzoom_jax.data.bad_examples import left_out, watch_examples
from attnzoom_jax.data.device import load_split
from attnzoom_jax.data.pipeline import train_batches
from attnzoom_jax.data.source import Source

COUNT = 40


class Examples:
    """Of which some cannot be read; each image is full of its own number."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise ValueError(f"example {index} cannot be read")
        return {"image": np.full((2, 2, 3), index, np.uint8), "label": np.int64(index)}


def source(*bad: int, on_bad_example: str = "skip") -> Source:
    examples: Any = Examples(bad)
    return watch_examples(Source("set:train", ("a",), (2, 2, 3), examples), on_bad_example)


def test_the_next_readable_example_stands_in_and_is_said_once(capsys):
    some = source(3, 4, COUNT - 1)
    for _ in range(2):
        found = [int(some[i]["label"]) for i in range(COUNT)]
        assert found == [0, 1, 2, 5, 5, *range(5, COUNT - 1), 0]
    assert left_out(some) == [3, 4, COUNT - 1] and len(some) == COUNT
    printed = capsys.readouterr().err.splitlines()
    assert sorted(printed) == [f"left out: example {i} cannot be read" for i in (3, COUNT - 1, 4)]


def test_the_global_batch_is_a_function_of_seed_and_step():
    def labels(**options):
        return np.stack(
            [b["label"] for b in itertools.islice(train_batches(source(3, 9), **options), 8)]
        )

    alone = labels(batch_size=8, seed=1, num_threads=0)
    np.testing.assert_array_equal(labels(batch_size=8, seed=1, num_threads=3), alone)
    parts = [labels(batch_size=8, seed=1, process_index=i, process_count=2) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)
    later = labels(batch_size=8, seed=1, start_step=5)
    np.testing.assert_array_equal(later[:3], alone[5:])
    assert not np.isin(alone, (3, 9)).any()


def test_a_split_on_the_device_has_the_same_stand_ins():
    split = load_split(source(3))
    np.testing.assert_array_equal(split["label"], [*range(3), 4, *range(4, COUNT)])


@pytest.mark.parametrize("bad", [tuple(range(11)), tuple(range(COUNT))])
def test_many_are_too_many(bad):
    some = source(*bad)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"11 of the 40 examples of set:train cannot be read"):
            some[0]


def test_stop_is_the_source_itself():
    some = source(3, on_bad_example="stop")
    assert isinstance(some.examples, Examples) and left_out(some) == []
    with pytest.raises(ValueError, match="example 3 cannot be read"):
        some[3]
    with pytest.raises(ValueError, match=r"data\.on_bad_example 'skp'; did you mean 'skip'"):
        source(on_bad_example="skp")

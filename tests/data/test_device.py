"""The path by way of device memory sees what the host path sees."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.device import index_batches, load_split
from attnzoom_jax.data.pipeline import Resize, train_batches
from attnzoom_jax.data.source import Source, open_source


def fake_source(num_examples):
    noise = np.random.default_rng(0).integers(0, 256, (num_examples, 2, 3, 3)).astype(np.uint8)
    examples = [{"image": image, "label": np.int64(i)} for i, image in enumerate(noise)]
    return Source("fake:train", ("a",), (2, 3, 3), examples)


@pytest.mark.parametrize("start_step", [0, 4, 1000])
@pytest.mark.parametrize("resize", [None, Resize("squash", 20)])
def test_both_paths_see_the_same_batches(shapes_dir, start_step, resize):
    source = open_source("fine_shapes/mini", split="train", data_dir=shapes_dir)
    settings = {"batch_size": 8, "seed": 3, "start_step": start_step}
    split = {
        name: jnp.asarray(column) for name, column in load_split(source, resize=resize).items()
    }
    host = train_batches(source, resize=resize, **settings)
    device = index_batches(len(source), **settings)
    for batch, indices in itertools.islice(zip(host, device, strict=False), 9):  # over two epochs
        assert indices.dtype == np.int32
        assert set(batch) == set(split)
        for name in batch:
            gathered = np.asarray(split[name][indices])
            assert gathered.dtype == batch[name].dtype
            np.testing.assert_array_equal(gathered, batch[name])


@pytest.mark.parametrize("num_examples", [1, 7, 256, 300, 520])
def test_load_split_equals_the_source(num_examples):
    source = fake_source(num_examples)
    split = load_split(source)
    assert set(split) == {"image", "label"}
    assert split["label"].dtype == np.int32
    np.testing.assert_array_equal(split["label"], np.arange(num_examples))
    np.testing.assert_array_equal(split["image"], [example["image"] for example in source.examples])


def test_bad_settings_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match=r"batch_size 9 is not in 1\.\.8"):
        index_batches(8, batch_size=9, seed=0)
    with pytest.raises(ValueError, match="seed -2 must be 0 or more"):
        index_batches(8, batch_size=4, seed=-2)

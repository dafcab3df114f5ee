"""Host batches: one order for everyone, every evaluated example once, resizing against loops."""

import itertools
import threading
import time

import numpy as np
import pytest

from attnzoom_jax.data.pipeline import Resize, eval_batches, example_order, train_batches
from attnzoom_jax.data.source import Source, open_source


def fake_source(num_examples, read=lambda i: None, size=(3, 4)):
    """Example i: an image full of i, label i + 1, so that padding is no example."""

    class Examples(list):
        def __getitem__(self, i):
            read(i)
            return {"image": np.full((*size, 3), i, np.uint8), "label": np.int64(i + 1)}

    examples = Examples(range(num_examples))
    return Source("fake:train", ("a", "b"), (*size, 3), examples)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def labels(batches):
    return np.array([batch["label"] for batch in batches])


# Order


def test_every_epoch_is_another_permutation_by_the_seed():
    orders = {
        seed: example_order(np.arange(5 * 23), num_examples=23, seed=seed).reshape(5, 23)
        for seed in (0, 1, 2, 2**40)
    }
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), [np.arange(23)] * 5)
    epochs = np.concatenate(list(orders.values()))
    assert len(np.unique(epochs, axis=0)) == len(epochs)


def test_the_order_is_the_same_for_ever():
    order = example_order(np.arange(20), num_examples=10, seed=3)
    assert order.dtype == np.int32
    assert order.tolist() == [0, 4, 9, 7, 1, 5, 6, 3, 8, 2, 0, 6, 2, 1, 3, 7, 4, 9, 8, 5]


def test_positions_may_be_anywhere():
    whole = example_order(np.arange(700), num_examples=7, seed=5)
    positions = np.random.default_rng(0).integers(0, 700, 100)
    chosen = example_order(positions, num_examples=7, seed=5)
    np.testing.assert_array_equal(chosen, whole[positions])


def test_every_example_is_as_likely_at_every_place():
    orders = np.array([example_order(np.arange(5), num_examples=5, seed=s) for s in range(2000)])
    counts = np.array([np.bincount(place, minlength=5) for place in orders.T])
    # 400 expected in each cell, standard deviation 18.
    assert np.abs(counts - 400).max() < 5 * 18


def test_training_reads_whole_epochs_over_the_ends_of_batches():
    batches = take(train_batches(fake_source(10), batch_size=4, seed=0), 5)
    seen = labels(batches).reshape(2, 10)
    np.testing.assert_array_equal(np.sort(seen), [np.arange(1, 11)] * 2)
    assert batches[0]["image"].shape == (4, 3, 4, 3)
    assert batches[0]["image"].dtype == np.uint8
    assert batches[0]["label"].dtype == np.int32
    for batch in batches:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] + 1, batch["label"])


@pytest.mark.parametrize("start_step", [1, 2, 3, 17, 10_000])
def test_a_run_resumes_from_its_step_alone(start_step):
    source = fake_source(10)
    resumed = take(train_batches(source, batch_size=4, seed=1, start_step=start_step), 4)
    positions = np.arange(start_step * 4, start_step * 4 + 16)
    expected = example_order(positions, num_examples=10, seed=1).reshape(4, 4) + 1
    np.testing.assert_array_equal(labels(resumed), expected)
    if start_step < 20:
        whole = take(train_batches(source, batch_size=4, seed=1), start_step + 4)
        np.testing.assert_array_equal(labels(whole[start_step:]), labels(resumed))


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("start_step", [0, 3])
def test_the_parts_of_all_processes_are_the_batch_of_one(process_count, start_step):
    settings = {"batch_size": 8, "seed": 2, "start_step": start_step}
    alone = take(train_batches(fake_source(21), **settings), 7)
    parts = [
        take(
            train_batches(
                fake_source(21), process_index=rank, process_count=process_count, **settings
            ),
            7,
        )
        for rank in range(process_count)
    ]
    for step, batch in enumerate(alone):
        for name in ("image", "label"):
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_threads_do_not_change_the_order(num_threads):
    delays = np.random.default_rng(0).uniform(0, 2e-3, 30).tolist()
    source = fake_source(30, read=lambda i: time.sleep(delays[i]))
    found = take(train_batches(source, batch_size=5, seed=0, num_threads=num_threads), 12)
    expected = example_order(np.arange(60), num_examples=30, seed=0).reshape(12, 5) + 1
    np.testing.assert_array_equal(labels(found), expected)


def test_reading_ahead_is_bounded():
    reads, lock = [], threading.Lock()

    def read(i):
        with lock:
            reads.append(i)

    batches = train_batches(fake_source(50, read=read), batch_size=5, seed=0, num_threads=2)
    assert not reads
    next(batches)
    time.sleep(0.2)
    # Two batches for each thread, and the one that was taken.
    assert 5 <= len(reads) <= (2 * 2 + 1) * 5


# Evaluation


@pytest.mark.parametrize(
    ("process_count", "batch_size"),
    [
        *((1, b) for b in (1, 3, 4, 5, 10, 12, 32)),
        (2, 4),
        (2, 10),
        (2, 32),
        (4, 4),
        (4, 8),
        (4, 32),
    ],
)
def test_evaluation_sees_every_example_once(process_count, batch_size):
    parts = [
        list(
            eval_batches(
                fake_source(10),
                batch_size=batch_size,
                process_index=rank,
                process_count=process_count,
            )
        )
        for rank in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-10 // batch_size)}  # no process waits for another
    joined = {
        name: np.concatenate([part[step][name] for step in range(len(parts[0])) for part in parts])
        for name in ("image", "label", "mask")
    }
    padding = len(joined["mask"]) - 10
    assert joined["mask"].dtype == np.float32
    np.testing.assert_array_equal(joined["mask"], [1] * 10 + [0] * padding)
    np.testing.assert_array_equal(joined["label"], [*range(1, 11), *[0] * padding])
    np.testing.assert_array_equal(joined["image"][:, 0, 0, 0], [*range(10), *[0] * padding])
    for part in parts:
        assert {len(batch["label"]) for batch in part} == {batch_size // process_count}


def test_padding_reads_no_example_again():
    reads = []
    list(eval_batches(fake_source(10, read=reads.append), batch_size=64, num_threads=0))
    assert sorted(reads) == [0, *range(10)]  # the first once more, for its shape


def test_masks_and_ids_of_a_real_set(shapes_dir):
    fields = ("image", "label", "part_mask", "attribute_bits")
    source = open_source("fine_shapes/mini", split="test", data_dir=shapes_dir, fields=fields)
    (batch,) = eval_batches(source, batch_size=12, resize=Resize("squash", 48))
    assert batch["image"].shape == (12, 48, 48, 3)
    assert batch["part_mask"].shape == batch["attribute_bits"].shape == (12, 48, 48, 1)
    assert batch["attribute_bits"].dtype == np.uint16
    for i, example in enumerate(source.examples):
        for name in ("part_mask", "attribute_bits"):
            assert set(np.unique(batch[name][i])) <= set(np.unique(example[name]))


# Errors


@pytest.mark.parametrize("make", [train_batches, eval_batches])
def test_batch_size_must_fit_the_processes(make):
    settings = {"seed": 0} if make is train_batches else {}
    for batch_size in (0, -4, 6):
        with pytest.raises(ValueError, match=f"batch_size {batch_size} must be a positive"):
            make(fake_source(10), batch_size=batch_size, process_count=4, **settings)


@pytest.mark.parametrize("make", [train_batches, eval_batches])
def test_images_of_several_sizes_need_a_resize(make):
    source = Source("wild:train", ("a",), (None, None, 3), fake_source(4).examples)
    settings = {"seed": 0} if make is train_batches else {}
    with pytest.raises(ValueError, match=r"images of wild:train differ in size.*data\.resize"):
        make(source, batch_size=2, **settings)
    batch = next(make(source, batch_size=2, resize=Resize("crop", 2), **settings))
    assert batch["image"].shape == (2, 2, 2, 3)


def test_bad_training_settings():
    with pytest.raises(ValueError, match=r"batch_size 11 is not in 1\.\.10, what fake:train holds"):
        train_batches(fake_source(10), batch_size=11, seed=0)
    with pytest.raises(ValueError, match="seed -1 must be 0 or more"):
        train_batches(fake_source(10), batch_size=2, seed=-1)
    with pytest.raises(ValueError, match="seed -1 must be 0 or more"):
        example_order(np.arange(3), num_examples=3, seed=-1)


def test_an_unreadable_example_ends_the_iteration_with_its_own_message():
    def read(i):
        if i == 7:
            raise ValueError("example 7 of fake:train cannot be read")

    batches = eval_batches(fake_source(10, read=read), batch_size=3)
    assert len(take(batches, 2)) == 2
    with pytest.raises(ValueError, match="example 7") as error:
        next(batches)
    assert str(error.value) == "example 7 of fake:train cannot be read"


# Resizing


def weights(before, after):
    """[after, before]: pixel areas where the axis shrinks, linear interpolation where it grows."""
    table = np.zeros((after, before))
    scale = before / after
    for i in range(after):
        if scale > 1:
            for j in range(before):
                overlap = min((i + 1) * scale, j + 1) - max(i * scale, j)
                table[i, j] = max(0.0, overlap) / scale
        else:
            center = (i + 0.5) * scale - 0.5
            for j, weight in (
                (int(np.floor(center)), 1 - center % 1),
                (int(np.floor(center)) + 1, center % 1),
            ):
                table[i, min(max(j, 0), before - 1)] += weight
    return table


def slow_resize(image, mode, size, *, is_mask):
    h, w, _ = image.shape
    rows = columns = size
    if mode == "crop":
        rows = size if h <= w else round(h * size / w)
        columns = size if w <= h else round(w * size / h)
    if is_mask:
        ys = [int((i + 0.5) * h / rows) for i in range(rows)]
        xs = [int((i + 0.5) * w / columns) for i in range(columns)]
        resized = image[ys][:, xs]
    else:
        resized = np.einsum(
            "yh,hwc,xw->yxc", weights(h, rows), image.astype(float), weights(w, columns)
        )
    top, left = (rows - size) // 2, (columns - size) // 2
    return resized[top : top + size, left : left + size]


SHAPES = [(8, 12, 4), (13, 7, 5), (5, 7, 16), (3, 40, 10), (40, 3, 10), (9, 9, 9), (1, 5, 2)]


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_resize_equals_a_loop(mode, channels, shape):
    h, w, size = shape
    image = np.random.default_rng(0).integers(0, 256, (h, w, channels)).astype(np.uint8)
    resized = Resize(mode, size)(image)
    assert resized.shape == (size, size, channels)
    assert resized.dtype == np.uint8
    expected = slow_resize(image, mode, size, is_mask=False)
    # OpenCV rounds to whole values after each axis, with weights of 11 bits.
    assert np.abs(resized - expected).max() <= 1.5


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_take_the_nearest_pixel(mode, dtype, shape):
    h, w, size = shape
    mask = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (h, w, 1)).astype(dtype)
    resized = Resize(mode, size)(mask, is_mask=True)
    assert resized.dtype == dtype
    np.testing.assert_array_equal(resized, slow_resize(mask, mode, size, is_mask=True))


def test_resize_to_the_own_size_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    for resize in (Resize(), Resize("squash", 6), Resize("crop", 6)):
        np.testing.assert_array_equal(resize(image), image)
        np.testing.assert_array_equal(resize(image, is_mask=True), image)


def test_bad_resizes():
    with pytest.raises(ValueError, match="unknown resize mode 'squish'; did you mean 'squash'"):
        Resize("squish", 4)
    with pytest.raises(ValueError, match="needs a size in pixels, not 0"):
        Resize("crop")

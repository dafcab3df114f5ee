import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation import examples, maps
from attnzoom_jax.evaluation.split import to_input

FIELDS = ("image", "label", "object_mask", "part_mask")


def test_chunks_are_the_whole_split_once(trained):
    count, chunks = examples.chunks_of_split(trained, "test", chunk_size=25, masks=FIELDS[2:])
    lots = list(chunks)
    assert count == 60 and [len(lot) for lot in lots] == [25, 25, 10]
    whole = examples.join(lots)
    source = open_source("fine_shapes/tiny", split="test", fields=FIELDS)
    for i in range(60):
        assert whole.names[i] == f"test_{i:05d}" and whole.labels[i] == source[i]["label"]
        np.testing.assert_array_equal(whole.images[i], source[i]["image"])
        for name in FIELDS[2:]:
            np.testing.assert_array_equal(whole.masks[name][i], source[i][name][..., 0] > 0)
    few = examples.from_split(trained, "test", 70)
    np.testing.assert_array_equal(few.images, whole.images)
    assert few.names == whole.names and not few.masks


def test_masks_are_cropped_as_the_images(trained):
    cropped = trained.config.copy_and_resolve_references()
    cropped.data.update({"crop_size": 24, "resize": "squash", "image_size": 64})
    model = type(trained)(cropped, *list(vars(trained).values())[1:])
    _, chunks = examples.chunks_of_split(model, "test", chunk_size=2, masks=("object_mask",))
    lot = next(chunks)
    source = open_source("fine_shapes/tiny", split="test", fields=FIELDS)
    assert lot.images.shape == (2, 24, 24, 3)
    for i in range(2):  # each pixel becomes four, of which those from 20 to 43 are left
        twice = source[i]["object_mask"].repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(lot.masks["object_mask"][i], twice[20:44, 20:44, 0] > 0)


def test_the_fields_that_say_where_the_object_is(trained):
    assert examples.mask_fields(trained) == ["object_mask", "part_mask"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("box", [2, 3, 5, 9]), ("box", [1.6, 2.5, 4.9, 8.7]), ("bbox", [0.2, 0.25, 0.5, 0.75])],
)
def test_a_box_is_the_pixels_whose_centre_lies_in_it(field, value):
    got = examples._inside(field, np.array(value, np.float32), np.zeros((10, 12, 3), np.uint8))
    scale = (10, 12, 10, 12) if field == "bbox" else (1, 1, 1, 1)
    y0, x0, y1, x1 = (v * s for v, s in zip(value, scale, strict=True))
    assert got.shape == (10, 12, 1) and got.dtype == np.uint8
    for y in range(10):
        for x in range(12):
            assert got[y, x, 0] == (y0 <= y + 0.5 < y1 and x0 <= x + 0.5 < x1)


def test_lots_are_taken_apart_and_put_together(trained):
    _, chunks = examples.chunks_of_split(trained, "test", chunk_size=7, masks=FIELDS[2:])
    lot = next(chunks)
    assert [len(part) for part in examples.in_chunks(lot, 3)] == [3, 3, 1]
    again = examples.join(list(examples.in_chunks(lot, 3)))
    assert again.names == lot.names
    np.testing.assert_array_equal(again.images, lot.images)
    np.testing.assert_array_equal(again.masks["part_mask"], lot.masks["part_mask"])
    two = lot.take([5, 1])
    assert two.names == ["test_00005", "test_00001"]
    np.testing.assert_array_equal(two.labels, lot.labels[[5, 1]])


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_the_first_right_and_the_first_wrong_ones(trained, count, capsys):
    whole = examples.from_split(trained, "test", 60)
    fn, _ = maps.as_function(trained)
    predicted = fn(to_input(jnp.asarray(whole.images), trained.config.data)).argmax(-1)
    is_right = np.asarray(predicted) == whole.labels
    right, wrong = np.flatnonzero(is_right), np.flatnonzero(~is_right)
    assert min(len(right), len(wrong)) > 3
    chosen = examples.right_and_wrong(trained, "test", count, chunk_size=8)
    expected = [*right[:count], *wrong[:count]]
    assert chosen.names == [whole.names[i] for i in expected]
    np.testing.assert_array_equal(chosen.images, whole.images[expected])
    last_needed = max(right[:count][-1], wrong[:count][-1]) if count < 60 else 59
    looked_at = min(60, 8 * (last_needed // 8 + 1))
    assert f"of the first {looked_at} images of test" in capsys.readouterr().out


def test_classes_to_explain(trained):
    few = examples.from_split(trained, "test", 3)
    names = trained.class_names
    assert examples.target_ids("predicted", few, names).tolist() == [-1, -1, -1]
    np.testing.assert_array_equal(examples.target_ids("label", few, names), few.labels)
    assert examples.target_ids("15", few, names).tolist() == [15] * 3
    assert examples.target_ids(names[7], few, names).tolist() == [7] * 3
    assert examples.target_ids("2", few, ["2", "1", "0"]).tolist() == [2] * 3  # an id, no name
    for target in ("16", "cat", "-1"):
        with pytest.raises(ValueError, match="expected predicted, label, or a class id below 16"):
            examples.target_ids(target, few, names)

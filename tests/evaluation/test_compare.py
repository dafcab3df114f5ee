import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.evaluation import compare, examples, maps
from attnzoom_jax.evaluation.split import to_input

RNG = np.random.default_rng(1)
MASKS = ("object_mask", "part_mask")


def slow_average(values, rows, columns):
    """The mean over each new pixel, by the overlap of its area with every old one."""
    h, w = values.shape
    result = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            for y in range(h):
                for x in range(w):
                    high = min((i + 1) * h / rows, y + 1) - max(i * h / rows, y)
                    wide = min((j + 1) * w / columns, x + 1) - max(j * w / columns, x)
                    if high > 0 and wide > 0:
                        area = high * wide * rows * columns / (h * w)
                        result[i, j] += area * float(values[y, x])
    return result


@pytest.mark.parametrize("size", [(4, 3), (8, 6), (1, 1), (8, 2), (5, 4), (3, 6)])
def test_area_averages_equal_a_slow_version(size):
    values = RNG.normal(size=(2, 8, 6)).astype(np.float32)
    got = compare.area_average(values, size)
    assert got.shape == (2, *size) and got.dtype == np.float32
    for i in range(2):
        np.testing.assert_allclose(got[i], slow_average(values[i], *size), atol=2e-6)
    np.testing.assert_allclose(got.mean(axis=(1, 2)), values.mean(axis=(1, 2)), atol=1e-6)


def test_half_the_size_is_the_mean_of_blocks():
    values = RNG.normal(size=(3, 8, 8)).astype(np.float32)
    blocks = values.reshape(3, 4, 2, 4, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(compare.area_average(values, (4, 4)), blocks, atol=1e-6)


def test_averages_do_not_enlarge():
    with pytest.raises(ValueError, match=r"size is \(4, 9\); expected at most \(8, 8\)"):
        compare.area_average(np.zeros((1, 8, 8)), (4, 9))


def test_the_common_grid_is_the_coarser_one_per_axis_and_takes_positive_parts():
    wide, high = RNG.normal(size=(1, 4, 8)), RNG.normal(size=(1, 6, 5))
    common = compare.at_common_size({"wide": wide, "high": high})
    np.testing.assert_allclose(
        common["wide"][0], slow_average(np.maximum(wide[0], 0), 4, 5), atol=1e-6
    )
    np.testing.assert_allclose(
        common["high"][0], slow_average(np.maximum(high[0], 0), 4, 5), atol=1e-6
    )


@pytest.fixture(scope="module")
def whole(trained):
    return next(examples.chunks_of_split(trained, "test", chunk_size=60, masks=MASKS)[1])


@pytest.fixture(scope="module")
def compared(trained, coarse, whole):
    chunks = examples.in_chunks(whole, 16)
    return compare.compare(
        trained, coarse, chunks, 60, taps=("relu", "relu"), shown=2, chunk_size=16
    )


def slow_maps(run, whole, targets):
    fn, _ = maps.as_function(run)
    inputs = to_input(jnp.asarray(whole.images), run.config.data)
    cams = attribution.grad_cam(fn, inputs, jnp.asarray(targets), tap="relu")
    return np.asarray(cams, np.float64), np.asarray(fn(inputs)).argmax(1)


def slow_enlarge(values, size):
    """Bilinear with half-pixel centres and repeated borders, by a matrix per axis."""

    def matrix(n):
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)))

    return matrix(values.shape[0]) @ values @ matrix(values.shape[1]).T


def test_blocks_and_energies_equal_a_slow_version(trained, coarse, whole, compared):
    (fine, first), (rough, second) = (slow_maps(r, whole, whole.labels) for r in (trained, coarse))
    names = {(1, 1): "both_right", (0, 0): "both_wrong"}
    names |= {(1, 0): "only_this_right", (0, 1): "only_other_right"}
    scores = compared.scores
    assert scores["names"].tolist() == whole.names
    for i in range(60):
        label = whole.labels[i]
        assert scores["blocks"][i] == names[first[i] == label, second[i] == label]
        halved = slow_average(np.maximum(fine[i], 0), 4, 4)
        native = {"this": fine[i], "other": rough[i]}
        common = {"this": halved, "other": rough[i]}
        for mask in MASKS:
            name = mask.removesuffix("_mask")
            inside = whole.masks[mask][i]
            assert scores[f"{name}_share"][i] == pytest.approx(inside.mean())
            for kind, of in (("native_energy", native), ("energy", common)):
                for side in ("this", "other"):
                    heat = slow_enlarge(np.maximum(of[side], 0), 32)
                    share = heat[inside].sum() / heat.sum() if heat.any() else 0.0
                    assert scores[f"{side}_{name}_{kind}"][i] == pytest.approx(share, abs=1e-4)
        assert scores["this_empty"][i] == (fine[i].max() <= 0)
    assert set(scores["blocks"]) == set(names.values())  # all four occur


def test_the_shown_images_are_the_first_of_each_block(whole, compared):
    blocks = compared.scores["blocks"]
    expected = sorted(i for block in set(blocks) for i in np.flatnonzero(blocks == block)[:2])
    assert compared.rows.tolist() == expected
    assert compared.shown.names == [whole.names[i] for i in expected]
    np.testing.assert_array_equal(compared.shown.images, whole.images[expected])
    n = len(expected)
    assert compared.maps["this"].shape == (n, 8, 8) and compared.maps["other"].shape == (n, 4, 4)
    assert compared.common["this"].shape == compared.common["other"].shape == (n, 4, 4)


def test_means_are_over_the_images_of_each_block(compared):
    table = compare.summarize(compared.scores)
    assert list(table) == [*compare.BLOCKS[:4], "all"] and table["all"]["count"] == 60
    for block in compare.BLOCKS[:4]:
        rows = [i for i in range(60) if compared.scores["blocks"][i] == block]
        assert table[block]["count"] == len(rows)
        values = [float(compared.scores["this_object_energy"][i]) for i in rows]
        assert table[block]["this_object_energy"] == pytest.approx(sum(values) / len(values))
    assert not {"names", "labels", "targets", "this_predicted"} & table["all"].keys()


def test_a_mean_over_nothing_or_of_nan_is_none():
    blocks = np.array(["both_right", "both_right", "both_wrong"])
    scores = {"blocks": blocks, "this_object_energy": np.array([0.5, 0.25, np.nan])}
    table = compare.summarize(scores)
    assert table["both_right"] == {"count": 2, "this_object_energy": 0.375}
    assert table["both_wrong"] == {"count": 1, "this_object_energy": None}
    assert table["only_this_right"] == {"count": 0, "this_object_energy": None}
    assert "unlabelled" not in table


def test_a_network_compared_with_itself_agrees(trained, whole):
    same = compare.compare(
        trained, trained, examples.in_chunks(whole.take(range(6))), 6, taps=("relu", "relu")
    )
    assert set(same.scores["blocks"]) <= {"both_right", "both_wrong"}
    np.testing.assert_array_equal(same.maps["this"], same.maps["other"])
    np.testing.assert_array_equal(same.common["this"], np.maximum(same.maps["this"], 0))
    for kind in ("energy", "native_energy"):
        this, other = (same.scores[f"{side}_part_{kind}"] for side in ("this", "other"))
        np.testing.assert_array_equal(this, other)


@pytest.mark.parametrize("target", ["predicted", "3", ""])
def test_both_maps_are_of_the_same_class(trained, coarse, whole, target):
    few = whole.take(range(4))
    if not target:  # files have no labels
        few = dataclasses.replace(few, labels=np.full(4, -1), masks={})
    result = compare.compare(trained, coarse, iter([few]), 4, taps=("relu", "relu"), target=target)
    _, predicted = slow_maps(trained, few, np.zeros(4, int))
    targets = np.full(4, 3) if target == "3" else predicted
    np.testing.assert_array_equal(result.scores["targets"], targets)
    for run, side in ((trained, "this"), (coarse, "other")):
        expected, _ = slow_maps(run, few, targets)
        np.testing.assert_allclose(result.maps[side], expected, rtol=1e-4, atol=1e-6)
    assert ("unlabelled" in result.scores["blocks"]) == (target == "")


def test_what_is_written(trained, coarse, whole, tmp_path, capsys):
    result = compare.draw_comparison(
        (trained, coarse),
        examples.in_chunks(whole, 16),
        60,
        tmp_path / "out",
        names=("fine", "rough"),
        shown=1,
        chunk_size=16,
    )
    assert "grad_cam at tap 'gated' of fine, tap 'relu' of rough" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("compare.json", "compare.npz", "compare.png")
    }
    facts = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert facts["this"] == {"name": "fine", "step": 7, "tap": "gated", "map": [8, 8]}
    assert facts["other"]["map"] == facts["common_map"] == [4, 4] and facts["class"] == "label"
    assert facts["blocks"] == json.loads(json.dumps(compare.summarize(result.scores)))
    with np.load(tmp_path / "out" / "compare.npz") as arrays:
        np.testing.assert_array_equal(arrays["shown"], result.rows)
        np.testing.assert_array_equal(arrays["this_maps"], result.maps["this"])
        np.testing.assert_array_equal(arrays["other_common_maps"], result.common["other"])
        np.testing.assert_array_equal(arrays["this_part_energy"], result.scores["this_part_energy"])


def test_a_map_that_is_no_number_is_shown_as_such(trained, whole, compared):
    broken = {**compared.scores}
    broken["this_object_energy"] = np.full(60, np.nan, np.float32)
    result = dataclasses.replace(compared, scores=broken)
    table = compare.summarize(broken)
    blocks = compare._picture_blocks(result, table, ("a", "b"), trained.class_names)
    assert len(blocks) == 4 and all("a ?, b 0." in block.note for block in blocks)


def test_runs_that_saw_other_images_or_classes_are_refused(trained):
    compare.check_comparable(trained, trained)
    data = trained.config.copy_and_resolve_references()
    data.data.update({"name": "cifar100", "crop_size": 24})
    fewer = dataclasses.replace(
        trained, class_names=trained.class_names[:3], image_shape=(24, 24, 3), config=data
    )
    with pytest.raises(ValueError) as error:
        compare.check_comparable(trained, fewer)
    message = str(error.value)
    for difference in (
        "classes 16 (",
        "image shape (32, 32, 3) and (24, 24, 3)",
        "data.name fine_shapes/tiny and cifar100",
        "data.crop_size 0 and 24",
    ):
        assert difference in message
    assert "\n" not in message and "data.resize" not in message
    names = (*trained.class_names[:-1], "another")
    with pytest.raises(ValueError, match="differ in: the names of some classes"):
        compare.check_comparable(trained, dataclasses.replace(trained, class_names=names))

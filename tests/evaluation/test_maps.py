import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.evaluation import examples, maps
from attnzoom_jax.evaluation.split import to_input

METHODS = ["grad_cam", "smooth_grad", "excitation_backprop"]


@pytest.fixture(scope="module")
def first(trained):
    return examples.from_split(trained, "test", 7)


@pytest.mark.parametrize("chunk_size", [3, 7, 32])
def test_chunks_give_what_one_call_of_the_methods_gives(trained, first, chunk_size, capsys):
    targets = np.array([0, 3, -1, 5, -1, 15, 2])
    arrays = maps.compute_maps(
        trained,
        first.images,
        targets,
        methods=METHODS[::2],
        options={"negative": "clamp"},
        tap="relu",
        gates=["gate"],
        chunk_size=chunk_size,
    )
    fn, shape = maps.as_function(trained)
    assert shape.shape == (1, 32, 32, 3)
    inputs = to_input(jnp.asarray(first.images), trained.config.data)
    logits = np.asarray(fn(inputs))
    expected = np.where(targets < 0, logits.argmax(1), targets)
    np.testing.assert_array_equal(arrays["targets"], expected)
    np.testing.assert_array_equal(arrays["predicted"], logits.argmax(1))
    np.testing.assert_allclose(arrays["probabilities"], jax.nn.softmax(logits), rtol=1e-5)
    cam = attribution.grad_cam(fn, inputs, jnp.asarray(expected), tap="relu")
    np.testing.assert_allclose(arrays["grad_cam"], cam, rtol=1e-4, atol=1e-7)
    relevance = attribution.excitation_backprop(
        fn, inputs, jnp.asarray(expected), tap="relu", negative="clamp"
    )
    np.testing.assert_allclose(arrays["excitation_backprop"], relevance, rtol=1e-4, atol=1e-7)
    _, taps = attribution.read_taps(fn, inputs, ["gate"])
    np.testing.assert_allclose(arrays["gate"], taps["gate"][..., 0], rtol=1e-5)
    assert len(arrays["absolute"]) == len(arrays["dropped"]) == 7
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == {3: ["3/7", "6/7"]}.get(chunk_size, [])


def test_methods_that_sample_draw_by_the_place_of_the_chunk(trained, first):
    sample = maps.map_function(
        trained, methods=["smooth_grad"], options={"samples": 1}, chunk_size=2
    )
    images, targets = first.images[:2], np.array([1, 1])
    at = {start: sample(images, targets, start)["smooth_grad"] for start in (0, 2)}
    again = sample(images, targets, 2)["smooth_grad"]
    np.testing.assert_array_equal(at[2], again)
    assert not np.allclose(at[0], at[2])


def test_a_line_is_printed_for_each_tenth(capsys):
    assert list(maps.say_progress(range(100), 100, 1)) == list(range(100))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"{done}/100" for done in range(10, 100, 10)]


def test_an_unknown_option_is_named_before_anything_is_computed(trained):
    with pytest.raises(ValueError, match="--option=sampels: none of grad_cam, rise has this"):
        maps.map_function(trained, methods=["grad_cam", "rise"], options={"sampels": 2})


def test_names_in_a_file_make_no_folders(tmp_path):
    maps.save_arrays(tmp_path / "a.npz", {"stage1/gate": np.ones(2), "b": np.zeros(1)})
    with np.load(tmp_path / "a.npz") as arrays:
        assert set(arrays.files) == {"stage1.gate", "b"}
        np.testing.assert_array_equal(arrays["stage1.gate"], [1, 1])

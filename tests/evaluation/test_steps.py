"""The steps of recursive models, as explain.py --figure=steps shows them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from attnzoom_jax import attribution
from attnzoom_jax.evaluation.examples import Examples
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.steps import draw_steps
from attnzoom_jax.layers import SqueezeExcite
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.models.recursive_zoom import RecursiveZoom
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.two_stream import two_stream

BACKBONE = ResNet(3, stem="small", block="basic", stage_sizes=(1, 1), width=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 2, -1])


def trained(model):
    data = types.SimpleNamespace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_size=0)
    key = jax.random.key(0)
    variables = model.init({"params": key, "dropout": key}, jnp.zeros((1, 24, 24, 3)))
    # No value at its start: zoom, attention and steps all do something.
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(key, len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return TrainedModel(
        config=types.SimpleNamespace(data=data),
        model=model,
        variables={**variables, "params": jax.tree.unflatten(tree, moved)},
        step=0,
        class_names=("cat", "dog", "owl"),
        image_shape=(24, 24, 3),
    )


def draw(model, out, **options):
    given = trained(model)
    examples = Examples(list("abcd"), IMAGES, LABELS, [])
    data = given.config.data
    inputs = jnp.asarray((IMAGES / 255 - np.array(data.mean)) / np.array(data.std), jnp.float32)
    arrays = draw_steps(given, examples, out, **options)
    return arrays, bind(model, given.variables, train=False), inputs


def close_maps(found, expected):
    """Equal but for rounding, which the images' own scale enlarges."""
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_zooms_are_the_views_and_features_of_the_model(tmp_path):
    model = RecursiveZoom(BACKBONE, steps=3, tap="stage2", temperature=0.2)
    arrays, fn, x = draw(model, tmp_path, chunk_size=3)
    np.testing.assert_array_equal(arrays["views"][:, 0], IMAGES)
    assert np.any(arrays["views"][:, 2] != IMAGES)
    logits, taps = attribution.read_taps(fn, x, ["step_weights"])
    np.testing.assert_allclose(arrays["weights"], taps["step_weights"], atol=1e-3)
    np.testing.assert_array_equal(arrays["predicted"], logits.argmax(-1))
    classes = logits.argmax(-1)
    for t, tap in enumerate(("backbone/stage2", "backbone/stage2#1", "backbone/stage2#2")):
        maps = attribution.grad_cam(fn, x, classes, tap=tap)
        close_maps(arrays["maps"][:, t], maps)
    with Image.open(tmp_path / "steps.png") as image:
        assert image.width > 300 and np.ptp(np.asarray(image.convert("L"))) > 100
    with np.load(tmp_path / "steps.npz") as stored:
        assert set(stored.files) == set(arrays)


@pytest.mark.parametrize("aggregation", ["attention", "mean", "last"])
def test_patches_are_seen_with_the_weights_of_the_steps(aggregation, tmp_path):
    options = {"steps": 3, "hidden": 5, "patch_size": 12, "add_on": 0, "patch_source": "cam"}
    inner = two_stream(BACKBONE, aggregation=aggregation, **options)
    model = Insert(inner, {"object_trunk": SqueezeExcite(2)})
    arrays, fn, x = draw(model, tmp_path, target="1")
    _, taps = attribution.read_taps(fn, x, ["backbone/boxes", "backbone/step_logits"])
    np.testing.assert_allclose(arrays["boxes"], taps["backbone/boxes"], atol=1e-4)
    steps = taps["backbone/step_logits"]
    np.testing.assert_array_equal(arrays["step_predicted"], steps.argmax(-1))
    np.testing.assert_allclose(arrays["weights"].sum(axis=1), 1, atol=1e-5)
    if aggregation != "attention":
        expected = [0, 0, 1] if aggregation == "last" else [1 / 3] * 3
        np.testing.assert_allclose(arrays["weights"], [expected] * 4, atol=1e-6)
    assert arrays["views"].shape == (4, 3, 12, 12, 3)
    np.testing.assert_array_equal(arrays["views"][:, 0], arrays["views"][:, 2])

    def of_last(x):
        _, taps = attribution.read_taps(fn, x, ["backbone/step_logits"])
        return taps["backbone/step_logits"][:, 2]

    maps = attribution.grad_cam(of_last, x, jnp.ones(4, int), tap="backbone/object_trunk")
    close_maps(arrays["maps"][:, 2], maps)


def test_a_model_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs a model that looks in steps.* a ResNet"):
        draw(BACKBONE, tmp_path)

"""Which channels attributes use, and the pictures of their masks."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from attnzoom_jax import attribution
from attnzoom_jax.evaluation import attribute_figure
from attnzoom_jax.evaluation.attribute_figure import draw_attributes, matrices_of
from attnzoom_jax.evaluation.examples import Examples
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.layers import SqueezeExcite
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.models.attribute import AttributeModel
from attnzoom_jax.models.resnet import ResNet

NAMES = ("red", "round", "big")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3)).astype(np.uint8)
LABELS = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], np.float32)


def trained(labels="attributes", *, is_inserted=False, **fields):
    backbone = ResNet(3, stem="small", block="basic", stage_sizes=(1, 1), width=4)
    model = AttributeModel(backbone, len(NAMES), tap="stage2", rank=3, **fields)
    if is_inserted:
        model = Insert(model, {"backbone/stage1": SqueezeExcite(2)})
    data = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_size": 0, "labels": labels}
    variables = model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    # No value at its start, biases included.
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return TrainedModel(
        config=ml_collections.ConfigDict({"data": data}),
        model=model,
        variables={**variables, "params": jax.tree.unflatten(tree, moved)},
        step=0,
        class_names=NAMES,
        image_shape=(24, 24, 3),
    )


def draw(given, out, labels=LABELS, **options):
    return draw_attributes(given, Examples(list("abcde"), IMAGES, labels, []), out, **options)


def read(given, names):
    data = given.config.data
    x = jnp.asarray((IMAGES / 255 - np.array(data.mean)) / np.array(data.std), jnp.float32)
    logits, taps = attribution.read_taps(
        bind(given.model, given.variables, train=False), x, list(names)
    )
    return np.asarray(logits), {name: np.asarray(tap, np.float64) for name, tap in taps.items()}


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("is_inserted", [False, True], ids=["alone", "inserted"])
@pytest.mark.parametrize("application", ["product", "residual"])
@pytest.mark.parametrize("granularity", ["attribute_channel", "attribute", "single"])
def test_contributions_and_masks_are_those_of_the_model(
    granularity, application, is_inserted, tmp_path, monkeypatch
):
    monkeypatch.setattr(attribute_figure, "CHUNK_VALUES", 2 * 12 * 12 * 3 * 8)  # several chunks
    given = trained(granularity=granularity, application=application, is_inserted=is_inserted)
    arrays = draw(given, tmp_path)
    prefix = "backbone/" if is_inserted else ""
    features = f"{prefix}backbone/stage2"
    logits, taps = read(given, [features, f"{prefix}attention/gate"])
    params = given.variables["params"]
    heads = (params["backbone"] if is_inserted else params)["heads"]
    masks, f = taps[f"{prefix}attention/gate"], taps[features]
    for i in range(5):
        for k in range(3):
            own = masks[i, :, :, k if granularity != "single" else 0]  # [h, w, c or 1]
            np.testing.assert_allclose(arrays["mean_masks"][i, k], own.mean(-1), atol=1e-5)
            masked = own * f[i] + (f[i] if application == "residual" else 0)
            added = masked.mean((0, 1)) * np.asarray(heads["kernel"])[k]
            np.testing.assert_allclose(arrays["contributions"][i, k], added, atol=1e-4)
            assert added.sum() + heads["bias"][k] == pytest.approx(logits[i, k], abs=1e-4)
            if granularity == "attribute_channel":
                strongest = np.argsort(-np.abs(added))[:4]
                assert arrays["channels"][i, k].tolist() == strongest.tolist()
                shown = np.moveaxis(own[..., strongest], -1, 0)
                np.testing.assert_allclose(arrays["channel_masks"][i, k], shown, atol=1e-3)
    assert ("channels" in arrays) == (granularity == "attribute_channel")
    np.testing.assert_allclose(arrays["probabilities"], 1 / (1 + np.exp(-logits)), atol=1e-5)
    usage = np.abs(arrays["contributions"]).mean(0)
    np.testing.assert_allclose(arrays["usage"], usage / usage.sum(1, keepdims=True), rtol=1e-4)
    assert arrays["usage_images"] == 5
    files = {"attributes.png", "attributes.npz", *(f"attributes_{name}.png" for name in "abcde")}
    assert {path.name for path in tmp_path.iterdir()} == files
    for name in ("attributes.png", "attributes_a.png"):
        image = picture(tmp_path / name)
        assert image.shape[1] > 300 and np.ptp(image) > 200
    with np.load(tmp_path / "attributes.npz") as stored:
        assert set(stored.files) == set(arrays)


def test_similarity_is_the_cosine_of_what_is_used():
    absolute = np.random.default_rng(0).random((4, 7))
    absolute[2] = 3 * absolute[0]
    absolute[3] = 0
    found = matrices_of(absolute, 10)
    for k in range(3):
        np.testing.assert_allclose(found["usage"][k], absolute[k] / absolute[k].sum())
        for j in range(3):
            a, b = absolute[k], absolute[j]
            cosine = sum(a * b) / np.sqrt(sum(a * a) * sum(b * b))
            assert found["similarity"][k, j] == pytest.approx(cosine)
    assert found["similarity"][0, 2] == pytest.approx(1)
    assert not found["usage"][3].any() and not found["similarity"][3].any()


def test_channels_stand_with_the_attribute_that_uses_them_most():
    usage = np.array([[5, 1, 30, 14], [4, 40, 1, 5.0]])
    assert matrices_of(usage, 1)["channel_order"].tolist() == [2, 3, 0, 1]


def test_rows_are_the_attributes_that_are_there_or_are_told(tmp_path, monkeypatch):
    given = trained()
    arrays = draw(given, tmp_path / "all")
    matters = (arrays["logits"] > 0) | (LABELS > 0)
    assert matters.any(1).sum() < 5 or matters.all(1).sum() < 5
    for i in range(5):
        most_probable = np.arange(3) == arrays["logits"][i].argmax()
        expected = matters[i] if matters[i].any() else most_probable
        assert arrays["shown"][i].tolist() == expected.tolist()
    monkeypatch.setattr(attribute_figure, "MOST_ROWS", 1)
    few = draw(given, tmp_path / "few")["shown"]
    for i in range(5):
        among = np.where(matters[i], arrays["logits"][i], -np.inf if matters[i].any() else 0)
        assert matters[i].sum() == 0 or few[i].tolist() == (np.arange(3) == among.argmax()).tolist()
    assert (few.sum(1) == 1).all()
    one = draw(given, tmp_path / "one", target="round")["shown"]
    assert one.tolist() == [[False, True, False]] * 5
    # A row less is a lower picture.
    heights = {name: len(picture(tmp_path / name / "attributes_c.png")) for name in ("all", "one")}
    assert heights["all"] > 1.8 * heights["one"]


def test_deciding_pixels_are_outlined(tmp_path):
    pixels = np.zeros((5, 3, 24, 24), bool)
    pixels[0, :, 6:18, 6:18] = True
    draw(trained(), tmp_path, pixels=pixels)

    def cyan(name):
        difference = np.abs(picture(tmp_path / f"attributes_{name}.png") - [0, 255, 255])
        return (difference.max(axis=2) < 12).sum()

    assert cyan("a") > 300 and cyan("c") == 0


def test_classes_have_masks_too(tmp_path):
    labels = np.array([0, 1, 2, 0, 1])
    arrays = draw(trained("label"), tmp_path, labels)
    np.testing.assert_allclose(arrays["probabilities"].sum(1), 1, atol=1e-5)
    assert arrays["true"].argmax(1).tolist() == labels.tolist()
    assert (arrays["predicted"].argmax(1) == arrays["logits"].argmax(1)).all()
    assert (arrays["shown"] == (arrays["true"] | arrays["predicted"])).all()


def test_files_have_no_labels(tmp_path):
    arrays = draw(trained(), tmp_path, np.full(5, -1))
    assert "true" not in arrays and (arrays["predicted"] == (arrays["logits"] > 0)).all()


def test_a_mask_that_is_the_same_everywhere_is_drawn(tmp_path):
    given = trained(transform={"name": "hard_threshold", "threshold": 0.5})
    expand = given.variables["params"]["attention"]["expand"]
    expand["kernel"], expand["bias"] = 0 * expand["kernel"], 0 * expand["bias"] - 1
    arrays = draw(given, tmp_path)
    assert not arrays["mean_masks"].any() and not arrays["usage"].any()
    assert not arrays["similarity"].any()


def test_models_without_such_masks_are_refused(tmp_path):
    with pytest.raises(ValueError, match='this is one with granularity="none"; --figure=maps'):
        draw(trained(granularity="none"), tmp_path)
    other = dataclasses.replace(trained(), model=ResNet(3, stem="small", stage_sizes=(1,)))
    with pytest.raises(ValueError, match=r"needs a model with masks of attributes.* is a ResNet"):
        draw(other, tmp_path)

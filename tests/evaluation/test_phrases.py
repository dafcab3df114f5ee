"""Phrases of fine_shapes/tiny and of a small Flickr30k, scored once more image by image."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.data.phrases import open_phrases
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.metrics.phrases import sliding_boxes
from attnzoom_jax.models import bind
from attnzoom_jax.training import sharding
from configs import default
from tests.data import official_archives
from tests.data.test_flickr30k import annotation, folder
from tests.evaluation.test_localize import Relu, slow_resize

TAGS = ("striped", "spotted", "square", "triangle", "cross", "ring", "bars")
SPLIT = "test[:9]"
flickr = folder  # the fixture: a small archive


class Net(nn.Module):
    outputs: int = 7

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (4, 4), strides=(4, 4), padding="VALID", name="conv")(x)
        x = Relu(name="relu")(x)
        return nn.Dense(self.outputs, name="head")(x.mean((1, 2)))


def variables(outputs=7) -> Any:
    return Net(outputs).init(jax.random.key(3), jnp.zeros((1, 32, 32, 3)))


def data_config(name="fine_shapes/tiny", *, batch_size=4, **changes) -> Any:
    data: Any = default.get_config().data
    data.update({"name": name, "eval_batch_size": batch_size, "labels": "attributes", **changes})
    return data


def create(split=SPLIT, *, data: Any = None, batch_size=4, devices=1, outputs=7, **options) -> Any:
    options = {"class_names": TAGS[:outputs], "tap": "relu", "prefix": "t", **options}
    return create_evaluator(
        "phrases",
        Net(outputs),
        data=data or data_config(batch_size=batch_size),
        mesh=sharding.create_mesh(jax.devices()[:devices]),
        split=split,
        **options,
    )


def evaluate(split=SPLIT, **options) -> dict[str, float]:
    return create(split, **options).run(variables(options.get("outputs", 7)))


def known(text) -> list[int]:
    return [TAGS.index(word) for word in text.split() if word in TAGS]


def iou(a, b) -> float:
    """Of boxes of whole pixels."""
    a, b = ([range(int(c[i]), int(c[i + 2])) for i in (0, 1)] for c in (a, b))
    rows, columns = (
        len(range(max(p.start, q.start), min(p.stop, q.stop))) for p, q in zip(a, b, strict=True)
    )
    areas = sum(len(box[0]) * len(box[1]) for box in (a, b))
    return rows * columns / (areas - rows * columns)


def slow_phrases(method, gamma, *, split=SPLIT, proposals=None, **options) -> list[dict[str, Any]]:
    """Each phrase with its map, made alone, and its ranks of proposals, by loops."""
    rows = []
    explain = getattr(attribution, method)
    fn = bind(Net(), variables(), train=False)
    options = options or {"tap": "relu"}
    for example in open_phrases("fine_shapes/tiny", split=split):
        images = to_input(jnp.asarray(example["image"])[None], data_config())
        guesses = sliding_boxes((32, 32)) if proposals is None else proposals[example["name"]]
        for phrase in example["phrases"]:
            (box,) = phrase.boxes
            heat = np.zeros((32, 32))
            outputs = known(phrase.text)
            for output in outputs:
                raw = explain(fn, images, jnp.array([output]), **options)[0]
                heat += slow_resize(np.maximum(np.asarray(raw, np.float64), 0), 32) / len(outputs)
            peak = np.unravel_index(heat.argmax(), heat.shape)
            row: dict[str, Any] = {
                "kind": phrase.kind,
                "is_known": bool(outputs),
                "pointing": (box[:2] <= peak).all() and (peak < box[2:]).all(),
                "uniform_pointing": (box[2] - box[0]) * (box[3] - box[1]) / 32**2,
                "center_pointing": (box[:2] <= 16).all() and (box[2:] > 16).all(),
            }
            off = (np.arange(32) - 15.5) / 8
            center = np.exp(-(off[:, None] ** 2 + off**2) / 2)
            right = [iou(guess, box) >= 0.5 for guess in guesses]
            row["recall_all"] = any(right)
            for kind, map_ in (("", heat), ("uniform_", np.ones((32, 32))), ("center_", center)):
                scores = []
                for y0, x0, y1, x1 in np.asarray(guesses, int):
                    inside = map_[y0:y1, x0:x1]
                    scores.append(inside.sum() / inside.size**gamma)
                # Sums of floats: what should tie differs in the last bits.
                order = sorted(range(len(scores)), key=lambda i, s=scores: (-round(s[i], 9), i))
                for n in (1, 5, 10):
                    row[f"{kind}recall{n}"] = any(right[i] for i in order[:n])
            if not outputs:
                row |= {name: False for name in ("recall1", "recall5", "recall10", "pointing")}
            rows.append(row)
    return rows


def means(rows) -> dict[str, float]:
    names = [name for name in rows[0] if name not in ("kind", "is_known")]
    return {f"t/{name}": float(np.mean([row[name] for row in rows])) for name in names}


@pytest.mark.parametrize("method", ["contrastive_excitation_backprop", "grad_cam"])
@pytest.mark.parametrize("gamma", [0.5, 0.2])
def test_metrics_equal_a_loop(method, gamma):
    metrics = evaluate(method=method, gamma=gamma, by_kind=True)
    rows = slow_phrases(method, gamma)
    expected = means(rows)
    for kind in ("labelled", "other"):
        own = means([row for row in rows if row["kind"] == kind])
        expected |= {f"{name}_{kind}": value for name, value in own.items()}
    counts = {
        "t/phrases": len(rows),
        "t/unknown_phrases": sum(not row["is_known"] for row in rows),
        "t/phrases_without_boxes": 0,
        "t/images_without_proposals": 0,
    }
    assert metrics == pytest.approx({**expected, **counts}, abs=1e-6)
    assert 0 < metrics["t/pointing"] < 1 and 0 < metrics["t/recall10"] < 1
    assert metrics["t/unknown_phrases"] > 0
    # Without the unknown ones, of the baselines too.
    skipped = evaluate(method=method, gamma=gamma, unknown="skip")
    rows = [row for row in rows if row["is_known"]]
    assert {name: skipped[name] for name in means(rows)} == pytest.approx(means(rows), abs=1e-6)
    assert skipped["t/phrases"] == len(rows)
    assert skipped["t/unknown_phrases"] == metrics["t/unknown_phrases"]


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (64, 1), (8, 4)])
def test_batches_and_devices_do_not_matter(batch_size, devices):
    metrics = evaluate(by_kind=True)
    assert evaluate(by_kind=True, batch_size=batch_size, devices=devices) == metrics


def test_metric_names_are_those_returned():
    evaluator = create()
    assert sorted(evaluator.run(variables())) == sorted(evaluator.metric_names)


def test_a_method_at_the_images_with_a_loop():
    options: Any = {"split": "test[:2]", "method": "integrated_gradients"}
    metrics = evaluate(**options, tap="", options={"steps": 2}, unknown="skip")
    rows = slow_phrases(**options, gamma=0.5, steps=2)
    expected = means([row for row in rows if row["is_known"]])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_tags_are_those_of_the_data_set_where_none_are_given():
    both = [
        create_evaluator(
            "phrases",
            Net(13),
            data=data_config(),
            mesh=sharding.create_mesh(jax.devices()[:1]),
            split=SPLIT,
            **names,
        ).run(variables(13))
        for names in ({}, {"class_names": create(class_names=()).tags})
    ]
    assert both[0] == both[1]
    assert both[0][f"{SPLIT}/unknown_phrases"] == 0


@pytest.fixture
def proposals(tmp_path) -> tuple[str, dict[str, np.ndarray]]:
    """The true box of the labelled object, and others, for each image but the last."""
    rng = np.random.default_rng(0)
    boxes = {}
    for example in open_phrases("fine_shapes/tiny", split=SPLIT):
        low = rng.integers(0, 20, (6, 2))
        others = np.concatenate([low, low + rng.integers(1, 12, (6, 2))], axis=1)
        boxes[example["name"]] = np.concatenate([others, example["phrases"][0].boxes])
    path = tmp_path / "proposals.npz"
    np.savez(path, **boxes)
    return str(path), boxes


def test_proposals_of_a_file(proposals):
    path, boxes = proposals
    metrics = evaluate(proposals=path)
    expected = means(slow_phrases("contrastive_excitation_backprop", 0.5, proposals=boxes))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_images_without_proposals_are_missed_and_told(proposals, capsys):
    path, boxes = proposals
    changed: Any = {**boxes, f"{SPLIT}[0]": np.zeros((0, 4)), "spare": np.ones((3, 2))}
    np.savez(path, **changed)
    evaluator = create(proposals=path, by_kind=True)
    metrics = evaluator.run(variables())
    assert metrics["t/images_without_proposals"] == 1
    assert metrics["t/recall_all_labelled"] == pytest.approx(8 / 9)
    told = {"count": 1, "first": [f"{SPLIT}[0]"]}
    assert evaluator.problems["images without proposals"] == told
    assert f"images without proposals: 1, such as {SPLIT}[0]\n" in capsys.readouterr().out


def test_nan_and_empty_maps_are_told():
    params, uniform = variables(), evaluate()["t/uniform_recall10"]
    known_ones = sum(row["is_known"] for row in slow_phrases("grad_cam", 0.5))
    kernels = params["params"]["conv"]["kernel"], params["params"]["head"]["kernel"]
    params["params"]["head"]["kernel"] = kernels[1] + jnp.nan
    evaluator = create(method="grad_cam")
    metrics = evaluator.run(params)
    assert evaluator.problems["maps with NaN, missed"]["count"] == known_ones
    assert metrics["t/recall10"] == metrics["t/pointing"] == 0
    assert metrics["t/uniform_recall10"] == uniform > 0
    params["params"] |= {"conv": {"kernel": 0 * kernels[0], "bias": jnp.zeros(6)}}
    params["params"]["head"]["kernel"] = kernels[1]
    evaluator.run(params)
    assert evaluator.problems.keys() == {
        "phrases without a known word",
        "maps without a positive value",
    }
    assert evaluator.problems["maps without a positive value"]["count"] == known_ones


FLICKR_TAGS = ("man", "dog", "hat", "cart")


def flickr_metrics(folder, tmp_path, split="train+validation+test", **options):
    official_archives.build("flickr30k", folder, tmp_path / "sets")
    data = data_config("flickr30k", dir=str(tmp_path / "sets"), batch_size=2)
    evaluator = create(split, data=data, class_names=FLICKR_TAGS, outputs=4, **options)
    return evaluator, evaluator.run(variables(4))


@pytest.mark.parametrize("mode", [("squash", 32), ("short_side", 32)], ids=lambda mode: mode[0])
def test_flickr30k(flickr, tmp_path, mode):
    evaluator, metrics = flickr_metrics(
        flickr, tmp_path, resize=mode[0], size=mode[1], multiple=4, by_kind=True
    )
    # A man, two brown dogs, The man's hat, her hand, A cart; the park, the air and A hat have none.
    assert metrics["t/phrases"] == 5 and metrics["t/phrases_without_boxes"] == 3
    assert metrics["t/unknown_phrases"] == 1
    assert evaluator.problems["phrases without a known word"]["first"] == [
        "flickr30k-images/22.jpg: 'her hand'"
    ]
    # One of the man's boxes is the whole image, the largest proposal; so is their union.
    assert metrics["t/uniform_recall1_people"] == metrics["t/recall_all_people"] == 1
    assert metrics["t/pointing_people"] == metrics["t/uniform_pointing_people"] == 1
    assert metrics["t/uniform_recall1_vehicles"] == 0
    # Of both dogs' boxes, 10 x 10 and 1 x 1 pixels, the union is 10 x 21.
    assert metrics["t/uniform_pointing_animals"] == pytest.approx(101 / 2400)


def test_the_truth_of_several_boxes(flickr, tmp_path):
    path = tmp_path / "proposals.npz"
    first, union = (20, 10, 30, 20), (20, 10, 30, 31)
    for truth, box in {"any": first, "union": union}.items():
        for name, other in {"any": first, "union": union}.items():
            boxes: Any = {"flickr30k-images/11.jpg": np.array([other])}
            np.savez(path, **boxes)
            options: Any = {"resize": "squash", "size": 32, "proposals": str(path)}
            _, metrics = flickr_metrics(
                flickr, tmp_path / f"{truth}_{name}", truth=truth, by_kind=True, **options
            )
            assert metrics["t/recall1_animals"] == (box == other)


def test_a_box_that_reaches_beyond_the_image_is_clipped_and_told(flickr, tmp_path):
    # The annotation says that the image were larger.
    text = annotation((300, 500), [(["2"], (41, 21, 90, 90)), (["2"], (60, 1, 70, 9))])
    official_archives.write(flickr / "Annotations" / "44.xml", text)
    evaluator, metrics = flickr_metrics(flickr, tmp_path, "test", resize="squash", size=32)
    assert evaluator.problems["boxes clipped to the image"]["count"] == 1
    assert metrics["t/uniform_pointing"] == pytest.approx(10 * 10 / (30 * 50))


def test_no_phrase_to_score(flickr, tmp_path):
    with pytest.raises(ValueError, match="flickr30k:validation has no phrase to score"):
        flickr_metrics(flickr, tmp_path, "validation", resize="squash", size=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truth": "unoin"}, "unknown truth 'unoin'; did you mean 'union'"),
        ({"unknown": "mist"}, "unknown treatment of unknown phrases 'mist'"),
        ({"method": "gradcam", "tap": ""}, "unknown method 'gradcam'; did you mean 'grad_cam'"),
        ({"resize": "crop"}, "a crop hides boxes"),
        ({"proposals": "nowhere.npz"}, "proposals=nowhere.npz cannot be read .*expected an npz"),
        ({"gama": 1}, "unknown option of phrases 'gama'; did you mean 'gamma'"),
        ({"batch_size": 3, "devices": 2}, "data.eval_batch_size=3 cannot be split"),
        ({"class_names": ("a", "with")}, "no tag .* could occur in a phrase"),
    ],
    ids=["truth", "unknown", "method", "crop", "proposals", "option", "batch", "tags"],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({"other.jpg": np.ones((1, 4))}, "the file has other.jpg, .* images are called test"),
        ({f"{SPLIT}[0]": np.ones((2, 3))}, r"proposals of test\[:9\]\[0\] have shape \(2, 3\)"),
    ],
    ids=["names", "shape"],
)
def test_proposals_that_do_not_fit(tmp_path, boxes, message):
    np.savez(tmp_path / "boxes.npz", **boxes)
    with pytest.raises(ValueError, match=message):
        evaluate(proposals=str(tmp_path / "boxes.npz"))


def test_an_unknown_tap():
    with pytest.raises(ValueError, match=r"unknown tap .*'rellu'; did you mean 'relu'"):
        evaluate(tap="rellu")

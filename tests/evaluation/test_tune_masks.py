import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.corruptions import CORRUPTIONS
from attnzoom_jax.data.datasets.fine_shapes_renderer import ATTRIBUTES
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.tune_masks import GRID, shift_logits, tune_masks
from attnzoom_jax.models import create_model
from attnzoom_jax.ops.masks import check_transforms
from attnzoom_jax.training.sharding import create_mesh
from configs import multi_channel

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {"power": {"exponent": (0.2, 6.0)}, "saturation": {"threshold": (0.45,)}}


@pytest.fixture(scope="module")
def trained():
    """Not trained, in truth: random weights decide one way or the other just as well."""
    config = multi_channel.get_config("tiny")
    model = create_model(num_classes=len(ATTRIBUTES), **config.model.to_dict())
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    heads = variables["params"]["heads"]
    heads["bias"] -= jnp.linspace(-0.2, 0.2, len(ATTRIBUTES))
    return TrainedModel(config, model, variables, 0, ATTRIBUTES, (32, 32, 3))


def mesh():
    return create_mesh(jax.devices()[:1])


def balanced(trained, transform, corruption=None):
    """The balanced accuracy of each attribute on clean or corrupted images, by the evaluators."""
    transformed = {"transform": transform} if transform["name"] != "identity" else {}
    options = {"split": "validation", "prefix": "v", **transformed}
    shared = {"model": trained.model, "data": trained.config.data, "mesh": mesh()}
    if corruption is None:
        metrics = create_evaluator("attributes", **shared, **options).run(trained.variables)
        return [metrics[f"v/balanced_accuracy_{name}"] for name in trained.class_names]
    options |= {"corruptions": (corruption,), "levels": (3,), "attacks": ()}
    metrics = create_evaluator("robustness", **shared, **options).run(trained.variables)
    return metrics[f"v/{corruption}_3_balanced_accuracy"]


@pytest.fixture(scope="module")
def study(trained):
    corruptions = ("contrast", "gaussian_noise")
    return tune_masks(trained, split="validation", mesh=mesh(), corruptions=corruptions, grid=SMALL)


def test_scores_are_those_of_the_evaluators(trained, study):
    candidates = study["transforms"]["power"]["candidates"]
    assert [c.get("exponent") for c in candidates] == [None, 0.2, 6.0]
    for candidate, scores in zip(candidates, study["transforms"]["power"]["scores"], strict=True):
        clean = np.array(balanced(trained, candidate))
        corrupted = [balanced(trained, candidate, name) for name in ("contrast", "gaussian_noise")]
        assert np.mean(scores) == pytest.approx((clean.mean() + np.mean(corrupted)) / 2, abs=1e-6)
    assert study["identity"] == study["transforms"]["power"]["scores"][0]
    assert np.ptp(study["transforms"]["power"]["scores"], axis=0).max() > 0.01


def test_every_attribute_takes_its_best(study):
    transforms = study["transforms"]
    assert list(transforms) == ["power", "saturation", "best"]
    everything = []
    for name in ("power", "saturation"):
        one = transforms[name]
        scores = np.array(one["scores"])  # [candidates, a]
        everything.append(scores)
        for k, chosen in enumerate(one["chosen"]):
            place = one["candidates"].index(chosen)
            assert scores[place, k] == scores[:, k].max()
            # The identity, which comes first, where nothing is better.
            assert place == 0 or scores[0, k] < scores[place, k]
        assert one["score"] == pytest.approx(scores.max(axis=0).mean())
    best = np.concatenate(everything).max(axis=0)
    assert transforms["best"]["score"] == pytest.approx(best.mean())
    check_transforms(transforms["best"]["chosen"])


def test_what_is_chosen_does_on_the_same_images_what_the_study_says(trained, study):
    """All chosen transforms together, one for each attribute: attributes do not disturb another."""
    chosen = study["transforms"]["best"]["chosen"]
    shared = {"model": trained.model, "data": trained.config.data, "mesh": mesh()}
    metrics = create_evaluator("attributes", split="validation", transform=chosen, **shared).run(
        trained.variables
    )
    clean = metrics["validation/balanced_accuracy"]
    options = {"corruptions": ("contrast", "gaussian_noise"), "levels": (3,), "attacks": ()}
    robust = create_evaluator(
        "robustness", split="validation", transform=chosen, **shared, **options
    ).run(trained.variables)
    score = (clean + robust["validation/corruption_balanced_accuracy"]) / 2
    assert score == pytest.approx(study["transforms"]["best"]["score"], abs=1e-6)


def test_the_control_shifts_logits(trained, study):
    one = study["controls"]["shift"]
    assert one["scores"][0] == study["identity"]
    assert one["score"] == pytest.approx(np.max(one["scores"], axis=0).mean())
    assert one["score"] > np.mean(study["identity"])
    variables = shift_logits(trained.variables, one["chosen"])
    other = dataclasses.replace(trained, variables=variables)
    clean = np.mean(balanced(other, {"name": "identity"}))
    corrupted = [
        balanced(other, {"name": "identity"}, name) for name in ("contrast", "gaussian_noise")
    ]
    assert (clean + np.mean(corrupted)) / 2 == pytest.approx(one["score"], abs=1e-6)


def test_the_default_grid_is_in_range():
    for name, values in GRID.items():
        for parameter, points in values.items():
            check_transforms([{"name": name, parameter: point} for point in points])


def test_a_single_mask_has_one_transform(trained):
    """All attributes together take it, and the evaluators take what is chosen."""
    config = trained.config.copy_and_resolve_references()
    config.model.granularity = "single"
    model = create_model(num_classes=len(ATTRIBUTES), **config.model.to_dict())
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    heads = variables["params"]["heads"]
    heads["bias"] -= jnp.linspace(-0.2, 0.2, len(ATTRIBUTES))
    single = dataclasses.replace(trained, config=config, model=model, variables=variables)
    study = tune_masks(
        single, split="validation", mesh=mesh(), corruptions=("contrast",), grid=SMALL
    )
    power = study["transforms"]["power"]
    assert study["attributes"] == ["all"] and len(power["chosen"]) == len(study["identity"]) == 1
    assert np.ptp(power["scores"]) > 0.001
    for candidate, scores in zip(power["candidates"], power["scores"], strict=True):
        clean = np.mean(balanced(single, candidate))
        score = (clean + balanced(single, candidate, "contrast")) / 2
        assert scores == pytest.approx([score], abs=1e-6)


def test_a_transform_may_come_from_a_config(trained, study):
    config = trained.config.copy_and_resolve_references()
    config.evals.test.update({"split": "validation", "prefix": "v", "masks": False})
    config.evals.test.transform = {"name": "power", "exponent": 6.0}
    evaluator = create_evaluator(
        model=trained.model, data=config.data, mesh=mesh(), **config.evals.test
    )
    found = evaluator.run(trained.variables)
    expected = np.mean(balanced(trained, {"name": "power", "exponent": 6.0}))
    assert found["v/balanced_accuracy"] == pytest.approx(expected, abs=1e-6)
    config.evals.test.transform.exponent = -6.0
    with pytest.raises(ValueError, match="exponent=-6\\.0 of power: expected"):
        create_evaluator(model=trained.model, data=config.data, mesh=mesh(), **config.evals.test)


def test_a_split_that_is_too_small_is_told(trained):
    with pytest.raises(ValueError, match="none of the 13 attributes can be scored"):
        tune_masks(trained, split="validation[:1]", mesh=mesh(), corruptions=("contrast",), grid={})


def test_bad_requests(trained):
    for corruptions, words in (
        (("contrast", "fog"), "unknown corruption 'fog'"),
        ((), "no corruptions; expected at least one of gaussian_noise, "),
    ):
        with pytest.raises(ValueError, match=words):  # before anything is read
            tune_masks(trained, split="nowhere", mesh=mesh(), corruptions=corruptions)
    for fields, words in (
        ({"granularity": "none"}, "no masks to transform"),
        ({"transform": {"name": "power", "exponent": 2.0}}, "has a transform already"),
    ):
        other = dataclasses.replace(trained, model=trained.model.clone(**fields))
        with pytest.raises(ValueError, match=words):
            tune_masks(other, split="validation", mesh=mesh(), corruptions=tuple(CORRUPTIONS))

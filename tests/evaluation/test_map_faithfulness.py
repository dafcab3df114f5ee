from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from attnzoom_jax.evaluation.map_faithfulness import NAMES, Faithfulness
from attnzoom_jax.metrics.faithfulness import confidence, deletion, insertion
from attnzoom_jax.metrics.road import road
from attnzoom_jax.metrics.sensitivity import max_sensitivity
from attnzoom_jax.training import sharding

RNG = np.random.default_rng(1)
N, H, W, C, K = 8, 6, 7, 3, 4
IMAGES = RNG.normal(size=(N, H, W, C)).astype(np.float32)
MAPS = RNG.normal(size=(N, H, W)).astype(np.float32)
TARGETS = np.array([2, 0, 1, 3, 1, 1, 0, 2], np.int32)
REAL = np.ones(N)
SETTINGS: Any = {"steps": 7, "shares": (0.3, 0.6), "samples": 2, "radius": 0.1, "chunk_size": 16}


def weights(seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "conv": jnp.asarray(rng.normal(size=(3, 3, C, 5)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(5, K)), jnp.float32),
    }


def features(variables, images):
    dimensions = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated
    x = conv(images, variables["conv"], (1, 1), "SAME", dimension_numbers=dimensions)
    return jnp.maximum(x, 0) @ variables["head"]


def apply(variables, images):
    return features(variables, images).mean((1, 2))


def explain(variables, targets, images):
    """The class's own map: [n, h, w]."""
    return jnp.take_along_axis(features(variables, images), targets[:, None, None, None], 3)[..., 0]


def scored(names=NAMES, *, devices=1, of=apply, request=None, seed=0, **options):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    evaluator = Faithfulness(of, names=names, mesh=mesh, **SETTINGS | options)
    request = (IMAGES, MAPS, TARGETS, REAL) if request is None else request
    variables = jax.device_put(weights(seed), sharding.replicated(mesh))
    return evaluator.scores(variables, *request, explain=explain)


def test_each_score_is_that_of_its_function():
    fn, key = Partial(apply, weights()), jax.random.key(0)
    request = (jnp.asarray(IMAGES), jnp.asarray(MAPS), jnp.asarray(TARGETS))
    seen = confidence(fn, *request)
    of_road: Any = {"key": key, "shares": SETTINGS["shares"]}
    expected = {
        "insertion": insertion(fn, *request, steps=7).area,
        "deletion": deletion(fn, *request, steps=7).area,
        "average_drop": seen.drop,
        "increase": seen.increase,
        "road": road(fn, *request, **of_road).mean,
        "road_lerf": road(fn, *request, order="lerf", **of_road).mean,
        "max_sensitivity": max_sensitivity(
            lambda images: explain(weights(), request[2], images),
            request[0],
            key=key,
            samples=2,
            radius=0.1,
        ),
    }
    found = scored()
    assert list(found) == list(NAMES) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len({tuple(values.round(6)) for values in found.values()}) == len(NAMES)


def test_only_what_is_asked_for_is_computed():
    assert list(scored(("increase", "deletion"))) == ["increase", "deletion"]
    seen = []

    def counted(variables, images):
        seen.append(len(images))
        return apply(variables, images)

    scored(("average_drop",), of=counted)
    assert seen and set(seen) == {N}  # no walk, of whose chunks each has more images
    np.testing.assert_array_equal(scored(("insertion",))["insertion"], scored()["insertion"])


def test_options_reach_the_scores():
    logit = scored(("deletion", "road"), score="logit", steps=3, shares=(0.5,))
    fn = Partial(apply, weights())
    request = (jnp.asarray(IMAGES), jnp.asarray(MAPS), jnp.asarray(TARGETS))
    area = deletion(fn, *request, steps=3, score="logit").area
    np.testing.assert_allclose(logit["deletion"], area, rtol=1e-5, atol=1e-6)
    mean = road(fn, *request, key=jax.random.key(0), shares=(0.5,), score="logit").mean
    np.testing.assert_allclose(logit["road"], mean, rtol=1e-5, atol=1e-6)


def test_one_device_equals_four():
    for name, values in scored(devices=4).items():
        np.testing.assert_allclose(values, scored((name,))[name], rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    """Which draws it sees goes by its id, and padding changes nothing."""
    rows = [3, 6]
    mesh = sharding.create_mesh(jax.devices()[:1])
    evaluator = Faithfulness(apply, names=NAMES, mesh=mesh, **SETTINGS)
    images, maps, targets = (
        np.concatenate([x[rows], np.zeros_like(x[:2])]) for x in (IMAGES, MAPS, TARGETS)
    )
    mask, ids = np.array([1, 1, 0, 0]), [*rows, 0, 0]
    part = evaluator.scores(weights(), images, maps, targets, mask, explain=explain, ids=ids)
    for name, values in scored().items():
        np.testing.assert_allclose(part[name][:2], values[rows], rtol=1e-4, atol=1e-5)
        assert np.isnan(part[name][2:]).all()  # never counted by mistake


def test_a_map_with_nan_has_no_score_and_leaves_the_others_theirs():
    maps, images = MAPS.copy(), IMAGES.copy()
    maps[2, 1, 1] = images[2, 1, 1] = np.nan
    clean, rest = scored(), np.arange(N) != 2
    of_map = NAMES[:-1]
    found = scored(of_map, request=(IMAGES, maps, TARGETS, REAL))
    # This one sees the maps that `explain` makes.
    found |= scored(NAMES[-1:], request=(images, MAPS, TARGETS, REAL))
    for name in NAMES:
        assert np.flatnonzero(np.isnan(found[name])).tolist() == [2], name
        np.testing.assert_allclose(found[name][rest], clean[name][rest], rtol=1e-5, atol=1e-6)


def test_logits_over_places_count_by_their_spatial_softmax():
    def softmax_mean(variables, images):
        logits = features(variables, images)
        return (jax.nn.softmax(logits, axis=(1, 2)) * logits).sum((1, 2))

    names = ("deletion", "road")
    expected = scored(names, of=softmax_mean)
    for name, values in scored(names, of=features).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6)


def test_other_weights_and_batches_do_not_compile_again():
    traces = []

    def counted(variables, images):
        traces.append(images.shape)
        return apply(variables, images)

    mesh = sharding.create_mesh(jax.devices()[:1])
    names = tuple(name for name in NAMES if name != "max_sensitivity")
    evaluator = Faithfulness(counted, names=names, mesh=mesh, **SETTINGS)
    first = evaluator.scores(weights(), IMAGES, MAPS, TARGETS, REAL)
    count = len(traces)
    other = evaluator.scores(weights(1), IMAGES[::-1].copy(), MAPS, TARGETS, REAL)
    assert len(traces) == count
    assert all((first[name] != other[name]).any() for name in names if name != "increase")


def test_bad_requests_are_named(monkeypatch):
    with pytest.raises(ValueError, match="faithfulness 'insertoin'; did you mean 'insertion'"):
        scored(("insertoin",))
    with pytest.raises(ValueError, match="names is 'road'; expected a tuple"):
        scored("road")
    mesh = sharding.create_mesh(jax.devices()[:1])
    evaluator = Faithfulness(apply, names=("max_sensitivity",), mesh=mesh)
    with pytest.raises(ValueError, match="give explain="):
        evaluator.scores(weights(), IMAGES, MAPS, TARGETS, REAL)
    with pytest.raises(ValueError, match="maps=6 cannot be split over 4 devices"):
        scored(devices=4, request=(IMAGES[:6], MAPS[:6], TARGETS[:6], REAL[:6]))
    with pytest.raises(ValueError, match="resize the maps to the images"):
        scored(request=(IMAGES, MAPS[:, :3], TARGETS, REAL))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="ROAD needs all images on one process"):
        Faithfulness(apply, names=("deletion", "road"), mesh=mesh)

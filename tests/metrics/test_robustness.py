import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from attnzoom_jax.metrics.robustness import count_wrong, fgsm, pgd, random_search

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.5)
SPACE = {"mean": MEAN, "std": STD}
SHAPE = (6, 5, 3)
KEY = jax.random.key(11)


def images_of(n=8, low=0.3, high=0.7, seed=0):
    """Normalised images; their pixels lie in [low, high]."""
    pixels = np.random.default_rng(seed).uniform(low, high, (n, *SHAPE))
    return jnp.asarray((pixels - MEAN) / STD, jnp.float32)


def pixels_of(images):
    return np.asarray(images, np.float64) * STD + MEAN


def weights_of(outputs, seed=1):
    return np.random.default_rng(seed).normal(size=(*SHAPE, outputs)).astype(np.float32)


def linear(weights, images):
    return jnp.tensordot(images, weights, 3)


def bent(weights, images):
    """Not linear, and not monotone along a gradient."""
    return jnp.sin(3 * jnp.tensordot(jnp.tanh(images), weights, 3))


def model(fn=linear, outputs=2):
    return Partial(fn, jnp.asarray(weights_of(outputs)))


def distance(attacked, images, norm):
    change = np.abs(pixels_of(attacked.images) - pixels_of(images))
    return change.max(axis=(1, 2, 3)) if norm == "linf" else np.sqrt((change**2).sum((1, 2, 3)))


def margins(weights, images, labels):
    """The other class's logit less the label's, of two classes."""
    logits = np.tensordot(np.asarray(images, np.float64), weights.astype(np.float64), 3)
    rows = np.arange(len(labels))
    return logits[rows, 1 - labels] - logits[rows, labels]


def length_of(weights, norm):
    """What a unit of distance in pixels adds to the margin at most."""
    in_pixels = (weights[..., 0] - weights[..., 1]).astype(np.float64) / STD
    return np.abs(in_pixels).sum() if norm == "linf" else np.sqrt((in_pixels**2).sum())


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.02), ("linf", 0.1), ("l2", 0.2)])
@pytest.mark.parametrize("key", [None, KEY], ids=["from the image", "from a random place"])
def test_pgd_on_a_linear_model_has_a_closed_form(norm, epsilon, key):
    images, weights = images_of(), weights_of(2)
    labels = np.array([0, 1] * 4)
    before = margins(weights, images, labels)
    found = pgd(model(), images, labels, epsilon=epsilon, norm=norm, key=key, **SPACE)
    after = margins(weights, found.images, labels)
    gain = epsilon * length_of(weights, norm)
    if norm == "l2" and key is not None:  # what it drew across the gradient stays a little
        assert (after - before <= gain * 1.0001).all() and (after - before > 0.9 * gain).all()
    else:
        assert after - before == pytest.approx(gain, rel=1e-4)
        assert found.wrong.tolist() == (before + gain > 0).tolist()
    assert np.asarray(found.score) == pytest.approx(np.logaddexp(0, after), rel=1e-3, abs=1e-4)
    assert distance(found, images, norm) == pytest.approx(epsilon, rel=1e-4)


def test_fgsm_is_one_step_of_pgd():
    images, labels = images_of(), np.arange(8) % 4
    fn = model(bent, 4)
    step = {"epsilon": 0.01, **SPACE}
    found = fgsm(fn, images, labels, **step)
    change = pixels_of(found.images) - pixels_of(images)
    assert np.abs(change) == pytest.approx(0.01, rel=1e-3)
    one = pgd(fn, images, labels, steps=1, step_size=0.01, **step)
    is_worse = np.asarray(found.score) > np.asarray(one.score) - 1e-6  # PGD may keep the image
    assert is_worse.any()
    assert (np.asarray(one.images)[is_worse] == np.asarray(found.images)[is_worse]).all()

    def loss(images):
        log_probabilities = jax.nn.log_softmax(fn(images))
        return -log_probabilities[jnp.arange(8), labels].sum()

    assert (np.sign(change) == np.sign(jax.grad(loss)(images))).all()


ATTACKS = {
    "pgd": functools.partial(pgd, steps=7, key=KEY),
    "random_search": functools.partial(random_search, queries=25, key=KEY),
    "fgsm": lambda *args, norm, **request: fgsm(*args, **request),
}


@pytest.mark.parametrize(
    ("attack", "norm"),
    [("fgsm", "linf"), *itertools.product(("pgd", "random_search"), ("linf", "l2"))],
)
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_attacked_images_stay_near_and_are_images(attack, norm, epsilon):
    images = images_of(low=0, high=1)
    images = images.at[0].set((0 - jnp.array(MEAN)) / jnp.array(STD))  # black
    images = images.at[1].set((1 - jnp.array(MEAN)) / jnp.array(STD))  # white
    labels = np.arange(8) % 4
    found = ATTACKS[attack](model(bent, 4), images, labels, epsilon=epsilon, norm=norm, **SPACE)
    pixels = pixels_of(found.images)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    assert (distance(found, images, norm) < epsilon + 1e-6).all()
    assert (distance(found, images, norm) > 0).any()
    logits = np.asarray(model(bent, 4)(found.images))
    assert found.wrong.tolist() == (logits.argmax(1) != labels).astype(int).tolist()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_is_spread_over_the_ball(norm):
    images, labels = images_of(n=400), np.zeros(400, np.int32)
    constant = Partial(lambda images: jnp.zeros((len(images), 2)))  # equal: the last one is kept
    request = {"epsilon": 0.1, "norm": norm, "steps": 1, "step_size": 1e-9, **SPACE}
    assert (distance(pgd(constant, images, labels, **request), images, norm) < 1e-6).all()
    change = pixels_of(pgd(constant, images, labels, key=KEY, **request).images)
    change = (change - pixels_of(images)) / 0.1
    if norm == "linf":
        quantiles = np.quantile(change, [0.1, 0.25, 0.5, 0.75, 0.9])
        assert quantiles == pytest.approx([-0.8, -0.5, 0, 0.5, 0.8], abs=0.02)
    else:  # the length to the power of the dimension is uniform
        length = np.sqrt((change**2).sum((1, 2, 3))) ** np.prod(SHAPE)
        assert np.quantile(length, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.08)
        assert np.abs(change.mean(axis=0)).max() < 5 / np.sqrt(400 * 90)


def test_the_worst_iterate_is_kept():
    images, labels = images_of(n=24), np.arange(24) % 4
    fn, request = model(bent, 4), {"epsilon": 0.1, "step_size": 0.05, **SPACE}
    runs = [pgd(fn, images, labels, steps=steps, **request) for steps in range(1, 9)]
    ranks = [list(zip(r.wrong.tolist(), r.score.tolist(), strict=True)) for r in runs]
    for earlier, later in itertools.pairwise(ranks):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))
    # Otherwise this would show nothing: in between, the last iterates were not the worst ones.
    assert any(a == b for a, b in zip(ranks[3], ranks[4], strict=True))
    clean = count_wrong(fn, images, labels)
    assert (runs[0].wrong >= clean).all() and runs[-1].wrong.sum() > clean.sum()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.02), ("l2", 0.2)])
def test_random_search_comes_near_pgd_on_a_linear_model_and_never_beats_it(norm, epsilon):
    images, weights, labels = images_of(n=32), weights_of(2), np.arange(32) % 2
    before = margins(weights, images, labels)
    searched = random_search(
        model(), images, labels, epsilon=epsilon, norm=norm, key=KEY, queries=400, **SPACE
    )
    gain = margins(weights, searched.images, labels) - before
    most = epsilon * length_of(weights, norm)
    assert (gain < most * 1.0001).all() and (gain > 0.35 * most).all()
    assert np.asarray(searched.score) == pytest.approx(gain + before, rel=1e-3, abs=1e-3)
    climbed = pgd(model(), images, labels, epsilon=epsilon, norm=norm, **SPACE)
    assert (searched.wrong <= climbed.wrong).all()


def test_random_search_breaks_what_hides_its_gradient_from_pgd():
    def saturated(weights, images):
        return 1e4 * jnp.sign(jnp.tensordot(images, weights, 3))

    weights = np.abs(weights_of(2)) * [1, -1]
    images = images_of(n=32)
    labels = np.asarray(linear(weights, images)).argmax(axis=1)
    shift = jnp.median(images, axis=0)
    fn = Partial(lambda weights, images: saturated(weights, images - shift), jnp.asarray(weights))
    labels = np.asarray(fn(images)).argmax(axis=1)
    request = {"epsilon": 0.05, "key": KEY, **SPACE}
    climbed = pgd(fn, images, labels, steps=10, **request)
    searched = random_search(fn, images, labels, queries=50, **request)
    assert searched.wrong.sum() > climbed.wrong.sum() + 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attributes_are_attacked_together(norm):
    images, weights = images_of(n=6), weights_of(5)
    labels = (np.random.default_rng(3).random((6, 5)) > 0.5).astype(np.float32)
    for attack in (ATTACKS["pgd"], ATTACKS["random_search"]):
        found = attack(model(outputs=5), images, labels, epsilon=0.05, norm=norm, **SPACE)
        logits = np.tensordot(np.asarray(found.images, np.float64), weights, 3)
        signed = np.where(labels > 0.5, logits, -logits)  # above 0: right
        assert found.wrong.tolist() == (signed <= 0).sum(axis=1).tolist()
        if attack is ATTACKS["pgd"]:
            expected = (-signed / (1 + np.abs(signed))).sum(axis=1)
        else:
            expected = -np.maximum(signed, 0).sum(axis=1)
        assert np.asarray(found.score) == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert (found.wrong >= count_wrong(model(outputs=5), images, labels)).all()
    alone = pgd(model(outputs=2), images, labels[:, :1].repeat(2, 1), epsilon=0.05, **SPACE)
    assert alone.wrong.shape == (6,) and alone.wrong.dtype == jnp.int32


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["pgd", "random_search"])
def test_each_image_draws_by_its_number_alone(attack, norm):
    images, labels = images_of(), np.arange(8) % 4
    run = functools.partial(ATTACKS[attack], model(bent, 4), epsilon=0.05, norm=norm, **SPACE)
    whole = run(images, labels)
    assert (run(images, labels).images == whole.images).all()
    parts = [run(images[p], labels[p], ids=np.arange(8)[p]) for p in (slice(0, 3), slice(3, 8))]
    joined = np.concatenate([part.images for part in parts])
    assert joined == pytest.approx(np.asarray(whole.images), abs=1e-5)
    other = run(images, labels, ids=np.arange(8) + 8)
    assert (np.abs(other.images - whole.images) > 1e-4).any()
    assert (np.abs(run(images, labels, key=jax.random.key(1)).images - whole.images) > 1e-4).any()


def test_batches_share_one_program():
    calls = []

    def counted(weights, images):
        calls.append(images.shape)
        return linear(weights, images)

    labels = np.arange(8) % 2
    for seed in range(3):
        fn = Partial(counted, jnp.asarray(weights_of(2, seed)))
        for norm, epsilon in (("linf", 0.01), ("linf", 0.02), ("l2", 0.5)):
            pgd(fn, images_of(seed=seed), labels, epsilon=epsilon, norm=norm, key=KEY, **SPACE)
        if not seed:
            traced = len(calls)
    assert traced <= 6 and len(calls) == traced


def test_nan_is_wrong_and_does_not_spread():
    def broken(images):
        logits = linear(weights_of(2), images)
        return jnp.where(jnp.arange(len(images))[:, None] == 0, jnp.nan, logits)

    images, labels = images_of(), np.zeros(8, np.int32)
    assert int(count_wrong(broken, images, labels)[0]) == 1
    for attack in ATTACKS.values():
        found = attack(broken, images, labels, epsilon=0.01, norm="linf", **SPACE)
        assert int(found.wrong[0]) == 1 and np.isfinite(found.images).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0}, "epsilon of an attack is 0; expected a distance above 0"),
        ({"epsilon": -1.0, "norm": "l2"}, "epsilon of an attack is -1.0"),
        ({"epsilon": 8}, "epsilon of an attack is 8; .* at most 1, such as 8/255"),
        ({"epsilon": float("nan")}, "epsilon of an attack is nan"),
        ({"norm": "l_inf"}, "unknown norm 'l_inf'; did you mean 'linf'"),
        ({"steps": 0}, "steps of an attack is 0; expected a whole number from 1 on"),
        ({"step_size": -0.1}, "step_size is -0.1"),
        ({"std": 0.0}, "std of an attack is 0.0; expected numbers above 0"),
        ({"images": np.zeros((8, *SHAPE), np.uint8)}, "uint8 images; .* normalise them first"),
        ({"images": np.zeros((8, 12), np.float32)}, r"images \[8, 12\] and labels int32\[8\]"),
        ({"labels": np.zeros(7, np.int32)}, r"and labels int32\[7\]; expected \[n, h, w, c\]"),
        ({"labels": np.zeros((8, 3), np.float32)}, r"logits \[8, 2\] and labels \[8, 3\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_requests_are_told(change, message):
    request = {"images": images_of(), "labels": np.zeros(8, np.int32), "epsilon": 0.01, **change}
    with pytest.raises(ValueError, match=message):
        pgd(model(), **request)
    if not {"steps", "step_size"} & set(change):
        with pytest.raises(ValueError, match=message):
            random_search(model(), key=KEY, **request)


def test_a_search_without_queries_is_told():
    with pytest.raises(ValueError, match="queries of an attack is 0"):
        random_search(model(), images_of(), np.zeros(8, np.int32), epsilon=0.1, key=KEY, queries=0)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.attribution import program, targets
from attnzoom_jax.attribution.targets import class_scores, start_signal, target_score

RNG = np.random.default_rng(0)
FLAT = RNG.normal(size=(3, 5))  # [n, k]
SPATIAL = RNG.normal(size=(3, 2, 4, 5))  # [n, h, w, k]
IDS = np.array([4, 0, 2])
WEIGHTS = RNG.normal(size=(3, 5))


def softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def test_the_start_signal_of_a_class_is_one_on_its_logit():
    np.testing.assert_array_equal(start_signal(jnp.asarray(FLAT), IDS), np.eye(5)[IDS])


def test_the_start_signal_of_weights_is_the_weights():
    signal = start_signal(jnp.asarray(FLAT), WEIGHTS)
    np.testing.assert_allclose(signal, WEIGHTS, rtol=1e-6)


def test_spatial_logits_share_the_signal_by_the_softmax_of_the_class():
    signal = start_signal(jnp.asarray(SPATIAL), IDS)
    for i, t in enumerate(IDS):
        expected = np.zeros((2, 4, 5))
        expected[..., t] = softmax(SPATIAL[i, ..., t].ravel(), 0).reshape(2, 4)
        np.testing.assert_allclose(signal[i], expected, atol=1e-6)


def test_a_spatial_map_of_one_position_is_a_vector_of_logits():
    one = start_signal(jnp.asarray(FLAT)[:, None, None], IDS)
    np.testing.assert_array_equal(one[:, 0, 0], np.eye(5)[IDS])


@pytest.mark.parametrize("chosen", [IDS, WEIGHTS], ids=["ids", "weights"])
@pytest.mark.parametrize("score", targets.SCORES)
@pytest.mark.parametrize("logits", [FLAT, SPATIAL], ids=["flat", "spatial"])
def test_the_score_is_the_transformed_logits_weighted_by_the_signal(logits, score, chosen):
    values = {
        "logit": logits,
        "probability": softmax(logits, -1),
        "sigmoid": 1 / (1 + np.exp(-logits)),
    }[score]
    weights = np.eye(5)[chosen] if chosen.ndim == 1 else chosen
    if logits.ndim == 2:
        expected = (weights * values).sum(1)
    else:
        shares = softmax(logits.reshape(3, 8, 5), 1).reshape(logits.shape)
        expected = (weights[:, None, None] * shares * values).sum((1, 2, 3))
    result = target_score(jnp.asarray(logits), chosen, score=score)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_no_gradient_flows_through_the_spatial_weights():
    gradient = jax.grad(lambda x: target_score(x, IDS).sum())(jnp.asarray(SPATIAL))
    np.testing.assert_allclose(gradient, start_signal(jnp.asarray(SPATIAL), IDS), atol=1e-6)


def test_class_scores_are_the_scores_of_each_class_by_itself():
    for logits in (jnp.asarray(FLAT), jnp.asarray(SPATIAL)):
        one_by_one = [target_score(logits, np.full(3, k)) for k in range(5)]
        np.testing.assert_allclose(class_scores(logits), np.stack(one_by_one, 1), atol=1e-6)


@pytest.mark.parametrize("logits", [FLAT, SPATIAL], ids=["flat", "spatial"])
def test_a_class_masked_by_minus_infinity_harms_only_itself(logits):
    masked = logits.copy()
    masked[..., 1] = -np.inf
    for score in ("logit", "sigmoid"):
        expected = target_score(jnp.asarray(logits), IDS, score=score)
        result = target_score(jnp.asarray(masked), IDS, score=score)
        np.testing.assert_allclose(result, expected, rtol=1e-6)
    gradient = jax.grad(lambda x: target_score(x, IDS).sum())(jnp.asarray(masked))
    np.testing.assert_array_equal(gradient[..., 1], np.zeros_like(logits[..., 1]))
    assert np.isfinite(gradient).all()


def test_bfloat16_becomes_float32_and_float64_stays():
    low = jnp.asarray(FLAT, jnp.bfloat16)
    assert target_score(low, IDS).dtype == start_signal(low, IDS).dtype == jnp.float32
    with jax.enable_x64(True):
        logits = jnp.asarray(SPATIAL)
        assert target_score(logits, IDS).dtype == start_signal(logits, IDS).dtype == jnp.float64
        np.testing.assert_allclose(start_signal(logits, IDS).sum((1, 2, 3)), 1, atol=1e-14)


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_class_that_is_not_there_is_an_error_if_known_else_nan(bad):
    ids = np.array([0, bad, 2])
    with pytest.raises(ValueError, match=f"target {bad} is out of range for 5 classes"):
        target_score(jnp.asarray(FLAT), ids)
    for logits in (jnp.asarray(FLAT), jnp.asarray(SPATIAL)):
        scores = jax.jit(target_score)(logits, jnp.asarray(ids))
        np.testing.assert_array_equal(np.isnan(scores), [False, True, False])


def test_known_targets_are_checked_inside_jit_too():
    for ids in (np.array([0, 5, 2]), jnp.array([0, 5, 2])):
        with pytest.raises(ValueError, match="target 5 is out of range"):
            jax.jit(lambda x, ids=ids: target_score(x, ids))(jnp.asarray(FLAT))
    scores = jax.jit(lambda x: target_score(x, jnp.asarray(IDS)))(jnp.asarray(FLAT))
    np.testing.assert_allclose(scores, FLAT[np.arange(3), IDS], rtol=1e-6)


def test_an_empty_batch_has_no_scores():
    assert target_score(jnp.zeros((0, 5)), jnp.zeros(0, int)).shape == (0,)


@pytest.mark.parametrize(
    ("logits", "chosen", "message"),
    [
        (FLAT, np.array([0, 1]), r"class ids int \[3\].*\[3, 5\], not int32 \[2\]"),
        (FLAT, np.array([0.0, 1.0, 2.0]), r"not float32 \[3\]"),
        (FLAT, np.eye(5)[:3].astype(int), r"not int32 \[3, 5\]"),
        (FLAT, np.array([True, False, True]), r"not bool \[3\]"),
        (FLAT[0], IDS, r"\[n, k\] or \[n, h, w, k\], not \[5\]"),
        (FLAT.astype(int), IDS, r"one float array of logits \[n, k\], not int32 \[3, 5\]"),
    ],
)
def test_bad_requests_are_one_clear_error(logits, chosen, message):
    with pytest.raises(ValueError, match=message):
        target_score(jnp.asarray(logits), chosen)


def test_logits_that_are_no_array_are_named():
    with pytest.raises(ValueError, match="not dict; wrap it"):
        target_score({"logits": FLAT}, IDS)


def test_an_unknown_score_names_the_near_one():
    with pytest.raises(ValueError, match="did you mean 'probability'"):
        target_score(jnp.asarray(FLAT), IDS, score="probabilities")


def test_targets_can_be_checked_without_computing():
    def fn(images):
        return jnp.zeros((images.shape[0], 5))

    images = jax.ShapeDtypeStruct((3, 10**6, 10**6, 3), jnp.float32)
    targets.check_targets(fn, images, IDS)
    with pytest.raises(ValueError, match="target 5"):
        targets.check_targets(fn, images, np.array([0, 1, 5]))
    with pytest.raises(ValueError, match="not tuple"):
        targets.check_targets(lambda x: (fn(x),), images, IDS)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            r"float \[n, h, w, c\], not uint8 \[2, 4, 4, 3\].*/ 255",
        ),
        (np.zeros((4, 4, 3), np.float32), r"not float32 \[4, 4, 3\]"),
    ],
)
def test_images_that_have_no_gradient_are_one_clear_error(images, message):
    with pytest.raises(ValueError, match=message):
        targets.check_images(images)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("flat", r"'flat' has the shape \[2, 48\]; a map needs \[n, h, w, c\] with n = 2"),
        ("first", r"'first' has the shape \[1, 4, 4, 3\]"),
        ("rounded", "'rounded' is int32; a map needs float values"),
        ("roundes", "did you mean 'rounded'"),
    ],
)
def test_taps_without_a_map_are_one_clear_error(tap, message):
    def fn(x):
        checkpoint_name(x[:1], "first")
        checkpoint_name(x.reshape(2, 48), "flat")
        return checkpoint_name(x.astype(int), "rounded")

    traced = program.trace(fn, jnp.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=message):
        targets.check_spatial(traced, tap, 2)


@pytest.mark.parametrize("value", [0, -3, 2.0, "8", True, None])
def test_counts_are_whole_numbers_of_at_least_one(value):
    with pytest.raises(ValueError, match=f"steps is {value!r}; expected a whole number"):
        targets.check_count("steps", value)


def test_counts_may_come_from_numpy():
    targets.check_count("steps", np.int64(3))

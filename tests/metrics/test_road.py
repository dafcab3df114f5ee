import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.metrics.road import impute, road

RNG = np.random.default_rng(0)
N, H, W, C, K = 3, 6, 5, 2, 3
IMAGES = RNG.normal(size=(N, H, W, C)).astype(np.float32)
MAPS = RNG.normal(size=(N, H, W)).astype(np.float32)
TARGETS = jnp.array([2, 0, 1])
WEIGHTS = RNG.normal(size=(H, W, C, K)).astype(np.float32)
KEY = jax.random.key(1)


def linear(images):
    return jnp.tensordot(images, jnp.asarray(WEIGHTS, images.dtype), 3)


def slow_impute(image, removed):
    """The means as a dense system over all pixels."""
    h, w, c = image.shape
    matrix, right = np.eye(h * w), image.reshape(h * w, c).astype(np.float64)
    for y, x in np.ndindex(h, w):
        if not removed[y, x]:
            continue
        near = {}
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy, dx) != (0, 0) and 0 <= y + dy < h and 0 <= x + dx < w:
                    near[(y + dy) * w + x + dx] = 1 / 6 if 0 in (dy, dx) else 1 / 12
        right[y * w + x] = 0
        for place, weight in near.items():
            matrix[y * w + x, place] -= weight / sum(near.values())
    return np.linalg.solve(matrix, right).reshape(h, w, c)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("size", [(6, 5), (1, 7), (7, 1), (2, 2)], ids=str)
def test_imputation_equals_a_dense_solution(size, share):
    images = RNG.normal(size=(4, *size, C))
    removed = RNG.random((4, *size)) < share
    removed[:, 0, 0] = False
    removed[3] = False  # nothing to fill in
    got = impute(images, removed)
    for i in range(4):
        np.testing.assert_allclose(got[i], slow_impute(images[i], removed[i]), atol=1e-12)
    np.testing.assert_array_equal(got[~removed], images[~removed])


def test_imputation_knows_constants_slopes_and_nothing_of_what_was_removed():
    y, x = np.mgrid[:9, :8].astype(float)
    slope = (2 * y - 3 * x)[None, ..., None]
    removed = np.zeros((1, 9, 8), bool)
    removed[0, 3:5, 2:6] = True  # inside: a plane is its own mean
    hidden = np.where(removed[..., None], np.nan, slope)
    np.testing.assert_allclose(impute(hidden, removed), slope, atol=1e-10)
    only = np.ones((1, 9, 8), bool)
    only[0, 8, 0] = False
    np.testing.assert_allclose(impute(slope, only), np.full((1, 9, 8, 1), 16.0), atol=1e-10)


def by_order(maps, order):
    flat = maps.reshape(len(maps), -1)
    return np.argsort(-flat if order == "morf" else flat, axis=1, kind="stable")


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_road_equals_a_loop_without_noise(order):
    shares = [0.1, 0.5, 0.9]
    with jax.enable_x64(True):
        images = jnp.asarray(IMAGES, jnp.float64)
        got = road(linear, images, MAPS, TARGETS, key=KEY, order=order, shares=shares, noise=0)  # pyright: ignore
    np.testing.assert_allclose(got.shares, np.array([3, 15, 27]) / 30, rtol=1e-6)
    for i in range(N):
        for j, count in enumerate((3, 15, 27)):
            removed = np.zeros(H * W, bool)
            removed[by_order(MAPS, order)[i, :count]] = True
            image = slow_impute(IMAGES[i], removed.reshape(H, W))
            logits = np.tensordot(image, WEIGHTS.astype(np.float64), 3)
            want = np.exp(logits[TARGETS[i]]) / np.exp(logits).sum()
            np.testing.assert_allclose(got.scores[i, j], want, rtol=1e-6)


def test_least_relevant_first_is_most_relevant_first_of_the_negative_map():
    images, maps = jnp.asarray(IMAGES), jnp.asarray(MAPS)
    options = {"key": KEY, "shares": (0.3, 0.6), "score": "logit"}
    one = road(linear, images, maps, TARGETS, order="lerf", **options)
    other = road(linear, images, -maps, TARGETS, order="morf", **options)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert (one.scores != road(linear, images, maps, TARGETS, **options).scores).all()


def test_noise_lies_on_removed_pixels_alone_and_has_its_deviation():
    images = jnp.zeros((2, 40, 40, 3))
    maps = jnp.asarray(RNG.normal(size=(2, 40, 40)), jnp.float32)
    seen = []

    def fn(images):
        seen.append(np.asarray(images))
        return images.sum((1, 2))

    def look(**options):
        seen.clear()
        road(fn, images, maps, jnp.zeros(2, int), noise=0.25, shares=(0.25, 0.5), **options)
        return list(seen)

    first = look(key=KEY)
    for values, count in zip(first, (400, 800), strict=True):
        changed = (values != 0).all(-1)
        assert changed.sum((1, 2)).tolist() == [count, count]
        assert (values[~changed] == 0).all()
        assert values[changed].std() == pytest.approx(0.25, rel=0.1)
        assert abs(values[changed].mean()) < 0.02
    assert not (first[0] == first[1])[(first[0] != 0)].any()  # drawn anew at every share
    for again, old in zip(look(key=KEY), first, strict=True):
        np.testing.assert_array_equal(again, old)
    assert (look(key=jax.random.key(2))[0] != first[0]).any()
    # The noise of an image goes by its id.
    both = (first[0][0] != 0) & (first[0][1] != 0)
    swapped = look(key=KEY, ids=[1, 0])
    np.testing.assert_allclose(swapped[0][0][both], first[0][1][both])
    np.testing.assert_allclose(swapped[0][1][both], first[0][0][both])


def test_what_is_unknown_stays_with_its_image_and_accuracy_is_a_score():
    images = jnp.asarray(IMAGES)
    maps = jnp.asarray(MAPS).at[1, 0, 0].set(jnp.nan)
    curve = road(linear, images, maps, TARGETS, key=KEY, shares=(0.5,))
    assert np.isnan(curve.mean).tolist() == [False, True, False]
    targets = linear(images).argmax(1)
    exact = road(linear, images, maps, targets, key=KEY, shares=(0.01,), score="correct", noise=0)
    assert exact.shares.tolist() == [0] and exact.scores[:, 0].tolist()[::2] == [1, 1]


def test_bad_arguments_are_refused():
    images, maps = jnp.asarray(IMAGES), jnp.asarray(MAPS)
    for shares in ((), (0.5, 0.5), (0.5, 0.2), (0, 0.5), (0.5, 1), (np.nan,)):
        with pytest.raises(ValueError, match="expected rising numbers between 0 and 1"):
            road(linear, images, maps, TARGETS, key=KEY, shares=shares)
    for noise in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="noise is"):
            road(linear, images, maps, TARGETS, key=KEY, noise=noise)
    with pytest.raises(ValueError, match="did you mean 'morf'"):
        road(linear, images, maps, TARGETS, key=KEY, order="more")
    with pytest.raises(ValueError, match="resize the maps to the images"):
        road(linear, images, maps[:, 1:], TARGETS, key=KEY)
    with pytest.raises(ValueError, match="every pixel of image 1 is removed"):
        impute(IMAGES, np.arange(N)[:, None, None] == np.ones((N, H, W)))
    with pytest.raises(ValueError, match="jit the function, not road"):
        jax.jit(lambda images: road(linear, images, maps, TARGETS, key=KEY).scores)(images)

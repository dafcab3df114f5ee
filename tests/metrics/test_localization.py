from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import ndimage

from attnzoom_jax.metrics import localization


def example(n=12, h=6, w=9, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, h, w)).astype(np.float32), rng.random((n, h, w)) < 0.3


def test_energy_inside_equals_a_loop():
    maps, masks = example()
    want = []
    for one, mask in zip(maps, masks, strict=True):
        inside = total = 0.0
        for y, x in np.ndindex(*one.shape):
            total += max(float(one[y, x]), 0.0)
            inside += max(float(one[y, x]), 0.0) if mask[y, x] else 0.0
        want.append(inside / total)
    np.testing.assert_allclose(jax.jit(localization.energy_inside)(maps, masks), want, rtol=1e-5)
    # Numbers above 0 are inside as well.
    numbers = localization.energy_inside(maps, 255 * masks.astype(np.uint8))
    np.testing.assert_allclose(numbers, want, rtol=1e-5)


def test_energy_of_mask_and_complement_is_one_and_scale_is_forgotten():
    maps, masks = example()
    inside = localization.energy_inside(maps, masks)
    outside = localization.energy_inside(maps, ~masks)
    np.testing.assert_allclose(inside + outside, 1, rtol=1e-6)
    np.testing.assert_allclose(localization.energy_inside(37 * maps, masks), inside, rtol=1e-5)


def test_energy_of_a_uniform_map_is_the_masks_share():
    _, masks = example()
    uniform: Any = np.full(masks.shape, 0.25, np.float32)
    share = localization.mask_share(masks)
    np.testing.assert_allclose(share, [mask.sum() / mask.size for mask in masks], rtol=1e-6)
    np.testing.assert_allclose(localization.energy_inside(uniform, masks), share, rtol=1e-6)


def test_energy_without_positive_values_is_zero_and_nan_stays():
    maps = jnp.stack([jnp.zeros((2, 2)), -jnp.ones((2, 2)), jnp.eye(2).at[0, 1].set(jnp.nan)])
    masks = jnp.ones((3, 2, 2), bool).at[2, 0, 1].set(False)
    np.testing.assert_array_equal(localization.energy_inside(maps, masks), [0, 0, np.nan])


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("tolerance", [0, 0.5, 1, 1.5, 2, np.sqrt(2), 3, np.sqrt(13), 5, 100])
def test_pointing_hit_equals_the_distance_transform(tolerance, inclusive):
    rng = np.random.default_rng(1)
    maps: Any = rng.normal(size=(60, 8, 11)).astype(np.float32)
    masks: Any = rng.random((60, 8, 11)) < 0.03
    masks[0] = False
    hit = localization.pointing_hit(maps, masks, tolerance=tolerance, inclusive=inclusive)
    want = []
    for one, mask in zip(maps, masks, strict=True):
        peak = np.unravel_index(one.argmax(), one.shape)
        distances: Any = ndimage.distance_transform_edt(~mask)
        distance = distances[peak] if mask.any() else np.inf
        on_or_near = distance <= tolerance if inclusive else distance < tolerance
        want.append(distance == 0 if tolerance == 0 else on_or_near)
    np.testing.assert_array_equal(hit, want)


@pytest.mark.parametrize(
    ("tolerance", "inclusive", "hit"), [(15, False, False), (15, True, True), (15.01, False, True)]
)
def test_a_distance_of_exactly_the_tolerance(tolerance, inclusive, hit):
    both: Any = np.zeros((2, 1, 20, 20), np.float32)
    maps, masks = both
    maps[0, 0, 0] = 1
    masks[0, 9, 12] = 1  # 9, 12, 15
    hits = jax.jit(localization.pointing_hit, static_argnames=("tolerance", "inclusive"))
    got = hits(maps, masks, tolerance=tolerance, inclusive=inclusive)
    assert got.tolist() == [hit]


def test_ties_take_the_first_peak_and_nan_never_hits():
    maps: Any = np.zeros((3, 2, 2), np.float32)
    maps[2, 0, 0] = np.nan
    masks: Any = np.zeros((3, 2, 2), bool)
    masks[0, 0, 0] = masks[1, 1, 1] = masks[2] = True
    np.testing.assert_array_equal(localization.pointing_hit(maps, masks), [True, False, False])


def test_mass_accuracy_is_the_energy_inside():
    maps, masks = example()
    mass = localization.relevance_mass_accuracy(maps, masks)
    np.testing.assert_array_equal(mass, localization.energy_inside(maps, masks))


def slow_rank_accuracy(one, mask):
    """The expected share of hits when ties are broken at random, in float64."""
    k = int(mask.sum())
    energy = np.maximum(one.astype(np.float64), 0).ravel()
    hits = []
    for seed in range(4000):
        order = np.lexsort((np.random.default_rng(seed).random(energy.size), -energy))
        hits.append(mask.ravel()[order[:k]].sum() / k)
    return np.mean(hits)


def test_rank_accuracy_equals_a_sort():
    maps, masks = example()
    maps = np.abs(maps)  # nothing ties
    got = jax.jit(localization.relevance_rank_accuracy)(maps, masks)
    want = []
    for one, mask in zip(maps, masks, strict=True):
        top = np.argsort(-one, axis=None)[: mask.sum()]
        want.append(mask.ravel()[top].mean())
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_rank_accuracy_of_ties_is_what_chance_gives():
    rng = np.random.default_rng(2)
    maps: Any = rng.integers(-2, 3, (3, 4, 5)).astype(np.float32)
    masks: Any = rng.random((3, 4, 5)) < 0.4
    want = [slow_rank_accuracy(one, mask) for one, mask in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(localization.relevance_rank_accuracy(maps, masks), want, atol=0.01)


def test_rank_accuracy_by_hand():
    maps: Any = np.zeros((6, 2, 3), np.float32)
    masks: Any = np.zeros((6, 2, 3), bool)
    maps[0], masks[0, 0, :2] = [[5, 1, 0], [3, 0, 0]], True  # of 5 and 3 one lies inside
    maps[1], masks[1, 0, 0] = [[2, 2, 2], [2, 0, 0]], True  # one of four that tie
    masks[2, 0] = True  # an empty map: the mask's share
    maps[3] = 1.0  # an empty mask
    maps[4, 0, 0], masks[4, 1, 1] = np.nan, True
    maps[5], masks[5] = [[-1, 0, 3], [0, 2, -9]], True  # the whole image
    got = localization.relevance_rank_accuracy(maps, masks)
    np.testing.assert_array_equal(got, [0.5, 0.25, 0.5, 0, np.nan, 1])


def test_images_of_different_sizes_score_as_they_do_alone():
    sizes = np.array([[6, 9], [2, 9], [6, 1], [3, 4]])
    maps, masks = example(n=4)
    maps[3] = -1.0  # empty
    alone = []
    for i, (h, w) in enumerate(sizes):
        one, mask = maps[i : i + 1, :h, :w], masks[i : i + 1, :h, :w]
        alone.append(
            [
                localization.energy_inside(one, mask)[0],
                localization.relevance_rank_accuracy(one, mask)[0],
                localization.mask_share(mask)[0],
            ]
        )
        maps[i, h:], maps[i, :, w:], masks[i, h:], masks[i, :, w:] = 0, 0, 0, 0
    together = [
        localization.energy_inside(maps, masks),
        jax.jit(localization.relevance_rank_accuracy)(maps, masks, sizes=sizes),
        jax.jit(localization.mask_share)(masks, sizes=sizes),
    ]
    np.testing.assert_allclose(np.transpose(together), alone, rtol=1e-6)


def test_four_devices_score_what_one_scores():
    maps, masks = example(n=8)
    sizes = np.array([[6, 9], [2, 9], [6, 1], [3, 4]] * 2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    parted = jax.device_put((maps, masks, sizes), NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def scores(maps, masks, sizes) -> Any:
        rank = localization.relevance_rank_accuracy(maps, masks, sizes=sizes)
        return localization.energy_inside(maps, masks), rank

    for one, four in zip(scores(maps, masks, sizes), scores(*parted), strict=True):
        np.testing.assert_array_equal(one, four)


def test_bad_arguments_are_refused():
    maps, masks = example()
    for metric in (
        localization.energy_inside,
        localization.relevance_rank_accuracy,
        localization.pointing_hit,
    ):
        with pytest.raises(ValueError, match="resize the maps to the masks"):
            metric(maps[:, :3], masks)
    for tolerance in (-1, np.inf, np.nan):
        with pytest.raises(ValueError, match="tolerance is"):
            localization.pointing_hit(maps, masks, tolerance=tolerance)

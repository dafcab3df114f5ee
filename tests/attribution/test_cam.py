import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax import attribution

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(4, 6, 5, 3)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(3, 7)), jnp.float32)
TARGETS = jnp.array([0, 6, 2, 2])


def gap_network(images):
    """Features, global average pooling, linear head: Grad-CAM is CAM here."""
    features = checkpoint_name(jax.nn.relu(images), "features")
    return features.mean((1, 2)) @ HEAD


def cam(images, targets):
    """The analytic CAM of a GAP head: sum_k w_kc A_k / (h w)."""
    features, head = np.maximum(np.asarray(images, np.float64), 0), np.asarray(HEAD, np.float64)
    h, w = features.shape[1:3]
    return np.stack([f @ head[:, t] / (h * w) for f, t in zip(features, targets, strict=True)])


def test_grad_cam_is_the_analytic_cam_of_a_gap_head():
    maps = attribution.grad_cam(gap_network, IMAGES, TARGETS, tap="features")
    assert maps.dtype == jnp.float32
    np.testing.assert_allclose(maps, cam(IMAGES, TARGETS), atol=1e-6)


def test_float_targets_weight_the_logits():
    weights = jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)
    maps = attribution.grad_cam(gap_network, IMAGES, weights, tap="features")
    expected = sum(
        np.asarray(weights)[:, k, None, None] * cam(IMAGES, np.full(4, k)) for k in range(7)
    )
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def test_jit_vmap_over_classes_and_sharded_images_give_the_same_maps():
    expected = cam(IMAGES, TARGETS)
    jitted = jax.jit(lambda x, t: attribution.grad_cam(gap_network, x, t, tap="features"))
    np.testing.assert_allclose(jitted(IMAGES, TARGETS), expected, atol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(
        IMAGES, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    np.testing.assert_allclose(jitted(sharded, TARGETS), expected, atol=1e-6)
    classes = jnp.arange(7)
    maps = jax.vmap(lambda k: jitted(IMAGES, jnp.full(4, k)))(classes)
    np.testing.assert_allclose(maps[6], cam(IMAGES, np.full(4, 6)), atol=1e-6)


def test_a_map_inside_a_loss_is_differentiable():
    def loss(images):
        maps = attribution.grad_cam(gap_network, images, TARGETS, tap="features")
        return (maps**2).sum()

    # The map is linear in the positive pixels here, so the gradient is known.
    expected = np.stack(
        [
            2 * m[..., None] * np.asarray(HEAD)[:, t] / 30
            for m, t in zip(cam(IMAGES, TARGETS), TARGETS, strict=True)
        ]
    ) * (np.asarray(IMAGES) > 0)
    np.testing.assert_allclose(jax.grad(loss)(IMAGES), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "targets", "tap", "message"),
    [
        (gap_network, TARGETS, "feature", "did you mean 'features'"),
        (gap_network, jnp.array([0, 1, 2, 7]), "features", "7 is out of range for 7 classes"),
        (gap_network, jnp.array([-1, 1, 2, 3]), "features", "-1 is out of range"),
        (gap_network, jnp.array([0, 1]), "features", r"class ids int \[4\]"),
        (lambda x: {"logits": gap_network(x)}, TARGETS, "features", "not dict"),
        (lambda x: gap_network(x).argmax(1), TARGETS, "features", "not int32"),
        (lambda x: gap_network(x)[0], TARGETS, "features", r"\[n, k\], not \[7\]"),
        (lambda x: checkpoint_name(gap_network(x), "root"), TARGETS, "root", r"\[4, 7\]; a map"),
    ],
)
def test_bad_input_is_one_clear_error(fn, targets, tap, message):
    with pytest.raises(ValueError, match=message):
        attribution.grad_cam(fn, IMAGES, targets, tap=tap)


def test_several_taps_in_one_pass():
    def fn(images):
        return gap_network(checkpoint_name(2 * images, "doubled"))

    maps = attribution.grad_cam(fn, IMAGES, TARGETS, tap=["doubled", "features"])
    assert list(maps) == ["doubled", "features"]
    for tap, several in maps.items():
        alone = attribution.grad_cam(fn, IMAGES, TARGETS, tap=tap)
        np.testing.assert_allclose(several, alone, atol=1e-6)


@pytest.mark.parametrize("target", [-1, 7])
def test_under_jit_a_class_that_is_not_there_gives_a_map_of_nan(target):
    jitted = jax.jit(lambda t: attribution.grad_cam(gap_network, IMAGES, t, tap="features"))
    maps = jitted(jnp.array([0, target, 2, 2]))
    assert np.isnan(maps[1]).all()
    np.testing.assert_allclose(np.asarray(maps)[[0, 2]], cam(IMAGES, TARGETS)[[0, 2]], atol=1e-6)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnzoom_jax import attribution

RNG = np.random.default_rng(0)
N, H, W, C, M, K = 4, 6, 5, 3, 4, 7
IMAGES = RNG.normal(size=(N, H, W, C))
TARGETS = np.array([0, 6, 2, 2])
WEIGHTS = RNG.normal(size=(N, K))
W0, B0 = RNG.normal(size=(C, C)), RNG.normal(size=C)
W1, B1 = RNG.normal(size=(C, M)), RNG.normal(size=M)
W2, B2 = RNG.normal(size=(M, K)), RNG.normal(size=K)
PLACE = RNG.uniform(0.2, 1.0, size=(H, W, M))  # so that the gradient differs between positions

METHODS = {
    "grad_cam": attribution.grad_cam,
    "grad_cam_plus_plus": attribution.grad_cam_plus_plus,
    "hires_cam": attribution.hires_cam,
    "layer_cam": attribution.layer_cam,
    "xgrad_cam": attribution.xgrad_cam,
    "finer_cam": attribution.finer_cam,
}
each_method = pytest.mark.parametrize("method", METHODS)


def network(images, *, is_spatial=False):
    """Two ReLU layers, each marked; then a pooling weighted by place, or a map of logits."""
    dtype = images.dtype
    w0, b0, w1, b1, w2, b2, place = (jnp.asarray(x, dtype) for x in (W0, B0, W1, B1, W2, B2, PLACE))
    a = checkpoint_name(jax.nn.relu(images @ w0 + b0), "first")
    b = checkpoint_name(jax.nn.relu(a @ w1 + b1), "second")
    if is_spatial:
        return b @ w2 + b2
    return (place * b).mean((1, 2)) @ w2 + b2


spatial_network = functools.partial(network, is_spatial=True)


def softmax(x, axis=None):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def passes(images, weights, *, is_spatial=False):
    """By hand: {tap: (activations, gradients)} of the weighted logits, and the class scores."""
    a = np.maximum(images @ W0 + B0, 0)
    before = a @ W1 + B1
    b = np.maximum(before, 0)
    if is_spatial:
        logits = b @ W2 + B2
        shares = softmax(logits.reshape(N, H * W, K), 1).reshape(logits.shape)
        scores = (shares * logits).sum((1, 2))
        g_b = (shares * weights[:, None, None, :]) @ W2.T
    else:
        scores = (PLACE * b).mean((1, 2)) @ W2 + B2
        g_b = PLACE * (weights @ W2.T)[:, None, None, :] / (H * W)
    return {"first": (a, (g_b * (before > 0)) @ W1.T), "second": (b, g_b)}, scores


def slow_map(method, activations, gradients):
    """The formulas, one image and one channel at a time."""
    maps = np.zeros(activations.shape[:3])
    for i in range(len(activations)):
        for k in range(activations.shape[-1]):
            A, g = activations[i, ..., k], gradients[i, ..., k]
            if method in ("grad_cam", "finer_cam"):
                maps[i] += g.mean() * A
            elif method == "hires_cam":
                maps[i] += g * A
            elif method == "layer_cam":
                maps[i] += np.maximum(g, 0) * A
            elif method == "xgrad_cam":
                maps[i] += ((g * A).sum() / A.sum() if A.sum() else 0) * A
            else:
                denominator = 2 * g**2 + A.sum() * g**3
                alpha = np.zeros_like(g)
                np.divide(g**2, denominator, out=alpha, where=denominator != 0)
                maps[i] += (np.maximum(g, 0) * alpha).sum() * A
    return maps


def finer_weights(scores, targets, *, alpha=1.0, similar=None):
    """Weights of the logits: the target, less the look-alikes in proportion to their softmax."""
    weights = np.zeros_like(scores)
    for i, t in enumerate(targets):
        nearest = np.argsort(np.abs(scores[i] - scores[i, t]))
        chosen = [k for k in nearest if k != t][:3] if similar is None else similar[i]
        weights[i, t] = 1
        for k, share in zip(chosen, softmax(scores[i, chosen]), strict=True):
            weights[i, k] -= alpha * share
    return weights


def expected_maps(method, tap, targets, *, is_spatial=False, **options):
    weights = np.eye(K)[targets] if targets.ndim == 1 else targets
    values, scores = passes(IMAGES, weights, is_spatial=is_spatial)
    if method == "finer_cam":
        weights = finer_weights(scores, targets, **options)
        values, _ = passes(IMAGES, weights, is_spatial=is_spatial)
    return slow_map(method, *values[tap])


def in_float32(images=IMAGES):
    return jnp.asarray(images, jnp.float32)


@each_method
@pytest.mark.parametrize("is_spatial", [False, True], ids=["flat", "spatial"])
def test_maps_follow_the_formulas(method, is_spatial):
    with jax.enable_x64(True):
        fn = functools.partial(network, is_spatial=is_spatial)
        maps = METHODS[method](fn, jnp.asarray(IMAGES), TARGETS, tap=["first", "second"])
        for tap in ("first", "second"):
            assert maps[tap].dtype == jnp.float64
            expected = expected_maps(method, tap, TARGETS, is_spatial=is_spatial)
            np.testing.assert_allclose(maps[tap], expected, rtol=1e-12, atol=1e-12)


@each_method
def test_float32_is_enough(method):
    maps = METHODS[method](network, in_float32(), TARGETS, tap="first")
    assert maps.dtype == jnp.float32
    expected = expected_maps(method, "first", TARGETS)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5)


@each_method
def test_bfloat16_networks_give_float32_maps(method):
    maps = METHODS[method](network, jnp.asarray(IMAGES, jnp.bfloat16), TARGETS, tap="second")
    assert maps.dtype == jnp.float32
    expected = expected_maps(method, "second", TARGETS)
    np.testing.assert_allclose(maps, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "finer_cam"])
def test_float_targets_weight_the_logits(method):
    maps = METHODS[method](network, in_float32(), WEIGHTS, tap="first")
    expected = expected_maps(method, "first", WEIGHTS)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5)


@each_method
def test_jit_chunks_and_sharded_images_give_the_same_maps(method):
    expected = METHODS[method](network, in_float32(), TARGETS, tap="first")
    for chunk_size in (None, 3):
        jitted = jax.jit(
            lambda x, t, size=chunk_size: METHODS[method](
                network, x, t, tap="first", chunk_size=size
            )
        )
        np.testing.assert_allclose(jitted(in_float32(), TARGETS), expected, atol=1e-6)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.device_put(in_float32(), NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(jitted(sharded, TARGETS), expected, atol=1e-6)


@each_method
def test_chunks_outside_of_jit_and_several_taps_in_one_pass(method):
    maps = METHODS[method](network, in_float32(), TARGETS, tap=["second", "first"], chunk_size=3)
    assert list(maps) == ["second", "first"]
    for tap, several in maps.items():
        alone = METHODS[method](network, in_float32(), TARGETS, tap=tap)
        np.testing.assert_allclose(several, alone, atol=1e-6)


@each_method
def test_vmap_over_classes_and_over_images(method):
    images = in_float32()

    def of_class(k):
        return METHODS[method](network, images, jnp.full(N, k), tap="first")

    maps = jax.jit(jax.vmap(of_class))(jnp.arange(K))
    np.testing.assert_allclose(maps[6], jax.jit(of_class)(6), atol=1e-6)

    def of_image(image, target):
        return METHODS[method](network, image[None], target[None], tap="first")[0]

    maps = jax.jit(jax.vmap(of_image))(images, TARGETS)
    expected = METHODS[method](network, images, TARGETS, tap="first")
    np.testing.assert_allclose(maps, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "chunk_size"), [("grad_cam", 3), *((method, None) for method in METHODS)]
)
def test_the_gradient_of_a_loss_on_the_map_is_that_of_finite_differences(method, chunk_size):
    weights = np.eye(K)[TARGETS]
    if method == "finer_cam":  # the look-alikes are held constant
        weights = finer_weights(passes(IMAGES, weights)[1], TARGETS)

    def slow_loss(images):
        return (slow_map(method, *passes(images, weights)[0]["first"]) ** 2).sum()

    direction = np.random.default_rng(1).normal(size=IMAGES.shape)
    step = 1e-6 * direction
    slope = (slow_loss(IMAGES + step) - slow_loss(IMAGES - step)) / 2e-6
    with jax.enable_x64(True):

        def loss(images):
            maps = METHODS[method](network, images, TARGETS, tap="first", chunk_size=chunk_size)
            return (maps**2).sum()

        gradient = jax.grad(loss)(jnp.asarray(IMAGES))
    np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "xgrad_cam"])
def test_a_gap_network_has_one_map_its_cam(method):
    head = jnp.asarray(RNG.normal(size=(C, K)), jnp.float32)

    def gap_network(images):
        return checkpoint_name(jax.nn.relu(images), "features").mean((1, 2)) @ head

    maps = METHODS[method](gap_network, in_float32(), TARGETS, tap="features")
    features = np.maximum(IMAGES, 0)
    cam = [f @ np.asarray(head)[:, t] / (H * W) for f, t in zip(features, TARGETS, strict=True)]
    np.testing.assert_allclose(maps, np.stack(cam), atol=1e-6)


def test_a_hires_cam_sums_to_the_score_less_its_bias_where_the_rest_is_linear():
    maps = attribution.hires_cam(network, in_float32(), TARGETS, tap="second")
    scores = passes(IMAGES, np.eye(K)[TARGETS])[1][np.arange(N), TARGETS]
    np.testing.assert_allclose(maps.sum((1, 2)), scores - B2[TARGETS], atol=1e-5)


def test_an_xgrad_cam_sums_to_the_hires_cam():
    sums = [
        METHODS[method](network, in_float32(), TARGETS, tap="first").sum((1, 2))
        for method in ("xgrad_cam", "hires_cam")
    ]
    np.testing.assert_allclose(*sums, rtol=1e-5, atol=1e-5)


def test_layer_cams_of_a_class_and_of_its_negative_make_up_the_hires_cam():
    one_hot = np.eye(K)[TARGETS]
    plus, minus = (
        attribution.layer_cam(network, in_float32(), sign * one_hot, tap="first")
        for sign in (1.0, -1.0)
    )
    hires = attribution.hires_cam(network, in_float32(), TARGETS, tap="first")
    np.testing.assert_allclose(plus - minus, hires, atol=1e-5)


def test_the_tap_input_is_the_images():
    maps = attribution.hires_cam(network, in_float32(), TARGETS, tap=["input", "first"])
    gradient = jax.grad(lambda x: network(x)[jnp.arange(N), TARGETS].sum())(in_float32())
    np.testing.assert_allclose(maps["input"], (gradient * in_float32()).sum(-1), atol=1e-5)


@each_method
def test_silence_gives_zeros_and_no_nan_also_in_the_gradient(method):
    """No activation, no gradient: every quotient is 0 / 0."""

    def silent(scale):
        def fn(images):
            return checkpoint_name(images * scale, "dead").mean((1, 2)) @ jnp.zeros((C, K))

        return METHODS[method](fn, jnp.zeros((N, H, W, C)), TARGETS, tap="dead")

    np.testing.assert_array_equal(silent(1.0), np.zeros((N, H, W)))
    assert jax.grad(lambda scale: silent(scale).sum())(1.0) == 0


@pytest.mark.parametrize("method", ["xgrad_cam", "grad_cam_plus_plus"])
def test_silence_does_not_hide_that_a_class_is_not_there(method):
    jitted = jax.jit(lambda t: METHODS[method](network, jnp.zeros((N, H, W, C)), t, tap="input"))
    np.testing.assert_array_equal(
        np.isnan(jitted(np.array([0, 7, 2, 2]))).all((1, 2)), [0, 1, 0, 0]
    )


def test_small_gradients_do_not_underflow_in_grad_cam_plus_plus():
    tiny = 1e-25  # its square is zero in float32

    def fn(images):
        return tiny * network(images)

    maps = attribution.grad_cam_plus_plus(fn, in_float32(), TARGETS, tap="second")
    activations, gradients = passes(IMAGES, np.eye(K)[TARGETS])[0]["second"]
    expected = slow_map("grad_cam_plus_plus", activations, tiny * gradients)
    assert np.abs(expected).max() > 1e-30
    np.testing.assert_allclose(maps / tiny, expected / tiny, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_spatial", [False, True], ids=["flat", "spatial"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_finer_cam_of_given_classes_and_strength(chunk_size, is_spatial):
    similar = np.array([[1, 2], [0, 3], [6, 1], [3, 4]])
    fn = functools.partial(network, is_spatial=is_spatial)
    maps = attribution.finer_cam(
        fn, in_float32(), TARGETS, tap="first", similar=similar, alpha=0.6, chunk_size=chunk_size
    )
    expected = expected_maps(
        "finer_cam", "first", TARGETS, is_spatial=is_spatial, similar=similar, alpha=0.6
    )
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def test_finer_cam_without_comparison_is_grad_cam():
    finer = attribution.finer_cam(network, in_float32(), TARGETS, tap="first", alpha=0.0)
    plain = attribution.grad_cam(network, in_float32(), TARGETS, tap="first")
    np.testing.assert_allclose(finer, plain, atol=1e-6)


def test_finer_cam_of_two_classes_explains_their_difference():
    def fn(images):
        return network(images)[:, :2]

    targets = np.array([0, 1, 1, 0])
    maps = attribution.finer_cam(fn, in_float32(), targets, tap="first")
    difference = np.where(np.arange(2) == targets[:, None], 1.0, -1.0)
    expected = attribution.grad_cam(fn, in_float32(), difference, tap="first")
    np.testing.assert_allclose(maps, expected, atol=1e-6)


def test_finer_cam_leaves_out_classes_masked_by_minus_infinity():
    keep = np.array([0, 2, 6])  # fewer than the three that are wanted beside the target

    def masked(images):
        allowed = np.isin(np.arange(K), keep)
        return jnp.where(allowed, network(images), -jnp.inf)

    def few(images):
        return network(images)[:, keep]

    maps = attribution.finer_cam(masked, in_float32(), TARGETS, tap="first")
    expected = attribution.finer_cam(few, in_float32(), np.searchsorted(keep, TARGETS), tap="first")
    np.testing.assert_allclose(maps, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similar": np.array([1, 2, 3, 4])}, r"similar must be class ids int \[4, m\]"),
        ({"similar": np.zeros((4, 0), int)}, "with m at least 1"),
        ({"similar": np.zeros((3, 2), int)}, r"not int32 \[3, 2\]"),
        ({"similar": np.zeros((4, 2))}, r"not float32 \[4, 2\]"),
        ({"similar": np.full((4, 2), 7)}, "7 is out of range for 7 classes"),
        ({"similar": np.full((4, 2), 7), "chunk_size": 2}, "7 is out of range for 7 classes"),
    ],
)
def test_bad_look_alikes_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        attribution.finer_cam(network, in_float32(), TARGETS, tap="first", **options)


def test_finer_cam_needs_classes_to_compare():
    with pytest.raises(ValueError, match="Finer-CAM compares one class with others"):
        attribution.finer_cam(network, in_float32(), WEIGHTS, tap="first")
    with pytest.raises(ValueError, match="the function returns 1"):
        attribution.finer_cam(
            lambda x: network(x)[:, :1], in_float32(), np.zeros(N, int), tap="first"
        )


@pytest.mark.parametrize("method", ["grad_cam", "finer_cam"])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(
    ("fn", "targets", "tap", "message"),
    [
        (network, TARGETS, "firs", "did you mean 'first'"),
        (network, np.array([0, 1, 2, 7]), "first", "7 is out of range for 7 classes"),
        (network, np.array([-1, 1, 2, 3]), "first", "-1 is out of range"),
        (network, np.array([0, 1]), "first", r"class ids int \[4\]"),
        (lambda x: {"logits": network(x)}, TARGETS, "first", "not dict"),
        (lambda x: network(x).argmax(1), TARGETS, "first", "not int32"),
        (lambda x: network(x)[0], TARGETS, "first", r"or \[n, h, w, k\], not \[7\]"),
        (lambda x: checkpoint_name(network(x), "root"), TARGETS, "root", r", 7\]; a map needs"),
    ],
)
def test_bad_input_is_one_clear_error(fn, targets, tap, message, chunk_size, method):
    with pytest.raises(ValueError, match=message):
        METHODS[method](fn, in_float32(), targets, tap=tap, chunk_size=chunk_size)


def test_a_bad_chunk_size_is_one_clear_error():
    with pytest.raises(ValueError, match="chunk_size is 0; expected a whole number"):
        attribution.grad_cam(network, in_float32(), TARGETS, tap="first", chunk_size=0)


@each_method
@pytest.mark.parametrize("target", [-1, 7])
def test_under_jit_a_class_that_is_not_there_gives_a_map_of_nan(target, method):
    jitted = jax.jit(lambda t: METHODS[method](network, in_float32(), t, tap="first"))
    maps = jitted(np.array([0, target, 2, 2]))
    assert np.isnan(maps[1]).all()
    expected = expected_maps(method, "first", TARGETS)
    np.testing.assert_allclose(maps[2:], expected[2:], rtol=1e-4, atol=1e-5)

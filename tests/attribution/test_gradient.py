import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnzoom_jax import attribution

RNG = np.random.default_rng(0)
N, H, W, C, M, K = 5, 4, 6, 3, 4, 7
IMAGES = RNG.normal(size=(N, H, W, C))
TARGETS = np.array([0, 6, 2, 2, 5])
WEIGHTS = RNG.normal(size=(N, K))
W1, B1 = RNG.normal(size=(C, M)), RNG.normal(size=M)
W2, B2 = RNG.normal(size=(M, K)), RNG.normal(size=K)
PLACE = RNG.uniform(0.2, 1.0, size=(H, W, M))
BASELINE = RNG.normal(size=(H, W, C))
KEY = jax.random.key(3)

METHODS = {
    "gradient": attribution.gradient,
    "input_x_gradient": attribution.input_x_gradient,
    "smooth_grad": lambda *args, **options: attribution.smooth_grad(
        *args, key=KEY, samples=3, **options
    ),
    "integrated_gradients": lambda *args, **options: attribution.integrated_gradients(
        *args, baseline=BASELINE, **options
    ),
}
DEFAULTS = {
    "gradient": "max_abs",
    "smooth_grad": "max_abs",
    "input_x_gradient": "sum",
    "integrated_gradients": "sum",
}
each_method = pytest.mark.parametrize("method", METHODS)


def network(images):
    """A smooth two-layer network: tanh units, the square of their mean weighted by place."""
    dtype = images.dtype
    w1, b1, w2, b2, place = (jnp.asarray(x, dtype) for x in (W1, B1, W2, B2, PLACE))
    hidden = checkpoint_name(jnp.tanh(images @ w1 + b1), "hidden")
    return (place * hidden).mean((1, 2)) ** 2 @ w2 + b2


def slow_scores(images, weights):
    pooled = (PLACE * np.tanh(images @ W1 + B1)).mean((1, 2))
    return ((pooled**2 @ W2 + B2) * weights).sum(1)


def slow_hidden_gradient(hidden, weights):
    pooled = (PLACE * hidden).mean((1, 2))
    return PLACE * (2 * pooled * (weights @ W2.T))[:, None, None, :] / (H * W)


def slow_gradient(images, weights):
    """dy/dx by hand."""
    hidden = np.tanh(images @ W1 + B1)
    return (slow_hidden_gradient(hidden, weights) * (1 - hidden**2)) @ W1.T


def slow_values(method, images, weights):
    """The formulas, [n, h, w, c]; the integral by the midpoints of 2000 intervals."""
    if method == "gradient":
        return slow_gradient(images, weights)
    if method == "input_x_gradient":
        return images * slow_gradient(images, weights)
    if method == "integrated_gradients":
        points = (np.arange(2000) + 0.5) / 2000
        line = images - BASELINE
        return line * np.mean([slow_gradient(BASELINE + t * line, weights) for t in points], 0)
    total = np.zeros(images.shape)
    for i, image in enumerate(images):
        for sample in range(3):
            key = jax.random.fold_in(jax.random.fold_in(KEY, i), sample)
            drawn = np.asarray(jax.random.normal(key, image.shape, jnp.result_type(float)))
            noisy = image + 0.15 * (image.max() - image.min()) * drawn
            total[i] += slow_gradient(noisy[None], weights[i : i + 1])[0]
    return total / 3


def slow_maps(method, targets, *, reduce=None, images=IMAGES):
    weights = np.eye(K)[targets] if targets.ndim == 1 else targets
    values = slow_values(method, images, weights)
    reduce = reduce or DEFAULTS[method]
    return np.abs(values).max(-1) if reduce == "max_abs" else values.sum(-1)


def in_float32(images=IMAGES):
    return jnp.asarray(images, jnp.float32)


@each_method
@pytest.mark.parametrize("targets", [TARGETS, WEIGHTS], ids=["ids", "weights"])
def test_maps_follow_the_formulas(method, targets):
    with jax.enable_x64(True):
        maps = METHODS[method](network, jnp.asarray(IMAGES), targets)
        assert maps.dtype == jnp.float64
        tolerance = 1e-7 if method == "integrated_gradients" else 1e-13  # of the midpoints
        np.testing.assert_allclose(maps, slow_maps(method, targets), atol=tolerance)


@each_method
@pytest.mark.parametrize("reduce", ["sum", "max_abs"])
def test_float32_is_enough(method, reduce):
    maps = METHODS[method](network, in_float32(), TARGETS, reduce=reduce)
    assert maps.dtype == jnp.float32
    np.testing.assert_allclose(maps, slow_maps(method, TARGETS, reduce=reduce), atol=1e-5)


@each_method
def test_bfloat16_networks_give_float32_maps(method):
    maps = METHODS[method](network, jnp.asarray(IMAGES, jnp.bfloat16), TARGETS)
    assert maps.dtype == jnp.float32
    expected = METHODS[method](network, in_float32(), TARGETS)
    if method == "smooth_grad":  # its noise is drawn in float32 for both
        expected = slow_maps(method, TARGETS)
    np.testing.assert_allclose(maps, expected, atol=0.15 * np.abs(expected).max())


@each_method
def test_spatial_logits_weighted_by_their_softmax_without_its_gradient(method):
    def spatial(images):
        hidden = jnp.tanh(images @ W1.astype(images.dtype) + B1.astype(images.dtype))
        return hidden @ W2.astype(images.dtype)

    def flat(images):  # the same weights, of the image as it is, as constants
        logits = spatial(images)
        shares = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=(1, 2))
        return (shares * logits).sum((1, 2))

    maps, expected = (METHODS[method](fn, in_float32(), TARGETS) for fn in (spatial, flat))
    np.testing.assert_allclose(maps, expected, atol=1e-5)


@each_method
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_jit_chunks_and_sharded_images_give_the_same_maps(method, chunk_size):
    images, targets = jnp.tile(in_float32(), (4, 1, 1, 1)), np.tile(TARGETS, 4)
    expected = METHODS[method](network, images, targets)
    jitted = jax.jit(lambda x, t: METHODS[method](network, x, t, chunk_size=chunk_size))
    np.testing.assert_allclose(jitted(images, targets), expected, atol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(jitted(sharded, targets), expected, atol=1e-6)


@each_method
def test_chunks_outside_of_jit(method):
    expected = METHODS[method](network, in_float32(), TARGETS)
    chunked = METHODS[method](network, in_float32(), TARGETS, chunk_size=2)
    np.testing.assert_allclose(chunked, expected, atol=1e-6)


@each_method
def test_vmap_over_classes_and_over_images(method):
    def of_class(k):
        return METHODS[method](network, in_float32(), jnp.full(N, k))

    maps = jax.jit(jax.vmap(of_class))(jnp.arange(K))
    np.testing.assert_allclose(maps[6], jax.jit(of_class)(6), atol=1e-6)

    @jax.jit
    def of_image(image, target):
        return METHODS[method](network, image[None], target[None])[0]

    maps = jax.vmap(of_image)(in_float32(), TARGETS)
    np.testing.assert_allclose(maps[4], of_image(in_float32()[4], TARGETS[4]), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "chunk_size"), [("smooth_grad", 2), *((method, None) for method in METHODS)]
)
def test_the_gradient_of_a_loss_on_the_map_is_that_of_finite_differences(method, chunk_size):
    direction = np.random.default_rng(1).normal(size=IMAGES.shape)
    with jax.enable_x64(True):

        def slow_loss(images):
            return (slow_maps(method, TARGETS, images=images) ** 2).sum()

        def loss(images):
            return (METHODS[method](network, images, TARGETS, chunk_size=chunk_size) ** 2).sum()

        step = 1e-6 * direction
        slope = (slow_loss(IMAGES + step) - slow_loss(IMAGES - step)) / 2e-6
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(IMAGES)))
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("baseline", [0.0, 0.7, "channels", "image", "batch"])
def test_integrated_gradients_are_complete(baseline):
    rng = np.random.default_rng(1)
    shapes = {"channels": (C,), "image": (H, W, C), "batch": (N, H, W, C)}
    if isinstance(baseline, str):
        baseline = rng.normal(size=shapes[baseline])
    one_hot = np.eye(K)[TARGETS]
    start = np.broadcast_to(baseline, IMAGES.shape)
    difference = slow_scores(IMAGES, one_hot) - slow_scores(start, one_hot)
    with jax.enable_x64(True):
        maps = attribution.integrated_gradients(
            network, jnp.asarray(IMAGES), TARGETS, steps=64, baseline=baseline, chunk_size=2
        )
        np.testing.assert_allclose(maps.sum((1, 2)), difference, rtol=0, atol=1e-10)


def test_a_quadrature_of_n_points_is_exact_for_polynomials_of_degree_2n_minus_1():
    def cubed(images):  # its gradient has the degree 2, so that two points are enough, not one
        return (images**3).sum((1, 2))

    images = jnp.ones((1, H, W, 2))
    for steps, expected in ((1, 2 * 0.75), (2, 2 * 1.0)):
        maps = attribution.integrated_gradients(
            cubed, images, np.ones((1, 2), np.float32), steps=steps
        )
        np.testing.assert_allclose(maps, np.full((1, H, W), expected), rtol=1e-6)


def test_integrated_gradients_of_a_linear_function_are_input_x_gradient():
    head = jnp.asarray(RNG.normal(size=(H, W, C, K)), jnp.float32)

    def linear(images):
        return jnp.einsum("nhwc,hwck->nk", images, head)

    maps = attribution.integrated_gradients(linear, in_float32(), TARGETS, steps=1)
    expected = attribution.input_x_gradient(linear, in_float32(), TARGETS)
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def quadratic(images):
    """Logits whose gradient is the image: the mean over noise is the image plus mean noise."""
    return jnp.repeat((images**2).sum((1, 2, 3))[:, None] / 2, K, axis=1)


def test_the_noise_is_a_share_of_each_images_range():
    spread = np.array([1.0, 10.0, 0.0, 3.0, 100.0])  # an image without contrast gets no noise
    images = jnp.asarray(spread[:, None, None, None] * RNG.uniform(size=(N, 40, 40, 1)) + 7)
    extent = images.max((1, 2, 3)) - images.min((1, 2, 3))
    maps = attribution.smooth_grad(
        quadratic, images, TARGETS, key=KEY, samples=4, noise=0.3, reduce="sum"
    )
    deviation = np.std(maps - images[..., 0], axis=(1, 2))
    np.testing.assert_allclose(deviation, 0.3 * extent / np.sqrt(4), rtol=0.1)
    assert deviation[2] == 0


def test_images_and_samples_have_noise_of_their_own_and_keys_decide():
    images = jnp.tile(in_float32()[:1], (3, 1, 1, 1))
    targets = np.zeros(3, int)

    def maps(key, samples=1):
        return np.asarray(
            attribution.smooth_grad(quadratic, images, targets, key=key, samples=samples)
        )

    one = maps(KEY)
    assert np.abs(one[0] - one[1]).min() > 0 and np.abs(one[1] - one[2]).min() > 0
    np.testing.assert_array_equal(one, maps(KEY))
    np.testing.assert_array_equal(one, maps(jax.random.key_data(KEY)))  # a raw key too
    assert np.abs(one - maps(jax.random.key(4))).min() > 0
    assert np.abs(one - maps(KEY, samples=2)).min() > 0


def test_without_noise_smooth_grad_is_the_gradient():
    smooth = attribution.smooth_grad(network, in_float32(), TARGETS, key=KEY, samples=2, noise=0.0)
    expected = attribution.gradient(network, in_float32(), TARGETS)
    np.testing.assert_allclose(smooth, expected, atol=1e-6)


@pytest.mark.parametrize("is_gradient", [False, True])
@pytest.mark.parametrize("method", ["smooth_grad", "integrated_gradients"])
def test_memory_does_not_grow_with_samples_or_steps(method, is_gradient):
    def needed(number):
        def maps(images):
            if method == "smooth_grad":
                return attribution.smooth_grad(network, images, TARGETS, key=KEY, samples=number)
            return attribution.integrated_gradients(network, images, TARGETS, steps=number)

        wanted = jax.grad(lambda x: (maps(x) ** 2).sum()) if is_gradient else maps
        compiled = jax.jit(wanted).lower(in_float32()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Under a gradient one carry [n, h, w, c] per step may stay, far less than the inside.
    carries = 60 * IMAGES.size * 4 if is_gradient else 0
    assert needed(64) <= needed(4) + carries + 64 * 16


def test_the_linear_approximation_is_activation_times_gradient():
    hidden = np.tanh(IMAGES @ W1 + B1)
    expected = (hidden * slow_hidden_gradient(hidden, np.eye(K)[TARGETS])).sum(-1)
    with jax.enable_x64(True):
        maps = attribution.linear_approximation(
            network, jnp.asarray(IMAGES), TARGETS, tap=["hidden", "input"], chunk_size=2
        )
        np.testing.assert_allclose(maps["hidden"], expected, atol=1e-13)
        np.testing.assert_allclose(
            maps["input"], slow_maps("input_x_gradient", TARGETS), atol=1e-13
        )


@each_method
@pytest.mark.parametrize(("target", "chunk_size"), [(-1, None), (7, 2)])
def test_a_class_that_is_not_there_is_an_error_if_known_else_nan(method, target, chunk_size):
    targets = np.array([0, target, 2, 2, 5])

    def maps(t):
        return METHODS[method](network, in_float32(), t, chunk_size=chunk_size)

    with pytest.raises(ValueError, match=f"target {target} is out of range for 7 classes"):
        maps(targets)
    traced = jax.jit(maps)(targets)
    assert np.isnan(traced[1]).all()
    np.testing.assert_allclose(traced[2:], maps(TARGETS)[2:], atol=1e-6)


@each_method
@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((N, H, W, C), np.uint8), {}, r"images must be float \[n, h, w, c\], not uint8"),
        (IMAGES[0], {}, r"float \[n, h, w, c\], not float32 \[4, 6, 3\]"),
        (IMAGES, {"reduce": "max"}, "unknown reduction 'max'; did you mean 'max_abs'"),
        (IMAGES, {"chunk_size": 0}, "chunk_size is 0; expected a whole number"),
    ],
)
def test_bad_input_is_one_clear_error(method, images, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](network, images, TARGETS, **options)


def test_bad_settings_are_one_clear_error():
    for samples in (0, 2.5):
        with pytest.raises(ValueError, match=f"samples is {samples}; expected a whole number"):
            attribution.smooth_grad(network, in_float32(), TARGETS, key=KEY, samples=samples)
    with pytest.raises(ValueError, match="steps is 0; expected a whole number"):
        attribution.integrated_gradients(network, in_float32(), TARGETS, steps=0)
    for shape in ((2,), (H, C), (1, N, H, W, C)):
        with pytest.raises(ValueError, match="which does not broadcast to the images"):
            attribution.integrated_gradients(
                network, in_float32(), TARGETS, baseline=np.zeros(shape)
            )


def test_nan_in_a_gradient_is_nan_in_its_map():
    """XLA's maximum over the channels would drop it."""
    images = jnp.ones((2, 32, 32, 3))
    maps = attribution.gradient(
        lambda x: jnp.stack([x.sum((1, 2, 3)) * jnp.array([1.0, jnp.nan])] * 2, axis=1),
        images,
        jnp.array([0, 1]),
    )
    assert np.isnan(maps).all(axis=(1, 2)).tolist() == [False, True]

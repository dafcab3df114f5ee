import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name as mark

from attnzoom_jax.attribution import default_tap, gate_taps, tap_depths

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def network(images):
    x = mark(images * 2, "scaled")
    x = mark(jnp.einsum("nhwc,cd->nhwd", x, jnp.ones((3, 4))), "a")
    short = mark(x + 1, "short")
    x = mark(jnp.einsum("nhwc,cd->nhwd", x, jnp.ones((4, 4))), "b") + short
    x = x * mark(jax.nn.sigmoid(x), "b/gate")
    return mark(mark(x, "sum").mean((1, 2)) @ jnp.ones((4, 5)), "root")


def convolutional_network(images):
    features = mark(images * 2, "features")
    scores = jnp.einsum("nhwc,cd->nhwd", features, jnp.ones((3, 4)))
    return mark(jax.nn.relu(mark(scores, "scores")), "relu").mean((1, 2))


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit, jax.checkpoint])
def test_depth_counts_linear_maps_on_the_longest_way(wrapper):
    depths = {"scaled": 0, "a": 1, "short": 1, "b": 2, "b/gate": 2, "sum": 2, "root": 3}
    assert tap_depths(wrapper(network), IMAGES) == depths


def test_default_tap_is_the_last_spatial_one_that_is_no_gate():
    assert default_tap(network, IMAGES) == "sum"
    pooled = jax.ShapeDtypeStruct((2, 1, 1, 3), jnp.float32)
    with pytest.raises(ValueError, match="spatial"):
        default_tap(network, pooled)


def test_default_tap_of_a_convolutional_classifier_is_what_it_classifies():
    assert default_tap(convolutional_network, IMAGES) == "features"


def test_without_linear_maps_the_default_tap_is_the_last_spatial_one():
    assert default_tap(lambda x: mark(mark(x, "a") * 2, "b").mean((1, 2)), IMAGES) == "b"


def test_gates_are_known_by_name_and_extent():
    taps = {"a": (2, 8, 8, 3), "a/gate": (2, 8, 8, 1), "b/gate#1": (2, 8, 8, 3), "c/gate": (2, 3)}
    assert gate_taps(taps) == ["a/gate", "b/gate#1"]

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.attribution import list_taps, read_taps
from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.models.recursive_zoom import RecursiveZoom
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.taps import default_tap
from attnzoom_jax.models.two_stream import two_stream

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


class Pair(nn.Module):
    """Returns a tuple with a leaf that is no array."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3), name="conv")(x), "not an array", {"mean": x.mean((1, 2))}


class Network(nn.Module):
    """Written without a thought of taps: a tuple, a shared module, nesting."""

    @nn.compact
    def __call__(self, x, train=False):
        x, _, stats = Pair(name="pair")(x)
        shared = nn.Conv(4, (1, 1), name="shared")
        x = shared(nn.relu(shared(x)))
        return nn.Dense(5, name="head")(x.mean((1, 2))) + stats["mean"].sum(1, keepdims=True)


def create(model, *args, **kwargs):
    return model.init(jax.random.key(0), *args, **kwargs)


def test_every_module_output_is_a_tap_named_by_its_path():
    fn = bind(Network(), create(Network(), IMAGES), train=False)
    assert list_taps(fn, IMAGES) == {
        "pair/conv": (2, 8, 8, 4),
        "pair/0": (2, 8, 8, 4),
        "pair/2": (2, 3),
        "shared": (2, 8, 8, 4),
        "shared#1": (2, 8, 8, 4),
        "head": (2, 5),
        "root": (2, 5),
    }


def test_binding_changes_no_value_and_taps_hold_what_the_module_returned():
    variables = create(Network(), IMAGES)
    fn = bind(Network(), variables, train=False)
    output, values = read_taps(fn, IMAGES, ["shared", "shared#1", "root"])
    np.testing.assert_array_equal(output, Network().apply(variables, IMAGES))
    np.testing.assert_array_equal(values["root"], output)
    shared = variables["params"]["shared"]
    again = jax.nn.relu(values["shared"]) @ shared["kernel"][0, 0] + shared["bias"]
    np.testing.assert_allclose(values["shared#1"], again, atol=1e-5)


@pytest.mark.parametrize("wrapper", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_taps_are_the_same_inside_a_transformed_function(wrapper):
    fn = bind(Network(), create(Network(), IMAGES), train=False)
    assert list_taps(wrapper(fn), IMAGES) == list_taps(fn, IMAGES)


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        carry = nn.Dense(3, name="dense")(carry)
        return carry, carry


class Wrapped(nn.Module):
    transform: str

    @nn.compact
    def __call__(self, x):
        if self.transform == "scan":
            scan = nn.scan(
                Step, variable_broadcast="params", split_rngs={"params": False}, length=3
            )
            return scan(name="steps")(x.mean((1, 2)), None)[0]
        dense = {"jit": nn.jit, "remat": nn.remat}[self.transform](nn.Dense)
        return dense(3, name="dense")(x.mean((1, 2)))


def test_taps_inside_scan_are_numbered_by_iteration():
    fn = bind(Wrapped("scan"), create(Wrapped("scan"), IMAGES))
    taps = list_taps(fn, IMAGES)
    assert [name for name in taps if name.startswith("steps/dense")] == [
        "steps/dense#0",
        "steps/dense#1",
        "steps/dense#2",
    ]
    output, values = read_taps(fn, IMAGES, ["steps/dense#0", "steps/dense#2"])
    np.testing.assert_allclose(values["steps/dense#2"], output, rtol=1e-6)
    assert np.abs(values["steps/dense#0"] - output).max() > 1e-3


def test_taps_inside_remat_are_there_each_time():
    fn = bind(Wrapped("remat"), create(Wrapped("remat"), IMAGES))
    for _ in range(2):
        assert list_taps(fn, IMAGES) == {"dense": (2, 3), "root": (2, 3)}


def test_a_module_inside_nn_jit_raises_also_when_its_trace_is_cached():
    variables = create(Wrapped("jit"), IMAGES)
    fn = bind(Wrapped("jit"), variables)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'dense' runs inside nn\.jit"):
            list_taps(fn, IMAGES)
    Wrapped("jit").apply(variables, IMAGES)
    with pytest.raises(ValueError, match=r"nn\.jit|unknown tap 'dense'"):
        read_taps(fn, IMAGES, ["dense"])


def test_a_mask_is_one_tap_below_its_layer():
    model = Insert(Network(), {"pair/conv": AttentionZoom()})
    fn = bind(model, create(model, IMAGES), train=False)
    taps = list_taps(fn, IMAGES)
    assert taps["inserted/pair.conv/gate"] == (2, 8, 8, 1)
    assert taps["backbone/pair/conv/before"] == (2, 8, 8, 4)
    assert taps["backbone/pair/conv"] == (2, 16, 16, 4)
    assert not [name for name in taps if name.endswith("#1") and "gate" in name]


def test_maps_of_models_with_views_are_taken_in_the_images_by_default():
    backbone = ResNet(3, stem="small", block="basic", stage_sizes=(1, 1), width=4)
    options = {"hidden": 4, "steps": 2, "patch_size": 8, "patch_source": "whole"}
    images = jnp.zeros((1, 16, 16, 3))
    for model, expected in (
        (backbone, "stage2"),
        (RecursiveZoom(backbone, steps=2, tap="stage2"), "backbone/stage2"),
        (two_stream(backbone, add_on=0, **options), "global_trunk"),
        (Insert(two_stream(backbone, add_on=3, **options), {}), "backbone/add_on/relu2"),
    ):
        variables = model.init(jax.random.key(0), images)
        fn = bind(model, variables, train=False)
        tap = default_tap(model, fn, images)
        assert tap == expected and tap in list_taps(fn, images)

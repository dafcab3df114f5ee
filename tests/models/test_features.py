import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.attribution import grad_cam, list_taps, read_taps
from attnzoom_jax.layers import AttentionZoom
from attnzoom_jax.models import Features, Insert, bind, create_model
from attnzoom_jax.models.vgg import VGG

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x))
        return nn.Dropout(0.5, deterministic=not train, name="dropout")(x)


class Net(nn.Module):
    """A stranger with batch statistics, dropout, a tuple, a repeated call and remat."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = Block(4, name="a")(x, train)
        x = nn.remat(Block, static_argnums=(2,))(4, name="r")(x, train)
        x = Block(4, name="b")(x, train)
        again = nn.Conv(4, (1, 1), name="again")
        x = again(again(x))
        x, y = Pair(name="pair")(x)
        scale = self.param("scale", nn.initializers.ones, (4,))
        x = Block(6, name="c")(x * scale, train)
        return nn.Dense(3, name="head")(x.mean((1, 2))) + y.mean()


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + 1, x + 2


VARIABLES = jax.jit(Net().init)(KEY, IMAGES)
INSIDE = {"params": {"backbone": VARIABLES["params"]}} | {
    "batch_stats": {"backbone": VARIABLES["batch_stats"]}
}
BEFORE = {  # tap: top names of the parameters that it needs
    "a/conv": {"a"},
    "b": {"a", "r", "b"},
    "again#1": {"a", "r", "b", "again"},
    "pair/1": {"a", "r", "b", "again"},
    "c": {"a", "r", "b", "again", "scale", "c"},
    "root": {"a", "r", "b", "again", "scale", "c", "head"},
}


@pytest.mark.parametrize("tap", BEFORE)
def test_is_the_value_at_the_tap_bit_for_bit(tap):
    _, taps = jax.jit(lambda v: read_taps(bind(Net(), v), IMAGES, [tap]))(VARIABLES)
    value = jax.jit(Features(Net(), tap).apply)(INSIDE, IMAGES)
    np.testing.assert_array_equal(value, taps[tap])


@pytest.mark.parametrize("tap", BEFORE)
def test_has_the_backbones_tree_and_nothing_after_the_tap(tap):
    variables = jax.eval_shape(Features(Net(), tap).init, KEY, IMAGES)
    whole = jax.tree.map(lambda leaf: leaf.shape, INSIDE)
    assert set(variables["params"]["backbone"]) == BEFORE[tap]

    def is_part(part, of):
        if not isinstance(part, dict):
            assert part.shape == of
            return
        for name in part:
            is_part(part[name], of[name])

    is_part(variables, whole)
    if tap == "a/conv":
        assert set(variables) == {"params"} and set(variables["params"]["backbone"]["a"]) == {
            "conv"
        }


def test_what_comes_after_the_tap_is_not_computed():
    jaxpr = jax.make_jaxpr(lambda x: Features(Net(), "a/conv").apply(INSIDE, x))(IMAGES)
    assert [e.primitive.name for e in jaxpr.eqns if e.primitive.name != "name"] == [
        "conv_general_dilated"
    ]


def test_statistics_and_dropout_before_the_tap_are_those_of_the_whole():
    rngs = {"dropout": jax.random.key(3)}
    features = Features(Net(), "b")
    value, updates = jax.jit(
        lambda v: features.apply(v, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)
    )(INSIDE)
    _, expected = jax.jit(
        lambda v: Insert(Net(), {}).apply(v, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)
    )(INSIDE)
    found, expected = (tree["batch_stats"]["backbone"] for tree in (updates, expected))
    for name in ("a", "r", "b"):
        jax.tree.map(np.testing.assert_array_equal, found[name], expected[name])
        assert np.any(found[name]["norm"]["mean"] != 0)
    # Given, but after the tap: as it was.
    jax.tree.map(np.testing.assert_array_equal, found["c"], VARIABLES["batch_stats"]["c"])
    assert (value == 0).mean() > 0.5  # ReLU and dropout


def test_gradients_are_those_of_the_whole():
    def loss(params):
        return (Features(Net(), "b").apply({**INSIDE, "params": params}, IMAGES) ** 2).sum()

    def expected(params):
        fn = bind(Net(), {**VARIABLES, "params": params})
        return (read_taps(fn, IMAGES, ["b"])[1]["b"] ** 2).sum()

    found = jax.jit(jax.grad(loss))(INSIDE["params"])["backbone"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        jax.jit(jax.grad(expected))(VARIABLES["params"]),
    )
    assert np.any(found["a"]["conv"]["kernel"] != 0) and not found["c"]["conv"]["kernel"].any()


class Around(nn.Module):
    """After the exception modules are made and named as ever."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        trunk = Features(Net(parent=None), "b", name="trunk")
        x, y = trunk(x, train=train), trunk(-x, train=train)
        x = nn.Conv(2, (1, 1))(x) + nn.Conv(2, (1, 1))(y)
        return Features(Head(parent=None), "root", name="end")(x)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x.mean((1, 2)))


def test_inside_of_a_network_called_twice():
    variables = jax.jit(Around().init)(KEY, IMAGES)
    assert set(variables["params"]) == {"trunk", "Conv_0", "Conv_1", "end"}
    fn = bind(Around(), variables)
    taps = list_taps(fn, IMAGES)
    assert taps["trunk"] == taps["trunk#1"] == taps["trunk/backbone/b"] == (2, 8, 8, 4)
    assert taps["trunk/backbone/a#1"] == (2, 8, 8, 4) and "trunk/backbone" not in taps
    assert taps["root"] == (2, 3)
    assert list_taps(fn, IMAGES) == taps  # nothing remains of the exception
    maps = grad_cam(fn, IMAGES, jnp.array([0, 2]), tap=["trunk", "trunk/backbone/b", "trunk#1"])
    np.testing.assert_allclose(maps["trunk"], maps["trunk/backbone/b"], atol=1e-7)
    assert np.abs(maps["trunk"]).max() > 0 and np.abs(maps["trunk#1"]).max() > 0


def test_features_of_features():
    outer = Features(Around(), "trunk/backbone/b")
    variables = jax.jit(Around().init)(KEY, IMAGES)
    # The tap inside is met by both; it is the inner one that marks it and ends first.
    with pytest.raises(ValueError, match="unknown tap of the backbone 'trunk/backbone/b'"):
        outer.apply({c: {"backbone": v} for c, v in variables.items()}, IMAGES)
    value = Features(Around(), "trunk/backbone/a/conv").apply(
        {c: {"backbone": v} for c, v in variables.items()}, IMAGES
    )
    assert value.shape == (2, 8, 8, 4)


def test_of_a_network_with_layers_inserted():
    zoomed = Insert(Net(), {"a": AttentionZoom()})
    shapes = jax.eval_shape(Features(zoomed, "backbone/b").init, KEY, IMAGES)
    assert set(shapes["params"]["backbone"]) == {"backbone", "inserted"}
    variables = jax.jit(zoomed.init)(KEY, IMAGES)
    value = Features(zoomed, "backbone/b").apply(
        {c: {"backbone": v} for c, v in variables.items()}, IMAGES
    )
    assert value.shape == (2, 16, 16, 4)
    with pytest.raises(ValueError, match="reads 'a/gte'; did you mean 'a/gate'"):
        reading = Insert(Net(), {"a": AttentionZoom(), "b": Reading("a/gte")})
        jax.eval_shape(Features(reading, "backbone/b").init, KEY, IMAGES)


class Reading(nn.Module):
    reads: str

    @nn.compact
    def __call__(self, x, mask):
        return x


def test_a_layer_is_inserted_around():
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return Features(Net(parent=None), "b", name="trunk")(x, train=train)

    whole = Insert(Wrapped(), {"trunk/backbone/a": AttentionZoom(), "trunk": AttentionZoom()})
    variables = jax.jit(whole.init)(KEY, IMAGES)
    assert whole.apply(variables, IMAGES).shape == (2, 32, 32, 4)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("bb", "unknown tap of the backbone 'bb'; did you mean 'b'"),
        ("zzz", "There is: a/conv, "),
        ("r/conv", "'r/conv' lies inside a lifted transformation .*take a tap outside of it"),
        ("", "unknown tap of the backbone ''"),
    ],
)
def test_a_tap_that_cannot_be_taken(tap, message):
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(Features(Net(), tap).init, KEY, IMAGES)
    assert "\n" not in str(error.value)


def test_a_failure_of_the_backbone_is_its_own():
    model = Features(create_model("vgg16", num_classes=2, width=4), "stage5")
    with pytest.raises(ValueError, match="expected a batch"):
        model.init(KEY, IMAGES[0])


def test_without_train_and_in_sequence():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.Conv(3, (1, 1), name="conv")(x).mean((1, 2)))

    model = Features(Plain(), "conv")
    variables = jax.jit(model.init)(KEY, IMAGES)
    assert model.apply(variables, IMAGES, train=True).shape == (2, 8, 8, 3)


def test_vgg_before_its_last_pool():
    vgg = VGG(7, stage_sizes=(1, 2), width=4)
    images = jnp.zeros((1, 16, 16, 3))
    sizes = {
        tap: jax.eval_shape(Features(vgg, tap).init_with_output, KEY, images)[0].shape
        for tap in ("stage2/relu2", "stage2")
    }
    assert sizes == {"stage2/relu2": (1, 8, 8, 8), "stage2": (1, 4, 4, 8)}

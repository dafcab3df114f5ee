"""Functions as linen modules: against the same network in linen, and what a file may do wrong."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax import attribution
from attnzoom_jax.models import FunctionModel, Insert, bind, load_function
from attnzoom_jax.models.function import LoadedNetwork
from attnzoom_jax.models.taps import default_tap

IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 12, 12, 3)).astype(np.float32)
TARGETS = jnp.array([0, 3, 1])


class Linen(nn.Module):
    """The same network as FILE's, with a module for each of its taps."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2), "VALID", name="stem")(x))
        x = Relu(name="features")(nn.Conv(8, (3, 3), padding="VALID", name="body")(x))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Relu(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


FILE = """
import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from attnzoom_jax.models import Network

def conv(x, layer, stride):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], stride, "VALID", dimension_numbers=numbers
    )
    return y + layer["bias"]

def small(weights):
    with np.load(weights) as file:
        params = unflatten_dict(dict(file), sep="/")

    def run(params, images):
        x = jax.nn.relu(conv(images, params["stem"], (2, 2)))
        x = jax.nn.relu(conv(x, params["body"], (1, 1)))
        x = checkpoint_name(x, "features")
        return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]

    return Network(run, params, class_names=["a", "b", "c", "d"], image_shape=(12, 12, 3))
"""


@pytest.fixture(scope="module")
def linen():
    variables = Linen().init(jax.random.key(1), IMAGES)
    # A bias in every place: what is left out would show.
    return jax.tree.map(
        lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), variables
    )


@pytest.fixture(scope="module")
def network(linen, tmp_path_factory) -> LoadedNetwork:
    folder = tmp_path_factory.mktemp("network")
    (folder / "net.py").write_text(FILE)
    flat = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(linen["params"])
    }
    np.savez(folder / "weights.npz", **flat)
    return load_function(f"{folder}/net.py:small", weights=f"{folder}/weights.npz")


# ---- one function, and the same network in linen


def test_what_is_loaded(network, linen):
    assert network.class_names == ("a", "b", "c", "d") and network.image_shape == (12, 12, 3)
    assert set(network.variables) == {"params"} and set(network.variables["params"]) == {"weights"}
    weights = network.variables["params"]["weights"]
    assert jax.tree.structure(weights) == jax.tree.structure(linen["params"])


def test_logits_are_those_of_the_module(network, linen):
    logits = network.model.apply(network.variables, IMAGES, train=False)
    expected = Linen().apply(linen, IMAGES)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_name_inside_is_a_tap(network):
    fn = bind(network.model, network.variables, train=False)
    assert attribution.list_taps(fn, IMAGES) == {"features": (3, 3, 3, 8), "root": (3, 4)}
    assert default_tap(network.model, fn, IMAGES) == "features"


@pytest.mark.parametrize(
    "method",
    [
        attribution.grad_cam,
        attribution.excitation_backprop,
        attribution.contrastive_excitation_backprop,
    ],
)
def test_maps_are_those_of_the_module(network, linen, method):
    """With the weights as arguments of a jitted function, as the evaluators have them."""

    def maps(model, options):
        def explain(variables, images):
            fn = bind(model, variables, **options)
            return method(fn, images, TARGETS, tap="features")

        return jax.jit(explain)

    found = maps(network.model, {"train": False})(network.variables, IMAGES)
    expected = maps(Linen(), {})(linen, IMAGES)
    assert found.shape == (3, 3, 3) and np.std(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_module_inside_of_a_function_keeps_its_taps(linen):
    """Of a linen network that is none of ours."""
    model = FunctionModel(lambda weights, images: Linen().apply(weights, images))
    fn = bind(model, {"params": {"weights": linen}}, train=False)
    inner = attribution.list_taps(bind(Linen(), linen), IMAGES)
    assert inner.items() <= attribution.list_taps(fn, IMAGES).items()
    maps = attribution.grad_cam(fn, IMAGES, TARGETS, tap="stem")
    expected = attribution.grad_cam(bind(Linen(), linen), IMAGES, TARGETS, tap="stem")
    np.testing.assert_allclose(maps, expected, rtol=1e-5)


# ---- other libraries


class OfEquinox(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear
    activation: Any

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(3, 5, 3, key=key)
        self.head = eqx.nn.Linear(5, 4, key=key)
        self.activation = jax.nn.relu

    def __call__(self, image):
        x = self.activation(self.conv(image.transpose(2, 0, 1))).transpose(1, 2, 0)
        return self.head(checkpoint_name(x, "features").mean((0, 1)))


class OfNnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, images):
        x = checkpoint_name(nnx.relu(self.conv(images)), "features")
        return self.head(x.mean((1, 2)))


def in_equinox():
    module = OfEquinox(jax.random.key(0))
    arrays, rest = eqx.partition(module, eqx.is_array)
    return (lambda weights, images: jax.vmap(eqx.combine(weights, rest))(images)), arrays


def in_nnx():
    module = OfNnx()
    graph, state = nnx.split(module)
    return (lambda weights, images: nnx.merge(graph, weights)(images)), state


@pytest.mark.parametrize("create", [in_equinox, in_nnx])
def test_weights_may_be_any_tree(create):
    run, weights = create()
    variables = {"params": {"weights": weights}}
    model = FunctionModel(run)
    logits = jax.jit(model.apply)(variables, IMAGES)
    np.testing.assert_allclose(logits, run(weights, IMAGES), rtol=1e-5, atol=1e-6)
    fn = bind(model, variables, train=False)
    maps = attribution.excitation_backprop(fn, IMAGES, TARGETS, tap="features")
    assert maps.shape[0] == 3 and maps.shape[1] > 9 and np.all(maps.sum((1, 2)) > 0)


def test_the_tree_is_as_the_function_made_it():
    """Also where Flax has frozen its dictionaries, and inside of another model."""
    seen = []

    def run(weights, images):
        seen.append(jax.tree.structure(weights))
        return images.mean((1, 2)) @ weights["layers"][0]["kernel"]

    weights = {"layers": [{"kernel": jnp.ones((3, 4))}]}
    FunctionModel(run).apply(freeze({"params": {"weights": weights}}), IMAGES)
    model = Insert(FunctionModel(run), layers={"input": Relu()})
    model.apply(freeze({"params": {"backbone": {"weights": weights}}}), IMAGES)
    assert seen == [jax.tree.structure(weights)] * 2


# ---- what is said


def test_it_neither_begins_nor_trains(network):
    with pytest.raises(ValueError, match="has no weights to begin with"):
        network.model.init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="no training mode"):
        network.model.apply(network.variables, IMAGES, train=True)


RETURN = "from attnzoom_jax.models import Network\ndef net(weights):\n    return "


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (None, "net.py", "expected FILE.py:NAME"),
        (None, "net.txt:net", "expected FILE.py:NAME"),
        (None, "none.py:net", "there is no file .*none.py"),
        ("", "net.py:net", "unknown network in .*net.py 'net'. There is: nothing"),
        ("def squeeze(w): ...\nnet = 3", "net.py:net", "'net'.*There is: squeeze"),
        ("def nets(w): ...", "net.py:net", "unknown network in .* 'net'; did you mean 'nets'"),
        ("import nothing_of_this_name", "net.py:net", "failed: ModuleNotFoundError: No module"),
        ("def net(:", "net.py:net", "failed: SyntaxError"),
        ("def net(weights): return {}['x']", "net.py:net", "failed: KeyError: 'x'"),
        ("def net(): ...", "net.py:net", "failed: TypeError: net.. takes 0 positional"),
        ("def net(weights): open('/none')", "net.py:net", "net: .*No such file or dir.*'/none'"),
        ("def net(weights): raise ValueError('bad weights')", "net.py:net", "py:net: bad weights"),
        ("def net(weights): ...", "net.py:net", "expected .*Network.*, not NoneType"),
        (f"{RETURN}(print, {{}})", "net.py:net", "expected .*Network.*, not tuple"),
        (f"{RETURN}Network(3, {{}})", "net.py:net", "not a Network with run=3"),
        (
            f"{RETURN}Network(print, {{'act': [print]}})",
            "net.py:net",
            r"weights\['act'\]\[0\] is a builtin_function_or_method; expected arrays only",
        ),
        (f"{RETURN}Network(print, {{}}, 'cat')", "net.py:net", "class_names are cat; expected st"),
        (f"{RETURN}Network(print, {{}}, (3, 4))", "net.py:net", "class_names are .3, 4.; expected"),
        (f"{RETURN}Network(print, {{}}, (), (2, 2))", "net.py:net", r"image_shape is \(2, 2\)"),
    ],
)
def test_a_file_that_gives_no_network_is_one_line(tmp_path, code, name, message):
    if code is not None:
        (tmp_path / "net.py").write_text(code)
    with pytest.raises(ValueError, match=message) as error:
        load_function(f"{tmp_path}/{name}", weights="none.npz")
    assert "\n" not in str(error.value)

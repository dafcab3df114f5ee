"""Gradient checkpointing by path: the same numbers, and less that is kept for the backward pass."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.models import bind, create_model
from attnzoom_jax.models.convnext import ConvNeXt
from attnzoom_jax.models.remat import rematerialized
from attnzoom_jax.models.wide_resnet import WideResNet
from attnzoom_jax.training.experiment import create_experiment
from configs import demo

IMAGES = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
RESNET = {"name": "resnet", "stage_sizes": (2, 1), "width": 4, "stem": "cifar"}
ZOOM = {"stage1": {"name": "attention_zoom"}}


def create(name):
    """A model, and paths of it."""
    if name == "dropout":
        model = WideResNet(3, stage_sizes=(2, 1), widen=1, width=4, dropout=0.5)
        return model, ("stage1", "stage2")
    if name == "stochastic depth":
        return ConvNeXt(3, "small", stage_sizes=(2, 1), width=4, drop_path=0.5), ("stage1",)
    options, paths = {
        "resnet": ({}, ("stage1", "stage2")),
        "one block": ({}, ("stage1/block2",)),
        "a layer at the path": ({"insert": ZOOM}, ("stem", "stage1")),
        "around a backbone": (
            {"name": "multi_channel", "backbone": "resnet", "tap": "stage2"},
            ("backbone/stage1", "backbone/stage2"),
        ),
    }[name]
    return create_model(num_classes=3, **{**RESNET, **options}), paths


def loss(model, variables, paths):
    others = {name: value for name, value in variables.items() if name != "params"}

    def run(params):
        with rematerialized(model, paths):
            logits, updates = model.apply(
                {"params": params, **others},
                IMAGES,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
        return jnp.square(logits - 1).mean(), updates

    return run


@pytest.mark.parametrize(
    "name",
    [
        *("resnet", "one block", "a layer at the path", "around a backbone"),
        *("dropout", "stochastic depth"),
    ],
)
def test_loss_gradients_and_statistics_stay_what_they_are(name):
    model, paths = create(name)
    variables = jax.jit(model.init)(jax.random.key(2), IMAGES)
    expected, found = (
        jax.jit(jax.value_and_grad(loss(model, variables, given), has_aux=True))(
            variables["params"]
        )
        for given in ((), paths)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max()),
        expected,
        found,
    )
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found[1])) > 0


def shape_of_loss(model, paths):
    run = lambda variables: loss(model, variables, paths)(variables["params"])  # noqa: E731
    return jax.eval_shape(run, jax.eval_shape(model.init, jax.random.key(2), IMAGES))


def kept(model, paths):
    """Bytes that the forward pass leaves to the backward pass, beside the variables."""

    def backward(variables):
        return jax.vjp(loss(model, variables, paths), variables["params"], has_aux=True)[1]

    pull = jax.eval_shape(backward, jax.eval_shape(model.init, jax.random.key(2), IMAGES))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize("name", ["resnet", "a layer at the path", "dropout"])
def test_what_is_kept_for_the_backward_pass_falls(name):
    model, paths = create(name)
    assert kept(model, paths) < 0.7 * kept(model, ())
    assert kept(model, paths[:1]) < kept(model, ())


def test_the_variables_have_the_tree_of_the_model_alone():
    model, paths = create("a layer at the path")

    def shapes():  # each time traced anew
        return jax.eval_shape(lambda: model.init(jax.random.key(2), IMAGES))

    expected = shapes()
    with rematerialized(model, paths):
        assert shapes() == expected


def test_a_tap_at_the_path_can_be_read():
    model, _ = create("resnet")
    variables = model.init(jax.random.key(2), IMAGES)
    read = lambda: attribution.read_taps(bind(model, variables), IMAGES, ["stage1"])[1]  # noqa: E731
    expected = read()["stage1"]
    with rematerialized(model, ("stage1",)):
        np.testing.assert_allclose(read()["stage1"], expected, rtol=1e-5)


def test_a_layer_inside_of_the_path_raises():
    insert = {"stage1/block1": {"name": "attention_zoom"}}
    model = create_model(num_classes=3, **RESNET, insert=insert)
    with pytest.raises(ValueError, match=r"Insert at 'stage1/block1'.*nn\.remat"):
        shape_of_loss(model, ("stage1",))


def test_an_unknown_path_names_the_nearest():
    model, _ = create("a layer at the path")
    with pytest.raises(ValueError, match=r"unknown path in remat 'stag1'; did you mean 'stage1'"):
        shape_of_loss(model, ("stag1",))


def test_a_module_whose_parent_looks_at_its_calls_raises():
    class Watched(nn.Module):
        @nn.compact
        def __call__(self, x):
            with nn.intercept_methods(lambda call, args, kwargs, context: call(*args, **kwargs)):
                return nn.Dense(3, name="inner")(x)

    model = Watched()
    variables = model.init(jax.random.key(0), IMAGES)
    with (
        pytest.raises(ValueError, match="remat at 'inner'"),
        rematerialized(model, ("inner",)),
    ):
        model.apply(variables, IMAGES)


def config(**changes):
    base = demo.get_config("tiny")
    base.model = {**RESNET, "insert": {}}
    base.update_from_flattened_dict(changes)
    return base


def test_a_config_is_checked_before_it_runs():
    assert create_experiment(config(remat=("stage1",))).recipe.remat == ("stage1",)
    with pytest.raises(ValueError, match="unknown path in remat 'stage3'; did you mean"):
        create_experiment(config(remat=("stage3",)))
    settings = config(remat=("stage1",))
    settings.losses.side = {"name": "cross_entropy", "tap": "head"}
    with pytest.raises(ValueError, match="beside losses that read taps"):
        create_experiment(settings)

"""Small classifiers of fine_shapes/tiny, as a run's folder would give them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.layers import Gate
from configs import default


class Net(nn.Module):
    """One convolution of `stride`, a mask over its map, a head."""

    stride: int = 4
    has_gate: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        window = (self.stride, self.stride)
        x = nn.Conv(16, window, strides=window, padding="VALID", name="conv")(x)
        x = Relu(name="relu")(x)
        if self.has_gate:
            logits = nn.Conv(1, (3, 3), name="attention")(x)
            x = Relu(name="gated")(x * Gate(name="gate")(nn.sigmoid(logits)))
        features = x.mean((1, 2))
        self.sow("intermediates", "features", features)
        return nn.Dense(16, name="head")(features)


class Relu(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


def fitted(model, seed) -> TrainedModel:
    """Random features, and the head that fits the labels of the test split best."""
    config: Any = default.get_config()
    config.data.update({"name": "fine_shapes/tiny", "eval_batch_size": 8})
    source = open_source("fine_shapes/tiny", split="test")
    images = to_input(jnp.stack([example["image"] for example in source]), config.data)
    labels = np.array([int(example["label"]) for example in source])
    variables = model.init(jax.random.key(seed), images[:1])
    _, state = model.apply(variables, images, mutable="intermediates")
    features = np.asarray(state["intermediates"]["features"][0], np.float64)
    kernel, *_ = np.linalg.lstsq(features, np.eye(16)[labels], rcond=None)
    params = {**variables["params"]}
    params["head"] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(16)}
    return TrainedModel(config, model, {"params": params}, 7, source.class_names, (32, 32, 3))


@pytest.fixture(scope="session")
def trained() -> TrainedModel:
    """A network with a mask; its maps are 8 x 8."""
    return fitted(Net(), seed=3)


@pytest.fixture(scope="session")
def coarse() -> TrainedModel:
    """Another network, without a mask; its maps are 4 x 4."""
    return fitted(Net(stride=8, has_gate=False), seed=5)

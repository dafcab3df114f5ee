from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.training import sharding
from configs import default


class Linear(nn.Module):
    """Keeps each example by itself, so that a batch's size cannot matter."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="head")(x[:, ::8, ::8].reshape(len(x), -1))


def data(batch_size) -> Any:
    config: Any = default.get_config().data
    config.update({"name": "fine_shapes/tiny", "eval_batch_size": batch_size})
    return config


def variables():
    images = jnp.zeros((1, 32, 32, 3))
    num_classes = len(open_source("fine_shapes/tiny", split="test").class_names)
    assert num_classes == 16
    return Linear().init(jax.random.key(0), images)


def evaluate(batch_size, devices, **options):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    given = {"name": "classify", "split": "test", **options}
    evaluator = create_evaluator(model=Linear(), data=data(batch_size), mesh=mesh, **given)
    return evaluator.run(variables())


def slow_metrics():
    """One example after the other, in NumPy."""
    source = open_source("fine_shapes/tiny", split="test")
    head: Any = variables()["params"]["head"]
    top1, top5, entropy, confidences = [], [], [], []
    for i in range(len(source)):
        image = (np.asarray(source[i]["image"], np.float64) / 255 - 0.5) / 0.25
        logits = image[::8, ::8].reshape(-1) @ head["kernel"] + head["bias"]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        label = int(source[i]["label"])
        top1.append(p.argmax() == label)
        top5.append(label in np.argsort(-p)[:5])
        entropy.append(-np.log(p[label]))
        confidences.append(p.max())
    bins = np.ceil(np.array(confidences) * 15).astype(int)
    gaps = [
        abs(np.sum(np.array(top1)[bins == b]) - np.sum(np.array(confidences)[bins == b]))
        for b in range(1, 16)
    ]
    return {
        "test/top1": np.mean(top1),
        "test/top5": np.mean(top5),
        "test/cross_entropy": np.mean(entropy),
        "test/calibration_error": np.sum(gaps) / len(source),
        "test/count": len(source),
    }


@pytest.mark.parametrize(
    ("batch_size", "devices"), [(7, 1), (16, 1), (60, 1), (64, 1), (8, 4), (16, 4)]
)
def test_every_example_counts_once_whatever_the_batch(batch_size, devices):
    assert evaluate(batch_size, devices) == pytest.approx(slow_metrics(), rel=1e-5)


def test_names_and_options():
    assert set(evaluate(16, 1, prefix="all")) == {
        f"all/{name}" for name in ("top1", "top5", "cross_entropy", "calibration_error", "count")
    }
    with pytest.raises(ValueError, match="unknown evaluator 'clasify'; did you mean 'classify'"):
        evaluate(16, 1, name="clasify")
    with pytest.raises(ValueError, match="unknown option of classify 'spilt'; did you mean"):
        evaluate(16, 1, spilt="test")

"""What is kept of each example of a split, whatever the batches and the devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation.split import EvalExamples
from attnzoom_jax.training import sharding
from configs import default


@pytest.mark.parametrize(("batch_size", "devices"), [(7, 1), (60, 1), (64, 1), (8, 4), (32, 4)])
def test_examples_come_in_the_order_of_the_split(batch_size, devices):
    data: Any = default.get_config().data
    data.update({"name": "fine_shapes/tiny", "eval_batch_size": batch_size})
    examples = EvalExamples(
        data=data,
        split="test[:45]",
        mesh=sharding.create_mesh(jax.devices()[:devices]),
        fields=("image", "label"),
        outputs=lambda variables, batch: {
            "rows": variables + batch["image"].astype(jnp.float32).mean(axis=2),
            "label": batch["label"],
        },
    )
    source = open_source("fine_shapes/tiny", split="test[:45]")
    assert len(examples.source) == 45
    found = examples.run(jnp.float32(2))
    assert {name: array.shape for name, array in found.items()} == {
        "rows": (45, 32, 3),
        "label": (45,),
    }
    for i in range(45):
        assert found["label"][i] == source[i]["label"]
        np.testing.assert_allclose(found["rows"][i], 2 + source[i]["image"].mean(1), rtol=1e-5)

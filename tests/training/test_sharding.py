import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from attnzoom_jax.training import sharding


def test_the_mesh_takes_all_devices_or_those_given():
    assert sharding.create_mesh().devices.tolist() == jax.devices()
    mesh = sharding.create_mesh(jax.devices()[1:3])
    assert mesh.devices.tolist() == jax.devices()[1:3] and mesh.axis_names == ("data",)
    assert mesh.axis_types == (AxisType.Auto,)


@pytest.mark.parametrize(("size", "devices"), [(6, 4), (0, 1), (-4, 4), (2, 4)])
def test_a_batch_that_does_not_split_names_the_key(size, devices):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    with pytest.raises(ValueError, match=f"eval_batch_size={size} .* {devices} devices; take a"):
        sharding.check_batch_size(size, mesh, key="data.eval_batch_size")
    sharding.check_batch_size(8, mesh)


def test_to_global_splits_by_example_and_keeps_every_value():
    mesh = sharding.create_mesh()
    batch = {"image": np.arange(8 * 6).reshape(8, 2, 3), "label": np.arange(8)}
    on_devices = sharding.to_global(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(on_devices[name], value)
        shards = sorted(on_devices[name].addressable_shards, key=lambda s: s.device.id)
        for i, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, value[2 * i : 2 * i + 2])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_prefetch_yields_every_batch_once_in_order(count):
    pulled = []

    def batches():
        for i in range(count):
            pulled.append(i)
            yield {"label": np.full(4, i)}

    seen = []
    for batch in sharding.prefetch(batches(), sharding.create_mesh(), ahead=2):
        seen.append(int(batch["label"][0]))
        assert len(pulled) == min(len(seen) + 2, count)  # two ahead, and no more
    assert seen == list(range(count))

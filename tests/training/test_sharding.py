from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from attnzoom_jax.training import sharding
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.state import create_state, init_variables
from attnzoom_jax.training.step import Recipe, jit_train_step, make_train_step

RULES = (("head/.*kernel", (None, "model")), ("head/wide/bias", ("model",)))
TWO_BY_TWO = {"data": 2, "model": 2}


class Device:
    """Of another process than the one at hand."""

    def __init__(self, number, process):
        self.id, self.process_index, self.platform = number, process, "cpu"


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="wide")(x))
        return nn.Dense(4, name="logits")(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return Head(name="head")(x.mean((1, 2)))


def shapes_of(model: Any = None):
    return jax.eval_shape(lambda: init_variables(model or Net(), (4, 4, 3), 0))


def create(mesh, optimizer, *, rules: Any = RULES):
    return create_state(
        Net(), optimizer, image_shape=(4, 4, 3), seed=0, mesh=mesh, use_ema=True, rules=rules
    )


def test_the_mesh_takes_all_devices_or_those_given():
    assert sharding.create_mesh().devices.ravel().tolist() == jax.devices()
    mesh = sharding.create_mesh(jax.devices()[1:3])
    assert mesh.devices.tolist() == [[device] for device in jax.devices()[1:3]]
    assert mesh.axis_names == ("data", "model")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"data": -1, "model": 1}, (4, 1)),
        ({"data": 2, "model": 2}, (2, 2)),
        ({"data": -1, "model": 2}, (2, 2)),
        ({"data": 1, "model": -1}, (1, 4)),
        ({"model": 4}, (1, 4)),
    ],
)
def test_the_mesh_has_the_shape_of_the_config(shape, expected):
    mesh = sharding.create_mesh(shape=shape)
    assert tuple(mesh.shape[axis] for axis in ("data", "model")) == expected


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 3}, "mesh.data=-1 and mesh.model=3 do not share out 4 devices"),
        ({"data": 2}, "mesh.data=2 and mesh.model=1 do not share out 4"),
        ({"data": -1, "model": -1}, "mesh.data=-1 and mesh.model=-1 do not"),
        ({"data": -1, "model": 0}, "mesh.model=0 do not"),
        ({"data": -2, "model": -2}, "mesh.model=-2 do not"),
        ({"modle": 2}, "unknown axis in config.mesh 'modle'; did you mean 'model'"),
    ],
)
def test_a_mesh_that_the_devices_do_not_fill_is_one_line(shape, message):
    with pytest.raises(ValueError, match=message) as error:
        sharding.create_mesh(shape=shape)
    assert "\n" not in str(error.value)


def test_a_process_has_its_devices_side_by_side():
    # A TPU counts its chips by where they are, and not host by host.
    devices = [Device(number, process) for number, process in enumerate([0, 1, 0, 1])]
    for shape in ({"model": 1}, {"model": 2}):
        mesh = sharding.create_mesh(devices, shape=shape)
        assert [device.process_index for device in mesh.devices.ravel()] == [0, 0, 1, 1]
    with pytest.raises(
        ValueError, match=r"reaches over several processes; take a divisor .* has, 2"
    ):
        sharding.create_mesh(devices, shape={"model": 4})


@pytest.mark.parametrize(
    ("model", "expected"), [(1, (4, 1)), (2, (2, 2)), (8, (1, 4)), (6, (2, 2)), (-1, (4, 1))]
)
def test_an_evaluation_finds_a_mesh_on_other_devices(model, expected):
    mesh = sharding.mesh_anywhere({"data": -1, "model": model})
    assert mesh.devices.shape == expected
    assert sharding.mesh_anywhere(None).devices.shape == (4, 1)


@pytest.mark.parametrize(("size", "devices"), [(6, 4), (0, 1), (-4, 4), (2, 4)])
def test_a_batch_that_does_not_split_names_the_key(size, devices):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    with pytest.raises(ValueError, match=f"eval_batch_size={size} .* {devices} devices; take a"):
        sharding.check_batch_size(size, mesh, key="data.eval_batch_size")
    sharding.check_batch_size(8, mesh)
    sharding.check_batch_size(6, sharding.create_mesh(shape=TWO_BY_TWO))  # its axis data is 2


def test_rules_place_parameters_and_what_belongs_to_them():
    mesh = sharding.create_mesh(shape=TWO_BY_TWO)
    state = create(mesh, optax.chain(optax.adam(1e-3), optax.trace(0.9)))
    split = {
        "wide/kernel": PartitionSpec(None, "model"),
        "logits/kernel": PartitionSpec(None, "model"),
        "wide/bias": PartitionSpec("model"),
    }
    counted = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        end = path.partition("head/")[2]
        assert leaf.sharding.spec == split.get(end, PartitionSpec()), path
        counted += end in split
    assert counted == 3 * 5  # parameters, averaged ones, two moments, momentum
    # A device holds half of it.
    assert state.params["head"]["wide"]["kernel"].addressable_shards[0].data.shape == (4, 8)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("head/wide/kernel", (None, "model")), "'head/wide/kernel' is no rule; expected a tuple"),
        ((("head/wide/kernel", "model"),), "'model'. is no rule; expected a tuple of pairs"),
        ((("head", (None, "model")),), "config.sharding: 'head' matches no parameter; .* such as"),
        ((("head/(", ("model",)),), r"config.sharding: 'head/\(' is no regular expression"),
        (((".*wide/bias", (None, "model")),), r"head/wide/bias \[16\] has 1 axes, and the rule"),
        (((".*wide/kernel", ("modle",)),), "unknown axis in config.sharding 'modle'; did you mean"),
        (
            (("conv/kernel", (None, None, "model")),),
            r"conv/kernel \[3, 3, 3, 4\] cannot be split into 2 along 'model', as 3 is no multiple",
        ),
    ],
)
def test_rules_that_do_not_fit_are_one_line(rules, message):
    mesh = sharding.create_mesh(shape=TWO_BY_TWO)
    with pytest.raises(ValueError, match=message) as error:
        sharding.check_rules(shapes_of()["params"], rules, mesh)
    assert "\n" not in str(error.value)


def test_the_first_rule_that_matches_decides():
    mesh = sharding.create_mesh(shape=TWO_BY_TWO)
    rules = (("head/wide/kernel", ("data",)), ("head/.*kernel", (None, "model")))
    places = sharding.check_rules(shapes_of()["params"], rules, mesh)
    assert places == {
        "head/wide/kernel": ((4, 16), PartitionSpec("data")),
        "head/logits/kernel": ((16, 4), PartitionSpec(None, "model")),
    }


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_wide_head_in_parts_trains_like_a_whole_one(name, tmp_path):
    optimizer = {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(1e-2)}[name]
    step = make_train_step(
        Net(),
        optimizer,
        Recipe(seed=0, mean=(0.5,) * 3, std=(0.25,) * 3, ema_decay=0.9),
        num_classes=4,
    )
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": rng.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8),
            "label": rng.integers(0, 4, 8).astype(np.int32),
        }
        for _ in range(5)
    ]
    ends, losses = [], []
    for mesh, rules in (
        (sharding.create_mesh(jax.devices()[:1]), ()),
        (sharding.create_mesh(shape=TWO_BY_TWO), RULES),
    ):
        state = create(mesh, optimizer, rules=rules)
        place = jax.tree.map(lambda leaf: leaf.sharding, state)
        run = jit_train_step(step, mesh, place=place)
        for batch in batches:
            state, metrics = run(state, sharding.to_global(batch, mesh))
            losses.append(float(metrics["loss"]))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == place
        ends.append(state)
    assert losses[5:] == pytest.approx(losses[:5], abs=1e-5) and losses[0] != losses[4]
    one, four = ends
    if name == "sgd":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, four)

    # What was in parts is saved whole, and comes back in other parts, whole, or on the host.
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, four)
    checkpoints.wait()
    for mesh, rules in (
        (sharding.create_mesh(shape={"data": 1, "model": 4}), RULES),
        (sharding.create_mesh(jax.devices()[:2]), ()),
        (None, ()),
    ):
        like = create(mesh or sharding.create_mesh(), optimizer, rules=rules)
        restored = checkpoints.restore(5, like, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, restored, four)
        for leaf, other in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            if mesh is None:
                assert type(leaf) is np.ndarray
            else:
                assert leaf.sharding == other.sharding
    checkpoints.close()


def test_to_global_splits_by_example_and_keeps_every_value():
    mesh = sharding.create_mesh()
    batch = {"image": np.arange(8 * 6).reshape(8, 2, 3), "label": np.arange(8)}
    on_devices = sharding.to_global(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(on_devices[name], value)
        shards = sorted(on_devices[name].addressable_shards, key=lambda s: s.device.id)
        for i, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, value[2 * i : 2 * i + 2])


def test_to_global_repeats_a_batch_along_the_axis_model():
    mesh = sharding.create_mesh(shape=TWO_BY_TWO)
    labels = sharding.to_global({"label": np.arange(8)}, mesh)["label"]
    np.testing.assert_array_equal(labels, np.arange(8))
    for row, expected in zip(mesh.devices, (range(4), range(4, 8)), strict=True):
        shards = {shard.device: shard.data for shard in labels.addressable_shards}
        for device in row:
            np.testing.assert_array_equal(shards[device], expected)


def test_to_every_device_copies_to_all():
    mesh = sharding.create_mesh()
    tree = {"image": np.arange(6, dtype=np.uint8).reshape(2, 3), "label": np.arange(3)}
    for name, leaf in sharding.to_every_device(tree, mesh).items():
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 4
        np.testing.assert_array_equal(leaf, tree[name])
        assert leaf.dtype == jnp.asarray(tree[name]).dtype


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

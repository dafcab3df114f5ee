import math
import shutil
import subprocess
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnzoom_jax.training import checksum, sharding
from attnzoom_jax.training.checkpoint import LATE_FILES, Checkpoints, check_same_tree
from attnzoom_jax.training.state import create_state, init_variables


class Net(nn.Module):
    features: int = 4
    normed: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), name="conv")(x)
        if self.normed:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def mesh_of(devices):
    return sharding.create_mesh(jax.devices()[:devices])


def create(model: Any = None, *, devices=1, use_ema=False, seed=0, optimizer: Any = None):
    return create_state(
        model or Net(),
        optimizer or optax.adam(1e-3),
        image_shape=(4, 4, 3),
        seed=seed,
        mesh=mesh_of(devices),
        use_ema=use_ema,
    )


def save(folder, metrics: dict[int, float], **options):
    """Checkpoints with one metric each; `m` decides which is the best."""
    checkpoints = Checkpoints(folder, **{"best_metric": "m", **options})
    state = create()
    for step, value in metrics.items():
        checkpoints.save(step, state.replace(step=jnp.int32(step)), {"m": value})
    checkpoints.wait()
    return checkpoints


def tree_of(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("mode", "keep", "metrics", "steps", "best"),
    [
        ("max", 2, {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.3}, [2, 3, 4], 2),
        ("min", 2, {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.3}, [1, 3, 4], 1),
        ("max", 1, {1: 0.1, 2: 0.2, 3: 0.3}, [3], 3),
        ("max", 1, {1: 0.3, 2: math.nan, 3: 0.2}, [1, 3], 1),
        ("min", 1, {1: 0.3, 2: math.nan, 3: 0.4}, [1, 3], 1),
    ],
)
def test_the_last_ones_and_the_best_one_stay(tmp_path, mode, keep, metrics, steps, best):
    checkpoints = save(tmp_path, metrics, best_mode=mode, keep=keep)
    for again in (checkpoints, Checkpoints(tmp_path, best_metric="m", best_mode=mode)):
        assert again.steps() == steps
        assert again.last_step() == again.find("last") == steps[-1]
        assert again.find("best") == best
        assert again.find(str(steps[0])) == steps[0]
        again.close()


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(tmp_path):
    checkpoints = save(tmp_path, {2: 0.1, 4: 0.2})
    for wrong in ("3", "newest", "-4", ""):
        with pytest.raises(ValueError, match=r"no checkpoint '.*; there is: last, best, 2, 4"):
            checkpoints.find(wrong)
    checkpoints.close()
    without_metric = Checkpoints(tmp_path, read_only=True)
    assert without_metric.find("best") == 4  # no metric decides: the last one
    empty = Checkpoints(tmp_path / "none", best_metric="m", read_only=True)
    assert empty.last_step() is None
    with pytest.raises(ValueError, match=r"no checkpoint in .*none; train first"):
        empty.find("best")


def test_a_state_comes_back_bit_for_bit_on_any_number_of_devices(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = create(devices=4, use_ema=True, seed=1)
    state = state.replace(step=jnp.int32(5))
    checkpoints.save(5, state)
    checkpoints.wait()
    for devices in (4, 2, 1):
        like = create(devices=devices, use_ema=True, seed=2)
        restored = checkpoints.restore(5, like, mesh=mesh_of(devices))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        for leaf, before in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            assert leaf.dtype == before.dtype
            assert leaf.sharding.is_fully_replicated
            assert len(leaf.sharding.device_set) == devices
    checkpoints.close()


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("use_ema", [True, False])
def test_variables_are_the_averaged_ones_where_there_are_such(tmp_path, normed, use_ema):
    model = Net(normed=normed)
    state = create(model, use_ema=use_ema, optimizer=optax.sgd(0.1, momentum=0.9))
    state = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    # Whatever the optimiser was: only the shapes of the variables are asked for.
    like = jax.eval_shape(lambda: init_variables(model, (4, 4, 3), 0))
    variables = checkpoints.restore_variables(1, like=like, mesh=mesh_of(2))
    jax.tree.map(np.testing.assert_array_equal, variables, state.variables())
    images = jnp.ones((1, 4, 4, 3))
    np.testing.assert_array_equal(
        model.apply(variables, images, train=False),
        model.apply(state.variables(), images, train=False),
    )
    checkpoints.close()


def test_a_checkpoint_of_another_model_lists_both_sides(tmp_path):
    checkpoints = save(tmp_path, {3: 0.5})
    expected = [
        "checkpoint 3 in ",
        "- params/conv/kernel [3, 3, 3, 4]",
        "+ params/conv/kernel [3, 3, 3, 8]",
    ]
    other = create(Net(features=8))
    with pytest.raises(ValueError) as error:
        checkpoints.restore(3, other, mesh=mesh_of(1))
    assert "... and " in str(error.value)  # the moments of Adam differ as well
    like = jax.eval_shape(lambda: init_variables(Net(features=8), (4, 4, 3), 0))
    with pytest.raises(ValueError) as error:
        checkpoints.restore_variables(3, like=like, mesh=mesh_of(1))
    for line in expected:
        assert line in str(error.value)
    like = jax.eval_shape(lambda: init_variables(Net(normed=False), (4, 4, 3), 0))
    with pytest.raises(ValueError) as error:
        checkpoints.restore_variables(3, like=like, mesh=mesh_of(1))
    assert str(error.value).count("\n  - ") == 4 and "\n  + " not in str(error.value)
    checkpoints.close()


def test_equal_trees_pass_whatever_holds_them():
    tree = {"a": [np.zeros((2, 3)), None], "b": {}}
    check_same_tree(saved=tree, expected=jax.tree.map(jnp.asarray, tree), where="x")
    with pytest.raises(ValueError, match=r"- a/0 \[2, 3\]\n  \+ a/0 \[3, 2\]"):
        check_same_tree(saved=tree, expected={"a": [np.zeros((3, 2))]}, where="x")


def test_what_a_killed_run_left_is_swept_and_nothing_else(tmp_path):
    save(tmp_path, {2: 0.1}).close()
    stale = tmp_path / "4.orbax-checkpoint-tmp"
    (stale / "inner").mkdir(parents=True)
    (stale / "inner" / "data").write_text("half")
    Checkpoints(tmp_path, read_only=True).close()
    assert stale.exists()
    checkpoints = save(tmp_path, {4: 0.2})
    assert not stale.exists() and checkpoints.steps() == [2, 4]
    checkpoints.close()


def test_reading_changes_nothing(tmp_path):
    save(tmp_path, {2: 0.1, 3: 0.2}).close()
    before = tree_of(tmp_path)
    reader = Checkpoints(tmp_path, best_metric="m", keep=1, read_only=True)
    reader.restore(reader.find("best"), create(), mesh=mesh_of(1))
    reader.close()
    assert tree_of(tmp_path) == before
    Checkpoints(tmp_path / "new", read_only=True).close()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["emptied", "removed"])
def test_a_damaged_checkpoint_is_named_with_the_others(tmp_path, damage):
    save(tmp_path, {1: 0.1, 2: 0.2}).close()
    for path in (tmp_path / "2" / "default").rglob("*"):
        if path.is_file():
            path.unlink() if damage == "removed" else path.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, best_metric="m", read_only=True)
    with pytest.raises(ValueError, match=r"checkpoint 2 in .* cannot be read .* there is: 1"):
        checkpoints.restore(2, like=create(), mesh=mesh_of(1))
    assert int(checkpoints.restore(1, like=create(), mesh=mesh_of(1)).step) == 1
    checkpoints.close()


def flip_bits(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_any_file_that_is_read_is_found(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.2}).close()
    newest = tmp_path / "2"
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    watched = [path for path in files if path.relative_to(newest).as_posix() not in LATE_FILES]
    assert len(watched) >= 8
    for file in watched:
        before = file.read_bytes()
        flip_bits(file)
        with pytest.raises(ValueError, match=r"checkpoint 2 in .* cannot be read .* there is: 1"):
            reader = Checkpoints(tmp_path, best_metric="m", read_only=True)
            reader.restore(2, like=create(), mesh=mesh_of(1))
        file.write_bytes(before)
    # What is left out of the checksums changes nothing.
    for file in set(files) - set(watched):
        file.write_bytes(b"")
    reader = Checkpoints(tmp_path, best_metric="m", read_only=True)
    jax.tree.map(
        np.testing.assert_array_equal,
        reader.restore(2, like=create(), mesh=mesh_of(1)).params,
        create().params,
    )
    assert reader.find("best") == 2
    reader.close()


def test_the_checksums_are_those_of_coreutils(tmp_path):
    save(tmp_path, {1: 0.1}).close()
    command = ["sha256sum", "--check", "--quiet", checksum.NAME]
    assert subprocess.run(command, cwd=tmp_path / "1", capture_output=True).returncode == 0
    flip_bits(next(tmp_path.rglob("manifest.ocdbt")))
    assert subprocess.run(command, cwd=tmp_path / "1", capture_output=True).returncode == 1


def test_a_checkpoint_without_checksums_is_taken_as_it_is(tmp_path):
    save(tmp_path, {1: 0.1}).close()
    (tmp_path / "1" / checksum.NAME).unlink()
    checkpoints = Checkpoints(tmp_path, best_metric="m")
    assert int(checkpoints.restore(1, like=create(), mesh=mesh_of(1)).step) == 1
    checkpoints.close()


def test_a_line_of_the_log_comes_back_as_it_was(tmp_path):
    line = {"loss": jnp.float32(0.1), "steps": jnp.int32(3), "bad_step": jnp.int32(2**31 - 1)}
    checkpoints = Checkpoints(tmp_path)
    for step, of in ((1, line), (2, None), (3, line)):
        checkpoints.save(step, create(), line=of)
    checkpoints.wait()
    assert checkpoints.line(2) is None and checkpoints.line(9) is None
    back = checkpoints.line(3)
    assert back is not None and back.keys() == line.keys()
    for name, value in line.items():
        assert back[name] == value and back[name].dtype == value.dtype
    checkpoints.close()


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    checkpoints = save(tmp_path / "run", {1: 0.1})
    with monkeypatch.context() as few:
        few.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
        with pytest.raises(ValueError, match=r"written into .* \(No space .*; the last .* step 1,"):
            checkpoints.save(2, create())
    state = create().replace(step=jnp.int32(3))

    def fail():
        raise OSError("Input/output error")

    monkeypatch.setattr(checksum, "write_sums", lambda *args, **options: fail())
    checkpoints.save(3, state, {"m": 0.2})
    with pytest.raises(ValueError, match=r"written into .* \(Input/output error\); the last one"):
        checkpoints.close()
    monkeypatch.undo()
    again = Checkpoints(tmp_path / "run", best_metric="m")
    assert again.steps() == [1]
    again.save(3, state, {"m": 0.2})
    again.close()
    assert (tmp_path / "run" / "3" / checksum.NAME).exists()

"""tools/compile.py: what it says of a step that is not run, on CPU devices and for TPUs."""

import importlib.util
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import pytest

from attnzoom_jax.training import sharding
from attnzoom_jax.training.experiment import create_experiment
from configs import demo

ROOT = pathlib.Path(__file__).parent.parent.parent
SPEC = importlib.util.spec_from_file_location("compile", ROOT / "tools" / "compile.py")
assert SPEC is not None and SPEC.loader is not None
tool: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v2-8", "v2:2x2"),
        ("v3-32", "v3:4x4"),
        ("v4-8", "v4:2x2x1"),
        ("v4-16", "v4:2x2x2"),
        ("v4-32", "v4:2x2x4"),
        ("v5e-1", "v5e:1x1"),
        ("v5e-8", "v5e:2x4"),
        ("v5e-16", "v5e:4x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5p-64", "v5p:2x4x4"),
        ("v6e-256", "v6e:16x16"),
        ("v5e:2x8", "v5e:2x8"),
    ],
)
def test_slices_have_the_grid_that_they_are_rented_with(name, expected):
    assert tool.topology_name(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5f-16", "unknown TPU in --topology 'v5f'; did you mean"),
        ("v5e-12", "expected a slice such as v5e-4, v5e-8, v5e-16"),
        ("v4-4", "expected a slice such as v4-8, v4-16, v4-32"),
        ("v5e", "expected a slice such as"),
    ],
)
def test_slices_that_there_are_not(name, message):
    with pytest.raises(ValueError, match=message):
        tool.topology_name(name)


HLO = """
  %a = f32[64,3]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add
  %b = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%x, %y), channel_id=2
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}
  %d = f32[32]{0} all-gather-done(%s)
  %n = f32[64]{0} fusion(%all-reduce.5), kind=kLoop
  %c = pred[]{:T(512)} all-reduce(%q), channel_id=3
"""


def test_collectives_are_counted_once_and_by_what_they_return():
    found = tool.collectives(HLO)
    assert found == {
        "all-reduce": (3, 4 * 64 * 3 + 4 * 8 + 2 * 8 + 1),
        "all-gather": (1, 4 * 32),
    }


def config(**changes) -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,), "insert": {}}
    base.optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}
    base.update_from_flattened_dict(changes)
    return base


def compiled(**changes):
    settings = config(**changes)
    mesh = sharding.create_mesh(shape=settings.mesh)
    program, state = tool.compile_step(settings, create_experiment(settings), mesh)
    return program, state, mesh


def test_memory_and_communication_of_four_devices():
    program, state, _ = compiled()
    params = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    sizes = tool.memory(program)
    images = 4 * (32 * 32 * 3 + 4)  # a quarter of the batch of 16
    assert held + images <= sizes["arguments"] <= held + images + 8192  # each rounded up
    assert sizes["in place"] >= held and sizes["temporary"] > 0
    assert sizes["peak"] == (
        sizes["arguments"] + sizes["outputs"] - sizes["in place"] + sizes["temporary"]
    )
    # The gradients at the least; besides, the statistics of the norms and the metrics.
    count, size = tool.collectives(program.as_text())["all-reduce"]
    assert count >= 1 and params <= size <= 2 * params
    text, fits = tool.report(program, state, jax.devices(), 1.0)
    assert fits and "fits into 1 GiB: the peak is" in text
    count = len(jax.tree.leaves(state.params))
    assert re.search(rf"whole on every device: {count} arrays, .* MiB, .* MiB on each", text)
    assert "stage*/block*/conv*/kernel (2)" in text
    text, fits = tool.report(program, state, jax.devices(), 1e-6)
    assert not fits and "DOES NOT FIT into 1e-06 GiB" in text


def test_parameters_that_a_rule_splits():
    rules = (("head/kernel", (None, "model")),)
    program, state, _ = compiled(**{"mesh.model": 2, "sharding": rules})
    lines = tool.parameter_lines(state.params)
    place = lines.index("    head/kernel (1)")
    assert lines[place - 1].startswith("  split (None, 'model'): 1 arrays, ")
    # The program takes the kernel as it is split.
    (head,) = (
        at
        for keys, at in jax.tree_util.tree_leaves_with_path(program.input_shardings[0][0].params)
        if sharding.path_of(keys) == "head/kernel"
    )
    assert head.shard_shape((4, 16)) == (4, 8)


def test_a_split_on_the_device_is_an_argument():
    sizes = tool.memory(compiled(**{"data.cache": "device", "data.steps_per_call": 3})[0])
    examples = len(create_experiment(config()).source)
    assert sizes["arguments"] >= examples * 32 * 32 * 3


def run(*arguments):
    command = [sys.executable, "tools/compile.py", "--config=configs/demo.py:tiny", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_programme_says_whether_it_fits():
    process = run("--devices=2", "--memory_gib=0.0001", "--config.model.name=resnet10")
    assert (process.returncode, process.stderr) == (1, "")
    assert "for 2 x cpu (fake devices), {'data': 2, 'model': 1} ..." in process.stdout
    assert process.stdout.splitlines()[-1].startswith("DOES NOT FIT into 0.0001 GiB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --topology=v5e-16 and --devices=8"),
        (["--topology=v5e-8", "--devices=8"], "give one of"),
        (["--devices=3"], "data.batch_size=16 cannot be split over 3 devices"),
        (["--devices=2", "--image_size=a,b"], "--image_size=a,b: expected H,W"),
        pytest.param(
            ["--topology=v5e-8"],
            "--topology=v5e-8 needs the compiler in libtpu",
            marks=pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed"),
        ),
    ],
    ids=["neither", "both", "batch", "size", "no libtpu"],
)
def test_what_is_wrong_is_one_line(arguments, message):
    process = run(*arguments)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and message in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="the compiler for TPUs, libtpu, is not installed")
def test_a_topology_that_is_not_here():
    process = run("--topology=v5e-8")
    assert process.returncode == 0, process.stderr
    assert "for 8 x TPU v5 lite (v5e-8)" in process.stdout and "TFLOP/s" in process.stdout
    assert process.stdout.splitlines()[-1].startswith("fits into 16 GiB")

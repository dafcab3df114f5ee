"""XLA's count of a training step, and the peaks of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attnzoom_jax.training import flops


@dataclasses.dataclass
class Device:
    device_kind: str


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v2", 23),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
    ],
)
def test_peaks_are_found_by_the_name_that_jax_gives(kind, teraflops):
    assert flops.peak_flops([Device(kind)] * 3) == 3 * teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA RTX A1000", "TPU7x", "TPU v12"])
def test_a_device_that_nobody_wrote_down_has_no_peak(kind):
    assert flops.peak_flops([Device(kind)]) is None


def loss(kernel, images):
    return jnp.square(jax.lax.conv(images, kernel, (1, 1), "VALID")).sum()


KERNEL, IMAGES = jnp.ones((8, 3, 3, 3)), jnp.ones((2, 3, 16, 16))
# Forward, and the gradient of the kernel: a multiply-add for each output pixel and tap.
CONVOLUTIONS = 2 * (2 * 2 * 14 * 14 * 8 * 27)


def test_the_count_is_that_of_a_count_by_hand():
    found = flops.count_flops(jax.jit(jax.grad(loss)), KERNEL, IMAGES)
    assert found == pytest.approx(CONVOLUTIONS, rel=0.1)  # the square and its gradient besides


def test_devices_whose_own_compiler_does_not_count_count_the_same(monkeypatch):
    step = jax.jit(jax.grad(loss))
    expected = flops.count_flops(step, KERNEL, IMAGES)

    def cost_analysis(self):
        raise NotImplementedError("as for every plugin")

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", cost_analysis)
    assert flops.count_flops(step, KERNEL, IMAGES) == expected


def test_the_count_is_of_all_devices_together():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images = jnp.ones((8, 3, 16, 16))
    one = flops.count_flops(jax.jit(jax.grad(loss)), KERNEL, images)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(jax.grad(loss), in_shardings=(whole, split))
    four = flops.count_flops(step, jax.device_put(KERNEL, whole), jax.device_put(images, split))
    assert four == one > 0


def test_counting_compiles_nothing_and_traces_once():
    traced = []

    def counted(x):
        traced.append(1)
        return x @ x

    step, x = jax.jit(counted), jnp.ones((8, 8))
    flops.count_flops(step, x)
    step(x)
    assert traced == [1]

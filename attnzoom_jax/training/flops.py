"""What share of a device's arithmetic a training step uses: XLA's count over the device's peak.

    MFU = FLOPs of a step * steps per second / (peak FLOP/s of a device * number of devices)

The count is that of the program as JAX hands it to XLA, for all devices together: augmentation,
forward, backward, update, and what `remat` computes again. A multiply-add is two, the body of an
inner loop counts once. Counted before XLA compiles, it is the same on every kind of device, and
needs no further compilation; what a GPU's libraries compute, XLA does not count afterwards.

Source of the term: Chowdhery et al., "PaLM", 2022, appendix B.
"""

from collections.abc import Iterable
from typing import Any

import jax

# Part of `device_kind`, the longer one first: dense bfloat16 FLOP/s of a device as JAX counts them
# (a core of TPU v2 and v3, else a chip), by the makers' data sheets; of V100 and T4 float16.
PEAKS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 137e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,  # GH200 too
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(devices: Iterable[Any]) -> float | None:
    """FLOP/s that devices of one kind can do together; None for a kind that PEAKS does not have."""
    kinds = [device.device_kind for device in devices]
    kind = kinds[0]
    # "L40" is no L4: the name ends where the part does, or goes on with something else.
    found = (name for name in PEAKS if name in kind and not _goes_on(kind, name))
    name = next(found, None)
    return None if name is None else PEAKS[name] * len(kinds)


def _goes_on(kind: str, name: str) -> bool:
    """Whether the number at the end of a name is only the beginning of the one in `kind`."""
    rest = kind.partition(name)[2]
    return name[-1].isdigit() and rest[:1].isdigit()


def count_flops(program: Any, *arguments: Any) -> float | None:
    """FLOPs of a jitted function for these arguments; None where XLA does not say.

    The function is traced and lowered here, and that is what its first call then compiles.
    """
    lowered = program.lower(*arguments)
    try:
        costs = lowered.cost_analysis()
    except NotImplementedError:  # as of all devices that come as a plugin, GPUs and TPUs
        costs = _analysed_by_cpu(lowered)
    return costs.get("flops") if costs else None


def _analysed_by_cpu(lowered: Any) -> dict[str, float] | None:
    try:
        # Nothing public takes another client.
        from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

        client = jax.devices("cpu")[0].client
        return _jax.hlo_module_cost_analysis(client, lowered.compiler_ir("hlo").as_hlo_module())
    except (ImportError, AttributeError, RuntimeError):  # a newer JAX, or $JAX_PLATFORMS is "cuda"
        return None

"""Times the zoom of AttentionZoom: the package's polyphase sum, a dilated convolution, and torch.

    python benchmarks/zoom.py                                  # 1.5 minutes on two CPU cores
    python benchmarks/zoom.py --out=results/bench/zoom.json    # and write what was measured

All compute the same (checked before timing): factor 2, 3x3 kernel, depthwise and full. Forward is
one call; forward+backward returns the output and the gradients of input and kernel. The forms take
turns, so that a busy machine slows all; times are medians and the fastest, after a warm-up call,
with compilation apart. The package uses the polyphase sum; where the ratio to dilation falls below
1 on some device, dilation is the better form there. Where torch is installed, its transposed
convolution joins in, on the CPU only, eager, in channels_last memory, on as many threads.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import compiled, machine, take_turns

from attnzoom_jax.ops.zoom import zoom_conv

SHAPES = ((64, 32, 32, 16), (32, 32, 32, 64))
KINDS = ("depthwise", "full")
FACTOR, KERNEL = 2, 3


def dilated(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """The zoom through XLA's input dilation."""
    centre = (KERNEL - 1) // 2
    pad = (centre, KERNEL - 1 - centre + FACTOR - 1)
    return lax.conv_general_dilated(
        features,
        kernel,
        (1, 1),
        (pad, pad),
        lhs_dilation=(FACTOR, FACTOR),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=features.shape[-1] if kernel.shape[2] == 1 else 1,
    )


def polyphase(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """The package's form."""
    return zoom_conv(features, kernel, factor=FACTOR)


def forward_backward(form):
    """The output, and the gradients of input and kernel."""

    def run(features, kernel, cotangent):
        out, pull = jax.vjp(form, features, kernel)
        return out, pull(cotangent)

    return run


def torch_calls(features: Any, kernel: Any, cotangent: Any) -> dict[str, Callable[[], Any]]:
    """{pass: call} of torch on the same numbers; a call returns arrays in torch's layouts."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(machine()["threads"])

    def pixels(values):
        tensor = torch.tensor(np.asarray(values)).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=torch.channels_last)

    x, weights = pixels(features).requires_grad_(), pixels(cotangent)
    # [in, out / groups, h, w]; a transposed convolution reads its kernel backwards.
    flipped = np.asarray(kernel)[::-1, ::-1]
    groups = features.shape[-1] if kernel.shape[2] == 1 else 1
    order = (3, 2, 0, 1) if groups > 1 else (2, 3, 0, 1)
    w = torch.tensor(flipped.transpose(order).copy(), requires_grad=True)
    options = {"stride": FACTOR, "padding": 1, "output_padding": 1, "groups": groups}

    def run():
        with torch.no_grad():
            return torch.nn.functional.conv_transpose2d(x, w, **options)

    def run_back():
        x.grad = w.grad = None
        out = torch.nn.functional.conv_transpose2d(x, w, **options)
        out.backward(weights)
        return out.detach(), x.grad, w.grad

    return {"forward": run, "forward+backward": run_back}


def check_torch(ours: Any, theirs: Any, kernel: Any) -> None:
    """Stop if torch computes something else."""
    out, (by_features, by_kernel) = ours
    order = (2, 3, 1, 0) if kernel.shape[2] == 1 else (2, 3, 0, 1)
    pairs = (
        (out, np.asarray(theirs[0]).transpose(0, 2, 3, 1)),
        (by_features, np.asarray(theirs[1]).transpose(0, 2, 3, 1)),
        (by_kernel, np.asarray(theirs[2]).transpose(order)[::-1, ::-1]),
    )
    for found, wanted in pairs:
        difference = float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())
        if not difference < 1e-4:
            raise SystemExit(f"torch differs by {difference} of the largest value")


def ratio(times: dict[str, list[float]], peer: str) -> float | None:
    """The peer's time over the package's, the median over the rounds; None without that peer."""
    if peer not in times:
        return None
    pairs = zip(times[peer], times["polyphase"], strict=True)
    return round(statistics.median(theirs / ours for theirs, ours in pairs), 2)


def main() -> None:
    """Measures, prints a table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="aimed at per line, 5 rounds min"
    )
    args = parser.parse_args()

    where = machine()
    print(
        f"{where['system']}, {where['cpu']}, {where['cpu_count']} cores, {where['threads']} threads"
        f" for XLA, load {where['load_at_start']}; device {where['device']} ({where['platform']}),"
        f" jax {where['jax']}, {args.dtype}"
    )
    has_torch = importlib.util.find_spec("torch") and where["platform"] == "cpu"
    has_torch = bool(has_torch) and args.dtype == "float32"
    names = ["polyphase", "dilated", *(["torch"] if has_torch else [])]
    print(f"{'median ms (fastest ms)':47}" + "".join(f"{name:>18}" for name in names))
    rows = []
    for shape in SHAPES:
        for kind in KINDS:
            n, h, w, c = shape
            keys = jax.random.split(jax.random.key(0), 3)
            features = jax.random.normal(keys[0], shape, args.dtype)
            taps = (KERNEL, KERNEL, 1 if kind == "depthwise" else c, c)
            kernel = jax.random.normal(keys[1], taps, args.dtype) / taps[2] ** 0.5
            cotangent = jax.random.normal(keys[2], (n, FACTOR * h, FACTOR * w, c), args.dtype)
            difference = jnp.abs(polyphase(features, kernel) - dilated(features, kernel)).max()
            if not difference < (1e-4 if args.dtype == "float32" else 0.2):
                raise SystemExit(f"the two forms differ by {difference} at {shape}, {kind}")
            peers = torch_calls(features, kernel, cotangent) if has_torch else {}
            forms = {"polyphase": polyphase, "dilated": dilated}
            both = {name: forward_backward(form) for name, form in forms.items()}
            if has_torch:
                ours = both["polyphase"](features, kernel, cotangent)
                check_torch(ours, peers["forward+backward"](), kernel)
            for name, functions, arguments in (
                ("forward", forms, (features, kernel)),
                ("forward+backward", both, (features, kernel, cotangent)),
            ):
                built = {form: compiled(f, arguments) for form, f in functions.items()}
                calls = {form: call for form, (call, _) in built.items()}
                calls |= {"torch": peers[name]} if has_torch else {}
                times = take_turns(calls, seconds=args.seconds)
                row: dict[str, Any] = {"shape": shape, "kernel": kind, "pass": name}
                row["dilated_to_polyphase"] = ratio(times, "dilated")
                row["torch_to_polyphase"] = ratio(times, "torch")
                for form, values in times.items():
                    row[form] = {
                        **(built[form][1] if form in built else {}),
                        "median_ms": round(1e3 * statistics.median(values), 3),
                        "fastest_ms": round(1e3 * min(values), 3),
                        "rounds": len(values),
                    }
                rows.append(row)
                cells = [f"{row[f]['median_ms']:.1f} ({row[f]['fastest_ms']:.1f})" for f in times]
                size = "x".join(map(str, shape))
                line = f"{size:18}{kind:11}{name:18}" + "".join(f"{cell:>18}" for cell in cells)
                print(line, flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"factor": FACTOR, "kernel_size": KERNEL, "dtype": args.dtype}
        if has_torch:
            where["torch"] = importlib.metadata.version("torch")
        report = {"benchmark": "zoom", "machine": where, **settings, "rows": rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

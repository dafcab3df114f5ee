"""Times the zoom of AttentionZoom: the package's polyphase sum against a convolution with dilation.

    python benchmarks/zoom.py                                  # 1.5 minutes on two CPU cores
    python benchmarks/zoom.py --out=results/bench/zoom.json    # and write what was measured

Both forms compute the same (checked before timing): factor 2, 3x3 kernel, depthwise and full.
Forward is one call; forward+backward returns the output and the gradients of input and kernel.
The two forms take turns, so that a busy machine slows both; times are medians and the fastest,
after a warm-up call, with compilation apart. The package uses the polyphase sum; where the last
column falls below 1 on some device, dilation is the better form there.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

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


def measure(functions: dict, arguments: tuple, *, seconds: float) -> dict:
    """Compile and run times per form; forms take turns, 3 to 30 rounds within `seconds`."""
    compiled, times = {}, {}
    for name, function in functions.items():
        start = time.perf_counter()
        run = jax.jit(function).lower(*arguments).compile()
        compile_s = time.perf_counter() - start
        jax.block_until_ready(run(*arguments))
        compiled[name], times[name] = (run, compile_s), []
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or (rounds < 30 and time.perf_counter() < end):
        for name, (run, _) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {
        name: {
            "compile_s": round(compile_s, 3),
            "median_ms": round(1e3 * statistics.median(times[name]), 3),
            "fastest_ms": round(1e3 * min(times[name]), 3),
            "temporary_mb": round(run.memory_analysis().temp_size_in_bytes / 2**20, 1),
            "rounds": rounds,
        }
        for name, (run, compile_s) in compiled.items()
    }


def machine() -> dict:
    """What the figures belong to."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cpu_count": os.cpu_count(),
        "threads": usable,
        "load_at_start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def main() -> None:
    """Measures, prints a table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="aimed at per line, 3 rounds min"
    )
    args = parser.parse_args()

    where = machine()
    print(
        f"{where['system']}, {where['cpu']}, {where['cpu_count']} cores, {where['threads']} threads"
        f" for XLA, load {where['load_at_start']}; device {where['device']} ({where['platform']}),"
        f" jax {where['jax']}, {args.dtype}"
    )
    print(f"{'median ms (fastest ms)':47}{'polyphase':>18}{'dilation':>18}{'ratio':>9}")
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
            forms = {"polyphase": polyphase, "dilated": dilated}
            both = {name: forward_backward(form) for name, form in forms.items()}
            for name, functions, arguments in (
                ("forward", forms, (features, kernel)),
                ("forward+backward", both, (features, kernel, cotangent)),
            ):
                timed = measure(functions, arguments, seconds=args.seconds)
                ratio = timed["dilated"]["median_ms"] / timed["polyphase"]["median_ms"]
                rows.append(
                    {"shape": shape, "kernel": kind, "pass": name, "ratio": round(ratio, 2)}
                )
                rows[-1].update(timed)
                cells = [
                    f"{t['median_ms']:.1f} ({t['fastest_ms']:.1f})"
                    for t in (timed["polyphase"], timed["dilated"])
                ]
                size = "x".join(map(str, shape))
                print(
                    f"{size:18}{kind:11}{name:18}{cells[0]:>18}{cells[1]:>18}{ratio:9.1f}",
                    flush=True,
                )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"factor": FACTOR, "kernel_size": KERNEL, "dtype": args.dtype}
        report = {"benchmark": "zoom", "machine": where, **settings, "rows": rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

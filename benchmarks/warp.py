"""Times bilinear sampling at the places of a grid: the package's three ways, and torch's.

    python benchmarks/warp.py                                  # 2 minutes on two CPU cores
    python benchmarks/warp.py --out=results/bench/warp.json    # and write what was measured

The grids are those of a warp: `saliency_grid` and `separable_grid` of random saliency, each image
its own. Forward is one call; forward+backward returns the output and the gradients of images and
grid. All calls take turns, with a pause between them, on the first --threads processors (2): times
are medians and the fastest, after a warm-up call, with compilation apart. Where torch is installed,
its grid_sample joins in, on the CPU only, eager, with border padding and aligned corners, which is
the same function; results and gradients are compared before timing. It takes a dense grid always,
and is timed in both memory layouts.

The ratio is `impl="auto"` over torch in the layout of the lower median: the median over the rounds
of the ratio of two calls of the same round. Target: 1.0 at most, forward+backward, at the first
shape.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import compiled, machine, take_turns

from attnzoom_jax.ops.warp import dense_grid, saliency_grid, sample, separable_grid

SHAPES = ((32, 64, 64, 64), (64, 64, 64, 3), (256, 32, 32, 16))
IMPLS = {"dense": ("gather", "loop"), "separable": ("gather", "loop", "matmul")}


def forward(impl: str) -> Callable[..., Any]:
    """(images, grid, cotangent) -> the output."""
    return lambda images, grid, _: sample(images, grid, impl=impl)


def forward_backward(impl: str) -> Callable[..., Any]:
    """(images, grid, cotangent) -> the output and the gradients of images and grid."""

    def run(images, grid, cotangent):
        out, pull = jax.vjp(functools.partial(sample, impl=impl), images, grid)
        return out, pull(cotangent)

    return run


def torch_calls(images, grid, cotangent, *, threads: int) -> dict[str, dict[str, Callable]]:
    """{pass: {layout: call}} of torch on the same numbers; a call returns NumPy arrays as ours."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    h, w = images.shape[1:3]
    # x before y, the first pixel's centre at -1 and the last one's at 1.
    scaled = np.asarray(dense_grid(grid))[..., ::-1] / [(w - 1) / 2, (h - 1) / 2] - 1
    places = torch.tensor(scaled.astype(np.float32), requires_grad=True)
    function = functools.partial(
        torch.nn.functional.grid_sample,
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    calls: dict[str, dict[str, Callable]] = {"forward": {}, "forward+backward": {}}
    for layout in ("torch", "torch, channels_last"):
        memory = torch.channels_last if "last" in layout else torch.contiguous_format
        pictures, weights = (
            torch.tensor(np.asarray(values)).permute(0, 3, 1, 2).contiguous(memory_format=memory)
            for values in (images, cotangent)
        )
        pictures.requires_grad_()

        def run(pictures=pictures):
            with torch.no_grad():
                return function(pictures, places)

        def run_back(pictures=pictures, weights=weights):
            pictures.grad = places.grad = None
            out = function(pictures, places)
            out.backward(weights)
            return out.detach(), pictures.grad, places.grad

        calls["forward"][layout], calls["forward+backward"][layout] = run, run_back
    return calls


def check_torch(ours: Any, theirs: Any, grid: Any, size: tuple[int, int]) -> None:
    """Stop if torch computes something else."""
    out, (by_images, by_grid) = ours
    if isinstance(grid, tuple):
        _, pull = jax.vjp(lambda *lines: dense_grid(lines), *grid)
    to_pixels = 2 / (np.array([size[1], size[0]]) - 1)
    places = np.asarray(theirs[2]) * to_pixels  # by x, by y, per pixel
    in_pixels = jnp.asarray(places[..., ::-1])
    expected = pull(in_pixels) if isinstance(grid, tuple) else in_pixels
    pairs = [
        (out, np.asarray(theirs[0]).transpose(0, 2, 3, 1)),
        (by_images, np.asarray(theirs[1]).transpose(0, 2, 3, 1)),
        *zip(jax.tree.leaves(by_grid), jax.tree.leaves(expected), strict=True),
    ]
    for found, wanted in pairs:
        difference = float(jnp.abs(found - wanted).max() / (jnp.abs(wanted).max() + 1e-6))
        if not difference < 1e-3:
            raise SystemExit(f"torch and sample differ by {difference} of the largest value")


def median_ms(times: list[float]) -> float:
    """In milliseconds."""
    return round(1e3 * statistics.median(times), 3)


def main() -> None:
    """Measures, prints a table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2, help="processors to run on")
    parser.add_argument("--seconds", type=float, default=8.0, help="aimed at per line")
    args = parser.parse_args()

    if hasattr(os, "sched_setaffinity"):  # before JAX counts the processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    where = machine()
    has_torch = where["platform"] == "cpu" and importlib.util.find_spec("torch") is not None
    if has_torch:
        where["torch"] = importlib.metadata.version("torch")
    print(
        f"{where['system']}, {where['cpu']}, {where['cpu_count']} cores, {where['threads']} threads"
        f", load {where['load_at_start']}; device {where['device']} ({where['platform']}), jax"
        f" {where['jax']}, torch {where.get('torch', 'not installed')}"
    )
    rows = []
    for shape in SHAPES:
        n, h, w, _ = shape
        keys = jax.random.split(jax.random.key(0), 3)
        images = jax.random.normal(keys[0], shape)
        cotangent = jax.random.normal(keys[1], shape)
        saliency = jax.random.uniform(keys[2], (n, 31, 31)) ** 8
        grids = {
            "dense": saliency_grid(saliency, (h, w), fwhm=6.0),
            "separable": separable_grid(saliency, (h, w), max_zoom=4.0),
        }
        for kind, grid in grids.items():
            arguments = (images, grid, cotangent)
            torches: dict[str, dict[str, Callable]] = {}
            if has_torch:
                torches = torch_calls(*arguments, threads=where["threads"])
            for name, make in (("forward", forward), ("forward+backward", forward_backward)):
                calls, facts = {}, {}
                for impl in ("auto", *IMPLS[kind]):
                    calls[impl], facts[impl] = compiled(make(impl), arguments)
                calls.update(torches.get(name, {}))
                if name == "forward+backward" and has_torch:
                    for impl in IMPLS[kind]:
                        check_torch(calls[impl](), calls["torch"](), grid, (h, w))
                times = take_turns(calls, seconds=args.seconds)
                row: dict[str, Any] = {"shape": shape, "grid": kind, "pass": name}
                if has_torch:
                    best = min(torches[name], key=lambda layout: statistics.median(times[layout]))
                    pairs = zip(times["auto"], times[best], strict=True)
                    row["ratio"] = round(statistics.median(a / b for a, b in pairs), 2)
                row["rounds"] = len(times["auto"])
                for form, values in times.items():
                    row[form] = {
                        "median_ms": median_ms(values),
                        "fastest_ms": round(1e3 * min(values), 3),
                        **facts.get(form, {}),
                    }
                rows.append(row)
                cells = [f"{form} {median_ms(values):.1f}" for form, values in times.items()]
                size = "x".join(map(str, shape))
                print(f"{size} {kind} {name}, median ms: {', '.join(cells)}", flush=True)
                print(f"    auto / torch: {row.get('ratio', 'no torch')}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"benchmark": "warp", "machine": where, "dtype": "float32", "rows": rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

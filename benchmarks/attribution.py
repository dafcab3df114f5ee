"""Times maps against the forward pass that they explain: ResNet-50, 8 images of 224x224.

    python benchmarks/attribution.py                           # 3 minutes on two CPU cores
    python benchmarks/attribution.py --stream --out=results/bench/attribution.json
    python benchmarks/attribution.py --stream --rounds=0       # the stream alone, half a minute

Calls take turns, and a ratio is that of two calls of the same round: a busy machine slows both,
and the quartiles over the rounds tell how much it mattered. The weights are random (He et al. 2015)
and, as the images, arguments of every call. Compilation is apart; wall time is what a person waits
for, CPU time that of all threads of the process. Where torch is installed, plain PyTorch joins in,
on the CPU only: eager, the same weights, its logits and maps compared with ours before timing. We
divide by its forward pass in the layout channels_last, the faster one where we measured.

With --stream, 10,000 images of 64x64, made 100 at a time, go through one jitted map: the memory of
the process must level off and the programme be compiled once. That part runs first.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from timing import machine

from attnzoom_jax.attribution.cam import grad_cam
from attnzoom_jax.attribution.excitation import (
    contrastive_excitation_backprop,
    excitation_backprop,
)
from attnzoom_jax.attribution.gradient import gradient
from attnzoom_jax.models import bind, create_model
from attnzoom_jax.training.workdir import provenance

MODEL, STAGE_SIZES, SIZE, BATCH, CLASSES, CUED = "resnet50", (3, 4, 6, 3), 224, 8, 1000, 10
STREAM = {"model": "resnet10", "width": 16, "size": 64, "chunk": 100, "tap": "stage3"}
STREAM_IMAGES = (1_000, 10_000)
# Between these. The allocator's plateau moved by up to 82 in ten runs, with no trend over 40,000
# images; keeping the images alone would take 420.
GROWTH_MB = 128
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX records it once per compilation
CHANNELS_LAST = ", channels_last"
TORCH_BASE = "torch forward" + CHANNELS_LAST
PAUSE_S = 0.05  # threads of the call before look for work a while before they sleep

# Row: (the row it is divided by, at most), wall time on two threads.
TARGETS = {
    "excitation_backprop stage3": ("forward", 1.5),
    "contrastive_excitation_backprop stage3": ("forward", 1.6),
    "grad_cam stage4": ("forward", 1.05),
    "grad_cam stage4, ten classes": ("grad_cam stage4", 2.5),
}
ONE_CLASS = {
    "grad_cam stage4, ten classes": "grad_cam stage4",
    "contrastive_excitation_backprop stage3, ten classes": "contrastive_excitation_backprop stage3",
}

Times = dict[str, list[float]]  # ms per round


def he_variables(model: Any, images: np.ndarray, seed: int = 0) -> Any:
    """Variables of a model with He weights and neutral norms, without running its init."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "kernel":
            fan_in = int(np.prod(leaf.shape[:-1]))
            values = rng.normal(scale=(2 / fan_in) ** 0.5, size=leaf.shape)
        else:
            values = np.full(leaf.shape, path[-1].key in ("scale", "var"))
        return jax.device_put(values.astype(leaf.dtype))

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def own_calls(variables: Any, images: np.ndarray) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The package's calls on one batch: {name: (jitted function, its arguments)}."""
    model = create_model(MODEL, num_classes=CLASSES)
    one = jnp.arange(BATCH)
    ten = jnp.arange(CUED * BATCH).reshape(CUED, BATCH)  # [cued, n]

    def cam(fn, x, t):
        return grad_cam(fn, x, t, tap="stage4")

    def excitation(fn, x, t):
        return excitation_backprop(fn, x, t, tap="stage3")

    def contrast(fn, x, t):
        return contrastive_excitation_backprop(fn, x, t, tap="stage3")

    def for_each_class(method):
        return lambda fn, x, targets: jax.vmap(lambda t: method(fn, x, t))(targets)

    methods = {
        "forward": (lambda fn, x, _: fn(x), one),
        "excitation_backprop stage3": (excitation, one),
        "contrastive_excitation_backprop stage3": (contrast, one),
        "grad_cam stage4": (cam, one),
        "grad_cam stage4, ten classes": (for_each_class(cam), ten),
        "contrastive_excitation_backprop stage3, ten classes": (for_each_class(contrast), ten),
        "gradient": (gradient, one),
    }

    def jitted(method):
        return jax.jit(lambda v, x, t: method(bind(model, v, train=False), x, t))

    arrays = jnp.asarray(images)
    return {name: (jitted(method), (variables, arrays, t)) for name, (method, t) in methods.items()}


def torch_calls(variables: Any, images: np.ndarray, threads: int) -> dict[str, Callable[[], Any]]:
    """The forward pass and the Grad-CAM of plain PyTorch, in both of its memory layouts."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    classes = torch.arange(BATCH)[:, None]
    calls = {}
    for suffix, layout in (("", torch.contiguous_format), (CHANNELS_LAST, torch.channels_last)):
        features, head = torch_network(torch, variables, layout)
        pictures = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)

        def forward(features=features, head=head, pictures=pictures):
            with torch.inference_mode():
                return head(features(pictures))

        def cam(features=features, head=head, pictures=pictures):
            # The graph begins at layer4: less than hooks on the whole network would cost.
            with torch.no_grad():
                activations = features(pictures)
            activations.requires_grad_()
            score = head(activations).gather(1, classes).sum()
            (gradients,) = torch.autograd.grad(score, activations)
            with torch.no_grad():
                return (activations * gradients.mean(dim=(2, 3), keepdim=True)).sum(dim=1)

        calls |= {f"torch forward{suffix}": forward, f"torch grad_cam layer4{suffix}": cam}
    return calls


def torch_network(torch: Any, variables: Any, layout: Any) -> tuple[Callable, Callable]:
    """The same ResNet-50 with the same weights in PyTorch: up to its last map, and the head."""
    functional = torch.nn.functional
    weights = {}
    for collection in variables.values():
        for path, value in traverse_util.flatten_dict(collection, sep="/").items():
            array = np.asarray(value)
            axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]  # to [out, in, h, w]
            weight = torch.from_numpy(np.array(array.transpose(axes), order="C"))
            weights[path] = weight.contiguous(memory_format=layout) if array.ndim == 4 else weight

    def conv(x, path, stride=1):
        kernel = weights[f"{path}/kernel"]
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x, path):
        mean, var, scale, bias = (weights[f"{path}/{k}"] for k in ("mean", "var", "scale", "bias"))
        return functional.batch_norm(x, mean, var, scale, bias, eps=1e-5)

    def block(x, path, stride):
        y = functional.relu_(norm(conv(x, f"{path}/conv1"), f"{path}/norm1"))
        y = functional.relu_(norm(conv(y, f"{path}/conv2", stride), f"{path}/norm2"))
        y = norm(conv(y, f"{path}/conv3"), f"{path}/norm3")
        if f"{path}/shortcut_conv/kernel" in weights:
            x = norm(conv(x, f"{path}/shortcut_conv", stride), f"{path}/shortcut_norm")
        return functional.relu_(y.add_(x))

    def features(x):
        x = functional.relu_(norm(conv(x, "stem/conv1", 2), "stem/norm1"))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for stage, size in enumerate(STAGE_SIZES, start=1):
            for i in range(1, size + 1):
                x = block(x, f"stage{stage}/block{i}", 2 if stage > 1 and i == 1 else 1)
        return x

    def head(x):
        return functional.linear(x.mean(dim=(2, 3)), weights["head/kernel"], weights["head/bias"])

    return features, head


def check_alike(name: str, ours: Any, theirs: Any) -> None:
    """Stop where PyTorch computes something else: then the times would not compare."""
    ours, theirs = np.asarray(ours), theirs.numpy()
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    if not difference < 1e-3:
        raise SystemExit(f"{name} differs from ours by {difference:.1e} of the largest value")


def quartiles(values: list[float], digits: int) -> dict[str, float]:
    """Lower quartile, median and upper quartile."""
    cuts = np.percentile(values, (25, 50, 75)).round(digits).tolist()
    return dict(zip(("q1", "median", "q3"), cuts, strict=True))


def compile_calls(
    variables: Any, images: np.ndarray, threads: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, float]]]:
    """Every call ready to run, and what compiling ours took: {name: facts}."""
    calls, facts = {}, {}
    for name, (function, arguments) in own_calls(variables, images).items():
        start = time.perf_counter()
        run = function.lower(*arguments).compile()
        facts[name] = {
            "compile_s": round(time.perf_counter() - start, 2),
            "temporary_mb": round(run.memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
        calls[name] = lambda run=run, given=arguments: jax.block_until_ready(run(*given))
        if not np.isfinite(np.asarray(calls[name]())).all():
            raise SystemExit(f"{name} gives values that are not finite")
    if jax.default_backend() == "cpu" and importlib.util.find_spec("torch"):
        theirs = torch_calls(variables, images, threads)
        for name, call in theirs.items():
            own = "forward" if "forward" in name else "grad_cam stage4"
            check_alike(name, calls[own](), call())
        calls |= theirs
    return calls, facts


def time_calls(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[Times, Times]:
    """Wall and CPU time in ms of every call in every round; each round begins with another one."""
    wall: Times = {name: [] for name in calls}
    cpu: Times = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(PAUSE_S)
            start, start_cpu = time.perf_counter(), time.process_time()
            calls[name]()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - start_cpu))
    return wall, cpu


def summarize(wall: Times, cpu: Times, facts: Mapping[str, dict[str, float]]) -> list[dict]:
    """One row per call: times over the rounds, and ratios within a round."""

    def ratio(times: Times, name: str, base: str) -> dict[str, float]:
        pairs = zip(times[name], times[base], strict=True)
        return quartiles([value / other for value, other in pairs], 3)

    rows = []
    for name in wall:
        row: dict[str, Any] = {"name": name, **facts.get(name, {})}
        row |= {"wall_ms": quartiles(wall[name], 1), "cpu_ms": quartiles(cpu[name], 1)}
        bases = {"forward": "forward", "torch": TORCH_BASE}
        if name in ONE_CLASS:
            bases["one_class"] = ONE_CLASS[name]
        for key, base in bases.items():
            if base in wall:
                row[f"wall_to_{key}"] = ratio(wall, name, base)
                row[f"cpu_to_{key}"] = ratio(cpu, name, base)
        if name in TARGETS:
            base, at_most = TARGETS[name]
            met = ratio(wall, name, base)["median"] <= at_most
            row["target"] = {"wall_to": base, "at_most": at_most, "met": met}
        rows.append(row)
    return rows


def stream() -> dict[str, Any]:
    """Send images through one jitted map, chunk by chunk; memory and compilations on the way."""
    size, chunk = STREAM["size"], STREAM["chunk"]
    rng = np.random.default_rng(0)
    model = create_model(STREAM["model"], num_classes=CUED, stem="small", width=STREAM["width"])
    variables = he_variables(model, np.zeros((1, size, size, 3), np.float32))
    targets = np.arange(chunk) % CUED

    @jax.jit
    def maps_of(v, x, t):
        fn = bind(model, v, train=False)
        return contrastive_excitation_backprop(fn, x, t, tap=STREAM["tap"])

    compiled: list[str] = []

    def note(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILED:
            compiled.append(event)

    found: dict[str, Any] = {**STREAM, "resident_mb": {"0": resident_mb()}}
    jax.monitoring.register_event_duration_secs_listener(note)
    start = time.perf_counter()
    for done in range(chunk, max(STREAM_IMAGES) + 1, chunk):
        images = rng.random((chunk, size, size, 3), np.float32)
        if not np.isfinite(np.asarray(maps_of(variables, images, targets))).all():
            raise SystemExit(f"a map among the first {done} is not finite")
        if done == chunk:
            if not compiled:
                raise SystemExit(f"this JAX does not record {COMPILED}: nothing to count")
            # Tracing evaluates small things, which counts too; from here on nothing may.
            compiled.clear()
        if done in STREAM_IMAGES:
            found["resident_mb"][str(done)] = resident_mb()
    seconds = time.perf_counter() - start
    jax.monitoring.unregister_event_duration_listener(note)
    found |= {
        "compilations": 1 + len(compiled),
        "images_per_s": round(max(STREAM_IMAGES) / seconds, 1),
    }
    return found


def resident_mb() -> float | None:
    """Memory of this process that is in RAM, MiB; None where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 2**10, 1)


def elsewhere_s() -> float | None:
    """CPU time of all other processes since some moment; None where the system does not tell."""
    whole = pathlib.Path("/proc/stat")
    if not whole.exists():
        return None
    user, nice, system, _, _, *interrupts = map(int, whole.read_text().split()[1:8])
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def print_rows(rows: list[dict]) -> None:
    """The table, median (lower to upper quartile)."""
    print(
        f"{'':53}{'compile s':>9}{'wall ms':>9}{'CPU ms':>9}{'wall / forward':>23}"
        f"{'CPU / forward':>15}{'wall / torch':>23}"
    )
    for row in rows:
        cells = [
            _with_spread(row["wall_to_forward"]),
            f"{row['cpu_to_forward']['median']:.2f}",
            _with_spread(row.get("wall_to_torch")),
        ]
        print(
            f"{row['name']:53}{row.get('compile_s', ''):>9}{row['wall_ms']['median']:9.0f}"
            f"{row['cpu_ms']['median']:9.0f}{cells[0]:>23}{cells[1]:>15}{cells[2]:>23}"
        )
    for row in rows:
        if "wall_to_one_class" in row:
            against = f"{_with_spread(row['wall_to_one_class'])} times one class"
            print(f"{row['name']}: {against}, CPU {row['cpu_to_one_class']['median']:.2f}")
    for row in rows:
        if "target" in row:
            target, verdict = row["target"], "met" if row["target"]["met"] else "MISSED"
            print(f"{verdict:7}{row['name']} <= {target['at_most']} x {target['wall_to']}, wall")


def _with_spread(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else ""


def main() -> None:
    """Measures, prints a table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2, help="for XLA and PyTorch each")
    parser.add_argument("--rounds", type=int, default=15, help="in which calls take turns; 0: none")
    parser.add_argument("--stream", action="store_true", help="10,000 images through one map too")
    args = parser.parse_args()

    # XLA makes its threads when it starts, one for each processor that the process may use.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    where = {**machine(), "commit": provenance()["commit"], "torch": None}
    if where["platform"] == "cpu" and importlib.util.find_spec("torch"):
        where["torch"] = importlib.metadata.version("torch")
    print(
        f"{where['system']}, {where['cpu']}, {where['cpu_count']} cores, {where['threads']} threads"
        f" for XLA and for PyTorch, load {where['load_at_start']}; device {where['device']} "
        f"({where['platform']}), jax {where['jax']}, torch {where['torch'] or '- (rows left out)'}"
    )
    report = {"benchmark": "attribution", "machine": where}
    failures = []
    if args.stream:
        report["stream"] = found = stream()
        memory = ", ".join(f"{n}: {mb} MiB" for n, mb in found["resident_mb"].items())
        print(
            f"stream: {found['images_per_s']} images/s, compiled {found['compilations']} time(s), "
            f"resident after {memory}",
            flush=True,
        )
        if found["compilations"] != 1:
            failures.append(f"the stream was compiled {found['compilations']} times, not once")
        first, last = (found["resident_mb"][str(n)] for n in STREAM_IMAGES)
        if first is not None and last - first > GROWTH_MB:
            failures.append(f"the stream's memory grew by {last - first:.0f} MiB")
    if args.rounds:
        model = create_model(MODEL, num_classes=CLASSES)
        images = np.random.default_rng(0).random((BATCH, SIZE, SIZE, 3), np.float32)
        calls, facts = compile_calls(he_variables(model, images), images, where["threads"])
        start, before = time.perf_counter(), elsewhere_s()
        rows = summarize(*time_calls(calls, args.rounds), facts)
        after, seconds = elsewhere_s(), time.perf_counter() - start
        others = None if before is None or after is None else round((after - before) / seconds, 2)
        print_rows(rows)
        # The load average at the start knows nothing of what begins later.
        print(f"cores kept busy by other processes meanwhile: {others} of {where['cpu_count']}")
        report |= {"model": MODEL, "images": images.shape, "rounds": args.rounds}
        report["cores_busy_elsewhere"] = others
        report |= {"torch_base": TORCH_BASE if where["torch"] else None, "rows": rows}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")
    if failures:
        raise SystemExit("; ".join(failures))


if __name__ == "__main__":
    main()

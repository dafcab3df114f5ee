"""Times training steps: ours beside the same in PyTorch; ResNet-18 at 32x32, ResNet-50 at 224x224.

    python benchmarks/train.py                                 # 15 minutes on two CPU cores
    python benchmarks/train.py --out=results/bench/train.json  # and write what was measured
    python benchmarks/train.py --tiny --seconds=2              # does it run here?

A step is that of train.py on a batch of noise that lies on the device: normalisation of bytes,
forward, backward, SGD with momentum. PyTorch's is a plain loop with the same network and weights:
eager in both memory layouts, and through torch.compile in channels_last. On a CPU all compute in
float32, on --threads processors; on a GPU in bfloat16 (autocast there), and a call is 10 steps,
waited for once. The losses of three steps are compared before anything is timed.

The rows take turns, so that a busy machine slows all of them. Images per second are those of the
median call after a warm-up; compilation is apart; a ratio is the median over the rounds of the
ratio of two calls of the same round. Without torch, ours runs alone.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax
import numpy as np
import optax
from flax import traverse_util
from timing import machine, take_turns

from attnzoom_jax.models import create_model
from attnzoom_jax.training import sharding
from attnzoom_jax.training.flops import count_flops, peak_flops
from attnzoom_jax.training.state import create_state
from attnzoom_jax.training.step import Recipe, jit_train_step, make_train_step

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.25, 0.25)
LEARNING_RATE, MOMENTUM = 0.01, 0.9
CHECKED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, what it is trained on, and the batch on each platform."""

    model: str
    stem: str
    stage_sizes: tuple[int, ...]
    size: int
    classes: int
    cpu_batch: int
    gpu_batch: int
    width: int = 64

    def tiny(self) -> "Case":
        """The same at a size that takes seconds."""
        return dataclasses.replace(
            self, size=min(self.size, 64), classes=10, cpu_batch=4, gpu_batch=8, width=8
        )


CASES = {
    "resnet18_32": Case("resnet18", "cifar", (2, 2, 2, 2), 32, 100, 128, 1024),
    "resnet50_224": Case("resnet50", "imagenet", (3, 4, 6, 3), 224, 1000, 16, 256),
}


def own_step(case: Case, batch: dict[str, np.ndarray], dtype: str) -> tuple[Any, Any, dict]:
    """A call without arguments that does a step and returns its loss; the weights; facts."""
    model = create_model(
        case.model,
        num_classes=case.classes,
        stem=case.stem,
        width=case.width,
        zero_init_residual=True,  # else gradients at the start are so large that losses part
        dtype=dtype,
    )
    mesh = sharding.create_mesh(jax.devices()[:1])
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    shape = (case.size, case.size, 3)
    state = create_state(model, optimizer, image_shape=shape, seed=0, mesh=mesh)
    weights = jax.device_get(state.params)
    recipe = Recipe(seed=0, mean=MEAN, std=STD)
    train_step = make_train_step(model, optimizer, recipe, num_classes=case.classes)
    program = jit_train_step(train_step, mesh)
    on_device = sharding.to_global(batch, mesh)
    flops = count_flops(program, state, on_device)
    start = time.perf_counter()
    compiled = program.lower(state, on_device).compile()
    facts = {
        "compile_s": round(time.perf_counter() - start, 2),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "gflops_per_image": round((flops or 0) / len(batch["label"]) / 1e9, 3),
    }

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, on_device)
        return metrics["loss"]

    return step, weights, facts


def torch_network(torch: Any, case: Case) -> Any:
    """The same ResNet in PyTorch; its modules have the names of ours."""
    nn = torch.nn
    is_bottleneck = case.model == "resnet50"
    expansion = 4 if is_bottleneck else 1

    def conv(c_in, c_out, size, stride=1):
        return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, c_in, c, stride):
            super().__init__()
            layers = [(c, 3, stride), (c, 3, 1)]
            if is_bottleneck:
                layers = [(c, 1, 1), (c, 3, stride), (c * expansion, 1, 1)]
            self.count, last = len(layers), c_in
            for i, (c_out, size, s) in enumerate(layers, start=1):
                self.add_module(f"conv{i}", conv(last, c_out, size, s))
                self.add_module(f"norm{i}", nn.BatchNorm2d(c_out))
                last = c_out
            self.has_shortcut = stride != 1 or c_in != last
            if self.has_shortcut:
                self.shortcut_conv = conv(c_in, last, 1, stride)
                self.shortcut_norm = nn.BatchNorm2d(last)

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
                y = torch.relu(y) if i < self.count else y
            x = self.shortcut_norm(self.shortcut_conv(x)) if self.has_shortcut else x
            return torch.relu(x + y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            large = case.stem == "imagenet"
            self.stem = nn.Module()
            self.stem.conv1 = conv(3, case.width, 7 if large else 3, 2 if large else 1)
            self.stem.norm1 = nn.BatchNorm2d(case.width)
            self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
            last = case.width
            for stage, size in enumerate(case.stage_sizes, start=1):
                c, blocks = case.width * 2 ** (stage - 1), nn.Module()
                for i in range(1, size + 1):
                    stride = 2 if stage > 1 and i == 1 else 1
                    blocks.add_module(f"block{i}", Block(last, c, stride))
                    last = c * expansion
                self.add_module(f"stage{stage}", blocks)
            self.head = nn.Linear(last, case.classes)

        def forward(self, x):
            x = self.pool(torch.relu(self.stem.norm1(self.stem.conv1(x))))
            for stage in range(1, len(case.stage_sizes) + 1):
                for block in getattr(self, f"stage{stage}").children():
                    x = block(x)
            return self.head(x.mean(dim=(2, 3)))

    return Net()


def to_torch(torch: Any, weights: Any) -> dict[str, Any]:
    """Our parameters under PyTorch's names, in its order of axes."""
    found = {}
    for path, value in traverse_util.flatten_dict(weights, sep=".").items():
        array = np.asarray(value)
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        name = path.replace(".kernel", ".weight").replace(".scale", ".weight")
        found[name] = torch.tensor(array.transpose(axes).tolist())
    return found


def torch_steps(
    case: Case, batch: dict[str, np.ndarray], weights: Any, *, bf16: bool
) -> dict[str, tuple[Callable[[], Any], dict]]:
    """{row: (call that does a step, facts)}; a row that cannot run is told and left out."""
    torch: Any = importlib.import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    labels = torch.tensor(batch["label"].tolist(), device=device)
    images = torch.frombuffer(bytearray(batch["image"].tobytes()), dtype=torch.uint8)
    images = images.reshape(batch["image"].shape).to(device)
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def create(layout, compiles):
        net = torch_network(torch, case)
        missing = net.load_state_dict(to_torch(torch, weights), strict=False)
        if missing.unexpected_keys or any(
            "running" not in k and "num_" not in k for k in missing.missing_keys
        ):
            raise SystemExit(f"the networks differ: {missing}")
        net = net.to(device, memory_format=layout).train()
        optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=MOMENTUM)
        forward = torch.compile(net) if compiles else net

        def step():
            x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
            x = ((x - mean) / std).contiguous(memory_format=layout)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                logits = forward(x)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    rows = {}
    for name, layout, compiles in (
        ("torch eager", torch.contiguous_format, False),
        ("torch eager, channels_last", torch.channels_last, False),
        ("torch.compile, channels_last", torch.channels_last, True),
    ):
        rows[name] = (create(layout, compiles), {})
    return rows


def check(name: str, expected: list[float], step: Callable[[], Any], tolerance: float) -> float:
    """Seconds of the first step, compilation included; stops if the losses are others."""
    start = time.perf_counter()
    losses = [float(step())]
    first_s = time.perf_counter() - start
    losses += [float(step()) for _ in range(CHECKED_STEPS - 1)]
    if not np.allclose(losses, expected, rtol=tolerance):
        raise SystemExit(f"{name}: losses {losses}, ours {expected}")
    return first_s


def measure(case: Case, batch_size: int, seconds: float) -> dict[str, Any]:
    """All rows of a case."""
    on_gpu = jax.default_backend() == "gpu"
    dtype, steps = ("bfloat16", 10) if on_gpu else ("float32", 1)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, case.size, case.size, 3), np.uint8),
        "label": rng.integers(0, case.classes, batch_size).astype(np.int32),
    }
    ours, weights, facts = own_step(case, batch, dtype)
    losses = [float(ours()) for _ in range(CHECKED_STEPS)]
    print(f"ours: losses {[round(loss, 4) for loss in losses]}, {facts}", flush=True)
    ready, known = {"ours": ours}, {"ours": facts}
    if importlib.util.find_spec("torch"):
        for name, (step, more) in torch_steps(case, batch, weights, bf16=on_gpu).items():
            try:
                first_s = check(name, losses, step, tolerance=0.03 if on_gpu else 1e-3)
            except Exception as error:  # torch.compile wants a C++ compiler, Triton, ...
                print(f"left out: {name}: {' '.join(str(error).split())[:200]}", flush=True)
                continue
            ready[name], known[name] = step, {**more, "first_step_s": round(first_s, 2)}

    def several(step):
        def call():
            for _ in range(steps):
                loss = step()
            float(loss)  # waits

        return call

    times = take_turns({name: several(step) for name, step in ready.items()}, seconds=seconds)
    rows = {}
    for name, values in times.items():
        speed = steps * batch_size / statistics.median(values)
        pairs = zip(values, times["ours"], strict=True)
        rows[name] = {
            "images_per_s": round(speed, 1),
            "fastest_images_per_s": round(steps * batch_size / min(values), 1),
            "rounds": len(values),
            "ours_to_this": round(statistics.median(value / own for value, own in pairs), 3),
            **known[name],
        }
        print(
            f"{name:<30} {speed:>9.1f} images/s   ours {rows[name]['ours_to_this']:.2f} x",
            flush=True,
        )
    peak = peak_flops(jax.devices()[:1])
    if peak:
        rows["ours"]["mfu"] = round(
            rows["ours"]["images_per_s"] * facts["gflops_per_image"] * 1e9 / peak, 4
        )
    return {"batch": batch_size, "size": case.size, "dtype": dtype, "rows": rows}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--case", choices=CASES, help="one of them; all without")
    parser.add_argument("--batch", type=int, default=0, help="instead of the case's own")
    parser.add_argument("--threads", type=int, default=2, help="processors to run on")
    parser.add_argument("--seconds", type=float, default=120.0, help="aimed at per case")
    parser.add_argument("--tiny", action="store_true", help="small networks and batches")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # before JAX and torch count the processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    where = machine()
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(given.threads)
        where["torch"] = importlib.metadata.version("torch")
    found: dict[str, Any] = {"machine": where, "cases": {}}
    print(where)
    for name in [given.case] if given.case else CASES:
        case = CASES[name].tiny() if given.tiny else CASES[name]
        on_gpu = jax.default_backend() == "gpu"
        batch_size = given.batch or (case.gpu_batch if on_gpu else case.cpu_batch)
        print(f"{name}: batch {batch_size}, {case.size}x{case.size}; compiling ...", flush=True)
        found["cases"][name] = measure(case, batch_size, given.seconds)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

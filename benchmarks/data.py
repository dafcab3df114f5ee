"""Times the input pipeline alone: images per second at the sizes of CIFAR and of CUB-200-2011.

    python benchmarks/data.py                                  # a minute on two CPU cores
    python benchmarks/data.py --out=results/bench/data.json    # and write what was measured

Made-up images are prepared as any folder of images is, and read as training reads them: records,
decoding, resizing, batches of uint8, in the threads of data.num_threads. CIFAR's are PNG files of
32x32 and come as they are; CUB's are JPEG files of 375x500, of which the central square is cut to
224. All threads run on the first --threads processors (2) and nothing else does: a training step on
the same processors would take its share. Speeds are medians over windows of a second, after a
warm-up.

With --train, the file that benchmarks/train.py wrote, each row also says how many times what the
training step of the same size consumed there: below 1 the pipeline is the limit of that machine.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import cv2
import numpy as np
from timing import machine

from attnzoom_jax.data.pipeline import Resize, train_batches
from attnzoom_jax.data.source import open_source

ROOT = pathlib.Path(__file__).parent.parent
# name: (height, width, file, files, resize, batch, the case of benchmarks/train.py)
CASES = {
    "cifar_32": (32, 32, ".png", 1024, Resize(), 128, "resnet18_32"),
    "cub_224": (375, 500, ".jpg", 128, Resize("crop", 224), 32, "resnet50_224"),
}


def prepare(name: str, folder: pathlib.Path) -> None:
    """Prepare a set of made-up images, as smooth and as noisy as photographs."""
    h, w, extension, count, *_ = CASES[name]
    rng = np.random.default_rng(0)
    photos = folder / f"{name}_files" / "train" / "thing"
    photos.mkdir(parents=True)
    for i in range(count):
        coarse = rng.integers(0, 256, (h // 8 + 2, w // 8 + 2, 3)).astype(np.uint8)
        smooth = cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        noisy = np.clip(smooth + rng.integers(-8, 9, (h, w, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(photos / f"{i}{extension}"), noisy)
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), name]
    command += [f"--data_dir={folder}", f"--from_folder={photos.parent.parent}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(name: str, folder: pathlib.Path, num_threads: int, windows: int) -> dict[str, Any]:
    """Images per second with so many threads."""
    *_, resize, batch_size, _ = CASES[name]
    source = open_source(name, split="train", data_dir=str(folder))
    batches = train_batches(
        source, batch_size=batch_size, seed=0, resize=resize, num_threads=num_threads
    )
    for _ in range(2 * num_threads + 2):  # what was read ahead does not count
        next(batches)
    speeds = []
    for _ in range(windows):
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + 1:
            next(batches)
            count += batch_size
        speeds.append(count / (time.perf_counter() - start))
    return {
        "case": name,
        "num_threads": num_threads,
        "batch": batch_size,
        "images_per_s": round(statistics.median(speeds), 1),
        "fastest_images_per_s": round(max(speeds), 1),
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--train", type=pathlib.Path, help="what benchmarks/train.py wrote")
    parser.add_argument("--threads", type=int, default=2, help="processors to run on")
    parser.add_argument("--windows", type=int, default=5, help="of a second, per row")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    cases = json.loads(given.train.read_text())["cases"] if given.train else {}
    found: dict[str, Any] = {"machine": machine(), "rows": []}
    print(found["machine"])
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            prepare(name, pathlib.Path(folder))
            for num_threads in sorted({0, 1, given.threads, 2 * given.threads}):
                row = measure(name, pathlib.Path(folder), num_threads, given.windows)
                line = f"{name:<9} {num_threads:>3} threads {row['images_per_s']:>9.1f} images/s"
                if CASES[name][-1] in cases:
                    step = cases[CASES[name][-1]]["rows"]["ours"]["images_per_s"]
                    row["to_training_step"] = round(row["images_per_s"] / step, 2)
                    line += f", {row['to_training_step']:.2f} x what the training step takes"
                found["rows"].append(row)
                print(line, flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

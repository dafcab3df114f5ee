"""Two ImageNet networks with their published weights, and photographs to try them on.

The networks are those of configs/networks/imagenet.py. The folder of the data is the environment
variable ATTNZOOM_DATA, or `shared/data` beside the repository.
"""

import collections
import csv
import functools
import io
import os
import pathlib
import tarfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from attnzoom_jax.data.augment import normalize
from configs.networks import imagenet

BESIDE = pathlib.Path(__file__).parents[3] / "shared" / "data"
DATA = pathlib.Path(os.environ.get("ATTNZOOM_DATA", BESIDE))
WEIGHTS = {
    "squeezenet": "squeezenet_v1.0_deepcompressed.npz",
    "squeezenet_linear": "squeezenet_v1.0_deepcompressed.npz",
    "mobilenet_v1": "mobilenet_v1_0.25_128_quant.dequant.npz",
    "mobilenet_v2": "tf2_mobilenet_v2_1.0_224_ptq.dequant.npz",
}

Loaded = tuple[Callable[[jax.Array], jax.Array], Callable[[Any], jax.Array], tuple[str, ...]]


@functools.cache
def load(name: str) -> Loaded:
    """A network of configs/networks/imagenet.py.

    Args:
        name: a key of WEIGHTS.

    Returns:
        fn: images [n, h, w, 3] -> logits float32 [n, 1000]. A pytree whose leaves are the weights:
            handed to a jitted function as an argument, the weights are arguments as well.
        preprocess: uint8 RGB [n, h, w, 3] -> images for fn.
        class_names: 1000.
    """
    network = getattr(imagenet, name)(str(DATA / "weights_imagenet" / WEIGHTS[name]))
    fn = jax.tree_util.Partial(network.run, network.weights)
    of = imagenet.INPUTS[name]

    def preprocess(images: Any) -> jax.Array:
        return normalize(jax.numpy.asarray(images), mean=of.mean, std=of.std)

    return fn, preprocess, tuple(network.class_names)


@functools.cache
def annotations() -> dict[str, dict[str, list[list[float]]]]:
    """All boxes of coco256, but those around crowds.

    Returns:
        {photograph: {class: [[x0, y0, x1, y1], ...]}}, in pixels of the file.
    """
    found: dict[str, Any] = collections.defaultdict(lambda: collections.defaultdict(list))
    with tarfile.open(DATA / "coco256" / "coco256.tar") as archive:
        table = archive.extractfile("coco256/boxes_all_80classes.csv")
        assert table is not None
        for row in csv.DictReader(io.TextIOWrapper(table)):
            if row["iscrowd"] == "0":
                box = [float(row[corner]) for corner in ("x0", "y0", "x1", "y1")]
                found[pathlib.Path(row["file"]).stem][row["class"]].append(box)
    return found


def photograph(name: str, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A photograph of coco256, squeezed to a square, with its boxes.

    Args:
        name: of the file without its ending, such as "000000000009".
        size: side of the square, in pixels.

    Returns:
        uint8 RGB [size, size, 3], and {class: boxes float [p, 4]}, [x0, y0, x1, y1] in pixels of
        that square, without the boxes around crowds.
    """
    with tarfile.open(DATA / "coco256" / "coco256.tar") as archive:
        file = archive.extractfile(f"coco256/JPEGImages/{name}.jpg")
        assert file is not None
        picture = Image.open(io.BytesIO(file.read())).convert("RGB")
    scale = np.tile(size / np.array(picture.size), 2)  # of x, y, x, y
    boxes = {kind: np.array(rows) * scale for kind, rows in annotations()[name].items()}
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)), boxes


def box_mask(boxes: np.ndarray, size: int) -> np.ndarray:
    """The union of boxes as a mask.

    Args:
        boxes: [p, 4], [x0, y0, x1, y1] in pixels.
        size: side of the square, in pixels.

    Returns:
        bool [size, size], true for the pixels whose centre lies in a box.
    """
    centre = np.arange(size) + 0.5
    x0, y0, x1, y1 = boxes.T[..., None]  # [p, 1] each
    rows = (y0 <= centre) & (centre < y1)  # [p, size]
    columns = (x0 <= centre) & (centre < x1)
    return (rows[:, :, None] & columns[:, None, :]).any(axis=0)

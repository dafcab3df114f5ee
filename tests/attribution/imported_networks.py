"""Two ImageNet networks with their published weights, in plain JAX, and photographs to try them on.

`squeezenet` (Iandola et al. 2016, v1.0, Caffe) and `mobilenet_v2` (Sandler et al. 2018) walk the
list of operations that lies beside the weights; every operation's result is a tap. The folder of
the data is the environment variable ATTNZOOM_DATA, or `shared/data` beside the repository.
"""

import collections
import csv
import functools
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from PIL import Image

BESIDE = pathlib.Path(__file__).parents[3] / "shared" / "data"
DATA = pathlib.Path(os.environ.get("ATTNZOOM_DATA", BESIDE))
SQUEEZENET = "squeezenet_v1.0_deepcompressed"
MOBILENET_V2 = "tf2_mobilenet_v2_1.0_224_ptq"

# Of the network's images, in pixels.
SQUEEZENET_SIZE = 227
MOBILENET_V2_SIZE = 224

Weights = dict[str, jax.Array]
Network = tuple[Callable[[jax.Array], jax.Array], Callable[[Any], jax.Array], list[str]]


@functools.cache
def squeezenet(head: str = "published") -> Network:
    """SqueezeNet 1.0.

    Taps carry the names of the Caffe layers: `conv1`, `relu_conv1`, `pool1`, `fire2/conv1x1_1`,
    ..., `fire9/concat`, `conv_final`, `relu_conv_final`, `pool_final`.

    Args:
        head: "published" classifies every position, then follow a ReLU and the mean over the
            positions; "linear" leaves out that ReLU, so that mean and classifier may change places:
            the mean of the features comes first, as in most networks (taps `mean`, `conv_final`).

    Returns:
        fn: [n, 227, 227, 3] -> logits float32 [n, 1000], of the published head none below 0. A
            pytree whose leaves are the weights: handed to a jitted function as an argument, the
            weights are arguments as well.
        preprocess: uint8 RGB [n, 227, 227, 3] -> images for fn, BGR less the mean colour.
        class_names: 1000.
    """
    run = {"published": _run_squeezenet, "linear": _run_squeezenet_linear}[head]
    fn = jax.tree_util.Partial(run, _weights(f"{SQUEEZENET}.npz"))
    return fn, _to_bgr_less_mean, _class_names()[1:]


@functools.cache
def mobilenet_v2() -> Network:
    """MobileNetV2 1.0, batch norms folded, weights rounded to 8 bits.

    Taps carry the names of the operation list, `conv00` ... `conv52` (after the activation);
    the sum of a residual block is `convNN/sum`, NN its last convolution; the pooled features `gap`.

    Returns:
        fn: [n, 224, 224, 3] -> logits float32 [n, 1001]; a pytree, as that of `squeezenet`.
        preprocess: uint8 RGB [n, 224, 224, 3] -> images for fn, about [-1, 1].
        class_names: 1001, the first is "background".
    """
    fn = jax.tree_util.Partial(_run_mobilenet_v2, _weights(f"{MOBILENET_V2}.dequant.npz"))
    return fn, _to_unit_range, _class_names()


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


@functools.cache
def _operations(name: str) -> Any:
    return json.loads((DATA / "weights_imagenet" / f"{name}.graph.json").read_text())


def _weights(file: str) -> Weights:
    with np.load(DATA / "weights_imagenet" / file) as arrays:
        return {name: jnp.asarray(array) for name, array in arrays.items()}


def _class_names() -> list[str]:
    return (DATA / "weights_imagenet" / "imagenet_labels.txt").read_text().splitlines()


def _to_bgr_less_mean(images: Any) -> jax.Array:
    return jnp.asarray(images, jnp.float32)[..., ::-1] - jnp.array([104.0, 117.0, 123.0])


def _to_unit_range(images: Any) -> jax.Array:
    return (jnp.asarray(images, jnp.float32) - 127.0) * 0.007843137718737125


def _run_squeezenet(weights: Weights, images: jax.Array) -> jax.Array:
    return _run_caffe(weights, images, _operations(SQUEEZENET))


def _run_squeezenet_linear(weights: Weights, images: jax.Array) -> jax.Array:
    *body, classifier, _, _ = _operations(SQUEEZENET)
    _, name, _, _, _, _, margin = classifier
    features = _run_caffe(weights, images, body)
    _, h, w, _ = features.shape
    # The mean over the positions of the classifier, which pads.
    mean = features.sum(axis=(1, 2)) / ((h + 2 * margin) * (w + 2 * margin))
    mean = checkpoint_name(mean, "mean")  # [n, c]
    logits = mean @ weights[f"{name}/kernel"][0, 0] + weights[f"{name}/bias"]
    return checkpoint_name(logits, name)


def _run_caffe(weights: Weights, images: jax.Array, operations: Any) -> jax.Array:
    x = images
    blobs = {"data": images}  # a ReLU writes over its input, as in Caffe
    for kind, name, sources, result, *settings in operations:
        x = blobs[sources[0]]
        if kind == "Convolution":
            _, stride, margin = settings
            x = _convolve(weights, name, x, stride=stride, padding=[(margin, margin)] * 2)
        elif kind == "ReLU":
            x = jax.nn.relu(x)
        elif kind == "Concat":
            x = jnp.concatenate([blobs[source] for source in sources], axis=-1)
        elif settings == ["MAX"]:
            x = _max_pool(x)
        else:
            x = x.mean(axis=(1, 2))  # [n, k]
        blobs[result] = x = checkpoint_name(x, name)
    return x


def _run_mobilenet_v2(weights: Weights, images: jax.Array) -> jax.Array:
    values, names = {0: images}, {}
    for operation in _operations(MOBILENET_V2)["ops"]:
        first, *rest = operation["inp"]
        x = values[first]
        if operation["op"] == "add":
            name = f"{names[rest[0]]}/sum"
            x = x + values[rest[0]]
        elif operation["op"] == "gap":
            name = "gap"
            x = x.mean(axis=(1, 2), keepdims=True)
        else:
            name = operation["name"]
            stride, padding = operation["stride"], operation["padding"]
            x = _convolve(weights, name, x, stride=stride, padding=padding)
            x = jax.nn.relu6(x) if operation["act"] == "relu6" else x
        names[operation["out"]] = name
        values[operation["out"]] = checkpoint_name(x, name)
    logits = values[_operations(MOBILENET_V2)["output"]]  # [n, 1, 1, k]
    return logits.reshape(logits.shape[0], -1)  # [n, k]


def _convolve(weights: Weights, name: str, x: jax.Array, *, stride: int, padding: Any) -> jax.Array:
    kernel = weights[f"{name}/kernel"]
    is_depthwise = kernel.shape[2] < x.shape[-1]  # [h, w, 1, c]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if is_depthwise else 1,
    )
    return y + weights[f"{name}/bias"]


def _max_pool(x: jax.Array) -> jax.Array:
    """3x3 windows, stride 2, as many as touch the image: Caffe rounds their number up."""
    margins = [(0, (side - 3) % 2) for side in x.shape[1:3]]
    padding = [(0, 0), *margins, (0, 0)]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)

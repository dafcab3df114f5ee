"""Two families of ImageNet networks with published weights, as functions of their weights.

A config takes one with `imagenet.use(config, "squeezenet_linear", "FOLDER/squeezenet_....npz")`;
then `python eval.py --config=FILE.py --workdir=OUT`. Each walks the list of its operations,
<name>.graph.json beside <name>.npz; every operation's result is a tap. Class names are read from
imagenet_labels.txt in that folder, where there is one: 1001 lines, the first is "background".

The outputs are the 1000 classes in their usual order. They take images of any size; `use` sets
that of their training.

| name                          | weights (float32, batch norms folded)    | source (licence)      |
|-------------------------------|------------------------------------------|-----------------------|
| squeezenet, squeezenet_linear | squeezenet_v1.0_deepcompressed.npz       | songhan (BSD)         |
| mobilenet_v1                  | mobilenet_v1_0.25_128_quant.dequant.npz  | google-coral (Apache) |
| mobilenet_v2                  | tf2_mobilenet_v2_1.0_224_ptq.dequant.npz | google-coral (Apache) |

Weights: github.com/songhan/SqueezeNet-Deep-Compression and github.com/google-coral/test_data.
Sources: Iandola et al. 2016 (arXiv 1602.07360), v1.0, from Caffe; Howard et al. 2017 (arXiv
1704.04861); Sandler et al. 2018 (arXiv 1801.04381).
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.models import Network

FILE = "configs/networks/imagenet.py"
LABELS = "imagenet_labels.txt"
BACKGROUND = "background"


@dataclasses.dataclass(frozen=True)
class Input:
    """The images that a network was trained on.

    Attributes:
        size: height and width, in pixels.
        mean: of RGB, as a fraction of white, as of `config.data.mean`.
        std: likewise.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _grey(size: int, *, offset: float, scale: float) -> Input:
    """(pixel - offset) * scale, of pixels in [0, 255]."""
    return Input(size, mean=(offset / 255,) * 3, std=(1 / (255 * scale),) * 3)


# SqueezeNet sees grey levels less their mean, [104, 117, 123] of BGR; `run` turns the channels.
_CAFFE = Input(227, mean=(123 / 255, 117 / 255, 104 / 255), std=(1 / 255,) * 3)
INPUTS = {
    "squeezenet": _CAFFE,
    "squeezenet_linear": _CAFFE,
    "mobilenet_v1": _grey(128, offset=128, scale=0.0078125),
    "mobilenet_v2": _grey(224, offset=127, scale=0.007843137718737125),
}


def use(config: Any, name: str, weights: str) -> None:
    """Set a config to a network: its weights and its input, squashed to the size of its training.

    Args:
        config: a ConfigDict with the keys of configs/default.py.
        name: a key of INPUTS.
        weights: path of the .npz file.

    Raises:
        ValueError: unknown name.
    """
    if name not in INPUTS:
        raise unknown_name("network", name, INPUTS)
    found = INPUTS[name]
    config.update({"network": f"{FILE}:{name}", "pretrained": weights})
    config.data.update({"mean": found.mean, "std": found.std})
    config.data.update({"resize": "squash", "image_size": found.size, "crop_size": 0})


def squeezenet(weights: str) -> Network:
    """SqueezeNet 1.0 as published: classifies every position, then follow a ReLU and the mean.

    Taps carry the names of the Caffe layers: `conv1`, `relu_conv1`, `pool1`, `fire2/conv1x1_1`,
    ..., `fire9/concat`, `conv_final`, `relu_conv_final`, `pool_final`.

    Args:
        weights: path of the .npz file.

    Returns:
        The network; none of its logits is below 0.
    """
    operations, arrays = _read(weights)

    def run(arrays: Any, images: jax.Array) -> jax.Array:
        return _run_caffe(arrays, images, operations)

    return Network(run, arrays, _class_names(weights), _shape("squeezenet"))


def squeezenet_linear(weights: str) -> Network:
    """SqueezeNet 1.0 without the ReLU behind its classifier, so that the mean can come first.

    Mean and classifier then change places and the mean of the features comes first, as in most
    networks (taps `mean`, `conv_final`). As published the classifier acts at every position, and
    so does the contrast of contrastive Excitation Backprop: next to nothing is left of its maps.

    Args:
        weights: path of the .npz file.

    Returns:
        The network.
    """
    operations, arrays = _read(weights)
    *body, classifier, _, _ = operations
    _, name, _, _, _, _, margin = classifier

    def run(arrays: Any, images: jax.Array) -> jax.Array:
        features = _run_caffe(arrays, images, body)
        _, h, w, _ = features.shape
        # The mean over the positions of the classifier, which pads.
        mean = features.sum(axis=(1, 2)) / ((h + 2 * margin) * (w + 2 * margin))
        mean = checkpoint_name(mean, "mean")  # [n, c]
        logits = mean @ arrays[name]["kernel"][0, 0] + arrays[name]["bias"]
        return checkpoint_name(logits, name)

    return Network(run, arrays, _class_names(weights), _shape("squeezenet"))


def mobilenet_v1(weights: str) -> Network:
    """MobileNetV1, weights rounded to 8 bits; else as `mobilenet_v2`."""
    return _mobilenet(weights, "mobilenet_v1")


def mobilenet_v2(weights: str) -> Network:
    """MobileNetV2, weights rounded to 8 bits, without the output of the class "background".

    Taps carry the names of the operation list, `conv00` ... `conv52` (after the activation); the
    sum of a residual block is `convNN/sum`, NN its last convolution; the pooled features `gap`.

    Args:
        weights: path of the .npz file.

    Returns:
        The network.
    """
    return _mobilenet(weights, "mobilenet_v2")


def _mobilenet(weights: str, name: str) -> Network:
    operations, arrays = _read(weights)
    head = arrays[operations["ops"][-1]["name"]]
    # The first output is the background.
    head.update({leaf: array[..., 1:] for leaf, array in head.items()})

    def run(arrays: Any, images: jax.Array) -> jax.Array:
        return _run_mobilenet(arrays, images, operations)

    return Network(run, arrays, _class_names(weights), _shape(name))


def _run_caffe(arrays: Any, images: jax.Array, operations: Any) -> jax.Array:
    x = images[..., ::-1]  # to BGR
    blobs = {"data": x}  # a ReLU writes over its input, as in Caffe
    for kind, name, sources, result, *settings in operations:
        x = blobs[sources[0]]
        if kind == "Convolution":
            _, stride, margin = settings
            x = _convolve(arrays, name, x, stride=stride, padding=[(margin, margin)] * 2)
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


def _run_mobilenet(arrays: Any, images: jax.Array, operations: Any) -> jax.Array:
    values, names = {0: images}, {}
    for operation in operations["ops"]:
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
            x = _convolve(arrays, name, x, stride=stride, padding=padding)
            x = jax.nn.relu6(x) if operation["act"] == "relu6" else x
        names[operation["out"]] = name
        values[operation["out"]] = checkpoint_name(x, name)
    logits = values[operations["output"]]  # [n, 1, 1, k]
    return logits.reshape(logits.shape[0], -1)  # [n, k]


def _convolve(arrays: Any, name: str, x: jax.Array, *, stride: int, padding: Any) -> jax.Array:
    layer = arrays
    for part in name.split("/"):
        layer = layer[part]
    kernel = layer["kernel"]
    is_depthwise = kernel.shape[2] < x.shape[-1]  # [h, w, 1, c]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if is_depthwise else 1,
    )
    return y + layer["bias"]


def _max_pool(x: jax.Array) -> jax.Array:
    """3x3 windows, stride 2, as many as touch the image: Caffe rounds their number up."""
    margins = [(0, (side - 3) % 2) for side in x.shape[1:3]]
    padding = [(0, 0), *margins, (0, 0)]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _read(weights: str) -> tuple[Any, dict[str, Any]]:
    """The operations of a network, and its arrays, {layer: {"kernel", "bias"}}."""
    path = pathlib.Path(weights)
    if path.suffix != ".npz":
        raise ValueError(f"weights {weights!r}: expected the path of an .npz file")
    name = path.name.removesuffix(".npz").removesuffix(".dequant")
    operations = json.loads((path.parent / f"{name}.graph.json").read_text())
    with np.load(path) as arrays:
        flat = {key: jnp.asarray(array) for key, array in arrays.items()}
    return operations, unflatten_dict(flat, sep="/")


def _class_names(weights: str) -> tuple[str, ...]:
    """Those beside the weights; () where there are none."""
    path = pathlib.Path(weights).parent / LABELS
    if not path.is_file():
        return ()
    names = path.read_text().splitlines()
    return tuple(names[1:] if names[0] == BACKGROUND else names)


def _shape(name: str) -> tuple[int, int, int]:
    return (INPUTS[name].size, INPUTS[name].size, 3)

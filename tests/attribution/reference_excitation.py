"""Excitation Backprop in NumPy float64, layer by layer, for tiny networks written down as lists.

Zhang et al. 2016 (arXiv 1608.00507), with the conventions of the published implementations. Of the
mass p at a layer's result, with x the layer's true input,

    conv, dense     p_in = x * W+^T (p / (W+ x)), W+ = max(W, 0), without the bias
    average pool    the same with equal weights: p_in = x * sum over windows of p / (sum of window)
    max pool        all of p to the largest value, the first one on ties; padding is -inf
    ReLU            p where the input is above 0, nothing elsewhere
    batch norm      p unchanged, whatever scale and sign
    sum             p_k = p * x_k / sum of all x_k, raw: shares may be negative or exceed 1
    concat          split by channels; flatten: channels last

Only a denominator of exactly 0 is special: its mass is dropped. The start signal is 1 on the cued
logit, or on a map of logits [n, h, w, k] the spatial softmax of that class. The contrastive version
steps through the classifier (the last conv or dense layer) once with W and once with -W, subtracts,
and goes on with the signed difference. A map is the sum over channels, signed.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

IMAGES = "images"  # the name of the network's input
EPSILON = 1e-5  # of batch norms

Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, or one of the sums, joins and poolings between layers.

    Args:
        name: of its result.
        kind: see `result`.
        sources: names of its inputs.
        weights: arrays float64, by name. A kernel is [h, w, c / groups, c'] or [c, c'].
        settings: window, stride, dilation (each [2]), padding ("SAME", "VALID" or ((low, high),
            (low, high))), groups.
    """

    name: str
    kind: str
    sources: tuple[str, ...]
    weights: Values = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Network = list[Layer]  # sorted: a layer follows its sources; the last one gives the logits


@dataclasses.dataclass(frozen=True)
class Walk:
    """The mass at every layer's result and at the images, and what each layer dropped, [n].

    The contrastive walk has no mass at the classifier's result and after it.
    """

    mass: Values
    dropped: Values

    def maps(self, name: str) -> np.ndarray:
        """[n, h, w]."""
        return self.mass[name].sum(axis=-1)


def excitation_backprop(
    network: Network, images: np.ndarray, targets: list[int], *, scales: str = "ignore"
) -> Walk:
    """The walk from the cued class down to the images.

    Args:
        network: the layers.
        images: float64 [n, h, w, c].
        targets: class ids [n].
        scales: "ignore" the sign of batch norms' scales, or make all "positive" first.
    """
    return _walk(network, images, targets, scales, classifier=None)


def contrastive_excitation_backprop(
    network: Network, images: np.ndarray, targets: list[int], *, scales: str = "ignore"
) -> Walk:
    """The same with the negated classifier's walk subtracted right below the classifier."""
    classifier = [layer.name for layer in network if layer.kind in ("conv", "dense")][-1]
    walk = _walk(network, images, targets, scales, classifier)
    names = [layer.name for layer in network]
    above = names[names.index(classifier) :]
    mass = {name: p for name, p in walk.mass.items() if name not in above}
    dropped = {name: d for name, d in walk.dropped.items() if name not in above[1:]}
    return Walk(mass, dropped)


def forward(network: Network, images: np.ndarray) -> Values:
    """The result of every layer, and the images."""
    values = {IMAGES: images}
    for layer in network:
        values[layer.name] = result(layer, [values[name] for name in layer.sources])
    return values


def result(layer: Layer, xs: list[np.ndarray]) -> np.ndarray:
    """The result of one layer."""
    x, w = xs[0], layer.weights
    if layer.kind == "conv":
        return convolve(x, w["kernel"], layer.settings) + w["bias"]
    if layer.kind == "dense":
        return x @ w["kernel"] + w["bias"]
    if layer.kind == "average_pool":
        settings, ones = _equal_weights(layer, x)
        # The padding is not counted.
        return convolve(x, ones, settings) / convolve(np.ones_like(x), ones, settings)
    if layer.kind == "global_average_pool":
        return x.mean(axis=(1, 2))
    if layer.kind == "max_pool":
        windows = list(_windows(layer, x))
        y = np.zeros((len(x), windows[-1][1] + 1, windows[-1][2] + 1, x.shape[3]))
        for window, i, j in windows:
            y[:, i, j] = x[window].max(axis=(1, 2))
        return y
    if layer.kind == "relu":
        return np.maximum(x, 0)
    if layer.kind == "batch_norm":
        return (x - w["mean"]) / np.sqrt(w["variance"] + EPSILON) * w["scale"] + w["bias"]
    if layer.kind == "sum":
        return sum(xs[1:], start=x)
    if layer.kind == "concat":
        return np.concatenate(xs, axis=-1)
    if layer.kind == "flatten":
        return x.reshape(len(x), -1)
    raise ValueError(f"no layer is of the kind {layer.kind!r}")


def step(
    layer: Layer, xs: list[np.ndarray], p: np.ndarray, sign: float = 1.0
) -> tuple[list[np.ndarray], np.ndarray]:
    """One step down.

    Args:
        layer: the layer.
        xs: its inputs.
        p: mass at its result.
        sign: factor of its kernel.

    Returns:
        Mass at each of its inputs, and what was dropped, of the shape of p.
    """
    x = xs[0]
    everything, nothing = p, np.zeros_like(p)
    if layer.kind == "conv":
        w = np.maximum(sign * layer.weights["kernel"], 0)
        z = convolve(x, w, layer.settings)
        p_in = x * convolve_transposed(_ratio(p, z), w, layer.settings, x.shape)
        return [p_in], np.where(z == 0, everything, nothing)
    if layer.kind == "dense":
        w = np.maximum(sign * layer.weights["kernel"], 0)
        z = x @ w
        return [x * (_ratio(p, z) @ w.T)], np.where(z == 0, everything, nothing)
    if layer.kind == "average_pool":
        settings, ones = _equal_weights(layer, x)
        z = convolve(x, ones, settings)
        p_in = x * convolve_transposed(_ratio(p, z), ones, settings, x.shape)
        return [p_in], np.where(z == 0, everything, nothing)
    if layer.kind == "global_average_pool":
        z = x.sum(axis=(1, 2))  # [n, c]
        return [x * _ratio(p, z)[:, None, None, :]], np.where(z == 0, everything, nothing)
    if layer.kind == "max_pool":
        p_in = np.zeros_like(x)
        for window, i, j in _windows(layer, x):
            n, h, w, c = x[window].shape
            first = x[window].reshape(n, h * w, c).argmax(axis=1)  # [n, c], row by row
            is_first = np.arange(h * w)[:, None] == first[:, None, :]  # [n, hw, c]
            p_in[window] += is_first.reshape(n, h, w, c) * p[:, i, j][:, None, None, :]
        return [p_in], nothing
    if layer.kind == "relu":
        return [np.where(x > 0, p, 0)], np.where(x > 0, nothing, everything)
    if layer.kind == "batch_norm":
        return [p], nothing
    if layer.kind == "sum":
        z = sum(xs[1:], start=x)
        return [branch * _ratio(p, z) for branch in xs], np.where(z == 0, everything, nothing)
    if layer.kind == "concat":
        return np.split(p, np.cumsum([branch.shape[-1] for branch in xs])[:-1], axis=-1), nothing
    if layer.kind == "flatten":
        return [p.reshape(x.shape)], nothing
    raise ValueError(f"no layer is of the kind {layer.kind!r}")


def start_signal(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """The mass at the logits [n, k] or [n, h, w, k]."""
    p = np.zeros_like(logits)
    for image, target in enumerate(targets):
        score = np.exp(logits[image, ..., target] - logits[image, ..., target].max())
        p[image, ..., target] = score / score.sum()  # 1 if there is only one position
    return p


def positive_scales(network: Network) -> Network:
    """The same function with every batch norm's scale positive.

    A channel with a negative scale changes the sign of that scale, of the mean, and of the kernel
    and bias of the layer in front. Behind anything that is not linear a norm stays as it is.
    """
    changed = {layer.name: layer for layer in network}
    for norm in network:
        if norm.kind != "batch_norm":
            continue
        sign = np.where(norm.weights["scale"] < 0, -1.0, 1.0)
        linear = changed[norm.sources[0]]
        if linear.kind not in ("conv", "dense"):
            continue
        flipped = {name: sign * linear.weights[name] for name in linear.weights}
        changed[linear.name] = dataclasses.replace(linear, weights=flipped)
        flipped = {name: sign * norm.weights[name] for name in ("scale", "mean")}
        changed[norm.name] = dataclasses.replace(norm, weights=norm.weights | flipped)
    return [changed[layer.name] for layer in network]


def convolve(x: np.ndarray, kernel: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The convolution of a `Layer`, without its bias."""
    padded = _pad(x, kernel.shape[:2], settings, 0.0)
    pieces = list(_pieces(x.shape, kernel.shape, settings))
    _, _, rows, columns, _, _ = pieces[0]
    y = np.zeros((len(x), len(rows), len(columns), kernel.shape[3]))
    for a, b, rows, columns, c_in, c_out in pieces:
        y[..., c_out] += padded[:, rows][:, :, columns][..., c_in] @ kernel[a, b][:, c_out]
    return y


def convolve_transposed(
    q: np.ndarray, kernel: np.ndarray, settings: dict[str, Any], shape: tuple[int, ...]
) -> np.ndarray:
    """The transpose of `convolve`, applied to q; `shape` is that of the convolution's input."""
    (top, _), (left, _) = _margins(shape, kernel.shape[:2], settings)
    padded = np.zeros_like(_pad(np.zeros(shape), kernel.shape[:2], settings, 0.0))
    for a, b, rows, columns, c_in, c_out in _pieces(shape, kernel.shape, settings):
        padded[:, rows[:, None], columns, c_in] += q[..., c_out] @ kernel[a, b][:, c_out].T
    return padded[:, top : top + shape[1], left : left + shape[2]]


def _walk(
    network: Network,
    images: np.ndarray,
    targets: list[int],
    scales: str,
    classifier: str | None,
) -> Walk:
    if scales == "positive":
        network = positive_scales(network)
    values = forward(network, images)
    mass = {name: np.zeros_like(value) for name, value in values.items()}
    logits = network[-1].name
    mass[logits] = start_signal(values[logits], targets)
    dropped = {}
    for layer in reversed(network):
        xs = [values[name] for name in layer.sources]
        parts, lost = step(layer, xs, mass[layer.name])
        if layer.name == classifier:
            (negative,), lost_by_negative = step(layer, xs, mass[layer.name], sign=-1.0)
            parts, lost = [parts[0] - negative], lost - lost_by_negative
        for name, part in zip(layer.sources, parts, strict=True):
            mass[name] += part
        dropped[layer.name] = lost.reshape(len(lost), -1).sum(axis=1)
    return Walk(mass, dropped)


def _ratio(p: np.ndarray, z: np.ndarray) -> np.ndarray:
    """p / z, 0 where z is 0."""
    return np.where(z == 0, 0.0, p / np.where(z == 0, 1.0, z))


def _equal_weights(layer: Layer, x: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """An average pool's sum over windows as a convolution of every channel by itself."""
    ones = np.ones((*layer.settings["window"], 1, x.shape[3]))
    return {**layer.settings, "groups": x.shape[3]}, ones


def _margins(
    shape: tuple[int, ...], window: tuple[int, ...], settings: dict[str, Any]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows of padding (above, below) and columns (left, right)."""
    padding = settings.get("padding", "VALID")
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding != "SAME":
        return padding
    margins = []
    for axis in range(2):
        size, stride = shape[1 + axis], settings.get("stride", (1, 1))[axis]
        reach = (window[axis] - 1) * settings.get("dilation", (1, 1))[axis] + 1
        windows = -(-size // stride)  # rounded up
        total = max((windows - 1) * stride + reach - size, 0)
        margins.append((total // 2, total - total // 2))
    return margins[0], margins[1]


def _pad(
    x: np.ndarray, window: tuple[int, ...], settings: dict[str, Any], value: float
) -> np.ndarray:
    rows, columns = _margins(x.shape, window, settings)
    return np.pad(x, ((0, 0), rows, columns, (0, 0)), constant_values=value)


def _starts(
    shape: tuple[int, ...], window: tuple[int, ...], settings: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """First rows and first columns of the windows, in the padded image."""
    starts = []
    for axis, margins in enumerate(_margins(shape, window, settings)):
        reach = (window[axis] - 1) * settings.get("dilation", (1, 1))[axis] + 1
        last = shape[1 + axis] + sum(margins) - reach
        starts.append(np.arange(0, last + 1, settings.get("stride", (1, 1))[axis]))
    return starts[0], starts[1]


def _pieces(
    shape: tuple[int, ...], kernel: tuple[int, ...], settings: dict[str, Any]
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, slice, slice]]:
    """For every place in the kernel and every group: which input meets which output there.

    Yields row and column in the kernel, rows [h'] and columns [w'] of the padded input, channels of
    the input and channels of the output.
    """
    down, right = settings.get("dilation", (1, 1))
    groups = settings.get("groups", 1)
    c_in, c_out = kernel[2], kernel[3] // groups
    rows, columns = _starts(shape, kernel[:2], settings)
    for a in range(kernel[0]):
        for b in range(kernel[1]):
            for g in range(groups):
                inputs = slice(g * c_in, (g + 1) * c_in)
                outputs = slice(g * c_out, (g + 1) * c_out)
                yield a, b, rows + a * down, columns + b * right, inputs, outputs


def _windows(layer: Layer, x: np.ndarray) -> Iterator[tuple[tuple[slice, ...], int, int]]:
    """The windows of a pool without their padding, with row and column of their result."""
    (height, width), everything = layer.settings["window"], slice(None)
    (top, _), (left, _) = _margins(x.shape, (height, width), layer.settings)
    rows, columns = _starts(x.shape, (height, width), layer.settings)
    for i, row in enumerate(rows - top):
        for j, column in enumerate(columns - left):
            vertical = slice(max(row, 0), max(row + height, 0))
            horizontal = slice(max(column, 0), max(column + width, 0))
            yield (everything, vertical, horizontal, everything), i, j


# ---------------------------------------------------------------------------------- networks

SHAPE = (3, 12, 10, 3)  # of the images of all networks
CLASSES = 5


class _Weights:
    """Layers with random weights of a fixed seed."""

    def __init__(self, seed: int, negative_scales: bool = False):
        self.rng = np.random.default_rng(seed)
        self.negative_scales = negative_scales

    def conv(self, name: str, source: str, kernel: tuple[int, ...], **settings: Any) -> Layer:
        return Layer(name, "conv", (source,), self._linear(kernel), settings)

    def dense(self, name: str, source: str, kernel: tuple[int, ...]) -> Layer:
        return Layer(name, "dense", (source,), self._linear(kernel))

    def batch_norm(self, name: str, source: str, c: int) -> Layer:
        scale = self.rng.uniform(0.5, 1.5, c)
        if self.negative_scales:
            scale[::2] *= -1
        weights = {
            "scale": scale,
            "bias": 0.3 * self.rng.normal(size=c),
            "mean": 0.3 * self.rng.normal(size=c),
            "variance": self.rng.uniform(0.5, 1.5, c),
        }
        return Layer(name, "batch_norm", (source,), weights)

    def _linear(self, shape: tuple[int, ...]) -> Values:
        deviation = np.sqrt(2 / np.prod(shape[:-1]))
        kernel = deviation * self.rng.normal(size=shape)
        return {"kernel": kernel, "bias": 0.2 * self.rng.normal(size=shape[-1])}


def _pool(kind: str, name: str, source: str, window: tuple[int, int], **settings: Any) -> Layer:
    return Layer(name, kind, (source,), settings={"window": window, **settings})


def vgg() -> Network:
    """Convolutions with groups, dilation and lopsided padding; two dense layers."""
    draw = _Weights(0)
    return [
        draw.conv("conv1", IMAGES, (3, 3, 3, 6), padding="SAME"),
        Layer("relu1", "relu", ("conv1",)),
        draw.conv("conv2", "relu1", (3, 3, 3, 6), groups=2),
        Layer("relu2", "relu", ("conv2",)),  # [n, 10, 8, 6]
        _pool("max_pool", "pool", "relu2", (3, 3), stride=(2, 2), padding="SAME"),
        draw.conv("conv3", "pool", (3, 3, 6, 8), dilation=(2, 1), padding=((1, 2), (1, 1))),
        Layer("relu3", "relu", ("conv3",)),  # [n, 4, 4, 8]
        Layer("flatten", "flatten", ("relu3",)),
        draw.dense("dense1", "flatten", (128, 12)),
        Layer("relu4", "relu", ("dense1",)),
        draw.dense("logits", "relu4", (12, CLASSES)),
    ]


def fully_convolutional() -> Network:
    """As `vgg`, with logits [n, 2, 4, k]."""
    draw = _Weights(1)
    return [
        draw.conv("conv1", IMAGES, (3, 3, 3, 6), stride=(2, 1), padding="SAME"),
        Layer("relu1", "relu", ("conv1",)),  # [n, 6, 10, 6]
        _pool("max_pool", "pool", "relu1", (2, 2), stride=(2, 2)),
        draw.conv("conv2", "pool", (3, 3, 6, 8), padding="SAME"),
        Layer("relu2", "relu", ("conv2",)),  # [n, 3, 5, 8]
        draw.conv("conv3", "relu2", (2, 2, 8, 10)),
        Layer("relu3", "relu", ("conv3",)),
        draw.conv("logits", "relu3", (1, 1, 10, CLASSES)),
    ]


def resnet(*, negative_scales: bool) -> Network:
    """A block with a strided projection and an identity block, every convolution with a norm."""
    draw = _Weights(2, negative_scales)
    return [
        draw.conv("conv0", IMAGES, (3, 3, 3, 6), padding="SAME"),
        draw.batch_norm("norm0", "conv0", 6),
        Layer("relu0", "relu", ("norm0",)),
        draw.conv("conv1", "relu0", (3, 3, 6, 8), stride=(2, 2), padding="SAME"),
        draw.batch_norm("norm1", "conv1", 8),
        Layer("relu1", "relu", ("norm1",)),
        draw.conv("conv2", "relu1", (3, 3, 8, 8), padding="SAME"),
        draw.batch_norm("norm2", "conv2", 8),
        draw.conv("projection", "relu0", (1, 1, 6, 8), stride=(2, 2)),
        draw.batch_norm("norm_projection", "projection", 8),
        Layer("sum1", "sum", ("norm2", "norm_projection")),
        Layer("block1", "relu", ("sum1",)),  # [n, 6, 5, 8]
        draw.conv("conv3", "block1", (3, 3, 8, 8), padding="SAME"),
        draw.batch_norm("norm3", "conv3", 8),
        Layer("relu3", "relu", ("norm3",)),
        draw.conv("conv4", "relu3", (3, 3, 8, 8), padding="SAME"),
        draw.batch_norm("norm4", "conv4", 8),
        Layer("sum2", "sum", ("norm4", "block1")),
        Layer("block2", "relu", ("sum2",)),
        Layer("pooled", "global_average_pool", ("block2",)),
        draw.dense("logits", "pooled", (8, CLASSES)),
    ]


def inception() -> Network:
    """Four branches side by side."""
    draw = _Weights(3)
    return [
        draw.conv("conv0", IMAGES, (3, 3, 3, 6), stride=(2, 2), padding="SAME"),
        Layer("stem", "relu", ("conv0",)),  # [n, 6, 5, 6]
        draw.conv("conv1", "stem", (1, 1, 6, 2)),
        Layer("branch1", "relu", ("conv1",)),
        draw.conv("reduce3", "stem", (1, 1, 6, 3)),
        Layer("relu3", "relu", ("reduce3",)),
        draw.conv("conv3", "relu3", (3, 3, 3, 4), padding="SAME"),
        Layer("branch3", "relu", ("conv3",)),
        draw.conv("reduce5", "stem", (1, 1, 6, 3)),
        Layer("relu5", "relu", ("reduce5",)),
        draw.conv("conv5", "relu5", (5, 5, 3, 3), padding="SAME"),
        Layer("branch5", "relu", ("conv5",)),
        _pool("average_pool", "pool", "stem", (3, 3), padding="SAME"),
        draw.conv("conv_pool", "pool", (1, 1, 6, 2)),
        Layer("branch_pool", "relu", ("conv_pool",)),
        Layer("joined", "concat", ("branch1", "branch3", "branch5", "branch_pool")),
        Layer("pooled", "global_average_pool", ("joined",)),
        draw.dense("logits", "pooled", (11, CLASSES)),
    ]


def squeezenet() -> Network:
    """The classifier is a 1x1 convolution, followed by a ReLU and the pooling."""
    draw = _Weights(4)
    return [
        draw.conv("conv0", IMAGES, (3, 3, 3, 6), padding="SAME"),
        Layer("relu0", "relu", ("conv0",)),
        _pool("max_pool", "pool", "relu0", (3, 3), stride=(2, 2)),  # [n, 5, 4, 6]
        draw.conv("squeeze", "pool", (1, 1, 6, 4)),
        Layer("squeezed", "relu", ("squeeze",)),
        draw.conv("expand1", "squeezed", (1, 1, 4, 5)),
        Layer("expanded1", "relu", ("expand1",)),
        draw.conv("expand3", "squeezed", (3, 3, 4, 5), padding="SAME"),
        Layer("expanded3", "relu", ("expand3",)),
        Layer("fire", "concat", ("expanded1", "expanded3")),
        draw.conv("classifier", "fire", (1, 1, 10, CLASSES)),
        Layer("scores", "relu", ("classifier",)),
        Layer("logits", "global_average_pool", ("scores",)),
    ]


NETWORKS = {
    "vgg": vgg(),
    "fully convolutional": fully_convolutional(),
    "resnet": resnet(negative_scales=False),
    "resnet, negative scales": resnet(negative_scales=True),
    "inception": inception(),
    "squeezenet": squeezenet(),
}


def piece(kind: str, *sources: str, **settings: Any) -> Network:
    """The smallest network around one kind of layer: it, ReLU, global average pool, dense.

    Args:
        kind: of the layer; its inputs are IMAGES or "other", a convolution of them.
        sources: IMAGES and "other".
        settings: as of `Layer`, for a convolution the shape of the `kernel` too.
    """
    draw = _Weights(5, negative_scales=True)
    channels = 3 * len(sources) if kind == "concat" else 3
    if kind == "conv":
        layer = draw.conv("layer", IMAGES, settings.pop("kernel"), **settings)
        channels = layer.weights["bias"].size
    elif kind == "batch_norm":
        layer = draw.batch_norm("layer", "other", 3)
    else:
        layer = Layer("layer", kind, sources, settings=settings)
    other = [draw.conv("other", IMAGES, (1, 1, 3, 3))] if "other" in layer.sources else []
    logits = draw.dense("logits", "pooled", (channels, CLASSES))
    # Evidence for and against every class.
    odd = np.add.outer(np.arange(channels), np.arange(CLASSES)) % 2
    kernel = np.abs(logits.weights["kernel"]) * (1.0 - 2.0 * odd)
    logits = dataclasses.replace(logits, weights=logits.weights | {"kernel": kernel})
    return [
        *other,
        layer,
        Layer("relu", "relu", ("layer",)),
        Layer("pooled", "global_average_pool", ("relu",)),
        logits,
    ]


def norm_behind(kind: str, **settings: Any) -> Network:
    """A norm with negative scales; what lies between it and the convolution is not linear."""
    draw = _Weights(6, negative_scales=True)
    return [
        draw.conv("conv", IMAGES, (3, 3, 3, 8), padding="SAME"),
        Layer("between", kind, ("conv",), settings=settings),
        draw.batch_norm("norm", "between", 8),
        Layer("relu", "relu", ("norm",)),
        Layer("pooled", "global_average_pool", ("relu",)),
        draw.dense("logits", "pooled", (8, CLASSES)),
    ]


PIECES = {
    "conv": piece("conv", kernel=(3, 3, 3, 4)),
    "conv, stride, SAME": piece("conv", kernel=(3, 2, 3, 4), stride=(2, 3), padding="SAME"),
    "conv, stride over rows": piece("conv", kernel=(2, 2, 3, 4), stride=(3, 3)),
    "conv, padding": piece("conv", kernel=(3, 3, 3, 4), padding=((2, 0), (1, 3))),
    "conv, dilation": piece("conv", kernel=(3, 3, 3, 4), dilation=(2, 3), padding="SAME"),
    "conv, depthwise": piece("conv", kernel=(3, 3, 1, 6), groups=3, padding="SAME"),
    "max pool": piece("max_pool", IMAGES, window=(3, 2), stride=(2, 2), padding="SAME"),
    "max pool, padding": piece("max_pool", IMAGES, window=(2, 2), padding=((1, 0), (1, 1))),
    "average pool": piece("average_pool", IMAGES, window=(2, 3), stride=(2, 2)),
    "average pool, SAME": piece(
        "average_pool", IMAGES, window=(3, 3), stride=(2, 2), padding="SAME"
    ),
    "sum": piece("sum", IMAGES, "other"),
    "sum of three": piece("sum", "other", IMAGES, "other"),
    "concat": piece("concat", "other", IMAGES),
    "batch norm": piece("batch_norm"),
    "batch norm behind a ReLU": norm_behind("relu"),
    "batch norm behind a max pool": norm_behind("max_pool", window=(2, 2), stride=(2, 2)),
}

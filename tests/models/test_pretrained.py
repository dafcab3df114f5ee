"""Published weights: every name finds its place, and the network gives the logits it should."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from attnzoom_jax.layers import CBAM, ECA, AttentionZoom, SqueezeExcite
from attnzoom_jax.models import (
    Insert,
    count_classes,
    create_model,
    load_pretrained,
    pretrained,
)
from attnzoom_jax.models.convnext import ConvNeXt
from attnzoom_jax.models.densenet import DenseNet
from attnzoom_jax.models.features import Features
from attnzoom_jax.models.recursive_zoom import RecursiveZoom
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.models.two_stream import TwoStream, two_stream
from attnzoom_jax.models.vgg import VGG
from attnzoom_jax.models.weight_names import TABLES, weight_names
from tests.attribution import imported_networks
from tests.models.test_resnet import random_images, random_variables
from tests.models.test_weight_files import write_torch

KEY = jax.random.key(0)
SHAPE = (1, 64, 64, 3)


def load(model, path, *, image_shape=SHAPE):
    return load_pretrained(model, str(path), key=KEY, image_shape=image_shape)


def flat(variables):
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}


def counts(report):
    """(loaded, newly initialised, unused), as printed."""
    found = re.findall(r"^  (?:loaded|newly initialised|unused) +(\d+)", report, re.MULTILINE)
    return tuple(map(int, found))


# ---- names and shapes of published weights, written from the architectures


def conv(name, c_out, c_in, size, *, bias=False):
    yield f"{name}.weight", (c_out, c_in, size, size)
    if bias:
        yield f"{name}.bias", (c_out,)


def norm(name, c, *, statistics=True):
    yield f"{name}.weight", (c,)
    yield f"{name}.bias", (c,)
    if statistics:
        yield f"{name}.running_mean", (c,)
        yield f"{name}.running_var", (c,)
        yield f"{name}.num_batches_tracked", ()


def linear(name, c_out, c_in):
    yield f"{name}.weight", (c_out, c_in)
    yield f"{name}.bias", (c_out,)


def residual(sizes, width, *, bottleneck, groups=1, base=64, squeeze=False):
    """torchvision's resnet and resnext; with `squeeze` timm's seresnet."""
    yield from conv("conv1", width, 3, 7)
    yield from norm("bn1", width)
    c_in = width
    for s, size in enumerate(sizes):
        channels = width * 2**s
        inner = channels * base // 64 * groups
        c_out = channels * 4 if bottleneck else channels
        for b in range(size):
            at = f"layer{s + 1}.{b}"
            if bottleneck:
                plan = [(inner, c_in, 1), (inner, inner // groups, 3), (c_out, inner, 1)]
            else:
                plan = [(c_out, c_in, 3), (c_out, c_out, 3)]
            for i, (out, into, k) in enumerate(plan, start=1):
                yield from conv(f"{at}.conv{i}", out, into, k)
                yield from norm(f"{at}.bn{i}", out)
            if squeeze:
                yield from conv(f"{at}.se.fc1", c_out // 16, c_out, 1, bias=True)
                yield from conv(f"{at}.se.fc2", c_out, c_out // 16, 1, bias=True)
            if b == 0 and (s > 0 or c_in != c_out):
                yield from conv(f"{at}.downsample.0", c_out, c_in, 1)
                yield from norm(f"{at}.downsample.1", c_out)
            c_in = c_out
    yield from linear("fc", 10, c_in)


def vgg(sizes, width, *, batch_norm):
    place, c_in = 0, 3
    for s, size in enumerate(sizes):
        for _ in range(size):
            c = width * min(2**s, 8)
            yield from conv(f"features.{place}", c, c_in, 3, bias=True)
            if batch_norm:
                yield from norm(f"features.{place + 1}", c)
            place, c_in = place + 2 + batch_norm, c
        place += 1
    yield from linear("classifier.0", 64 * width, c_in * 49)
    yield from linear("classifier.3", 64 * width, 64 * width)
    yield from linear("classifier.6", 10, 64 * width)


def densenet(sizes, width, *, dot=""):
    yield from conv("features.conv0", width, 3, 7)
    yield from norm("features.norm0", width)
    c, growth = width, width // 2
    for s, size in enumerate(sizes, start=1):
        for b in range(1, size + 1):
            at = f"features.denseblock{s}.denselayer{b}"
            yield from norm(f"{at}.norm{dot}1", c)
            yield from conv(f"{at}.conv{dot}1", 4 * growth, c, 1)
            yield from norm(f"{at}.norm{dot}2", 4 * growth)
            yield from conv(f"{at}.conv{dot}2", growth, 4 * growth, 3)
            c += growth
        if s < len(sizes):
            yield from norm(f"features.transition{s}.norm", c)
            yield from conv(f"features.transition{s}.conv", c // 2, c, 1)
            c //= 2
    yield from norm("features.norm5", c)
    yield from linear("classifier", 10, c)


V2_TABLE = [  # t, c, n of the paper's table 2; its blocks have the numbers 1 to 17
    (1, 16, 1),
    (6, 24, 2),
    (6, 32, 3),
    (6, 64, 4),
    (6, 96, 3),
    (6, 160, 3),
    (6, 320, 1),
]


def mobilenet_v2(width):
    yield from conv("features.0.0", width, 3, 3)
    yield from norm("features.0.1", width)
    c_in, number = width, 1
    for t, c, n in V2_TABLE:
        for _ in range(n):
            at, inner, c_out = f"features.{number}.conv", t * c_in, c * width // 32
            if t > 1:
                yield from conv(f"{at}.0.0", inner, c_in, 1)
                yield from norm(f"{at}.0.1", inner)
            depthwise, last = (f"{at}.1", 2) if t > 1 else (f"{at}.0", 1)
            yield from conv(f"{depthwise}.0", inner, 1, 3)
            yield from norm(f"{depthwise}.1", inner)
            yield from conv(f"{at}.{last}", c_out, inner, 1)
            yield from norm(f"{at}.{last + 1}", c_out)
            c_in, number = c_out, number + 1
    yield from conv("features.18.0", 40 * width, c_in, 1)
    yield from norm("features.18.1", 40 * width)
    yield from linear("classifier.1", 10, 40 * width)


def timm_mobilenet_v2(width):
    yield from conv("conv_stem", width, 3, 3)
    yield from norm("bn1", width)
    c_in = width
    for s, (t, c, n) in enumerate(V2_TABLE):
        for b in range(n):
            at, inner, c_out = f"blocks.{s}.{b}", t * c_in, c * width // 32
            layers = [("conv_pw", inner, c_in, 1)] if t > 1 else []
            layers.append(("conv_dw", inner, 1, 3))
            layers.append(("conv_pwl" if t > 1 else "conv_pw", c_out, inner, 1))
            for i, (name, out, into, k) in enumerate(layers, start=1):
                yield from conv(f"{at}.{name}", out, into, k)
                yield from norm(f"{at}.bn{i}", out)
            c_in = c_out
    yield from conv("conv_head", 40 * width, c_in, 1)
    yield from norm("bn2", 40 * width)
    yield from linear("classifier", 10, 40 * width)


def timm_mobilenet_v1(width):
    yield from conv("conv_stem", width, 3, 3)
    yield from norm("bn1", width)
    c_in = width
    for s, channels in enumerate([[2], [4, 4], [8, 8], [16] * 6, [32] * 2]):
        for b, c in enumerate(channels):
            yield from conv(f"blocks.{s}.{b}.conv_dw", c_in, 1, 3)
            yield from norm(f"blocks.{s}.{b}.bn1", c_in)
            yield from conv(f"blocks.{s}.{b}.conv_pw", c * width, c_in, 1)
            yield from norm(f"blocks.{s}.{b}.bn2", c * width)
            c_in = c * width
    yield from linear("classifier", 10, c_in)


def convnext(sizes, width, *, source):
    """torchvision, timm (convnext_tiny.fb_in1k) or the authors' code."""
    c = width
    first, opens, block, names, head = {
        "torchvision": (
            "features.0.",
            lambda s: f"features.{2 * s}.",
            lambda s, b: f"features.{2 * s + 1}.{b}.",
            ("block.0", "block.2", "block.3", "block.5", "layer_scale"),
            ("classifier.0", "classifier.2"),
        ),
        "timm": (
            "stem.",
            lambda s: f"stages.{s}.downsample.",
            lambda s, b: f"stages.{s}.blocks.{b}.",
            ("conv_dw", "norm", "mlp.fc1", "mlp.fc2", "gamma"),
            ("head.norm", "head.fc"),
        ),
        "authors": (
            "downsample_layers.0.",
            lambda s: f"downsample_layers.{s}.",
            lambda s, b: f"stages.{s}.{b}.",
            ("dwconv", "norm", "pwconv1", "pwconv2", "gamma"),
            ("norm", "head"),
        ),
    }[source]
    yield from conv(f"{first}0", c, 3, 4, bias=True)
    yield from norm(f"{first}1", c, statistics=False)
    for s, size in enumerate(sizes):
        if s:
            yield from norm(f"{opens(s)}0", c, statistics=False)
            yield from conv(f"{opens(s)}1", 2 * c, c, 2, bias=True)
            c *= 2
        for b in range(size):
            depthwise, between, wide, narrow, scale = (block(s, b) + name for name in names)
            yield from conv(depthwise, c, 1, 7, bias=True)
            yield from norm(between, c, statistics=False)
            yield from linear(wide, 4 * c, c)
            yield from linear(narrow, c, 4 * c)
            yield scale, (c, 1, 1) if source == "torchvision" else (c,)
    yield from norm(head[0], c, statistics=False)
    yield from linear(head[1], 10, c)


def wide_resnet(width, widen):
    """The module that robustness benchmarks share."""
    yield from conv("conv1", width, 3, 3)
    c_in = width
    for s in range(1, 4):
        c = width * widen * 2 ** (s - 1)
        for b in range(4):
            at = f"block{s}.layer.{b}"
            yield from norm(f"{at}.bn1", c_in)
            yield from conv(f"{at}.conv1", c, c_in, 3)
            yield from norm(f"{at}.bn2", c)
            yield from conv(f"{at}.conv2", c, c, 3)
            if b == 0:
                yield from conv(f"{at}.convShortcut", c, c_in, 1)
            c_in = c
    yield from norm("bn1", c_in)
    yield from linear("fc", 10, c_in)


def iresnet(width):
    yield from conv("conv1", width, 3, 7)
    yield from norm("bn1", width)
    c_in = width
    for s, size in enumerate((3, 4, 6, 3)):
        c, c_out = width * 2**s, width * 2**s * 4
        for b in range(size):
            at = f"layer{s + 1}.{b}"
            if b > 1:
                yield from norm(f"{at}.bn0", c_in)
            yield from conv(f"{at}.conv1", c, c_in, 1)
            yield from norm(f"{at}.bn1", c)
            yield from conv(f"{at}.conv2", c, c, 3)
            yield from norm(f"{at}.bn2", c)
            yield from conv(f"{at}.conv3", c_out, c, 1)
            if b in (0, size - 1):
                yield from norm(f"{at}.bn3", c_out)
            if b == 0:  # number 0 is the pool
                yield from conv(f"{at}.downsample.1", c_out, c_in, 1)
                yield from norm(f"{at}.downsample.2", c_out)
            c_in = c_out
    yield from linear("fc", 10, c_in)


RESNET50, VGG16, VGG19, TINY = (3, 4, 6, 3), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4), (3, 3, 9, 3)
FILES = {
    "resnet18": ("resnet18", 8, residual((2, 2, 2, 2), 8, bottleneck=False)),
    "resnet34": ("resnet34", 4, residual(RESNET50, 4, bottleneck=False)),
    "resnet50": ("resnet50", 4, residual(RESNET50, 4, bottleneck=True)),
    "resnet101": ("resnet101", 4, residual((3, 4, 23, 3), 4, bottleneck=True)),
    "resnet152": ("resnet152", 4, residual((3, 8, 36, 3), 4, bottleneck=True)),
    "resnext": ("resnext50_32x4d", 16, residual(RESNET50, 16, bottleneck=True, groups=32, base=4)),
    "seresnet": ("se_resnet50", 8, residual(RESNET50, 8, bottleneck=True, squeeze=True)),
    "vgg16": ("vgg16", 2, vgg(VGG16, 2, batch_norm=False)),
    "vgg16_bn": ("vgg16_bn", 2, vgg(VGG16, 2, batch_norm=True)),
    "vgg19": ("vgg19", 2, vgg(VGG19, 2, batch_norm=False)),
    "vgg19_bn": ("vgg19_bn", 2, vgg(VGG19, 2, batch_norm=True)),
    "densenet": ("densenet121", 4, densenet((6, 12, 24, 16), 4)),
    "densenet, old names": ("densenet121", 4, densenet((6, 12, 24, 16), 4, dot=".")),
    "mobilenet_v2": ("mobilenet_v2", 4, mobilenet_v2(4)),
    "mobilenet_v2, timm": ("mobilenet_v2", 4, timm_mobilenet_v2(4)),
    "mobilenet_v1": ("mobilenet_v1", 2, timm_mobilenet_v1(2)),
    "convnext": ("convnext_tiny", 4, convnext(TINY, 4, source="torchvision")),
    "convnext, timm": ("convnext_tiny", 4, convnext(TINY, 4, source="timm")),
    "convnext, authors": ("convnext_tiny", 4, convnext(TINY, 4, source="authors")),
    "wide_resnet": ("wide_resnet28_10", 2, wide_resnet(2, 10)),
    "iresnet": ("iresnet50", 4, iresnet(4)),
}
FILES = {name: (model, width, list(rows)) for name, (model, width, rows) in FILES.items()}


def random_file(rows, *, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in rows}


def save(path, arrays):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)


@pytest.mark.parametrize("name", FILES)
def test_every_array_of_a_published_file_finds_its_place(name, tmp_path, capsys):
    model_name, width, rows = FILES[name]
    file = random_file(rows)
    save(tmp_path / "w.safetensors", file)
    model = create_model(model_name, num_classes=10, width=width)
    variables = flat(load(model, tmp_path / "w.safetensors"))

    arrays = {name: a for name, a in file.items() if "num_batches" not in name}
    assert counts(capsys.readouterr().out) == (len(arrays), 0, 0)
    assert len(variables) == len(arrays)
    # As all values differ, the smallest of an array tells which one it is.
    by_minimum = {float(a.min()): (path, a) for path, a in variables.items()}
    leaves = {"running_mean": "mean", "running_var": "var", "bias": "bias"}
    before = {}
    for name, array in arrays.items():
        path, found = by_minimum[float(array.min())]
        np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(array, axis=None))
        module, _, leaf = name.rpartition(".")
        if leaf in leaves:
            assert path.endswith(f"/{leaves[leaf]}")
        # What stands together in the file does so here.
        place = path.partition("/")[2].rpartition("/")[0]
        assert before.setdefault(module, place) == place or leaf in ("layer_scale", "gamma")


def test_no_two_arrays_share_a_name():
    for model_name, width, rows in FILES.values():
        model = create_model(model_name, num_classes=10, width=width)
        shapes = jax.eval_shape(model.init, KEY, jnp.zeros(SHAPE))
        paths = [path.partition("/")[2] for path in flatten_dict(shapes, sep="/")]
        names = {name for name, _ in rows}
        found = [
            next(name for name in options if name in names)
            for options in weight_names(paths, TABLES[type(model)]).values()
        ]
        assert len(set(found)) == len(found) == len(paths)


# ---- there and back: our variables under torch's names and in its layouts


def to_torch_layout(array):
    if array.ndim == 4:
        return np.einsum("hwio->oihw", array)
    return array.T


def to_torch_names(variables, prefixes):
    """Each module of ours as torch has it, one that is not in `prefixes` being an error."""
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, array in flat(variables).items():
        _, _, place = path.partition("/")
        module, _, leaf = place.rpartition("/")
        state[f"{prefixes[module]}.{leaves.get(leaf, leaf)}"] = to_torch_layout(array)
    return state


def resnet18_prefixes():
    prefixes = {"stem/conv1": "conv1", "stem/norm1": "bn1", "head": "fc"}
    for s in (1, 2, 3, 4):
        for b in (0, 1):
            for i in (1, 2):
                prefixes[f"stage{s}/block{b + 1}/conv{i}"] = f"layer{s}.{b}.conv{i}"
                prefixes[f"stage{s}/block{b + 1}/norm{i}"] = f"layer{s}.{b}.bn{i}"
        prefixes[f"stage{s}/block1/shortcut_conv"] = f"layer{s}.0.downsample.0"
        prefixes[f"stage{s}/block1/shortcut_norm"] = f"layer{s}.0.downsample.1"
    return prefixes


def mobilenet_v2_prefixes():
    prefixes = {
        "stem/conv1": "features.0.0",
        "stem/norm1": "features.0.1",
        "stage1/block1/conv2": "features.1.conv.0.0",
        "stage1/block1/norm2": "features.1.conv.0.1",
        "stage1/block1/conv3": "features.1.conv.1",
        "stage1/block1/norm3": "features.1.conv.2",
        "stage4/conv1": "features.18.0",
        "stage4/norm1": "features.18.1",
        "head": "classifier.1",
    }
    blocks = [
        f"stage{s}/block{b}" for s, n in ((1, 3), (2, 3), (3, 7), (4, 4)) for b in range(1, n + 1)
    ]
    for number, block in enumerate(blocks[1:], start=2):
        at = f"features.{number}.conv"
        for i, (one, two) in enumerate((("0.0", "0.1"), ("1.0", "1.1"), ("2", "3")), start=1):
            prefixes[f"{block}/conv{i}"] = f"{at}.{one}"
            prefixes[f"{block}/norm{i}"] = f"{at}.{two}"
    return prefixes


def resnet18_state(*, num_classes=10, width=8, seed=0):
    model = create_model("resnet18", num_classes=num_classes, width=width)
    variables = random_variables(model, np.zeros(SHAPE), seed=seed)
    return model, variables, to_torch_names(variables, resnet18_prefixes())


def assert_same_variables(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "npz"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_there_and_back(name, suffix, tmp_path):
    prefixes = {"resnet18": resnet18_prefixes, "mobilenet_v2": mobilenet_v2_prefixes}[name]()
    model = create_model(name, num_classes=7, width=8)
    variables = random_variables(model, np.zeros(SHAPE))
    state = to_torch_names(variables, prefixes)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        write_torch(path, {k: np.ascontiguousarray(v) for k, v in state.items()})
    elif suffix == "npz":
        np.savez(path, **state)
    else:
        save(path, state)
    assert_same_variables(load(model, path), variables)


def test_own_names(tmp_path):
    model = Insert(create_model("resnet18", num_classes=7, width=8), {"stage1": SqueezeExcite()})
    variables = random_variables(model, np.zeros(SHAPE))
    np.savez(tmp_path / "w.npz", **flat(variables))
    assert_same_variables(load(model, tmp_path / "w.npz"), variables)


def test_prefixes_and_half_precision(tmp_path):
    model, variables, state = resnet18_state()
    arrays = {f"module.model.{name}": a.astype(np.float16) for name, a in state.items()}
    save(tmp_path / "w.safetensors", arrays)
    expected = jax.tree.map(lambda a: a.astype(np.float16).astype(np.float32), variables)
    assert_same_variables(load(model, tmp_path / "w.safetensors"), expected)


# ---- what is new, what is not used


def test_head_of_another_number_of_classes_is_new(tmp_path, capsys):
    _, variables, state = resnet18_state(num_classes=10)
    save(tmp_path / "w.safetensors", state)
    model = create_model("resnet18", num_classes=3, width=8)
    found = load(model, tmp_path / "w.safetensors")
    report = capsys.readouterr().out
    assert counts(report) == (len(flat(variables)) - 2, 2, 0)
    assert "head (head: the file's is [64, 10], the model's [64, 3])" in report
    expected = jax.jit(lambda: model.init(KEY, jnp.zeros(SHAPE))["params"]["head"]["kernel"])()
    np.testing.assert_allclose(found["params"]["head"]["kernel"], expected, atol=1e-6)
    assert np.std(expected) > 0.01
    del found["params"]["head"], variables["params"]["head"]
    assert_same_variables(found, variables)


@pytest.mark.parametrize(
    "layer", [SqueezeExcite(identity_init=True), ECA(identity_init=True), CBAM(identity_init=True)]
)
def test_inserted_layers_are_new_and_leave_the_output_unchanged(layer, tmp_path, capsys):
    backbone, variables, state = resnet18_state()
    save(tmp_path / "w.safetensors", state)
    model = Insert(backbone, {"stage1": layer, "stage3/block2": layer})
    found = load(model, tmp_path / "w.safetensors")
    report = capsys.readouterr().out
    assert "newly initialised" in report and "inserted/stage3.block2" in report
    assert counts(report)[0] == len(state)
    assert_same_variables(found["params"]["backbone"], variables["params"])
    images = random_images(h=40, w=40)
    logits = jax.jit(model.apply)(found, images)
    np.testing.assert_allclose(logits, jax.jit(backbone.apply)(variables, images), rtol=1e-5)
    assert set(found["params"]["inserted"]) == {"stage1", "stage3.block2"}


def test_attention_zoom_cannot_begin_as_the_identity(tmp_path):
    backbone, variables, state = resnet18_state()
    save(tmp_path / "w.safetensors", state)
    model = Insert(backbone, {"stage1": AttentionZoom()})
    images = random_images(h=40, w=40)
    logits = jax.jit(model.apply)(load(model, tmp_path / "w.safetensors"), images)
    assert np.abs(logits - jax.jit(backbone.apply)(variables, images)).max() > 1e-2


def test_attention_inside_blocks_may_be_new(tmp_path, capsys):
    save(tmp_path / "w.safetensors", random_file(residual((1, 1), 4, bottleneck=True)))
    for attention in ("squeeze_excite", "cbam"):
        model = ResNet(10, stage_sizes=(1, 1), block="bottleneck", width=4, attention=attention)
        load(model, tmp_path / "w.safetensors")
        report = capsys.readouterr().out
        assert "stage1/block1/attention" in report
        assert counts(report)[1] > 0


def test_unused_names_are_printed(tmp_path, capsys):
    model, _, state = resnet18_state()
    extra = {f"aux.{i}.weight": np.zeros(3, np.float32) for i in range(20)}
    save(tmp_path / "w.safetensors", state | extra)
    load(model, tmp_path / "w.safetensors")
    report = capsys.readouterr().out
    assert counts(report) == (len(state), 0, 20)
    assert "aux.0.weight" in report and "... and 12 more" in report


def test_classifier_of_vgg_is_not_needed(tmp_path, capsys):
    save(tmp_path / "w.safetensors", random_file(FILES["vgg16"][2]))
    model = create_model("vgg16", num_classes=10, width=2, stem="cifar")
    load(model, tmp_path / "w.safetensors")
    report = capsys.readouterr().out
    assert counts(report) == (26, 2, 4)
    assert "the file's is [128, 10], the model's [16, 10]" in report


# ---- what is refused


def test_other_shapes_are_listed_with_both_sides(tmp_path):
    _, _, state = resnet18_state()
    state["layer3.1.conv2.weight"] = np.zeros((32, 16, 3, 3), np.float32)
    state["bn1.bias"] = np.zeros(5, np.float32)
    save(tmp_path / "w.safetensors", state)
    with pytest.raises(ValueError, match="2 shapes differ") as error:
        load(create_model("resnet18", num_classes=10, width=8), tmp_path / "w.safetensors")
    message = str(error.value)
    assert "bn1.bias [5]: expected [8] for params/stem/norm1/bias" in message
    assert (
        "layer3.1.conv2.weight [32, 16, 3, 3], here [3, 3, 16, 32]: expected [3, 3, 32, 32] for "
        "params/stage3/block2/conv2/kernel"
    ) in message


@pytest.mark.parametrize(
    ("file", "model", "best"),
    [
        ("resnet18", "resnet34", "resnet18"),
        ("resnet101", "resnet50", "resnet101"),
        ("vgg19", "resnet18", "vgg19"),
        ("vgg16_bn", "vgg16", "vgg16_bn"),
        ("densenet", "mobilenet_v2", "densenet121"),
        ("mobilenet_v2", "mobilenet_v1", "mobilenet_v2"),
        ("seresnet", "resnet50", "se_resnet50"),
        ("convnext, timm", "vgg16", "convnext_tiny"),
    ],
)
def test_a_file_of_another_network_names_the_one_that_fits(file, model, best, monkeypatch):
    """At full width: what fits best is judged by shapes too."""
    makers = {
        "resnet18": lambda: residual((2, 2, 2, 2), 64, bottleneck=False),
        "resnet101": lambda: residual((3, 4, 23, 3), 64, bottleneck=True),
        "seresnet": lambda: residual(RESNET50, 64, bottleneck=True, squeeze=True),
        "vgg19": lambda: vgg(VGG19, 64, batch_norm=False),
        "vgg16_bn": lambda: vgg(VGG16, 64, batch_norm=True),
        "densenet": lambda: densenet((6, 12, 24, 16), 64),
        "mobilenet_v2": lambda: mobilenet_v2(32),
        "convnext, timm": lambda: convnext(TINY, 96, source="timm"),
    }
    # One number, repeated without being stored, is enough for names and shapes.
    arrays = {k: np.broadcast_to(np.float32(0), shape) for k, shape in makers[file]()}
    monkeypatch.setattr(pretrained, "read_weights", lambda path: arrays)
    with pytest.raises(ValueError, match=f"the file fits {best} best"):
        load(create_model(model, num_classes=10), "w.pth")


def test_a_file_of_an_unknown_network_is_one_line(tmp_path):
    names = [f"encoder.layer.{i}.attention.query.weight" for i in range(12)]
    save(tmp_path / "w.safetensors", {name: np.zeros((4, 4), np.float32) for name in names})
    with pytest.raises(ValueError, match="its names are of no network that is known") as error:
        load(create_model("resnet18", num_classes=10, width=8), tmp_path / "w.safetensors")
    assert "\n" not in str(error.value)


def test_a_model_without_a_table_and_a_bad_shape(tmp_path):
    model, _, state = resnet18_state()
    save(tmp_path / "w.safetensors", state)
    with pytest.raises(
        ValueError, match=r"expected a network of one family .*, SqueezeExcite holds none"
    ):
        load(SqueezeExcite(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"image_shape=\(64, 64\): expected"):
        load(model, tmp_path / "w.safetensors", image_shape=(64, 64))


# ---- against torch


def torch_pairs():
    from tests.models import torch_networks

    return {
        "resnet18": (
            lambda: torch_networks.ResNet18(10, 8),
            lambda: create_model("resnet18", num_classes=10, width=8),
        ),
        "mobilenet_v2": (
            lambda: torch_networks.MobileNetV2(10, 8),
            lambda: create_model("mobilenet_v2", num_classes=10, width=8),
        ),
        "vgg": (
            lambda: torch_networks.VGG(10, 4, (1, 2, 1), norm=False),
            lambda: VGG(10, stage_sizes=(1, 2, 1), width=4),
        ),
        "vgg_bn": (
            lambda: torch_networks.VGG(10, 4, (2, 1), norm=True),
            lambda: VGG(10, stage_sizes=(2, 1), width=4, norm="batch"),
        ),
        "densenet": (
            lambda: torch_networks.DenseNet(10, 8, (2, 3, 1)),
            lambda: DenseNet(10, stage_sizes=(2, 3, 1), width=8),
        ),
        "convnext": (
            lambda: torch_networks.ConvNeXt(10, 8, (1, 2)),
            lambda: ConvNeXt(10, stage_sizes=(1, 2), width=8),
        ),
    }


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "vgg", "vgg_bn", "densenet", "convnext"]
)
def test_logits_are_those_of_torch(name, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.models import torch_networks

    create_theirs, create_ours = torch_pairs()[name]
    theirs = torch_networks.randomise(create_theirs())
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "w.pth")
    images = random_images(h=52, w=72)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    model = create_ours()
    variables = load(model, tmp_path / "w.pth")
    logits = jax.jit(model.apply)(variables, images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# ---- published weights

needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(
        not all(
            (imported_networks.DATA / folder).is_dir()
            for folder in ("weights_cifar10_resnet", "weights_imagenet")
        ),
        reason=f"no weights in {imported_networks.DATA} (ATTNZOOM_DATA)",
    ),
]


def published(test):
    for mark in needs_data:
        test = mark(test)
    return test


def cifar_forward(weights, images):
    """The option-A residual network, in torch's layout, straight from the file."""

    def conv(x, name, stride, pad):
        return jax.lax.conv_general_dilated(
            x,
            weights[f"{name}.weight"],
            (stride, stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )

    def norm(x, name):
        mean, var, scale, bias = (
            weights[f"{name}.{leaf}"][:, None, None]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(norm(conv(images.transpose(0, 3, 1, 2), "conv1", 1, 1), "bn1"))
    for s in (1, 2, 3):
        b = 0
        while f"layer{s}.{b}.conv1.weight" in weights:
            at, stride = f"layer{s}.{b}", 2 if s > 1 and b == 0 else 1
            y = jax.nn.relu(norm(conv(x, f"{at}.conv1", stride, 1), f"{at}.bn1"))
            y = norm(conv(y, f"{at}.conv2", 1, 1), f"{at}.bn2")
            if stride == 2:
                quarter = y.shape[1] // 4
                x = jnp.pad(x[:, :, ::2, ::2], ((0, 0), (quarter, quarter), (0, 0), (0, 0)))
            x, b = jax.nn.relu(x + y), b + 1
    return x.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]


@published
@pytest.mark.parametrize("depth", [20, 56])
def test_published_cifar_resnet(depth, capsys):
    path = imported_networks.DATA / "weights_cifar10_resnet" / f"resnet{depth}.safetensors"
    model = create_model(f"cifar_resnet{depth}", num_classes=10)
    assert count_classes(model.clone(num_classes=1), str(path), image_shape=(32, 32, 3)) == 10
    variables = load(model, path, image_shape=(1, 32, 32, 3))
    weights = safetensors.numpy.load_file(path)
    assert counts(capsys.readouterr().out) == (len(weights), 0, 0)
    images = random_images(n=4, h=32, w=32)
    expected = jax.jit(cifar_forward)(weights, images)
    assert np.std(expected) > 0.5
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def listed_forward(operations, weights, images):
    """A published list of operations, in their order; "SAME" is TensorFlow's."""
    values = {0: images}
    for operation in operations["ops"]:
        x, *others = (values[number] for number in operation["inp"])
        if operation["op"] == "add":
            x = x + others[0]
        elif operation["op"] == "gap":
            x = x.mean((1, 2), keepdims=True)
        else:
            kernel = weights[f"{operation['name']}/kernel"]
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (operation["stride"],) * 2,
                operation["padding"],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=x.shape[-1] // kernel.shape[2],
            )
            x = x + weights[f"{operation['name']}/bias"]
            x = jnp.clip(x, 0, 6) if operation["act"] == "relu6" else x
        values[operation["out"]] = x
    return x[:, 0, 0]


@published
@pytest.mark.parametrize(
    ("name", "size", "model", "options"),
    [
        ("tf2_mobilenet_v2_1.0_224_ptq.dequant", 224, "mobilenet_v2", {}),
        ("mobilenet_v1_0.25_128_quant.dequant", 128, "mobilenet_v1", {"width": 8}),
    ],
)
def test_published_mobilenet(name, size, model, options, capsys):
    folder = imported_networks.DATA / "weights_imagenet"
    operations = json.loads((folder / f"{name.removesuffix('.dequant')}.graph.json").read_text())
    model = create_model(model, num_classes=1001, padding="tf", **options)
    file = f"{folder}/{name}.npz"
    assert count_classes(model.clone(num_classes=1), file, image_shape=(32, 32, 3)) == 1001
    variables = load(model, file)
    report = capsys.readouterr().out
    assert counts(report)[1:] == (0, 0) and "folded" in report
    with np.load(folder / f"{name}.npz") as arrays:
        weights = dict(arrays)
    images = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    expected = jax.jit(lambda w, x: listed_forward(operations, w, x))(weights, images)
    assert np.std(expected) > 0.5
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    other = jax.jit(model.clone(padding="torch").apply)(variables, images)
    assert np.abs(other - expected).max() > 0.1


# ---- models around a network


def small_vgg(*, num_classes=5):
    return VGG(num_classes, stage_sizes=(1, 1, 1, 1, 2), width=8)


def test_both_streams_begin_with_the_weights_of_the_network(tmp_path, capsys):
    file = tmp_path / "vgg.npz"
    given = flat(random_variables(small_vgg(), random_images(h=64, w=64)))
    np.savez(file, **given)
    options = {"hidden": 4, "steps": 2, "patch_size": 32, "add_on": 0, "patch_source": "whole"}
    model = two_stream(small_vgg(num_classes=3), **options)
    loaded = flat(load(model, file))
    shared = flat(load(two_stream(small_vgg(num_classes=3), shared=True, **options), file))
    assert not any("object_trunk" in path for path in shared)
    trunks = ("params/global_trunk/backbone/", "params/object_trunk/backbone/")
    convs = [path.removeprefix("params/") for path in given if "/stage" in path]
    for prefix in trunks:
        for name in convs:
            np.testing.assert_array_equal(loaded[prefix + name], given[f"params/{name}"])
    assert sorted(path for path in loaded if path.startswith(trunks)) == sorted(
        prefix + name for prefix in trunks for name in convs
    )
    report = capsys.readouterr().out
    assert counts(report)[0] == 2 * len(convs) and "object_head" in report


def test_a_network_inside_of_a_recursion_gets_weights_and_its_own_head(tmp_path):
    file = tmp_path / "resnet.npz"
    backbone = ResNet(4, stem="small", block="basic", stage_sizes=(1, 1), width=4)
    given = flat(random_variables(backbone, random_images(h=32, w=32)))
    np.savez(file, **given)
    loaded = flat(load(RecursiveZoom(backbone, steps=2, tap="stage2"), file))
    for path, array in given.items():
        collection, _, name = path.partition("/")
        np.testing.assert_array_equal(loaded[f"{collection}/backbone/{name}"], array)


def test_networks_of_two_families_are_refused(tmp_path):
    file = tmp_path / "vgg.npz"
    np.savez(file, **flat(random_variables(small_vgg(), random_images(h=64, w=64))))
    resnet = ResNet(5, stem="small", block="basic", stage_sizes=(1, 1), width=4)
    trunks = (Features(small_vgg(), "stage5"), Features(resnet, "stage2"))
    with pytest.raises(ValueError, match=r"expected a network of one family .* ResNet, VGG"):
        load(TwoStream(*trunks, 5, patch_source="whole"), file)


def test_a_file_that_lacks_a_block_is_refused(tmp_path):
    model, _, state = resnet18_state()
    whole = {name: array for name, array in state.items() if not name.startswith("layer4.1.")}
    save(tmp_path / "w.safetensors", whole)
    with pytest.raises(ValueError, match=r"lacks \d+ arrays of the network \(ResNet\): .*stage4"):
        load(model, tmp_path / "w.safetensors")


def test_a_file_of_two_networks_is_refused(tmp_path):
    model, _, state = resnet18_state()
    both = {f"{prefix}{name}": a for prefix in ("model.", "module.") for name, a in state.items()}
    save(tmp_path / "w.safetensors", both)
    with pytest.raises(ValueError, match="under several prefixes; it holds more than one network"):
        load(model, tmp_path / "w.safetensors")

"""The residual networks against a slow NumPy forward pass, and the promises of their names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.layers import CBAM, ECA, SqueezeExcite
from attnzoom_jax.models import Insert
from attnzoom_jax.models.resnet import ResNet, pad_shortcut

# ---- the oracle: float64, one output pixel at a time, nothing taken from the package


def slow_conv(x, kernel, *, stride, pad):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    size, _, c_in, c_out = kernel.shape
    h, w = ((s - size) // stride + 1 for s in x.shape[1:3])
    y = np.zeros((x.shape[0], h, w, c_out))
    groups = x.shape[-1] // c_in  # the first outputs see the first inputs, and so on
    for i in range(h):
        for j in range(w):
            patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            for g in range(groups):
                seen = np.s_[..., g * c_in : (g + 1) * c_in]
                made = np.s_[..., g * c_out // groups : (g + 1) * c_out // groups]
                y[:, i, j][made] = np.einsum("nabc,abcd->nd", patch[seen], kernel[made])
    return y


def slow_max_pool(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    h, w = ((s - 3) // 2 + 1 for s in x.shape[1:3])
    y = np.zeros((x.shape[0], h, w, x.shape[-1]))
    for i in range(h):
        for j in range(w):
            y[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max(axis=(1, 2))
    return y


def slow_norm(x, params, stats):
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return x * params["scale"] + params["bias"]


def relu(x):
    return np.where(x > 0, x, 0)


def slow_shortcut(x, params, stats, *, channels, stride):
    if "shortcut_conv" in params:
        x = slow_conv(x, params["shortcut_conv"]["kernel"], stride=stride, pad=0)
        return slow_norm(x, params["shortcut_norm"], stats["shortcut_norm"])
    y = np.zeros((x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), channels))
    front = (channels - x.shape[-1]) // 2
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            y[:, i, j, front : front + x.shape[-1]] = x[:, i * stride, j * stride]
    return y


def slow_forward(variables, images, *, stem, block, stage_sizes):
    params, stats = variables["params"], variables["batch_stats"]

    def conv_norm(x, name, i, stride, p, s):
        kernel = p[f"conv{i}"]["kernel"]
        x = slow_conv(x, kernel, stride=stride, pad=kernel.shape[0] // 2)
        return slow_norm(x, p[f"norm{i}"], s[f"norm{i}"])

    x = conv_norm(images, "stem", 1, 1 if stem == "cifar" else 2, params["stem"], stats["stem"])
    x = relu(x)
    if stem == "imagenet":
        x = slow_max_pool(x)
    for stage, size in enumerate(stage_sizes, start=1):
        for b in range(1, size + 1):
            p = params[f"stage{stage}"][f"block{b}"]
            s = stats[f"stage{stage}"][f"block{b}"]
            stride = 2 if stage > 1 and b == 1 else 1
            strides = (stride, 1) if block == "basic" else (1, stride, 1)
            y = x
            for i, conv_stride in enumerate(strides, start=1):
                y = conv_norm(y, "block", i, conv_stride, p, s)
                if i < len(strides):
                    y = relu(y)
            x = relu(y + slow_shortcut(x, p, s, channels=y.shape[-1], stride=stride))
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def random_variables(model, images, *, seed=0):
    """Variables of the model's shapes with no value at its default, so that each one matters."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        if kind in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return rng.normal(0, 0.3, leaf.shape)

    tree = jax.tree_util.tree_map_with_path(draw, shapes)
    return jax.tree.map(lambda a: a.astype(np.float32), tree)


def fast_key():
    # Drawing with the default generator takes seconds to compile.
    return jax.random.key(0, impl="rbg")


def random_images(n=2, h=18, w=15, *, seed=1):
    return np.random.default_rng(seed).normal(size=(n, h, w, 3)).astype(np.float32)


def tap_shapes(model, shape):
    """{path: shape and dtype of the output} of every submodule, without computing anything."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return flat_taps(
        jax.eval_shape(
            lambda v, x: model.apply(v, x, capture_intermediates=True)[1], variables, images
        )
    )


def flat_taps(state):
    leaves = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    return {"/".join(k.key for k in path[:-2]): leaf for path, leaf in leaves}


# ---- values


@pytest.mark.parametrize(
    ("stem", "block", "stage_sizes", "options"),
    [
        ("imagenet", "basic", (1, 2), {}),
        ("cifar", "bottleneck", (2, 1), {}),
        ("cifar", "basic", (1, 2, 1), {"shortcut": "pad"}),
        ("small", "bottleneck", (1, 1), {"shortcut": "pad"}),
        ("cifar", "bottleneck", (1, 1), {"groups": 4, "width_per_group": 32}),
    ],
)
def test_equals_slow_forward_pass(stem, block, stage_sizes, options):
    model = ResNet(5, stem=stem, block=block, stage_sizes=stage_sizes, width=4, **options)
    images = random_images()
    variables = random_variables(model, images)
    logits = jax.jit(model.apply)(variables, images)
    expected = slow_forward(
        jax.tree.map(np.float64, variables),
        images.astype(np.float64),
        stem=stem,
        block=block,
        stage_sizes=stage_sizes,
    )
    assert expected.std() > 0.1  # a network that has died would agree with anything
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 3)])
def test_pad_shortcut_equals_slow_one(h, w):
    x = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)
    for channels in (3, 6, 8):
        for stride in (1, 2):
            expected = slow_shortcut(x, {}, {}, channels=channels, stride=stride)
            np.testing.assert_array_equal(
                pad_shortcut(jnp.asarray(x), channels=channels, stride=stride), expected
            )


def test_pad_shortcut_cannot_drop_channels():
    with pytest.raises(ValueError, match="from 3 channels down to 2"):
        pad_shortcut(jnp.zeros((1, 2, 2, 3)), channels=2, stride=1)


# ---- groups and attention


def test_a_group_has_its_width_in_proportion_and_at_least_one_channel():
    def kernels(width):
        model = ResNet(
            3, block="bottleneck", stage_sizes=(1, 1), width=width, groups=32, width_per_group=4
        )
        images = jnp.zeros((1, 32, 32, 3))
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        return [params[f"stage{i}"]["block1"]["conv2"]["kernel"].shape for i in (1, 2)]

    assert kernels(64) == [(3, 3, 4, 128), (3, 3, 8, 256)]  # Xie et al. 2017, table 1
    assert kernels(8) == [(3, 3, 1, 32), (3, 3, 1, 32)]


def split_attention(tree):
    """A model's variables as those of the plain one with layers inserted after the last norms."""
    plain, inserted = {}, {}
    for stage, blocks in tree.items():
        plain[stage] = blocks
        if stage.startswith("stage"):
            plain[stage] = {}
            for block, parts in blocks.items():
                plain[stage][block] = {k: v for k, v in parts.items() if k != "attention"}
                if "attention" in parts:
                    inserted[f"{stage}.{block}.norm3"] = parts["attention"]
    return {"backbone": plain} | ({"inserted": inserted} if inserted else {})


@pytest.mark.parametrize(
    ("attention", "layer"), [("squeeze_excite", SqueezeExcite()), ("eca", ECA()), ("cbam", CBAM())]
)
def test_attention_in_every_block_is_a_layer_inserted_after_every_last_norm(attention, layer):
    plain = ResNet(3, stem="cifar", block="bottleneck", stage_sizes=(1, 1), width=4)
    named = plain.clone(attention=attention)
    paths = ("stage1/block1/norm3", "stage2/block1/norm3")
    model = Insert(plain, dict.fromkeys(paths, layer))
    images = random_images(h=4, w=4)
    variables = random_variables(named, images)
    same = {collection: split_attention(tree) for collection, tree in variables.items()}
    assert len(same["params"]["inserted"]) == len(paths)

    def trained(model):
        return jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))

    logits, updates = trained(named)(variables)
    expected, expected_updates = trained(model)(same)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        {"batch_stats": split_attention(updates["batch_stats"])},
        expected_updates,
    )


@pytest.mark.parametrize("attention", ["squeeze_excite", "eca", "cbam"])
def test_attention_keeps_the_compute_type_and_names_its_masks(attention):
    model = ResNet(
        3, stem="cifar", stage_sizes=(1,), width=4, attention=attention, dtype="bfloat16"
    )
    taps = tap_shapes(model, (1, 8, 8, 3))
    assert taps["stage1/block1/attention"].dtype == taps["stage1"].dtype == jnp.bfloat16
    gates = [path for path in taps if path.endswith("gate")]
    below = ("channel/gate", "spatial/gate") if attention == "cbam" else ("gate",)
    assert sorted(gates) == [f"stage1/block1/attention/{gate}" for gate in below]
    assert all(taps[gate].dtype == jnp.float32 for gate in gates)


# ---- training


def test_train_normalises_by_the_batch_and_updates_the_statistics():
    model = ResNet(3, stem="cifar", stage_sizes=(1, 1), width=4)
    images = random_images(n=4, h=8, w=8)
    variables = random_variables(model, images)
    apply = jax.jit(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]),
    )
    logits, updates = apply(variables, images)
    by_running = jax.jit(model.apply)(variables, images)

    before, after = variables["batch_stats"], updates["batch_stats"]
    y = slow_conv(images, variables["params"]["stem"]["conv1"]["kernel"], stride=1, pad=1)
    for name, batch in (("mean", y.mean(axis=(0, 1, 2))), ("var", y.var(axis=(0, 1, 2)))):
        expected = 0.9 * before["stem"]["norm1"][name] + 0.1 * batch
        np.testing.assert_allclose(after["stem"]["norm1"][name], expected, rtol=1e-4, atol=1e-5)
    same = jax.tree.map(lambda a, b: bool(np.any(a == b)), before, after)
    assert not any(jax.tree.leaves(same))  # every norm was updated, in every channel

    assert not np.allclose(logits, by_running, atol=1e-2)
    scaled, _ = apply(variables, 3 * images)  # by the batch, the scale of the images drops out
    np.testing.assert_allclose(logits, scaled, rtol=1e-3, atol=1e-3)


def test_eval_is_the_default_and_each_image_stands_alone():
    model = ResNet(3, stem="cifar", stage_sizes=(1, 1), width=4)
    images = random_images(n=3, h=8, w=8)
    variables = random_variables(model, images)
    apply = jax.jit(model.apply)
    logits = apply(variables, images)
    explicit = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    np.testing.assert_array_equal(logits, explicit)
    alone = [apply(variables, images[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(logits, np.stack(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16])
def test_bfloat16_computes_with_float32_parameters_and_logits(dtype):
    model = ResNet(3, stem="imagenet", block="bottleneck", stage_sizes=(1, 1), width=4, dtype=dtype)
    images = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    taps = tap_shapes(model, images.shape)
    inner = {path for path, leaf in taps.items() if leaf.dtype == jnp.bfloat16}
    assert inner == set(taps) - {"", "head"}
    assert taps[""].dtype == jnp.float32


# ---- initialisation


def test_zero_init_residual_makes_blocks_start_as_their_shortcut():
    images = random_images(n=1, h=8, w=8)
    for zero in (True, False):
        model = ResNet(
            3, stem="cifar", block="bottleneck", stage_sizes=(2,), width=4, zero_init_residual=zero
        )
        variables = jax.jit(model.init)(fast_key(), images)
        _, state = model.apply(variables, images, capture_intermediates=True)
        taps = flat_taps(state)
        # The second block's shortcut is the identity, on values that are positive already.
        assert np.array_equal(taps["stage1/block1"], taps["stage1/block2"]) == zero
        scales = {
            "/".join(k.key for k in path): set(np.unique(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
            if path[-1].key == "scale"
        }
        zeros = {path for path, values in scales.items() if values == {0}}
        assert zeros == ({f"stage1/block{b}/norm3/scale" for b in (1, 2)} if zero else set())
        assert all(values == {1} for path, values in scales.items() if path not in zeros)


def test_convolutions_start_he_normal_by_fan_out():
    model = ResNet(3, stem="cifar", block="basic", stage_sizes=(1, 1), width=16)
    params = jax.jit(model.init)(fast_key(), jnp.zeros((1, 8, 8, 3)))["params"]
    # 3x3 from 16 to 32 channels: the fans differ by 2, the spreads by 1.4.
    kernel = params["stage2"]["block1"]["conv1"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.05)
    assert np.abs(kernel).max() > 3 * np.std(kernel)  # not truncated at two deviations


# ---- sizes and names


@pytest.mark.parametrize(
    ("stem", "image", "sizes"),
    [
        ("imagenet", (224, 160), [(56, 40), (56, 40), (28, 20), (14, 10), (7, 5)]),
        ("imagenet", (225, 225), [(57, 57), (57, 57), (29, 29), (15, 15), (8, 8)]),
        ("cifar", (32, 32), [(32, 32), (32, 32), (16, 16), (8, 8), (4, 4)]),
        ("small", (64, 48), [(32, 24), (32, 24), (16, 12), (8, 6), (4, 3)]),
    ],
)
@pytest.mark.parametrize(("block", "expansion"), [("basic", 1), ("bottleneck", 4)])
def test_maps_of_every_stage(stem, image, sizes, block, expansion):
    model = ResNet(7, stem=stem, block=block, stage_sizes=(1, 1, 1, 1), width=8)
    taps = tap_shapes(model, (2, *image, 3))
    assert taps[""].shape == taps["head"].shape == (2, 7)
    assert taps["stem"].shape == (2, *sizes[0], 8)
    for i, size in enumerate(sizes[1:]):
        assert taps[f"stage{i + 1}"].shape == (2, *size, 8 * 2**i * expansion)


def test_tap_names():
    model = ResNet(3, stem="cifar", block="bottleneck", stage_sizes=(2, 1), width=4)
    triple = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "norm", "relu")]
    expected = {"", "head", "stem", "stem/conv1", "stem/norm1", "stem/relu1", "stage1", "stage2"}
    for block in ("stage1/block1", "stage1/block2", "stage2/block1"):
        expected |= {block} | {f"{block}/{name}" for name in triple}
        if block.endswith("block1"):
            expected |= {f"{block}/shortcut_conv", f"{block}/shortcut_norm"}
    assert set(tap_shapes(model, (1, 8, 8, 3))) == expected


def test_stage_ends_after_its_last_relu():
    model = ResNet(3, stem="cifar", shortcut="pad", stage_sizes=(2, 1), width=4)
    images = random_images(n=1, h=8, w=8)
    variables = random_variables(model, images)
    _, state = model.apply(variables, images, capture_intermediates=True)
    taps = flat_taps(state)
    for stage, last in (("stage1", "block2"), ("stage2", "block1")):
        np.testing.assert_array_equal(taps[stage], taps[f"{stage}/{last}"])
        np.testing.assert_array_equal(taps[stage], taps[f"{stage}/{last}/relu2"])
        assert taps[stage].min() == 0 < taps[stage].max()


# ---- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "cfar"}, "stem 'cfar'.*did you mean 'cifar'"),
        ({"block": "bottlneck"}, "block 'bottlneck'.*did you mean 'bottleneck'"),
        ({"shortcut": "A"}, "shortcut 'A'.*projection, pad"),
        ({"attention": "squeeze"}, "attention 'squeeze'.*did you mean 'squeeze_excite'"),
        ({"block": "bottleneck", "groups": 0}, "groups=0"),
        ({"block": "bottleneck", "width_per_group": 1.5}, "width_per_group=1.5"),
        ({"block": "basic", "groups": 2}, 'groups=2 and .*set block="bottleneck"'),
        ({"dtype": "bf16"}, "dtype 'bf16'.*bfloat16"),
        ({"dtype": "int8"}, "dtype 'int8'.*bfloat16"),
        ({"width": 0}, "width=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"stage_sizes": ()}, "stage_sizes"),
        ({"stage_sizes": (2, 0)}, "stage_sizes"),
    ],
)
def test_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{"num_classes": 3, **fields})


def test_image_without_batch_axis_is_refused():
    model = ResNet(3, stem="cifar", stage_sizes=(1,), width=4)
    with pytest.raises(ValueError, match=r"\(8, 8, 3\).*\[n, h, w, c\]"):
        model.init(jax.random.key(0), jnp.zeros((8, 8, 3)))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnzoom_jax.attribution import read_taps
from attnzoom_jax.attribution.program import trace
from attnzoom_jax.layers import AttentionZoom, Gate, ZoomWarp
from attnzoom_jax.models import Insert, bind, create_model

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(8, 8, 8, 3)), jnp.float32)
LABELS = jnp.arange(8) % 3
KEY = jax.random.key(0)


class Block(nn.Module):
    """A stranger's block: not from this package."""

    features: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train)(x))


class Stranger(nn.Module):
    """A CNN that knows nothing of this package: automatic names, positional `train`."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for features in (4, 6):
            x = Block(features)(x, train)
        return nn.Dense(3)(x.mean((1, 2)))


class Plain(nn.Module):
    """A CNN whose call takes nothing but the images."""

    @nn.compact
    def __call__(self, x):
        a, b = Twins(name="twins")(x)
        conv = nn.Conv(3, (1, 1), name="conv")
        return nn.Dense(3)(conv(conv(a + b)).mean((1, 2)))


class Twins(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (1, 1))(x), nn.Conv(3, (1, 1))(x)


class Double(nn.Module):
    """A layer without parameters whose effect is known."""

    @nn.compact
    def __call__(self, x):
        return 2 * x


class Mode(nn.Module):
    """A layer that shows whether it was told `train`."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        return x + (100 if train else 0)


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_backbone_keeps_the_tree_it_has_alone_path_by_path():
    alone = Stranger().init(KEY, IMAGES)
    model = Insert(Stranger(), {"Block_0": AttentionZoom(), "Block_1": AttentionZoom()})
    variables = model.init(KEY, IMAGES)
    for collection in ("params", "batch_stats"):
        assert paths(variables[collection]["backbone"]) == paths(alone[collection])
    assert set(variables["params"]) == {"backbone", "inserted"}
    assert set(variables["params"]["inserted"]) == {"Block_0", "Block_1"}


def test_a_backbone_trained_alone_is_taken_over_as_it_is():
    alone = Stranger().init(KEY, IMAGES)
    model = Insert(Stranger(), {"Block_0": Double()})
    variables = {collection: {"backbone": tree} for collection, tree in alone.items()}
    # Doubling after the first block is doubling the second block's kernel.
    doubled = jax.tree.map(lambda x: x, alone)
    doubled["params"]["Block_1"]["Conv_0"]["kernel"] *= 2
    np.testing.assert_allclose(
        model.apply(variables, IMAGES), Stranger().apply(doubled, IMAGES), atol=1e-6
    )


def test_an_inserted_layer_trains_together_with_a_stranger():
    model = Insert(Stranger(), {"Block_0": AttentionZoom()})
    variables = model.init(KEY, IMAGES)
    optimizer = optax.adam(1e-2)

    def loss_fn(params, batch_stats):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            IMAGES,
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
        return loss, updates["batch_stats"]

    @jax.jit
    def step(params, batch_stats, opt_state):
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_stats)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), batch_stats, opt_state, loss

    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = optimizer.init(params)
    losses = []
    for _ in range(60):
        params, batch_stats, opt_state, loss = step(params, batch_stats, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()),
        params["inserted"],
        variables["params"]["inserted"],
    )
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_layers_stand_at_inputs_tuple_leaves_and_repeated_calls():
    variables = Plain().init(KEY, IMAGES)
    variables = {"params": {"backbone": variables["params"]}}

    def output(layers):
        return Insert(Plain(), layers).apply(variables, IMAGES)

    params = variables["params"]["backbone"]
    a, b = Twins().apply({"params": params["twins"]}, IMAGES)

    def rest(x):
        for _ in range(2):
            x = x @ params["conv"]["kernel"][0, 0] + params["conv"]["bias"]
        return x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]

    np.testing.assert_allclose(output({}), rest(a + b), atol=1e-5)
    np.testing.assert_allclose(output({"twins/0": Double()}), rest(2 * a + b), atol=1e-5)
    np.testing.assert_allclose(output({"twins/1": Double()}), rest(a + 2 * b), atol=1e-5)
    head = params["Dense_0"]
    twice = 2 * (output({}) - head["bias"]) + head["bias"]
    np.testing.assert_allclose(output({"conv#1": Double()}), twice, atol=1e-5)
    at_input = Plain().apply({"params": params}, 2 * IMAGES)
    np.testing.assert_allclose(output({"input": Double()}), at_input, atol=1e-5)


def test_train_reaches_layers_and_backbones_that_accept_it():
    model = Insert(Plain(), {"input": Mode()})
    variables = model.init(KEY, IMAGES)
    shifted = model.apply(variables, IMAGES + 100)
    np.testing.assert_allclose(model.apply(variables, IMAGES, train=True), shifted, rtol=1e-4)
    np.testing.assert_allclose(
        model.apply(variables, IMAGES, train=False), model.apply(variables, IMAGES), rtol=1e-6
    )
    stranger = Insert(Stranger(), {"Block_0": Double()})
    variables = stranger.init(KEY, IMAGES, train=False)
    _, updates = stranger.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    assert paths(updates["batch_stats"]) == paths(variables["batch_stats"])


def test_insert_may_be_inserted_into():
    inner = Insert(Stranger(), {"Block_0": Double()})
    outer = Insert(inner, {"backbone/Block_0": Double()})
    variables = Stranger().init(KEY, IMAGES)
    nested = {c: {"backbone": {"backbone": tree}} for c, tree in variables.items()}
    both = {c: {"backbone": tree} for c, tree in variables.items()}

    class Quadruple(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 4 * x

    np.testing.assert_allclose(
        outer.apply(nested, IMAGES),
        Insert(Stranger(), {"Block_0": Quadruple()}).apply(both, IMAGES),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Block_2", "unknown path for Insert 'Block_2'; did you mean 'Block_"),
        ("Conv_0", "did you mean 'Block_./Conv_0' or 'Block_./Conv_0'"),
        ("nonsense", "There is: input, Block_0/Conv_0"),
    ],
)
def test_unknown_path_names_the_nearest(path, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: Insert(Stranger(), {path: Double()}).init(KEY, IMAGES))


class Transformed(nn.Module):
    transform: str

    @nn.compact
    def __call__(self, x, train: bool = False):
        lift = {"jit": nn.jit, "remat": nn.remat, "scan": None}[self.transform]
        if lift is None:
            scan = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = scan(name="block")(x, None)
        else:
            x = lift(Block, static_argnums=(2,))(3, name="block")(x, train)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(3, (1, 1), name="conv")(x), None


@pytest.mark.parametrize("transform", ["jit", "remat", "scan"])
def test_inside_a_lifted_transformation_it_raises_and_outside_it_works(transform):
    inside = "block/conv" if transform == "scan" else "block/Conv_0"
    for _ in range(2):  # the second time nn.jit has its trace in the cache
        with pytest.raises(ValueError, match=r"lifted transformation|unknown path"):
            Insert(Transformed(transform), {inside: Double()}).init(KEY, IMAGES)
    model = Insert(Transformed(transform), {"head": Double()})
    variables = model.init(KEY, IMAGES)
    alone = {c: tree["backbone"] for c, tree in variables.items()}
    np.testing.assert_allclose(
        model.apply(variables, IMAGES),
        2 * Transformed(transform).apply(alone, IMAGES),
        rtol=1e-5,
    )


def test_a_resnet_of_the_package_by_config():
    model = create_model(
        "resnet18",
        num_classes=4,
        stem="cifar",
        width=4,
        insert={"stage1": {"name": "attention_zoom", "threshold": 0.6}},
    )
    shapes = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 16, 16, 3))))
    assert shapes["params"]["inserted"]["stage1"]["zoom"]["kernel"].shape == (3, 3, 1, 4)
    with pytest.raises(ValueError, match="did you mean 'attention_zoom'"):
        create_model("resnet18", num_classes=4, insert={"stage1": {"name": "attention_zom"}})
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        create_model(
            "resnet18",
            num_classes=4,
            insert={"stage1": {"name": "attention_zoom", "treshold": 1}},
        )


def test_a_positional_train_reaches_the_layers_too():
    model = Insert(Stranger(), {"Block_0": Mode()})
    variables = model.init(KEY, IMAGES)
    by_position = model.apply(variables, IMAGES, True, mutable=["batch_stats"])[0]
    by_name = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_array_equal(by_position, by_name)
    assert np.abs(by_name - model.apply(variables, IMAGES, False)).max() > 1e-3


def test_a_sequential_knows_no_train():
    model = Insert(nn.Sequential([nn.Conv(3, (1, 1)), jax.nn.relu]), {"layers_0": Double()})
    variables = model.init(KEY, IMAGES)
    alone = nn.Sequential([nn.Conv(3, (1, 1)), jax.nn.relu])
    expected = 2 * alone.apply({"params": variables["params"]["backbone"]}, IMAGES)
    np.testing.assert_allclose(model.apply(variables, IMAGES, train=True), expected, rtol=1e-6)


def test_insert_inside_another_modules_compact_call():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Insert(Plain(), {"conv": Double(), "input": Double()})(x)

    variables = Outer().init(KEY, IMAGES)
    assert Outer().apply(variables, IMAGES).shape == (8, 3)


def test_a_backbone_called_by_keyword():
    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, *, pixels):
            return nn.Dense(2, name="dense")(pixels)

    model = Insert(Keyword(), {"dense": Double()})
    variables = model.init(KEY, pixels=IMAGES)
    assert model.apply(variables, pixels=IMAGES).shape == (8, 8, 8, 2)
    with pytest.raises(ValueError, match="images as the first argument"):
        Insert(Keyword(), {"input": Double()}).init(KEY, pixels=IMAGES)


def test_a_module_called_input_cannot_stand_for_the_images():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="input")(x)

    with pytest.raises(ValueError, match="a module of that name"):
        Insert(Named(), {"input": Double()}).init(KEY, IMAGES)


def test_a_layer_keeps_the_dtype_of_the_map_it_stands_on():
    model = create_model(
        "resnet10",
        num_classes=3,
        stem="cifar",
        width=4,
        dtype="bfloat16",
        insert={"stem": {"name": "attention_zoom"}},
    )
    variables = jax.eval_shape(lambda: model.init(KEY, IMAGES))
    taps = trace(lambda v, x: bind(model, v, train=False)(x), variables, IMAGES).taps
    assert taps["backbone/stem/before"].dtype == taps["backbone/stem"].dtype == jnp.bfloat16
    assert taps["backbone/stage1"].dtype == jnp.bfloat16
    assert taps["inserted/stem/gate"].dtype == jnp.float32


# ---------------------------------------------------------------------- layers that read other taps


class Reader(nn.Module):
    """A layer that keeps what it was passed, and adds its mean."""

    reads: str | tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, *values, train: bool = False):
        self.sow("seen", "values", values)
        return x + sum(value.mean() for value in values) + (100 if train else 0)


class Gated(nn.Module):
    """A CNN with a mask of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), name="conv")(x)
        x = x * Gate(name="gate")(nn.sigmoid(x.mean(-1, keepdims=True)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("backbone", "others", "where", "names"),
    [
        (
            Stranger(),
            {"Block_0": AttentionZoom()},
            "Block_1",
            {
                "Block_0/gate": "inserted/Block_0/gate",
                "Block_0": "backbone/Block_0",
                "Block_0/before": "backbone/Block_0/before",
                "Block_0/Conv_0": "backbone/Block_0/Conv_0",
                "input": None,  # the images
                "Block_1/before": "backbone/Block_1/before",
            },
        ),
        (
            Stranger(),
            {"Block_0/Conv_0": AttentionZoom(threshold=2.0), "input": Double()},
            "Dense_0",
            {
                "Block_0/Conv_0/gate": "inserted/Block_0.Conv_0/gate",
                "Block_1": "backbone/Block_1",
                "input/before": None,
                "input": "inserted/input",
            },
        ),
        (
            Plain(),
            {"twins/1": Double()},
            "Dense_0",
            {
                "twins/0": "backbone/twins/0",
                "twins/1": "backbone/twins/1",
                "conv": "backbone/conv",
                "conv#1": "backbone/conv#1",
            },
        ),
        (Gated(), {}, "head", {"gate": "backbone/gate"}),
    ],
)
def test_a_layer_is_passed_what_it_reads(backbone, others, where, names):
    model = Insert(backbone, {where: Reader(tuple(names)), **others})
    variables = model.init(KEY, IMAGES)
    variables.pop("seen", None)
    key = where.replace("/", ".")
    for apply in (model.apply, jax.jit(model.apply, static_argnames="mutable")):
        _, state = apply(variables, IMAGES, mutable=("seen",))
        (seen,) = state["seen"]["inserted"][key]["values"]
        marked = list(filter(None, names.values()))
        _, taps = read_taps(bind(model, variables), IMAGES, marked)
        for value, (name, tap) in zip(seen, names.items(), strict=True):
            expected = taps[tap] if tap else IMAGES
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)


class Masker(nn.Module):
    """A layer that marks a mask and does nothing with it."""

    @nn.compact
    def __call__(self, x):
        Gate(name="gate")(nn.sigmoid(nn.Conv(1, (3, 3), name="conv")(x)))
        return x


def test_what_is_read_is_trained_through():
    warp = ZoomWarp(reads="Block_0/gate", cells=8, fwhm=3.0, temperature=0.2)
    model = Insert(Stranger(), {"Block_0": Masker(), "Block_1": warp})
    variables = model.init(KEY, IMAGES)
    assert set(variables["params"]["inserted"]) == {"Block_0"}  # the warp has no parameters

    @jax.jit
    def loss(kernel):
        params = jax.tree.map(lambda x: x, variables["params"])
        params["inserted"]["Block_0"]["conv"]["kernel"] = kernel
        logits = model.apply({**variables, "params": params}, IMAGES)
        return (logits[:, 0] * jnp.arange(8)).sum()

    kernel = variables["params"]["inserted"]["Block_0"]["conv"]["kernel"]
    grad = jax.grad(loss)(kernel)
    size = jnp.sqrt((grad**2).sum())
    step = 0.01 * grad / size
    measured = (loss(kernel + step) - loss(kernel - step)) / 0.02
    assert size > 0.1
    np.testing.assert_allclose(size, measured, rtol=0.05)


def test_a_warp_by_a_saturated_mask_changes_nothing():
    zoom = {"Block_0": AttentionZoom(threshold=0.0)}
    warp = {"Block_1": ZoomWarp(reads="Block_0/gate")}
    model = Insert(Stranger(), zoom)
    variables = model.init(KEY, IMAGES)
    np.testing.assert_array_equal(
        Insert(Stranger(), {**warp, **zoom}).apply(variables, IMAGES),
        model.apply(variables, IMAGES),
    )


def test_a_reader_is_told_train_too():
    model = Insert(Stranger(), {"Block_1": Reader("Block_0")})
    variables = model.init(KEY, IMAGES)
    told = model.apply(variables, IMAGES, train=True, mutable=["batch_stats", "seen"])[0]
    assert np.abs(told - model.apply(variables, IMAGES, train=False)).max() > 1


@pytest.mark.parametrize(
    ("backbone", "layers", "message"),
    [
        (
            Stranger(),
            {"Block_0": AttentionZoom(), "Block_1": Reader("Block_0/gat")},
            "tap that the layer at 'Block_1' reads 'Block_0/gat'; did you mean 'Block_0/gate'",
        ),
        (
            Stranger(),
            {"Block_0": Reader("Block_1/gate"), "Block_1": AttentionZoom()},
            "layer at 'Block_0' reads 'Block_1/gate', which comes later.*can read: .*Block_0/Conv",
        ),
        (Stranger(), {"Block_1": Reader("Block_1")}, "its own result.*Block_1/before"),
        (Stranger(), {"input": Reader("Block_0")}, "images come before every tap"),
        (Stranger(), {"input": Reader("input")}, "read 'input/before'"),
        (Stranger(), {"input": Reader("imput")}, "reads 'imput'; did you mean 'input"),
        (Stranger(), {"Block_0/gate": Double()}, "unknown path for Insert 'Block_0/gate'"),
    ],
)
def test_unreadable_taps(backbone, layers, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: Insert(backbone, layers).init(KEY, IMAGES))


def test_a_call_that_fails_without_its_layer_says_what_the_layer_could_not_read():
    class Halve(Reader):
        @nn.compact
        def __call__(self, x, *values):
            return x[..., :3]

    variables = Insert(Stranger(), {"Block_0": Halve("Block_0/Conv_0")}).init(KEY, IMAGES)
    wrong = Insert(Stranger(), {"Block_0": Halve("Block_0/Cnov_0")})
    with pytest.raises(ValueError, match="did you mean 'Block_0/Conv_0'") as error:
        wrong.apply(variables, IMAGES)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("transform", ["jit", "remat", "scan"])
def test_what_lies_inside_a_lifted_transformation_cannot_be_read(transform):
    inside = "block/conv" if transform == "scan" else "block/Conv_0"
    for _ in range(2):
        model = Insert(Transformed(transform), {"head": Reader(inside)})
        with pytest.raises(ValueError, match=r"lifted transformation|unknown tap"):
            model.init(KEY, IMAGES)


def test_a_mask_inside_a_lifted_transformation_cannot_be_read():
    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.remat(Gated)(name="gated")(x))

    with pytest.raises(ValueError, match="'gated/gate', which lies inside a lifted transformation"):
        Insert(Lifted(), {"head": Reader("gated/gate")}).init(KEY, IMAGES)


def test_a_name_for_two_values_is_refused():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(Gated(name="gated")(x))

    layers = {"gated": Doubled(), "head": Reader("gated/gate")}
    with pytest.raises(ValueError, match="'gated/gate', which two values"):
        Insert(Masked(), layers).init(KEY, IMAGES)


class Doubled(nn.Module):
    """A layer whose mask is twos."""

    @nn.compact
    def __call__(self, x):
        return x * Gate(name="gate")(jnp.full(x.shape, 2.0))


def test_a_reader_in_an_insert_inside_an_insert():
    inner = Insert(Stranger(), {"Block_0": AttentionZoom()})
    names = ("inserted/Block_0/gate", "backbone/Block_0")
    outer = Insert(inner, {"backbone/Block_1": Reader(names)})
    variables = outer.init(KEY, IMAGES)
    _, state = outer.apply(variables, IMAGES, mutable=["seen"])
    (seen,) = state["seen"]["inserted"]["backbone.Block_1"]["values"][-1:]
    _, taps = read_taps(bind(outer, variables), IMAGES, [f"backbone/{name}" for name in names])
    for value, tap in zip(seen, taps.values(), strict=True):
        np.testing.assert_allclose(value, tap, rtol=1e-4, atol=1e-5)


def test_a_warp_by_config():
    model = create_model(
        "resnet10",
        num_classes=3,
        stem="cifar",
        width=4,
        insert={
            "stage2": {"name": "zoom_warp", "reads": ["stage1/gate", "stem"], "size": [4, 4]},
            "stage1": {"name": "attention_zoom"},
        },
    )
    variables = jax.eval_shape(lambda: model.init(KEY, IMAGES))
    taps = trace(lambda v, x: bind(model, v, train=False)(x), variables, IMAGES).taps
    assert taps["inserted/stage2/gate"].shape == (8, 31, 31, 1)
    assert taps["backbone/stage2"].shape == (8, 4, 4, 8)

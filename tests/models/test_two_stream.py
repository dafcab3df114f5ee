import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.attribution import excitation_backprop, grad_cam, list_taps, read_taps
from attnzoom_jax.layers import AttentionZoom, RecursiveAttention
from attnzoom_jax.models import Features, Insert, TwoStream, bind, create_model
from attnzoom_jax.models.vgg import VGG
from attnzoom_jax.ops.patches import crop_boxes, percentile_boxes
from tests.layers.test_recursive import slow_recursive_attention
from tests.models.backbone_checks import every_value_is_reached, training_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(2, 16, 20, 3)), jnp.float32)
BOXES = np.array(  # [n, p, 4]
    [
        [[0, 0, 16, 20], [2, 3, 9, 9], [1, 2, 4, 8]],
        [[4, 4, 12, 18], [0, 10, 8, 20], [8, 0, 16, 6]],
    ]
)
VGG_SMALL = VGG(5, stage_sizes=(1, 2), norm="batch", width=4)


def model_of(**fields):
    shared = fields.pop("shared", False)
    options = dict(steps=3, hidden=6, patch_size=8, add_on=16)
    return TwoStream(
        Features(VGG_SMALL.clone(), "stage2"),
        None if shared else Features(VGG_SMALL.clone(), "stage2/relu2"),
        5,
        **{**options, **fields},
    )


@functools.cache
def variables_of(shared=False, add_on=16):
    model = model_of(patch_source="whole", shared=shared, add_on=add_on)
    variables = jax.jit(model.init)(KEY, IMAGES)
    # Heads of the first weights hardly tell classes apart.
    for head in ("global_head", "object_head"):
        variables["params"][head]["kernel"] *= 30
    return variables


def apply(model, *args, rngs=None, **kwargs):
    call = jax.jit(lambda v, *args: model.apply(v, *args, rngs=rngs, **kwargs))
    return call(variables_of(model.object_trunk is None, model.add_on), *args)


def streams(model, boxes, variables=None):
    """z_g and z_p [n, k], step by step as the module's docstring has it."""
    variables = variables or variables_of(model.object_trunk is None, model.add_on)

    def part(module, name, *args):
        inside = {collection: tree[name] for collection, tree in variables.items() if name in tree}
        return module.apply(inside, *args)

    params = jax.tree.map(np.float64, variables["params"])
    features = np.float64(part(model.global_trunk, "global_trunk", IMAGES))
    if model.add_on:
        for i in (1, 2):
            layer = params["add_on"][f"conv{i}"]
            features = np.maximum(features @ layer["kernel"][0, 0] + layer["bias"], 0)
    head = params["global_head"]
    global_logits = features.mean((1, 2)) @ head["kernel"] + head["bias"]
    patches = crop_boxes(IMAGES, boxes, (model.patch_size, model.patch_size))
    name = "global_trunk" if model.object_trunk is None else "object_trunk"
    x = np.float64(part(getattr(model, name), name, patches)).mean((1, 2))
    layer = model_layer(model)
    fused, states, _ = slow_recursive_attention(variables["params"]["recursive"], x, layer)
    head = params["object_head"]
    logits_of = lambda values: values @ head["kernel"] + head["bias"]  # noqa: E731
    return global_logits, logits_of(fused), logits_of(states), features


def model_layer(model):
    return RecursiveAttention(model.steps, model.hidden, aggregation=model.aggregation)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"aggregation": "last", "object_weight": 0.5},
        {"aggregation": "mean", "add_on": 0, "shared": True},
    ],
    ids=["default", "last", "shared"],
)
def test_equals_its_equations(fields):
    model = model_of(**fields)
    boxes = BOXES[:, 1]
    z_g, z_p, z_t, _ = streams(model, boxes)
    variables = variables_of(model.object_trunk is None, model.add_on)
    names = ["global_head", "object_head", "step_logits", "boxes", "patch"]
    logits, taps = read_taps(bind(model, variables, boxes=boxes), IMAGES, names)
    np.testing.assert_allclose(logits, z_g + model.object_weight * z_p, atol=1e-4)
    np.testing.assert_allclose(taps["global_head"], z_g, atol=1e-4)
    np.testing.assert_allclose(taps["object_head"], z_p, atol=1e-4)
    np.testing.assert_allclose(taps["step_logits"], z_t, atol=1e-4)
    np.testing.assert_array_equal(taps["boxes"], boxes)
    np.testing.assert_allclose(taps["patch"], crop_boxes(IMAGES, boxes, (8, 8)), atol=1e-6)
    assert np.abs(z_g).max() > 0.05 and z_p.std() > 0.01  # something is compared


def test_the_authors_pair_of_vgg19():
    model = create_model("two_stream", num_classes=200)
    variables = jax.eval_shape(model.init, KEY, jnp.zeros((1, 64, 64, 3)))
    assert set(variables) == {"params"}
    params = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in variables["params"].items()
    }
    assert params == {
        "global_trunk": 20_024_384,
        "object_trunk": 20_024_384,
        "add_on": 1_574_912,
        "recursive": 4_202_496 + 513,
        "global_head": 205_000,
        "object_head": 102_600,
    }
    assert sum(params.values()) == 46_134_289
    alone = jax.eval_shape(
        create_model("vgg19", num_classes=200).init, KEY, jnp.zeros((1, 64, 64, 3))
    )["params"]
    for trunk in ("global_trunk", "object_trunk"):
        inside = variables["params"][trunk]["backbone"]
        assert inside == {stage: alone[stage] for stage in inside}


def test_maps_of_the_authors_size():
    model = create_model("two_stream", num_classes=3, width=1, hidden=2, add_on=2)
    variables = jax.eval_shape(model.init, KEY, jnp.zeros((1, 448, 448, 3)))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    fn = bind(model, zeros, boxes=jnp.array([[[0, 0, 142, 142]] * 10]))
    taps = list_taps(fn, jax.ShapeDtypeStruct((1, 448, 448, 3), jnp.float32))
    assert taps["global_trunk"] == taps["object_trunk"] == (1, 14, 14, 8)
    assert taps["patch"] == (1, 224, 224, 3)


@pytest.mark.parametrize("shared", [False, True])
def test_every_tap_has_its_name(shared):
    model = model_of(patch_source="whole", shared=shared)
    taps = list_taps(bind(model, variables_of(shared)), IMAGES)
    expected = {
        "global_trunk": (2, 4, 5, 8),
        "add_on/conv1": (2, 4, 5, 16),
        "add_on/relu1": (2, 4, 5, 16),
        "add_on/conv2": (2, 4, 5, 16),
        "add_on/relu2": (2, 4, 5, 16),
        "global_head": (2, 5),
        "patch": (2, 8, 8, 3),
        "boxes": (2, 4),
        "object_trunk": (2, 2, 2, 8) if shared else (2, 4, 4, 8),
        "recursive": (2, 6),
        "recursive/states": (2, 3, 6),
        "recursive/gate": (2, 3, 1),
        "object_head": (2, 5),
        "step_logits": (2, 3, 5),
    }
    assert {name: taps.get(name) for name in expected} == expected
    assert "object_head#1" not in taps and ("global_trunk#1" in taps) == shared


@pytest.mark.parametrize("t", [0, 2])
def test_grad_cam_of_one_step(t):
    """Against the gradient written out: W_p's row through the states to the averaged features."""
    model = model_of()
    variables = variables_of()
    fn = bind(model, variables, boxes=BOXES[:, 0])

    def step_logits(images):
        return read_taps(fn, images, ["step_logits"])[1]["step_logits"][:, t]

    targets = jnp.array([1, 3])
    maps = grad_cam(step_logits, IMAGES, targets, tap="object_trunk")
    features = read_taps(fn, IMAGES, ["object_trunk"])[1]["object_trunk"]  # [n, h, w, d]
    head = variables["params"]["object_head"]["kernel"]

    def score(x):  # of step t, by the layer up to it and its last state
        layer = model_layer(model.clone(steps=t + 1, aggregation="last"))
        state = layer.apply({"params": variables["params"]["recursive"]}, x)
        return (state @ head)[jnp.arange(2), targets].sum()

    weights = jax.grad(score)(features.mean((1, 2))) / 16  # [n, d], of 4 x 4 places
    np.testing.assert_allclose(
        maps, (features * weights[:, None, None]).sum(-1), atol=1e-5 * np.abs(maps).max()
    )
    assert np.abs(maps).max() > 0


def test_steps_and_streams_have_different_maps():
    fn = bind(model_of(), variables_of(), boxes=BOXES[:, 0])
    maps = [
        grad_cam(
            lambda x, t=t: read_taps(fn, x, ["step_logits"])[1]["step_logits"][:, t],
            IMAGES,
            jnp.array([1, 3]),
            tap="object_trunk",
        )
        for t in range(3)
    ]
    assert np.abs(maps[0] - maps[2]).max() > 0.05 * np.abs(maps[2]).max()
    # The streams meet only in the sum.
    global_only = jax.grad(lambda x: fn(x)[0, 0])(IMAGES)
    assert np.any(global_only[0] != 0) and not global_only[1].any()


def test_relevance_goes_through_the_global_stream():
    variables = jax.tree.map(lambda leaf: leaf, variables_of())
    head = variables["params"]["global_head"]
    head["kernel"] = jnp.abs(head["kernel"])
    fn = bind(model_of(object_weight=0.0), variables, boxes=BOXES[:, 0])
    maps = excitation_backprop(fn, IMAGES, jnp.array([1, 3]), tap="global_trunk")
    np.testing.assert_allclose(maps.sum((1, 2)), 1.0, rtol=1e-4)
    with pytest.raises(ValueError, match=r"recursive.py.*combines two values"):
        excitation_backprop(fn, IMAGES, jnp.array([1, 3]), tap="object_trunk")


def test_evaluation_takes_the_first_the_mean_or_one_at_random():
    per_box = [apply(model_of(), IMAGES, boxes=BOXES[:, i]) for i in range(3)]
    boxes = {"boxes": BOXES}
    np.testing.assert_allclose(apply(model_of(), IMAGES, **boxes), per_box[0], atol=1e-5)
    mean = apply(model_of(eval_patch="mean"), IMAGES, **boxes)
    np.testing.assert_allclose(mean, sum(per_box) / 3, atol=1e-5)
    model = model_of(eval_patch="random")
    found = apply(model, IMAGES, **boxes)
    np.testing.assert_array_equal(apply(model, IMAGES, **boxes), found)  # without a key: the same
    for i in range(2):
        assert min(np.abs(found[i] - one[i]).max() for one in per_box) < 1e-5
    assert np.abs(per_box[0] - per_box[1]).max() > 1e-3  # they can be told apart


def test_the_mean_has_the_taps_of_every_patch():
    fn = bind(model_of(eval_patch="mean"), variables_of(), boxes=BOXES)
    taps = list_taps(fn, IMAGES)
    assert taps["patch"] == (6, 8, 8, 3) and taps["boxes"] == (6, 4)
    assert taps["object_head"] == (2, 5) and taps["step_logits"] == (6, 3, 5)
    _, values = read_taps(fn, IMAGES, ["boxes"])
    np.testing.assert_array_equal(values["boxes"], BOXES.reshape(6, 4))


@pytest.mark.parametrize("stream", ["patches", "dropout"])
def test_training_draws_each_box_about_as_often(stream):
    model, variables = model_of(), variables_of()

    @jax.jit
    @jax.vmap
    def drawn(key):
        def fn(images):
            return model.apply(
                variables,
                images,
                boxes=jnp.asarray(BOXES),
                train=True,
                rngs={stream: key},
                mutable=["intermediates", "batch_stats"],
                capture_intermediates=lambda module, _: module.name == "boxes",
            )[1]["intermediates"]["boxes"]["__call__"][0]

        return fn(IMAGES)

    boxes = np.asarray(drawn(jax.random.split(KEY, 300)))  # [draws, n, 4]
    for i in range(2):
        counts = [(boxes[:, i] == box).all(axis=1).sum() for box in BOXES[i]]
        assert sum(counts) == 300 and min(counts) > 70  # 100 each; 70 is 3.7 deviations below


def test_boxes_of_the_predicted_classs_map():
    model = model_of(patch_source="cam")
    z_g, _, _, features = streams(model, BOXES[:, 0])
    kernel = np.float64(variables_of()["params"]["global_head"]["kernel"])
    cam = np.einsum("nhwc,cn->nhw", features, kernel[:, z_g.argmax(axis=1)])
    expected = percentile_boxes(jnp.float32(cam), (16, 20))
    _, taps = read_taps(bind(model, variables_of()), IMAGES, ["boxes"])
    np.testing.assert_array_equal(taps["boxes"], expected)
    assert np.any(expected != jnp.array([0, 0, 16, 20]))
    np.testing.assert_allclose(
        apply(model, IMAGES), apply(model_of(), IMAGES, boxes=expected), atol=1e-5
    )


def test_whole_and_random_patches():
    whole = np.array([[0, 0, 16, 20]] * 2)
    np.testing.assert_allclose(
        apply(model_of(patch_source="whole"), IMAGES),
        apply(model_of(), IMAGES, boxes=whole),
        atol=1e-5,
    )
    model = model_of(patch_source="random")
    _, taps = read_taps(bind(model, variables_of()), IMAGES, ["boxes"])
    y0, x0, y1, x1 = taps["boxes"].T
    assert np.all((y0 >= 0) & (y0 < y1) & (y1 <= 16) & (x0 >= 0) & (x0 < x1) & (x1 <= 20))
    fixed = apply(model, IMAGES)
    np.testing.assert_array_equal(apply(model, IMAGES), fixed)
    drawn = apply(model, IMAGES, rngs={"patches": jax.random.key(5)})
    assert np.abs(drawn - fixed).max() > 1e-4


@pytest.mark.parametrize("shared", [False, True])
def test_one_training_step_reaches_every_value(shared):
    model = model_of(patch_source="cam", shared=shared)
    variables = jax.tree.map(lambda leaf: leaf, variables_of(shared))
    (loss, stats), gradients = training_step(model, variables, IMAGES)(0)
    assert np.isfinite(loss)
    # The bias of the scores changes no softmax.
    assert np.abs(gradients["recursive"]["score"].pop("bias")).max() < 1e-4
    # Batch norm takes away what the convolutions' biases add.
    for trunk in {"global_trunk", "object_trunk"} & set(gradients):
        for stage in gradients[trunk]["backbone"].values():
            for name in stage:
                stage[name] = {
                    k: v for k, v in stage[name].items() if k != "bias" or "norm" in name
                }
    assert every_value_is_reached(gradients)
    changed = jax.tree.map(lambda a, b: np.any(a != b), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_a_layer_is_inserted_into_it_by_name():
    model = create_model(
        "two_stream",
        num_classes=5,
        backbone="resnet10",
        stem="cifar",
        width=4,
        patch_source="cam",
        patch_size=16,
        hidden=6,
        add_on=4,
        steps=2,
        insert={"object_trunk": {"name": "attention_zoom"}, "add_on": {"name": "eca"}},
    )
    assert isinstance(model, Insert)
    variables = jax.eval_shape(model.init, KEY, IMAGES)
    assert set(variables["params"]["inserted"]) == {"object_trunk", "add_on"}
    assert set(variables["params"]["backbone"]["object_trunk"]["backbone"]) == {
        *("stem", "stage1", "stage2", "stage3", "stage4"),
    }
    inside = Insert(
        model_of(patch_source="whole"), {"global_trunk/backbone/stage1": AttentionZoom()}
    )
    shapes = jax.eval_shape(inside.init_with_output, KEY, IMAGES)
    assert shapes[0].shape == (2, 5)


def test_by_name_shared_and_at_another_tap():
    options = dict(num_classes=5, backbone="vgg16", width=4, shared=True, tap="stage4")
    model = create_model("two_stream", steps=4, **options)
    assert model.object_trunk is None and model.global_trunk.tap == "stage4" and model.steps == 4
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))["params"]
    assert set(shapes) == {"add_on", "global_head", "global_trunk", "object_head", "recursive"}
    hash(model)
    separate = create_model("two_stream", num_classes=5, backbone="vgg16", stem="cifar")
    assert separate.object_trunk.tap == "stage5/relu3"
    assert (
        create_model("two_stream", num_classes=5, backbone="resnet18").object_trunk.tap == "stage4"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: expected an integer of at least 1"),
        ({"add_on": -1}, "add_on=-1"),
        ({"aggregation": "men"}, "aggregation 'men'; did you mean 'mean'"),
        ({"patch_source": "box"}, "patch_source 'box'; did you mean 'boxes'"),
        ({"eval_patch": "fist"}, "eval_patch 'fist'; did you mean 'first'"),
        ({"backbone": "vgg17"}, "unknown backbone 'vgg17'; did you mean 'vgg"),
        ({"backbone": "two_stream"}, "unknown backbone 'two_stream'"),
        ({"stage_sizes": [1]}, "stage_sizes is what makes vgg19 that network"),
        ({"hiden": 1}, "option of vgg19 'hiden'; did you mean 'hidden'"),
        ({"widht": 1}, "option of vgg19 'widht'; did you mean 'width'"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model("two_stream", num_classes=5, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "boxes", "message"),
    [
        ({}, None, r'patch_source="boxes" needs them: call model\(images, boxes=boxes\)'),
        ({"patch_source": "cam"}, BOXES, "boxes are given, but patch_source='cam' makes its own"),
        ({}, BOXES[:1], r"boxes of shape \(1, 3, 4\).*n = 2 images"),
        ({}, BOXES[..., :3], r"boxes of shape \(2, 3, 3\)"),
        ({}, BOXES[:, :0], r"boxes of shape \(2, 0, 4\)"),
        ({}, BOXES + 4, "inside of the image of 16 x 20 pixels"),
    ],
)
def test_bad_boxes_are_one_line(fields, boxes, message):
    model, variables = model_of(**fields), variables_of()
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda x: model.apply(variables, x, boxes=boxes), IMAGES)
    assert "\n" not in str(error.value)


def test_a_trunk_without_places():
    model = model_of(patch_source="whole").clone(global_trunk=Features(VGG_SMALL, "head"))
    with pytest.raises(
        ValueError, match=r"global_trunk returns shape \(2, 5\).*before the pooling"
    ):
        model.init(KEY, IMAGES)

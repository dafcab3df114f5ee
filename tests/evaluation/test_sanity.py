import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation import create_evaluator
from attnzoom_jax.evaluation.sanity import layer_order
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.layers import CBAM, SqueezeExcite
from attnzoom_jax.metrics.sanity import other_classes, randomized
from attnzoom_jax.metrics.similarity import MEASURES, similarity
from attnzoom_jax.models import Insert, bind
from attnzoom_jax.models.resnet import ResNet
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training import sharding
from tests.evaluation.conftest import Net, Relu

ROWS = ("grad_cam@relu", "gradient", "contrastive_excitation_backprop@conv")
LAYERS = ["head", "attention", "conv"]


def create(trained, *, model=None, batch_size=8, devices=1, methods=ROWS, split="test", **options):
    data = trained.config.data.copy_and_resolve_references()
    data.eval_batch_size = batch_size
    mesh = sharding.create_mesh(jax.devices()[:devices])
    return create_evaluator(
        "sanity",
        model or trained.model,
        data=data,
        mesh=mesh,
        split=split,
        methods=methods,
        **{"images": 11, "prefix": "t", **options},
    )


def run(trained, **options):
    evaluator = create(trained, **options)
    return evaluator.run(trained.variables), evaluator


def slow_values(trained, mode, size, count=11):
    """[rows, images, measures, states], one image at a time."""
    source = open_source("fine_shapes/tiny", split="test")
    states = randomized(trained.variables, LAYERS, key=jax.random.key(0), mode=mode)
    states = [trained.variables, *(state for _, state in states)]
    values = np.zeros((len(ROWS), count, len(MEASURES), len(states)))

    @jax.jit(static_argnums=0)
    def explain(row, variables, image, target):
        method, _, tap = row.partition("@")
        at: Any = {"tap": tap} if tap else {}
        fn = bind(trained.model, variables, train=False)
        maps = getattr(attribution, method)(fn, image, target, **at)
        return ops_maps.resize(maps, (size, size))

    for i in range(count):
        example = source[i * len(source) // count]
        image = to_input(jnp.asarray(example["image"])[None], trained.config.data)
        own = trained.model.apply(trained.variables, image).argmax(1)
        other = other_classes(own, 16, key=jax.random.key(0), ids=[i])
        for r, row in enumerate(ROWS):
            maps, *random = (explain(row, state, image, own) for state in states)
            against = [explain(row, states[0], image, other), *random]
            for m, measure in enumerate(MEASURES):
                values[r, i, m] = [similarity(maps, x, measure=measure)[0] for x in against]
    return values


def table_values(table):
    """[rows, measures, states]."""
    return np.array(
        [
            [
                [score["value"] for score in (row["other_class"][m], *row["random"][m])]
                for m in MEASURES
            ]
            for row in table["rows"]
        ]
    )


@pytest.mark.parametrize(("mode", "size"), [("cascading", 0), ("independent", 16)])
def test_equals_a_slow_version(trained, mode, size):
    metrics, evaluator = run(trained, batch_size=4, mode=mode, size=size)
    expected = slow_values(trained, mode, size or 32).mean(axis=1)
    assert (evaluator.table["layers"], evaluator.table["size"]) == (LAYERS, [size or 32] * 2)
    np.testing.assert_allclose(table_values(evaluator.table), expected, atol=2e-4)
    random = expected[..., -1] if mode == "cascading" else expected[..., 1:].mean(axis=-1)
    for r, row in enumerate(ROWS):
        assert metrics[f"t/{row}/nan_maps"] == 0
        for m, measure in enumerate(MEASURES):
            assert metrics[f"t/{row}/{measure}"] == pytest.approx(random[r, m], abs=2e-4)
            of_class = metrics[f"t/{row}/class_{measure}"]
            assert of_class == pytest.approx(expected[r, m, 0], abs=2e-4)
    assert list(metrics) == evaluator.metric_names


def test_batches_and_devices_change_nothing(trained):
    _, one = run(trained, batch_size=256, methods=ROWS[:2])
    _, other = run(trained, batch_size=8, devices=4, methods=ROWS[:2])
    np.testing.assert_allclose(table_values(other.table), table_values(one.table), atol=2e-4)
    score = other.table["rows"][0]["random"]["ssim"][-1]
    assert score["low"] < score["value"] < score["high"] and score["count"] == 11


def test_methods_that_sample_draw_by_the_batch_and_not_by_the_device(trained):
    options: Any = {"samples": 2, "noise": 0.3}
    request: Any = {"methods": ("smooth_grad",), "options": {"smooth_grad": options}}
    metrics, _ = run(trained, devices=4, layers=("head",), images=4, **request)
    source = open_source("fine_shapes/tiny", split="test")
    places = np.arange(4) * len(source) // 4
    images = to_input(jnp.stack([source[i]["image"] for i in places]), trained.config.data)
    fn = bind(trained.model, trained.variables, train=False)
    own = fn(images).argmax(1)
    others = other_classes(own, 16, key=jax.random.key(0))
    key = jax.random.fold_in(jax.random.key(0), 0)
    explain = jax.jit(lambda ids: attribution.smooth_grad(fn, images, ids, key=key, **options))
    expected = similarity(explain(own), explain(others), measure="ssim").mean()
    assert metrics["t/smooth_grad/class_ssim"] == pytest.approx(float(expected), abs=2e-4)


def test_weights_are_no_part_of_the_program(trained):
    """What is traced does not grow with the number of layers, nor of batches."""
    traces = []

    class Counted(Net):
        def __call__(self, x, train=False):
            traces.append(x.shape)
            return super().__call__(x, train)

    def count(**options):
        traces.clear()
        run(trained, model=Counted(), methods=("gradient", "grad_cam@relu"), **options)
        return len(traces)

    assert count(layers=("head",), images=8) == count(layers=LAYERS, images=24)


@pytest.mark.parametrize("redraw", ["normal", "init"])
def test_other_ways_to_draw(trained, redraw):
    other, _ = run(trained, methods=("gradient",), redraw=redraw)
    permuted, _ = run(trained, methods=("gradient",))
    assert other["t/gradient/spearman"] != permuted["t/gradient/spearman"]
    of_class = "t/gradient/class_spearman"
    assert other[of_class] == permuted[of_class]


class NanOfDark(nn.Module):
    """No number comes of an image whose first pixel is dark."""

    @nn.compact
    def __call__(self, x, train=False):
        y = Relu(name="relu")(nn.Conv(4, (4, 4), strides=(4, 4), name="conv")(x))
        y = jnp.where(x[:, :1, :1, :1] < 0, jnp.nan, 1) * y
        return nn.Dense(16, name="head")(y.mean((1, 2)))


def test_maps_with_nan_are_left_out_and_counted(trained, capsys):
    evaluator = create(trained, model=NanOfDark(), methods=("gradient",), images=0)
    data = trained.config.data
    source = open_source("fine_shapes/tiny", split="test")
    first = [to_input(jnp.asarray(x["image"])[None], data)[0, 0, 0, 0] for x in source]
    dark = int((np.array(first) < 0).sum())
    assert 0 < dark < len(source)
    variables = NanOfDark().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    metrics = evaluator.run(variables)
    assert metrics["t/gradient/nan_maps"] == dark
    assert np.isfinite(list(metrics.values())).all()
    scores = evaluator.table["rows"][0]["random"]["ssim"]
    assert [score["count"] for score in scores] == [len(source) - dark] * 2
    text = f"gradient: {dark} of {len(source)} images"
    assert evaluator.table["problems"] == {"nan_map": {"count": dark, "first": [text]}}
    assert f"warning: maps with NaN are left out: {text}" in capsys.readouterr().out


def test_a_method_without_any_map_has_no_score(trained, tmp_path):
    evaluator = create(trained, methods=("gradient", "grad_cam@relu"), folder=tmp_path)
    params = {**trained.variables["params"]}
    params["head"] = jax.tree.map(lambda x: x * jnp.nan, params["head"])
    metrics = evaluator.run({"params": params})
    assert np.isnan(metrics["t/gradient/spearman"]) and metrics["t/gradient/nan_maps"] == 11
    table = json.loads((tmp_path / "sanity.json").read_text())
    score = {"value": None, "low": None, "high": None, "count": 0}
    assert table["rows"][0]["other_class"]["ssim"] == score


def test_table_and_figure_are_written(trained, tmp_path):
    folder = tmp_path / "tables" / "sanity"
    _, evaluator = run(trained, folder=folder, methods=("gradient",))
    assert json.loads((folder / "sanity.json").read_text()) == evaluator.table
    assert (folder / "sanity.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_requests_are_named(trained):
    requests: list[tuple[Any, str]] = [
        ({"mode": "cascade"}, "unknown mode 'cascade'; did you mean 'cascading'"),
        ({"redraw": "permutation"}, "unknown redraw 'permutation'"),
        ({"methods": ("grad_kam",)}, "unknown method 'grad_kam'; did you mean 'grad_cam'"),
        ({"size": 8}, "size is 8; expected 0, or at least 11"),
        ({"images": 1000}, "images is 1000; expected 0, for all, up to the"),
        ({"batch_size": 6, "devices": 4}, "eval_batch_size=6 cannot be split over 4 devices"),
    ]
    for options, message in requests:
        with pytest.raises(ValueError, match=message):
            create(trained, **options)
    with pytest.raises(ValueError, match="row 'grad_cam@rleu': 'rleu'; did you mean 'relu'"):
        run(trained, methods=("grad_cam@rleu",))
    with pytest.raises(ValueError, match="unknown layer 'heat'; did you mean 'head'"):
        run(trained, layers=("heat",))


# ---- the order of the layers


def order_of(model, images=(1, 32, 32, 3), **kwargs):
    shape = jax.ShapeDtypeStruct(images, jnp.float32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images)))
    return layer_order(lambda v, x: model.apply(v, x, **kwargs), variables, shape), variables


def backbone():
    return ResNet(stage_sizes=(1, 1), num_classes=5, width=4, stem="small")


def test_layers_come_from_the_output_down():
    order, variables = order_of(backbone(), train=False)
    assert order == ["head", "stage2", "stage1", "stem"]
    assert "batch_stats" in variables  # they go with their layers
    list(randomized({"params": {"a": jnp.ones(3)}}, ["a"], key=jax.random.key(0)))


def test_inserted_layers_stand_where_they_are_called():
    layers = {"stage1": CBAM(reduction=2), "stem": SqueezeExcite(reduction=2)}
    order, _ = order_of(Insert(backbone(), layers=layers), train=False)
    assert order == [
        "backbone/head",
        "backbone/stage2",
        "inserted/stage1",
        "backbone/stage1",
        "inserted/stem",
        "backbone/stem",
    ]
    nested = Insert(Insert(backbone(), layers={"stem": SqueezeExcite(reduction=2)}), layers={})
    assert order_of(nested, train=False)[0] == [
        "backbone/backbone/head",
        "backbone/backbone/stage2",
        "backbone/backbone/stage1",
        "backbone/inserted/stem",
        "backbone/backbone/stem",
    ]


def test_a_branch_that_is_alone_is_a_container():
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Net(name="net")(x)

    assert order_of(Wrapped())[0] == ["net/head", "net/attention", "net/conv"]
    assert order_of(nn.Dense(3), (1, 4))[0] == ["kernel", "bias"][::-1]  # leaves at the top


def test_plain_trees_count_by_their_use():
    """Names that hold a / are paths; what nothing looks at is no layer."""
    weights = {"b/kernel": jnp.ones((4, 4)), "a/kernel": jnp.ones((4, 4)), "a/bias": jnp.ones(4)}
    variables = {"params": {"weights": {**weights, "unused": jnp.ones(3)}}}

    def fn(variables, images):
        w = variables["params"]["weights"]
        first = jax.jit(lambda w, x: jnp.maximum(x @ w["b/kernel"], 0))(w, images)
        return first @ w["a/kernel"] + w["a/bias"]

    order = layer_order(fn, variables, jnp.ones((1, 4)))
    assert order == ["weights/a", "weights/b"]
    drawn = dict(randomized(variables, order, key=jax.random.key(0), redraw="normal"))
    assert list(drawn) == order
    with pytest.raises(ValueError, match="uses none of its variables"):
        layer_order(lambda v, x: x, variables, jnp.ones((1, 4)))

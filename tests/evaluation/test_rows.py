from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from attnzoom_jax import attribution
from attnzoom_jax.evaluation.rows import at_taps, parse_rows
from attnzoom_jax.models import bind

KEY = jax.random.key(4)


def bound(trained):
    return bind(trained.model, trained.variables, train=False)


def images(trained, n=3):
    return jax.random.normal(jax.random.key(1), (n, *trained.image_shape))


def maps_of(row, trained):
    x = images(trained)
    [row] = at_taps([row], trained.model, bound(trained), x)
    return row.maps(bound(trained), x, jnp.arange(len(x)), KEY)


def test_a_row_is_its_method_at_its_tap(trained):
    fn, x, ids = bound(trained), images(trained), jnp.arange(3)
    rows = parse_rows(["grad_cam@relu", "gradient", "excitation_backprop@conv"])
    assert [(row.name, row.method, row.tap) for row in rows] == [
        ("grad_cam@relu", "grad_cam", "relu"),
        ("gradient", "gradient", ""),
        ("excitation_backprop@conv", "excitation_backprop", "conv"),
    ]
    expected = [
        attribution.grad_cam(fn, x, ids, tap="relu"),
        attribution.gradient(fn, x, ids),
        attribution.excitation_backprop(fn, x, ids, tap="conv"),
    ]
    for row, maps in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row.maps(fn, x, ids, KEY), maps)


def test_options_reach_their_method_alone(trained):
    options: Any = {"gradient": {"reduce": "sum"}, "smooth_grad": {"samples": 2, "noise": 0.3}}
    wanted = [
        attribution.gradient(bound(trained), images(trained), jnp.arange(3), reduce="sum"),
        attribution.smooth_grad(
            bound(trained), images(trained), jnp.arange(3), samples=2, noise=0.3, key=KEY
        ),
    ]
    configs: list[Any] = [options, ml_collections.ConfigDict(options)]
    for given in configs:
        rows = parse_rows(["gradient", "smooth_grad", "grad_cam"], given)
        assert [row.has_loop for row in rows] == [False, True, False]
        for row, maps in zip(rows, wanted, strict=False):
            np.testing.assert_array_equal(maps_of(row, trained), maps)
    assert parse_rows(["grad_cam"], options)[0].name == "grad_cam"  # and others may have options


def test_without_a_tap_the_default_one_is_taken_where_there_is_a_tap(trained):
    rows = parse_rows(["gradient", "grad_cam", "grad_cam@conv", "grad_cam@input"])
    shape = jax.ShapeDtypeStruct((1, *trained.image_shape), jnp.float32)
    rows = at_taps(rows, trained.model, bound(trained), shape)
    assert [row.tap for row in rows] == ["", "gated", "conv", "input"]
    assert [row.name for row in rows] == ["gradient", "grad_cam", "grad_cam@conv", "grad_cam@input"]
    assert maps_of(rows[3], trained).shape == (3, 32, 32)


def test_baselines_are_rows_without_maps(trained):
    center, cam = parse_rows(["center", "grad_cam"], baselines=("center",))
    assert (center.name, center.method, center.tap, center.has_loop) == ("center",) * 2 + (
        "",
        False,
    )
    assert at_taps([center], trained.model, bound(trained), images(trained)) == [center]
    with pytest.raises(ValueError, match="'center' is a baseline"):
        center.maps(bound(trained), images(trained), jnp.arange(3), KEY)
    assert cam.run is not None


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["grad_kam@relu"], {}, "unknown method 'grad_kam'; did you mean 'grad_cam'"),
        (["centre"], {}, "unknown method 'centre'; did you mean 'center'"),
        (["gradient"], {"smoth_grad": {}}, "unknown method 'smoth_grad'; did you mean 'smooth_g"),
        (["gradient"], {"gradient": {"reduc": "sum"}}, "option of gradient 'reduc'; did you mean"),
        (["gradient"], {"smooth_grad": {"sample": 2}}, "option of smooth_grad 'sample'; did you"),
        (["gradient"], {"center": {"sigma": 2}}, "unknown method 'center'"),
        (["gradient@relu"], {}, "gradient has no tap; write 'gradient'"),
        (["center@relu"], {}, "center has no tap"),
        (["grad_cam@"], {}, "'grad_cam@' has no tap after the @"),
        (["grad_cam@relu", "grad_cam@relu"], {}, "'grad_cam@relu' is given twice"),
        ("grad_cam", {}, "methods is 'grad_cam'; expected a tuple"),
        ([], {}, r"methods is \[\]; expected a tuple"),
    ],
)
def test_bad_rows_are_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        parse_rows(rows, options, baselines=("center",))


def test_taps_are_checked_before_anything_is_computed(trained):
    def check(row):
        return at_taps(parse_rows([row]), trained.model, bound(trained), images(trained))

    with pytest.raises(ValueError, match="row 'grad_cam@rleu': 'rleu'; did you mean 'relu'"):
        check("grad_cam@rleu")
    with pytest.raises(ValueError, match=r"'grad_cam@head': the tap has the shape \[3, 16\]"):
        check("grad_cam@head")

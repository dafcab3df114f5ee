"""Times masks for 8 and for 40 attributes: the layer alone, and a ResNet-18 with it.

    python benchmarks/multi_channel.py                                        # 3 minutes, two cores
    python benchmarks/multi_channel.py --out=results/bench/multi_channel.json

The layer is that of configs/multi_channel.py at the last features of a ResNet-18 for 224 pixels,
[n, 7, 7, 512], followed by the means over the places and the heads; "loop" computes the 40
attributes one after the other, each with its own matrix products. Forward is one call in
evaluation; forward+backward returns the loss's gradients of parameters and input. The forms take
turns, so that a busy machine slows all; times are medians, with compilation apart.

The masks themselves are a x 512 numbers per place, so the work on them grows with a whatever the
form; what one batched operation saves is everything else.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from timing import compiled, machine, take_turns

from attnzoom_jax.layers import Tap
from attnzoom_jax.models import create_model
from attnzoom_jax.models.attribute import AttributeModel

ATTRIBUTES = (8, 40)
BATCH = 8


class Given(nn.Module):
    """A backbone that returns what it is given, so that the masks alone are timed."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """The images, at the tap `features`."""
        return Tap(name="features")(images)


def head(attributes: int) -> AttributeModel:
    """Masks, means and heads of features."""
    return AttributeModel(Given(), attributes, tap="features")


def forms() -> dict[str, tuple[Any, Any]]:
    """{name: (model, its input)}."""
    keys = jax.random.split(jax.random.key(0))
    features = jax.nn.relu(jax.random.normal(keys[0], (BATCH, 7, 7, 512)))
    images = jax.random.normal(keys[1], (BATCH, 224, 224, 3))
    found: dict[str, tuple[Any, Any]] = {}
    for a in ATTRIBUTES:
        found[f"layer {a}"] = (head(a), features)
        network = create_model("multi_channel", num_classes=a, backbone="resnet18")
        found[f"network {a}"] = (network, images)
    return found


def looped(parts: list[Any], x: jax.Array, models: Any) -> jax.Array:
    """One attribute after the other."""
    return jnp.concatenate([models.apply(part, x) for part in parts], axis=1)


def calls(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled calls, and what is known of them without a clock."""
    ready, facts = {}, {}
    todo: dict[str, tuple[Any, Any, Any]] = {}
    for name, (model, x) in forms().items():
        variables = jax.jit(model.init)(jax.random.key(1), x)
        todo[name] = (model.apply, variables, x)
    one, x = head(1), forms()["layer 8"][1]
    parts = [jax.jit(one.init)(jax.random.key(k), x) for k in range(max(ATTRIBUTES))]
    todo[f"loop {max(ATTRIBUTES)}"] = (lambda parts, x: looped(parts, x, one), parts, x)
    for name, (apply, variables, x) in todo.items():
        if kind == "forward":
            function = apply
        else:

            def loss(variables: Any, x: Any, apply: Any = apply) -> jax.Array:
                return jnp.square(apply(variables, x)).mean()

            function = jax.grad(loss, argnums=(0, 1))
        ready[name], facts[name] = compiled(function, (variables, x))
    return ready, facts


def main() -> None:
    """Time both passes, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each pass")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "batch": BATCH, "passes": {}}
    low, high = ATTRIBUTES
    for kind in ("forward", "forward+backward"):
        ready, facts = calls(kind)
        times = take_turns(ready, seconds=given.seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {
            part: round(
                statistics.median(
                    b / a
                    for a, b in zip(times[f"{part} {low}"], times[f"{part} {high}"], strict=True)
                ),
                2,
            )
            for part in ("layer", "network")
        }
        rows = {
            name: {"median_ms": round(1e3 * medians[name], 2), "rounds": len(times[name]), **fact}
            for name, fact in facts.items()
        }
        found["passes"][kind] = {"forms": rows, f"ratio {high}/{low}": ratios}
        for name, row in rows.items():
            print(f"{kind:<17} {name:<11} {row['median_ms']:>9.2f} ms", flush=True)
        print(f"{kind:<17} {high} over {low} attributes: {ratios}", flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a recursive model looks at in each step: its view, where it looks, how much the step counts.

For `RecursiveZoom` a step's view is the image as resampled for it, and its map Grad-CAM of a class
at the step's own features. For `TwoStream` every step sees the same patch, and its map is Grad-CAM
of that step's own logits at the object trunk, as in the code of Shroff et al. 2020.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes

from attnzoom_jax import attribution
from attnzoom_jax.evaluation.examples import Examples, target_ids
from attnzoom_jax.evaluation.maps import Arrays, save_arrays
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.models import bind
from attnzoom_jax.models.insert import Insert
from attnzoom_jax.models.recursive_zoom import RecursiveZoom
from attnzoom_jax.models.two_stream import TwoStream, with_fields
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.viz import overlay, sheet

Fn = Callable[[jax.Array], jax.Array]


def draw_steps(
    trained: TrainedModel,
    examples: Examples,
    out: pathlib.Path,
    *,
    target: str = "predicted",
    chunk_size: int = 16,
) -> Arrays:
    """Draw every step of a recursive model; write steps.png and steps.npz.

    Args:
        trained: a `RecursiveZoom` or a `TwoStream`, also inside of an `Insert`.
        examples: the images.
        out: folder, is created.
        target: class of the maps: "predicted", "label" or a class id.
        chunk_size: images per call of the program.

    Returns:
        What steps.npz holds: `views` uint8 [n, t, s, s', 3], `maps` [n, t, h, w] raw, `weights`
        [n, t], `predicted`, `probability`, `step_predicted` [n, t] and `boxes` [n, 4] of a
        `TwoStream`, names, labels.

    Raises:
        ValueError: a model without steps; unknown class; boxes that only the data set has.
    """
    look = jax.jit(_look_function(trained))
    targets = target_ids(target, examples, trained.class_names)
    chunks = []
    for start in range(0, len(examples), chunk_size):
        chunk = slice(start, start + chunk_size)
        found = look(trained.variables, examples.images[chunk], targets[chunk])
        chunks.append(jax.tree.map(np.asarray, found))
    arrays: Arrays = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
    arrays |= {"names": np.array(examples.names), "labels": examples.labels}
    out.mkdir(parents=True, exist_ok=True)
    save_arrays(out / "steps.npz", arrays)
    blocks = _blocks(examples, arrays, trained.short_names)
    scale = {1: sheet.Scale("share of the map's maximum")}
    sheet.save_sheet(out / "steps.png", blocks, scale, side=1.15, per_row=1)
    return arrays


def _look_function(trained: TrainedModel) -> Callable[..., dict[str, jax.Array]]:
    """(variables, images uint8 [n, h, w, 3], class ids or -1 [n]) -> what steps.npz holds of it."""
    inner, prefix = _recursive(trained.model)
    data = trained.config.data
    model = with_fields(trained.model, eval_patch="first")  # one patch per image

    def look(variables: Any, images: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        fn, x = bind(model, variables, train=False), to_input(images, data)
        logits = fn(x)
        targets = jnp.where(targets < 0, logits.argmax(-1), targets)
        steps: Any = _zooms if isinstance(inner, RecursiveZoom) else _patches
        found = steps(fn, x, targets, inner, prefix)
        pixels = found["views"] * jnp.asarray(data.std) + jnp.asarray(data.mean)
        return {
            **found,
            "views": jnp.round(255 * pixels).clip(0, 255).astype(jnp.uint8),
            "predicted": logits.argmax(-1),
            "probability": jax.nn.softmax(logits).max(-1),
        }

    return look


def _recursive(model: nn.Module, prefix: str = "") -> tuple[Any, str]:
    """The recursive model itself, and the prefix of its taps."""
    if isinstance(model, Insert):
        return _recursive(model.backbone, f"{prefix}backbone/")
    if isinstance(model, (RecursiveZoom, TwoStream)):
        return model, prefix
    raise ValueError(
        f"--figure=steps needs a model that looks in steps, recursive_zoom or two_stream; this is "
        f"a {type(model).__name__}"
    )


def _zooms(
    fn: Fn, x: jax.Array, targets: jax.Array, model: RecursiveZoom, prefix: str
) -> dict[str, jax.Array]:
    def calls(name: str) -> list[str]:
        repeats = [f"{name}#{t}" for t in range(1, model.steps)]
        return [prefix + name, *(prefix + repeat for repeat in repeats)]

    views, features = calls("view"), calls(f"backbone/{model.tap}")
    weights = f"{prefix}step_weights"
    _, taps = attribution.read_taps(fn, x, [*views, weights])
    maps = attribution.grad_cam(fn, x, targets, tap=features)
    return {
        "views": jnp.stack([taps[view] for view in views], axis=1),
        "maps": jnp.stack([maps[tap] for tap in features], axis=1),
        "weights": taps[weights],
    }


def _patches(
    fn: Fn, x: jax.Array, targets: jax.Array, model: TwoStream, prefix: str
) -> dict[str, jax.Array]:
    logits, patch, boxes = f"{prefix}step_logits", f"{prefix}patch", f"{prefix}boxes"
    gates = [f"{prefix}recursive/gate"] if model.aggregation == "attention" else []
    _, taps = attribution.read_taps(fn, x, [logits, patch, boxes, *gates])

    def of_step(t: int) -> Fn:
        return lambda x: attribution.read_taps(fn, x, [logits])[1][logits][:, t]

    n, steps = taps[logits].shape[:2]
    trunk = f"{prefix}object_trunk"
    maps = [attribution.grad_cam(of_step(t), x, targets, tap=trunk) for t in range(steps)]
    last = jax.nn.one_hot(steps - 1, steps)
    fixed = last if model.aggregation == "last" else jnp.full(steps, 1 / steps)
    return {
        "views": jnp.broadcast_to(taps[patch][:, None], (n, steps, *taps[patch].shape[1:])),
        "maps": jnp.stack(maps, axis=1),
        "weights": taps[gates[0]][..., 0] if gates else jnp.broadcast_to(fixed, (n, steps)),
        "step_predicted": taps[logits].argmax(-1),
        "boxes": taps[boxes],
    }


def _blocks(examples: Examples, arrays: Arrays, class_names: tuple[str, ...]) -> list[sheet.Block]:
    """Right and wrong predictions apart; one row per image, one column per step."""
    rows: dict[str, list[list[sheet.Cell]]] = {"right": [], "wrong": [], "": []}
    size = arrays["views"].shape[2:4]
    maps = np.stack([ops_maps.resize(jnp.asarray(m), size) for m in arrays["maps"]])
    for i, image in enumerate(examples.images):
        label, predicted = int(examples.labels[i]), int(arrays["predicted"][i])
        title = f"{class_names[predicted]} {arrays['probability'][i]:.2f}"
        if label not in (-1, predicted):
            title += f"\nis {class_names[label]}"
        box = arrays["boxes"][i] if "boxes" in arrays else None
        cells = [sheet.Cell(title, functools.partial(_show_with_box, image=image, box=box))]
        for t, view in enumerate(arrays["views"][i]):
            said = f"step {t + 1}: weight {arrays['weights'][i, t]:.2f}"
            if "step_predicted" in arrays:
                said += f"\n{class_names[int(arrays['step_predicted'][i, t])]}"
            panel = overlay.class_map_panel(said, maps[i, t])
            cells += sheet.explanation_cells(overlay.Explanation("", "", view, [panel]))[1:]
        block = "" if label < 0 else "right" if label == predicted else "wrong"
        rows[block].append(cells)
    return [sheet.Block(title, found) for title, found in rows.items() if found]


def _show_with_box(axes: Axes, image: np.ndarray, box: np.ndarray | None) -> None:
    overlay.show_image(axes, image)
    if box is not None:
        y0, x0, y1, x1 = (float(value) - 0.5 for value in box)  # edges of pixels
        outline = {"fill": False, "linewidth": 1.2, "edgecolor": "cyan"}
        axes.add_patch(matplotlib.patches.Rectangle((x0, y0), x1 - x0, y1 - y0, **outline))

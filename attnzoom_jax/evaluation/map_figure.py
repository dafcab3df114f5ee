"""Maps of images, one picture for each and a sheet of all: what explain.py shows by itself."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnzoom_jax import attribution
from attnzoom_jax.attribution.methods import takes
from attnzoom_jax.data.split import labels_of
from attnzoom_jax.evaluation.examples import Examples, target_ids
from attnzoom_jax.evaluation.maps import as_function, compute_maps, save_arrays
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.models.taps import default_tap
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.viz import overlay

# Beyond these, relevance is said to be ill-conditioned, or to get lost on the way.
MAX_ABSOLUTE, MAX_DROPPED = 2.0, 0.05


def explain(
    trained: TrainedModel,
    examples: Examples,
    out: pathlib.Path,
    *,
    methods: Sequence[str] = ("grad_cam",),
    options: Mapping[str, Any] | None = None,
    tap: str = "",
    target: str = "predicted",
    chunk_size: int = 32,
) -> dict[str, np.ndarray]:
    """Explain images and write the pictures.

    Args:
        trained: the model.
        examples: the images.
        out: folder, is created.
        methods: names from METHODS.
        options: options of the methods; each goes to those that have it.
        tap: where maps are taken; "" for the last spatial tap below the classifier.
        target: "predicted", "label", or the name or id of a class or attribute.
        chunk_size: images per call of the program.

    Returns:
        What maps.npz holds: raw maps and masks, names, labels, predicted classes, probabilities.

    Raises:
        ValueError: unknown method, option, tap or class.
    """
    fn, shape = as_function(trained)
    gates = attribution.gate_taps(attribution.list_taps(fn, shape))
    tap = tap or default_tap(trained.model, fn, shape)
    places = {name: f"tap {tap!r}" if takes(name, "tap") else "the image" for name in methods}
    print("\n".join(f"{name} at {place}" for name, place in places.items()), flush=True)
    arrays = compute_maps(
        trained,
        examples.images,
        target_ids(target, examples, trained.class_names),
        methods=methods,
        options=options,
        tap=tap,
        gates=gates,
        chunk_size=chunk_size,
    )
    arrays |= {"names": np.array(examples.names), "labels": examples.labels, "tap": np.array(tap)}
    if "absolute" in arrays:
        _warn_of_imbalance(tap, arrays["absolute"], arrays["dropped"])

    out.mkdir(parents=True, exist_ok=True)
    save_arrays(out / "maps.npz", arrays)
    pictures = _pictures(trained, examples, arrays, methods, gates)
    for picture in pictures:
        overlay.save_explanation(out / f"{picture.name}.png", picture)
    per_row = 2 if len(methods) + len(gates) < 4 else 1
    overlay.save_contact_sheet(out / "contact_sheet.png", pictures[:16], per_row=per_row)
    return arrays


def list_taps(trained: TrainedModel) -> str:
    """A table of the model's taps: name, shape for one image, how deep, which one is the default.

    Depth counts the convolutions and matrix products on the longest way from the images.
    """
    fn, shape = as_function(trained)
    default = default_tap(trained.model, fn, shape)
    depths = attribution.tap_depths(fn, shape)
    rows = [("tap", "shape", "depth", "")]
    for name, tap_shape in attribution.list_taps(fn, shape).items():
        size = " x ".join(map(str, tap_shape[1:]))
        rows.append((name, size, str(depths[name]), "default" if name == default else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(map(str.ljust, row, widths)).rstrip()  # one line per tap
        for row in rows
    )


def _warn_of_imbalance(tap: str, absolute: np.ndarray, dropped: np.ndarray) -> None:
    if absolute.max() > MAX_ABSOLUTE or np.abs(dropped).max() > MAX_DROPPED:
        print(
            f"warning: Excitation Backprop at {tap!r} is ill-conditioned: the absolute relevance "
            f"of an image is up to {absolute.max():.3g} (1 in networks of ReLUs), up to "
            f"{np.abs(dropped).max():.1%} was lost on the way; try --option=negative=clamp, or a "
            "later tap",
            flush=True,
        )


def _pictures(
    trained: TrainedModel,
    examples: Examples,
    arrays: dict[str, np.ndarray],
    methods: Sequence[str],
    gates: list[str],
) -> list[overlay.Explanation]:
    h, w, _ = trained.image_shape
    resized = {
        name: np.asarray(ops_maps.resize(jnp.asarray(arrays[name], jnp.float32), (h, w)))
        for name in (*methods, *gates)
    }
    # Saliency is a distribution: on the scale of a mask, from 0 to 1, it would be black.
    shares = {gate: np.allclose(arrays[gate].sum((1, 2)), 1, atol=1e-3) for gate in gates}
    pictures = []
    for i, name in enumerate(examples.names):
        title = _title(trained, arrays["probabilities"][i], examples.labels[i])
        cued = trained.short_names[int(arrays["targets"][i])]
        titles = {m: textwrap.fill(f"{m.replace('_', ' ')}: {cued}", 24) for m in methods}
        panels = [overlay.class_map_panel(titles[m], resized[m][i]) for m in methods]
        for gate in gates:
            panel = overlay.class_map_panel if shares[gate] else overlay.mask_panel
            panels.append(panel(f"mask {gate}", resized[gate][i]))
        pictures.append(overlay.Explanation(name, title, examples.images[i], panels))
    return pictures


def _title(trained: TrainedModel, probabilities: np.ndarray, label: np.ndarray) -> str:
    """What was predicted, and what it is if it is known: of a class, or of the attributes."""
    names = trained.short_names
    if has_attributes(trained):
        strongest = np.argsort(-probabilities)[:2]
        said = [f"{names[k]} {probabilities[k]:.2f}" for k in strongest]
        title = textwrap.fill(", ".join(said), 32)
        right = ((probabilities > 0.5) == (label > 0.5)).sum()
        return f"{title}\n{right} of {len(names)} right" if label.ndim else title
    predicted = probabilities.argmax()
    title = f"{names[predicted]} {probabilities[predicted]:.2f}"
    is_wrong = label >= 0 and label != predicted
    return f"{title}\nis {names[int(label)]}" if is_wrong else title


def has_attributes(trained: TrainedModel) -> bool:
    """Whether the labels of a run are attributes, not classes."""
    return labels_of(trained.config.data) == "attributes"

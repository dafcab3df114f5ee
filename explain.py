"""Show where a trained model looks: python explain.py --workdir=runs/demo --out=runs/demo/explain.

--figure says what is drawn:

    maps     (the default) a picture per image, contact_sheet.png and the raw maps (maps.npz).
             Several methods stand side by side: --method=grad_cam,contrastive_excitation_backprop
    warp     images warped by the attention, right and wrong predictions apart: warp_<image>.png,
             warp_sheet.png and warp.npz
    compare  this run and --other_workdir on the same images, at the same map resolution:
             compare.png, compare.npz and compare.json
    steps    what a model that looks in steps sees in each of them: steps.png and steps.npz

--list_taps prints where a map can be taken.
"""

import ast
import dataclasses
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from attnzoom_jax import attribution, cli
from attnzoom_jax.attribution.methods import METHODS, takes
from attnzoom_jax.evaluation.compare import check_comparable, draw_comparison
from attnzoom_jax.evaluation.examples import (
    Examples,
    chunks_of_split,
    from_files,
    from_split,
    in_chunks,
    mask_fields,
    right_and_wrong,
    target_ids,
)
from attnzoom_jax.evaluation.maps import as_function, compute_maps, save_arrays
from attnzoom_jax.evaluation.restore import TrainedModel, restore_model
from attnzoom_jax.evaluation.steps import draw_steps
from attnzoom_jax.evaluation.warp import draw_warps
from attnzoom_jax.models.taps import default_tap
from attnzoom_jax.models.two_stream import with_fields
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training import sharding
from attnzoom_jax.training.workdir import Workdir
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
        target: "predicted", "label" or a class id.
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
        target_ids(target, examples, len(trained.class_names)),
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
        predicted, label = int(arrays["predicted"][i]), int(examples.labels[i])
        title = f"{trained.class_names[predicted]} {arrays['probabilities'][i, predicted]:.2f}"
        if label >= 0 and label != predicted:
            title += f"\nis {trained.class_names[label]}"
        cued = trained.class_names[int(arrays["targets"][i])]
        titles = {m: textwrap.fill(f"{m.replace('_', ' ')}: {cued}", 24) for m in methods}
        panels = [overlay.class_map_panel(titles[m], resized[m][i]) for m in methods]
        for gate in gates:
            panel = overlay.class_map_panel if shares[gate] else overlay.mask_panel
            panels.append(panel(f"mask {gate}", resized[gate][i]))
        pictures.append(overlay.Explanation(name, title, examples.images[i], panels))
    return pictures


def _options(settings: Sequence[str]) -> dict[str, Any]:
    """Settings NAME=VALUE as a dictionary; a value that is no Python literal is a word."""
    options = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--option={setting!r}: expected NAME=VALUE, such as samples=20")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _maps(trained: TrainedModel, out: pathlib.Path) -> int:
    given = flags.FLAGS
    if given.images:
        examples = from_files(trained, given.images)
    else:
        examples = from_split(trained, given.split, given.count or 16)
    explain(
        trained,
        examples,
        out,
        methods=given.method or ["grad_cam"],
        options=_options(given.option),
        tap=given.tap,
        target=_target() or "predicted",
    )
    print(f"{len(examples)} pictures, contact_sheet.png and maps.npz in {out}", flush=True)
    return 1 if examples.rejected else 0


def _warp(trained: TrainedModel, out: pathlib.Path) -> int:
    given = flags.FLAGS
    if given.images:
        examples = from_files(trained, given.images, reserved=("sheet",))
    else:
        examples = right_and_wrong(trained, given.split, given.count or 4)
    draw_warps(
        trained,
        examples,
        out,
        method=_one_method(),
        options=_options(given.option),
        tap=given.tap,
        target=_target() or "predicted",
    )
    print(f"{len(examples)} pictures, warp_sheet.png and warp.npz in {out}", flush=True)
    return 1 if examples.rejected else 0


def _compare(trained: TrainedModel, out: pathlib.Path) -> int:
    given = flags.FLAGS
    if not given.other_workdir:
        raise ValueError("--figure=compare needs the folder of the other run: --other_workdir=DIR")
    other = _restore(given.other_workdir)
    check_comparable(trained, other)
    rejected = []
    if given.images:
        examples = from_files(trained, given.images)
        count, chunks, rejected = len(examples), in_chunks(examples), examples.rejected
    else:
        masks = mask_fields(trained)
        count, chunks = chunks_of_split(trained, given.split, masks=masks)
    draw_comparison(
        (trained, other),
        chunks,
        count,
        out,
        names=_names(given.workdir, given.other_workdir),
        method=_one_method() or "grad_cam",
        options=_options(given.option),
        taps=(given.tap, given.other_tap),
        target=_target(),
        shown=given.count or 4,
    )
    print(f"compare.png, compare.npz and compare.json of {count} images in {out}", flush=True)
    return 1 if rejected else 0


def _steps(trained: TrainedModel, out: pathlib.Path) -> int:
    given = flags.FLAGS
    if given.method or given.tap or given.option:
        raise ValueError(
            "--figure=steps is Grad-CAM at every step; leave out --method, --tap and --option"
        )
    if given.images:
        examples = from_files(trained, given.images)
    else:
        examples = right_and_wrong(trained, given.split, given.count or 4)
    draw_steps(trained, examples, out, target=_target() or "predicted")
    print(f"steps.png and steps.npz of {len(examples)} images in {out}", flush=True)
    return 1 if examples.rejected else 0


# What --figure may be.
FIGURES: dict[str, Callable[[TrainedModel, pathlib.Path], int]] = {
    "maps": _maps,
    "warp": _warp,
    "compare": _compare,
    "steps": _steps,
}


def _restore(workdir: str) -> TrainedModel:
    given = flags.FLAGS
    mesh = sharding.create_mesh(jax.devices()[:1])
    trained = restore_model(
        workdir, checkpoint=given.checkpoint, data_dir=given.data_dir, mesh=mesh
    )
    if trained.config.data.patches:
        print("note: patches are taken around the class map here, not at the boxes of data.patches")
        trained = dataclasses.replace(trained, model=with_fields(trained.model, patch_source="cam"))
    return trained


def _target() -> str:
    return str(flags.FLAGS["class"].value)


def _one_method() -> str:
    """The method that was asked for, "" for none."""
    given = flags.FLAGS
    if len(given.method) > 1:
        raise ValueError(
            f"--figure={given.figure} takes one method, got --method={','.join(given.method)}"
        )
    return given.method[0] if given.method else ""


def _names(workdir: str, other_workdir: str) -> tuple[str, str]:
    """What two runs are called in a picture."""
    this, other = (pathlib.Path(path).resolve().name for path in (workdir, other_workdir))
    return (this, other) if this != other else ("this", "other")


def main() -> int:
    """Parse the flags, draw, say where the pictures are."""
    given = flags.FLAGS
    if given.figure != "compare" and (given.other_workdir or given.other_tap):
        raise ValueError("--other_workdir and --other_tap belong to --figure=compare")
    config = Workdir(given.workdir).config()
    cli.start_devices(config.platform, compile_cache=config.compile_cache)
    trained = _restore(given.workdir)
    if given.list_taps:
        print(list_taps(trained))
        return 0
    out = pathlib.Path(given.out or pathlib.Path(given.workdir) / "explain")
    return FIGURES[given.figure](trained, out)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run")
    flags.DEFINE_string("checkpoint", "best", "best, last, or a step")
    flags.DEFINE_string("data_dir", "", "Folder of prepared data sets, instead of the config's")
    flags.DEFINE_enum("figure", "maps", list(FIGURES), "What is drawn")
    flags.DEFINE_string("images", "", "Image files, as a quoted pattern; default: of a split")
    flags.DEFINE_string("split", "test", "Split to take images from")
    flags.DEFINE_integer(
        "count",
        None,
        "Number of images from the split, default 16; of the other figures: of each block, 4",
        lower_bound=1,
    )
    flags.DEFINE_list(
        "method", [], f"Default grad_cam; one or, for maps, several of: {', '.join(METHODS)}"
    )
    flags.DEFINE_multi_string(
        "option", [], "Option of a method or of the warp, NAME=VALUE; may be repeated"
    )
    flags.DEFINE_string(
        "tap", "", "Where maps are taken; default: the last spatial tap (warp: the first mask)"
    )
    flags.DEFINE_bool("list_taps", False, "Print the taps of the model, and stop")
    flags.DEFINE_string(
        "class", "", "Class to explain: predicted (the default), label (that of compare), or an id"
    )
    flags.DEFINE_string("other_workdir", "", "Folder of the run to compare with")
    flags.DEFINE_string("other_tap", "", "Where maps of the other run are taken")
    flags.DEFINE_string("out", "", "Folder for the pictures; default: WORKDIR/explain")
    flags.mark_flag_as_required("workdir")
    cli.run(main)

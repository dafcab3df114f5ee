"""Show where a trained model looks: python explain.py --workdir=runs/demo --out=runs/demo/explain.

--figure says what is drawn:

    maps        (the default) a picture per image, contact_sheet.png and the raw maps (maps.npz).
                Several methods side by side: --method=grad_cam,contrastive_excitation_backprop
    warp        images warped by the attention, right and wrong predictions apart:
                warp_<image>.png, warp_sheet.png and warp.npz
    compare     this run and --other_workdir on the same images, at the same map resolution:
                compare.png, compare.npz and compare.json
    steps       what a model that looks in steps sees in each of them: steps.png and steps.npz
    attributes  the masks of each attribute, and which channels it uses: attributes_<image>.png,
                attributes.png and attributes.npz
    robustness  accuracy when images are corrupted or attacked, from the run's eval.json, and that
                of --other_workdir beside it: robustness.png and robustness.csv; and mask_study.png
                where tools/tune_masks.py has tuned its masks

--list_taps prints where a map can be taken. --config=FILE.py explains a network that was never
trained here, as eval.py evaluates it; --workdir is then a folder for the pictures.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from attnzoom_jax import cli
from attnzoom_jax.attribution.methods import METHODS
from attnzoom_jax.evaluation.attribute_figure import deciding_pixels_of, draw_attributes
from attnzoom_jax.evaluation.compare import check_comparable, draw_comparison
from attnzoom_jax.evaluation.examples import (
    chunks_of_split,
    from_files,
    from_split,
    in_chunks,
    mask_fields,
    right_and_wrong,
)
from attnzoom_jax.evaluation.map_figure import explain, has_attributes, list_taps
from attnzoom_jax.evaluation.restore import TrainedModel, load_model
from attnzoom_jax.evaluation.robustness_figure import draw_mask_study, draw_robustness
from attnzoom_jax.evaluation.steps import draw_steps
from attnzoom_jax.evaluation.warp import draw_warps
from attnzoom_jax.models.two_stream import with_fields
from attnzoom_jax.training import sharding
from attnzoom_jax.training.workdir import Workdir


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
    if given.images:
        examples = from_files(trained, given.images)
    else:
        examples = right_and_wrong(trained, given.split, given.count or 4)
    draw_steps(trained, examples, out, target=_target() or "predicted")
    print(f"steps.png and steps.npz of {len(examples)} images in {out}", flush=True)
    return 1 if examples.rejected else 0


def _attributes(trained: TrainedModel, out: pathlib.Path) -> int:
    given = flags.FLAGS
    if given.images:
        examples, split, pixels = from_files(trained, given.images, reserved=()), "", None
    else:
        split = given.split
        examples = from_split(trained, split, given.count or 4)
        pixels = deciding_pixels_of(trained, split, len(examples))
    draw_attributes(
        trained, examples, out, split=split, pixels=pixels, target=_target() or "predicted"
    )
    print(f"{len(examples)} pictures, attributes.png and attributes.npz in {out}", flush=True)
    return 1 if examples.rejected else 0


def _robustness(out: pathlib.Path) -> int:
    """From what the runs' folders hold: no model is restored."""
    given = flags.FLAGS
    workdirs = [folder for folder in (given.workdir, given.other_workdir) if folder]
    names = _names(given.workdir, given.other_workdir)
    draw_robustness(dict(zip(names, workdirs, strict=False)), out)
    studied = draw_mask_study(given.workdir, out)
    pictures = "robustness.png, mask_study.png" if studied else "robustness.png"
    print(f"{pictures} and robustness.csv in {out}", flush=True)
    return 0


# What --figure may be, besides robustness, which needs no model.
FIGURES: dict[str, Callable[[TrainedModel, pathlib.Path], int]] = {
    "maps": _maps,
    "warp": _warp,
    "compare": _compare,
    "steps": _steps,
    "attributes": _attributes,
}
OF_IMAGES = ("config", "checkpoint", "data_dir", "images", "split", "count", "class")
OF_METHODS = ("method", "option", "tap")
# The flags that each figure heeds, besides those that all do.
HEEDED: dict[str, Sequence[str]] = {
    "maps": (*OF_IMAGES, *OF_METHODS),
    "warp": (*OF_IMAGES, *OF_METHODS),
    "compare": (*OF_IMAGES, *OF_METHODS, "other_workdir", "other_tap"),
    "steps": OF_IMAGES,
    "attributes": OF_IMAGES,
    "robustness": ("other_workdir",),
}
OF_CLASSES = ("warp", "compare", "steps")  # each image right or wrong


def _restore(workdir: str, config: Any = None) -> TrainedModel:
    given = flags.FLAGS
    mesh = sharding.create_mesh(jax.devices()[:1])
    trained = load_model(
        workdir, checkpoint=given.checkpoint, config=config, data_dir=given.data_dir, mesh=mesh
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


def _refuse_unheeded(figure: str) -> None:
    """Raise a ValueError for a flag that is set and that the figure would not heed."""
    for flag in dict.fromkeys(flag for heeded in HEEDED.values() for flag in heeded):
        if flag not in HEEDED[figure] and flags.FLAGS[flag].value != flags.FLAGS[flag].default:
            others = ", ".join(name for name, heeded in HEEDED.items() if flag in heeded)
            raise ValueError(
                f"--figure={figure} does not heed --{flag}; leave it out (it is of: {others})"
            )


def main() -> int:
    """Parse the flags, draw, say where the pictures are."""
    given = flags.FLAGS
    _refuse_unheeded(given.figure)
    out = pathlib.Path(given.out or pathlib.Path(given.workdir) / "explain")
    if given.figure == "robustness" and not given.list_taps:
        return _robustness(out)
    config = Workdir(given.workdir).config() if given.config is None else given.config
    cli.start_devices(config.platform, compile_cache=config.compile_cache)
    trained = _restore(given.workdir, given.config)
    if given.list_taps:
        print(list_taps(trained))
        return 0
    if has_attributes(trained) and given.figure in OF_CLASSES:
        raise ValueError(
            f"--figure={given.figure} tells right from wrong classes, and this run has attributes; "
            "take --figure=attributes, or --figure=maps with --class=NAME for the map of one"
        )
    return FIGURES[given.figure](trained, out)


if __name__ == "__main__":
    cli.define_config_flag("Config file, instead of the config that the run was trained with")
    flags.DEFINE_string("workdir", None, "Folder of the run")
    flags.DEFINE_string("checkpoint", "best", "best, last, or a step")
    flags.DEFINE_string("data_dir", "", "Folder of prepared data sets, instead of the config's")
    flags.DEFINE_enum("figure", "maps", list(HEEDED), "What is drawn")
    flags.DEFINE_string("images", "", "Image files, as a quoted pattern; default: of a split")
    flags.DEFINE_string("split", "test", "Split to take images from")
    flags.DEFINE_integer(
        "count",
        None,
        "Images from the split: of maps 16, of attributes 4, of the others 4 in each block",
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
        "class", "", "To explain: predicted (the default), label (that of compare), a name or an id"
    )
    flags.DEFINE_string("other_workdir", "", "Folder of the run to compare with")
    flags.DEFINE_string("other_tap", "", "Where maps of the other run are taken")
    flags.DEFINE_string("out", "", "Folder for the pictures; default: WORKDIR/explain")
    flags.mark_flag_as_required("workdir")
    cli.run(main)

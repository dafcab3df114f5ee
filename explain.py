"""Show where a trained model looks: python explain.py --workdir=runs/demo --out=runs/demo/explain.

Writes a picture per image, contact_sheet.png and the raw maps (maps.npz). Several methods stand
side by side: --method=grad_cam,contrastive_excitation_backprop. --list_taps prints where a map can
be taken.
"""

import ast
import dataclasses
import glob
import itertools
import pathlib
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from attnzoom_jax import attribution, cli
from attnzoom_jax.attribution.methods import METHODS, create_method, takes
from attnzoom_jax.data.augment import center_crop
from attnzoom_jax.data.image_file import read_image
from attnzoom_jax.data.pipeline import Resize
from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation.restore import TrainedModel, restore_model
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.models import bind
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training import sharding
from attnzoom_jax.training.progress import format_duration
from attnzoom_jax.training.workdir import Workdir
from attnzoom_jax.viz import overlay

# Beyond these, relevance is said to be ill-conditioned, or to get lost on the way.
MAX_ABSOLUTE, MAX_DROPPED = 2.0, 0.05


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images to explain.

    Attributes:
        names: one per image, for files.
        images: uint8 [n, h, w, 3], as the model takes them.
        labels: class ids, -1 where unknown.
        rejected: files that are no images.
    """

    names: list[str]
    images: np.ndarray
    labels: np.ndarray
    rejected: list[str]


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
    options = dict(options or {})
    for option in options:
        if not any(takes(method, option) for method in methods):
            raise ValueError(f"--option={option}: none of {', '.join(methods)} has this option")
    computed = {
        method: create_method(method, **{k: v for k, v in options.items() if takes(method, k)})
        for method in methods
    }
    fn, shape = _bound(trained)
    gates = attribution.gate_taps(attribution.list_taps(fn, shape))
    tap = tap or attribution.default_tap(fn, shape)
    places = {name: f"tap {tap!r}" if takes(name, "tap") else "the image" for name in methods}
    print("\n".join(f"{name} at {place}" for name, place in places.items()), flush=True)
    explain_chunk = _explain_chunk(trained, computed, options, tap, gates)
    targets = _targets(target, examples, len(trained.class_names))
    count, begin = len(examples.names), time.monotonic()
    chunks = []
    for start in range(0, count, chunk_size):
        chunk = slice(start, start + chunk_size)
        padding = max(0, start + chunk_size - count) if start else 0
        images = np.pad(examples.images[chunk], ((0, padding), (0, 0), (0, 0), (0, 0)))
        key = jax.random.fold_in(jax.random.key(0), start)
        ids = np.pad(targets[chunk], (0, padding))
        results = explain_chunk(images, ids, key)
        chunks.append({k: np.asarray(v)[: len(images) - padding] for k, v in results.items()})
        done = min(start + chunk_size, count)
        if done < count:
            left = (time.monotonic() - begin) / done * (count - done)
            print(f"{done}/{count} images, {format_duration(left)} left", flush=True)
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    arrays |= {"names": np.array(examples.names), "labels": examples.labels, "tap": np.array(tap)}
    if "absolute" in arrays:
        _warn_of_imbalance(tap, arrays["absolute"], arrays["dropped"])

    out.mkdir(parents=True, exist_ok=True)
    # A "/" would make folders inside the npz file.
    files: dict[str, Any] = {name.replace("/", "."): array for name, array in arrays.items()}
    np.savez(out / "maps.npz", **files)
    pictures = _pictures(trained, examples, arrays, methods, gates)
    for picture in pictures:
        overlay.save_explanation(out / f"{picture.name}.png", picture)
    per_row = 2 if len(methods) + len(gates) < 4 else 1
    overlay.save_contact_sheet(out / "contact_sheet.png", pictures[:16], per_row=per_row)
    return arrays


def _explain_chunk(
    trained: TrainedModel,
    methods: Mapping[str, Any],
    options: Mapping[str, Any],
    tap: str,
    gates: Sequence[str],
) -> Any:
    """What computes maps, masks and predictions of images uint8 [n, h, w, 3]."""
    # Gradients in a loop are slow where the loop is compiled (see attribution/chunks.py).
    loops = [name for name in methods if takes(name, "samples") or takes(name, "steps")]
    data = trained.config.data

    @jax.jit
    def in_one_pass(variables: Any, images: Any, targets: Any, key: Any) -> dict[str, Any]:
        images = to_input(images, data)
        fn = bind(trained.model, variables, train=False)
        logits, masks = attribution.read_taps(fn, images, gates)
        targets = jnp.where(targets < 0, logits.argmax(-1), targets)
        results = {
            name: maps(fn, images, targets, tap=tap, key=key)
            for name, maps in methods.items()
            if name not in loops
        }
        if any(name.endswith("excitation_backprop") for name in methods):
            own = {k: v for k, v in options.items() if k in ("sums", "scales", "negative")}
            balance = attribution.relevance_balance(fn, images, targets, tap=tap, **own)
            results |= {"absolute": balance.absolute, "dropped": balance.dropped}
        return {
            **results,
            "predicted": logits.argmax(-1),
            "probabilities": jax.nn.softmax(logits),
            "targets": targets,
            **{name: mask[..., 0] for name, mask in masks.items()},
        }

    def explain_chunk(images: np.ndarray, targets: np.ndarray, key: jax.Array) -> dict[str, Any]:
        results = in_one_pass(trained.variables, images, targets, key)
        fn = bind(trained.model, trained.variables, train=False)
        inputs = to_input(jnp.asarray(images), data)
        for name in loops:
            results[name] = methods[name](fn, inputs, results["targets"], tap=tap, key=key)
        return results

    return explain_chunk


def list_taps(trained: TrainedModel) -> str:
    """A table of the model's taps: name, shape for one image, how deep, which one is the default.

    Depth counts the convolutions and matrix products on the longest way from the images.
    """
    fn, shape = _bound(trained)
    default = attribution.default_tap(fn, shape)
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


def _bound(trained: TrainedModel) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The model as a function of images, and the shape of one image."""
    fn = bind(trained.model, trained.variables, train=False)
    return fn, jax.ShapeDtypeStruct((1, *trained.image_shape), jnp.float32)


def _warn_of_imbalance(tap: str, absolute: np.ndarray, dropped: np.ndarray) -> None:
    if absolute.max() > MAX_ABSOLUTE or np.abs(dropped).max() > MAX_DROPPED:
        print(
            f"warning: Excitation Backprop at {tap!r} is ill-conditioned: the absolute relevance "
            f"of an image is up to {absolute.max():.3g} (1 in networks of ReLUs), up to "
            f"{np.abs(dropped).max():.1%} was lost on the way; try --option=negative=clamp, or a "
            "later tap",
            flush=True,
        )


def from_split(trained: TrainedModel, split: str, count: int) -> Examples:
    """The first images of a split, cropped as evaluation crops them."""
    data = trained.config.data
    source = open_source(data.name, split=split, data_dir=data.dir)
    resize = Resize(data.resize, data.image_size)
    examples = [source[i] for i in range(min(count, len(source)))]
    images = np.stack([resize(example["image"]) for example in examples])
    return Examples(
        names=[f"{split}_{i:05d}" for i in range(len(examples))],
        images=center_crop(images, size=data.crop_size or None),
        labels=np.array([int(example["label"]) for example in examples]),
        rejected=[],
    )


def from_files(trained: TrainedModel, pattern: str) -> Examples:
    """Image files, resized as the run resizes images; a file that is no image is named.

    A run that does not resize has images of one size: there the files are squashed to it.
    """
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise ValueError(f"--images={pattern!r} matches no file")
    data, (h, w, _) = trained.config.data, trained.image_shape
    resize = Resize(data.resize, data.image_size)
    names, images, rejected = [], [], []
    for path in paths:
        try:
            image = read_image(path)
        except ValueError as error:
            print(f"left out: {error}", flush=True)
            rejected.append(path)
            continue
        if data.resize == "none":
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        else:
            image = center_crop(resize(image)[None], size=data.crop_size or None)[0]
        stem = pathlib.Path(path).stem
        names.append(_unused(stem, {*names, "contact_sheet"}))
        images.append(image)
    if not images:
        raise ValueError(f"none of the {len(paths)} files of --images={pattern!r} is an image")
    return Examples(names, np.stack(images), np.full(len(images), -1), rejected)


def _unused(name: str, used: set[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is not used."""
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in used)


def _targets(target: str, examples: Examples, num_classes: int) -> np.ndarray:
    """Class ids to explain; -1 stands for the predicted class."""
    if target == "predicted":
        return np.full(len(examples.names), -1)
    if target == "label":
        if (examples.labels < 0).any():
            raise ValueError("--class=label needs labelled images; files have none")
        return examples.labels
    if not target.isdigit() or int(target) >= num_classes:
        raise ValueError(
            f"--class={target!r}: expected predicted, label, or a class id below {num_classes}"
        )
    return np.full(len(examples.names), int(target))


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
    pictures = []
    for i, name in enumerate(examples.names):
        predicted, label = int(arrays["predicted"][i]), int(examples.labels[i])
        title = f"{trained.class_names[predicted]} {arrays['probabilities'][i, predicted]:.2f}"
        if label >= 0 and label != predicted:
            title += f"\nis {trained.class_names[label]}"
        cued = trained.class_names[int(arrays["targets"][i])]
        titles = {m: textwrap.fill(f"{m.replace('_', ' ')}: {cued}", 24) for m in methods}
        panels = [overlay.class_map_panel(titles[m], resized[m][i]) for m in methods]
        panels += [overlay.mask_panel(f"mask {gate}", resized[gate][i]) for gate in gates]
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


def main() -> int:
    """Parse the flags, explain, say where the pictures are."""
    given = flags.FLAGS
    config = Workdir(given.workdir).config()
    cli.start_devices(config.platform, compile_cache=config.compile_cache)
    mesh = sharding.create_mesh(jax.devices()[:1])
    trained = restore_model(
        given.workdir, checkpoint=given.checkpoint, data_dir=given.data_dir, mesh=mesh
    )
    if given.list_taps:
        print(list_taps(trained))
        return 0
    if given.images:
        examples = from_files(trained, given.images)
    else:
        examples = from_split(trained, given.split, given.count)
    out = pathlib.Path(given.out or pathlib.Path(given.workdir) / "explain")
    target = str(given["class"].value)
    explain(
        trained,
        examples,
        out,
        methods=given.method,
        options=_options(given.option),
        tap=given.tap,
        target=target,
    )
    print(f"{len(examples.names)} pictures, contact_sheet.png and maps.npz in {out}", flush=True)
    return 1 if examples.rejected else 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run")
    flags.DEFINE_string("checkpoint", "best", "best, last, or a step")
    flags.DEFINE_string("data_dir", "", "Folder of prepared data sets, instead of the config's")
    flags.DEFINE_string("images", "", "Image files, as a quoted pattern; default: a split's first")
    flags.DEFINE_string("split", "test", "Split to take images from")
    flags.DEFINE_integer("count", 16, "Number of images from the split", lower_bound=1)
    flags.DEFINE_list("method", "grad_cam", f"One or several of: {', '.join(METHODS)}")
    flags.DEFINE_multi_string("option", [], "Option of a method, NAME=VALUE; may be repeated")
    flags.DEFINE_string("tap", "", "Where maps are taken; default: the last spatial tap")
    flags.DEFINE_bool("list_taps", False, "Print the taps of the model, and stop")
    flags.DEFINE_string("class", "predicted", "Class to explain: predicted, label, or an id")
    flags.DEFINE_string("out", "", "Folder for the pictures; default: WORKDIR/explain")
    flags.mark_flag_as_required("workdir")
    cli.run(main)

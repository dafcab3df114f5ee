"""Show where a trained model looks: python explain.py --workdir=runs/demo --out=runs/demo/explain.

Writes a picture per image, contact_sheet.png and the raw maps (maps.npz).
"""

import dataclasses
import glob
import itertools
import pathlib
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from attnzoom_jax import attribution, cli
from attnzoom_jax.data.augment import center_crop
from attnzoom_jax.data.image_file import read_image
from attnzoom_jax.data.pipeline import Resize
from attnzoom_jax.data.source import open_source
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.evaluation.restore import TrainedModel, restore_model
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.models import bind
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.training import sharding
from attnzoom_jax.training.workdir import Workdir
from attnzoom_jax.viz import overlay

METHODS = {"grad_cam": attribution.grad_cam}


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
    method: str = "grad_cam",
    tap: str = "",
    target: str = "predicted",
    chunk_size: int = 32,
) -> dict[str, np.ndarray]:
    """Explain images and write the pictures.

    Args:
        trained: the model.
        examples: the images.
        out: folder, is created.
        method: a name from METHODS.
        tap: where the map is taken; "" for the last spatial tap.
        target: "predicted", "label" or a class id.
        chunk_size: images per call of the program.

    Returns:
        What maps.npz holds: raw maps and masks, names, labels, predicted classes, probabilities.

    Raises:
        ValueError: unknown method, tap or class.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    data = trained.config.data
    shape = jax.ShapeDtypeStruct((1, *trained.image_shape), jnp.float32)
    taps = attribution.list_taps(bind(trained.model, trained.variables, train=False), shape)
    tap = tap or attribution.default_tap(taps)
    gates = attribution.gate_taps(taps)
    print(f"{method} at tap {tap!r}", flush=True)

    @jax.jit
    def explain_chunk(variables: Any, images: jax.Array, targets: jax.Array) -> dict[str, Any]:
        images = to_input(images, data)
        fn = bind(trained.model, variables, train=False)
        logits, masks = attribution.read_taps(fn, images, gates)
        targets = jnp.where(targets < 0, logits.argmax(-1), targets)
        maps = METHODS[method](fn, images, targets, tap=tap)
        return {
            method: maps,
            "predicted": logits.argmax(-1),
            "probabilities": jax.nn.softmax(logits),
            "targets": targets,
            **{name: mask[..., 0] for name, mask in masks.items()},
        }

    targets = _targets(target, examples, len(trained.class_names))
    chunks = []
    for start in range(0, len(examples.names), chunk_size):
        chunk = slice(start, start + chunk_size)
        padding = max(0, start + chunk_size - len(examples.names)) if start else 0
        images = np.pad(examples.images[chunk], ((0, padding), (0, 0), (0, 0), (0, 0)))
        results = explain_chunk(trained.variables, images, np.pad(targets[chunk], (0, padding)))
        chunks.append({k: np.asarray(v)[: len(images) - padding] for k, v in results.items()})
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    arrays |= {"names": np.array(examples.names), "labels": examples.labels, "tap": np.array(tap)}

    out.mkdir(parents=True, exist_ok=True)
    # A "/" would make folders inside the npz file.
    files: dict[str, Any] = {name.replace("/", "."): array for name, array in arrays.items()}
    np.savez(out / "maps.npz", **files)
    pictures = _pictures(trained, examples, arrays, method, gates)
    for picture in pictures:
        overlay.save_explanation(out / f"{picture.name}.png", picture)
    overlay.save_contact_sheet(out / "contact_sheet.png", pictures[:16])
    return arrays


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
    method: str,
    gates: list[str],
) -> list[overlay.Explanation]:
    h, w, _ = trained.image_shape
    resized = {
        name: np.asarray(ops_maps.resize(jnp.asarray(arrays[name], jnp.float32), (h, w)))
        for name in (method, *gates)
    }
    pictures = []
    for i, name in enumerate(examples.names):
        predicted, label = int(arrays["predicted"][i]), int(examples.labels[i])
        title = f"{trained.class_names[predicted]} {arrays['probabilities'][i, predicted]:.2f}"
        if label >= 0 and label != predicted:
            title += f"\nis {trained.class_names[label]}"
        cued = trained.class_names[int(arrays["targets"][i])]
        panels = [overlay.class_map_panel(f"{method}: {cued}", resized[method][i])]
        panels += [overlay.mask_panel(f"mask {gate}", resized[gate][i]) for gate in gates]
        pictures.append(overlay.Explanation(name, title, examples.images[i], panels))
    return pictures


def main() -> int:
    """Parse the flags, explain, say where the pictures are."""
    given = flags.FLAGS
    config = Workdir(given.workdir).config()
    cli.start_devices(config.platform, compile_cache=config.compile_cache)
    mesh = sharding.create_mesh(jax.devices()[:1])
    trained = restore_model(
        given.workdir, checkpoint=given.checkpoint, data_dir=given.data_dir, mesh=mesh
    )
    if given.images:
        examples = from_files(trained, given.images)
    else:
        examples = from_split(trained, given.split, given.count)
    out = pathlib.Path(given.out or pathlib.Path(given.workdir) / "explain")
    target = str(given["class"].value)
    explain(trained, examples, out, method=given.method, tap=given.tap, target=target)
    print(f"{len(examples.names)} pictures, contact_sheet.png and maps.npz in {out}", flush=True)
    return 1 if examples.rejected else 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run")
    flags.DEFINE_string("checkpoint", "best", "best, last, or a step")
    flags.DEFINE_string("data_dir", "", "Folder of prepared data sets, instead of the config's")
    flags.DEFINE_string("images", "", "Image files, as a quoted pattern; default: a split's first")
    flags.DEFINE_string("split", "test", "Split to take images from")
    flags.DEFINE_integer("count", 16, "Number of images from the split", lower_bound=1)
    flags.DEFINE_string("method", "grad_cam", f"One of: {', '.join(METHODS)}")
    flags.DEFINE_string("tap", "", "Where the map is taken; default: the last spatial tap")
    flags.DEFINE_string("class", "predicted", "Class to explain: predicted, label, or an id")
    flags.DEFINE_string("out", "", "Folder for the pictures; default: WORKDIR/explain")
    flags.mark_flag_as_required("workdir")
    cli.run(main)

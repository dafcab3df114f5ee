"""What masks of attributes show: where each attribute is looked for, and in which channels.

The logit of attribute k is a sum over channels (models/attribute.py), and so tells what each adds:

    contribution_kc = w_kc mean_hw G_kc                   of one image; sum_c is logit_k - b_k
    usage_kc        = mean |contribution_kc| over images, in shares of its sum over c
    similarity_kl   = cos(usage_k, usage_l)               1: both use the same channels alike

The strongest channels of an image are those of the largest |contribution|.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from attnzoom_jax import attribution
from attnzoom_jax.data.pipeline import Resize
from attnzoom_jax.data.source import data_root, open_builder
from attnzoom_jax.data.split import open_split
from attnzoom_jax.evaluation.attributes import MOST_BITS, PIXELS, deciding_pixels
from attnzoom_jax.evaluation.examples import Examples, chunks_of_split, in_chunks, target_ids
from attnzoom_jax.evaluation.map_figure import has_attributes
from attnzoom_jax.evaluation.maps import Arrays, as_function, save_arrays, say_progress
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.models import bind
from attnzoom_jax.models.attribute import AttributeModel
from attnzoom_jax.models.insert import Insert
from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.viz import matrix, overlay, sheet

STRONGEST = 4  # channels whose masks are shown
MOST_ROWS = 8  # attributes in the picture of an image
MOST_IMAGES = 500  # of a split, behind the matrices
OWN_SCALE = "from the least to the most"
CHUNK_VALUES = 2**26  # masked features in memory at a time


def draw_attributes(
    trained: TrainedModel,
    examples: Examples,
    out: pathlib.Path,
    *,
    split: str = "",
    pixels: np.ndarray | None = None,
    target: str = "predicted",
) -> Arrays:
    """Draw what a model's masks show; write attributes_<image>.png, attributes.png, attributes.npz.

    Args:
        trained: an `AttributeModel` with masks, also inside of an `Insert`.
        examples: the images of the pictures.
        out: folder, is created.
        split: whose images are behind the matrices, MOST_IMAGES at most, at even distances; "" for
            the examples themselves.
        pixels: that decide each attribute, bool [n, a, h, w], to be outlined; None: not known.
        target: the attribute of the pictures, a name or an id; "predicted" for those that an image
            has or is said to have, the most probable first, and "label" for the class of its label.

    Returns:
        What attributes.npz holds: `attributes`, the a names, and what `matrices_of` returns. Of
        the examples: `names`, `labels`, `logits`, `probabilities`, `predicted`, `shown` (whether
        drawn) and, where known, `true` [n, a]; `contributions` [n, a, c]; `mean_masks`
        [n, a, h, w], over the channels; and, where channels have masks of their own, the strongest
        ones, `channels` [n, a, s], with `channel_masks` float16 [n, a, s, h, w].

    Raises:
        ValueError: a model without such masks; unknown class or split.
    """
    look, chunk_size = _look_function(trained)
    targets = target_ids(target, examples, trained.class_names)
    found = [look(trained.variables, part.images) for part in in_chunks(examples, chunk_size)]
    arrays: Arrays = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
    arrays |= {"names": np.array(examples.names), "labels": examples.labels}
    arrays["attributes"] = np.array(trained.class_names)
    arrays |= _say_who_has_what(trained, arrays)
    arrays["shown"] = _choose_rows(arrays, targets)
    if split:
        count, chunks = chunks_of_split(trained, split, chunk_size=chunk_size, most=MOST_IMAGES)
        parts = say_progress(chunks, count, chunk_size)
        sums = (_absolute_sum(look(trained.variables, part.images)) for part in parts)
        arrays |= matrices_of(functools.reduce(np.add, sums), count)
    else:
        arrays |= matrices_of(_absolute_sum(arrays), len(examples))
    out.mkdir(parents=True, exist_ok=True)
    save_arrays(out / "attributes.npz", arrays)
    _save_pictures(out, examples.images, arrays, pixels)
    return arrays


def deciding_pixels_of(trained: TrainedModel, split: str, count: int) -> np.ndarray | None:
    """The pixels that decide each attribute, of the first images of a split.

    Args:
        trained: the model, with its data set.
        split: of the data set.
        count: n, of images.

    Returns:
        bool [n, a, h, w]; None where the data set does not have them, or labels are classes.
    """
    data, attributes = trained.config.data, len(trained.class_names)
    fields: Any = open_builder(data.name, data_root(data.dir)).info.features
    is_known = all(field in fields for field in PIXELS)
    if not (is_known and has_attributes(trained) and attributes <= MOST_BITS):
        return None
    source = open_split(data, split=split, fields=PIXELS)
    resize = Resize(data.resize, data.image_size)
    read = [source[i] for i in range(count)]
    batch = {name: np.stack([resize(one[name], is_mask=True) for one in read]) for name in PIXELS}
    pixels = deciding_pixels(batch, attributes, data.crop_size or None)  # [a, n, h, w]
    return np.moveaxis(np.asarray(pixels), 0, 1)


def matrices_of(absolute: np.ndarray, count: int) -> Arrays:
    """Which channels attributes use, and how alike they do.

    Args:
        absolute: [a, c], the sum of |contribution| over images.
        count: of images.

    Returns:
        `usage` [a, c], each row in shares; `similarity` [a, a]; `channel_order`, ids [c]: the
        channels that the first attribute uses more than the others do, the most used first, then
        those of the second; `usage_images`. An attribute that uses nothing has rows of 0.
    """
    total = absolute.sum(axis=1, keepdims=True)
    usage = np.divide(absolute, total, out=np.zeros(absolute.shape), where=total > 0)
    length = np.linalg.norm(usage, axis=1, keepdims=True)
    unit = np.divide(usage, length, out=np.zeros(usage.shape), where=length > 0)
    return {
        "usage": usage,
        "similarity": (unit @ unit.T).clip(0, 1),
        "channel_order": np.lexsort((-usage.max(axis=0), usage.argmax(axis=0))),
        "usage_images": np.array(count),
    }


def _look_function(trained: TrainedModel) -> tuple[Callable[..., Arrays], int]:
    """(variables, images uint8 [n, h, w, 3]) -> what the npz holds of them; and n at a time."""
    model, prefix, place = _attribute_model(trained.model)
    gate, masked = f"{prefix}attention/gate", f"{prefix}attention"
    data = trained.config.data
    to_probabilities = jax.nn.sigmoid if has_attributes(trained) else jax.nn.softmax

    @jax.jit
    def look(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        fn = bind(trained.model, variables, train=False)
        logits, taps = attribution.read_taps(fn, to_input(images, data), [gate, masked])
        kernel = functools.reduce(lambda tree, key: tree[key], place, variables["params"])
        contributions = taps[masked].mean(axis=(1, 2)) * kernel["heads"]["kernel"]  # [n, a, c]
        masks = jnp.moveaxis(taps[gate], (1, 2), (3, 4))  # [n, a or 1, c or 1, h, w]
        means = masks.mean(axis=2)
        found = {
            "logits": logits,
            "probabilities": to_probabilities(logits),
            "contributions": contributions,
            "mean_masks": jnp.broadcast_to(means, (*logits.shape, *means.shape[2:])),
        }
        if model.granularity == "attribute_channel":
            strongest = min(STRONGEST, masks.shape[2])
            _, found["channels"] = jax.lax.top_k(jnp.abs(contributions), strongest)  # [n, a, s]
            ids = found["channels"][..., None, None]
            found["channel_masks"] = jnp.take_along_axis(masks, ids, axis=2).astype(jnp.float16)
        return found

    def on_host(variables: Any, images: np.ndarray) -> Arrays:
        return jax.tree.map(np.asarray, look(variables, images))

    values = np.prod(attribution.list_taps(*as_function(trained))[masked])
    return on_host, int(np.clip(CHUNK_VALUES // values, 1, 32))


def _attribute_model(
    model: nn.Module, prefix: str = "", place: tuple[str, ...] = ()
) -> tuple[AttributeModel, str, tuple[str, ...]]:
    """The model of attributes itself, the prefix of its taps, and where its parameters are."""
    if isinstance(model, Insert):
        return _attribute_model(model.backbone, f"{prefix}backbone/", (*place, "backbone"))
    if isinstance(model, AttributeModel) and model.granularity != "none":
        return model, prefix, place
    kind = f"a {type(model).__name__}"
    if isinstance(model, AttributeModel):
        kind = 'one with granularity="none"'
    raise ValueError(
        "--figure=attributes needs a model with masks of attributes, config.model.name="
        f'"multi_channel"; this is {kind}; --figure=maps shows where it looks'
    )


def _absolute_sum(found: Arrays) -> np.ndarray:
    return np.abs(found["contributions"].astype(np.float64)).sum(axis=0)


def _say_who_has_what(trained: TrainedModel, arrays: Arrays) -> Arrays:
    """Which attributes, or which class, images are said to have, and do have where it is known."""
    logits, labels = arrays["logits"], arrays["labels"]
    classes = np.arange(logits.shape[1])
    is_known = labels.ndim == 2 or bool((labels >= 0).all())
    if has_attributes(trained):
        predicted, true = logits > 0, labels > 0.5
    else:
        predicted, true = logits.argmax(1)[:, None] == classes, labels[:, None] == classes
    return {"predicted": predicted, **({"true": true} if is_known else {})}


def _choose_rows(arrays: Arrays, targets: np.ndarray) -> np.ndarray:
    """Which attributes are drawn of each image, bool [n, a]."""
    probabilities = arrays["probabilities"]
    matters = arrays["predicted"] | arrays.get("true", arrays["predicted"])
    # Those that matter first, by probability; where none does, the most probable one.
    ranked = np.argsort(-probabilities - matters, axis=1)
    counts = matters.sum(axis=1).clip(1, MOST_ROWS)
    shown = np.zeros(matters.shape, bool)
    for row, ids, count, target in zip(shown, ranked, counts, targets, strict=True):
        row[ids[:count] if target < 0 else target] = True
    return shown


def _save_pictures(
    out: pathlib.Path, images: np.ndarray, arrays: Arrays, pixels: np.ndarray | None
) -> None:
    matrix.save_attribute_matrices(
        out / "attributes.png",
        arrays["usage"],
        arrays["similarity"],
        names=arrays["attributes"].tolist(),
        channels=arrays["channel_order"],
        note=f"mean of {arrays['usage_images']} images",
    )
    scales = {1: sheet.Scale(OWN_SCALE)}
    if "channels" in arrays:
        scales[2] = sheet.Scale("mask")
    for i, name in enumerate(arrays["names"]):
        block = _block(arrays, i, images[i], None if pixels is None else pixels[i])
        sheet.save_sheet(out / f"attributes_{name}.png", [block], scales, side=1.4)


def _block(arrays: Arrays, i: int, image: np.ndarray, pixels: np.ndarray | None) -> sheet.Block:
    """The picture of image i: a row for each attribute shown, the most probable first."""
    size: Any = image.shape[:2]
    probabilities, is_right, notes = arrays["probabilities"][i], None, []
    if "true" in arrays:
        is_right = arrays["true"][i] == arrays["predicted"][i]
        notes.append(f"{is_right.sum()} of {len(is_right)} told rightly")
    if pixels is not None:
        notes.append("outlined: the pixels that decide")
    rows = []
    for k in sorted(map(int, np.flatnonzero(arrays["shown"][i])), key=lambda k: -probabilities[k]):
        title = f"{arrays['attributes'][k]} {probabilities[k]:.2f}"
        if is_right is not None:
            title += f"\n{'true' if arrays['true'][i, k] else 'false'}"
            title += "" if is_right[k] else ", told wrongly"
        outline = None if pixels is None else pixels[k]
        show = functools.partial(_show_outlined, image=image, inside=outline)
        explanation = overlay.Explanation("", "", image, _panels(arrays, i, k, size))
        rows.append([sheet.Cell(title, show), *sheet.explanation_cells(explanation)[1:]])
    return sheet.Block(str(arrays["names"][i]), rows, "; ".join(notes))


def _panels(arrays: Arrays, i: int, k: int, size: tuple[int, int]) -> list[overlay.Panel]:
    """Of image i and attribute k: the mean mask, then those of the strongest channels."""

    def resize(mask: np.ndarray) -> np.ndarray:
        return np.asarray(ops_maps.resize(jnp.asarray(mask, jnp.float32)[None], size)[0])

    mean = resize(arrays["mean_masks"][i, k])
    title = "mean of its masks" if "channels" in arrays else "mask"
    panels = [overlay.mask_panel(title, mean)]
    if not panels[0].note:  # on a scale of its own: means over channels differ little
        low, high = float(mean.min()), float(mean.max())
        title += f",\nfrom {low:.3f} to {high:.3f}"
        panels = [overlay.Panel(title, mean - low, high - low, OWN_SCALE)]
    if "channels" in arrays:
        strongest = zip(arrays["channels"][i, k], arrays["channel_masks"][i, k], strict=True)
        for channel, mask in strongest:
            added = arrays["contributions"][i, k, channel]
            panels.append(overlay.mask_panel(f"channel {channel}: {added:+.2f}", resize(mask)))
    return panels


def _show_outlined(axes: Axes, image: np.ndarray, inside: np.ndarray | None) -> None:
    """The image, and a line around the pixels inside, where there are any."""
    overlay.show_image(axes, image)
    if inside is not None and inside.any():
        axes.contour(inside, levels=[0.5], colors="cyan", linewidths=0.8)

"""Maps, masks and predictions of many images, in chunks of one compiled program."""

import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoom_jax import attribution
from attnzoom_jax.attribution.methods import create_method, takes
from attnzoom_jax.attribution.targets import class_scores
from attnzoom_jax.data.split import labels_of
from attnzoom_jax.evaluation.restore import TrainedModel
from attnzoom_jax.evaluation.split import to_input
from attnzoom_jax.models import bind
from attnzoom_jax.training.progress import format_duration

Arrays = dict[str, np.ndarray]
# (images uint8 [m, h, w, 3], class ids [m], position of the first image in the whole) -> arrays
ChunkFunction = Callable[[np.ndarray, np.ndarray, int], Arrays]


def as_function(trained: TrainedModel) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The model as a function of images as it takes them, and the shape of one image."""
    fn = bind(trained.model, trained.variables, train=False)
    return fn, jax.ShapeDtypeStruct((1, *trained.image_shape), jnp.float32)


def map_function(
    trained: TrainedModel,
    *,
    methods: Sequence[str],
    options: Mapping[str, Any] | None = None,
    tap: str = "",
    gates: Sequence[str] = (),
    chunk_size: int = 32,
) -> ChunkFunction:
    """What computes maps, masks and predictions of a chunk of images.

    Args:
        trained: the model.
        methods: names from attribution's METHODS; none for predictions and masks alone.
        options: options of the methods; each goes to those that have it.
        tap: where maps are taken.
        gates: taps of masks to read.
        chunk_size: of all chunks but the last one, which is filled up to it.

    Returns:
        `(images uint8 [m, h, w, 3], targets int [m], start) -> {name: array [m, ...]}`: the raw map
        of each method, the mask at each gate [m, h', w'], `predicted` [m], the class or attribute
        of the largest logit, `probabilities` [m, k] and `targets` [m], which are the predicted ones
        where -1 was given. With Excitation Backprop also `absolute` and `dropped`, see
        `attribution.relevance_balance`. `start` is the position of the chunk: methods that sample
        draw by it.

    Raises:
        ValueError: unknown method or option.
    """
    options = dict(options or {})
    for option in options:
        if not any(takes(method, option) for method in methods):
            raise ValueError(f"--option={option}: none of {', '.join(methods)} has this option")
    computed = {
        method: create_method(method, **{k: v for k, v in options.items() if takes(method, k)})
        for method in methods
    }
    explain_chunk = _explain_chunk(trained, computed, options, tap, gates)

    def maps_of(images: np.ndarray, targets: np.ndarray, start: int) -> Arrays:
        # A lone chunk is a program of its own size.
        padding = chunk_size - len(images) if start else 0
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
        key = jax.random.fold_in(jax.random.key(0), start)
        results = explain_chunk(images, np.pad(targets, (0, padding)), key)
        return {k: np.asarray(v)[: len(images) - padding] for k, v in results.items()}

    return maps_of


def compute_maps(
    trained: TrainedModel,
    images: np.ndarray,
    targets: np.ndarray,
    *,
    chunk_size: int = 32,
    **request: Any,
) -> Arrays:
    """Maps, masks and predictions of all images; prints how far it is.

    Args:
        trained: the model.
        images: uint8 [n, h, w, 3].
        targets: class ids [n], -1 for the predicted class.
        chunk_size: images per call of the program.
        **request: methods, options, tap and gates, as `map_function` takes them.

    Returns:
        What `map_function` returns, of all images.

    Raises:
        ValueError: unknown method, option or tap.
    """
    maps_of = map_function(trained, chunk_size=chunk_size, **request)
    chunks = []
    for start in say_progress(range(0, len(images), chunk_size), len(images), chunk_size):
        chunk = slice(start, start + chunk_size)
        chunks.append(maps_of(images[chunk], targets[chunk], start))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def say_progress(chunks: Any, count: int, chunk_size: int) -> Iterator[Any]:
    """The chunks, with a line after each tenth of the images: how many are done, time left.

    Args:
        chunks: to be gone through.
        count: images in all of them.
        chunk_size: images per chunk.

    Yields:
        Each chunk.
    """
    begin = time.monotonic()
    for i, chunk in enumerate(chunks, start=1):
        yield chunk
        done = min(i * chunk_size, count)
        if done < count and 10 * done // count > 10 * (done - chunk_size) // count:
            left = (time.monotonic() - begin) / done * (count - done)
            print(f"{done}/{count} images, {format_duration(left)} left", flush=True)


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file; "/" in a name, which would make folders there, becomes "."."""
    files: dict[str, Any] = {name.replace("/", "."): array for name, array in arrays.items()}
    np.savez(path, **files)


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
    has_attributes = labels_of(data) == "attributes"
    to_probabilities = jax.nn.sigmoid if has_attributes else jax.nn.softmax

    @jax.jit
    def in_one_pass(variables: Any, images: Any, targets: Any, key: Any) -> dict[str, Any]:
        images = to_input(images, data)
        fn = bind(trained.model, variables, train=False)
        logits, masks = attribution.read_taps(fn, images, gates)
        logits = class_scores(logits)
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
            "probabilities": to_probabilities(logits),
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

"""A batch in chunks, so that memory is bounded by the chunk."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from attnzoom_jax.attribution.targets import check_count, check_targets


def map_chunks(function: Callable[..., Any], *arrays: jax.Array, chunk_size: int | None) -> Any:
    """Apply a function that treats every image for itself to chunks of the batch, in turn.

    One program holds the loop over the chunks; the last chunk is filled up with the last image,
    and the surplus cut off. A gradient through the result computes each chunk again rather than
    keep what is inside of all. Outside of jit the loop is compiled at every call. On a CPU a
    gradient through convolutions is about ten times slower inside a loop than outside: XLA brings
    only those of the outermost computation into its fast form.

    Args:
        function: (arrays [m, ...], ...) -> arrays [m, ...], any tree of them.
        *arrays: [n, ...] each.
        chunk_size: images per chunk, at least 1; None for all at once.

    Returns:
        function(*arrays).

    Raises:
        ValueError: a chunk size that is no whole number of at least 1.
    """
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    arrays = tuple(map(jnp.asarray, arrays))
    n = len(arrays[0])
    if chunk_size is None or n <= chunk_size:
        return function(*arrays)
    count = -(-n // chunk_size)

    # Chunk i holds the images i, i + count, i + 2 count, ...: a batch that is spread over devices
    # in order then has a part of every chunk on each of them.
    def split(array: jax.Array) -> jax.Array:
        surplus = jnp.repeat(array[-1:], count * chunk_size - n, axis=0)
        padded = jnp.concatenate([array, surplus])  # [m * count, ...]
        return padded.reshape(chunk_size, count, *array.shape[1:]).swapaxes(0, 1)

    def join(chunks: jax.Array) -> jax.Array:  # [count, m, ...]
        return chunks.swapaxes(0, 1).reshape(count * chunk_size, *chunks.shape[2:])[:n]

    _, results = scan(lambda _, chunk: (None, function(*chunk)), None, tuple(map(split, arrays)))
    return jax.tree.map(join, results)


def scan(body: Callable[..., Any], carry: Any, items: Any) -> tuple[Any, Any]:
    """As `jax.lax.scan`, keeping nothing of a step for its gradient; a Python loop outside of jit.

    XLA runs gradients of convolutions inside of a loop some hundred times slower on the CPU than
    outside (it puts only the main program's convolutions into the form that it has fast code for;
    JAX 0.10.2). So where nothing is compiled as a whole anyway, the loop is Python's.

    Args:
        body: (carry, item) -> (carry, output).
        carry: its start.
        items: arrays [m, ...], any tree of them, m at least 1.

    Returns:
        The last carry, and the outputs stacked.
    """
    body = jax.checkpoint(body, prevent_cse=False)
    is_staged = isinstance(jnp.zeros(()), Tracer)  # under jit even a constant is traced
    if is_staged:
        return jax.lax.scan(body, carry, items)
    outputs = []
    for i in range(len(jax.tree.leaves(items)[0])):
        carry, output = body(carry, jax.tree.map(operator.itemgetter(i), items))
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def map_images(
    function: Callable[..., Any],
    fn: Callable[[jax.Array], Any],
    images: jax.Array,
    targets: jax.Array,
    *arrays: jax.Array,
    chunk_size: int | None,
) -> Any:
    """`map_chunks` of function(images, targets, *arrays), the request checked beforehand.

    Args:
        function: (images [m, h, w, c], targets [m] or [m, k], ...) -> arrays [m, ...].
        fn: images [n, h, w, c] -> logits.
        images: [n, h, w, c].
        targets: class ids int [n], or weights of the logits float [n, k].
        *arrays: more arrays [n, ...] that function takes.
        chunk_size: images per chunk; None for all at once.

    Returns:
        function(images, targets, *arrays).

    Raises:
        ValueError: a bad chunk size, logits or targets of a wrong shape, class id out of range.
    """
    if chunk_size is None:
        return function(images, targets, *arrays)
    check_count("chunk_size", chunk_size)
    check_targets(fn, images, targets)  # within a chunk their values cannot be looked at
    return map_chunks(function, images, targets, *arrays, chunk_size=chunk_size)

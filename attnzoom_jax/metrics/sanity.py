"""Does a map depend on what it explains: on the network's weights, and on the class?

Randomisation (Adebayo et al. 2018): draw weights anew and compare the map with that of the trained
network, by `metrics.similarity`. Cascading draws the layers from the output down, each time one
more; independent draws one layer at a time and leaves the others trained. A map that stays alike
explains the image rather than the network.

    fn, maps = bind(model, variables), explain(fn, images, targets)
    for name, random in randomized(variables, order, key=key):
        like = similarity(maps, explain(bind(model, random), images, targets))

Class sensitivity (Sixt et al. 2020): the similarity of the maps of two classes. A method whose maps
of all classes are alike explains no class.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.metrics.similarity import MEASURES, similarity

MODES = ("cascading", "independent")
REDRAWS = ("permute", "normal")


def randomized(
    params: Any,
    order: Sequence[str],
    *,
    key: jax.Array,
    mode: str = "cascading",
    redraw: str | Callable[[jax.Array], Any] = "permute",
) -> Iterator[tuple[str, Any]]:
    """Parameters of which some are drawn anew, one name after the other.

    Args:
        params: a tree of arrays. One that has "params" at its top is a Flax variables tree: names
            are then looked up below its collections, so that a layer's statistics go with it.
        order: names from the output down, such as ["head", "stage4", "stage3"]: a name is that of a
            leaf, or of a branch with all leaves below it, its parts joined by "/". What is below no
            name stays as it is.
        key: PRNG key. A leaf's draw depends on it and the leaf's place in the tree alone: it is the
            same in both modes.
        mode: "cascading" draws the first i names, "independent" the i-th alone.
        redraw: "permute" shuffles the values of each leaf; "normal" draws matrices and kernels from
            the normal distribution of their mean and deviation and shuffles vectors (a variance
            stays positive); or an init function, key -> a tree like params, say
            lambda key: model.init(key, images).

    Yields:
        (name, tree like params) for each name. A constant leaf, such as a new bias, stays equal
        under "permute" and "normal".

    Raises:
        ValueError: unknown mode, redraw or name; no name; an init function whose tree differs.

    Source: Adebayo et al. 2018 (arXiv 1810.03292), which initialises layers anew. To
    shuffle keeps the distribution of the trained values.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    if not callable(redraw) and redraw not in REDRAWS:
        raise unknown_name("redraw", redraw, REDRAWS)
    if isinstance(order, str) or not order:
        raise ValueError(f"order is {order!r}; expected names of layers from the output down")
    leaves, tree = jax.tree.flatten(params)
    names = leaf_names(params)
    for name in order:
        if not any(_is_below(leaf, name) for leaf in names):
            raise unknown_name("layer", name, _branches(names))
    # Checked at once; a generator would wait until it is asked for the first item.
    fresh = _fresh(leaves, tree, key, redraw)

    def draws() -> Iterator[tuple[str, Any]]:
        for i, name in enumerate(order):
            drawn = order[: i + 1] if mode == "cascading" else [name]
            is_drawn = [any(_is_below(leaf, name) for name in drawn) for leaf in names]
            mixed = [
                new if chosen else old
                for new, old, chosen in zip(fresh, leaves, is_drawn, strict=True)
            ]
            yield name, jax.tree.unflatten(tree, mixed)

    return draws()


def class_sensitivity(
    explain: Callable[[jax.Array, jax.Array], jax.Array],
    images: jax.Array,
    targets: jax.Array,
    others: jax.Array,
) -> dict[str, jax.Array]:
    """How alike the maps of two classes of each image are; the less, the more the class matters.

    Args:
        explain: (images, class ids) -> maps [n, h, w], h and w at least 11.
        images: float [n, h, w, c].
        targets: class ids int [n].
        others: class ids int [n], for example of `other_classes`, or of the least probable classes.

    Returns:
        "spearman", "spearman_abs" and "ssim", [n] each, in [-1, 1], as of `similarity`.

    Raises:
        ValueError: as `similarity`.

    Source: Sixt et al. 2020 (arXiv 1912.09818), by the SSIM of a random other class.
    """
    maps, other_maps = explain(images, targets), explain(images, others)
    return {measure: similarity(maps, other_maps, measure=measure) for measure in MEASURES}


def other_classes(
    targets: jax.Array, num_classes: int, *, key: jax.Array, ids: Any = None
) -> jax.Array:
    """A random other class for each image, all equally probable.

    Args:
        targets: class ids int [n], in [0, num_classes).
        num_classes: at least 2.
        key: PRNG key.
        ids: int [n], by which the images draw; None for 0, 1, ...

    Returns:
        Class ids [n], none equal to its target.

    Raises:
        ValueError: fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; another class needs at least 2")
    ids = jnp.arange(len(targets)) if ids is None else jnp.asarray(ids)

    def draw(id: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, id), (), 1, num_classes)

    return (targets + jax.vmap(draw)(ids)) % num_classes


def leaf_names(params: Any) -> list[str]:
    """The names by which `randomized` knows the leaves of a tree, in the order of the leaves.

    Args:
        params: as for `randomized`.

    Returns:
        Paths joined by "/", below the collection for Flax variables.
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    start = 1 if isinstance(params, Mapping) and "params" in params else 0
    return [jax.tree_util.keystr(path[start:], simple=True, separator="/") for path in paths]


def _fresh(
    leaves: list[Any], tree: Any, key: jax.Array, redraw: str | Callable[[jax.Array], Any]
) -> list[Any]:
    """A new value for every leaf."""
    if callable(redraw):
        fresh, drawn_tree = jax.tree.flatten(redraw(key))
        shapes = [[jnp.shape(leaf) for leaf in some] for some in (leaves, fresh)]
        if drawn_tree != tree or shapes[0] != shapes[1]:
            raise ValueError(
                "redraw returned a tree with other branches or shapes than params; expected the "
                "same, for variables of a Flax model all collections of model.init"
            )
        return fresh
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return [_redrawn(key, leaf, redraw) for key, leaf in zip(keys, leaves, strict=True)]


def _redrawn(key: jax.Array, leaf: Any, redraw: str) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if redraw == "normal" and leaf.ndim > 1:
        return leaf.mean() + leaf.std() * jax.random.normal(key, leaf.shape, leaf.dtype)
    return jax.random.permutation(key, leaf.ravel()).reshape(leaf.shape)


def _is_below(leaf: str, name: str) -> bool:
    return f"{leaf}/".startswith(f"{name}/")


def _branches(leaves: Sequence[str]) -> list[str]:
    """All names there are, the shortest first."""
    paths = [leaf.split("/") for leaf in leaves]
    names = {"/".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
    return sorted(names, key=lambda name: (name.count("/"), name))

"""Paths of parameters, "/"-joined, and the patterns of a config that name them."""

import re
from collections.abc import Iterable
from typing import Any

import jax


def path_of(keys: Any) -> str:
    """The path of a leaf, such as "stage1/block1/conv1/kernel", from JAX's keys of it."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def matching(pattern: str, paths: Iterable[str], key: str) -> set[str]:
    """The paths that a pattern matches as a whole; at least one.

    Args:
        pattern: regular expression.
        paths: of parameters.
        key: of the config, for the errors.

    Raises:
        ValueError: no regular expression, or it matches nothing.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error
    paths = list(paths)
    matched = {path for path in paths if regex.fullmatch(path)}
    if not matched:
        raise ValueError(
            f"{key}: {pattern!r} matches no parameter; expected it to match a whole path such as "
            f"{', '.join(paths[:5])}; put .* where the rest may be anything"
        )
    return matched

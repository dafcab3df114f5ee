"""How the package says that a name is unknown: what was given, the near matches, what is known."""

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, given: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known, to be raised by the caller.

    Args:
        kind: what the name should have been, for example "model".
        given: the name as given.
        known: all the names there are.

    Returns:
        A ValueError that names the nearest matches, else all names (at most twenty).
    """
    names = [str(name) for name in known]
    # Paths and keys are also found by their last part: `conv1` finds `stage1/block1/conv1`.
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.6)
    near += [name for name in names if given in name and name not in near][: 3 - len(near)]
    if near:
        return ValueError(f"unknown {kind} {given!r}; did you mean {' or '.join(map(repr, near))}?")
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return ValueError(f"unknown {kind} {given!r}; there is: {listed or 'nothing'}")

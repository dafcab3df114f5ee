"""How the package says that a name is unknown: what was given, the near matches, what there is."""

import difflib
from collections.abc import Iterable

LISTED = 12


def unknown_name(kind: str, given: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known, to be raised by the caller.

    Args:
        kind: what the name should have been, for example "model".
        given: the name as given.
        known: all the names there are.

    Returns:
        A ValueError with the nearest names (case does not count) and, where they are few or none
        is near, all names.
    """
    names = list(dict.fromkeys(known))
    folded = {name.lower(): name for name in names}
    asked = str(given).lower()
    near = [folded[name] for name in difflib.get_close_matches(asked, folded, n=3)]
    # A path or key is also found by a part of it, the shortest first: `stage1` finds
    # `backbone/stage1` rather than what is below it.
    holding = [name for name in names if asked and asked in name.lower() and name not in near]
    near += sorted(holding, key=len)
    hint = f"; did you mean {' or '.join(map(repr, near[:3]))}?" if near else "."
    message = f"unknown {kind} {given!r}{hint}"
    if not near or len(names) <= LISTED:
        rest = ", ..." if len(names) > 2 * LISTED else ""
        message += f" There is: {', '.join(names[: 2 * LISTED]) or 'nothing'}{rest}"
    return ValueError(message)

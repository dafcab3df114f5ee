"""Which outputs of a network stand for the classes of a data set that it was not trained on."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnzoom_jax.errors import unknown_name

RULES = ("labels", "names")
# Keys of the files that name no class: a text for people, and how many outputs there must be.
COMMENT, COUNT = "comment", "outputs"
OTHERS = "*"  # of every class that the file does not name


def class_outputs(
    rule: str, class_names: Sequence[str], outputs: Sequence[str]
) -> list[np.ndarray]:
    """The outputs that stand for each class of a data set.

    Args:
        rule: "labels": class i is output i. "names": the outputs of which the whole name, or where
            there is none one of the synonyms in it, separated by commas, is the name of the class;
            neither case nor "_" for a blank counts. Look at what it finds: to ImageNet a kite is a
            bird. Or a JSON file, {class name: [output, ...]}: an output is an index, [first, last],
            both included, or a name as above. Classes without an output have an empty list. The key
            "*" stands for every class that is not named. Keys of other classes are not read, nor is
            "comment"; "outputs" says how many the network must have. See configs/class_maps.
        class_names: of the data set.
        outputs: names of the network's outputs.

    Returns:
        int64 [m] for each class, rising; m is 0 where no output stands for it.

    Raises:
        ValueError: an unknown rule; numbers that differ, for "labels"; a file that cannot be read,
            lacks a class, or names an output that there is not or that several are called; no
            output for any class.
    """
    if rule == "labels":
        if len(class_names) != len(outputs):
            raise ValueError(
                f"the data set has {len(class_names)} classes and the network {len(outputs)} "
                "outputs; the same index stands for the same class only where they are as many: "
                "try the rule names, or a file"
            )
        return [np.array([index]) for index in range(len(outputs))]
    whole: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index, output in enumerate(outputs):
        whole.setdefault(_plain(output), []).append(index)
        for name in dict.fromkeys(map(_plain, output.split(","))):
            synonyms.setdefault(name, []).append(index)
    places = synonyms | whole  # "cardigan" is no "Cardigan, Cardigan Welsh corgi"
    if rule == "names":
        found = [places.get(_plain(name), []) for name in class_names]
    elif rule.endswith(".json"):
        found = _read_file(pathlib.Path(rule).expanduser(), class_names, places, len(outputs))
    else:
        raise unknown_name("rule for classes", rule, [*RULES, "FILE.json"])
    if not any(found):
        raise ValueError(
            f"rule {rule}: none of the classes ({', '.join(class_names[:3])}, ...) is an output of "
            f"the network ({', '.join(map(repr, outputs[:3]))}, ...)"
        )
    return [np.unique(np.array(indices, int)) for indices in found]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _read_file(
    path: pathlib.Path, class_names: Sequence[str], places: dict[str, list[int]], count: int
) -> list[list[int]]:
    """The indices of the outputs of each class, as a file says."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no {{class name: [output, ...]}}")
    content.pop(COMMENT, None)
    if content.pop(COUNT, count) != count:
        raise ValueError(f"{path} is not for a network of {count} outputs; see its {COUNT!r}")
    for name in class_names:
        if name not in content and OTHERS not in content:
            raise ValueError(f"{path}: {unknown_name('class of the file', name, content)}")
    found = []
    for name in class_names:
        entries = content.get(name, content.get(OTHERS))
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {name!r} is {entries!r}; expected a list of outputs")
        try:
            found.append([i for entry in entries for i in _indices(entry, places, count)])
        except ValueError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from error
    return found


def _indices(entry: Any, places: dict[str, list[int]], count: int) -> Sequence[int]:
    """The indices that an entry of a file means."""
    if isinstance(entry, str):
        indices = places.get(_plain(entry), [])
        if len(indices) > 1:
            raise ValueError(f"several outputs are called {entry!r}: {indices}; give an index")
        if not indices:
            raise unknown_name("output", entry, places)
        return indices
    ends: list[Any] = entry if isinstance(entry, list) and len(entry) == 2 else [entry, entry]
    if not all(type(end) is int for end in ends) or not 0 <= ends[0] <= ends[1] < count:
        raise ValueError(
            f"{entry!r} is no output; expected an index from 0 to {count - 1}, [first, last] or a "
            "name"
        )
    return range(ends[0], ends[1] + 1)

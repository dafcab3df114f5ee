"""Phrases with their boxes, and the words in them that a classifier knows.

A tag is the name of one output of a classifier: an attribute ("striped"), a class ("circle_cross"),
or several names with commas between ("goldfish, Carassius auratus"). A phrase knows a tag where one
of its names occurs in the phrase, by this rule, the same for phrases and names:

- lower case; what is no letter or digit, also "_" and "-", separates words
- words of STOP_WORDS, articles, prepositions and small numbers, are left out
- the plural -s is taken off words of four letters and more that do not end in -ss; of -sses, -xes,
  -ches and -shes the -es. Other plurals (men, puppies) are not known
- all words of a name must follow each other. From left to right the longest name is taken, and its
  words are used up: "hot dog" is no dog. Tags of the same name are all taken
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attnzoom_jax.data.source import Source, data_root, open_builder, open_source

STOP_WORDS = frozenset(
    "a an the this that these those some another other each every both all no his her hers him its "
    "their our my your of with without in into on onto at to from by for over under near and or as "
    "one two three four five six seven eight nine ten several many few".split()
)


Index = dict[tuple[str, ...], list[int]]


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A phrase of an image.

    Attributes:
        text: as it is written.
        kind: what it belongs to, for results of each kind: "labelled" or "other" objects of
            fine_shapes, types such as "people" of Flickr30k.
        boxes: float32 [p, 4], [y0, x0, y1, x1], half-open, in pixels of the stored image; p is 0
            where the phrase has none.
    """

    text: str
    kind: str
    boxes: np.ndarray


def open_phrases(name: str, *, split: str, data_dir: str = "") -> Source:
    """Open one split of a prepared data set that has phrases with boxes.

    Args:
        name: as of `open_source`, as are split and data_dir: fine_shapes, flickr30k, or a set with
            fields of the same layout.
        split: of the data set.
        data_dir: folder of prepared sets.

    Returns:
        The source. Its examples: `image` uint8 [h, w, 3]; `name`, that of the file, or "test[17]"
        for example 17 of split "test"; `phrases`, a tuple of `Phrase`.

    Raises:
        ValueError: as `open_source`; a set without phrases.
    """
    features: Any = open_builder(name, data_root(data_dir)).info.features
    for fields, read in _LAYOUTS.items():
        if all(field in features for field in fields):
            source = open_source(name, split=split, data_dir=data_dir, fields=("image", *fields))
            return dataclasses.replace(source, examples=_Examples(source.examples, split, read))
    known = " or ".join(", ".join(fields) for fields in _LAYOUTS)
    raise ValueError(
        f"{name} has no phrases that can be read; expected the fields {known}; its fields are "
        f"{', '.join(sorted(features))}"
    )


def _of_objects(example: Mapping[str, Any]) -> tuple[Phrase, ...]:
    """One phrase and one box for each object, the labelled one first (fine_shapes)."""
    things = example["objects"]
    return tuple(
        Phrase(text.decode(), "other" if i else "labelled", np.asarray([box], np.float32))
        for i, (text, box) in enumerate(zip(things["phrase"], things["box"], strict=True))
    )


def _of_entities(example: Mapping[str, Any]) -> tuple[Phrase, ...]:
    """Phrases and boxes that belong to entities (flickr30k)."""
    phrases, boxes = example["phrases"], example["boxes"]
    owners = np.asarray(boxes["entity"]).reshape(-1)
    corners = np.asarray(boxes["box"], np.float32).reshape(-1, 4)
    return tuple(
        Phrase(text.decode(), types.decode().partition("/")[0], corners[owners == entity])
        for text, types, entity in zip(
            phrases["text"], phrases["types"], phrases["entity"], strict=True
        )
    )


# The fields that hold phrases, beside the image, and how they are read.
_LAYOUTS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], tuple[Phrase, ...]]] = {
    ("objects",): _of_objects,
    ("phrases", "boxes", "file_name"): _of_entities,
}


@dataclasses.dataclass(frozen=True)
class _Examples(Sequence[dict[str, Any]]):
    examples: Sequence[dict[str, Any]]
    split: str
    read: Callable[[Mapping[str, Any]], tuple[Phrase, ...]]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        position = range(len(self))[index]
        example = self.examples[position]
        name = example.get("file_name", f"{self.split}[{position}]".encode()).decode()
        return {"image": example["image"], "name": name, "phrases": self.read(example)}


def index_tags(tags: Sequence[str]) -> Index:
    """The names of tags, to look phrases up; see the module's docstring for the rule.

    Args:
        tags: names of a classifier's outputs.

    Returns:
        {words of a name: outputs of that name}.
    """
    index: Index = {}
    for output, tag in enumerate(tags):
        for name in {_words(synonym) for synonym in tag.split(",")} - {()}:
            index.setdefault(name, []).append(output)
    return index


def known_outputs(phrase: str, index: Index) -> tuple[int, ...]:
    """The outputs of a classifier that a phrase names.

    Args:
        phrase: a few words.
        index: of `index_tags`.

    Returns:
        Each output once, rising; empty where no word is known.
    """
    words, found, place = _words(phrase), set(), 0
    longest = max(map(len, index), default=0)
    while place < len(words):
        lengths = range(min(longest, len(words) - place), 0, -1)
        length = next((n for n in lengths if words[place : place + n] in index), 0)
        found.update(index.get(words[place : place + length], ()))
        place += max(length, 1)
    return tuple(sorted(found))


def _words(text: str) -> tuple[str, ...]:
    words = re.findall(r"[^\W_]+", text.lower())
    return tuple(_singular(word) for word in words if word not in STOP_WORDS)


def _singular(word: str) -> str:
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss")
    return word[:-1] if is_plural else word

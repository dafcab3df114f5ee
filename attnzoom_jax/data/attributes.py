"""The attributes of an image, each true or false, as its label.

A data set has them in its field `attributes`: bools by name (celeb_a), or a vector of 0 and 1
(cub200). The names are those of the bools, sorted, which is CelebA's published order; of a vector,
`attribute_names` in the set's metadata, or else attribute_1, attribute_2, ... In fine_shapes they
are those of the labelled object, and each has its pixels in the field `attribute_bits`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets.fine_shapes_renderer import ATTRIBUTES
from attnzoom_jax.data.source import Source, data_root, open_builder, open_source

Read = Callable[[dict[str, Any]], Any]  # an example to its attributes


def open_attributes(
    name: str, *, split: str, data_dir: str = "", fields: Sequence[str] = ("image", "label")
) -> Source:
    """Open one split of a prepared data set, with the attributes as labels.

    Args:
        name: as of `open_source`, as are split and data_dir.
        split: of the data set; it need not have a field `label` of its own.
        data_dir: folder of prepared sets.
        fields: features to decode; `label` stands for the attributes.

    Returns:
        The source: `class_names` are the a names of the attributes, `label` is float32 [a], 0 or 1.

    Raises:
        ValueError: as `open_source`; a set without attributes, or with names that are not as many.
            While reading: attributes other than 0 and 1.
    """
    info = open_builder(name, data_root(data_dir)).info
    names, field, read = _find(name, info)
    stored = [wanted for wanted in fields if wanted != "label"]
    if "label" in fields and field not in stored:
        stored.append(field)
    source = open_source(name, split=split, data_dir=data_dir, fields=stored)
    examples = _Labelled(source.examples, tuple(fields), read, source.name)
    return dataclasses.replace(source, class_names=names, examples=examples)


def _find(name: str, info: Any) -> tuple[tuple[str, ...], str, Read]:
    """The names of the attributes, the field that holds them, and how they are read from it."""
    if name.partition("/")[0] == "fine_shapes":
        return ATTRIBUTES, "objects", lambda example: example["objects"]["attributes"][0]
    features: dict[str, Any] = dict(info.features.items())
    feature = features.get("attributes")
    if isinstance(feature, tfds.features.FeaturesDict) and all(
        part.shape == () and part.np_dtype == np.bool_ for part in feature.values()
    ):
        names = tuple(sorted(feature))
        return names, "attributes", lambda example: [example["attributes"][k] for k in names]
    shape: Any = feature.shape if isinstance(feature, tfds.features.Tensor) else ()
    if len(shape) == 1 and shape[0]:
        return _names(name, info, shape[0]), "attributes", lambda example: example["attributes"]
    found = f"its fields are {', '.join(sorted(features))}"
    if feature is not None:
        found = f"they are {' '.join(str(feature).split())}"
    raise ValueError(
        f"data.labels=attributes: {name} has none that can be read; expected a field attributes, "
        f"bools by name or a vector of 0 and 1; {found}"
    )


def _names(name: str, info: Any, count: int) -> tuple[str, ...]:
    """What the entries of a vector are called."""
    names = (info.metadata or {}).get("attribute_names")
    names = tuple(names or (f"attribute_{i}" for i in range(1, count + 1)))
    if len(names) != count:
        raise ValueError(f"{name} has {count} attributes, and {len(names)} names for them")
    return names


@dataclasses.dataclass(frozen=True)
class _Labelled(Sequence[dict[str, Any]]):
    examples: Sequence[dict[str, Any]]
    fields: tuple[str, ...]
    read: Read
    name: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        example = self.examples[index]
        if "label" in self.fields:
            label = np.asarray(self.read(example), np.float32)
            if not np.isin(label, (0, 1)).all():
                raise ValueError(
                    f"example {index} of {self.name} has the attributes {np.unique(label)}; "
                    "expected 0 and 1 alone"
                )
            example = {**example, "label": label}
        return {field: example[field] for field in self.fields}

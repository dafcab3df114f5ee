"""A split as a config asks for it: images, what is learnt of them, and boxes."""

from collections.abc import Sequence
from typing import Any

from attnzoom_jax.data.attributes import open_attributes
from attnzoom_jax.data.patches import add_boxes
from attnzoom_jax.data.source import Source, open_source
from attnzoom_jax.errors import unknown_name

LABELS = {"label": open_source, "attributes": open_attributes}


def open_split(data: Any, *, split: str, fields: Sequence[str] = ("image", "label")) -> Source:
    """Open a split of a config's data set.

    Args:
        data: the config's `data` section.
        split: such as "train" or "train[:90%]".
        fields: features to decode, and `label`.

    Returns:
        The source. `label` is the class id; where `data.labels` is "attributes", float32 [a], 0 or
        1, and `class_names` are the names of the attributes. Where `data.patches` is set, examples
        with an image have the further field `boxes`, see `patches.add_boxes`.

    Raises:
        ValueError: unknown `data.labels`; as `open_source`, `attributes.open_attributes` and
            `patches.add_boxes`.
    """
    source = LABELS[labels_of(data)](data.name, split=split, data_dir=data.dir, fields=fields)
    return add_boxes(source, data, split=split) if data.patches and "image" in fields else source


def labels_of(data: Any) -> str:
    """What a config's data set is labelled with: "label", class ids, or "attributes".

    Args:
        data: the config's `data` section.

    Returns:
        A key of LABELS.

    Raises:
        ValueError: unknown `data.labels`.
    """
    labels = getattr(data, "labels", "label")  # runs of earlier versions have no such key
    if labels not in LABELS:
        raise unknown_name("data.labels", labels, LABELS)
    return labels

"""Prepared TFDS data sets as random-access sources, without TensorFlow and without the network.

A data set is looked up as files, `DIR/name/[config/]version/`, before TFDS is asked anything: TFDS
itself would try the network for minutes. The embedded data set builds itself in seconds.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets import fine_shapes
from attnzoom_jax.errors import unknown_name

EMBEDDED = {"fine_shapes": fine_shapes.FineShapes}


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a prepared data set.

    Attributes:
      name: data set and split, for messages.
      class_names: one per class, in the order of the labels.
      image_shape: as stored, [h, w, c]; None where it differs from image to image.
      examples: random access to dictionaries of NumPy arrays: `image` uint8 [h, w, c], `label`, and
        the further fields that were asked for.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, ...]
    examples: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]


def data_root(data_dir: str) -> pathlib.Path:
    """Where prepared data sets are: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(root).expanduser()


def open_source(
    name: str, *, split: str, data_dir: str = "", fields: Sequence[str] = ("image", "label")
) -> Source:
    """Open one split of a prepared data set.

    Args:
      name: TFDS name, with the config where there are several: "cifar100", "fine_shapes/tiny".
      split: "train", "test", or a slice such as "train[:90%]".
      data_dir: folder of prepared sets, see `data_root`.
      fields: features to decode; the others cost nothing.

    Returns:
      The source.

    Raises:
      ValueError: the set is not prepared (with the command that prepares it), is not stored in a
        format that has random access, has no such split, or lacks a field.
    """
    builder = _builder(name, data_root(data_dir))
    features: Any = builder.info.features
    for field in fields:
        if field not in features:
            raise unknown_name(f"field of {name}", field, features)
    base_split = split.partition("[")[0]
    if base_split not in builder.info.splits:
        raise unknown_name(f"split of {name}", base_split, builder.info.splits)
    # RAW_BYTES: TFDS's data source would decode every field, whatever decoders it is given.
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        records = builder.as_data_source(split=split, deserialize_method=raw)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path} is stored without random access; prepare it again: "
            f"{prepare_command(name, data_root(data_dir))}"
        ) from error
    wanted = tfds.features.FeaturesDict({field: features[field] for field in fields})
    return Source(
        name=f"{name}:{split}",
        class_names=tuple(features["label"].names),
        image_shape=tuple(features["image"].shape),
        examples=_Examples(records, wanted),
    )


@dataclasses.dataclass(frozen=True)
class _Examples(Sequence[dict[str, Any]]):
    """Records, decoded when they are asked for."""

    records: Any
    features: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self.features.deserialize_example_np(self.records[index])


def prepare_command(name: str, root: pathlib.Path) -> str:
    """The command that prepares a data set."""
    return f"python tools/prepare_data.py {name} --data_dir={root}"


def _builder(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
    base, _, config = name.partition("/")
    folder = root / base / config if config else root / base
    # A set with several configs has one more folder between its name and its version.
    infos = [*folder.glob("*/dataset_info.json"), *folder.glob("*/*/dataset_info.json")]
    if not infos:
        if base in EMBEDDED:
            return build_embedded(name, root)
        raise ValueError(
            f"the data set {name!r} is not prepared in {root}; run: {prepare_command(name, root)}"
        )
    configs = {info.parent.parent for info in infos}
    if len(configs) > 1:
        known = sorted(f"{base}/{path.name}" for path in configs)
        default = root / base / "default"
        if default not in configs:
            raise ValueError(f"{name!r} has several configs; name one of: {', '.join(known)}")
        infos = [info for info in infos if info.parent.parent == default]
    newest = max(infos, key=lambda info: _version(info.parent.name))
    return tfds.builder_from_directory(newest.parent)


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in name.split("."))


def build_embedded(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
    """Build an embedded data set under `root`, unless it stands there, and return its builder."""
    base, _, config = name.partition("/")
    constructor = EMBEDDED[base]
    known = [builder_config.name for builder_config in constructor.BUILDER_CONFIGS]
    if config and config not in known:
        raise unknown_name("data set", name, [f"{base}/{known_name}" for known_name in known])
    builder = constructor(data_dir=root, config=config or None, file_format="array_record")
    print(f"building the embedded data set {name} in {root} ...", flush=True)
    builder.download_and_prepare()
    return builder


def as_array(value: Any) -> np.ndarray:
    """A decoded field as an array that batches well: integers become int32."""
    array = np.asarray(value)
    return array.astype(np.int32) if array.dtype.kind in "iu" and array.ndim == 0 else array

"""The embedded data set: exact in its annotation, and not to be solved without finding the mark."""

import dataclasses
import sys
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets import fine_shapes, fine_shapes_renderer
from attnzoom_jax.data.datasets.fine_shapes_renderer import (
    ATTRIBUTES,
    CLASS_NAMES,
    COLORS,
    FAMILIES,
    MARKS,
    draw,
    sample_scene,
)

RAW = tfds.decode.DeserializeMethod.RAW_BYTES
CHANCE = 1 / len(CLASS_NAMES)


def build(folder, **settings):
    config = fine_shapes.FineShapesConfig(
        **({"name": "mini", "train": 64, "validation": 3, "test": 16} | settings)
    )
    builder = tfds.builder("fine_shapes", config=config, data_dir=folder)
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return build(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def examples(mini):
    return list(mini.as_data_source(split="train"))


@pytest.fixture(scope="module")
def scenes():
    """2,800 scenes as the data set draws them, with 2,000 meant for training."""
    labels = np.arange(2800) % len(CLASS_NAMES)
    scenes = [sample_scene(np.random.default_rng((5, i)), int(k)) for i, k in enumerate(labels)]
    return scenes, [draw(scene) for scene in scenes], labels


def grow(mask, pixels=1):
    """The mask and the less than half covered pixels around it."""
    size = 2 * pixels + 1
    return cv2.dilate(mask.astype(np.uint8), np.ones((size, size), np.uint8)) > 0


def lone_scene(label, seed=0, **changes):
    scene = sample_scene(np.random.default_rng((seed, label)), label, distractor_share=0.0)
    thing = dataclasses.replace(scene.things[0], **changes)
    return dataclasses.replace(scene, things=(thing,))


# Annotation


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("label", range(16))
def test_only_part_pixels_depend_on_the_mark(label, seed):
    scene = sample_scene(np.random.default_rng((seed, label)), label, distractor_share=1.0)
    before = draw(scene)
    for mark in set(MARKS) - {scene.things[0].mark}:
        thing = dataclasses.replace(scene.things[0], mark=mark)
        after = draw(dataclasses.replace(scene, things=(thing, *scene.things[1:])))
        changed = np.abs(before["image"].astype(int) - after["image"]).max(axis=-1) > 0
        parts = (before["part_ids"] == 1) | (after["part_ids"] == 1)
        assert changed[parts].mean() > 0.2
        assert not changed[~grow(parts)].any()
        np.testing.assert_array_equal(before["object_ids"], after["object_ids"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("label", range(16))
def test_every_pixel_of_an_object_and_no_other_depends_on_it(label, seed):
    scene = sample_scene(np.random.default_rng((seed, label)), label, distractor_share=1.0)
    image, ids = draw(scene)["image"], draw(scene)["object_ids"]
    for i in range(len(scene.things)):
        # Another base colour and another mark colour together reach every pixel of the object.
        thing = scene.things[i]
        thing = dataclasses.replace(
            thing, rgb=tuple(v * 0.5 for v in thing.rgb), pale_mark=not thing.pale_mark
        )
        things = (*scene.things[:i], thing, *scene.things[i + 1 :])
        other = draw(dataclasses.replace(scene, things=things))["image"]
        changed = np.abs(image.astype(int) - other).max(axis=-1)
        assert (changed[ids == i + 1] > 0).all()
        # A tip is thin, and shines through where something in front covers half a pixel.
        assert changed[~grow(ids == i + 1, 2)].max() <= 4


@pytest.mark.parametrize(
    ("attribute", "change"),
    [
        ("striped", {"texture": "striped"}),
        ("spotted", {"texture": "spotted"}),
        ("warm", {"rgb": (0.84, 0.22, 0.2)}),
        ("outlined", {"outlined": True}),
        ("pale_mark", {"pale_mark": True}),
    ],
)
def test_an_attribute_shows_where_its_mask_says(attribute, change):
    plain = {"texture": "plain", "outlined": False, "rgb": (0.24, 0.38, 0.84), "pale_mark": False}
    bit = ATTRIBUTES.index(attribute)
    for label in range(16):
        before, after = draw(lone_scene(label, **plain)), draw(lone_scene(label, **plain | change))
        decides = (before["attribute_bits"] >> bit) & 1 == 1
        changed = np.abs(before["image"].astype(int) - after["image"]).max(axis=-1)
        assert changed[decides].mean() > 4 * changed[~decides].mean()
        if attribute in ("outlined", "pale_mark"):  # the others colour the rim as well
            assert not changed[~grow(decides)].any()


def test_masks_follow_the_geometry():
    """Pixel (y, x) has its centre at (y, x): the disc by its equation, the rest by their centre."""
    y, x = np.mgrid[:64, :64]
    for label in range(16):
        scene = lone_scene(label)
        thing, mask = scene.things[0], draw(scene)["object_ids"] == 1
        distance = np.hypot(y - thing.center[0], x - thing.center[1])
        if thing.family == "circle":
            clear = np.abs(distance - thing.radius) > 0.3
            np.testing.assert_array_equal(mask[clear], (distance < thing.radius)[clear])
        np.testing.assert_allclose(np.argwhere(mask).mean(axis=0), thing.center, atol=0.3)


def test_annotations_agree_with_each_other(examples):
    for example in examples:
        things = fine_shapes.annotations(example)
        count = len(things["labels"])
        assert things["labels"][0] == example["label"]
        np.testing.assert_array_equal(things["object_masks"][0], example["object_mask"][..., 0])
        np.testing.assert_array_equal(things["part_masks"][0], example["part_mask"][..., 0])
        for i in range(count):
            mask, part = things["object_masks"][i], things["part_masks"][i]
            for box, region in ((things["boxes"][i], mask), (things["part_boxes"][i], part)):
                rows, columns = np.nonzero(region)
                ends = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
                np.testing.assert_array_equal(box, ends)
            assert not part[~mask].any()
            family, mark = divmod(things["labels"][i], len(MARKS))
            assert (things["families"][i], things["marks"][i]) == (family, mark)
            true = {ATTRIBUTES[a] for a in np.flatnonzero(things["attributes"][i])}
            assert true & {*FAMILIES, *MARKS} == {FAMILIES[family], MARKS[mark]}
            assert FAMILIES[family] in things["phrases"][i]
            assert MARKS[mark] in things["phrases"][i]
            # Surface, rim and part share the visible object among them.
            regions = [
                things["attribute_masks"][i, ATTRIBUTES.index(name)]
                for name in ("striped", "outlined", "pale_mark")
            ]
            np.testing.assert_array_equal(np.sum(regions, axis=0), mask)
            np.testing.assert_array_equal(regions[2], part)
            assert min(region.sum() for region in regions) > 0


def test_distractors_are_smaller_of_other_classes_and_hide_no_mark(scenes):
    assert 0.42 < np.mean([len(scene.things) > 1 for scene in scenes[0]]) < 0.52
    for scene, drawn in zip(scenes[0][:600], scenes[1], strict=False):
        visible = np.bincount(drawn["object_ids"].ravel(), minlength=len(scene.things) + 1)[1:]
        assert all(size <= 0.6 * visible[0] for size in visible[1:])
        assert all(thing.label != scene.things[0].label for thing in scene.things[1:])
        for i, thing in enumerate(scene.things):
            alone = dataclasses.replace(scene, things=(thing,), order=(0,))
            if len(visible) > 1:
                whole = draw(alone)
                np.testing.assert_array_equal(drawn["part_ids"] == i + 1, whole["part_ids"] == 1)
                assert visible[i] >= 0.85 * (whole["object_ids"] == 1).sum()


# Difficulty


def test_a_linear_model_is_near_chance(scenes):
    images = [cv2.resize(d["image"], (32, 32), interpolation=cv2.INTER_AREA) for d in scenes[1]]
    x = np.stack(images).reshape(len(images), -1) / 255.0
    x -= x[:2000].mean(axis=0)
    train, test = x[:2000], x[2000:]
    labels = scenes[2]
    targets = np.eye(len(CLASS_NAMES))[labels[:2000]] - CHANCE
    for ridge in (1.0, 30.0, 1000.0):
        weights = train.T @ np.linalg.solve(train @ train.T + ridge * np.eye(2000), targets)
        assert ((test @ weights).argmax(axis=-1) == labels[2000:]).mean() < 2 * CHANCE


def test_colour_texture_and_size_do_not_give_the_class_away(scenes):
    def looks(scene):
        thing = scene.things[0]
        large = thing.radius > 17.5
        return thing.color, thing.texture, thing.outlined, thing.pale_mark, large

    votes: dict[tuple, np.ndarray] = {}
    for scene, label in zip(scenes[0][:2000], scenes[2], strict=False):
        votes.setdefault(looks(scene), np.zeros(len(CLASS_NAMES)))[label] += 1
    default = np.zeros(len(CLASS_NAMES))
    guesses = [votes.get(looks(scene), default).argmax() for scene in scenes[0][2000:]]
    assert np.mean(guesses == scenes[2][2000:]) < 2 * CHANCE


def test_centre_points_miss_the_mark(scenes):
    image_centre, box_centre = [], []
    for drawn in scenes[1]:
        part = drawn["part_ids"] == 1
        rows, columns = np.nonzero(drawn["object_ids"] == 1)
        image_centre.append(part[31:33, 31:33].any())
        box_centre.append(
            part[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2]
        )
    assert np.mean(image_centre) < 0.02
    assert np.mean(box_centre) < 0.02


def test_the_mark_is_small_and_legible(scenes):
    spans, shares = [], []
    for drawn in scenes[1]:
        part = drawn["part_ids"] == 1
        spans.append(np.ptp(np.argwhere(part), axis=0).max() + 1)
        shares.append(part.sum() / (drawn["object_ids"] == 1).sum())
    assert 8 <= np.percentile(spans, 5) and np.percentile(spans, 95) <= 12
    assert np.mean(shares) < 0.12


# Building and reading


def test_classes_are_balanced_and_in_random_order(mini):
    labels = np.array([example["label"] for example in mini.as_data_source(split="train")])
    blocks = labels.reshape(-1, len(CLASS_NAMES))
    np.testing.assert_array_equal(np.sort(blocks, axis=1), np.tile(np.arange(16), (4, 1)))
    assert len({tuple(block) for block in blocks}) == len(blocks)
    families = labels // len(MARKS)  # the family alone: no better guess than one mark in four
    best = sum(np.bincount(labels[families == k]).max() for k in range(len(FAMILIES)))
    assert best / len(labels) <= 0.25


def test_building_is_deterministic(mini, tmp_path):
    def records(builder, split):
        source = builder.as_data_source(split=split, deserialize_method=RAW)
        return [bytes(record) for record in source]

    again = build(tmp_path / "again")
    smaller = build(tmp_path / "smaller", name="smaller", train=20)
    other = build(tmp_path / "other", seed=1)
    for split in ("train", "validation", "test"):
        assert records(mini, split) == records(again, split)
        assert not set(records(mini, split)) & set(records(other, split))
    assert records(mini, "train")[:20] == records(smaller, "train")
    everything = [record for split in mini.info.splits for record in records(mini, split)]
    assert len(set(everything)) == len(everything) == 64 + 3 + 16


def test_reading_decodes_only_what_is_wanted(mini, examples):
    records = mini.as_data_source(split="train", deserialize_method=RAW)
    keys = ("image", "label", "object_mask", "part_mask")
    wanted: Any = tfds.features.FeaturesDict({key: mini.info.features[key] for key in keys})
    for record, example in zip(records, examples, strict=True):
        some = wanted.deserialize_example_np(record)
        assert set(some) == set(keys)
        for key in keys:
            np.testing.assert_array_equal(some[key], example[key])
    assert "tensorflow" not in sys.modules


def test_stored_images_are_the_drawn_ones(examples):
    """In RGB, not OpenCV's BGR: the surface has the colour that the annotation names."""
    palette = np.array(list(COLORS.values()))
    for example in examples:
        things = fine_shapes.annotations(example)
        for i, color in enumerate(things["colors"]):
            surface = things["attribute_masks"][i, ATTRIBUTES.index("warm")]
            rgb = example["image"][surface].mean(axis=0)
            hues = palette / np.linalg.norm(palette, axis=1, keepdims=True)
            assert (hues @ rgb).argmax() == color


def test_tiny_configuration(tmp_path):
    builder: Any = tfds.builder("fine_shapes/tiny", data_dir=tmp_path)
    builder.download_and_prepare()
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert sizes == {"train": 240, "validation": 60, "test": 60}
    for example in builder.as_data_source(split="test"):
        assert example["image"].shape == (32, 32, 3)
        assert fine_shapes.annotations(example)["part_masks"].any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 16}, "image_size=16"),
        ({"test": 0}, "test=0"),
        ({"distractor_share": 1.5}, "distractor_share=1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fine_shapes.FineShapesConfig(name="impossible", **settings)


def test_a_folder_built_from_other_settings_is_refused(mini):
    config = fine_shapes.FineShapesConfig(name="mini", train=64, validation=3, test=16, seed=7)
    with pytest.raises(ValueError, match="built from other settings"):
        fine_shapes.FineShapes(config=config, data_dir=mini._data_dir_root)


def test_the_renderer_keeps_no_state():
    scene = sample_scene(np.random.default_rng(3), 5, distractor_share=1.0)
    fine_shapes_renderer._outline.cache_clear()
    first, second = draw(scene), draw(scene)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])

"""Cues of images of several sizes, made by hand."""

import numpy as np
import pytest

from attnzoom_jax.evaluation.cues import Cue, InputSize, canvas_of, cue_batches, read_cues

NAMES = ("cat", "dog", "fish")
OUTPUTS = [np.array([0]), np.array([1, 2]), np.array([], int)]  # no output is a fish


def example(h=20, w=30, labels=(0,), boxes=((0, 0, 5, 5),), hard=None, **more):
    return {
        "name": more.pop("name", "a.jpg"),
        "image": np.full((h, w, 3), 100, np.uint8),
        "labels": np.array(labels, np.int32),
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "is_hard": np.zeros(len(labels), bool) if hard is None else np.array(hard),
        "problems": (),
        **more,
    }


def read(*examples, **options):
    options = {"input_size": InputSize("squash", 16)} | options
    return read_cues(
        examples,
        range(len(examples)),
        class_names=NAMES,
        outputs=OUTPUTS,
        num_threads=2,
        **options,
    )


@pytest.mark.parametrize(
    ("mode", "image", "expected"),
    [
        (InputSize(), (37, 41), (37, 41)),
        (InputSize("squash", 24), (37, 41), (24, 24)),
        (InputSize("short_side", 224), (480, 640), (224, 288)),  # 298.7 is nearer to 288 than 320
        (InputSize("short_side", 224), (640, 480), (288, 224)),
        (InputSize("short_side", 224, 1), (480, 640), (224, 299)),
        (InputSize("short_side", 100), (50, 52), (100, 100)),  # never below the short side
        (InputSize("short_side", 224), (10, 10), (224, 224)),
    ],
)
def test_input_size(mode, image, expected):
    assert mode(*image) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("squish", 3), "unknown resize mode 'squish'.*squash"),
        (("squash", 0), "needs a size in pixels, not 0"),
        (("short_side", 4, 0), "multiple is 0"),
    ],
)
def test_input_size_that_is_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        InputSize(*arguments)


def test_a_cue_for_each_class_of_each_image():
    cues, problems = read(
        example(labels=(1, 0, 1), boxes=((0, 0, 5, 5), (1, 2, 3, 4), (9, 9, 12, 14))),
        example(h=8, w=8, labels=(1,), name="b.jpg"),
    )
    assert problems == []
    assert [(c.place, c.name, c.class_id, c.size) for c in cues] == [
        (0, "a.jpg", 0, (20, 30)),
        (0, "a.jpg", 1, (20, 30)),
        (1, "b.jpg", 1, (8, 8)),
    ]
    assert cues[1].boxes.tolist() == [[0, 0, 5, 5], [9, 9, 12, 14]]
    assert cues[1].outputs.tolist() == [1, 2]
    assert {c.image.shape for c in cues} == {(16, 16, 3)}
    assert cues[0].image is cues[1].image


def test_what_is_not_asked_is_named():
    cues, problems = read(
        example(labels=(0, 2, 1), boxes=((0, 0, 9, 9),) * 3, hard=(0, 0, 1)),
        example(labels=(), boxes=(), name="empty.jpg"),
        example(labels=(0,), name="cut.jpg", problems=(("clipped_box", "cut.jpg: box 0"),)),
    )
    assert [(c.name, c.class_id) for c in cues] == [("a.jpg", 0), ("cut.jpg", 0)]
    assert problems == [
        ("hard_class", "a.jpg: every dog is marked as difficult"),
        ("class_without_output", "a.jpg: fish"),
        ("no_cue", "empty.jpg: no class is annotated"),
        ("clipped_box", "cut.jpg: box 0"),
    ]


def test_a_class_with_one_box_that_is_not_hard_keeps_all_its_boxes():
    cues, problems = read(example(labels=(0, 0), boxes=((0, 0, 2, 2), (4, 4, 6, 6)), hard=(1, 0)))
    assert problems == []
    assert len(cues[0].boxes) == 2


def test_difficult_by_the_rule():
    """Below a quarter of the image, beside another class; the union counts, not the sum."""
    quarter, less = (0, 0, 10, 10), (0, 0, 10, 9)  # of 20 x 20
    cues, _ = read(
        example(20, 20, labels=(0, 1), boxes=(quarter, less)),
        example(20, 20, labels=(0,), boxes=(less,)),
        example(20, 20, labels=(0, 0, 1), boxes=(less, less, quarter)),
    )
    assert [c.is_difficult for c in cues] == [False, True, False, True, False]


def test_difficult_by_a_list():
    flags = {"a": np.array([True, False, False]), "b.jpg": np.array([False, True, False])}
    both = {"labels": (0, 1), "boxes": ((0, 0, 5, 5),) * 2}
    names = ("a.jpg", "b.jpg", "unlisted.jpg")
    cues, problems = read(*(example(**both, name=name) for name in names), difficult=flags)
    assert [c.is_difficult for c in cues] == [True, False, False, True, True, True]
    assert [kind for kind, _ in problems] == ["not_in_the_list"]


def test_masks_of_a_class_are_united():
    masks = np.zeros((3, 20, 30), bool)
    masks[0, :2], masks[1, 5:7], masks[2, :, 3] = True, True, True
    cues, _ = read(example(labels=(0, 0, 1), boxes=((0, 0, 5, 5),) * 3, masks=masks))
    np.testing.assert_array_equal(cues[0].mask, masks[0] | masks[1])
    np.testing.assert_array_equal(cues[1].mask, masks[2])


def make_cue(place, shape, size=(40, 50), outputs=(1,), boxes=1, mask=None):
    return Cue(
        place=place,
        name=str(place),
        image=np.full((*shape, 3), place, np.uint8),
        size=size,
        class_id=0,
        outputs=np.array(outputs),
        boxes=np.full((boxes, 4), place, np.float32),
        mask=mask,
        is_difficult=False,
    )


def test_batches_hold_one_shape_each_and_every_cue_once():
    shapes = [(8, 8), (8, 12), (8, 8), (8, 8), (8, 12)]
    cues = [make_cue(i, shape) for i, shape in enumerate(shapes)]
    batches = list(cue_batches(cues, batch_size=2, num_outputs=3))
    assert [b["image"].shape for b in batches] == [(2, 8, 8, 3), (2, 8, 8, 3), (2, 8, 12, 3)]
    assert [b["cue"][b["mask"] > 0].tolist() for b in batches] == [[0, 2], [3], [1, 4]]
    assert batches[1]["image"][1, 0, 0, 0] == 3  # padding repeats
    assert batches[0]["outputs"].tolist() == [[False, True, False]] * 2


def test_boxes_are_padded_with_empty_ones():
    cues = [make_cue(1, (8, 8), boxes=1), make_cue(2, (8, 8), boxes=9)]
    (batch,) = cue_batches(cues, batch_size=2, num_outputs=2)
    assert batch["boxes"].shape == (2, 16, 4)
    assert batch["boxes"][0].any(axis=1).tolist() == [True] + [False] * 15
    assert batch["boxes"][1].any(axis=1).sum() == 9
    assert "truth" not in batch


def test_masks_share_a_canvas():
    cues = [
        make_cue(1, (8, 8), size=(40, 50), mask=np.ones((40, 50), bool)),
        make_cue(2, (8, 8), size=(65, 20), mask=np.ones((65, 20), bool)),
    ]
    (batch,) = cue_batches(cues, batch_size=2, num_outputs=2)
    assert batch["truth"].shape == (2, 128, 64) == (2, *canvas_of(batch["size"]))
    assert batch["truth"].sum(axis=(1, 2)).tolist() == [40 * 50, 65 * 20]
    assert batch["truth"][1, :65, :20].all()

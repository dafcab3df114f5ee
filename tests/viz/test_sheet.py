import functools

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.viz import overlay, sheet

DPI, SIDE = 150, 1.0


def one_color(color):
    image = np.full((4, 4, 3), color, np.uint8)
    return functools.partial(overlay.show_image, image=image)


def saved(path, blocks, scales=None, **options):
    sheet.save_sheet(path, blocks, scales or {}, side=SIDE, **options)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


COLORS = {
    (block, row, column): (40 * block + 20, 100 * row + 50, 120 * column + 10)
    for block, row, column in np.ndindex(3, 2, 2)
}
BLOCKS = [
    sheet.Block(
        f"block {block}",
        [
            [sheet.Cell("short", one_color(COLORS[block, row, column])) for column in range(2)]
            for row in range(2 if block else 1)
        ],
    )
    for block in range(3)
]


def test_every_picture_stands_in_its_block_row_and_column(tmp_path):
    picture = saved(tmp_path / "a.png", BLOCKS, per_row=2)
    title = 0.08 + sheet.LINE
    line = sheet.HEADING + 2 * (SIDE + title)  # the tallest block of each line has two rows
    width = 2 * (SIDE + sheet.GAP) + 2 * sheet.GAP
    assert picture.shape[0] == pytest.approx(DPI * (2 * line + sheet.FOOT), abs=2)
    assert picture.shape[1] == pytest.approx(DPI * 2 * width, abs=2)
    for (block, row, column), color in COLORS.items():
        if block or not row:
            top = (block // 2) * line + sheet.HEADING + row * (SIDE + title) + title
            left = (block % 2) * width + sheet.GAP + column * (SIDE + sheet.GAP)
            for share in (0.05, 0.95):  # near its corners: pictures neither overlap nor shift
                y, x = int(DPI * (top + share * SIDE)), int(DPI * (left + share * SIDE))
                assert picture[y, x].tolist() == list(color)


def test_one_block_takes_no_more_room_than_it_needs(tmp_path):
    alone = saved(tmp_path / "a.png", [sheet.Block("", BLOCKS[0].rows)], per_row=2)
    width = 2 * (SIDE + sheet.GAP) + 2 * sheet.GAP
    assert alone.shape[1] == pytest.approx(DPI * width, abs=2)
    assert alone.shape[0] == pytest.approx(DPI * (SIDE + 0.18 + sheet.FOOT), abs=2)


def test_notes_and_long_titles_make_room_for_themselves(tmp_path):
    plain = saved(tmp_path / "a.png", [BLOCKS[0]])
    noted = saved(tmp_path / "b.png", [sheet.Block("block", BLOCKS[0].rows, note="a note")])
    assert noted.shape[0] - plain.shape[0] == pytest.approx(DPI * sheet.NOTE, abs=2)
    cell = sheet.Cell("two words that are much too long for it", one_color((1, 2, 3)))
    long = saved(tmp_path / "c.png", [sheet.Block("block", [[cell, cell]])])
    assert long.shape[0] - plain.shape[0] == pytest.approx(DPI * sheet.LINE, abs=2)


@pytest.mark.parametrize(
    ("title", "wrapped"),
    [
        ("short", "short"),
        ("a title of words for two lines", "a title of words for\ntwo lines"),
        ("first\nsecond", "first\nsecond"),
        ("x" * 30, "x" * 21 + "\n" + "x" * 9),
        ("aaa " * 40, "\n".join(["aaa aaa aaa aaa aaa"] * 3 + ["aaa aaa aaa aaa aa..."])),
    ],
)
def test_titles_are_wrapped_at_the_width_of_the_picture(title, wrapped):
    assert sheet._wrap(title, 1.0) == wrapped


def test_colour_bars_stand_under_their_columns(tmp_path):
    scale = sheet.Scale("share")
    picture = saved(tmp_path / "a.png", BLOCKS[:2], {1: scale})
    foot = picture[-int(DPI * sheet.FOOT) :].min(axis=-1) < 250
    used = np.flatnonzero(foot.any(axis=0)) / DPI
    width = 2 * (SIDE + sheet.GAP) + 2 * sheet.GAP
    for block in range(2):
        left = block * width + sheet.GAP + SIDE + sheet.GAP
        assert ((used > left) & (used < left + SIDE)).any()
    columns = used % width
    assert ((columns > SIDE + 2 * sheet.GAP) & (columns < width)).all()


def test_an_explanation_is_its_image_and_its_maps_with_their_notes():
    image = np.full((4, 4, 3), 9, np.uint8)
    empty = overlay.class_map_panel("empty", np.zeros((4, 4)))
    full = overlay.class_map_panel("full", np.ones((4, 4)))
    cells = sheet.explanation_cells(overlay.Explanation("a", "is disc", image, [empty, full]))
    assert [cell.title for cell in cells] == ["is disc", "empty", "full"]
    for cell, expected, notes in (
        (cells[0], image, []),
        (cells[1], overlay.blend(image, empty), ["no positive evidence"]),
        (cells[2], overlay.blend(image, full), []),
    ):
        axes = matplotlib.figure.Figure().add_axes((0, 0, 1, 1))
        cell.draw(axes)
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        assert [text.get_text() for text in axes.texts] == notes

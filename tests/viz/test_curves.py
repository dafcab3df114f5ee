import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.viz import curves

METRICS = {
    "test/count": 10,
    "test/clean_accuracy": 0.9,
    "test/jpeg_2_accuracy": 0.7,
    "test/jpeg_1_accuracy": 0.8,
    "test/jpeg_1_balanced_accuracy": 0.1,
    "test/jpeg_accuracy": 0.75,
    "test/corruption_accuracy": 0.75,
    "test/attack_clean_accuracy": 0.95,
    "test/pgd_linf_8_255_accuracy": 0.2,
    "test/pgd_linf_2_255_accuracy": 0.4,
    "test/random_search_l2_0.5_accuracy": 0.6,
    "test/attack_accuracy": 0.3,
    "test/gradient_masking": -0.1,
    "validation/jpeg_1_accuracy": 0.3,
}


def test_curves_begin_at_the_clean_images():
    assert curves.read_curves(METRICS, prefix="test") == {
        ("jpeg", ""): [(0, 0.9), (1, 0.8), (2, 0.7)],
        ("pgd", "linf"): [(0, 0.95), (2 / 255, 0.4), (8 / 255, 0.2)],
        ("random_search", "l2"): [(0, 0.95), (0.5, 0.6)],
    }
    assert curves.read_curves(METRICS, prefix="validation") == {("jpeg", ""): [(1, 0.3)]}


def test_of_attributes_the_curves_of_corruptions_are_balanced():
    balanced = {"test/clean_balanced_accuracy": 0.6, "test/jpeg_2_balanced_accuracy": 0.2}
    assert curves.read_curves({**METRICS, **balanced}, prefix="test") == {
        ("jpeg", ""): [(0, 0.6), (1, 0.1), (2, 0.2)],
        ("pgd", "linf"): [(0, 0.95), (2 / 255, 0.4), (8 / 255, 0.2)],
        ("random_search", "l2"): [(0, 0.95), (0.5, 0.6)],
    }


def test_the_table_has_a_row_per_corruption_and_distance():
    other = {"test/jpeg_1_accuracy": 0.5, "test/pgd_linf_8_255_accuracy": 0.25}
    table = curves.robustness_table({"one": METRICS, "two": other}, prefix="test")
    assert table.splitlines() == [
        "| accuracy, % | one | two |",
        "|---|---:|---:|",
        "| clean | 90.0 |  |",
        "| JPEG | 75.0 | 50.0 |",
        "| PGD, linf 2/255 | 40.0 |  |",
        "| PGD, linf 8/255 | 20.0 | 25.0 |",
        "| random search, l2 0.5 | 60.0 |  |",
    ]


def drawn(path, runs):
    curves.save_robustness_curves(path, runs, prefix="test")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def color_share(picture, color):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(picture - rgb).max(axis=2) < 12).mean()


def test_each_run_has_its_color_and_each_corruption_and_attack_a_panel(tmp_path):
    one = drawn(tmp_path / "one.png", {"one": METRICS})
    two = drawn(
        tmp_path / "two.png", {"one": METRICS, "two": {**METRICS, "test/jpeg_1_accuracy": 0}}
    )
    assert one.shape == two.shape and one.shape[1] > 2 * one.shape[0]  # three panels in a row
    assert color_share(one, curves.COLORS[0]) > 1e-3 and color_share(one, curves.COLORS[1]) < 1e-5
    assert color_share(two, curves.COLORS[1]) > 1e-3
    many = {f"test/{'abcdef'[i]}_1_accuracy": 0.5 for i in range(6)}
    assert drawn(tmp_path / "many.png", {"one": many}).shape[0] > 1.5 * one.shape[0]


def test_curves_stand_where_their_values_are(tmp_path):
    heights = []
    for value in (0.1, 0.9):
        metrics = {"test/clean_accuracy": value, "test/jpeg_1_accuracy": value}
        picture = drawn(tmp_path / "a.png", {"one": metrics})
        blue = np.abs(picture - [0x00, 0x72, 0xB2]).max(axis=2) < 12
        rows = np.nonzero(blue[: int(0.8 * len(blue))])[0]  # above the legend
        heights.append(np.median(rows) / len(picture))
    assert heights[0] > heights[1] + 0.3


def test_panels_may_begin_above_zero(tmp_path):
    metrics = {"test/clean_accuracy": 0.9, "test/jpeg_1_accuracy": 0.6}
    spans = []
    for lowest in (0.0, 0.5):
        path = tmp_path / "a.png"
        curves.save_robustness_curves(path, {"one": metrics}, prefix="test", lowest=lowest)
        with Image.open(path) as image:
            picture = np.asarray(image.convert("RGB")).astype(int)
        blue = np.abs(picture - [0x00, 0x72, 0xB2]).max(axis=2) < 12
        spans.append(np.ptp(np.nonzero(blue[: int(0.8 * len(blue))])[0]))  # above the legend
    assert spans[1] > 1.6 * spans[0]


def test_bad_requests_are_told(tmp_path):
    with pytest.raises(ValueError, match="no metrics of robustness under 'tset'; expected such as"):
        curves.save_robustness_curves(tmp_path / "a.png", {"one": METRICS}, prefix="tset")
    with pytest.raises(ValueError, match="9 runs; expected 1 to 8"):
        runs = {str(i): METRICS for i in range(9)}
        curves.save_robustness_curves(tmp_path / "a.png", runs, prefix="test")

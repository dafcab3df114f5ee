import csv
import math
import re

import numpy as np
import pytest
from PIL import Image

from attnzoom_jax.viz import score_table

METRICS = {
    "pointing": {"label": "pointing", "better": "higher", "unit": "%"},
    "deletion": {"label": "deletion", "better": "lower", "unit": ""},
}


def score(value, low=None, high=None, count=200):
    return {"value": value, "low": low, "high": high, "count": count}


def row(name, **scores):
    method, _, tap = name.partition("@")
    return {"row": name, "method": method, "tap": tap, "scores": scores}


TABLE = {
    "metrics": METRICS,
    "rows": [
        row("center", pointing=score(0.5, 0.45, 0.55)),
        row("grad_cam@stage4", pointing=score(0.613, 0.55, 0.671), deletion=score(0.25, 0.2, 0.3)),
        row("excitation@a_b/c#1", pointing=score(0.6127, math.nan, math.nan)),
        row(
            "gradient@input", pointing=score(math.nan, math.nan, math.nan), deletion=score(-0.0001)
        ),
    ],
    "counts": {"images": 200, "cues_left_out": 3},
    "problems": {"clipped_box": {"count": 3, "first": ["a.jpg: box 0", "b.jpg: box 2"]}},
}


def test_text_is_aligned_and_leaves_missing_scores_blank():
    assert score_table.text(TABLE).splitlines() == [
        "                          pointing, %              deletion",
        "                     higher is better       lower is better",
        "center              50.0 [45.0, 55.0]",
        "grad_cam@stage4     61.3 [55.0, 67.1]  0.250 [0.200, 0.300]",
        "excitation@a_b/c#1               61.3",
        "gradient@input                                        0.000",
        "",
        "images: 200, cues left out: 3",
        "clipped box: 3 (a.jpg: box 0; b.jpg: box 2; and 1 more)",
    ]


def test_text_goes_on_below_where_the_lines_are_full():
    wide = score_table.text(TABLE, width=59).splitlines()
    narrow = score_table.text(TABLE, width=58).splitlines()
    assert wide == score_table.text(TABLE).splitlines()
    assert len(narrow) == len(wide) + 7
    assert narrow[3] == "grad_cam@stage4     61.3 [55.0, 67.1]"
    assert narrow[10] == "grad_cam@stage4     0.250 [0.200, 0.300]"
    assert score_table.text(TABLE, width=1).splitlines() == narrow


def test_markdown_marks_the_best_as_printed():
    assert score_table.markdown(TABLE, ["deletion", "pointing"]).splitlines() == [
        "| | deletion ↓ | pointing, % ↑ |",
        "|---|---:|---:|",
        "| center |  | 50.0 [45.0, 55.0] |",
        "| grad_cam@stage4 | 0.250 [0.200, 0.300] | **61.3** [55.0, 67.1] |",
        "| excitation@a_b/c#1 |  | **61.3** |",
        "| gradient@input | **0.000** |  |",
    ]


def test_of_one_score_none_is_best():
    alone = {**TABLE, "rows": TABLE["rows"][:1]}
    assert "**" not in score_table.markdown(alone, ["pointing", "deletion"])


def test_metrics_and_directions_are_checked():
    with pytest.raises(ValueError, match="unknown metric of the table 'point'; did you mean"):
        score_table.markdown(TABLE, ["point"])
    metrics = {"pointing": {"label": "pointing", "better": "more", "unit": ""}}
    with pytest.raises(ValueError, match="unknown direction in which pointing is better 'more'"):
        score_table.markdown({**TABLE, "metrics": metrics}, ["pointing"])


def test_csv_reads_back_as_it_was(tmp_path):
    score_table.write_csv(TABLE, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row["row"] for row in TABLE["rows"]]
    assert (lines[1]["method"], lines[1]["tap"]) == ("grad_cam", "stage4")
    for line, of in zip(lines, TABLE["rows"], strict=True):
        for metric in METRICS:
            for part in ("value", "low", "high", "count"):
                expected = of["scores"].get(metric, {}).get(part)
                cell = line[f"{metric}_{part}"]
                if expected is None or math.isnan(expected):
                    assert cell == ""
                else:
                    assert float(cell) == expected


def test_latex_escapes_and_marks_the_best(tmp_path):
    score_table.write_latex(TABLE, tmp_path / "a.tex")
    assert (tmp_path / "a.tex").read_text().splitlines() == [
        "% \\usepackage{booktabs}; in brackets: interval by bootstrap over images",
        "\\begin{tabular}{lrr}",
        "\\toprule",
        " & pointing, \\% $\\uparrow$ & deletion $\\downarrow$ \\\\",
        "\\midrule",
        "center & $50.0_{[45.0, 55.0]}$ &  \\\\",
        "grad\\_cam@stage4 & $\\mathbf{61.3}_{[55.0, 67.1]}$ & $0.250_{[0.200, 0.300]}$ \\\\",
        "excitation@a\\_b/c\\#1 & $\\mathbf{61.3}$ &  \\\\",
        "gradient@input &  & $\\mathbf{0.000}$ \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]


def test_latex_knows_every_special_character(tmp_path):
    special = {**TABLE, "rows": [row(r"a\b~c^d&e%f$g#h_i{j}")]}
    score_table.write_latex(special, tmp_path / "a.tex")
    assert (
        r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\&e\%f\$g\#h\_i\{j\} & "
        in (tmp_path / "a.tex").read_text()
    )


def drawn(path, table):
    score_table.draw(table, path)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def columns_of(picture, color):
    """Places from the left, in pixels, of what has a colour "#rrggbb", above the legend."""
    color = np.array([int(part, 16) for part in re.findall("..", color[1:])])
    found = np.abs(picture[:-45] - color).max(axis=2) < 12
    return np.flatnonzero(found.any(axis=0))


def test_dots_lie_where_the_scores_are_and_intervals_around_them(tmp_path):
    def one(*values):
        rows = [row(f"method@{i}", pointing=score(*value)) for i, value in enumerate(values)]
        metrics = {"pointing": METRICS["pointing"]}
        return {**TABLE, "metrics": metrics, "rows": [TABLE["rows"][0], *rows]}

    far, near = (0.9, 0.8, 1.0), (0.6, 0.55, 0.62)
    picture = drawn(tmp_path / "a.png", one(far, near))
    best, other = columns_of(picture, "#D55E00"), columns_of(picture, "#0072B2")
    # 0.55 to 1 and the baseline at 0.5 share an axis: an interval is as long as it is wide.
    assert other.max() < best.min()
    assert np.ptp(best) / np.ptp(other) == pytest.approx(0.2 / 0.07, rel=0.1)
    reverse = drawn(tmp_path / "b.png", one(near, far))
    assert columns_of(reverse, "#D55E00").min() == best.min()
    blank = drawn(tmp_path / "c.png", one((math.nan,), (math.nan, math.nan, math.nan)))
    assert not columns_of(blank, "#0072B2").size and not columns_of(blank, "#D55E00").size


def test_the_size_grows_with_rows_and_metrics_and_stays_readable(tmp_path):
    def table(rows, metrics):
        names = [f"metric {i}" for i in range(metrics)]
        about = {name: {**METRICS["pointing"], "label": name} for name in names}
        of = {name: score(0.5, 0.4, 0.6) for name in names}
        return {**TABLE, "metrics": about, "rows": [row(f"m@{i}", **of) for i in range(rows)]}

    sizes = {
        shape: drawn(tmp_path / "a.png", table(*shape)).shape[:2]
        for shape in [(1, 1), (16, 1), (16, 6), (16, 12)]
    }
    assert sizes[16, 1][0] > sizes[1, 1][0] + 16 * 25
    assert sizes[16, 6][1] > sizes[16, 1][1] + 3 * 250 and sizes[16, 6][0] == sizes[16, 1][0]
    assert sizes[16, 12][1] == sizes[16, 6][1] and sizes[16, 12][0] > 1.8 * sizes[16, 6][0]


def test_a_table_of_the_baseline_alone_is_drawn_and_one_of_nothing_refused(tmp_path):
    alone = {**TABLE, "rows": TABLE["rows"][:1], "metrics": {"pointing": METRICS["pointing"]}}
    assert columns_of(drawn(tmp_path / "a.png", alone), "#0072B2").size
    score_table.draw(TABLE, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="0 rows and 2 metrics"):
        score_table.draw({**TABLE, "rows": []}, tmp_path / "b.png")

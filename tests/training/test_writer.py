import json

import pytest

from attnzoom_jax.training.writer import MetricWriter, read_metrics


def write(folder, start_step, lines):
    writer = MetricWriter(folder, start_step=start_step)
    for step, metrics in lines:
        writer.write(step, metrics)
    writer.close()


def test_lines_come_back_in_order(tmp_path):
    assert read_metrics(tmp_path) == []
    write(tmp_path, 0, [(2, {"train/loss": 0.5}), (2, {"test/top1": 1.0}), (4, {"train/loss": 0})])
    expected = [
        {"step": 2, "train/loss": 0.5},
        {"step": 2, "test/top1": 1.0},
        {"step": 4, "train/loss": 0},
    ]
    assert read_metrics(tmp_path) == expected
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == expected
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("ending", ["", '{"step": 7, "a'])
def test_a_resumed_run_drops_what_lies_after_its_checkpoint(tmp_path, ending):
    write(tmp_path, 0, [(step, {"a": step}) for step in (2, 4, 5, 6)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(ending)  # a line that was being written when the run was killed
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 5, 6]
    write(tmp_path, 4, [(5, {"a": -5})])
    assert read_metrics(tmp_path) == [
        {"step": 2, "a": 2},
        {"step": 4, "a": 4},
        {"step": 5, "a": -5},
    ]
    write(tmp_path, 0, [])
    assert read_metrics(tmp_path) == []


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0)
    writer.write(1, {"a": 1.5})
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.5}]
    writer.close()

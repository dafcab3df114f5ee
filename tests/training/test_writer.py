import json
import struct

import pytest
from tensorboardX.proto import event_pb2

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


def read_events(content):
    """Of a TFRecord file: length, its checksum, the event, its checksum."""
    events = []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return events


def test_tensorboard_has_each_number_at_once_and_none_after_the_checkpoint(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0)
    writer.write(2, {"train/loss": 0.5})
    (file,) = (tmp_path / "tensorboard").glob("events*")
    assert b"train/loss" in file.read_bytes()
    events = read_events(file.read_bytes())
    writer.close()
    assert [event.step for event in events] == [0, 1, 2]
    assert events[1].session_log.status == 1  # START: later steps of before are hidden
    assert events[2].summary.value[0].simple_value == 0.5


def test_what_cannot_be_written_is_one_line(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics of step 3 cannot be written .* \(Is a directory\)"):
        writer.write(3, {"a": 1.0})
    writer.close()

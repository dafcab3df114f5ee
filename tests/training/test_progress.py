import pytest

from attnzoom_jax.training import progress as progress_file
from attnzoom_jax.training.progress import Progress, format_duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_file, "time", clock)
    return clock


def test_throughput_and_remaining_time(clock):
    progress = Progress(start_step=10, total_steps=40, batch_size=8)
    clock.now += 5
    assert progress.measure(20) == (16.0, 10.0)  # 2 steps a second, 20 steps to go
    clock.now += 100
    progress.skip(20)  # an evaluation
    clock.now += 1
    assert progress.measure(30) == (80.0, 1.0)
    assert progress.measure(30) is None  # no step since
    clock.now += 2
    assert progress.measure(40) == (40.0, 0.0)
    progress.close()


def test_lines_go_to_standard_output_and_no_bar_to_a_file(capsys):
    progress = Progress(start_step=0, total_steps=4, batch_size=8)
    progress.show(2)
    progress.say(2, "loss 0.5")
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "step 2/4  loss 0.5\n" and captured.err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (42, "42s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (7620, "2h07m"),
    ],
)
def test_durations_as_people_say_them(seconds, text):
    assert format_duration(seconds) == text

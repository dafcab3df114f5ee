import jax
import jax.numpy as jnp
import pytest

from attnzoom_jax.training import progress as progress_file
from attnzoom_jax.training.progress import Progress, Speed, format_duration


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
    assert progress.measure(20) == Speed(16.0, 10.0, 0.0, None)  # 2 steps a second, 20 to go
    clock.now += 100
    progress.skip(20)  # an evaluation
    clock.now += 1
    assert progress.measure(30) == Speed(80.0, 1.0, 0.0, None)
    assert progress.measure(30) is None  # no step since
    clock.now += 2
    assert progress.measure(40) == Speed(40.0, 0.0, 0.0, None)
    progress.close()


def test_waiting_for_data_is_a_share_of_the_time(clock):
    progress = Progress(start_step=0, total_steps=4, batch_size=8)

    def read():
        for i in range(4):
            clock.now += 3
            yield i

    batches = progress.timed(read())
    assert next(batches) == 0
    progress.skip(1)  # what was waited before does not count
    assert next(batches) == 1
    clock.now += 9
    speed = progress.measure(2)
    assert speed is not None and speed.data_wait == 0.25
    assert list(batches) == [2, 3]
    speed = progress.measure(4)
    assert speed is not None and speed.data_wait == 1.0
    progress.close()


def test_the_share_of_the_peak(clock):
    progress = Progress(start_step=0, total_steps=10, batch_size=8, peak_flops=1e6)
    multiply = progress.counted(jax.jit(lambda x: x @ x))
    x = jnp.ones((50, 50))
    assert multiply(x).shape == (50, 50) and multiply(x).shape == (50, 50)
    clock.now += 2
    speed = progress.measure(4)
    # 2 * 50^3 a step, 2 steps a second
    assert speed is not None and speed.mfu == pytest.approx(0.5)
    progress.close()


def test_without_a_peak_nothing_is_counted(clock, monkeypatch):
    monkeypatch.setattr(progress_file, "count_flops", None)
    progress = Progress(start_step=0, total_steps=10, batch_size=8)
    assert progress.counted(lambda x: x + 1)(1) == 2
    clock.now += 1
    speed = progress.measure(4)
    assert speed is not None and speed.mfu is None
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

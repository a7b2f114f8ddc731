"""Progress in a log: one format, limited by time; a bar in a terminal."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from newllm import progress
from newllm.progress import SECONDS_BETWEEN_LINES, Progress, progress_line

LINE = re.compile(r"Progress: [\d,]+/[\d,]+ \(\d+\.\d%\) \| Speed: \d+ tok/s \| ETA: \d+s")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until the test moves `now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_is_the_documented_one():
    """10,000 of 100,000 tokens in 10,000/1200 seconds: 90,000 remain at 1200 a second, 75 s."""
    expected = "Progress: 10,000/100,000 (10.0%) | Speed: 1200 tok/s | ETA: 75s"
    assert progress_line(10_000, 100_000, 1200) == expected


@pytest.mark.parametrize(
    ("done", "total", "speed"), [(1, 3, 2.0), (64, 64, 32.0), (999, 1_000_000, 99_900.0), (5, 7, 0.0)]
)
def test_the_line_keeps_its_format_and_its_arithmetic(done, total, speed):
    """Share, speed and time left follow from the three numbers, also at the end and at once."""
    line = progress_line(done, total, speed)
    assert LINE.fullmatch(line)
    assert f"{done:,}/{total:,} ({100 * done / total:.1f}%)" in line
    if speed:
        assert f"Speed: {speed:.0f} tok/s | ETA: {(total - done) / speed:.0f}s" in line


def test_a_log_gets_a_line_now_and_then(capsys, clock):
    """1,280 updates in 20 seconds give a line every SECONDS_BETWEEN_LINES, not one an update."""
    with Progress("phase 1", 1280) as bar:
        for _ in range(1280):
            clock.now += 1 / 64
            bar.update(1)
    lines = capsys.readouterr().out.splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert len(lines) == 20 // SECONDS_BETWEEN_LINES == 4
    assert lines[0] == "Progress: 320/1,280 (25.0%) | Speed: 64 tok/s | ETA: 15s"


def test_a_short_loop_prints_nothing(capsys, clock):
    """Updates in no time are no news."""
    with Progress("phase 1", 100) as bar:
        for _ in range(100):
            bar.update(1)
    assert capsys.readouterr().out == ""


def test_a_slow_update_gives_one_line(capsys, clock):
    """Time that passed without an update is not made up for."""
    with Progress("phase 1", 100) as bar:
        clock.now += 10 * SECONDS_BETWEEN_LINES
        bar.update(10)
        bar.update(10)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_speed_is_that_of_this_session(clock):
    """What an earlier session has done took none of this one's time."""
    with Progress("phase 1", 1000, done=600) as bar:
        clock.now += 4
        bar.update(100)
        assert bar.seconds == 4
        assert bar.speed == 25


def test_time_left_of_a_resumed_loop_is_right(capsys, clock):
    """300 tokens remain at 20 a second, of the 1,000 of which 600 were done before."""
    with Progress("phase 1", 1000, done=600) as bar:
        clock.now += 5
        bar.update(100)
    assert capsys.readouterr().out.rstrip().endswith("| Speed: 20 tok/s | ETA: 15s")


def test_a_resumed_loop_shows_the_progress_of_the_whole(capsys, clock):
    """700 of 1,000, whoever did the first 600."""
    with Progress("phase 1", 1000, done=600) as bar:
        clock.now += 5
        bar.update(100)
    assert capsys.readouterr().out.startswith("Progress: 700/1,000 (70.0%)")


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch, clock):
    """The bar starts where the earlier session stopped."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Progress("phase 1", 1000, done=600) as bar:
        assert (bar.bar.n, bar.bar.total) == (600, 1000)
        clock.now += 10 * SECONDS_BETWEEN_LINES
        bar.update(100)
        assert bar.bar.n == 700
    assert "phase 1" in sys.stdout.getvalue() and "Progress:" not in sys.stdout.getvalue()


def test_an_error_within_the_loop_is_not_swallowed():
    """The context manager closes the bar and lets the error go on."""
    with pytest.raises(ZeroDivisionError), Progress("phase 1", 10):
        raise ZeroDivisionError

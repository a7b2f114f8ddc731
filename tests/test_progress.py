"""Progress in a log: one format, limited by time; a bar in a terminal."""

import io
import sys
from types import SimpleNamespace

import pytest

from newllm import progress
from newllm.progress import SECONDS_BETWEEN_LINES, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until the test moves `now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("before", "tokens", "total", "seconds", "line"),
    [
        (0, 10_000, 100_000, 10_000 / 1200, "10,000/100,000 (10.0%) | Speed: 1200 tok/s | ETA: 75s"),
        (600, 100, 1000, 5, "700/1,000 (70.0%) | Speed: 20 tok/s | ETA: 15s"),
    ],
    ids=["documented", "resumed"],
)
def test_the_line_is_the_documented_one(capsys, clock, before, tokens, total, seconds, line):
    """What an earlier session has done counts for the share, and not for this one's speed."""
    with Progress("phase 1", total, done=before) as bar:
        clock.now += seconds
        bar.update(tokens)
        assert (bar.seconds, bar.speed) == (pytest.approx(seconds), pytest.approx(tokens / seconds))
    assert capsys.readouterr().out == f"Progress: {line}\n"


@pytest.mark.parametrize(("step", "lines"), [(1 / 64, 4), (0, 0)])
def test_a_log_gets_a_line_now_and_then(capsys, clock, step, lines):
    """Every SECONDS_BETWEEN_LINES, not one an update; none of a short loop."""
    with Progress("phase 1", 1280) as bar:
        for _ in range(1280):
            clock.now += step
            bar.update(1)
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch, clock):
    """The bar starts where the earlier session stopped."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress("phase 1", 1000, done=600) as bar:
        clock.now += 10 * SECONDS_BETWEEN_LINES
        bar.update(100)
        assert (bar.bar.n, bar.bar.total) == (700, 1000)
    assert "phase 1" in terminal.getvalue() and "Progress:" not in terminal.getvalue()

"""Seconds of a run by part: they add up, nest, survive errors, and cost nothing where no clock runs."""

import time

import pytest

from newllm.clock import Clock, timed


@pytest.fixture
def clock(monkeypatch):
    """A clock whose seconds are those that `pass_time` lets pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Clock() as clock:
        clock.pass_time = lambda seconds: now.__setitem__(0, now[0] + seconds)
        yield clock


def test_each_moment_belongs_to_the_innermost_part(clock):
    """Validation within training is no training; what has no name is "other"; a part ends with an error."""
    clock.pass_time(1)
    with timed("training"):
        clock.pass_time(2)
        with pytest.raises(ValueError, match="x"), timed("validation"):
            clock.pass_time(4)
            raise ValueError("x")
        clock.pass_time(8)
    clock.pass_time(16)
    clock.add({"training": 100.0})
    assert clock.parts == {"other": 17.0, "training": 110.0, "validation": 4.0} and clock.seconds == 131.0


def test_functions_are_timed_each_time_they_are_called(clock):
    """As a decorator, also for a function that calls itself."""

    @timed("work")
    def work(left):
        clock.pass_time(1)
        return work(left - 1) if left else "done"

    assert work(2) == "done" and work(0) == "done" and clock.parts["work"] == 4.0


def test_without_a_clock_nothing_is_counted():
    """Functions that are timed in a run work outside one."""
    assert Clock.current is None
    with timed("anything"):
        pass
    assert Clock.current is None

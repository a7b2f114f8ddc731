"""Seconds of a run by part: they add up, nest and survive errors."""

import time

import pytest

from newllm.clock import Clock, timed


def test_each_moment_belongs_to_the_innermost_part(monkeypatch):
    """Validation within training is no training; what has no name is "other"; a part ends with an error."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()
    monkeypatch.setattr(Clock, "current", clock)

    @timed("work")
    def work(left):
        now[0] += 1
        return work(left - 1) if left else "done"

    now[0] += 1
    with timed("training"):
        now[0] += 2
        with pytest.raises(ValueError, match="x"), timed("validation"):
            now[0] += 4
            raise ValueError("x")
        assert work(2) == work(0) == "done"
        now[0] += 8
    now[0] += 16
    clock.add({"training": 100.0})
    assert clock.parts == {"other": 17.0, "training": 110.0, "validation": 4.0, "work": 4.0}
    assert clock.seconds == 135.0

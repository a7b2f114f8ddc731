"""Where the seconds of a run go: each moment belongs to one part, the innermost that is open."""

import contextlib
import time
from collections import Counter


class Clock:
    """Counts the seconds of the thread that trains. `timed` counts for the current one, new with each run."""

    def __init__(self):
        self.counted, self.open = Counter(), ["other"]
        self.since = time.monotonic()

    @property
    def parts(self):
        """{part: seconds} so far; "other" is the time in which no part was open."""
        self.turn()
        return dict(self.counted)

    @property
    def seconds(self):
        return sum(self.parts.values())

    def add(self, parts):
        """Count what an earlier session of the run has counted."""
        self.counted.update(parts)

    def turn(self):
        """Count the time since the last turn for the part that is open."""
        now = time.monotonic()
        self.counted[self.open[-1]] += now - self.since
        self.since = now


Clock.current = Clock()


@contextlib.contextmanager
def timed(part):
    """Count a block's, or a function's, seconds for a part; what is timed within it counts for its own."""
    clock = Clock.current
    clock.turn()
    clock.open.append(part)
    try:
        yield
    finally:
        clock.turn()
        clock.open.pop()

"""Where the seconds of a run go: each moment belongs to one part, the innermost that is open."""

import contextlib
import time


class Clock:
    """Counts the seconds of the thread that trains. As a context manager it is the clock of `timed`."""

    current = None

    def __init__(self):
        self._parts = {}
        self._open = ["other"]
        self._since = time.monotonic()

    def __enter__(self):
        self._outer, Clock.current = Clock.current, self
        return self

    def __exit__(self, *_):
        Clock.current = self._outer

    @property
    def parts(self):
        """{part: seconds} so far; "other" is the time in which no part was open."""
        self._turn()
        return dict(self._parts)

    @property
    def seconds(self):
        return sum(self.parts.values())

    def add(self, parts):
        """Count what an earlier session of the run has counted."""
        for part, seconds in parts.items():
            self._parts[part] = self._parts.get(part, 0.0) + seconds

    def _turn(self):
        now = time.monotonic()
        self.add({self._open[-1]: now - self._since})
        self._since = now


@contextlib.contextmanager
def timed(part):
    """Count a block's, or a function's, seconds for a part; what is timed within it counts for its own."""
    clock = Clock.current or Clock()  # outside of a run one that nobody reads
    clock._turn()
    clock._open.append(part)
    try:
        yield
    finally:
        clock._turn()
        clock._open.pop()

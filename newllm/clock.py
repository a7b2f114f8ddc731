"""Where the seconds of a run go: each moment belongs to one part, the innermost that is open."""

import contextlib
import time


class Clock:
    """Counts seconds from its making on; as a context manager it is the one that `timed` counts for.

    Only for the thread that trains: what others do meanwhile costs it no time.
    """

    current = None

    def __init__(self):
        self._parts, self._open, self._since = {}, ["other"], time.monotonic()

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
    """Count the seconds of a block, or of a function's calls, for a part; what is timed within it counts for its own."""
    clock = Clock.current
    if clock is None:
        yield
        return
    clock._turn()
    clock._open.append(part)
    try:
        yield
    finally:
        clock._turn()
        clock._open.pop()

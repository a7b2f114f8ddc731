"""Progress of a loop over tokens: a bar in a terminal, a line now and then in a log."""

import contextlib
import sys
import time
from types import SimpleNamespace

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


def silent(label, total, unit="tok"):
    """What a function that reports its progress takes in place of Progress when nobody looks."""
    return contextlib.nullcontext(SimpleNamespace(update=lambda tokens: None))


class Progress:
    """Context manager around a loop over `total` tokens, `done` of which an earlier session has processed."""

    def __init__(self, label, total, done=0, unit="tok"):
        self.label, self.unit = label, unit
        self.total, self.done, self.resumed_at = total, done, done
        self.bar = None

    def __enter__(self):
        self.started = self.last_line = time.monotonic()
        if sys.stdout.isatty():
            counts = dict(total=self.total, initial=self.done, unit=self.unit, unit_scale=True)
            self.bar = tqdm(desc=self.label, **counts, leave=False, file=sys.stdout, dynamic_ncols=True)
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def update(self, tokens):
        self.done += tokens
        if self.bar is not None:
            self.bar.update(tokens)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(self.line, flush=True)

    @property
    def line(self):
        """`Progress: 10,000/100,000 (10.0%) | Speed: 1200 tok/s | ETA: 75s`."""
        counts = f"{self.done:,}/{self.total:,} ({self.done / self.total:.1%})"
        left = (self.total - self.done) / max(self.speed, 1e-9)
        return f"Progress: {counts} | Speed: {self.speed:.0f} {self.unit}/s | ETA: {left:.0f}s"

    @property
    def seconds(self):
        """Since this session entered the loop."""
        return time.monotonic() - self.started

    @property
    def speed(self):
        """Tokens per second of this session."""
        return (self.done - self.resumed_at) / max(self.seconds, 1e-9)

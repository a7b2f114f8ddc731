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
        self.unit, self.total, self.done, self.resumed_at = unit, total, done, done
        look = dict(unit=unit, unit_scale=True, leave=False, dynamic_ncols=True)
        self.bar = tqdm(desc=label, total=total, initial=done, file=sys.stdout, disable=None, **look)
        self.started = self.last_line = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def update(self, tokens):
        self.done += tokens
        self.bar.update(tokens)
        # In place of a bar: `Progress: 10,000/100,000 (10.0%) | Speed: 1200 tok/s | ETA: 75s`.
        if self.bar.disable and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            counts = f"{self.done:,}/{self.total:,} ({self.done / self.total:.1%})"
            left = (self.total - self.done) / max(self.speed, 1e-9)
            print(
                f"Progress: {counts} | Speed: {self.speed:.0f} {self.unit}/s | ETA: {left:.0f}s", flush=True
            )

    @property
    def seconds(self):
        """Of this session in the loop."""
        return time.monotonic() - self.started

    @property
    def speed(self):
        """Tokens per second of this session."""
        return (self.done - self.resumed_at) / max(self.seconds, 1e-9)

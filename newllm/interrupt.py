"""Stopping in good order: a signal or the end of the allowed time asks, training stops at its next safe point.

The first SIGTERM or SIGINT only sets a flag, because a state saved in the middle of a step would be no state at all. Loops
poll it; a second signal ends the process at once. SIGUSR1 asks for a checkpoint and nothing else.
"""

import os
import signal
import threading
import time

EXIT_STATUS = 75  # EX_TEMPFAIL: nothing is wrong, run the same command again


class Stopped(Exception):
    """The run stopped as asked; what had to be saved has been saved. The message is the reason."""


class Interrupt:
    """Context manager that listens for SIGTERM, SIGINT and a time limit, in the main thread.

    Args:
        max_minutes: minutes after which to stop, 0 for no limit.
    """

    current = None

    def __init__(self, max_minutes=0.0):
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.signal, self.save_requested = None, False

    def __enter__(self):
        self.listens = threading.current_thread() is threading.main_thread()  # elsewhere Python forbids handlers
        if self.listens:
            self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
            if hasattr(signal, "SIGUSR1"):
                self.before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._request_save)
        Interrupt.current = self
        return self

    def __exit__(self, *error):
        Interrupt.current = None
        if self.listens:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def _request_save(self, number, frame):
        self.save_requested = True

    @property
    def reason(self):
        """Why to stop, or None."""
        if self.signal is not None:
            return f"{signal.Signals(self.signal).name} received"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "max_minutes is over"
        return None


def stop_reason():
    """Why the run should stop now, None when it should go on or nobody listens."""
    return Interrupt.current.reason if Interrupt.current else None


def save_requested(answered=False):
    """Whether somebody asked for a checkpoint now (`kill -USR1 PID`); `answered` takes the request off."""
    current = Interrupt.current
    if not current or not current.save_requested:
        return False
    current.save_requested = not answered
    return True


def poll():
    """Stop here if asked to. For loops that hold nothing unsaved: data preparation, evaluation.

    Raises:
        Stopped: a signal came or the time is over.
    """
    if reason := stop_reason():
        raise Stopped(reason)

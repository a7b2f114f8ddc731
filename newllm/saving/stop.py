"""Stopping in good order: a signal or the end of the allowed time asks, training stops at a safe point.

The first SIGTERM or SIGINT only sets a flag, because a state saved in the middle of a step would be none.
Loops poll it; a second signal ends the process at once. SIGUSR1 asks for a checkpoint and nothing else.
"""

import math
import os
import signal
import threading
import time
from concurrent.futures import Future, wait

EXIT_STATUS = 75  # EX_TEMPFAIL: nothing is wrong, run the same command again
REQUEST = getattr(signal, "SIGUSR1", None)  # None on Windows


class Stopped(Exception):
    """The run stopped as asked, and has saved what had to be saved. The message is the reason."""


class LeftBehind(Stopped):
    """The same, while a thread is still within a library: Python's own end would wait for it."""


class Interrupt:
    """Context manager that listens for signals, in the main thread, and for the end of `max_minutes`, if any.

    Attributes:
        current: the one that listens; outside of all one that hears nothing.
        alone: False where several processes train together: none may stop while the others wait for it, so
            all go by what `agree` found.
        leads: True while the others wait for what this process alone does, and stop if it does.
    """

    def __init__(self, max_minutes=0.0):
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self.signal, self.save_requested = None, False
        self.alone, self.leads, self.agreed = True, False, None

    def __enter__(self):
        self.outer, self.before = Interrupt.current, {}
        Interrupt.current = self
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in filter(None, (signal.SIGTERM, signal.SIGINT, REQUEST)):
                self.before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_):
        Interrupt.current = self.outer
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number, frame):
        if number == REQUEST:
            self.save_requested = True
        # A launcher passes on as SIGTERM the Ctrl-C that its processes have had already.
        elif self.signal is not None and (self.alone or self.signal == number):
            os._exit(128 + number)
        else:
            self.signal = number

    @property
    def wish(self):
        """Why this process wants to stop, or None."""
        if self.signal is not None:
            return f"{signal.Signals(self.signal).name} received"
        return "max_minutes is over" if time.monotonic() >= self.deadline else None


Interrupt.current = Interrupt()


def stop_reason():
    """Why the run should stop now, or None."""
    current = Interrupt.current
    return current.wish if current.alone or current.leads else current.agreed


def agree(first_reason):
    """Let processes that train together stop together: `first_reason` gives all the same wish."""
    if not Interrupt.current.alone:
        Interrupt.current.agreed = first_reason(Interrupt.current.wish)


def save_requested(answered=False):
    """Whether somebody asked for a checkpoint now (`kill -USR1 PID`); `answered` takes the request off."""
    asked = Interrupt.current.save_requested
    Interrupt.current.save_requested = asked and not answered
    return asked


def poll():
    """Raises Stopped here if the run should stop. For loops that hold nothing unsaved, as in evaluation."""
    if reason := stop_reason():
        raise Stopped(reason)


def interruptible(function, *arguments, tick=lambda: None):
    """What function(*arguments) returns, or LeftBehind: a library's long call hears no signal itself.

    Args:
        tick: called now and then meanwhile.
    """
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    while not wait([future], timeout=0.2).done:
        if reason := stop_reason():
            raise LeftBehind(reason)
        tick()
    return future.result()

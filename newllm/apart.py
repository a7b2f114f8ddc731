"""A function in a process of its own, which never outlives this one and is stopped in good order with it."""

import multiprocessing
import os
import threading

from newllm.errors import UserError, open_streams, silence_broken_streams
from newllm.saving.stop import Stopped, stop_reason

POLL_SECONDS = 0.2


def call_apart(function, *arguments):
    """What function(*arguments) returns, called in a fresh process, where its memory and a crash stay.

    Args:
        function: importable by name; it and what it takes and returns can be pickled.

    Raises:
        UserError, Stopped, BrokenPipeError: as the function raised them.
        UserError: its process ended without an answer. Stopped: it did so because this process is to stop.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    while not receiver.poll(POLL_SECONDS):
        if stop_reason():
            process.terminate()  # once: a second signal would end it without a save
            break
    try:
        answer, error = receiver.recv()
    except EOFError:
        process.join()
        if reason := stop_reason():
            raise Stopped(reason) from None
        raise UserError(f"its process ended with status {process.exitcode}") from None
    process.join()
    if error:
        raise error
    return answer


def _answer(sender, function, arguments):
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in a terminal then reaches the parent alone, which passes it on once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    open_streams()
    try:
        answer = function(*arguments), None
    except (UserError, Stopped) as error:
        answer = None, error
    except BrokenPipeError as error:  # nobody reads what it prints
        silence_broken_streams()
        answer = None, error
    sender.send(answer)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

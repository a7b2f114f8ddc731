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
        function: importable by name; it and what it takes, returns and raises can be pickled.

    Raises:
        UserError: the function raised it, or its process ended without an answer.
        BrokenPipeError: nobody reads its output.
        Stopped: the function raised it, or it was interrupted because this process is to stop.
    """
    context = multiprocessing.get_context("spawn")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    asked = False
    while not answer.poll(POLL_SECONDS):
        if stop_reason() and not asked:
            process.terminate()  # once: a second signal would end it without a save
            asked = True
    try:
        result, error = answer.recv()
    except EOFError:
        process.join()
        if reason := stop_reason():
            raise Stopped(reason) from None
        raise UserError(f"its process ended with status {process.exitcode}") from None
    process.join()
    if error:
        raise error
    return result


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

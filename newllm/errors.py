"""The one exception whose message is meant for the person at the keyboard, and how every command ends."""

import contextlib
import os
import sys

from newllm.saving.stop import EXIT_STATUS, LeftBehind, Stopped

BROKEN_PIPE = 128 + 13  # what a shell says of a program that nobody reads any more


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what, where, what to do."""

    def _render_traceback_(self):
        """What a notebook's cell shows, by IPython's protocol."""
        return [f"error: {self}"]


def first_line(error):
    """What an exception says, in one line without a full stop; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _end(error):
    """Say in one line why the command ends, and end it."""
    line, status = f"error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        line, status = "interrupted before the run began", 130
    if isinstance(error, Stopped):
        advice = "run the same command again, it goes on from what is saved"
        line, status = f"stopped: {error}; {advice}", EXIT_STATUS
    print(line, file=sys.stderr)
    if isinstance(error, LeftBehind):
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status) from None


def _say_user_error(kind, error, trace, otherwise=sys.excepthook):
    """For what is raised outside of exit_on_user_error: by config.py as it is read, or in `python3 -c`."""
    if issubclass(kind, UserError):
        _end(error)
    otherwise(kind, error, trace)


sys.excepthook = _say_user_error


@contextlib.contextmanager
def exit_on_user_error():
    """Frame of every command: it prints on any terminal, and ends in one line and a status, not a traceback.

    A UserError or a lack of memory is status 2, an orderly stop EXIT_STATUS, output that nobody reads
    BROKEN_PIPE. Other errors are faults of the program and keep their traceback.
    """
    open_streams()
    try:
        try:
            yield
        except (UserError, Stopped, KeyboardInterrupt) as error:
            _end(error)
        except (RuntimeError, MemoryError) as error:
            from newllm.memory import is_out_of_memory  # here: what fails so has loaded torch already

            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
            _end(UserError(f"memory ran out ({reason}): give smaller sizes, or take a larger machine."))
        finally:
            sys.stdout.flush()  # here, as the end of Python only prints that it failed
    except OSError as error:
        broken = silence_broken_streams()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE) from None
        if not broken:
            raise
        _end(UserError(f"the output cannot be written ({error.strerror}): give it another place."))


def open_streams():
    """Lead closed streams (`>&-`) to nowhere; show escaped what a terminal lacks, keep odd input bytes."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")


def silence_broken_streams():
    """Lead output that cannot be written to nowhere, so that nothing tries again; whether there was any."""
    broken = False
    for stream, probe in ((sys.stdout, "\n"), (sys.stderr, "")):
        try:
            stream.write(probe)  # what failed before is no longer in the stream
            stream.flush()
        except OSError:
            broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return broken

"""The one exception whose message is meant for the person at the keyboard, and how every command ends and prints."""

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


def _say_user_error(kind, error, trace, otherwise=sys.excepthook):
    """As exit_on_user_error, for what is raised outside of it: by config.py as it is imported, or in `python3 -c`."""
    if not issubclass(kind, UserError):
        return otherwise(kind, error, trace)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


sys.excepthook = _say_user_error


@contextlib.contextmanager
def exit_on_user_error():
    """Frame of every command: what it prints fits any terminal, and it ends in one line and a status, not a traceback.

    A UserError is status 2, an orderly stop EXIT_STATUS, output that nobody reads BROKEN_PIPE. Other errors are faults
    of the program and keep their traceback.
    """
    open_streams()
    try:
        try:
            yield
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted before the run began", file=sys.stderr)
            raise SystemExit(130) from None
        except Stopped as stop:
            advice = "run the same command again to continue" if stop.goes_on else "nothing was to be saved"
            print(f"stopped: {stop}; {advice}", file=sys.stderr)
            if isinstance(stop, LeftBehind):
                sys.stdout.flush()
                os._exit(EXIT_STATUS)
            raise SystemExit(EXIT_STATUS) from None
        finally:
            sys.stdout.flush()  # here, as the end of Python only prints that it failed
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            silence_broken_streams()
            raise SystemExit(BROKEN_PIPE) from None
        if not silence_broken_streams("\n"):
            raise
        print(
            f"error: the output cannot be written ({error.strerror}): give it another place.", file=sys.stderr
        )
        raise SystemExit(2) from None


def open_streams():
    """Lead closed streams (`>&-`) to nowhere; let output show escaped what the terminal lacks, and input keep odd bytes."""
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors=errors))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors=errors)


def silence_broken_streams(probe=""):
    """Lead output that cannot be written to nowhere, so that nothing tries again; whether there was any.

    Args:
        probe: what to write to stdout to find out, beside what is still to be written.
    """
    broken = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.write(probe if stream is sys.stdout else "")
            stream.flush()
        except OSError:
            broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return broken

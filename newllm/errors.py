"""The one exception whose message is meant for the person at the keyboard, and the exit status of every command."""

import contextlib
import sys

from newllm.interrupt import EXIT_STATUS, Stopped


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
    """Turn a UserError into one line on stderr and exit status 2, an orderly stop into EXIT_STATUS; the rest keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted before the run began", file=sys.stderr)
        raise SystemExit(130) from None
    except Stopped as stop:
        print(f"stopped: {stop}; run the same command again to continue", file=sys.stderr)
        raise SystemExit(EXIT_STATUS) from None

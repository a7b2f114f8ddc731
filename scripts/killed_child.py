"""A run in a process of its own that dies by SIGKILL: after a time, or at its n-th operation on the run's files.

The child is forked, so that torch is imported once for hundreds of runs. It does what `train.py` does.
"""

import builtins
import io
import itertools
import os
import signal
import sys
import time
import traceback

import torch._dynamo  # noqa: F401, what the first optimizer imports: once here, not in every child

import train
from config import ResidualConfig
from newllm.errors import exit_on_user_error

LONGEST = 120  # seconds after which a child hangs
LATEST = "model_latest.pt"  # whoever replaces it has completed a save
CHANGES = "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"
KILLED, SAVED = (
    "-- killed at operation",
    "-- a save is complete\n",
)  # what a watched child notes in its output


def start(folder, settings, kill_at=None):
    """Fork a child that begins or continues the run in a folder, as train.py would; its output goes to a file there.

    Args:
        kill_at: the operation at which it kills itself, 0 for none; None leaves out all watching.

    Returns:
        Its process number.
    """
    if process := os.fork():
        return process
    status = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if kill_at is not None:
            watch(folder, kill_at)
        folders = dict(checkpoint_dir=str(folder / "checkpoints"), cache_dir=str(folder / "cache"))
        with exit_on_user_error():
            train.main(ResidualConfig(**settings, **folders))
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # never back into the parent's code


def watch(folder, kill_at):
    """Make this process die at its n-th operation on files below the folder, whichever thread does it.

    An operation is what changes files, and its moment is before it; a write has another moment in its middle, a replace
    one after it. Reading has none: the files are the same before and after.
    """
    count, real_open, real_sync, real_replace = itertools.count(1), io.open, os.fsync, os.replace

    def inside(path):
        return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(
            f"{folder}{os.sep}"
        )

    def moment(what, path):
        if next(count) == kill_at:
            os.write(2, f"{KILLED} {kill_at}: {what} {os.path.basename(os.fsdecode(path))}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            path = arguments[1 if event in ("os.rename", "os.link", "os.symlink") else 0]
            if inside(path):
                moment(event, path)

    class Watched(io.FileIO):
        def write(self, data):
            data = memoryview(data).cast("B")
            moment("write", self.name)
            written = super().write(data[: len(data) // 2])
            moment("half a write", self.name)
            return written + super().write(data[written:])

    def open_watched(file, mode="r", buffering=-1, *text, **further):
        if not set(mode) & set("wax+") or not inside(file):
            return real_open(file, mode, buffering, *text, **further)
        raw = Watched(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **further)

    def sync(handle):
        moment("os.fsync", "")
        real_sync(handle)

    def replace(source, target):
        real_replace(source, target)
        if os.path.basename(target) == LATEST:
            os.write(2, SAVED.encode())
        moment("after os.replace", target)

    sys.addaudithook(audit)
    builtins.open = io.open = open_watched
    os.fsync, os.replace = sync, replace


def end(process, seconds=LONGEST):
    """Wait for a child, and kill it when it still runs after so many seconds.

    Returns:
        Its exit status; minus the signal's number when it died of one.
    """
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)

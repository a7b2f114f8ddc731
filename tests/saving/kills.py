"""A run in a process of its own that dies by SIGKILL, after a time or at its n-th operation on files.

The child is forked, so that torch is imported once for hundreds of runs. It does what `train.py` does.
"""

import builtins
import io
import itertools
import multiprocessing
import os
import signal
import sys

import torch
import torch._dynamo

import train
from config import ResidualConfig
from newllm.errors import exit_on_user_error
from newllm.saving.files import load_sealed

LONGEST = 120  # seconds after which a child hangs
LATEST = "model_latest.pt"  # whoever replaces it has completed a save
CHANGES = "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"
KILLED, SAVED = "-- killed at operation", "-- a save is complete\n"  # what a watched child notes
FILES = LATEST, "model_best.pt", "model_untrained_best.pt"
LOOKED_UP, FOUND = "model_retrieval.pt", ("model", "description", "state")
PROVEN = "model_state_dict", "results", "phase1_history", "phase2_history"
TIMED = "seconds", "seconds_phase1", "tok_per_s", "tok_per_s_phase1", "peak_memory_mb"  # of a session


def output_of(folder):
    path = folder / "output.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def train_in(folder, settings, kill_at=None, seconds=LONGEST, on=""):
    """Begin or continue, in a child, the run of some settings in a folder; its output is appended there.

    Args:
        kill_at: the operation at which it kills itself, 0 for none; None leaves out all watching.
        seconds: after which it is killed. on: part of a file's name; only operations on such count.

    Returns:
        Its exit status; minus the signal's number when it died of one.
    """
    child = multiprocessing.get_context("fork").Process(target=_child, args=(folder, settings, kill_at, on))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        assert seconds < LONGEST, f"not at its end after {seconds} s, see {folder}"
    return child.exitcode


def _child(folder, settings, kill_at, on=""):
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    if kill_at is not None:
        watch(folder, kill_at, on)
    folders = dict(checkpoint_dir=str(folder / "checkpoints"), cache_dir=str(folder / "cache"))
    with exit_on_user_error():
        train.main(ResidualConfig(**settings, **folders))


def watch(folder, kill_at, on):
    """Make this process die at its n-th operation on files below the folder, whichever thread does it.

    An operation is what changes files: its moment is before it, that of a write in its middle; a replace has
    another one after it. Reading has none: the files are the same before and after.
    """
    count, real_open, real_sync, real_replace = itertools.count(1), io.open, os.fsync, os.replace

    def inside(path):
        name = "" if isinstance(path, int) else os.path.abspath(os.fsdecode(path))
        return name.startswith(f"{folder}{os.sep}") and not name.endswith("output.txt")

    def moment(what, path):
        if on in os.path.basename(os.fsdecode(path)) and next(count) == kill_at:
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
        if os.path.basename(target) == LATEST and os.path.basename(source).endswith(".tmp"):
            os.write(2, SAVED.encode())
        moment("after os.replace", target)

    sys.addaudithook(audit)
    builtins.open = io.open = open_watched
    os.fsync, os.replace = sync, replace


def assert_equal(folder, alone):
    """The run in a folder ended as the one in another did, which nobody touched, bit for bit."""
    for name in FILES:
        if name in FILES[:2] or (folder / name).exists():  # who takes over the untrained row has no such file
            states = [load_sealed(path / name) for path in (folder, alone)]
            found = difference(*({key: state[key] for key in PROVEN} for state in states), name)
            assert not found, f"{found} differs in {folder}"
    if (alone / LOOKED_UP).exists():
        files = [load_sealed(path / LOOKED_UP) for path in (folder, alone)]
        found = difference(*({key: file[key] for key in FOUND} for file in files), LOOKED_UP)
        assert not found, f"{found} differs in {folder}"


def difference(one, other, name):
    """Name of the first thing in which two nested values differ in any bit, or None; times do not count."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(key, one[key], other[key]) for key in one if key not in TIMED]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = zip(itertools.count(), one, other, strict=False)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return None if alike and torch.equal(_bytes(one), _bytes(other)) else name
    else:
        return None if repr(one) == repr(other) else name  # NaN equals NaN, and 0.0 is not -0.0
    return next(filter(None, (difference(a, b, f"{name}.{key}") for key, a, b in pairs)), None)


def _bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)

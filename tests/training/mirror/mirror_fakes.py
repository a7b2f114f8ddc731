"""Stand-ins for a mirror's clock and target, faults to inject, and rounds of copies to look at."""

import builtins
import contextlib
import os
import time
from pathlib import Path

from newllm.saving.files import Corrupt, load_sealed, save_sealed

ALL = ("manifest.json", "model_latest.pt", "logs/a.csv")


class Clock:
    """Time that moves when told; pauses are recorded and take no time."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)


class Target:
    """Faults for everything below one folder: `before(operation, path)` is called ahead of open, write and replace."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.before, self.log = str(folder), lambda operation, path: None, []
        self.copying_rename = None  # bytes that arrive when the rename of a finished copy copies only a part
        self._open, self._replace = builtins.open, os.replace
        monkeypatch.setattr(builtins, "open", self.open)
        monkeypatch.setattr(os, "replace", self.replace)

    def at(self, operation, path):
        self.log.append((operation, Path(path).name))
        self.before(operation, path)

    def open(self, path, mode="r", *args, **kwargs):
        if not str(path).startswith(self.folder):
            return self._open(path, mode, *args, **kwargs)
        self.at(f"open {mode}", path)
        file = self._open(path, mode, *args, **kwargs)
        return Written(file, self) if "w" in mode else file

    def replace(self, source, target):
        if str(target).startswith(self.folder):
            self.at("replace", target)
            if self.copying_rename is not None and str(source).endswith(".tmp"):
                content = Path(source).read_bytes()[: self.copying_rename]
                os.unlink(source)
                Path(target).write_bytes(content)
                return
        self._replace(source, target)

    def renames(self):
        return [name for operation, name in self.log if operation == "replace"]


class Written:
    """File object that asks the target before each write."""

    def __init__(self, file, target):
        self.file, self.target = file, target

    def write(self, data):
        self.target.at("write", self.file.name)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def fails(number, times=None, operation="write"):
    """A fault: this errno at the first `times` operations of that kind (None: always)."""
    left = [times]

    def fault(now, path):
        if now.startswith(operation) and left[0] != 0:
            left[0] = left[0] and left[0] - 1
            raise OSError(number, os.strerror(number), path)

    return fault


def wait_for(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def idle(mirror):
    """Whether no round is under way."""
    with mirror._changed:
        return mirror._next_round > mirror._clock()


def do_round(mirror, paths=ALL, **options):
    """One request, and wait until its round is over, well or not."""
    mirror._clock.now += 1000
    mirror.request(paths, **options)
    wait_for(lambda: idle(mirror))


def assert_equal(folders, names=ALL):
    source, target = folders
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def content(folder):
    """Names of the files, but for the lock."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.lock"
    )


def save(source, number):
    save_sealed({"save_number": number}, source / "model_latest.pt")


def slots(folder):
    """Numbers of the whole states in a folder, by slot."""
    found = {}
    for slot in ("latest", "prev"):
        with contextlib.suppress(Corrupt, FileNotFoundError):
            found[slot] = load_sealed(folder / f"model_{slot}.pt")["save_number"]
    return found

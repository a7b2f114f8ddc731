"""One run per folder: `run.lock` says who writes there, and a heartbeat in it says that the writer still lives.

On one machine the process table decides, so a killed run's lock is taken over at once. Of a run on another machine (the
folder lies on a Drive) only the heartbeat is known; a lost virtual machine's lock is free `stale_seconds` after its last
beat; the lock says how many. As that rests on two clocks and on a network folder, it can go wrong; therefore `check` before
every save: a run that was taken for dead and wakes up stops there, and never overwrites what its successor wrote.
"""

import contextlib
import errno
import json
import math
import os
import threading
import time
import uuid
from pathlib import Path

from newllm.errors import UserError
from newllm.saving.drive import lies_on_drive
from newllm.saving.machine import boot_time, here, is_alive, start_time

try:
    import fcntl
except ImportError:  # no such thing on Windows; the re-read after taking over must do
    fcntl = None

LOCK_NAME = "run.lock"
LOCAL, NETWORK = (
    (30, 300),
    (120, 600),
)  # heartbeat_seconds and stale_seconds; Drive allows only so many operations
GUARD_SECONDS = 10.0  # longest wait for another process that is deciding about the same lock
READS, READ_PAUSE = 3, 0.1  # a network folder may show a file late: look again before concluding anything
FIELDS = {"host": str, "boot_id": str, "pid_namespace": str, "pid": int, "started": str, "run_id": str, "token": str,
          "beat": int, "time": (int, float)}  # fmt: skip


class LockLost(UserError):
    """The folder belongs to another run by now."""


class FolderLock:
    """Exclusive right to write in `folder`, as a context manager or by `acquire` and `release`.

    Args:
        folder: an existing folder.
        run_id: for the messages that others see; may be assigned later, the next heartbeat carries it.
        heartbeat_seconds: how often a background thread renews the file. None (for both): LOCAL, or NETWORK on Drive.
        stale_seconds: age of the last heartbeat from which a run on another machine may take this one for dead.
        settle_seconds: pause after a take-over before looking whether another process took over as well.

    Attributes:
        note: a line about the lock that was taken over, or None.
        error: the last OSError of the background thread (which goes on trying), or None.
    """

    def __init__(self, folder, run_id, heartbeat_seconds=None, stale_seconds=None, settle_seconds=0.5):
        self.folder = Path(folder).resolve()
        self.path = self.folder / LOCK_NAME
        self.run_id, self.token, self.settle_seconds = run_id, uuid.uuid4().hex, settle_seconds
        cadence = _cadence(self.folder) if heartbeat_seconds is None else (heartbeat_seconds, stale_seconds)
        self.heartbeat_seconds, self.stale_seconds = cadence
        if not 0 < 2 * self.heartbeat_seconds <= self.stale_seconds:
            raise ValueError(
                "stale_seconds must be at least twice heartbeat_seconds, else a live run looks dead"
            )
        self.note = self.error = None
        self._beat, self._lost_to, self._pid = 0, None, None
        self._stop, self._writing, self._thread = threading.Event(), threading.Lock(), None

    def acquire(self):
        """Take the lock and keep it alive until `release`.

        Raises:
            UserError: a live run has it, or may have it; or the folder cannot be written.
        """
        self._pid = os.getpid()
        try:
            with _one_taker(self.folder):
                try:
                    self._write(_link_new)
                except FileExistsError:
                    self._take_over()
            for stray in self.folder.glob(f".{LOCK_NAME}.*.tmp"):
                stray.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot lock the folder {self.folder}: {error.strerror or error}.") from error
        self._thread = threading.Thread(target=self._keep_alive, name="run.lock", daemon=True)
        self._thread.start()
        return self

    @property
    def lost(self):
        """Whether another run is known to have taken the folder."""
        return self._lost_to is not None

    def check(self):
        """Call before every save.

        Raises:
            LockLost: another run took the folder, or took it and has finished, or somebody deleted the file.
            OSError: the file cannot be read, or the whole folder is gone, so a save would not work either.
        """
        for _ in _looks():
            try:
                found, failure = read_lock(self.path), None
            except OSError as error:
                found, failure = None, error
            if found and found["token"] != self.token:
                self._lost_to = found
            if found:
                break
        if self._lost_to:
            raise LockLost(
                f"{_name(self._lost_to)} has taken over {self.folder} from this run ({self.run_id}), silent for too long, which "
                "writes nothing more there: let the other one go on, or use another folder."
            )
        if isinstance(failure, FileNotFoundError):
            if not self.folder.is_dir():
                raise OSError(
                    errno.ENOTCONN, "the folder is gone (is Drive still mounted?)", str(self.folder)
                )
            raise LockLost(
                f"{self.path} is gone, so another run may have used the folder meanwhile: this run ({self.run_id}) writes "
                "nothing more there; start it again to continue from the last save."
            )
        if failure:
            raise failure
        # Damaged three times: the file system garbled our own heartbeat, and the next one mends it. No sign of another run.

    def release(self):
        """Remove the lock if it is still ours. Errors stay in `error`: the worst case is a lock that goes stale."""
        self._stop.set()
        if self._pid != os.getpid() or not self._writing.acquire(timeout=5):
            return  # a forked child owns nothing; a heartbeat that hangs in a dead network folder is not worth waiting for
        try:
            found = read_lock(self.path)
            if found and found["token"] == self.token:
                self.path.unlink()
        except OSError as error:
            self.error = error
        finally:
            self._writing.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()

    def _content(self):
        mine = {
            **here(),
            "pid": os.getpid(),
            "started": start_time(os.getpid()) or "",
            "run_id": str(self.run_id),
        }
        mine |= {
            "token": self.token,
            "beat": self._beat,
            "time": time.time(),
            "stale_seconds": self.stale_seconds,
        }
        return json.dumps(mine).encode()

    def _write(self, place=None):
        temporary = self.path.with_name(f".{LOCK_NAME}.{self.token}.tmp")
        try:
            with open(temporary, "wb", buffering=0) as file:
                file.write(self._content())
                os.fsync(file.fileno())
            (place or os.replace)(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _take_over(self):
        found, age = _look(self.path)
        if reason := _refusal(self.path, found, age, self.stale_seconds):
            raise UserError(reason)
        self._write()
        time.sleep(self.settle_seconds)
        winner, _ = _look(self.path)
        if not winner or winner["token"] != self.token:
            raise UserError(
                f"another run took {self.folder} at the same moment: one at a time, or use another folder."
            )
        if age < math.inf:
            self.note = (
                f"took over {self.path} from {_name(found) if found else 'an unknown run'}, which has ended"
            )

    def _keep_alive(self):
        while not self._stop.wait(self.heartbeat_seconds):
            with self._writing:
                if self._stop.is_set():
                    return
                try:
                    found = read_lock(self.path)
                    if found and found["token"] != self.token:
                        self._lost_to = found
                        return
                    self._beat += 1
                    self._write()
                except (
                    OSError
                ) as error:  # also "not found": never made anew, another run may have come and gone
                    self.error = error


def _link_new(temporary, path):
    """os.replace for a name that must be free: raises FileExistsError, and the file is whole from its first instant."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links: who is killed between these two lines leaves an empty lock, to go stale
        open(path, "xb").close()
        os.replace(temporary, path)


def holder(folder):
    """The sentence that says which live run uses the folder and what to do, or None when it is free.

    Raises:
        OSError: the lock cannot be read.
    """
    path = Path(folder).resolve() / LOCK_NAME
    return _refusal(path, *_look(path), _cadence(path.parent)[1])


def read_lock(path):
    """Content of a lock file as a dict, or None when it is damaged: empty, not JSON, or without the fields.

    Raises:
        OSError: it cannot be read; FileNotFoundError when there is none.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and all(
        isinstance(found.get(name), kind) for name, kind in FIELDS.items()
    )
    return found if whole and math.isfinite(found["time"]) else None


def _cadence(folder):
    return NETWORK if lies_on_drive(folder) else LOCAL


def _looks():
    for attempt in range(READS):
        if attempt:
            time.sleep(READ_PAUSE)
        yield


def _look(path):
    """(content or None, age in seconds of the last sign of life; negative for one from the future).

    Looks again at a damaged file: it may be just being written.
    """
    for _ in _looks():
        try:
            found, written = read_lock(path), os.stat(path).st_mtime
        except FileNotFoundError:  # its owner just finished
            return None, math.inf
        if found:
            break
    return found, time.time() - (found["time"] if found else written)


def _refusal(path, found, age, stale_seconds):
    """Why the lock must not be taken, or None. `stale_seconds` counts where the lock itself gives none."""
    given = found and found.get("stale_seconds")
    if type(given) in (int, float) and 0 < given < math.inf:
        stale_seconds = given
    wait = math.ceil(stale_seconds - age) if age < stale_seconds else 0
    free = f"wait {wait} s and try again, or delete {path.name} there if that run is certainly gone"
    if not found:
        damage = f"{path} is damaged and was written {max(0, age):.0f} s ago, so a run may use the folder"
        return f"{damage}: {free}." if wait else None
    this = here()
    if all(found[name] == this[name] for name in this):
        alive = is_alive(found["pid"], found["started"])
        if alive:
            who = f"process {found['pid']} on this machine ({found['host']}, run {found['run_id']})"
            return f"{who} is using {path.parent}: stop that process first, or use another folder."
        if alive is False:
            return None
    rebooted = (
        found["host"] == this["host"] and found["boot_id"] != this["boot_id"] and found["time"] < boot_time()
    )
    if rebooted or not wait:
        return None
    return f"{_name(found)} was using {path.parent} {max(0, age):.0f} s ago: stop it first; or {free}."


def _name(found):
    return f"run {found['run_id']} (process {found['pid']} on {found['host']})"


@contextlib.contextmanager
def _one_taker(folder):
    """Lets one process of this machine at a time decide about the lock, where the file system supports that."""
    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + GUARD_SECONDS
    try:
        while fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process keeps {folder} locked: stop it first.") from None
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(handle)

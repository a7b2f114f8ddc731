"""One writer a folder, so that no run overwrites another's files.

On one machine the kernel decides: it frees the lock of a killed process, so none is ever stale. Across
machines, where a folder lies on Drive, no lock holds: `manifest.json` names the writer, and who started last
goes on.
"""

import contextlib
import errno
import json
import os
import socket
import uuid
from pathlib import Path

from newllm.errors import UserError
from newllm.saving.files import write_text

LOCK_NAME, MANIFEST = "run.lock", "manifest.json"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class LockLost(UserError):
    """The folder belongs to another run by now."""


class Guard:
    """The right to write in an existing folder, from now until `release`.

    Args:
        token: names this writer; each later version of the manifest must carry it as its `writer`.

    Raises:
        UserError: another process of this machine has it, or it cannot be written.
    """

    def __init__(self, folder, *, token=None):
        unique = uuid.uuid4().hex[:12]
        self.token = token or f"process {os.getpid()} on {socket.gethostname()} ({unique})"
        self.folder, self.lost = Path(folder), None  # and the writer that is known to have taken it
        self._lock = _lock(folder)
        try:
            try:
                self._lock.acquire()
            except TimeoutError:
                raise UserError(_in_use(folder)) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:  # on such a file system the token alone guards
                    raise
            manifest = read_manifest(folder) | {"writer": self.token}
            write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        except OSError as error:
            self.release()
            raise UserError(f"cannot lock the folder {folder}: {error.strerror or error}.") from error

    def check(self):
        """Call before every save: raises LockLost where another run took the folder."""
        writer = read_manifest(self.folder).get("writer", self.token)
        if writer != self.token:
            self.lost = writer
        if self.lost:
            raise LockLost(
                f"{self.lost} has taken over {self.folder} from this run, which writes nothing more there: "
                "let the other one go on, or use another folder."
            )

    def release(self):
        """Let go of the folder, as the end of the process does."""
        with contextlib.suppress(OSError):
            if self._lock.is_locked and not self.lost:  # else it may be the other one's file
                (self.folder / LOCK_NAME).unlink(missing_ok=True)
            self._lock.release()


def holder(folder):
    """The sentence that says which process of this machine writes in the folder, None when it is free."""
    if not (Path(folder) / LOCK_NAME).exists():  # asking must not make it
        return None
    try:
        _lock(folder).acquire().lock.release()
    except OSError as error:
        return _in_use(folder) if isinstance(error, TimeoutError) else None
    return None


def read_manifest(folder):
    """What a folder's manifest says, {} where there is none or it is damaged."""
    try:
        return dict(json.loads((Path(folder) / MANIFEST).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return {}


def _lock(folder):
    from filelock import FileLock  # takes time to load, and most commands lock nothing

    # filelock's own way out of a file system without locks is a file that outlives a killed process.
    return FileLock(Path(folder) / LOCK_NAME, timeout=0, thread_local=False, fallback_to_soft=False)


def _in_use(folder):
    writer = read_manifest(folder).get("writer", "another process")
    return f"{writer} is using {folder}: stop that process first, or use another folder."

"""Writing beside the training: states by one thread, their second copies by another, which may hang.

The copies' folder may be a mounted Drive: slow, full or gone. It never delays a state or ends a run; what
failed is tried again after the next save, and at the end.
"""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from newllm.saving.files import Corrupt, copy_verified, second_folder, verify_seal
from newllm.saving.guard import Guard

LATEST, PREVIOUS = "model_latest.pt", "model_prev.pt"
LAST_ROUNDS, PAUSE = 3, 1.0  # tries at the end of a run, and seconds after one that failed


class SaveThread:
    """Writes one state at a time; what the disk refuses is no end of a run.

    Args:
        check: called before a job writes; raises if nothing may be written any more.
        say: prints a line.

    Attributes:
        failure: why the last job was refused by the disk, None when it was not.
        waited: seconds for which the caller stood still; written: seconds for which a job was at work.
        saves: jobs that wrote all they had; longest: seconds of the longest job.
    """

    def __init__(self, check, say):
        self.check, self.say = check, say
        self.failure, self.saves = None, 0
        self.waited = self.written = self.longest = 0.0
        self._pool, self._job = ThreadPoolExecutor(1, "checkpoint"), None

    @property
    def busy(self):
        return self._job is not None and not self._job.done()

    def start(self, prepare, write):
        """Wait for the job before, then `write(prepare())`: preparing here and now, writing in the thread."""
        self.wait()
        started = time.monotonic()
        self._job = self._pool.submit(self._run, write, prepare())
        self.waited += time.monotonic() - started

    def wait(self):
        """Until the job under way is done. Raises what it raised, other than the disk's refusal."""
        started = time.monotonic()
        job, self._job = self._job, None
        if job:
            job.result()
        self.waited += time.monotonic() - started

    def close(self):
        self._pool.shutdown()

    def _run(self, write, prepared):
        started = time.monotonic()
        try:
            self.check()
            write(prepared)
            self.failure = None
            self.saves += 1
        except OSError as error:
            self.failure = error.strerror or str(error)
            self.say(
                f"warning: checkpoint not saved ({self.failure}); training goes on, "
                "the files from before are whole"
            )
        seconds = time.monotonic() - started
        self.written += seconds
        self.longest = max(self.longest, seconds)


class Backup:
    """Verified second copies of a run's files in `target`, which keeps the state before the latest as well.

    Args:
        source: the run's folder, whose files are replaced, never altered.
        target: a folder, made now and not again if its mount drops.
        guard: of the source; the target gets one with the same token, so that two runs never mix there.
        every_seconds: least time from one round of copies to the next.
        say: prints a line, where copies begin to fail.

    Raises:
        UserError: the target lies in the source or around it, is no folder, or another process copies there.
    """

    def __init__(self, source, target, guard, every_seconds, say=print):
        self.source = Path(source).resolve()
        self.target = second_folder(target, self.source, "backup_dir")
        self.lock = Guard(self.target, guard.run_id, guard.token).acquire()
        self.every_seconds, self.say = every_seconds, say
        self.files, self.error, self.newest = 0, None, "no copy yet"
        self._copied = {}  # name -> inode, size and time of the file whose copy lies in the target
        self._asked = self._done = None  # (names, number of the save)
        self._thread, self._next_round = None, 0.0

    def request(self, names, save):
        """Say which files, relative to the folder, the target shall hold; their round copies them."""
        self._asked = names, save
        if not self._busy and time.monotonic() >= self._next_round:
            self._begin()

    def close(self, flush=True, time_limit=120):
        """Make the copies still missing, unless `flush` is False, in at most `time_limit` seconds."""
        deadline = time.monotonic() + time_limit
        for _ in range(LAST_ROUNDS):
            self._join(deadline)
            if not flush or self._asked is self._done or self._busy or self.lock.lost:
                break
            if self.error:
                time.sleep(PAUSE)
            self._begin()
        self._join(deadline)
        if self._busy:  # it keeps the target's lock until the process ends
            self.error = f"not finished within {time_limit:g} s, last error: {self.error}"
        else:
            self.lock.release()

    def report(self):
        """One line for the end of a run."""
        if not self.error:
            return f"mirror: {self.files} files, {self.newest}"
        state = "STOPPED for good" if self.lock.lost else "FAILED"
        return f"mirror {state}: {self.error}; {self.newest} in {self.target}"

    @property
    def _busy(self):
        return self._thread is not None and self._thread.is_alive()

    def _begin(self):
        self._thread = threading.Thread(target=self._round, args=[self._asked], daemon=True)
        self._thread.start()

    def _join(self, deadline):
        if self._thread:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _round(self, asked):
        names, save = asked
        try:
            with contextlib.ExitStack() as stack:
                opened = {}  # all at first, so that the copies are of one moment though training goes on
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        opened[name] = stack.enter_context(open(self.source / name, "rb"))
                for name, file in opened.items():
                    for folder in reversed(Path(name).parents[:-1]):
                        (self.target / folder).mkdir(exist_ok=True)
                    self._copy(file, self.target / name)
        except Exception as error:  # whatever it is, it is no matter of the training
            line = (str(error) or repr(error)).splitlines()[0].rstrip(".")
            if not self.error:
                self.say(f"warning: no second copy in {self.target} ({line}); training goes on")
            self.error = line
        else:
            self.error, self.newest, self._done = None, f"the newest of save {save}", asked
            self._next_round = time.monotonic() + self.every_seconds

    def _copy(self, file, target):
        self.lock.check()
        stat = os.fstat(file.fileno())
        identity = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if self._copied.get(target) == identity and target.exists() and target.stat().st_size == stat.st_size:
            return
        previous = None
        if target.name == LATEST:  # a torn one must not take the place of the whole one before it
            with contextlib.suppress(Corrupt, FileNotFoundError):
                verify_seal(target)
                previous = target.with_name(PREVIOUS)
        copy_verified(file, target, previous)
        self._copied[target] = identity
        self.files += 1

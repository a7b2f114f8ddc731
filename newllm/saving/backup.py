"""Writing beside the training: states by one thread, their second copies by another, which may hang.

The copies' folder may be a mounted Drive: slow, full or gone. It never delays a state or ends a run; what
failed is tried again after the next save, and at the end.
"""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from newllm.errors import first_line
from newllm.saving.files import Corrupt, copy_verified, ending, second_folder, usable_folder, verify_seal
from newllm.saving.guard import Guard
from newllm.saving.runs import LATEST, PREVIOUS

LAST_ROUNDS, PAUSE, LAST_SECONDS = 3, 1.0, 120  # tries at the end of a run, seconds between, for all


class SaveThread:
    """Writes one state at a time, if `check()` raises nothing; what the disk refuses is no end of a run."""

    def __init__(self, check, say):
        self.check, self.say = check, say
        self.failure = None  # why the last job was refused by the disk
        self.written = 0.0  # seconds for which a job was at work
        self.saves, self.longest = 0, 0.0  # jobs that wrote all they had, seconds of the longest job
        self._pool, self._job = ThreadPoolExecutor(1, "checkpoint"), None

    @property
    def busy(self):
        return self._job is not None and not self._job.done()

    def start(self, prepare, write):
        """Wait for the job before, then `write(prepare())`: preparing here and now, writing in the thread."""
        self.wait()
        self._job = self._pool.submit(self._run, write, prepare())

    def wait(self):
        """Until the job under way is done. Raises what it raised, other than the disk's refusal."""
        job, self._job = self._job, None
        if job:
            job.result()

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
            harm = "training goes on, the files from before are whole"
            self.say(f"warning: checkpoint not saved ({self.failure}); {harm}")
        seconds = time.monotonic() - started
        self.written += seconds
        self.longest = max(self.longest, seconds)


class Backup:
    """Second copies of a run's files, which never take the place of a whole one before they are whole.

    Args:
        source: the run's folder, whose files are replaced, never altered.
        target: a folder, made now and not again if its mount drops.
        guard: of the source; the target gets one with the same token, so that two runs never mix there.
        every_seconds: least time from one round of copies to the next.

    Raises:
        UserError: the target lies in the source or around it, is no folder, or another process copies there.
    """

    def __init__(self, source, target, guard, every_seconds, say):
        self.source = Path(source).resolve()
        self.target = usable_folder(second_folder(target, self.source, "backup_dir"), "backup_dir")
        self.lock = Guard(self.target, token=guard.token)
        self.every_seconds, self.say = every_seconds, say
        self.error, self.newest = None, "no copy yet"
        self._copied = set()  # names of what this session has copied; files of other runs do not change
        self._asked = self._done = None  # (names, number of the save)
        self._next_round = 0.0
        self._idle = threading.Event()
        self._idle.set()

    def request(self, names, save):
        """Say which files, relative to the folder, the target shall hold; their round copies them."""
        if self._asked is not self._done:  # what is asked for already waits for its round
            names = [*(name for name in self._asked[0] if name not in names), *names]
        self._asked = names, save
        if self._idle.is_set() and time.monotonic() >= self._next_round:
            self._begin()

    def close(self, flush=True):
        """Make the copies still missing, unless `flush` is False, and let go of the target."""
        deadline = time.monotonic() + LAST_SECONDS
        left = LAST_ROUNDS if flush else 0
        while self._idle.wait(deadline - time.monotonic()) and left and self._asked is not self._done:
            time.sleep(PAUSE if self.error else 0)
            self._begin()
            left -= 1
        if self._idle.is_set():
            self.lock.release()
        else:  # it keeps the target's lock until the process ends
            self.error = f"not finished within {LAST_SECONDS:g} s, last error: {self.error}"

    def report(self):
        """One line for the end of a run."""
        return f"mirror FAILED: {self.error}; {self.newest}" if self.error else f"mirror: {self.newest}"

    def _begin(self):
        self._idle.clear()
        threading.Thread(target=self._round, args=[self._asked], daemon=True).start()

    def _round(self, asked):
        names, save = asked
        try:
            with contextlib.ExitStack() as stack:
                opened = {}  # all at first, so that the copies are of one moment though training goes on
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        known = name in self._copied or Path(name).parent.name  # else it may be damaged
                        if not known or ending(self.source / name) != ending(self.target / name):
                            opened[name] = stack.enter_context(open(self.source / name, "rb"))
                for name, file in opened.items():
                    self._copy(file, self.target / name)
                    self._copied.add(name)
            self.error, self.newest, self._done = None, f"the newest of save {save} in {self.target}", asked
            self._next_round = time.monotonic() + self.every_seconds
        except Exception as error:  # whatever it is, it is no matter of the training
            line = first_line(error)
            if not self.error:
                self.say(f"warning: no second copy in {self.target} ({line}); training goes on")
            self.error = line
        self._idle.set()

    def _copy(self, file, target):
        self.lock.check()
        for folder in reversed(target.relative_to(self.target).parents[:-1]):
            (self.target / folder).mkdir(exist_ok=True)
        previous = None
        if target.name == LATEST:  # a torn one must not take the place of the whole one before it
            with contextlib.suppress(Corrupt, FileNotFoundError):
                verify_seal(target)
                previous = target.with_name(PREVIOUS)
        copy_verified(file, target, previous)

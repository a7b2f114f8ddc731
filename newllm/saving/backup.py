"""Second copies on a slow, unreliable folder (a mounted Drive): local first, mirror second, and never in the way.

Training saves locally and hands the names to `Mirror.request`, which returns at once. One background thread copies at most
every `min_seconds`, tries again after errors, and believes nothing: it reads back what it wrote, before and after the
rename, as no one promises that a rename on a mounted Drive is atomic. Therefore the state has two slots there: the latest
becomes the previous one when the new one is whole on disk, so a torn rename or a kill at any instant leaves a whole state.
`manifest.json` comes last, so it never announces what is not there. What fails stays pending for the next round; training
sees only the line of `report`. One run at a time: the target has a lock of its own, and who loses it copies nothing more.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from newllm.errors import UserError
from newllm.saving.drive import check_target, copy_verified, refuse_overlap
from newllm.saving.files import Corrupt, verify_seal
from newllm.saving.guard import NETWORK, FolderLock, LockLost

LATEST, PREVIOUS, MANIFEST = "model_latest.pt", "model_prev.pt", "manifest.json"


class Mirror:
    """Copies files of `source_folder` to the same relative names under `target_folder`.

    Args:
        source_folder: where training writes; files there are replaced, not altered (an altered one is copied as read).
        target_folder: an existing folder, or a new one in an existing folder. If it vanishes later (a dropped mount) it is
            not made anew, as that would fill the disk below the mount point.
        run_id: as in FolderLock.
        min_seconds: least time between the end of a round of copies and the start of the next.
        attempts: how often a file is tried in one round.
        wait: seconds before the second attempt; doubles with each further one.
        copy_timeout: seconds after which an attempt is given up.
        clock, sleep: time source (seconds, monotonic) and pause, for tests.

    Attributes:
        lock: the target's FolderLock, held from the start; its beats are slow, as the target may be a Drive anywhere.
        copied: files copied so far. retries: attempts that failed and were followed by another.
        failures: files given up in a round (they stay pending). last_error: a line, or None.

    Raises:
        UserError: source and target lie in each other, the target cannot be a folder, or a live run copies into it.
    """

    def __init__(
        self, source_folder, target_folder, run_id, min_seconds=600, attempts=4, wait=1.0, copy_timeout=600,
        clock=time.monotonic, sleep=time.sleep,
    ):  # fmt: skip
        self.source, self.target = Path(source_folder).resolve(), Path(target_folder).resolve()
        refuse_overlap(self.source, "the folder to mirror", self.target, "its mirror")
        check_target(self.target)
        try:
            self.target.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the folder {self.target}: {error.strerror}.") from error
        self.min_seconds, self.attempts, self.wait, self.copy_timeout = (
            min_seconds,
            attempts,
            wait,
            copy_timeout,
        )
        self.copied = self.retries = self.failures = 0
        self.last_error, self.last_copy, self.newest_step = None, None, None
        self._clock, self._sleep = clock, sleep
        self._pending, self._step = {}, None
        self._seen = {}  # name -> identity of the file that was copied, so that an unchanged one is not copied again
        self._failing = self._lost = self._closing = self._give_up = False
        self._next_round = -float("inf")
        self._changed = threading.Condition()
        self.lock = FolderLock(self.target, run_id, *NETWORK).acquire()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def request(self, names, step=None):
        """Ask for copies of these files, soon. Returns at once, touches no file and does not fail.

        Files of earlier requests that are still pending stay so; each is copied as it is when its turn comes, and those
        that no longer exist are left out.

        Args:
            names: paths, absolute or relative to the source folder.
            step: what `report` calls the newest copy.
        """
        with self._changed:
            self._pending.update(dict.fromkeys(names))
            self._step = self._step if step is None else step
            self._changed.notify()

    def close(self, flush=True, time_limit=120):
        """End the thread, which releases the lock; with `flush` copy what is pending first, whatever the throttle says.

        Takes `time_limit` seconds at most. A thread that hangs in a copy for longer keeps the lock until it is through.
        """
        with self._changed:
            if not flush:
                self._pending, self._give_up = {}, True
            self._closing = True
            self._changed.notify()
        self._thread.join(time_limit)
        self._give_up = True  # a copy under way stops at its next block
        with self._changed:
            if self._thread.is_alive():
                self._failing = True
                self.last_error = f"not finished within {time_limit:g} s, last error: {self.last_error}"

    def report(self):
        """One line for the end of a run."""
        if self._failing:
            newest = "no copy yet" if self.last_copy is None else f"newest copy is step {self.newest_step}"
            how = "STOPPED for good" if self._lost else "FAILED"
            return f"mirror {how}: {self.last_error}; {newest} in {self.target}"
        ago = (
            "no copy yet"
            if self.last_copy is None
            else f"last copy {self._clock() - self.last_copy:.0f} s ago"
        )
        return f"mirror: {self.copied} files, {self.retries} retries, {ago}"

    def _work(self):
        try:
            self._serve()
        finally:
            self.lock.release()

    def _serve(self):
        while not self._lost:
            with self._changed:
                while not self._due():
                    if self._closing:
                        return
                    self._changed.wait(max(0.0, self._next_round - self._clock()) if self._pending else None)
                names, step, last_chance = self._pending, self._step, self._closing
                self._pending = {}
            try:
                failed = self._round(names)
            except Exception as error:  # whatever it is, it must not end the thread unseen
                failed, self.last_error = names, _line(error)
                self._lost = isinstance(error, LockLost)
            with self._changed:
                self._failing = bool(failed)
                if not failed:
                    self.last_copy, self.newest_step = self._clock(), step
                elif not last_chance and not self._give_up:
                    self._pending = {**failed, **self._pending}
                self._next_round = self._clock() + self.min_seconds

    def _due(self):
        return self._pending and (self._closing or self._clock() >= self._next_round)

    def _round(self, names):
        """Copy these files. Returns those that failed.

        All are opened first, so that what is copied was there at one moment, manifest included, even if training goes on.

        Raises:
            LockLost: the target is another run's by now.
        """
        failed = {}
        with contextlib.ExitStack() as stack:
            opened = []
            for name in sorted(names, key=lambda name: Path(name).name == MANIFEST):
                path = self.source / name
                path = path.parent.resolve() / path.name
                if self.source not in path.parents:
                    self.last_error = f"{name} does not lie in {self.source}"
                    failed[name] = None
                    continue
                relative = path.relative_to(self.source)
                try:
                    opened.append((name, relative, stack.enter_context(open(path, "rb"))))
                except FileNotFoundError:  # rotated away meanwhile
                    pass
                except OSError as error:
                    self.last_error, failed[name] = _line(error), None
            for name, relative, file in opened:
                if (failed and Path(name).name == MANIFEST) or not self._copy(relative, file):
                    failed[name] = None
        return failed

    def _copy(self, relative, file):
        """Whether the target has the file in the end."""
        stat = os.fstat(file.fileno())
        identity = stat.st_ino, stat.st_size, stat.st_mtime_ns
        target = self.target / relative
        for attempt in range(self.attempts):
            if attempt:
                self.retries += 1
                self._sleep(self.wait * 2 ** (attempt - 1))
            limit = self._clock() + self.copy_timeout
            try:
                self.lock.check()
                if (
                    self._seen.get(relative) == identity
                    and target.exists()
                    and target.stat().st_size == stat.st_size
                ):
                    return True
                target.parent.mkdir(parents=True, exist_ok=True)
                slot = self._slot_for(target)
                copy_verified(file, target, lambda limit=limit: self._give_up or self._clock() > limit, slot)
            except OSError as error:
                self.last_error = _line(error)
                if self._give_up:
                    break
            else:
                self._seen[relative] = identity
                self.copied += 1
                return True
        self.failures += 1
        return False

    def _slot_for(self, old):
        """Where the file that is there shall go; None if it is no state, or torn: that must not take a whole one's place."""
        if old != self.target / LATEST:
            return None
        try:
            verify_seal(old)
        except (Corrupt, FileNotFoundError):
            return None
        return self.target / PREVIOUS


def _line(error):
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__

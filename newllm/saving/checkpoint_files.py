"""Which files hold the run's state: latest, the one before, rotated steps, manifest; and which of them to believe.

At every instant a whole file exists: the new state is written beside the old one and takes its name only when it has been
read back. The manifest is written last and is only for people and `scripts.status`; each file proves itself by its seal.
"""

import contextlib
import json
import re
import time
from pathlib import Path

from newllm.errors import UserError
from newllm.saving.files import (
    Corrupt,
    copy_verified,
    duplicate,
    load_sealed,
    save_sealed,
    verify_seal,
    write_text,
)

KEPT = (
    "model_epoch.pt",
    "model_phase1.pt",
    "model_backup.pt",
)  # end of an epoch, end of Phase 1, saved by hand
STEP_FILE = re.compile(r"model_step_(\d+)\.pt")
ATTEMPTS, WAIT = (
    3,
    0.5,
)  # tries of a write and seconds before the second; a network folder may fail for a moment


class CheckpointFiles:
    """The files of one run in one folder.

    Args:
        folder: where they lie, resolved.
        keep_last: how many `model_step_{n}.pt`, after n optimizer steps of the run, to keep beside latest and previous.
    """

    def __init__(self, folder, keep_last):
        self.folder, self.keep_last = Path(folder), keep_last
        self.latest, self.previous = self.folder / "model_latest.pt", self.folder / "model_prev.pt"
        self.manifest = self.folder / "manifest.json"
        self.writer = None  # the token of the folder's Guard

    def steps(self):
        """Step files, newest first."""
        found = [
            (int(match[1]), path)
            for path in self.folder.iterdir()
            if (match := STEP_FILE.fullmatch(path.name))
        ]
        return [path for _, path in sorted(found, reverse=True)]

    def states(self):
        """Every file that may hold a state to continue from, likely newest first."""
        return [self.latest, self.previous, *self.steps(), *(self.folder / name for name in KEPT)]

    def write(self, content, names=()):
        """Make `content` the latest state; the latest becomes the previous one.

        Args:
            names: further names for it, such as those of KEPT.

        Raises:
            OSError: it could not be written in ATTEMPTS tries; the files that were there are untouched.
        """
        for attempt in range(ATTEMPTS):
            try:
                digest = save_sealed(content, self.latest, self.previous)
                break
            except OSError:
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(WAIT * 2**attempt)
        if self.keep_last:
            duplicate(self.latest, self.folder / f"model_step_{content['step']:08d}.pt")
            for path in self.steps()[self.keep_last :]:
                path.unlink()
        for name in names:
            duplicate(self.latest, self.folder / name)
        entry = {
            key: content[key]
            for key in ("run_id", "epoch", "stage", "step", "restart", "save_number", "saved_at")
        }
        entry |= {"writer": self.writer} if self.writer else {}
        entry |= {"file": self.latest.name, "sha256": digest, "bytes": self.latest.stat().st_size}
        write_text(self.manifest, json.dumps(entry, indent=1) + "\n")

    def read_newest(self, notes):
        """The newest state that is whole, None when there is no file at all. Damaged files are set aside, never used.

        Args:
            notes: list that gets a line for each file set aside.

        Raises:
            UserError: files exist and none can be read: never start afresh over them.
        """
        found, damaged = {}, []
        for path in self.states():
            try:
                found[path] = load_sealed(path, mmap=True)["save_number"]
            except FileNotFoundError:
                if path.is_symlink():
                    raise UserError(
                        f"{path} is a link to nowhere: mount what it leads to, or remove the link."
                    ) from None
            except Corrupt as error:
                damaged.append((path, error))
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror or error}): mend that or move it away."
                ) from error
            if path == self.latest and found:
                break  # the usual case needs no other file
        if damaged and not found:
            raise UserError(
                f"no checkpoint in {self.folder} can be read ({damaged[0][1]}): put a whole copy in its place, or move the "
                "files away to start a new run."
            )
        if not found:
            return None
        newest = max(found, key=found.get)
        for bad, error in damaged:
            notes.append(f"warning: {error}; kept as {set_aside(bad).name}, continuing from {newest.name}")
        if newest != self.latest:
            duplicate(newest, self.latest)
        return load_sealed(newest)

    def recover(self, mirror, notes):
        """Fetch the mirror's files where the mirror holds a newer whole state than this folder, as after a lost machine.

        Args:
            mirror: folder of second copies.
            notes: list that gets a line when files were fetched.

        Raises:
            UserError: the mirror holds another run, which this one would overwrite, or it cannot be read.
        """
        try:
            self._recover(CheckpointFiles(mirror, 0), notes)
        except OSError as error:
            raise UserError(
                f"the mirror {mirror} cannot be read ({error.strerror or error}): mount it again."
            ) from error

    def _recover(self, mirror, notes):
        theirs, ours = newest(mirror), newest(self)
        if theirs is None:
            return
        if ours is not None and ours["run_id"] != theirs["run_id"]:
            if list(self.folder.glob(f"model_latest_{theirs['run_id']}.pt*")):
                return  # this folder's earlier run, kept here under its own name
            raise UserError(
                f"{mirror.folder} holds second copies of another run ({theirs['run_id']}, here is {ours['run_id']}): choose "
                "another --backup_dir, or move the files away."
            )
        if ours is not None and ours["save_number"] >= theirs["save_number"]:
            return
        for path in sorted(mirror.folder.glob("model_*.pt")):
            with contextlib.suppress(Corrupt, FileNotFoundError), open(path, "rb") as source:
                verify_seal(path)
                copy_verified(source, self.folder / path.name)
        notes.append(
            f"state {theirs['save_number']} fetched from the mirror {mirror.folder}, newer than what was here"
        )

    def remove_strays(self):
        """Delete temporary files of processes that were killed. Only for who holds the folder's lock."""
        for stray in self.folder.glob(".*.tmp"):
            stray.unlink(missing_ok=True)

    def archive(self, run_id, names):
        """Rename states, and the further `names`, after the run they belong to, so that another may begin.

        Returns:
            The new names.
        """
        kept = []
        for name in (self.latest.name, self.previous.name, *KEPT, *names):
            path = self.folder / name
            if path.exists():
                kept.append(path.rename(unused(path.with_name(f"{path.stem}_{run_id}.pt"))).name)
        for path in self.steps():
            path.unlink()  # copies of states before the one that is kept
        return kept


def newest(files):
    """The newest whole state of a folder, without touching anything in it; None when there is none.

    That is the latest if it is whole: a previous one of an earlier run, with more saves behind it, is not newer.
    """
    found = None
    for path in files.states():
        try:
            content = load_sealed(path, mmap=True)
        except (Corrupt, OSError):
            continue
        if path == files.latest:
            return content
        if found is None or content["save_number"] > found["save_number"]:
            found = content
    return found


def set_aside(path):
    """Rename a damaged file to `.corrupt`, never over an earlier one."""
    return path.rename(unused(path.with_name(path.name + ".corrupt")))


def unused(path):
    """The path, or with the first number that makes it a name nobody has."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate

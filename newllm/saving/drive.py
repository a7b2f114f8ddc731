"""Copies into folders that are not to be trusted: a mounted Drive that is slow, drops out, and renames as it likes."""

import contextlib
import errno
import hashlib
import os
from pathlib import Path

from newllm.errors import UserError

COLAB_DRIVE = Path("/content/drive")
BLOCK = 1 << 20


def copy_verified(source, target, give_up=lambda: False, previous=None):
    """Copy an open file, from its beginning, to the path `target`, which takes its name only when it is whole on disk.

    Args:
        source: binary file object; read once per call.
        target: path in an existing folder; a file there is replaced.
        give_up: asked before every block.
        previous: path that takes the file which is there, if there is one, as soon as the new one is whole on disk: then a
            rename that tears the new one leaves that one.

    Raises:
        OSError: it did not work, or what can be read back is not what was written. TimeoutError: `give_up` said so.
    """
    target = Path(target)
    temporary = target.with_name(
        f".{target.name}.mirror.tmp"
    )  # one name: what a killed copy left is overwritten
    try:
        source.seek(0)
        digest = hashlib.sha256()
        with open(temporary, "wb") as file:
            for block in _blocks(source, give_up):
                digest.update(block)
                file.write(block)
            file.flush()
            _sync(file)
        _verify(temporary, digest, give_up)
        if previous:
            with contextlib.suppress(FileNotFoundError):
                os.replace(target, previous)
        os.replace(temporary, target)
        _verify(target, digest, give_up)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(temporary, 0)  # else it takes space in Drive's trash, which counts against the quota
            temporary.unlink()
        raise


def _sync(file):
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some network folders cannot; the reading back remains
            raise


def _verify(path, digest, give_up):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(file, give_up):
            found.update(block)
    if found.digest() != digest.digest():
        raise OSError(errno.EIO, "what was written reads back differently", str(path))


def _blocks(file, give_up):
    while block := file.read(BLOCK):
        if give_up():
            raise TimeoutError(errno.ETIMEDOUT, "copying took too long", file.name)
        yield block


def lies_on_drive(folder):
    """Whether a folder is Colab's Drive or lies in it, mounted or not; a link counts as what it leads to."""
    folder = Path(folder).resolve()
    return COLAB_DRIVE.resolve() in (folder, *folder.parents)


def check_target(folder):
    """Raise UserError if no folder can be there: Drive is not mounted, the parent does not exist, or it is a file."""
    folder = Path(os.path.abspath(folder))
    if lies_on_drive(folder) and not os.path.ismount(COLAB_DRIVE):
        raise UserError(
            f"{folder} lies on Drive, which is not mounted at {COLAB_DRIVE}: mount Drive first (in a notebook: "
            "from google.colab import drive; drive.mount('/content/drive'))."
        )
    if not folder.parent.is_dir():
        raise UserError(f"{folder.parent} does not exist: mount Drive first, or create that folder yourself.")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: move it away or choose another.")


def refuse_overlap(one, one_is, other, other_is):
    """Raises UserError when one of two resolved folders lies in the other, or is it."""
    if one == other or one in other.parents or other in one.parents:
        raise UserError(
            f"{one} ({one_is}) and {other} ({other_is}) must not lie in each other: choose another folder."
        )

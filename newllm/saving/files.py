"""Files that are either whole or not there: sealed torch archives, written atomically, verified before unpickling.

A sealed file is what `torch.save` writes (a zip archive) plus its SHA-256 as the archive's comment, so one file
carries its own proof and plain `torch.load` still opens it. torch itself checks no sums: a flipped bit loads silently.
"""

import hashlib
import os
import shutil
import struct
from pathlib import Path

import torch

from newllm.errors import UserError

SEAL_PREFIX = b"sha256:"
SEAL_LENGTH = len(SEAL_PREFIX) + 64
EMPTY_COMMENT = struct.pack("<H", 0)  # the last two bytes of an archive without comment: its comment's length
SEAL_COMMENT = struct.pack("<H", SEAL_LENGTH)
BLOCK = 1 << 20


class Corrupt(Exception):
    """A file that is not what was written: torn, altered, or no sealed archive at all."""


def usable_folder(path, purpose):
    """Create the folder if needed and return it resolved; a link to a folder is fine.

    Raises:
        UserError: the path is a file, a dangling link (Drive not mounted), or cannot be created.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} ({purpose}) is a link to {os.readlink(path)}, which does not exist: mount Drive first, or remove the link."
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} ({purpose}) is a file, not a folder: move it away or choose another folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path} ({purpose}): {error.strerror}.") from error
    return path.resolve()


class _HashingWriter:
    """File object that hashes what passes through, so that a re-read can be compared with what was meant."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.digest.update(data)
        try:
            self.file.write(data)
        except OSError as error:  # torch replaces it by a RuntimeError that no longer says why
            self.error = error
            raise
        return len(data)

    def flush(self):
        self.file.flush()


def save_sealed(value, path, previous=None):
    """Write `value` (tensors and plain Python values) so that `path` is at every instant the old or the new file.

    The temporary file lies in the target's own folder, is synced and read back before it takes the name.

    Args:
        previous: a path by which to keep the file that had the name.

    Returns:
        The SHA-256 (hex) of the archive.

    Raises:
        OSError: the disk refused; the old file is untouched and the temporary one is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = None
    try:
        with open(temporary, "w+b") as file:
            writer = _HashingWriter(file)
            torch.save(value, writer)
            digest = writer.digest.hexdigest()
            file.seek(-len(EMPTY_COMMENT), os.SEEK_END)
            if file.read() != EMPTY_COMMENT:
                raise OSError(f"{temporary}: torch wrote an archive this version cannot seal")
            file.seek(-len(EMPTY_COMMENT), os.SEEK_END)
            file.write(SEAL_COMMENT + SEAL_PREFIX + digest.encode())
            file.flush()
            os.fsync(file.fileno())
        load_sealed(temporary, mmap=True)  # what cannot be loaded must not replace what can
        if previous is not None and path.exists():
            duplicate(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (RuntimeError, Corrupt) as error:
        if writer and writer.error:
            raise writer.error from error
        raise OSError(f"writing {path} failed: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def duplicate(path, target):
    """Give the file a second name, replacing what had it: a hard link where possible, else a synced copy."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # Drive and other network folders have no hard links
            with open(path, "rb") as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(
            missing_ok=True
        )  # also where both were names of one file already: rename does nothing then


def verify_seal(path):
    """SHA-256 (hex) that the file carries and has. Reads everything, unpickles nothing.

    Raises:
        Corrupt: no seal, or content that does not match it.
    """
    body = os.path.getsize(path) - len(SEAL_COMMENT) - SEAL_LENGTH
    if body <= 0:
        raise Corrupt(f"{path} is too short to be a sealed file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = body
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise Corrupt(f"{path} ended while it was read")
            digest.update(block)
            left -= len(block)
        tail = file.read()
    digest.update(EMPTY_COMMENT)
    expected = SEAL_COMMENT + SEAL_PREFIX + digest.hexdigest().encode()
    if tail != expected:
        raise Corrupt(f"{path} does not match its checksum")
    return digest.hexdigest()


def load_sealed(path, map_location="cpu", mmap=False):
    """Read a sealed file: seal first, then unpickling restricted to tensors and plain values.

    Raises:
        FileNotFoundError: no such file.
        Corrupt: the seal is missing or wrong, or the content is not plain data.
    """
    verify_seal(path)
    mmap = mmap and _is_text(os.fspath(path))  # torch maps no file whose name is not UTF-8
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # bad pickles fail in every way: Unpickling, Key, Index, Value, Type, Runtime errors
        raise Corrupt(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error


def _is_text(name):
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def write_text(path, text):
    """Replace a small text file atomically: readers see the old or the new content, whole. Half a character is written escaped."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Make a rename durable. Network folders may not support it, and then have nothing to sync."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)

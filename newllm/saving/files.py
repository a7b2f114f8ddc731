"""Files that are either whole or not there: sealed torch archives, written atomically, read back, verified.

A sealed file is what `torch.save` writes (a zip archive) with its SHA-256 as the archive's comment: plain
`torch.load` still opens it. torch checks no sums, and the CRC-32 of the records, which zipfile could check,
do not cover the archive's directory, where a flipped bit can make torch load other values.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path

import torch

from newllm.errors import UserError, first_line

COLAB_DRIVE = Path("/content/drive")
NO_COMMENT, COMMENT = b"\0\0", b"\x47\0sha256:"  # an archive ends in its comment's length, then the comment
SEAL_BYTES = len(COMMENT) + 64
BLOCK = 1 << 20


class Corrupt(OSError):
    """A file that is not what was written: torn, altered, or no sealed archive at all."""


def usable_folder(path, purpose, make=True):
    """The folder, resolved, made if needed (unless `make` is False); a link to a folder is fine.

    Raises:
        UserError: it is a file, leads to nothing, lies on a Drive that is not mounted, or cannot be made.
    """
    path, real = Path(path), Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} ({purpose}) is a file, not a folder: move it away or choose another folder.")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} ({purpose}) is a link to nothing ({real}): mount Drive first, or remove it.")
    if COLAB_DRIVE in real.parents and not os.path.ismount(COLAB_DRIVE):
        raise UserError(f"{path} ({purpose}) lies on Drive, which is not mounted: mount Drive first.")
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path} ({purpose}): {error.strerror}.") from error
    return real


def second_folder(path, first, purpose):
    """A folder for another disk than `first`: in an existing one, neither in `first` nor around it."""
    path = usable_folder(path, purpose, make=False)
    if path == first or path in first.parents or first in path.parents:
        raise UserError(f"{first} and {path} ({purpose}) must not lie in each other: choose another folder.")
    if not path.parent.is_dir():  # making it would fill the local disk in place of one that is not mounted
        raise UserError(f"{path.parent} ({purpose}) does not exist: mount Drive first, or create it.")
    return path


@contextlib.contextmanager
def replacing(path, tag=None):
    """A name beside `path` to write to, which takes its place if the block ends well, and else is gone."""
    temporary = path.with_name(f".{path.name}.{tag or os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a killed process, it may be one more name of a good file
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # network folders may have nothing to sync
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _HashingWriter:
    """File object that hashes what passes through: what reads back is compared with what was meant."""

    def __init__(self, file):
        self.file, self.flush = file, file.flush
        self.digest = hashlib.sha256()

    def write(self, data):
        self.digest.update(data)
        return self.file.write(data)


def save_sealed(value, path, previous=None):
    """Write `value` (tensors and plain values) so that `path` is at every instant the old or the new file.

    Args:
        previous: a path by which to keep the file that had the name.
    """
    path = Path(path)
    with replacing(path) as temporary:
        with open(temporary, "w+b") as file:
            writer = _HashingWriter(file)
            try:
                torch.save(value, writer)
            except RuntimeError as error:  # torch's own error does not say why the disk refused
                raise (error.__context__ or error) from error
            file.seek(-len(NO_COMMENT), os.SEEK_END)
            file.write(_seal(writer.digest))
        sync(temporary)
        load_sealed(temporary, mmap=True)  # what cannot be loaded must not replace what can
        if previous is not None and path.exists():
            duplicate(path, previous)


def load_sealed(path, mmap=False):
    """Read a sealed file to the CPU: seal first, then unpickling restricted to tensors and plain values.

    Raises:
        Corrupt: the seal is missing or wrong, or the content is not plain data.
    """
    verify_seal(path)
    mmap = mmap and os.fspath(path).isprintable()  # torch maps no file whose name is not UTF-8
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a bad pickle fails in every way: Key, Index, Value, Type, Runtime errors
        raise Corrupt(f"{path} cannot be loaded: {first_line(error)}") from error


def verify_seal(path):
    """SHA-256 (hex) that the file carries and has, else Corrupt. Reads everything, unpickles nothing."""
    digest = hashlib.sha256()
    length = os.path.getsize(path) - SEAL_BYTES
    with open(path, "rb") as file:
        for start in range(0, length, BLOCK):
            digest.update(file.read(min(BLOCK, length - start)))
        tail = file.read()
    digest.update(NO_COMMENT)
    if tail != _seal(digest):
        raise Corrupt(f"{path} does not match its checksum")
    return digest.hexdigest()


def ending(path):
    """(Size, last characters: a seal's SHA-256), equal for equal files; None where there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64))
            return size, file.read().decode(errors="replace")
    except FileNotFoundError:
        return None


def _seal(digest):
    return COMMENT + digest.hexdigest().encode()


def duplicate(path, target):
    """Give the file a second name, replacing what had it: a hard link where possible, else a synced copy."""
    with replacing(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # Drive and other network folders have no hard links
            shutil.copyfile(path, temporary)


def copy_verified(source, target, previous=None):
    """Copy an open file to a folder that is not to be trusted; the copy is named when it reads back the same.

    Args:
        previous: path for the file that is there, as Drive's rename may tear the new one.
    """
    with replacing(target, "copy") as temporary:  # not the process's: what a killed one left is overwritten
        source.seek(0)
        with open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, BLOCK)
        sync(temporary)
        _compare(source, temporary)
        if previous and target.exists():
            os.replace(target, previous)
    _compare(source, target)


def _compare(source, path):
    source.seek(0)
    with open(path, "rb") as copy:
        if hashlib.file_digest(copy, "sha256").digest() != hashlib.file_digest(source, "sha256").digest():
            raise OSError(errno.EIO, "what was written reads back differently", str(path))


def write_text(path, text):
    """Replace a small text file atomically; what UTF-8 lacks, as half a character in a path, is escaped."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync(path):
    """Bring a file, or the names in a folder, to the disk; some network folders cannot, and say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)

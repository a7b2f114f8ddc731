"""One tensor for each sample, kept between steps: in memory, or in a file when it would take too much of that.

A file is read and written, not mapped: the pages of a mapping would count as memory of this process.
"""

import contextlib
import os
import tempfile
import zlib
from pathlib import Path

import torch

from newllm.clock import timed
from newllm.errors import UserError


class SampleStore:
    """[count, *shape] on `device`, all zeros at first. Reading and writing take an int64 tensor of indices.

    Args:
        path: a file that may already hold rows; a folder for a file without a name, which ends with the process; None for
            memory.

    Attributes:
        rows: the tensor itself, in memory.
        digests: CRC-32 of each row in a file, -1 where none has been written (int64 [count]); None in memory.

    Raises:
        UserError: by reading and writing too, when the file refuses.
    """

    def __init__(self, count, shape, dtype, device, path=None):
        self.shape, self.dtype, self.device, self.path, self.digests = tuple(shape), dtype, device, path, None
        if path is None:
            self.rows = torch.zeros(count, *self.shape, dtype=dtype, device=device)
            return
        self.digests = torch.full((count,), -1)
        with self._said():
            if Path(path).is_dir():
                self._file = tempfile.TemporaryFile(dir=path, buffering=0)  # noqa: SIM115, open as long as the store
            else:
                self._file = open(path, "r+b" if os.path.exists(path) else "w+b", buffering=0)  # noqa: SIM115

    def __len__(self):
        return len(self.rows if self.digests is None else self.digests)

    @timed("fetching rows")
    def __getitem__(self, samples):
        if self.digests is None:
            return self.rows[samples.to(self.device, non_blocking=True)]
        rows = torch.zeros(len(samples), *self.shape, dtype=self.dtype)
        for sample, row in zip(samples.tolist(), _bytes_of(rows), strict=True):
            if self.digests[sample] >= 0:
                with self._said():
                    self._seek(sample, row)
                    _fill(self._file, row)
        return rows.to(self.device, non_blocking=True)

    @timed("fetching rows")
    def __setitem__(self, samples, rows):
        if self.digests is None:
            self.rows[samples.to(self.device, non_blocking=True)] = rows.to(self.device, self.dtype)
            return
        for sample, row in zip(
            samples.tolist(), _bytes_of(rows.to("cpu", self.dtype).contiguous()), strict=True
        ):
            with self._said():
                self._seek(sample, row)
                written = 0
                while written < len(row):
                    written += self._file.write(row[written:])
            self.digests[sample] = zlib.crc32(row)

    def adopt(self, digests):
        """Take over the rows that the file holds already.

        Returns:
            Whether every row that has a digest is there and is the one it was made for.
        """
        self.digests.copy_(digests)
        row = _bytes_of(torch.zeros(1, *self.shape, dtype=self.dtype))[0]
        for sample in (digests >= 0).nonzero().flatten().tolist():
            self._seek(sample, row)
            if not _fill(self._file, row) or zlib.crc32(row) != digests[sample]:
                return False
        return True

    def forget(self):
        """As if nothing had been written."""
        self.digests.fill_(-1)

    def sync(self):
        """Onto the disk, so that a state saved afterwards can rely on it."""
        if self.digests is not None:
            os.fsync(self._file.fileno())

    def close(self):
        if self.digests is not None:
            self._file.close()

    @contextlib.contextmanager
    def _said(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"contexts cannot be kept in files at {self.path} ({error.strerror or error}): mend that, or raise "
                "--context_memory_mb, and run again to continue from the last checkpoint."
            ) from error

    def _seek(self, sample, row):
        self._file.seek(sample * len(row))


def _bytes_of(rows):
    """Rows [n, ...] of a CPU tensor as n views of their bytes."""
    return [memoryview(row).cast("B") for row in rows.flatten(1).view(torch.uint8).numpy()]


def _fill(file, row):
    """Read as many bytes as the row has; False if the file ends before."""
    done = 0
    while done < len(row):
        count = file.readinto(row[done:])
        if not count:
            return False
        done += count
    return True

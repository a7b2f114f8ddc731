"""What is kept for each sample between steps: contexts of Phase 1, and what the head reads of a frozen map.

Rows lie in memory, or in files where they would take more of it than `context_memory_mb`. A file is read and
written, not mapped: the pages of a mapping would count as memory of this process.
Shapes: N samples, B sequences, T tokens, C context width, E embedding width.
"""

import contextlib
import os
import tempfile
import zlib
from pathlib import Path

import torch

from newllm.clock import timed
from newllm.errors import UserError
from newllm.evaluate import SEQUENCES_AT_A_TIME, trajectories
from newllm.fixed_point.losses import covariance
from newllm.training.runtime import STORAGE_DTYPE

FILES = "contexts_*.bin"  # only Phase 1 needs them
LOST = (
    "warning: the files with the stored contexts are gone, damaged or of another number of processes: "
    "contexts are computed again, and this run no longer ends with the bits of one that never stopped"
)
SAMPLES_AT_A_TIME = 32  # that are copied from one place to another
WHITENING_FLOOR = 1e-3  # of the mean variance: directions with less are left as small as they are
WHITENING_TOKENS = 100_000


class SampleStore:
    """[count, *shape] on `device`, all zeros at first. Reading and writing take an int64 tensor of indices.

    Args:
        path: a file that may already hold rows; a folder for a file without a name, which ends with the
            process; None for memory.

    Attributes:
        rows: the tensor itself, in memory; None in a file.
        digests: CRC-32 of each row in a file, -1 where none has been written: int64 [count].

    Raises:
        UserError: by reading and writing too, when the file refuses.
    """

    def __init__(self, count, shape, dtype, device, path=None):
        self.shape, self.dtype, self.device, self.path = tuple(shape), dtype, device, path
        self.digests, self.rows = torch.full((count,), -1), None
        if path is None:
            self.rows = torch.zeros(count, *self.shape, dtype=dtype, device=device)
            return
        with self._said():
            if Path(path).is_dir():
                self._file = tempfile.TemporaryFile(dir=path)  # noqa: SIM115, open as long as the store
            else:
                self._file = open(path, "r+b" if os.path.exists(path) else "w+b")  # noqa: SIM115

    def __len__(self):
        return len(self.digests)

    @timed("fetching rows")
    def __getitem__(self, samples):
        if self.rows is not None:
            return self.rows[samples.to(self.device, non_blocking=True)]
        rows = torch.zeros(len(samples), *self.shape, dtype=self.dtype)
        with self._said():
            for sample, row in zip(samples.tolist(), _bytes_of(rows), strict=True):
                if self.digests[sample] >= 0:
                    self._file.seek(sample * len(row))
                    self._file.readinto(row)
        return rows.to(self.device, non_blocking=True)

    @timed("fetching rows")
    def __setitem__(self, samples, rows):
        if self.rows is not None:
            self.rows[samples.to(self.device, non_blocking=True)] = rows.to(self.device, self.dtype)
            return
        digests = []
        with self._said():
            for sample, row in zip(samples.tolist(), _bytes_of(rows.to("cpu", self.dtype)), strict=True):
                self._file.seek(sample * len(row))
                self._file.write(row)
                digests.append(zlib.crc32(row))
            self._file.flush()
        self.digests[samples] = torch.tensor(digests, dtype=torch.int64)

    def adopt(self, digests):
        """Take over the rows that the file holds; whether each is the one that its digest was made of."""
        self.digests.copy_(digests)
        (row,) = _bytes_of(torch.zeros(1, *self.shape, dtype=self.dtype))
        for sample in (digests >= 0).nonzero().flatten().tolist():
            self._file.seek(sample * len(row))
            if self._file.readinto(row) < len(row) or zlib.crc32(row) != digests[sample]:
                return False
        return True

    def forget(self):
        """As if nothing had been written to the file."""
        self.digests.fill_(-1)

    def sync(self):
        """Onto the disk, so that a state saved afterwards can rely on it."""
        if self.rows is None:
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _said(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"contexts cannot be kept in files at {self.path} ({error.strerror or error}): mend that, or "
                "raise --context_memory_mb, and run again to continue from the last checkpoint."
            ) from error


def _bytes_of(rows):
    """Rows [n, ...] of a CPU tensor as n arrays of their bytes, sharing its memory where it is contiguous."""
    return rows.contiguous().flatten(1).view(torch.uint8).numpy()


def in_files(values, dtype, memory_mb):
    """Whether so many values of a type take more memory than is allowed, and lie in files instead."""
    return values * dtype.itemsize > memory_mb * 1e6


class StoredContexts:
    """Contexts of the samples that this process owns: what a sweep of Phase 1 reads, and what it makes.

    An iteration touches each sample once, so in memory the new contexts take the place of the old ones. In
    files they do not: an iteration reads one file and writes the other. So what the last saved state needs
    is still there when a process is killed, and a checkpoint carries only the rows' checksums.

    Args:
        num_samples: N. width: C. settings: newllm.config.SharedSettings.
        folder: where files lie if contexts are in files.
    """

    def __init__(self, num_samples, width, settings, runtime, folder):
        self.runtime, self.group, self.num_samples = runtime, runtime.group, num_samples
        self.own, self.turns = self.group.owned(torch.arange(num_samples)), 0
        self.folder, self.shape = Path(folder), (settings.max_seq_length, width)
        values = num_samples * settings.max_seq_length * width
        self.in_files = in_files(values, runtime.storage_dtype, settings.context_memory_mb)
        self._named = self.in_files and settings.save_checkpoint  # else nobody comes back for the files
        if self._named:
            self._stores = self._named_stores(runtime.precision)
        elif self.in_files:
            self._stores = [self._store(runtime.precision, folder) for _ in range(2)]
        else:
            self._stores = [self._store(runtime.precision, None)] * 2

    def _store(self, precision, path):
        return SampleStore(len(self.own), self.shape, STORAGE_DTYPE[precision], self.runtime.device, path)

    def _named_stores(self, precision):
        """Both files. Named by their type: contexts in another must not overwrite those of the last state."""
        names = [f"contexts_{self.group.rank}_{number}_{precision}.bin" for number in range(2)]
        return [self._store(precision, self.folder / name) for name in names]

    def _ordered(self, stores):
        """(what the iteration in hand starts from, where it puts what it makes)."""
        return (stores[1], stores[0]) if self.turns % 2 else (stores[0], stores[1])

    def __getitem__(self, samples):
        """What a sweep over samples [b] of this process starts from: [b, T, C]."""
        old, _ = self._ordered(self._stores)
        return old[samples // self.group.size]

    def __setitem__(self, samples, contexts_bTC):
        _, new = self._ordered(self._stores)
        new[samples // self.group.size] = contexts_bTC

    def turn(self):
        """The iteration is complete: what it made is what the next one starts from."""
        self.turns += 1
        self._ordered(self._stores)[1].forget()

    def first(self, count):
        """Contexts of the first samples [count, T, C], whoever owns them."""
        return self._of_all(torch.arange(count), self.__getitem__)

    def state(self):
        """For a checkpoint: all contexts [N, T, C], or the checksums of their rows in both files [2, N]."""
        samples = torch.arange(self.num_samples)
        if not self.in_files:
            rows = self._stores[0].rows  # not by indices, which would copy them
            return rows if self.group.size == 1 else self._of_all(samples, self.__getitem__)
        digests = [
            self._of_all(samples, lambda own, store=store: store.digests[own // self.group.size])
            for store in self._stores
        ]
        written = {"turns": self.turns, "processes": self.group.size, "precision": self.runtime.precision}
        return {"digests": torch.stack(digests), **written}

    def restore(self, saved, recomputed, note):
        """Continue from what `state` returned, with contexts in memory or in files, then and now.

        Args:
            recomputed: function of samples [b] that gives their contexts, by the model's weights as they are.
            note: takes a line when files are not what they were, so that contexts are computed again.
        """
        if isinstance(saved, torch.Tensor):
            self._fill(lambda samples: saved[samples])
            return
        self.turns = saved["turns"]
        same = self._named and saved["precision"] == self.runtime.precision
        stores = self._stores if same else self._named_stores(saved["precision"])
        digests = saved["digests"][:, self.own]
        cut_alike = saved["processes"] == self.group.size
        if not cut_alike or not all(store.adopt(own) for store, own in zip(stores, digests, strict=True)):
            note(LOST)
            for store in stores:
                store.forget()
            self._fill(recomputed)
        elif not same:
            self._fill(lambda samples: self._newest(stores, samples))

    def _newest(self, stores, samples):
        """Of two files: the row that the iteration in hand has made, else the one that it starts from."""
        old, new = self._ordered(stores)
        rows = samples // self.group.size
        made = (new.digests[rows] >= 0).view(-1, 1, 1).to(self.runtime.device)
        return torch.where(made, new[rows], old[rows])

    def sync(self):
        """Files onto the disk, so that a state saved afterwards can rely on them."""
        for store in self._stores:
            store.sync()

    def _fill(self, contexts_of):
        """All own rows of both stores."""
        for samples in self.own.split(SAMPLES_AT_A_TIME):
            contexts = contexts_of(samples)
            for store in self._stores:
                store[samples // self.group.size] = contexts

    def _of_all(self, samples, rows_of):
        own = self.group.owned(samples)
        return self.group.assemble(rows_of(samples[own]), own, len(samples))


class FrozenFeatures:
    """Contexts and token streams of this process's own samples, by a map that no longer changes.

    Args:
        model: the LanguageModel. samples: ids [N, T+1] by name, "train" among them.
        settings: context_memory_mb and whiten_context of the run.
        folder: where files lie if features take more than `context_memory_mb`.
    """

    def __init__(self, model, samples, settings, runtime, folder):
        self.widths = [model.context_dim, model.embed_dim]
        self.size, dtype = runtime.group.size, runtime.storage_dtype
        self._stores = {}
        for name, ids in samples.items():
            own = ids[runtime.group.owned(torch.arange(len(ids)))]
            shape = own.shape[1] - 1, sum(self.widths)
            spilled = in_files(len(own) * shape[0] * shape[1], dtype, settings.context_memory_mb)
            store = SampleStore(len(own), shape, dtype, runtime.device, folder if spilled else None)
            for part in torch.arange(len(own)).split(SEQUENCES_AT_A_TIME):
                made = trajectories(model, own[part], runtime.autocast, runtime.device, dtype)
                store[part] = torch.cat(made, -1)
            self._stores[name] = store
        if settings.whiten_context:
            self._whiten()

    def __call__(self, name, samples):
        """(contexts [B, T, C], streams [B, T, E]) of own samples of "train" or "val" [B]."""
        return self._stores[name][samples // self.size].split(self.widths, dim=-1)

    def _whiten(self):
        """Contexts of covariance I, by the symmetric root of their covariance over training tokens (ZCA)."""
        train = self._stores["train"]
        first = torch.arange(min(len(train), -(-WHITENING_TOKENS // train.shape[0])))
        contexts, _ = self("train", first)
        contexts = contexts.flatten(0, 1).double()
        # On the CPU, as small GPUs have next to no fp64.
        variances, directions = torch.linalg.eigh(covariance(contexts).cpu())
        variances, directions = variances.to(contexts.device), directions.to(contexts.device)
        scale = (variances + WHITENING_FLOOR * variances.mean()).rsqrt()
        mean, whiten = contexts.mean(0), directions * scale @ directions.T
        for store in self._stores.values():
            for part in torch.arange(len(store)).split(SEQUENCES_AT_A_TIME):
                old, streams = store[part].split(self.widths, dim=-1)
                new = ((old.double() - mean) @ whiten).to(old.dtype)
                store[part] = torch.cat([new, streams], -1)

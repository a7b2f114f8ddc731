"""The contexts of all training samples between the batches of Phase 1: what a sweep starts from, and what it makes.

An iteration touches each sample once, so in memory the new contexts take the place of the old ones. In files they do not: an
iteration reads one file and writes the other. So what the last saved state needs is still there when a process is killed,
and a checkpoint carries only the rows' checksums.
"""

from pathlib import Path

import torch

from newllm.evaluate import trajectories
from newllm.training.runtime import STORAGE_DTYPE
from newllm.training.sample_store import SampleStore

FILES = "contexts_*.bin"  # only Phase 1 needs them
LOST = (
    "warning: the files with the stored contexts are gone, damaged or of another number of processes: contexts are computed "
    "again, and this run no longer ends with the bits of one that never stopped"
)


def contexts_in_files(config, dtype):
    """Whether the contexts of all training samples take more than the configuration allows in memory."""
    return config.train_tokens * config.context_dim * dtype.itemsize > config.context_memory_mb * 1e6


class StoredContexts:
    """Contexts of the samples that this process owns; zeros at first.

    Args:
        data, config, runtime: of the run. folder: where files lie if contexts are in files.
    """

    def __init__(self, data, config, runtime, folder):
        self.group, self.num_samples = runtime.group, len(data.train)
        self.own, self.turns = self.group.owned_of(self.num_samples), 0
        self.folder, self.precision = Path(folder), runtime.precision
        self.paths = self._paths(self.precision)
        shape = config.max_seq_length, config.context_dim
        self._described = len(self.own), shape, runtime.storage_dtype, runtime.device
        self.in_files = contexts_in_files(config, runtime.storage_dtype)
        if self.in_files:
            places = (
                self.paths if config.save_checkpoint else (folder, folder)
            )  # unsaved, they are nobody's but ours
            self._stores = [SampleStore(*self._described, place) for place in places]
        else:
            self._stores = [SampleStore(*self._described)] * 2

    def _paths(self, precision):
        """Of both files, of FILES. Named by their type: contexts in another must not overwrite those of the last saved state."""
        return [self.folder / f"contexts_{self.group.rank}_{number}_{precision}.bin" for number in range(2)]

    @property
    def _old(self):
        return self._stores[self.turns % 2]

    @property
    def _new(self):
        return self._stores[(self.turns + 1) % 2]

    def __getitem__(self, samples):
        """What a sweep over samples [b] of this process starts from: [b, T, C]."""
        return self._old[samples // self.group.size]

    def __setitem__(self, samples, contexts_BTC):
        self._new[samples // self.group.size] = contexts_BTC

    def turn(self):
        """The iteration is complete: what it made is what the next one starts from."""
        self.turns += 1
        if self.in_files:
            self._new.forget()

    def first(self, count):
        """Contexts of the first samples [count, T, C], whoever owns them."""
        return self._of_all(torch.arange(count), self.__getitem__)

    def state(self):
        """For a checkpoint: all contexts [N, T, C], or the checksums of their rows in both files [2, N] and which is which."""
        samples = torch.arange(self.num_samples)
        if not self.in_files:
            return self._old.rows if self.group.size == 1 else self._of_all(samples, self.__getitem__)
        digests = [
            self._of_all(samples, lambda own, s=s: s.digests[own // self.group.size]) for s in self._stores
        ]
        written = {"turns": self.turns, "processes": self.group.size, "precision": self.precision}
        return {"digests": torch.stack(digests), **written}

    def restore(self, saved, model, data, runtime, note):
        """Continue from what `state` returned: contexts in memory or in files, then and now, and of any type then.

        Args:
            note: takes a line when files are not what they were and contexts have to be computed again, step by step with
                the model's weights as they are.
        """
        if isinstance(saved, torch.Tensor):
            self._fill(lambda samples: saved[samples])
            return
        self.turns = saved["turns"]
        precision = saved.get("precision", self.precision)
        paths = self._paths(precision)
        shared = self.in_files and self._stores[0].path == paths[0]
        described = *self._described[:2], STORAGE_DTYPE[precision], runtime.device
        stores = self._stores if shared else [SampleStore(*described, path) for path in paths]
        known = (
            "precision" in saved and saved["processes"] == self.group.size
        )  # else nobody knows what the bytes mean
        digests = saved["digests"][:, self.own] if known else None
        if digests is None or not all(store.adopt(each) for store, each in zip(stores, digests, strict=True)):
            note(LOST)
            for store in stores:
                store.forget()
            how = runtime.autocast, runtime.device, runtime.storage_dtype
            self._fill(lambda samples: trajectories(model, data.train[samples], *how)[0])
        elif not shared:
            old, new = stores[self.turns % 2], stores[(self.turns + 1) % 2]
            made = (new.digests >= 0).view(-1, 1, 1)

            def newest(samples):
                rows = samples // self.group.size
                return torch.where(made[rows].to(runtime.device), new[rows], old[rows])

            self._fill(newest)

    def sync(self):
        """Files onto the disk, so that a state saved afterwards can rely on them."""
        for store in self._stores:
            store.sync()

    def close(self):
        for store in self._stores:
            store.close()

    def _fill(self, contexts_of):
        """All own rows of both stores, 32 samples at a time."""
        for samples in self.own.split(32):
            contexts = contexts_of(samples)
            for store in self._stores:
                store[samples // self.group.size] = contexts

    def _of_all(self, samples, rows_of):
        mine = self.group.owned(samples)
        return self.group.assemble(rows_of(samples[mine]), mine, len(samples))

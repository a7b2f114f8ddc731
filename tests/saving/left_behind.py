"""Faults of a disk, and what a run left: weights, the bytes of its states, temporary files."""

import builtins
import os
from pathlib import Path

import torch

from newllm.saving.files import load_sealed

SHORT = {"phase2_epochs": 1, "save_every_n_batches": 10**6}  # settings of a run with few saves


class Watched:
    """A file object that calls `before` with the data ahead of each write."""

    def __init__(self, file, before):
        self.file, self.before = file, before

    def write(self, data):
        self.before(data)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


class Faults:
    """Faults in a folder: `before(operation, path, bytes)` comes before "open MODE", "write", "name"."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.before = f"{folder}/", lambda operation, path, size: None
        self.open = builtins.open
        monkeypatch.setattr(builtins, "open", self._open)
        for name in ("replace", "link"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))

    def _open(self, path, mode="r", *args, **kwargs):
        if not str(path).startswith(self.folder):
            return self.open(path, mode, *args, **kwargs)
        self.before(f"open {mode}", Path(path), 0)
        file = self.open(path, mode, *args, **kwargs)
        return (
            file if mode == "rb" else Watched(file, lambda data: self.before("write", Path(path), len(data)))
        )

    def _naming(self, real):
        def name(source, target, **kwargs):
            if str(target).startswith(self.folder):
                self.before("name", Path(target), 0)
            return real(source, target, **kwargs)

        return name


def refuse(number, path):
    raise OSError(number, os.strerror(number), str(path))


def same_weights(one, other):
    """Whether the latest states in the folders of two configurations hold equal weights."""
    first, second = (
        load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["model_state_dict"]
        for config in (one, other)
    )
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def content(config):
    """Bytes of each checkpoint file by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(config.checkpoint_dir).glob("model_*.pt"))}


def temporary_files(config):
    return [path.name for path in Path(config.checkpoint_dir).iterdir() if path.name.endswith(".tmp")]

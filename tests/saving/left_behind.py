"""A file whose writes are watched, and what a run left: weights, the bytes of its states, temporary files."""

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

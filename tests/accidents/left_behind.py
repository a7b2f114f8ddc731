"""What a run left in its checkpoint folder: weights, the bytes of its states, temporary files."""

from pathlib import Path

import torch

from newllm.saving.files import load_sealed


def weights(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["model_state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def content(config):
    """Bytes of each checkpoint file by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(config.checkpoint_dir).glob("model_*.pt"))}


def temporary_files(config):
    return [path.name for path in Path(config.checkpoint_dir).iterdir() if path.name.endswith(".tmp")]

"""What a run left in its checkpoint folder: weights, the bytes of its states, temporary files."""

from pathlib import Path

import torch

from newllm.saving.files import load_sealed

SHORT = {"phase2_epochs": 1, "save_every_n_batches": 10**6}  # settings of a run with few saves


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

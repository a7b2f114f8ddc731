"""What a saved state is made of besides the stage's own figures: copies of tensors, and where the run comes from."""

import platform
import subprocess
from pathlib import Path

import torch

from newllm import __version__


def snapshot(value):
    """The same structure with copies of all tensors, on the CPU, so that training may go on changing its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    return [snapshot(part) for part in value] if isinstance(value, list | tuple) else value


def largest_state_bytes(model, train_tokens, context_dtype):
    """Size of a state of Phase 1: weights, two moments of each, and the contexts."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.trained_state().values())
    return 3 * weights + train_tokens * model.context_dim * context_dtype.itemsize


def provenance():
    """Versions and the commit of the code that runs (None outside a checkout)."""
    versions = {"newllm": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return {"versions": versions, "git_commit": None}
    return {"versions": versions, "git_commit": found.stdout.strip() or None}

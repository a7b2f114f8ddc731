"""What a saved state is made of besides the stage's own figures: copies of tensors, and where the run comes from."""

import platform
import shutil
import subprocess
from pathlib import Path

import torch

from newllm import __version__
from newllm.errors import UserError
from newllm.training.contexts import contexts_in_files

STAGE_NAMES = {"untrained": "the untrained row", "phase1": "Phase 1", "phase2": "Phase 2"}
STATES_ON_DISK = 5  # latest, previous, end of an epoch, end of Phase 1, and the one being written


def snapshot(value):
    """The same structure with copies of all tensors, on the CPU, so that training may go on changing its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    return [snapshot(part) for part in value] if isinstance(value, list | tuple) else value


def place(content):
    """Where a saved state goes on, in words, e.g. "in Phase 2, epoch 12, batch 14 of 30 (sample 416 of 960), step 344".

    Args:
        content: of a checkpoint: its `stage`, its `position` (None between two stages) and its `step`.
    """
    stage, at, counter = (
        content["stage"],
        content["position"],
        "iteration" if content["stage"] == "phase1" else "epoch",
    )
    if stage == "complete":
        where = "at its end"
    elif not at:
        where = f"at the beginning of {STAGE_NAMES[stage]}"
    elif at["sample"] == at["samples"]:
        where = f"in {STAGE_NAMES[stage]}, {counter} {at['epoch'] + 1}, its validation"
    elif at["epoch"] >= at["epochs"] and not at["sample"]:
        where = f"in {STAGE_NAMES[stage]}, after {counter} {at['epoch']}"
    else:
        where = f"in {STAGE_NAMES[stage]}, {counter} {at['epoch'] + 1}, batch {at['batch'] + 1} of {at['batches']} "
        where += f"(sample {at['sample']} of {at['samples']})"
    return f"{where}, step {content['step']}"


def disk_bytes(model, config, context_dtype):
    """(bytes of the largest state, that of Phase 1: weights, two moments of each, contexts; bytes of the files beside it)."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.trained_state().values())
    contexts = config.train_tokens * config.context_dim * context_dtype.itemsize
    if contexts_in_files(config, context_dtype):
        return 3 * weights, 2 * contexts
    return 3 * weights + contexts, 0


def require_space(folder, model, config, context_dtype):
    """Refuse to begin what the disk cannot hold.

    Raises:
        UserError: the folder has too little room for the checkpoints and files of a run.
    """
    state, beside = disk_bytes(model, config, context_dtype)
    files = map(Path.stat, Path(folder).glob("model_*.pt"))
    present = {(stat.st_dev, stat.st_ino): stat.st_size for stat in files}  # hard links count once
    needed = STATES_ON_DISK * state + beside - sum(present.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and the checkpoints of this run need about {needed / 1e9:.2f} GB "
            "more: make room, choose another --checkpoint_dir, or train with --no-save_checkpoint."
        )


def provenance():
    """Versions and the commit of the code that runs (None outside a checkout)."""
    versions = {"newllm": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, encoding="utf-8", timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"versions": versions, "git_commit": None}
    return {"versions": versions, "git_commit": found.stdout.strip() or None}

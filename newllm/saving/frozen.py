"""Tensors that no training changes: stored once, in a file named after its content, and only referred to by checkpoints."""

import hashlib
from pathlib import Path

from newllm.errors import UserError
from newllm.saving.files import Corrupt, load_sealed, save_sealed


def frozen_digest(tensors):
    """SHA-256 (hex) over names, types, shapes and bytes of a dict of CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def frozen_path(folder, digest):
    return Path(folder) / f"model_frozen_{digest[:12]}.pt"


def store_frozen(folder, model):
    """Write the model's frozen tensors unless they are there already.

    Returns:
        Their digest, which a checkpoint carries in their place.
    """
    tensors = {name: tensor.cpu() for name, tensor in model.frozen_state().items()}
    digest = frozen_digest(tensors)
    if tensors and not frozen_path(folder, digest).exists():
        save_sealed(tensors, frozen_path(folder, digest))
    return digest


def load_frozen(folder, model, digest):
    """The frozen tensors that a checkpoint refers to: the model's own if they are the same, else those of the file.

    Raises:
        UserError: they are not the model's and the file is missing, damaged or another.
    """
    own = model.frozen_state()
    if frozen_digest({name: tensor.cpu() for name, tensor in own.items()}) == digest:
        return own
    path = frozen_path(folder, digest)
    try:
        tensors = load_sealed(path)
        if frozen_digest(tensors) != digest:
            raise Corrupt(f"{path} holds other tensors")
    except (Corrupt, FileNotFoundError) as error:
        raise UserError(
            f"the checkpoint's frozen embeddings cannot be read ({error}): put {path.name} back beside it, or start afresh "
            "with --no-load_checkpoint."
        ) from error
    return tensors

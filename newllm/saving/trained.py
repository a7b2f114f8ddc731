"""The weights of a saved run: for the run that continues it, and for who only reads them."""

import hashlib
from pathlib import Path

from newllm.config import EARLIER, Config
from newllm.data.samples import load_data
from newllm.data.tokens import Tokenizer
from newllm.errors import UserError
from newllm.models.baselines import build_model
from newllm.models.pretrained import add_adapter, has_adapter, load_embedding, require_peft, saved_rank
from newllm.saving.files import Corrupt, load_sealed, save_sealed
from newllm.saving.runs import FORMAT, RUNS, choose, newest


def frozen_digest(tensors):
    """SHA-256 (hex) over names, types, shapes and bytes of a dict of CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def frozen_path(folder, digest):
    return Path(folder) / f"model_frozen_{digest[:12]}.pt"


def frozen_of(folder, model, found):
    """The frozen tensors that a state refers to: the model's own if they are the same, else the file's.

    Raises:
        UserError: they are not the model's and the file is missing, damaged or another.
    """
    own = {name: tensor.cpu() for name, tensor in model.frozen_state().items()}
    if found["frozen"] in (frozen_digest(own), frozen_digest({})):
        return own
    path = frozen_path(folder, found["frozen"])
    if not path.exists():  # the run has been moved aside, and the latest at the top is its other name
        path = frozen_path(Path(folder) / RUNS / found["run_id"], found["frozen"])
    try:
        tensors = load_sealed(path)
        if frozen_digest(tensors) != found["frozen"]:
            raise Corrupt(f"{path} holds other tensors")
    except (Corrupt, FileNotFoundError) as error:
        raise UserError(
            f"the checkpoint's frozen embeddings cannot be read ({error}): put {path.name} back beside it, "
            "or start afresh with --no-load_checkpoint."
        ) from error
    return own | tensors


def load_weights(folder, model, found):
    """Give the model the weights of a state, trained and frozen.

    Between the phases contexts may be frozen or not other than before: what Phase 1 leaves alone is then the
    model's own.

    Args:
        folder: where it lies. found: its content.

    Raises:
        UserError: tensors that the state refers to are not there, it does not fit the model, or its adapter
            needs peft.
    """
    state = found["model_state_dict"]
    if has_adapter(state) and not has_adapter(model.state_dict()):
        require_peft()
        add_adapter(model, saved_rank(state))
    weights = frozen_of(folder, model, found) | state
    if "context_embedding" not in model.state_dict():
        weights.pop("context_embedding", None)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # the settings agree, so the file or the code is of another version
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(
            f"the checkpoint in {folder} does not fit the model ({reason}): start afresh with "
            "--no-load_checkpoint."
        ) from error


def save_model(path, model, config, tokenizer, about):
    """A model in one file that needs nothing else: weights, settings, tokenizer, what is known about it.

    Args:
        about: plain values.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "model_state_dict": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "config": config.to_dict(),
        "tokenizer": {"name": tokenizer.name, "text": tokenizer.to_json()},
        **about,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sealed(content, path)


def load_model(found):
    """The model and the tokenizer of a file that save_model has written.

    Args:
        found: its content. On the CPU, in fp32.
    """
    config, tokenizer = Config(**EARLIER | found["config"]), Tokenizer(**found["tokenizer"])
    model = build_model(config, tokenizer.vocab_size)
    model.load_state_dict(found["model_state_dict"])
    return model, tokenizer


def open_model(path, cache_dir=""):
    """The model of a file of save_model, or of a checkpoint, whose tokenizer comes from its run's data.

    Args:
        path: as of open_saved. cache_dir: in place of the run's own.

    Returns:
        (model on the CPU in fp32, tokenizer, content of the file).

    Raises:
        UserError: as open_saved; the run has trained nothing yet, its contexts are whitened, or its data are
            not what they were.
    """
    folder, found = open_saved(path)
    if found.get("stage") == "untrained":
        raise UserError(f"the run in {path} has trained nothing yet: go on with train.py first.")
    if found["config"]["whiten_context"]:
        raise UserError(f"{path} is a control on whitened contexts: it cannot read a new text.")
    if "tokenizer" in found:
        return *load_model(found), found
    config = Config(**EARLIER | found["config"] | ({"cache_dir": cache_dir} if cache_dir else {}))
    data = load_data(config)
    if data.fingerprint != found["data_fingerprint"]:
        raise UserError(f"{path} was trained on other data than {config.data_source} holds now: restore it.")
    vectors = load_embedding(config.embeddings, data.vocab_size, config.embed_dim)
    model = build_model(config, data.vocab_size, vectors)
    load_weights(folder, model, found)
    model.eval()
    return model, data.tokenizer, found


def open_saved(path):
    """The newest whole state of a folder, or that of one file; nothing is touched.

    Returns:
        (its folder, content).

    Raises:
        UserError: there is none that can be read, or it is of another version.
    """
    path = Path(path).resolve()
    try:
        found = newest(path)[0] if path.is_dir() else load_sealed(path)
    except (Corrupt, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give a checkpoint, or the folder that holds them."
        ) from error
    if found is None:
        raise UserError(
            f"there is no whole checkpoint in {path}: run train.py first, or give another folder."
        )
    if found.get("format") not in (FORMAT - 1, FORMAT):
        raise UserError(f"{path} has format {found.get('format')}, this version reads {FORMAT}.")
    return path if path.is_dir() else path.parent, found


def load_trained(config, model, fingerprint):
    """Give the model what the run of these settings has trained so far; its folder is only read.

    A complete run's weights are those of its lowest validation loss.

    Args:
        fingerprint: digest of the data that the settings give.

    Returns:
        A line about the weights; None, with the model untouched, where no such run has trained anything.

    Raises:
        UserError: the folder holds other runs alone, or what cannot be read.
    """
    folder = Path(config.checkpoint_dir).resolve()
    top = newest(folder)[0]
    choice = choose(folder, top, config, fingerprint)
    if not config.load_checkpoint or not (choice.home or choice.lines):
        return None
    if choice.home is None:
        raise UserError(f"{folder} holds other runs: {choice.lines[-1]}.")
    found = newest(choice.home)[0]
    if found["stage"] == "untrained":
        return None
    load_weights(choice.home, model, found)
    return f"{found['epoch']} of run {found['run_id']}, saved {found['saved_at']}"

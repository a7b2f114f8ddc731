"""The weights of a saved run: for the run that continues it, and for who only reads them."""

from pathlib import Path

from newllm.config import EARLIER, Config
from newllm.data.samples import load_data
from newllm.data.tokens import Tokenizer
from newllm.errors import UserError
from newllm.models.baselines import build_model
from newllm.models.pretrained import add_adapter, has_adapter, load_embedding, require_peft, saved_rank
from newllm.saving.checkpoint_files import CheckpointFiles, newest
from newllm.saving.compatibility import FORMAT, READABLE, compare
from newllm.saving.files import Corrupt, load_sealed, save_sealed
from newllm.saving.frozen import load_frozen
from newllm.saving.state import snapshot


def load_weights(files, model, found):
    """Give the model the weights of a state, trained and frozen.

    Args:
        files: the CheckpointFiles of the folder it lies in. found: its content.

    Raises:
        UserError: tensors that the state refers to are not there, it does not fit the model, or its adapter needs peft.
    """
    state = found["model_state_dict"]
    if has_adapter(state) and not has_adapter(model.state_dict()):
        require_peft()
        add_adapter(model, saved_rank(state))
    try:
        model.load_state_dict(load_frozen(files.folder, model, found["frozen"]) | state)
    except RuntimeError as error:  # the settings agree, so the file or the code is of another version
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(
            f"{files.latest} does not fit the model ({reason}): start afresh with --no-load_checkpoint."
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
        "model_state_dict": snapshot(model.state_dict()),
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
    config, tokenizer = Config(**EARLIER | found["config"]), Tokenizer.from_json(**found["tokenizer"])
    model = build_model(config, tokenizer.vocab_size)
    model.load_state_dict(found["model_state_dict"])
    return model, tokenizer


def open_model(path, cache_dir=""):
    """The model of a file that save_model has written, or of a checkpoint, whose tokenizer comes from its run's data or cache.

    Args:
        path: as of open_saved. cache_dir: in place of the run's own.

    Returns:
        (model on the CPU in fp32, tokenizer, content of the file).

    Raises:
        UserError: as open_saved; the run has trained nothing yet, its contexts are whitened, or its data are not what they were.
    """
    files, found = open_saved(path)
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
    model = build_model(
        config, data.vocab_size, load_embedding(config.embeddings, data.vocab_size, config.embed_dim)
    )
    load_weights(files, model, found)
    model.eval()
    return model, data.tokenizer, found


def open_saved(path):
    """The newest whole state of a folder, or that of one file; nothing is touched.

    Returns:
        (CheckpointFiles of its folder, content).

    Raises:
        UserError: there is none that can be read, or it is of another version.
    """
    path = Path(path).resolve()
    files = CheckpointFiles(path if path.is_dir() else path.parent, 0)
    try:
        found = newest(files) if path.is_dir() else load_sealed(path)
    except (Corrupt, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give a checkpoint, or the folder that holds them."
        ) from error
    if found is None:
        raise UserError(
            f"there is no whole checkpoint in {path}: run train.py first, or give another folder."
        )
    if found.get("format") not in READABLE:
        raise UserError(f"{path} has format {found.get('format')}, this version reads {FORMAT}.")
    return files, found


def load_trained(config, model, fingerprint):
    """Give the model what the run of these settings has trained so far; its folder is only read.

    A complete run's weights are those of its lowest validation loss.

    Args:
        fingerprint: digest of the data that the settings give.

    Returns:
        A line about the weights; None, with the model untouched, where no such run has trained anything.

    Raises:
        UserError: there are checkpoints, and none can be read or the newest is of another run.
    """
    files = CheckpointFiles(Path(config.checkpoint_dir).resolve(), 0)
    if not config.load_checkpoint or not files.folder.is_dir():
        return None
    found = newest(files)
    if found is None:
        if any(path.exists() for path in files.states()):
            raise UserError(f"no checkpoint in {files.folder} can be read: put a whole copy in its place.")
        return None
    verdict, reason = compare(found, config, fingerprint, reading=True)
    if verdict == "refuse":
        raise UserError(f"{files.latest} {reason}")
    if verdict == "begin":
        raise UserError(
            f"{files.latest} is of another run ({reason}): give the settings that it was trained with."
        )
    if found["stage"] == "untrained":
        return None
    load_weights(files, model, found)
    return f"{found['epoch']} of run {found['run_id']}, saved {found['saved_at']}"

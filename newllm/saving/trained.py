"""The weights of a saved run: for the run that continues it, and for who only reads them."""

import hashlib
import sys
from pathlib import Path

from newllm.config import EARLIER, Config
from newllm.data.samples import load_data
from newllm.data.tokens import Tokenizer
from newllm.errors import UserError
from newllm.models.baselines import build_model
from newllm.models.pretrained import add_adapter, load_embedding, require_peft, saved_rank
from newllm.retrieval.keys import Keys
from newllm.retrieval.mixture import FORMAT as RETRIEVAL_FORMAT
from newllm.retrieval.mixture import ORDER, Retrieval
from newllm.saving.files import load_sealed, save_sealed
from newllm.saving.runs import FORMAT, newest_state, require_format

RETRIEVAL = "model_retrieval.pt"  # beside the weights: what the model of a complete run looks up


def frozen_tensors(model):
    return {name: tensor.cpu() for name, tensor in model.frozen_state().items()}


def tensors_digest(tensors):
    """SHA-256 (hex) over names, types, shapes and bytes of a dict of CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def frozen_path(folder, digest):
    return Path(folder) / f"model_frozen_{digest[:12]}.pt"


def store_frozen(folder, model):
    """Write what of a model nothing trains, unless it is there; its digest stands for it in every state."""
    tensors = frozen_tensors(model)
    digest = tensors_digest(tensors)
    if tensors and not frozen_path(folder, digest).exists():
        save_sealed(tensors, frozen_path(folder, digest))
    return digest


def frozen_of(folder, model, state):
    """The frozen tensors that a state refers to: the model's own if they are the same, else the file's.

    Raises:
        UserError: they are not the model's and the file is missing or damaged.
    """
    own = frozen_tensors(model)
    if state["frozen"] in (tensors_digest(own), tensors_digest({})):
        return own
    path = frozen_path(folder, state["frozen"])
    try:
        return own | load_sealed(path)
    except OSError as error:
        raise UserError(
            f"the checkpoint's frozen embeddings cannot be read ({error}): put {path.name} back beside it, "
            "or start afresh with --no-load_checkpoint."
        ) from error


def load_weights(folder, model, state):
    """Give the model the weights of a state that lies in a folder, trained and frozen.

    Raises:
        UserError: tensors that the state refers to are not there, it does not fit the model, or its adapter
            needs peft.
    """
    trained = state["model_state_dict"]
    rank = saved_rank(trained)
    if rank and not saved_rank(model.state_dict()):
        require_peft()
        add_adapter(model, rank)
    weights = frozen_of(folder, model, state) | trained
    if "context_embedding" not in model.state_dict():  # Phase 2 need not freeze what Phase 1 did
        weights.pop("context_embedding", None)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # the settings agree, so the file or the code is of another version
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(
            f"the checkpoint in {folder} does not fit the model ({reason}): start afresh with "
            "--no-load_checkpoint."
        ) from error


# What a model looks up


def model_digest(model):
    """SHA-256 (hex) of a model's weights, frozen ones included: whose retrieval a file holds."""
    return tensors_digest({name: tensor.cpu() for name, tensor in model.state_dict().items()})


def retrieval_content(retrieval, model):
    """What a file keeps of a retrieval, and the digest of the model whose it is; None of none."""
    if retrieval is None:
        return None
    state = {name: tensor.cpu() for name, tensor in retrieval.state_dict().items()}
    about = {"description": retrieval.description(), "held_out": retrieval.held_out}
    return {"model": model_digest(model), "state": state, **about}


def filled_retrieval(content, path):
    """The retrieval of such a content, None of None.

    Raises:
        UserError: it is of another version, says the sentence about the path.
    """
    if content is None:
        return None
    try:
        retrieval = Retrieval.described(**content["description"])
        retrieval.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is of another version") from error
    retrieval.held_out = content.get("held_out")
    return retrieval


def retrieval_bytes(config, vocab_size, places):
    """Bytes that a retrieval from so many places of training text takes, at most, in memory or in a file."""
    widths = {"hidden": config.embed_dim, "contexts": config.context_dim}
    keys, sizes = Keys(config.keys, vocab_size, widths), []
    for each in (0, 1):
        retrieval = Retrieval(config.experts, keys, vocab_size, sizes=((each,) * (ORDER - 1), each))
        sizes.append(sum(tensor.nbytes for tensor in retrieval.state_dict().values()))
    return sizes[0] + places * (sizes[1] - sizes[0])


def read_retrieval(folder, digest):
    """The file of what a run's model of such a digest looks up.

    Raises:
        UserError: it is not there, cannot be read, or is of another model or version; the sentence is the
            reason alone, as what to do depends on who asks.
    """
    path = Path(folder) / RETRIEVAL
    try:
        content = load_sealed(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    if not isinstance(content, dict) or content.get("model") != digest:
        raise UserError(f"{path} is of other weights")
    if content["description"].get("format") != RETRIEVAL_FORMAT:
        raise UserError(f"{path} is of another version")
    return content


def save_model(path, model, config, tokenizer, about, retrieval=None):
    """A model in one file that needs nothing else; `about` is what else is known about it, plain values."""
    content = about | dict(
        model_state_dict={name: tensor.cpu() for name, tensor in model.state_dict().items()},
        config=config.to_dict(), tokenizer={"name": tokenizer.name, "text": tokenizer.to_json()},
        retrieval=retrieval_content(retrieval, model), format=FORMAT,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sealed(content, path)


def load_model(content):
    """The model, on the CPU in fp32, and the tokenizer of what save_model has written."""
    config = Config(**EARLIER | content["config"])
    tokenizer = Tokenizer(**content["tokenizer"])
    model = build_model(config, tokenizer.vocab_size)
    model.load_state_dict(content["model_state_dict"])
    return model, tokenizer


def open_saved(path):
    """(folder, content) of the newest whole state in a folder, or of one file; nothing is touched.

    Raises:
        UserError: there is none that can be read, or it is of another version.
    """
    path = Path(path).resolve()
    if path.is_dir():
        content = newest_state(path)
        if content is None:
            raise UserError(f"there is no whole checkpoint in {path}: run train.py first.")
        return path, content
    try:
        content = load_sealed(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read ({reason}): give a checkpoint, or their folder.") from error
    require_format(content, path)
    return path.parent, content


def say_aside(line):
    """What is no answer of a command goes to stderr."""
    print(line, file=sys.stderr)


def predicts(content):
    """Whether the head of a model file or a checkpoint has been trained, so that its predictions count."""
    return content.get("stage") != "phase2" or content["position"] is not None


def open_model(path, cache_dir="", say=say_aside):
    """The model of a file of save_model, or of a checkpoint, whose tokenizer comes from its run's data.

    Args:
        path: as of open_saved. cache_dir: in place of the run's own.
        say: function of the sentence that says so where its head has not been trained.

    Returns:
        (model on the CPU in fp32, for evaluation, tokenizer, content of the file).

    Raises:
        UserError: as open_saved; the run has trained nothing yet, its contexts are whitened, or its data are
            not what they were.
    """
    folder, content = open_saved(path)
    if content.get("stage") == "untrained":
        raise UserError(f"the run in {path} has trained nothing yet: go on with train.py first.")
    if content["config"]["whiten_context"]:
        raise UserError(f"{path} is a control on whitened contexts: it cannot read a new text.")
    if "tokenizer" in content:
        model, tokenizer = load_model(content)
        return model.eval(), tokenizer, content
    config = Config(**EARLIER | content["config"] | ({"cache_dir": cache_dir} if cache_dir else {}))
    data = load_data(config)
    if data.fingerprint != content["data_fingerprint"]:
        raise UserError(f"{path} was trained on other data than {config.data_source} holds now: restore it.")
    vectors = load_embedding(config.embeddings, data.vocab_size, config.embed_dim)
    model = build_model(config, data.vocab_size, vectors)
    load_weights(folder, model, content)
    if not predicts(content):
        say(f"note: {path} has not begun Phase 2, so it predicts by how frequent tokens are")
    return model.eval(), data.tokenizer, content


def open_retrieval(path, model, content, say=say_aside):
    """What the model looks up that `open_model` gave for a path; None where that is nothing.

    Args:
        say: function of the sentence that says why the network answers alone, though its run looks things up.
    """
    config = Config(**EARLIER | content["config"])
    if "tokenizer" not in content and not config.looks_up:
        return None
    path = Path(path).resolve()
    try:
        if "tokenizer" in content:
            return filled_retrieval(content.get("retrieval"), f"what {path} looks up")
        folder = path if path.is_dir() else path.parent
        return filled_retrieval(read_retrieval(folder, model_digest(model)), folder / RETRIEVAL)
    except UserError as error:
        remedy = "give a checkpoint of a run's end, or run train.py to its end, which makes it"
        say(f"note: the network answers alone, as {error}: {remedy}")
        return None

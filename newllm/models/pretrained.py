"""Pretrained token embeddings. They are had or the run stops: a random matrix in their place is another experiment."""

import importlib.util
import json
from pathlib import Path

from newllm.data import hub
from newllm.data.tokens import GPT2, GPT2_REVISION, choose_tokenizer
from newllm.errors import UserError

WORDLLAMA_FILE, WORDLLAMA_TENSOR = "weights/l2_supercat_256.safetensors", "embedding.weight"


def load_embedding(source, vocab_size, embed_dim):
    """Input embedding [V, E] of a pretrained model, or None for "random".

    Args:
        source: "random", "gpt2" (Hugging Face hub or its cache), "wordllama" (the package of that name: vectors of 256
            dimensions, distilled from those of Llama models), or a folder or hub name in transformers' format.
        vocab_size: ids of the tokenizer; rows beyond them, which some models have for speed, are left out.

    Raises:
        UserError: it cannot be had, or its shape is not [vocab_size, embed_dim].
    """
    if source == "random":
        return None
    from safetensors import SafetensorError

    try:
        weight = _read_wordllama() if source == "wordllama" else _read_model(source)
    except (hub.Unreachable, OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"embeddings '{source}' cannot be had ({hub.describe(error)}): give a folder with the weights, connect to the hub, or use "
            "--embeddings random."
        ) from error
    if not weight.isfinite().all() or not weight.any():
        raise UserError(f"embeddings '{source}' are all zeros or not finite: take others.")
    if weight.shape[0] < vocab_size or weight.shape[1] != embed_dim:
        raise UserError(
            f"embeddings '{source}' are {weight.shape[0]:,} x {weight.shape[1]}, the model needs {vocab_size:,} x {embed_dim}: "
            f"set --embed_dim {weight.shape[1]}, and --tokenizer to the one that these embeddings belong to."
        )
    return weight[:vocab_size].float().clone()


def require_own_ids(embeddings, tokenizer):
    """Refuse vectors for ids that stand for other tokens than those they were learned for, however many there are.

    Args:
        embeddings, tokenizer: choices as the settings of these names; tokenizer as `tokenizer_choice` gives it.

    Raises:
        UserError: the tokenizer is not that of the embeddings, or it cannot be known.
    """
    if embeddings in ("random", tokenizer):
        return
    remedy = "use --tokenizer auto, which takes the one they belong to, or --embeddings random"
    if tokenizer != "bpe":
        try:
            theirs, ours = (
                json.loads(choose_tokenizer(choice)[0].to_json())["model"]["vocab"]
                for choice in (embeddings, tokenizer)
            )
        except UserError as error:
            raise UserError(
                f"whether tokenizer and embeddings belong together cannot be known ({error}): {remedy}."
            ) from error
        if ours.items() <= theirs.items():
            return
    raise UserError(
        f"the vectors of embeddings '{embeddings}' belong to its own tokenizer, and tokenizer '{tokenizer}' numbers other "
        f"tokens: {remedy}."
    )


def _read_wordllama():
    from safetensors.torch import load_file

    found = importlib.util.find_spec("wordllama")
    if found is None:
        raise ValueError("its package is missing; pip install newllm[wordllama] brings it")
    return load_file(Path(found.origin).parent / WORDLLAMA_FILE)[WORDLLAMA_TENSOR]


def _read_model(source):
    from transformers import AutoModel

    name = (GPT2, GPT2_REVISION) if source == "gpt2" else (source,)
    model, loading = hub.load_model(AutoModel.from_pretrained, *name, output_loading_info=True)
    layer = model.get_input_embeddings()
    # transformers fills a matrix that the files lack with random numbers, and only warns.
    if any(model.get_parameter(key) is layer.weight for key in loading["missing_keys"]):
        raise ValueError("its files hold no token embedding")
    return layer.weight.detach()

"""What others bring to the model: pretrained token vectors, and low-rank additions to F (peft)."""

import importlib.util
import json
import math
from pathlib import Path

import torch

from newllm.data import hub
from newllm.data.tokens import GPT2, GPT2_REVISION, choose_tokenizer
from newllm.errors import UserError

WORDLLAMA_FILE, WORDLLAMA_TENSOR = "weights/l2_supercat_256.safetensors", "embedding.weight"
RANKS = ((16e9, 4), (24e9, 8), (math.inf, 16))  # below this many bytes of device memory: rank of an adapter
SCALE = 2  # of the additions' product, usual in the field

# Token vectors. They are had or the run stops: a random matrix in their place is another experiment.


def load_embedding(source, vocab_size, embed_dim):
    """Input embedding [V, E] of a pretrained model, or None for "random".

    Args:
        source: "random", "gpt2", "wordllama" (the package: 256 dimensions, out of Llama models), or a folder
            or hub name in transformers' format.
        vocab_size: V; rows beyond these ids, which some models have for speed, are left out.

    Raises:
        UserError: it cannot be had, or its shape is not [vocab_size, embed_dim].
    """
    if source == "random":
        return None
    from safetensors import SafetensorError

    try:
        weight = _read_wordllama() if source == "wordllama" else _read_model(source)
        if not weight.isfinite().all() or not weight.any():
            raise ValueError("its vectors are all zeros or not finite")
    except (hub.Unreachable, OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"embeddings '{source}' cannot be had ({hub.describe(error)}): give a folder with the "
            "weights, connect to the hub, or use --embeddings random."
        ) from error
    rows, width = weight.shape
    if rows < vocab_size or width != embed_dim:
        raise UserError(
            f"embeddings '{source}' are {rows:,} x {width}, the model needs {vocab_size:,} x {embed_dim}: "
            f"set --embed_dim {width}, and --tokenizer to the one that these embeddings belong to."
        )
    return weight[:vocab_size].float().clone()


def _read_wordllama():
    from safetensors.torch import load_file

    package = importlib.util.find_spec("wordllama")
    if package is None:
        raise ValueError("its package is missing; pip install newllm[wordllama] brings it")
    return load_file(Path(package.origin).parent / WORDLLAMA_FILE)[WORDLLAMA_TENSOR]


def _read_model(source):
    from transformers import AutoModel

    name = (GPT2, GPT2_REVISION) if source == "gpt2" else (source,)
    model, loading = hub.load_model(AutoModel.from_pretrained, *name, output_loading_info=True)
    layer = model.get_input_embeddings()
    # transformers fills a matrix that the files lack with random numbers, and only warns.
    if any(model.get_parameter(key) is layer.weight for key in loading["missing_keys"]):
        raise ValueError("its files hold no token embedding")
    return layer.weight.detach()


def require_own_ids(embeddings, tokenizer):
    """Refuse vectors for ids that stand for other tokens than those they were learned for.

    Args:
        embeddings: as the setting. tokenizer: as `tokenizer_choice` gives it.

    Raises:
        UserError: the tokenizer is not that of the embeddings, or one of the two cannot be had.
    """
    if embeddings in ("random", tokenizer):
        return
    # A tokenizer that is trained here always numbers other tokens.
    if tokenizer == "bpe" or not _vocabulary(tokenizer).items() <= _vocabulary(embeddings).items():
        raise UserError(
            f"the vectors of embeddings '{embeddings}' belong to its own tokenizer, and tokenizer "
            f"'{tokenizer}' numbers other tokens: use --tokenizer auto or --embeddings random."
        )


def _vocabulary(choice):
    return json.loads(choose_tokenizer(choice)[0].to_json())["model"]["vocab"]


# Low-rank additions to the matrices of F (LoRA, Hu et al. 2021, arXiv 2106.09685). While they are there they
# alone of F train; merged at the end of training they leave a model like any other.


def require_peft():
    """Raise UserError where the library is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "context_adapter 'lora' needs the package peft: pip install newllm[lora], or leave it out."
        )


def adapter_rank(asked, memory):
    """The rank asked for, or for 0 that of the device's memory in bytes."""
    return asked or next(rank for limit, rank in RANKS if memory < limit)


def saved_rank(state):
    """Rank of the adapter in a state dict; None where there is none."""
    return next((tensor.shape[0] for name, tensor in state.items() if ".lora_A." in name), None)


def add_adapter(model, rank, generator=None):
    """Put additions of a rank beside each `mix` of F, at first of product zero; the rest of F stops training.

    Args:
        generator: torch.Generator to draw from; None where a saved state is loaded next.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for parameter in model.context_parameters():
        parameter.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["mix"])
    inject_adapter_in_model(settings, model.context_map)
    for name, parameter in model.context_map.named_parameters():
        if ".lora_A." in name:  # peft draws from the global generator
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(drawn)
    model.context_map.to(model.embedding.weight.device)


@torch.no_grad()
def merge_adapter(model):
    """Add the products to the matrices they stand beside, in place, and take the additions away."""
    for layer in model.context_map.layers:
        layer.mix.merge()
        layer.mix = layer.mix.get_base_layer()
    for parameter in model.context_parameters():
        parameter.requires_grad_(True)

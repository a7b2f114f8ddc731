"""Pretrained token embeddings. They are had or the run stops: a random matrix in their place is another experiment."""

from newllm.errors import UserError

GPT2_REPOSITORY, GPT2_REVISION = "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"


def load_embedding(source, vocab_size, embed_dim):
    """Input embedding [V, E] of a pretrained model, or None for "random".

    Args:
        source: "random", "gpt2" (Hugging Face hub or its cache), or a folder in transformers' format.

    Raises:
        UserError: it cannot be had, or its shape is not [vocab_size, embed_dim].
    """
    if source == "random":
        return None
    from safetensors import SafetensorError
    from transformers import AutoModel

    name, options = (GPT2_REPOSITORY, dict(revision=GPT2_REVISION)) if source == "gpt2" else (source, {})
    try:
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True, **options)
        layer = model.get_input_embeddings()
        weight = layer.weight.detach().float()
        # transformers fills a matrix that the files lack with random numbers, and only warns.
        if any(model.get_parameter(key) is layer.weight for key in loading["missing_keys"]):
            raise ValueError("its files hold no token embedding")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"embeddings '{source}' cannot be had ({reason}): give a folder with the weights, connect to the hub, or use "
            "--embeddings random."
        ) from error
    if tuple(weight.shape) != (vocab_size, embed_dim):
        raise UserError(
            f"embeddings '{source}' are {weight.shape[0]:,} x {weight.shape[1]}, the model needs {vocab_size:,} x {embed_dim}: "
            "set tokenizer and embed_dim to match."
        )
    return weight.clone()

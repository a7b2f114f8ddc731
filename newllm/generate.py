"""Text from a model, token by token. Kept, whatever the length: the state of the recurrence and, for
retrieval, a window of the text so far.
"""

import torch

from newllm.saving.stop import poll

COLDEST = 1e-6  # a temperature below it would divide by nothing


@torch.inference_mode()
def generate(
    model, prompt_ids, count, seed, temperature=1.0, top_k=0, top_p=1.0, eos_id=None, retrieval=None
):
    """Continue a prompt.

    Args:
        model: a model with `advance`. prompt_ids: list of at least one id. count: tokens, at most.
        temperature: 0 (or below COLDEST) takes the likeliest token, less than 1 prefers likely ones.
        top_k: draw among so many likeliest tokens; 0: all. top_p: draw among the likeliest that have this
            probability together (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the draws. eos_id: id that ends the text, and is not given out; None: none does.
        retrieval: what the model looks up beside its own prediction, also in what it has written; or None.

    Yields:
        Ids, as they are drawn.
    """
    model.eval()
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    narrow, state, unread = _narrowing(temperature, top_k, top_p), None, prompt_ids
    past = retrieval.start(1, device) if retrieval else None
    for _ in range(count):
        for token in unread:
            poll()
            ids = torch.tensor([token], device=device)
            context, stream, state = model.advance(ids, state)
            if retrieval:
                one = ids[:, None], context[:, None], stream[:, None]
                shares, past = retrieval.read(model, *one, past)
                logits = shares[:, 0].log()
            else:
                logits = model.logits(context, stream)
        if temperature < COLDEST:
            token = logits.argmax().item()
        else:
            # On the CPU, where a seed draws the same on every machine.
            shares = narrow(None, logits.float().cpu()).softmax(-1)
            token = torch.multinomial(shares, 1, generator=generator).item()
        if token == eos_id:
            return
        yield token
        unread = [token]


def _narrowing(temperature, top_k, top_p):
    """transformers' filters of logits [1, V], in its own order."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    filters = LogitsProcessorList()
    if temperature not in (0, 1):
        filters.append(TemperatureLogitsWarper(temperature))
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    return filters

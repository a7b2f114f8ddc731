"""Text from a model, token by token. Kept, whatever the length: the state of the recurrence and, for
retrieval, a window of the text so far.
"""

import collections
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from newllm.saving.stop import poll
from newllm.seeding import derived_generator

COLDEST = 1e-6  # a temperature below it would divide by nothing
# Of draws. Colder, what was written is looked up and written again, and the text runs in a circle.
USUAL = dict(temperature=1.0, top_k=0, top_p=0.9)
SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 40
NEXT_TURNS = "\nAssistant:", "\nUser:"  # what the first turn of a dialogue ends before


class State(NamedTuple):
    """What is kept of one text that has been read."""

    recurrent: Any  # what the model's `advance` left; None: nothing read
    past: Any = None  # the text so far, as retrieval keeps it


@torch.inference_mode()
def generate(
    model, prompt_ids, count, seed, temperature=1.0, top_k=0, top_p=1.0, eos_id=None, retrieval=None,
    before=None,
):  # fmt: skip
    """Continue a prompt.

    Args:
        model: a model with `advance`. prompt_ids: list of at least one id. count: tokens, at most.
        temperature: 0 (or below COLDEST) takes the likeliest token, less than 1 prefers likely ones.
        top_k: draw among so many likeliest tokens; 0: all. top_p: draw among the likeliest that have this
            probability together (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the draws. eos_id: id that ends the text, and is not given out; None: none does.
        retrieval: what the model looks up beside its own prediction, also in what it has written; or None.
        before: State of a text that the prompt goes on from, made with the same retrieval.

    Yields:
        Ids, as they are drawn.
    """
    model.eval()
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    *prompt, token = prompt_ids
    state = read(model, torch.tensor(prompt, dtype=torch.int64, device=device), retrieval, before)
    for _ in range(count):
        logits, state = predict(model, torch.tensor([token], device=device), retrieval, state)
        if temperature < COLDEST:
            token = logits.argmax().item()
        else:
            # On the CPU, where a seed draws the same on every machine.
            shares = narrowed(logits[0].float().cpu(), temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(shares, 1, generator=generator).item()
        if token == eos_id:
            return
        yield token


@torch.no_grad()
def read(model, ids, retrieval=None, state=None):
    """The State after a text whose tokens are not to be predicted, ids [T]; arguments as of `generate`."""
    recurrent, past = state or State(None, retrieval and retrieval.start(1, ids.device))
    made = collections.deque(maxlen=retrieval.window if retrieval else 0)
    for token in ids[:, None]:
        poll()
        context, stream, recurrent = model.advance(token, recurrent)
        made.append((context, stream))
    if made:
        contexts, streams = (torch.stack(parts, 1) for parts in zip(*made, strict=True))
        hidden = model.hidden(contexts, streams)
        past = retrieval.remember(ids[None], past, hidden=hidden, contexts=contexts)
    return State(recurrent, past)


@torch.no_grad()
def after(model, ids, contexts, retrieval=None):
    """The State after a text, ids [T], whose contexts [T, C] are there, by sweeps for instance.

    Args:
        model: one with a `step`. retrieval: what it looks up, or None.
    """
    state, past = (contexts[-1:] if len(contexts) else None), None
    if retrieval:
        last = slice(-retrieval.window, None)
        before = functional.pad(contexts, (0, 0, 1, 0))[:-1]
        _, streams = model.step(before[last], model.embed(ids[last]))
        contexts = contexts[last]
        made = {"hidden": model.hidden(contexts, streams)[None], "contexts": contexts[None]}
        past = retrieval.remember(ids[None], retrieval.start(1, ids.device), **made)
    return State(state, past)


@torch.no_grad()
def predict(model, token, retrieval, state):
    """(Logits [1, V], or with retrieval log probabilities, of what follows one more token [1]; the State)."""
    poll()
    context, stream, recurrent = model.advance(token, state.recurrent)
    if retrieval is None:
        return model.logits(context, stream), State(recurrent)
    one = token[:, None], context[:, None], stream[:, None]
    shares, past = retrieval.read(model, *one, state.past)
    return shares[:, 0].log(), State(recurrent, past)


def narrowed(logits, temperature, top_k, top_p):
    """Logits [V] to draw by, -inf where nothing is to be drawn; as transformers' filters, to the bit.

    Their import takes as long as all draws of a small run.
    """
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        rising, ids = logits.sort()
        unlikely = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[-1] = False
        logits = logits.masked_fill(unlikely.scatter(0, ids, unlikely), -torch.inf)
    return logits


def samples(model, data, seed, retrieval=None):
    """How a model goes on with the beginnings of a few held-out dialogues, which the seed chooses.

    `scripts.generate` writes the same from these prompts, with these seeds and length.

    Args:
        data: newllm.data.samples.TokenData. seed: of the choice, and of the draws of the first; one more
            for each of the others, as a weak network goes on much the same from any prompt.
        retrieval: what the model looks up, or None.

    Returns:
        A list of {"prompt": the first turn, as far as its first tokens go, "network": what the network alone
        writes, "retrieval": what it writes with retrieval, None without}.
    """
    tokenizer, made = data.tokenizer, []

    def written(prompt, draws, looked_up):
        ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        drawn = generate(model, ids, NEW_TOKENS, draws, **USUAL, eos_id=tokenizer.eos_id, retrieval=looked_up)
        return tokenizer.decode(drawn)

    chosen = torch.randperm(len(data.val), generator=derived_generator(seed, "samples"))[:SAMPLES]
    for draws, sample in enumerate(data.val[chosen], start=seed):
        prompt = _first_turn(sample.tolist(), tokenizer)
        looked_up = written(prompt, draws, retrieval) if retrieval else None
        made.append({"prompt": prompt, "network": written(prompt, draws, None), "retrieval": looked_up})
    return made


def _first_turn(ids, tokenizer):
    """The text of a sample's first ids, without half a character at its end, as far as its first turn."""
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    decode = tokenizer.decoder()
    begun = "".join(map(decode, ids[:PROMPT_TOKENS]))
    turn = begun + "".join(map(decode, ids[PROMPT_TOKENS:]))
    for mark in NEXT_TURNS:
        turn = turn.partition(mark)[0]
    return begun[: len(turn)]

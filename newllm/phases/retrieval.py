"""After Phase 2: retrieval is built from the training text and fitted on held-out dialogues.

Nothing is reported on what was fitted: each half of the held-out samples, which are of different dialogues,
is measured with what the other half gave; what is kept is fitted on both.
Shapes: n samples, T tokens, E width of the head's output, C context width, V vocabulary, x experts.
"""

import math

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map

from newllm.evaluate import sample_digest, text_bytes, trajectories
from newllm.retrieval.keys import Keys
from newllm.retrieval.mixture import Retrieval, network_opinion

RIDGE = 1e-4  # keeps the gate from trusting a feature that few places have
STEPS = 60  # of L-BFGS, at most
SAMPLES_AT_A_TIME = 16  # whose logits are held together
STORED_AT_A_TIME = 256


class Reading:
    """What a model makes of samples, a slice of them at a time: what keys are made of, and logits."""

    def __init__(self, model, ids, runtime):
        self.model, self.ids, self.runtime = model, ids, runtime

    @torch.no_grad()
    def __call__(self, part):
        """{"contexts": [b, T, C], "hidden": [b, T, E]} in fp32."""
        contexts, streams = trajectories(
            self.model, self.ids[part], self.runtime.autocast, self.runtime.device
        )
        with self.runtime.autocast():
            hidden = self.model.hidden(contexts, streams)
        return {"contexts": contexts, "hidden": hidden.float()}

    @torch.no_grad()
    def logits(self, hidden):
        """[b, T, V] in fp32."""
        with self.runtime.autocast():
            return functional.linear(hidden, *self.model.output_weights()).float()


def no_reading(part):
    """Without a model: keys are made of the ids alone."""
    return {}


def build(retrieval, train, read):
    """Take in what is looked up of the training text, samples [n, T+1]; `read` is as Reading.

    Returns:
        The retrieval.
    """
    device = retrieval.gate.weight.device
    if "ngram" in retrieval.experts:
        retrieval.ngram.fit(train.numpy())
        retrieval.ngram.to(device)
    first = read(slice(0, STORED_AT_A_TIME))
    retrieval.keys.fit({name: made.flatten(0, 1) for name, made in first.items()})

    def parts():
        for start in range(0, len(train), STORED_AT_A_TIME):
            part = slice(start, start + STORED_AT_A_TIME)
            ids = train[part].to(device).long()
            keys = retrieval.keys(ids[:, :-1], **read(part))
            yield ids[:, :-1].flatten(), keys.flatten(0, 1), ids[:, 1:].flatten()

    if "knn" in retrieval.experts:
        retrieval.store.fill(parts())
    return retrieval


def gather(retrieval, ids, read):
    """(Evidence, the network's opinion or None, targets [n, T]) of samples: what fitting needs."""
    found = []
    for start in range(0, len(ids), SAMPLES_AT_A_TIME):
        part = slice(start, start + SAMPLES_AT_A_TIME)
        own = ids[part].to(retrieval.gate.weight.device).long()
        made, targets, network = read(part), own[:, 1:], None
        if "network" in retrieval.names:
            network = network_opinion(read.logits(made["hidden"]), targets)
        evidence, _ = retrieval.look_up(own[:, :-1], retrieval.start(len(own), own.device), **made)
        found.append((evidence, network, targets))
    return tree_map(lambda *each: None if each[0] is None else torch.cat(each), *found)


def fit(retrieval, evidence, network, targets):
    """Maximum likelihood by L-BFGS: temperatures and fading with a gate that sees nothing, then the gate."""
    votes = [*retrieval.cache.parameters(), *retrieval.knn.parameters()]
    gate = [retrieval.gate.weight, retrieval.gate.bias]
    _maximize(lambda: retrieval(evidence, network, targets)[0], [*votes, gate[1]])
    with torch.no_grad():
        opinions = retrieval.opinions(evidence, network, targets)
    _maximize(lambda: retrieval.mix(opinions)[0], gate)


def _maximize(probability, parameters):
    """Move parameters to where the mean log probability, less a ridge on how far they moved, is largest."""
    begun = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        moved = sum((now - then).square().sum() for now, then in zip(parameters, begun, strict=True))
        value = RIDGE * moved - probability().log().mean()
        value.backward()
        return value

    optimizer.step(loss)


def cross_fitted(retrieval, gathered):
    """What each half of the samples gets from the fit on the other; the retrieval stays as it was.

    Returns:
        (nats of each target [n, T], {expert: mean weight of the gate}).
    """
    begun = {name: parameter.detach().clone() for name, parameter in retrieval.named_parameters()}
    targets = gathered[2]
    samples = torch.arange(len(targets))
    nats, weights = torch.zeros(targets.shape, device=targets.device), 0.0
    for fitted, measured in ((samples[::2], samples[1::2]), (samples[1::2], samples[::2])):
        if len(fitted):
            fit(retrieval, *_taken(gathered, fitted))
        with torch.no_grad():
            probability, gate = retrieval(*_taken(gathered, measured))
        nats[measured] = -probability.log()
        weights += gate.sum((0, 1)) / targets.numel()
        retrieval.load_state_dict(begun, strict=False)
    return nats, dict(zip(retrieval.names, weights.tolist(), strict=True))


def _taken(gathered, samples):
    return tree_map(lambda each: None if each is None else each[samples], gathered)


def measure(retrieval, gathered, ids, token_bytes):
    """Figures of a mixture on samples [n, T+1]: {"loss", "ppl", "bpb", "weights", "by_position" [T]}."""
    nats, weights = cross_fitted(retrieval, gathered)
    nats = nats.double()
    return {
        "loss": nats.mean().item(),
        "ppl": nats.mean().exp().item(),
        "bpb": nats.sum().item() / math.log(2) / text_bytes(ids, token_bytes),
        "weights": weights,
        "by_position": nats.mean(0).tolist(),
        "sample_nats": nats.sum(1).tolist(),
    }


def retrieval_of(model, data, settings, runtime):
    """(Retrieval of a trained model, fitted on all held-out samples; its figures, each half by the other)."""
    read = Reading(model, data.train, runtime)
    keys = Keys(settings.keys, data.vocab_size, {"hidden": model.embed_dim, "contexts": model.context_dim})
    retrieval = Retrieval(settings.experts, keys, data.vocab_size, window=settings.retrieval_window)
    build(retrieval.to(runtime.device), data.train, read)
    gathered = gather(retrieval, data.val, Reading(model, data.val, runtime))
    figures = measure(retrieval, gathered, data.val, data.token_bytes)
    retrieval.held_out = dict(zip(map(sample_digest, data.val), figures["sample_nats"], strict=True))
    fit(retrieval, *gathered)
    return retrieval, figures


def counting(data, settings):
    """Figures of the same retrieval without any network: its keys are the last tokens.

    n-grams are always part of it, as at the first token nothing else has anything to say.
    """
    retrieval = Retrieval(
        ["ngram", *settings.experts],
        Keys(["tokens"], data.vocab_size, {}),
        data.vocab_size,
        network=False,
        window=settings.retrieval_window,
    )
    build(retrieval, data.train, no_reading)
    return measure(retrieval, gather(retrieval, data.val, no_reading), data.val, data.token_bytes)

"""After Phase 2: retrieval is built from the training text and fitted on held-out dialogues.

Nothing is reported on what was fitted: each half of the held-out dialogues is measured with what the other
half gave. Shapes: n samples, T tokens, V vocabulary.
"""

import torch
from torch.utils._pytree import tree_map

from newllm.retrieval.mixture import network_opinion

RIDGE = 1e-3  # keeps the gate from trusting a feature that few places have
STEPS = 60  # of L-BFGS, at most
SAMPLES_AT_A_TIME = 16


def build(retrieval, data, made):
    """Count and store the training text; returns the retrieval.

    Args:
        data: samples `train` [n, T+1]. made: function of a slice of them to what the keys are made of.
    """
    retrieval.ngram.fit(data.train.numpy())
    retrieval.keys.fit(flat(made(slice(0, 256))))

    def parts():
        for start in range(0, len(data.train), 256):
            part = slice(start, start + 256)
            ids = data.train[part].long()
            keys = retrieval.keys(ids[:, :-1], **made(part))
            yield ids[:, :-1].flatten(), keys.flatten(0, 1), ids[:, 1:].flatten()

    retrieval.store.fill(parts())
    return retrieval


def flat(made):
    return {name: tensor.flatten(0, 1) for name, tensor in made.items()}


def gather(retrieval, ids, made, logits=None):
    """(Evidence, the network's opinion or None, targets) of samples, to fit and to measure on."""
    found = []
    for start in range(0, len(ids), SAMPLES_AT_A_TIME):
        part = slice(start, start + SAMPLES_AT_A_TIME)
        targets = ids[part, 1:].long()
        evidence, _ = retrieval.look_up(ids[part, :-1].long(), retrieval.start(len(targets)), **made(part))
        network = network_opinion(logits(part), targets) if logits else None
        found.append((evidence, network, targets))
    return joined(found)


def joined(parts):
    """One tree of several: each tensor joined along the samples."""
    return tree_map(lambda *each: None if each[0] is None else torch.cat(each), *parts)


def taken(tree, samples):
    return tree_map(lambda each: None if each is None else each[samples], tree)


def fit(retrieval, evidence, network, targets):
    """Maximum likelihood by L-BFGS: temperatures and fading with a gate that sees nothing, then the gate.

    Args:
        evidence, network: of samples [n, T], as the mixture takes them. targets: the ids that follow [n, T].
    """
    gate = retrieval.gate

    def unseeing():
        return retrieval(evidence, network, targets)[0]

    _maximize(unseeing, [*retrieval.cache.parameters(), *retrieval.knn.parameters(), gate.bias])
    with torch.no_grad():
        opinions = retrieval.opinions(evidence, network, targets)
    _maximize(lambda: retrieval.mix(opinions)[0], [gate.weight, gate.bias])


def _maximize(probability, parameters):
    """Move parameters to where the mean log probability, less a ridge on how far they moved, is largest."""
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        moved = sum((p - s).square().sum() for p, s in zip(parameters, start, strict=True))
        value = RIDGE * moved - probability().log().mean()
        value.backward()
        return value

    optimizer.step(loss)


def measure(retrieval, evidence, network, targets):
    """Nats [n, T] of each target and mean gate weights, each half of the samples by what the other gave."""
    start = {name: tensor.clone() for name, tensor in retrieval.named_parameters()}
    samples = torch.arange(len(targets))
    nats, gate = torch.zeros(targets.shape), 0
    for fitted, others in ((samples[::2], samples[1::2]), (samples[1::2], samples[::2])):
        retrieval.load_state_dict(start, strict=False)
        fit(retrieval, *taken((evidence, network, targets), fitted))
        with torch.no_grad():
            probability, weights = retrieval(*taken((evidence, network, targets), others))
        nats[others] = -probability.log()
        gate = gate + weights.sum((0, 1)) / targets.numel()
    retrieval.load_state_dict(start, strict=False)
    return nats, dict(zip(retrieval.names, gate.tolist(), strict=True))

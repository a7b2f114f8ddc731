"""After Phase 2: retrieval is built from the training text and fitted on held-out dialogues.

Nothing is reported on what was fitted: each half of the held-out samples, which are of different dialogues,
is measured with what the other half gave; what is kept is fitted on both. Where training samples are held
back for fitting (`fit_share`), all held-out samples are measured with what those gave, and that is kept.
Shapes: n samples, T tokens, E width of the head's output, C context width, V vocabulary, x experts.
"""

import math

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map

from newllm.evaluate import SEQUENCES_AT_A_TIME, sample_digest, text_bytes, trajectories
from newllm.retrieval.keys import SAMPLE, Keys
from newllm.retrieval.mixture import Retrieval, network_opinion
from newllm.saving.stop import poll

STEPS = 60  # of L-BFGS, at most
SAMPLES_AT_A_TIME = SEQUENCES_AT_A_TIME // 16  # whose logits are held together
STORED_AT_A_TIME = SEQUENCES_AT_A_TIME // 4  # whose layers the network holds together


class Reading:
    """What a model makes of samples, a slice of them at a time: what keys are made of, and logits."""

    def __init__(self, model, ids, runtime):
        self.model, self.ids, self.runtime = model.eval(), ids, runtime

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


class Averaged:
    """The same of several models: the mean of their predictions (an ensemble); keys are of the first."""

    def __init__(self, models, ids, runtime):
        self.each = [Reading(model, ids, runtime) for model in models]

    def __call__(self, part):
        made = [read(part) for read in self.each]
        self.hidden = [each["hidden"] for each in made]
        return made[0]

    def logits(self, hidden):
        """Of the part that was read last, in place of its `hidden`: [b, T, V] in fp32."""
        given = [read.logits(each).softmax(-1) for read, each in zip(self.each, self.hidden, strict=True)]
        return (sum(given) / len(given)).log()


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
    _fit_keys(retrieval.keys, train, read)

    def keys():
        for part in _slices(len(train)):
            poll()
            made = retrieval.keys(train[part, :-1].to(device).long(), **read(part))
            yield made.flatten(0, 1)

    if "knn" in retrieval.experts:
        ids, following = (each.flatten().to(device).long() for each in (train[:, :-1], train[:, 1:]))
        retrieval.store.fill(ids, following, keys())
    return retrieval


def _fit_keys(keys, train, read):
    names, first = [name for name in keys.parts if name != "tokens"], []
    samples = min(len(train), -(-SAMPLE // (train.shape[1] - 1)))
    for part in _slices(samples) if names else ():
        made = read(part)
        first.append({name: made[name].flatten(0, 1) for name in names})
    keys.fit({name: torch.cat([made[name] for made in first]) for name in names})


def _slices(count):
    return [slice(at, min(at + STORED_AT_A_TIME, count)) for at in range(0, count, STORED_AT_A_TIME)]


def gather(retrieval, ids, read):
    """(Evidence, the network's opinion or None, targets [n, T]) of samples: what fitting needs."""
    found = []
    for start in range(0, len(ids), SAMPLES_AT_A_TIME):
        poll()
        part = slice(start, start + SAMPLES_AT_A_TIME)
        own = ids[part].to(retrieval.gate.weight.device).long()
        made, targets, network = read(part), own[:, 1:], None
        if "network" in retrieval.names:
            network = network_opinion(read.logits(made["hidden"]), targets)
        evidence, _ = retrieval.look_up(own[:, :-1], retrieval.start(len(own), own.device), **made)
        found.append((evidence, network, targets))
    return tree_map(lambda *each: None if each[0] is None else torch.cat(each), *found)


def fit_fixed(retrieval, evidence, network, targets):
    """Temperatures, fading, and weights of the experts that are the same at every place: those of EM."""
    votes = [*retrieval.cache.parameters(), *retrieval.knn.parameters()]
    _maximize(lambda: retrieval(evidence, network, targets)[0], [*votes, retrieval.gate.bias])


def fit_gate(retrieval, evidence, network, targets):
    """From these weights on, those that depend on what is known at a place."""
    with torch.no_grad():
        opinions = retrieval.opinions(evidence, network, targets)
    _maximize(lambda: retrieval.mix(opinions)[0], [retrieval.gate.weight, retrieval.gate.bias])


FITTING = {"fixed": fit_fixed, "gate": fit_gate}  # in turn, by maximum likelihood


def fit(retrieval, gathered):
    """Fit all that is not counted, to samples as `gather` gives them."""
    for step in FITTING.values():
        step(retrieval, *gathered)


def _maximize(probability, parameters):
    """Move parameters to the likeliest, by a prior of unit variance around where they begin.

    It keeps the gate from trusting a feature that few places have.
    """
    begun = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss():
        poll()
        optimizer.zero_grad()
        moved = sum((now - then).square().sum() for now, then in zip(parameters, begun, strict=True))
        given = probability()
        value = (moved / 2 - given.log().sum()) / given.numel()
        value.backward()
        return value

    optimizer.step(loss)


def cross_fitted(retrieval, gathered, held_back=None):
    """What each half of the samples gets from the fit on the other; the retrieval stays as it was.

    Args:
        gathered, held_back: as of `gather`; with samples held back, all are measured by the fit on those.

    Returns:
        {"fixed", "gate": (nats of each target [n, T], {expert: mean weight})} of the steps of fitting.
    """
    begun = {name: parameter.detach().clone() for name, parameter in retrieval.named_parameters()}
    targets = gathered[2]
    samples = torch.arange(len(targets))
    halves = (samples[::2], samples[1::2]), (samples[1::2], samples[::2])
    pairs = [(_taken(gathered, fitted), measured) for fitted, measured in halves]
    if held_back is not None:
        pairs = [(held_back, samples)]
    nats = {step: torch.zeros(targets.shape, device=targets.device) for step in FITTING}
    weights = dict.fromkeys(FITTING, 0.0)
    for fitted, measured in pairs:
        for step, fit_step in FITTING.items():
            if len(fitted[2]):
                fit_step(retrieval, *fitted)
            with torch.no_grad():
                probability, gate = retrieval(*_taken(gathered, measured))
            nats[step][measured] = -probability.log()
            weights[step] += gate.sum((0, 1)) / targets.numel()
        retrieval.load_state_dict(begun, strict=False)
    names = retrieval.names
    return {step: (nats[step], dict(zip(names, weights[step].tolist(), strict=True))) for step in FITTING}


def _taken(gathered, samples):
    return tree_map(lambda each: None if each is None else each[samples], gathered)


def measure(retrieval, gathered, data, held_back=None):
    """Figures of a mixture on the held-out samples, which are gathered; held_back: as above.

    Returns:
        {"loss", "ppl", "bpb", "weights", "by_position": {last position: nats} of bins, "sample_nats"} with
        the gate, and "fixed": {"ppl", "weights"} with the same weights at every place.
    """
    found = cross_fitted(retrieval, gathered, held_back)
    nats, weights = found["gate"]
    nats = nats.double()
    fixed, fixed_weights = found["fixed"]
    return {
        "loss": nats.mean().item(),
        "ppl": nats.mean().exp().item(),
        "bpb": nats.sum().item() / math.log(2) / text_bytes(data.val, data.token_bytes),
        "weights": weights,
        "by_position": _by_position(nats),
        "sample_nats": nats.sum(1).tolist(),
        "fixed": {"ppl": fixed.double().mean().exp().item(), "weights": fixed_weights},
    }


def _by_position(nats):
    """Means of nats [n, T] over positions 1, 2, 3, 4, 5-6, 7-8, 9-11, ...: {last position: mean}."""
    length = nats.shape[1]
    ends = {min(length, round(2 ** (half / 2))) for half in range(2 * length.bit_length() + 1)}
    first, means = 0, {}
    for end in sorted(ends):
        means[end] = nats[:, first:end].mean().item()
        first = end
    return means


def in_turn(retrieval, gathered, data, held_back=None):
    """Figures of the mixtures of the first expert, the first two, ..., each fitted like the whole.

    Returns:
        {name of the expert added last: {"ppl", "by_position"}}, without the whole.
    """
    figures = {}
    for count in range(1, len(retrieval.names)):
        names = retrieval.names[:count]
        part = Retrieval(names, retrieval.keys, retrieval.vocab_size, "network" in names, retrieval.window)
        part.ngram = retrieval.ngram
        found = measure(part.to(gathered[2].device), gathered, data, held_back)
        figures[names[-1]] = {key: found[key] for key in ("ppl", "by_position")}
    return figures


def retrieval_of(model, data, settings, runtime, parts=False):
    """(Retrieval of a trained model, fitted on all samples it may be; its figures, never on those fitted).

    Args:
        parts: whether the figures have "in_turn" too.
    """
    keys = Keys(settings.keys, data.vocab_size, {"hidden": model.embed_dim, "contexts": model.context_dim})
    retrieval = Retrieval(settings.experts, keys, data.vocab_size, window=settings.retrieval_window)
    retrieval.to(runtime.device)
    gathered, held_back = _built(retrieval, data, lambda ids: Reading(model, ids, runtime))
    figures = measure(retrieval, gathered, data, held_back)
    if parts:
        figures["in_turn"] = in_turn(retrieval, gathered, data, held_back)
    retrieval.held_out = dict(zip(map(sample_digest, data.val), figures["sample_nats"], strict=True))
    fit(retrieval, held_back or gathered)
    return retrieval, figures


def counting(data, settings):
    """Figures of the same retrieval without any network: its keys are the last tokens."""
    return _without_network(Keys(["tokens"], data.vocab_size, {}), data, settings, lambda ids: no_reading)


def by_contexts(model, data, settings, runtime):
    """Figures of the same retrieval whose keys are a model's contexts alone, which predict nothing else."""
    keys = Keys(["contexts"], data.vocab_size, {"contexts": model.context_dim}).to(runtime.device)
    return _without_network(keys, data, settings, lambda ids: Reading(model, ids, runtime), runtime.device)


def _without_network(keys, data, settings, reading, device="cpu"):
    """n-grams are always part of it, as at the first token nothing else has anything to say."""
    experts = ["ngram", *settings.experts]
    retrieval = Retrieval(experts, keys, data.vocab_size, network=False, window=settings.retrieval_window)
    gathered, held_back = _built(retrieval.to(device), data, reading)
    return measure(retrieval, gathered, data, held_back)


def _built(retrieval, data, reading):
    """(Held-out samples, those held back from training or None), gathered by a retrieval that is now built.

    Args:
        reading: function of samples that gives a Reading of them.
    """
    build(retrieval, data.train, reading(data.train))
    gathered = gather(retrieval, data.val, reading(data.val))
    if data.held_back is None:
        return gathered, None
    return gathered, gather(retrieval, data.held_back, reading(data.held_back))

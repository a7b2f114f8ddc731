"""Retrieval: the network's prediction mixed with counts, and with what followed places like this one.

    p(w | x_1..t) = sum_i g_i(t) p_i(w | x_1..t),   i in {network, ngram, cache, knn}

Shapes: B texts, T tokens, V vocabulary, K width of a key, n experts, F features of a place.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from newllm.retrieval import lookup
from newllm.retrieval.keys import Keys
from newllm.retrieval.ngram import KneserNey

# Of a description and its tensors. Raise it with every change by which the same ones would predict otherwise:
# of the keys, the counts, the votes or the features of the gate.
FORMAT = 1
EXPERTS = ("ngram", "cache", "knn")
ORDER = 5  # of the n-grams
FEATURES = {"network": 2, "ngram": ORDER, "cache": 3, "knn": 2}
AT_ONCE = 256  # tokens of a long text that are looked up together


class Opinion(NamedTuple):
    """What an expert says at each place."""

    probability: torch.Tensor  # of every id [B, T, V], or of one [B, T]
    features: torch.Tensor  # [B, T, F]: what tells how far to trust it
    speaks: torch.Tensor  # bool [B, T]


class Evidence(NamedTuple):
    """What was looked up for places [B, T]."""

    grams: list  # as of KneserNey.contexts
    cache: lookup.Finds
    knn: lookup.Finds
    position: torch.Tensor  # [B, T] tokens of the text so far


class Retrieval(nn.Module):
    """Looks up what has been read.

    Args:
        experts: those beside the network, some of EXPERTS. keys: Keys. vocab_size: V.
        network: whether there is one to mix with.
        window, neighbours: tokens of the text so far, and places of the training text, that are looked up.
        sizes: of the counts and the store that `load_state_dict` will bring: (KneserNey.sizes, places).
    """

    held_out = None  # {digest of a sample: nats it got from a fit on others}, once that was measured

    def __init__(self, experts, keys, vocab_size, network=True, window=4096, neighbours=256, sizes=((), 0)):
        super().__init__()
        self.experts = [name for name in EXPERTS if name in experts]
        self.names = ["network"] * network + self.experts
        self.vocab_size, self.window, self.neighbours = vocab_size, window, neighbours
        self.keys = keys
        self.ngram = KneserNey(ORDER, vocab_size, sizes[0])
        self.store = lookup.Store(vocab_size, sizes[1], keys.width)
        self.cache, self.knn = lookup.Votes(fades=True), lookup.Votes(fades=False)
        self.gate = nn.Linear(sum(FEATURES[name] for name in self.names), len(self.names))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def description(self):
        """Plain values from which `described` makes an empty copy, for `load_state_dict` to fill."""
        return {
            "format": FORMAT,
            "experts": self.experts,
            "parts": self.keys.parts,
            "widths": self.keys.widths,
            "vocab_size": self.vocab_size,
            "network": "network" in self.names,
            "window": self.window,
            "neighbours": self.neighbours,
            "sizes": [self.ngram.sizes, len(self.store.following)],
        }

    @classmethod
    def described(cls, parts, widths, vocab_size, experts, format=None, **others):
        """An empty retrieval of a description.

        Raises:
            ValueError: it is of another format, by which its tensors mean something else.
        """
        if format != FORMAT:
            raise ValueError(f"what is looked up has format {format}, this version reads {FORMAT}")
        return cls(experts, Keys(parts, vocab_size, widths), vocab_size, **others)

    def start(self, batch, device=None):
        """The state before the first token of texts."""
        ids = torch.empty(batch, 0, dtype=torch.int64, device=device)
        keys = torch.empty(batch, 0, self.keys.width, device=device)
        return lookup.Past(ids, keys, keys, torch.zeros(batch, dtype=torch.int64, device=device))

    def read(self, model, ids, contexts, streams, past, targets=None):
        """Read tokens on and predict what follows each; keys and mixture are fp32, also under autocast.

        Args:
            model: with `hidden` and `output_weights`. ids: [B, T], below 0: padding on the left.
            contexts, streams: [B, T, C] and [B, T, E], what the model made of them.
            past: as `start` or this function returned it. targets: ids [B, T], or None for all.

        Returns:
            (probabilities of the targets [B, T], or of all ids [B, T, V]; the state after these tokens).
        """
        hidden = model.hidden(contexts, streams)
        logits = functional.linear(hidden, *model.output_weights())
        return self.read_logits(logits, ids, past, targets, hidden=hidden, contexts=contexts)

    def read_logits(self, logits, ids, past, targets=None, **made):
        """The same of a network's logits [B, T, V] at hand; `made`: what keys are made of, [B, T, ...]."""
        with torch.autocast(logits.device.type, enabled=False):
            evidence, past = self.look_up(ids, past, **made)
            probability, _ = self(evidence, network_opinion(logits, targets), targets)
        return probability, past

    @torch.no_grad()
    def look_up(self, ids, past, **made):
        """(Evidence of places [B, T], the state after them); `made`: what keys are made of, [B, T, ...]."""
        count = ids.shape[1]
        near = torch.cat([past.ids[:, 1 - ORDER :], ids], 1)
        keys = self.keys(near, **made)[:, -count:]
        grams = [contexts[:, -count:] for contexts in self.ngram.contexts(near)]
        knn = self.store.nearest(ids, keys, self.neighbours) if "knn" in self.experts else None
        cache = past.find(ids, keys, self.window) if "cache" in self.experts else None
        position = past.length[:, None] + (ids >= 0).cumsum(1)
        return Evidence(grams, cache, knn, position), past.extended(ids, keys, self.window)

    @torch.no_grad()
    def remember(self, ids, past, **made):
        """The state after ids [B, T] whose followers nobody asks for.

        Args:
            past: before them. made: as above, of all T places or of as many of the last as the window has.
        """
        near = torch.cat([past.ids[:, 1 - ORDER :], ids[:, -self.window - ORDER :]], 1)
        with torch.autocast(ids.device.type, enabled=False):
            keys = self.keys(near, **made)[:, -ids.shape[1] :]
        return past.extended(ids, keys, self.window)

    def forward(self, evidence, network=None, targets=None):
        """The mixture.

        Args:
            evidence: of places [B, T]. network: what `network_opinion` gave. targets: ids [B, T], or None.

        Returns:
            (probabilities of the targets [B, T], or of all ids [B, T, V]; the gate's weights [B, T, n]).
        """
        return self.mix(self.opinions(evidence, network, targets))

    def opinions(self, evidence, network=None, targets=None):
        """What each expert says, in the order of `names`; arguments as above."""
        given = [network] if "network" in self.names else []
        return given + [getattr(self, f"_{name}_opinion")(evidence, targets) for name in self.experts]

    def mix(self, opinions):
        """(Mixture, the gate's weights) of opinions; an expert with nothing to say has no weight."""
        features = torch.cat([opinion.features for opinion in opinions], -1)
        speaks = torch.stack([opinion.speaks for opinion in opinions], -1)
        gate = self.gate(features).masked_fill(~speaks, -torch.inf).softmax(-1)
        shares = gate.split(1, -1)
        if opinions[0].probability.dim() < features.dim():
            shares = gate.unbind(-1)
        mixed = sum(share * opinion.probability for share, opinion in zip(shares, opinions, strict=True))
        return mixed, gate

    def _ngram_opinion(self, evidence, targets):
        grams = evidence.grams
        given = self.ngram.over_all(grams) if targets is None else self.ngram.of(targets, grams).float()
        longest = self.ngram.longest(grams)
        which = longest[..., None] == torch.arange(ORDER, device=longest.device)
        return Opinion(given, which.float(), torch.ones_like(longest, dtype=bool))

    def _cache_opinion(self, evidence, targets):
        opinion = self._votes(self.cache, evidence.cache, targets)
        position = evidence.position.clamp_min(1).log() / math.log(self.window)
        return opinion._replace(features=torch.cat([opinion.features, position[..., None]], -1))

    def _knn_opinion(self, evidence, targets):
        return self._votes(self.knn, evidence.knn, targets)

    def _votes(self, votes, finds, targets):
        weights = votes.weights(finds)
        if targets is None:
            given = lookup.over_all(weights, finds, self.vocab_size)
        else:
            given = lookup.of_targets(weights, finds, targets)
        largest, speaks = finds.largest()
        concentration = weights.square().sum(-1)
        return Opinion(given, torch.stack([largest, concentration], -1), speaks)


def network_opinion(logits, targets=None):
    """What a network's logits [B, T, V] say, of the targets [B, T] or of all ids."""
    log_p = logits.float().log_softmax(-1)
    given = log_p.exp()
    entropy = -(given * log_p).sum(-1) / math.log(logits.shape[-1])
    features = torch.stack([entropy, given.amax(-1)], -1)
    if targets is not None:
        given = given.gather(-1, targets[..., None])[..., 0]
    return Opinion(given, features, torch.ones_like(entropy, dtype=torch.bool))

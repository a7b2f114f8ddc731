"""Looking up: places that were like this one, in the text so far and in the training text, and what followed.

How alike two places are is the cosine of their keys. Shapes: B texts, Q places that ask, m places found for
each, N places of the training text, K width of a key, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

ROWS = 8  # questions compared at a time: always as many, as a product of other shape rounds differently
STEPS = 127  # in 8 bits: a value of a key, at most 1, is kept as a whole number of steps of 1 / 127


class Finds(NamedTuple):
    """Places found for each that asks."""

    cosine: torch.Tensor  # [B, Q, m]
    there: torch.Tensor  # bool [B, Q, m]: what is False fills a row up
    following: torch.Tensor  # int [B, 1 or Q, m]: the id after each
    age: torch.Tensor | None = None  # [B, Q, m]: how many tokens back

    def largest(self):
        """(Largest cosine [B, Q], 0 where nothing was found; whether anything was)."""
        any_there = self.there.any(-1)
        largest = self.cosine.masked_fill(~self.there, -1).amax(-1)
        return largest * any_there, any_there


class Votes(nn.Module):
    """What followed the places found: p(w) = sum of the weights of those that w followed.

    The weight is proportional to exp(cosine / temperature - fading * age), and the weights sum to 1 (Grave et
    al. 2017, arXiv 1612.04426; Khandelwal et al. 2020, arXiv 1911.00172). Where nothing was found, all are 0.
    """

    def __init__(self, fades):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.1).log())
        self.log_fading = nn.Parameter(torch.tensor(0.005).log()) if fades else None

    def weights(self, finds):
        """Weights [B, Q, m] of the places found."""
        score = finds.cosine / self.log_temperature.exp()
        if self.log_fading is not None:
            score = score - self.log_fading.exp() * finds.age
        score = score.masked_fill(~finds.there, -torch.inf)
        top = score.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).min)
        weights = (score - top).exp()  # of the best place 1, of a row without any 0
        return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)


def of_targets(weights, finds, targets):
    """Probability [B, Q] of one id [B, Q] at each place."""
    return (weights * (finds.following == targets[..., None])).sum(-1)


def over_all(weights, finds, vocab_size):
    """Probabilities [B, Q, V] of every id at each place."""
    following = finds.following.long().clamp_min(0).expand_as(weights)
    return weights.new_zeros(*weights.shape[:2], vocab_size).scatter_add(-1, following, weights)


class Past(NamedTuple):
    """The text so far, as far back as it is looked up; an id below 0 is padding."""

    ids: torch.Tensor  # [B, M]
    keys: torch.Tensor  # [B, M, K]
    length: torch.Tensor  # [B] tokens read, however far back

    def extended(self, ids, keys, window):
        """The text with the next ids [B, Q] and their keys [B, Q, K]."""
        ids, keys = torch.cat([self.ids, ids], 1), torch.cat([self.keys, keys], 1)
        added = (ids[:, self.ids.shape[1] :] >= 0).sum(1)
        return Past(ids[:, -window:], keys[:, -window:], self.length + added)

    def find(self, ids, keys, window):
        """What the next ids [B, Q] with keys [B, Q, K] find, at most `window` tokens back."""
        count = ids.shape[1]
        ids, known = torch.cat([self.ids, ids], 1), torch.cat([self.keys, keys], 1)
        place = torch.arange(ids.shape[1], device=ids.device)
        age = place[-count:, None] - place
        there = ((age > 0) & (age <= window))[None] & (ids >= 0)[:, None]
        following = functional.pad(ids[:, 1:], (0, 1), value=-1)[:, None]
        return Finds(keys @ known.transpose(1, 2), there, following, age.float().expand(len(ids), -1, -1))


class Store(nn.Module):
    """Every place of the training text, sorted by its token: only places of the same token are compared.

    Args:
        vocab_size: V. size: places N. width: of a key, K.
    """

    def __init__(self, vocab_size, size, width):
        super().__init__()
        self.register_buffer("rounded", torch.zeros(size, width, dtype=torch.int8))  # keys, in STEPS
        self.register_buffer("following", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("starts", torch.zeros(vocab_size + 1, dtype=torch.int64))

    def fill(self, parts):
        """Take in the training text; returns self.

        Args:
            parts: of the samples, each (ids [n], keys [n, K], ids that follow [n]).
        """
        parts = ((i, (k * STEPS).round().to(torch.int8), f) for i, k, f in parts)
        ids, rounded, following = map(torch.cat, zip(*parts, strict=True))
        order = ids.argsort(stable=True)
        self.rounded, self.following = rounded[order], following[order].int()
        counts = torch.bincount(ids, minlength=len(self.starts) - 1)
        self.starts = functional.pad(counts.cumsum(0), (1, 0))
        return self

    def nearest(self, ids, keys, count):
        """The `count` places with the largest cosine to each of keys [B, Q, K] among those of its token."""
        flat, tokens = keys.flatten(0, 1), ids.flatten()
        cosine = flat.new_zeros(len(flat), count)
        there = torch.zeros_like(cosine, dtype=torch.bool)
        following = torch.zeros_like(cosine, dtype=torch.int32)
        first, last = self.starts[tokens].tolist(), self.starts[tokens + 1].tolist()
        asking = {}
        for row, place in enumerate(zip(first, last, strict=True)):
            asking.setdefault(place, []).append(row)
        for (start, end), rows in asking.items():
            if end <= start:  # not in the training text, or padding
                continue
            known, kept = self.rounded[start:end].float() / STEPS, min(count, end - start)
            for some in torch.tensor(rows, device=flat.device).split(ROWS):
                asked = functional.pad(flat[some], (0, 0, 0, ROWS - len(some)))
                found, place = (asked @ known.T)[: len(some)].topk(kept)
                cosine[some, :kept], there[some, :kept] = found, True
                following[some, :kept] = self.following[place + start]
        shape = *ids.shape, count
        return Finds(cosine.view(shape), there.view(shape), following.view(shape))

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
BLOCK = 1 << 14  # places compared at a time
TOGETHER = 64  # keys of the text so far that are joined to the older ones at once


class Finds(NamedTuple):
    """Places found for each that asks."""

    cosine: torch.Tensor  # [B, Q, m]
    there: torch.Tensor  # bool [B, Q, m]: what is False fills a row up
    following: torch.Tensor  # int [B, 1 or Q, m]: the id after each
    age: torch.Tensor | None = None  # [B, Q, m]: how many tokens back

    def largest(self):
        """(Largest cosine [B, Q], 0 where nothing was found; whether anything was)."""
        any_there = self.there.any(-1)
        largest = torch.where(self.there, self.cosine, -1).amax(-1)
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
        score = torch.where(finds.there, score, -torch.inf)
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
    """The text so far, as far back as it is looked up; an id below 0 is padding.

    The keys of the newest tokens lie apart until there are TOGETHER of them: a token then copies few keys.
    """

    ids: torch.Tensor  # [B, M]
    keys: torch.Tensor  # [B, M - r, K] of all but the newest
    newest: torch.Tensor  # [B, r, K]
    length: torch.Tensor  # [B] tokens read, however far back

    def joined(self):
        """The same with all keys [B, M, K] together, none apart."""
        keys = torch.cat([self.keys, self.newest], 1)
        return self._replace(keys=keys, newest=keys[:, :0])

    def extended(self, ids, keys, window):
        """The text with the next ids [B, Q] and their keys [B, Q, K], or those of the last `window` alone."""
        length = self.length + (ids >= 0).sum(1)
        ids = torch.cat([self.ids, ids], 1)[:, -window:]
        newest = torch.cat([self.newest, keys], 1)[:, -window:]
        older = self.keys
        if newest.shape[1] >= TOGETHER:
            older, newest = torch.cat([older, newest], 1), newest[:, :0]
        kept = ids.shape[1] - newest.shape[1]
        return Past(ids, older[:, older.shape[1] - kept :], newest, length)

    def find(self, ids, keys, window):
        """What the next ids [B, Q] with keys [B, Q, K] find, at most `window` tokens back."""
        known = torch.cat([self.ids, ids], 1)
        parts = self.keys, self.newest, keys
        cosine = torch.cat([torch.bmm(keys, part.transpose(1, 2)) for part in parts], -1)
        place = torch.arange(known.shape[1], device=ids.device)
        age = place[-ids.shape[1] :, None] - place
        there = ((age > 0) & (age <= window))[None] & (known >= 0)[:, None]
        following = functional.pad(known[:, 1:], (0, 1), value=-1)[:, None]
        return Finds(cosine, there, following, age.float().expand(len(ids), -1, -1))


def rounded(keys):
    """Keys [..., K] in 8 bits, in STEPS."""
    return (keys * STEPS).round().to(torch.int8)


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

    def fill(self, ids, following, parts):
        """Take in the training text; returns self. Each key is put in its place, and held once.

        Args:
            ids, following: [N] tokens of the places, and those after them.
            parts: keys [n, K], of some places at a time, in their order.
        """
        order = ids.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        self.following = following[order].int()
        counts = torch.bincount(ids, minlength=len(self.starts) - 1)
        self.starts = functional.pad(counts.cumsum(0), (1, 0))
        self.rounded = self.rounded.new_empty(len(order), self.rounded.shape[1])
        done = 0
        for keys in parts:
            self.rounded[place[done : done + len(keys)]] = rounded(keys)
            done += len(keys)
        return self

    def nearest(self, ids, keys, count):
        """The `count` places with the largest cosine to each of keys [B, Q, K] among those of its token."""
        flat, tokens = keys.flatten(0, 1), ids.flatten()
        starts, ends = self.starts[tokens], self.starts[tokens + 1]
        asking = {}
        for row, place in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            asking.setdefault(place, []).append(row)
        if len(flat) == 1 and ends > starts:  # one token of one text: nothing has to be put together
            cosine, following = (found[None] for found in next(self._among(*place, flat, count)))
            return Finds(cosine, torch.ones_like(cosine, dtype=torch.bool), following)
        cosine = flat.new_zeros(len(flat), count)
        following = torch.zeros_like(cosine, dtype=torch.int32)
        for (start, end), rows in asking.items():
            if end <= start:  # not in the training text, or padding
                continue
            rows = torch.tensor(rows, device=flat.device)
            found = self._among(start, end, flat[rows], count)
            for some, (best, after) in zip(rows.split(ROWS), found, strict=True):
                cosine[some, : best.shape[1]], following[some, : best.shape[1]] = best, after
        there = torch.arange(count, device=flat.device) < (ends - starts)[:, None]
        shape = *ids.shape, count
        return Finds(cosine.view(shape), there.view(shape), following.view(shape))

    def _among(self, start, end, asked, count):
        """The best of places start to end for keys [n, K], ROWS at a time: (cosine, id after) [n, m]."""
        blocks = self.rounded[start:end].split(BLOCK)
        if len(blocks) == 1:
            blocks = [blocks[0].float()]
        for own in asked.split(ROWS):
            filled = functional.pad(own / STEPS, (0, 0, 0, ROWS - len(own)))
            cosine = torch.cat([(filled @ block.float().T)[: len(own)] for block in blocks], 1)
            best, place = cosine.topk(min(count, end - start))
            yield best, self.following[start:end][place]

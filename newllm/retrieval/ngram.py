"""Counts of the training text: interpolated modified Kneser-Ney, as a predictor and as an expert.

Shapes: n samples, L predictions per sample, B texts, T tokens, V vocabulary. Samples are integer arrays
[n, L + 1] of ids below V: id t (1..L) is predicted from the ids before it in the same sample; id 0 is context
only. Losses are in nats, float64. Ids are taken as int64: smaller types would wrap around in the keys.
"""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# D1, D2, D3+ where counts of counts cannot give them (few or very regular data), as KenLM falls back to.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
NO_TOKEN = -1  # in place of an id where a text has not begun yet
BEYOND = np.iinfo(np.int64).max  # a key that no n-gram has


def ngram_rows(train_ids, val_ids, vocab_size):
    """Mean validation loss: add-one unigram, Kneser-Ney of order 2 and of order 5, by name."""
    return {
        "unigram": float(unigram_nll(train_ids, val_ids, vocab_size).mean()),
        "bigram": float(KneserNey(2, vocab_size).fit(train_ids).nll(val_ids).mean()),
        "kn": float(KneserNey(5, vocab_size).fit(train_ids).nll(val_ids).mean()),
    }


def unigram_nll(train_ids, val_ids, vocab_size):
    """Losses [n, L] of p(w) = (count of w as predicted token + 1) / (predicted tokens + V)."""
    targets = train_ids[:, 1:]
    counts = np.bincount(targets.ravel(), minlength=vocab_size) + 1
    return -np.log(counts / counts.sum())[val_ids[:, 1:]]


class Level(nn.Module):
    """The k-grams of one length k, of which a prediction reads three columns.

    A k-gram's id is its rank among the keys, a key being (id of the (k-1)-gram context) * V + last token. The
    id -1 is every k-gram not seen: as an index it reaches the last entry of a column, made for it.

    Args:
        size: k-grams m. contexts: (k-1)-grams.
    """

    def __init__(self, size, contexts):
        super().__init__()
        # Ascending, then one that nothing reaches.
        self.register_buffer("keys", torch.full((size + 1,), BEYOND))
        # (count - discount) / count of the context; then 0.
        self.register_buffer("discounted", torch.zeros(size + 1, dtype=torch.float64))
        # Weight of the next shorter context; then 1.
        self.register_buffer("backoff", torch.ones(contexts + 1, dtype=torch.float64))

    def count(self, keys, counts, vocab_size):
        """Fill the columns from ascending keys [m] and their counts [m]; returns self."""
        contexts = keys // vocab_size
        discount = discounts(counts)[np.minimum(counts, 3)]
        # Counts are whole numbers: a total of 0 means no count at all, and 1 there only avoids 0 / 0.
        total = np.bincount(contexts, counts, minlength=len(self.backoff) - 1)
        backoff = np.bincount(contexts, discount, minlength=len(self.backoff) - 1) / np.maximum(total, 1)
        backoff[total == 0] = 1
        self.keys[:-1] = torch.from_numpy(keys)
        self.discounted[:-1] = torch.from_numpy((counts - discount) / np.maximum(total, 1)[contexts])
        self.backoff[:-1] = torch.from_numpy(backoff)
        return self

    def find(self, keys):
        """Ids of k-grams by their keys [...], -1 where one was never seen."""
        index = torch.searchsorted(self.keys, keys)
        return torch.where(self.keys[index] == keys, index, -1)

    @functools.cached_property
    def reached(self):
        """[m + 1]: what all k-grams before one keep together."""
        return functional.pad(self.discounted[:-1].cumsum(0), (1, 0))

    def invert(self, contexts, numbers, vocab_size):
        """Which k-grams of contexts [...] numbers [..., S] in [0, 1) fall on: (their last ids, numbers).

        Id -1: on none of them; the number is then stretched to [0, 1) again, for the next shorter context.
        """
        handed_on = self.backoff[contexts][..., None]
        kept, first = 1 - handed_on, torch.searchsorted(self.keys, contexts * vocab_size)
        found = torch.searchsorted(self.reached, self.reached[first][..., None] + numbers, right=True) - 1
        ids = torch.where(numbers < kept, self.keys[found] % vocab_size, NO_TOKEN)
        return ids, (numbers - kept) / handed_on

    def after(self, contexts, vocab_size):
        """(Which of contexts [n], id of a k-gram of it) of all k-grams of contexts, -1: one never seen."""
        # They lie together in the keys, and nothing lies below key 0.
        first, last = torch.searchsorted(self.keys, torch.stack([contexts, contexts + 1]) * vocab_size)
        if len(contexts) == 1:
            return 0, slice(*torch.cat([first, last]).tolist())
        many = last - first
        row = torch.arange(len(contexts), device=contexts.device).repeat_interleave(many)
        place = torch.arange(len(row), device=row.device) - (many.cumsum(0) - many - first)[row]
        return row, place


class KneserNey(nn.Module):
    """Interpolated modified Kneser-Ney (Chen & Goodman 1998, "An Empirical Study of Smoothing", section 3).

    p_k(w | h) = (c_k(h w) - D_k(c_k)) / sum_v c_k(h v) + backoff_k(h) * p_{k-1}(w | h'), where h' is h
    without its oldest id, and p_0 = 1 / V, so that every id has positive probability.

    The highest level takes raw counts: k = order, or the samples' length where that is less. Lower levels
    take continuation counts: of a k-gram, the number of different ids seen before it. A context that never
    occurred before a token passes the prediction on to the next shorter one.

    Start of a sample: a prediction with only j < order - 1 ids before it is p_{j+1}, the same distribution
    that longer unseen contexts back off to. A k-gram that starts a sample has no id before it; the boundary
    counts as one more different id there, once for all samples, so no k-gram that was seen has a zero count.
    It is no context: samples are cut from longer texts, and the cut says nothing about what follows.

    Args:
        order: longest n-gram, >= 1; contexts have up to order - 1 ids.
        vocab_size: V.
        sizes: k-grams of each length 2, 3, ..., of counts that `load_state_dict` will bring.
    """

    def __init__(self, order, vocab_size, sizes=()):
        super().__init__()
        self.order, self.vocab_size = order, vocab_size
        sizes = [vocab_size, *sizes]
        self.levels = nn.ModuleList(map(Level, sizes, [1, *sizes]))

    @property
    def sizes(self):
        """What an empty copy needs to know of the counts."""
        return [len(level.keys) - 1 for level in self.levels[1:]]

    def fit(self, samples):
        """Count the n-grams of samples, in place of an earlier fit; returns self. Cost: order - 1 sorts."""
        samples = samples.astype(np.int64)
        # V**k would overflow an integer, hence pairs: ids holds those of the (k-1)-grams at every position of
        # every sample [n, L + 3 - k], keys of which kinds there are.
        ids, keys, num_contexts = samples, np.arange(self.vocab_size), 1
        counts = np.bincount(samples[:, 1:].ravel(), minlength=self.vocab_size)
        self.levels = nn.ModuleList()
        for k in range(2, min(self.order, samples.shape[1]) + 1):
            pairs = ids[:, :-1] * self.vocab_size + samples[:, k - 1 :]
            unique, first, inverse, raw = np.unique(
                pairs, return_index=True, return_inverse=True, return_counts=True
            )
            # Each different k-gram names its (k-1)-gram suffix once, with another id before it.
            suffixes = ids[:, 1:].ravel()[first]
            continuations = np.bincount(suffixes, minlength=len(keys))
            if k > 2:  # a lone token has an id before it always, as id 0 is never predicted
                continuations[np.unique(ids[:, 0])] += 1
            self.levels.append(Level(len(keys), num_contexts).count(keys, continuations, self.vocab_size))
            ids, keys, counts, num_contexts = inverse.reshape(pairs.shape), unique, raw, len(keys)
        self.levels.append(Level(len(keys), num_contexts).count(keys, counts, self.vocab_size))
        return self

    def nll(self, samples):
        """Losses [n, L] (numpy) of ids 1..L of samples, whose L may be another than in training."""
        ids = torch.from_numpy(samples.astype(np.int64))
        return -np.log(self.of(ids[:, 1:], self.contexts(ids[:, :-1])).numpy())

    def contexts(self, ids):
        """Ids [B, T] -> [order - 1][B, T]: the 1-gram, 2-gram, ... ending at each place; -1: never seen."""
        found = [ids] if len(self.levels) > 1 else []
        for level in self.levels[1:-1]:
            before = torch.nn.functional.pad(found[-1][:, :-1], (1, 0), value=NO_TOKEN)
            found.append(level.find(before * self.vocab_size + ids))  # negative, so not there, if unseen
        return found

    def longest(self, contexts):
        """Tokens [B, T] of the longest context that was seen before some token: 0 to order - 1."""
        pairs = zip(self.levels[1:], contexts, strict=True)
        seen = torch.stack([level.backoff[ids] < 1 for level, ids in pairs])
        return (seen * torch.arange(1, len(seen) + 1, device=seen.device)[:, None, None]).amax(0)

    def of(self, targets, contexts):
        """Probabilities [B, T] (fp64) of one id at each place; contexts as `contexts` gives them."""
        lowest, *higher = self.levels
        probability = lowest.discounted[targets] + lowest.backoff[0] / self.vocab_size
        for level, ids in zip(higher, contexts, strict=True):
            seen = level.find(torch.where(ids < 0, -1, ids * self.vocab_size + targets))
            probability = level.discounted[seen] + level.backoff[ids] * probability
        return probability

    def draw(self, contexts, times, generator=None):
        """Ids [B, T, times], drawn from the prediction at each place; contexts as `contexts` gives them.

        Its distribution function is inverted: a number in [0, 1) is handed from the longest context down.
        """
        alike = torch.zeros_like(contexts[0])  # the context of no ids
        ids = torch.full([*alike.shape, times], NO_TOKEN)
        numbers = torch.rand(ids.shape, dtype=torch.float64, generator=generator)
        for level, seen in zip(self.levels[::-1], [*contexts[::-1], alike], strict=True):
            found, left = level.invert(seen, numbers, self.vocab_size)
            ids, numbers = torch.where(ids < 0, found, ids), torch.where(found < 0, left, numbers)
        uniform = (numbers * self.vocab_size).long().clamp(0, self.vocab_size - 1)
        return torch.where(ids < 0, uniform, ids)

    def over_all(self, contexts):
        """Probabilities [B, T, V] (fp32) of every id at each place."""
        lowest, *higher = self.levels
        rows = contexts[0].shape
        start = lowest.discounted[:-1] + lowest.backoff[0] / self.vocab_size
        probability = start.float().repeat(rows.numel(), 1)
        for level, ids in zip(higher, contexts, strict=True):
            ids = ids.flatten()
            probability *= level.backoff[ids, None].float()
            row, place = level.after(ids, self.vocab_size)
            probability[row, level.keys[place] % self.vocab_size] += level.discounted[place].float()
        return probability.view(*rows, -1)


def discounts(counts):
    """[0, D1, D2, D3+] of one level, to be indexed with min(count, 3); counts [m] are those of its k-grams.

    D_r = r - (r + 1) * Y * n_{r+1} / n_r with Y = n_1 / (n_1 + 2 n_2), where n_r k-grams have count r (Chen &
    Goodman 1998, equation 26); 0 < D_r <= r. A discount for which one of these n is 0, or that is not
    positive, takes its fallback: a zero discount could leave an unseen token without probability.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    result = np.array([0.0, *FALLBACK_DISCOUNTS])
    for r in (1, 2, 3):
        if n[[1, 2, r, r + 1]].all():
            estimate = r - (r + 1) * n[1] / (n[1] + 2 * n[2]) * n[r + 1] / n[r]
            result[r] = estimate if estimate > 0 else result[r]
    return result

"""Count-based next-token predictors: the baselines every trained model has to beat.

Shapes: n samples, L predictions per sample, V vocabulary. Samples are integer arrays [n, L + 1] of ids below
V: id t (1..L) is predicted from the ids before it in the same sample; id 0 is context only. Losses are in
nats, float64. Ids are taken as int64: smaller types would wrap around in the keys.
"""

from typing import NamedTuple

import numpy as np

# D1, D2, D3+ where counts of counts cannot give them (few or very regular data), as KenLM falls back to.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


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


class Level(NamedTuple):
    """The k-grams of one length k, of which a prediction reads three columns.

    A k-gram's id is its rank among the keys, a key being (id of the (k-1)-gram context) * V + last token. The
    id -1 is every k-gram not seen: as an index it reaches the last entry of a column, made for it.
    """

    keys: np.ndarray  # [m + 1] ascending, then one that nothing reaches
    discounted: np.ndarray  # [m + 1] (count - discount) / count of the context; then 0
    backoff: np.ndarray  # [contexts + 1] weight of the next shorter context; then 1


class KneserNey:
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
    """

    def __init__(self, order, vocab_size):
        self.order, self.vocab_size = order, vocab_size

    def fit(self, samples):
        """Count the n-grams of samples, in place of an earlier fit; returns self. Cost: order - 1 sorts."""
        samples = samples.astype(np.int64)
        # V**k would overflow an integer, hence pairs: ids holds those of the (k-1)-grams at every position of
        # every sample [n, L + 3 - k], keys of which kinds there are.
        ids, keys, num_contexts = samples, np.arange(self.vocab_size), 1
        counts = np.bincount(samples[:, 1:].ravel(), minlength=self.vocab_size)
        self.levels = []
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
            self.levels.append(_level(keys, continuations, num_contexts, self.vocab_size))
            ids, keys, counts, num_contexts = inverse.reshape(pairs.shape), unique, raw, len(keys)
        self.levels.append(_level(keys, counts, num_contexts, self.vocab_size))
        return self

    def nll(self, samples):
        """Losses [n, L] of ids 1..L of samples, whose L may be another than in training."""
        samples = samples.astype(np.int64)
        lowest, *higher = self.levels
        ids = samples
        probability = lowest.discounted[samples[:, 1:]] + lowest.backoff[0] / self.vocab_size
        for k, level in enumerate(higher, start=2):
            contexts = ids[:, :-1]
            wanted = contexts * self.vocab_size + samples[:, k - 1 :]
            index = np.searchsorted(level.keys, wanted)
            # The key of an unseen context is negative, and so is not there either.
            ids = np.where(level.keys[index] == wanted, index, -1)
            covered = probability[:, k - 2 :]  # a view: the positions with k - 1 ids before them
            covered[:] = level.discounted[ids] + level.backoff[contexts] * covered
        return -np.log(probability)


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


def _level(keys, counts, num_contexts, vocab_size):
    """Discounted shares and backoff weights of k-grams with ascending keys [m] and their counts [m]."""
    contexts = keys // vocab_size
    discount = discounts(counts)[np.minimum(counts, 3)]
    # Counts are whole numbers: a total of 0 means no count at all, and 1 there only avoids 0 / 0.
    total = np.bincount(contexts, counts, minlength=num_contexts)
    backoff = np.bincount(contexts, discount, minlength=num_contexts) / np.maximum(total, 1)
    backoff[total == 0] = 1
    discounted = (counts - discount) / np.maximum(total, 1)[contexts]
    return Level(np.append(keys, np.iinfo(np.int64).max), np.append(discounted, 0.0), np.append(backoff, 1.0))

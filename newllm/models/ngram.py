"""Count-based next-token predictors: the baselines every trained model has to beat.

Shapes: n samples, L predictions per sample, V vocabulary. Samples are integer arrays [n, L + 1]: id t (1..L) is
predicted from the ids before it in the same sample; id 0 is context only. Losses are in nats per predicted token.
"""

from typing import NamedTuple

import numpy as np

# D1, D2, D3+ where the counts-of-counts cannot give them (few or very regular data); the values KenLM falls back to.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


def unigram_nll(train_ids, val_ids, vocab_size):
    """Add-one smoothed unigram: p(w) = (count of w as predicted token + 1) / (predicted tokens + V).

    Args:
        train_ids: training samples [m, K + 1].
        val_ids: validation samples [n, L + 1].
        vocab_size: V.

    Returns:
        Negative log-likelihood [n, L], float64, nats.

    Raises:
        ValueError: samples of a wrong shape or type, or with an id outside 0..V-1.
    """
    targets = _check_samples(train_ids, vocab_size)[:, 1:]
    counts = np.bincount(targets.ravel(), minlength=vocab_size) + 1
    return -np.log(counts / counts.sum())[_check_samples(val_ids, vocab_size)[:, 1:]]


class Level(NamedTuple):
    """The k-grams of one length k. A k-gram's id is its index in `keys`; the id -1 stands for every unseen one."""

    keys: (
        np.ndarray
    )  # [m + 1] ascending: id of the (k-1)-gram context * V + last token; then one unreachable key
    discounted: np.ndarray  # [m + 1] (count - discount) / count of the context; last entry, reached by -1: 0
    backoff: np.ndarray  # [contexts + 1] weight of the next shorter context; last entry, reached by -1: 1


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for Language
    Modeling", section 3): p_k(w | h) = (c_k(h w) - D_k(c_k)) / sum_v c_k(h v) + backoff_k(h) * p_{k-1}(w | h'),
    where h' is h without its oldest id, and p_0 = 1 / V, so that every id has positive probability.

    The highest level takes raw counts: k = order, or the samples' length where that is less. Lower levels take
    continuation counts: of a k-gram, the number of different ids seen before it. A context that never occurred before a
    token passes the prediction on to the next shorter one.

    Start of a sample: a prediction with only j < order - 1 ids before it is p_{j+1}, the same distribution that longer
    unseen contexts back off to. A k-gram that starts a sample has no id before it; the boundary counts as one more
    different id there, once for all samples, so no k-gram that was seen has a zero count. The boundary is no context:
    samples are cut from longer texts, and the cut says nothing about what follows.

    Args:
        order: longest n-gram, >= 1; contexts have up to order - 1 ids.
        vocab_size: V.

    Raises:
        ValueError: order below 1.
    """

    def __init__(self, order, vocab_size):
        if order < 1:
            raise ValueError(f"order must be >= 1, not {order}")
        self.order, self.vocab_size, self.levels = order, vocab_size, None

    def fit(self, samples):
        """Count the n-grams of samples [n, L + 1], replacing an earlier fit. Cost: order - 1 sorts of n * L integers.

        Returns:
            self.

        Raises:
            ValueError: samples of a wrong shape or type, or with an id outside 0..V-1.
        """
        samples = _check_samples(samples, self.vocab_size)
        # ids: of the (k-1)-grams at every position of every sample [n, L + 3 - k]. V**k would overflow an integer, so
        # a k-gram's key is the pair (id of its first k - 1 tokens, last token), and its id the rank of that key.
        ids, keys, num_contexts = samples, np.arange(self.vocab_size), 1
        counts = np.bincount(samples[:, 1:].ravel(), minlength=self.vocab_size)
        self.levels = []
        for k in range(2, min(self.order, samples.shape[1]) + 1):
            pairs = ids[:, :-1] * self.vocab_size + samples[:, k - 1 :]
            unique, first, inverse, raw = np.unique(
                pairs, return_index=True, return_inverse=True, return_counts=True
            )
            suffixes = ids[:, 1:].ravel()[first]
            continuations = np.bincount(suffixes, minlength=len(keys))
            if k > 2:  # a lone token has an id before it always, as id 0 is never predicted
                continuations[np.unique(ids[:, 0])] += 1
            self.levels.append(_level(keys, continuations, num_contexts, self.vocab_size))
            ids, keys, counts, num_contexts = inverse.reshape(pairs.shape), unique, raw, len(keys)
        self.levels.append(_level(keys, counts, num_contexts, self.vocab_size))
        return self

    def nll(self, samples):
        """Negative log-likelihood of ids 1..L of every sample.

        Args:
            samples: [n, L + 1]; L may differ from that of the training samples.

        Returns:
            [n, L], float64, nats.

        Raises:
            RuntimeError: not fitted.
            ValueError: samples of a wrong shape or type, or with an id outside 0..V-1.
        """
        if self.levels is None:
            raise RuntimeError("fit the model before asking for its nll")
        samples = _check_samples(samples, self.vocab_size)
        lowest, *higher = self.levels
        ids = samples
        probability = lowest.discounted[samples[:, 1:]] + lowest.backoff[0] / self.vocab_size
        for k, level in enumerate(higher, start=2):
            contexts = ids[:, :-1]
            ids = _find(level.keys, contexts * self.vocab_size + samples[:, k - 1 :])
            covered = probability[:, k - 2 :]  # positions with k - 1 ids before them
            covered[:] = level.discounted[ids] + level.backoff[contexts] * covered
        return -np.log(probability)


def ngram_rows(train_ids, val_ids, vocab_size):
    """Mean validation loss of the baselines, nats per predicted token.

    Args:
        train_ids: training samples [m, K + 1].
        val_ids: validation samples [n, L + 1].
        vocab_size: V.

    Returns:
        {"unigram": add-one unigram, "bigram": Kneser-Ney of order 2, "kn": Kneser-Ney of order 5}.

    Raises:
        ValueError: samples of a wrong shape or type, or with an id outside 0..V-1.
    """
    return {
        "unigram": float(unigram_nll(train_ids, val_ids, vocab_size).mean()),
        "bigram": float(KneserNey(2, vocab_size).fit(train_ids).nll(val_ids).mean()),
        "kn": float(KneserNey(5, vocab_size).fit(train_ids).nll(val_ids).mean()),
    }


def discounts(counts):
    """Discounts of one level: D_r = r - (r + 1) * Y * n_{r+1} / n_r with Y = n_1 / (n_1 + 2 n_2), where n_r k-grams
    have count r (Chen & Goodman 1998, equation 26).

    A discount for which one of these n is 0, or that is not positive, takes its fallback: a zero discount could leave
    an unseen token without probability.

    Args:
        counts: integer count of every k-gram [m].

    Returns:
        [0, D1, D2, D3+], float64 [4], to be indexed with min(count, 3); 0 < D_r <= r.
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


def _find(keys, wanted):
    """Index of every wanted key in the ascending keys, -1 where it is not there. Negative keys are never there."""
    index = np.searchsorted(keys, wanted)
    return np.where(keys[index] == wanted, index, -1)


def _check_samples(samples, vocab_size):
    """The samples as int64, or a ValueError: an id out of range would pass for another n-gram."""
    samples = np.asarray(samples)
    if samples.ndim != 2 or samples.shape[1] < 2 or samples.dtype.kind not in "iu":
        raise ValueError(f"samples must be integers [n, L + 1], not {samples.dtype} {list(samples.shape)}")
    if samples.size and not (samples.min() >= 0 and samples.max() < vocab_size):
        raise ValueError(f"ids must be in 0..{vocab_size - 1}, not {samples.min()}..{samples.max()}")
    return samples.astype(np.int64)

"""Count-based baselines: proper distributions, right arithmetic, sensible behaviour."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from newllm.retrieval.ngram import FALLBACK_DISCOUNTS, KneserNey, discounts, ngram_rows, unigram_nll


def zipf_samples(n, length, vocab_size, seed):
    """Samples [n, length + 1] of a Zipf source in which every other token depends on the one before it."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size + 1)
    ids = rng.choice(vocab_size, size=(n, length + 1), p=weights / weights.sum())
    follows = rng.random(ids.shape) < 0.5
    for t in range(1, length + 1):
        ids[:, t] = np.where(follows[:, t], (ids[:, t - 1] * 7 + 3) % vocab_size, ids[:, t])
    return ids


def distribution(model, context):
    """p(. | context) [V], from the nll of V samples that differ in their last id."""
    samples = np.array([[*context, token] for token in range(model.vocab_size)])
    return np.exp(-model.nll(samples)[:, -1])


class SlowKneserNey:
    """The definition, with dictionaries of tuples and no thought for speed."""

    def __init__(self, order, vocab_size, samples):
        self.order, self.vocab_size = order, vocab_size
        raw = Counter()
        predecessors = defaultdict(set)
        for sample in samples.tolist():
            for end in range(1, len(sample)):  # the predicted position
                for start in range(max(0, end - order + 1), end + 1):
                    gram = tuple(sample[start : end + 1])
                    raw[gram] += 1
                    predecessors[gram].add(sample[start - 1] if start else "boundary")
        self.counts = {g: c if len(g) == order else len(predecessors[g]) for g, c in raw.items()}
        self.discount = {k: self.level_discounts(k) for k in range(1, order + 1)}

    def level_discounts(self, k):
        n = Counter(c for g, c in self.counts.items() if len(g) == k)
        result = []
        for r in (1, 2, 3):
            value = 0
            if n[1] and n[2] and n[r] and n[r + 1]:
                value = r - (r + 1) * (n[1] / (n[1] + 2 * n[2])) * n[r + 1] / n[r]
            result.append(value if value > 0 else FALLBACK_DISCOUNTS[r - 1])
        return result

    def probability(self, context, token):
        context = tuple(context)[max(0, len(context) - self.order + 1) :]
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        followers = {g[-1]: c for g, c in self.counts.items() if g[:-1] == context}
        if not followers:
            return lower
        d = self.discount[len(context) + 1]
        total = sum(followers.values())
        count = followers.get(token, 0)
        own = (count - d[min(count, 3) - 1]) / total if count else 0
        return own + sum(d[min(c, 3) - 1] for c in followers.values()) / total * lower


def test_unigram_is_add_one_over_predicted_tokens_only():
    """Id 0 of a sample is neither counted nor predicted: p = (count + 1) / (predicted + V)."""
    train = np.array([[3, 0, 0, 1], [3, 0, 2, 2]])  # predicted: 0 0 1 0 2 2
    expected = -np.log((np.array([3, 1, 2, 0]) + 1) / (6 + 4))
    got = unigram_nll(train, np.array([[0, 0, 1, 2, 3]]), 4)
    np.testing.assert_allclose(got, expected[[[0, 1, 2, 3]]], rtol=0, atol=1e-15)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_distributions_sum_to_one_for_every_context(order):
    """Seen, partly seen and unseen contexts of every length, at a sample's start and beyond."""
    vocab_size = 40
    train = zipf_samples(8, 30, 30, seed=1)  # ids 30..39 never occur
    model = KneserNey(order, vocab_size).fit(train)
    for length in range(1, order + 2):
        seen, start = train[2, 7 : 7 + length], train[3, :length]
        partly = np.concatenate([[35], seen[1:]])  # unseen oldest id, seen suffix where there is one
        for context in (seen, start, partly, np.full(length, 39), train[4, -length:]):
            p = distribution(model, context)
            assert p.min() > 0
            assert abs(p.sum() - 1) < 1e-12


def test_a_place_alone_has_the_distribution_that_it_has_among_others():
    """To the bit: at the start, behind seen and unseen ids, on one way of counting and on the other."""
    train = zipf_samples(8, 30, 30, seed=1)
    model = KneserNey(5, 40).fit(train)
    ids = torch.from_numpy(np.concatenate([train[2, :12], [35, 39, 39], train[3, :9]]).astype(np.int64))[None]
    contexts = model.contexts(ids)
    for place, expected in enumerate(model.over_all(contexts)[0]):
        alone = model.over_all([level[:, place : place + 1] for level in contexts])
        assert torch.equal(alone[0, 0], expected), place


@pytest.mark.parametrize(("order", "seed"), [(3, 0), (3, 1), (4, 2), (1, 3)])
def test_equals_the_slow_definition(order, seed):
    """Every probability agrees with the dictionary-of-tuples implementation, whatever the length."""
    train, val = zipf_samples(25, 15, 30, seed), zipf_samples(4, 20, 33, seed + 100)
    fast, slow = KneserNey(order, 33).fit(train).nll(val), SlowKneserNey(order, 33, train)
    for i, sample in enumerate(val):
        for t in range(1, len(sample)):
            assert abs(np.exp(-fast[i, t - 1]) - slow.probability(sample[:t], sample[t])) < 1e-12


def test_discounts_stay_between_zero_and_the_count():
    """0 < D_r <= r, so no probability is negative and every backoff weight is positive."""
    rng = np.random.default_rng(11)
    for high, size in itertools.product((2, 3, 4, 6, 50), (0, 1, 2, 5, 100)):
        for _ in range(20):
            none, *given = discounts(rng.integers(1, high, size))
            assert none == 0 and all(0 < d <= r for r, d in enumerate(given, start=1))


def test_large_vocabulary_and_order_do_not_overflow():
    """Order 5 of GPT-2's ids (V**5 > 2**64): the training text is recognised, and only in its order."""
    train = np.random.default_rng(12).permutation(50257)[:2010].reshape(30, 67)
    model = KneserNey(5, 50257).fit(train)
    assert model.nll(train)[:, 4:].max() < 1 < model.nll(train[:, ::-1]).min()


def test_samples_shorter_than_the_order_are_fine():
    """The longest n-grams there are take the place of the highest order; longer samples can still be
    scored."""
    train = np.array([[0, 1], [0, 2], [3, 1], [0, 1]])
    model, bigram = KneserNey(5, 6).fit(train), KneserNey(2, 6).fit(train)
    for context in ([0], [3, 0], [5, 4, 3, 2, 1, 0]):
        np.testing.assert_array_equal(distribution(model, context), distribution(bigram, context))
    nothing = KneserNey(3, 8).fit(np.zeros((0, 5), dtype=np.int64))  # every order says 1 / V
    np.testing.assert_allclose(nothing.nll(np.array([[1, 2, 3]])), np.log(8), rtol=0, atol=1e-12)


def test_rows_are_the_mean_losses_of_the_three_baselines():
    """Small types, as token files hold them, do not wrap around."""
    train, val = zipf_samples(60, 16, 3000, seed=15), zipf_samples(10, 16, 3000, seed=16)
    rows = ngram_rows(train.astype(np.uint16), val.astype(np.uint16), 3000)
    assert rows == {
        "unigram": unigram_nll(train, val, 3000).mean(),
        "bigram": KneserNey(2, 3000).fit(train).nll(val).mean(),
        "kn": KneserNey(5, 3000).fit(train).nll(val).mean(),
    }
    assert all(type(value) is float for value in rows.values())


@pytest.mark.parametrize("length", [1, 2, 12])
def test_what_is_drawn_is_distributed_as_the_prediction(length):
    """At each place, known contexts or not; of 20,000 draws a share is off by 0.02 at most."""
    model = KneserNey(5, 9).fit(zipf_samples(20, length, 9, seed=1))
    ids = torch.from_numpy(zipf_samples(3, 12, 9, seed=2))
    ids[0, 5:] = 8  # five times the rarest id
    contexts = model.contexts(ids)
    torch.manual_seed(0)
    drawn = model.draw(contexts, 20_000)
    shares = torch.stack([(drawn == token).double().mean(-1) for token in range(9)], -1)
    torch.testing.assert_close(shares.float(), model.over_all(contexts), rtol=0, atol=0.02)


def test_without_a_text_all_ids_are_drawn_alike():
    """Counts of no sample say nothing."""
    model = KneserNey(5, 4).fit(np.zeros((0, 9), dtype=np.int64))
    drawn = model.draw(model.contexts(torch.zeros(1, 1, dtype=torch.long)), 4_000)
    assert np.allclose(np.bincount(drawn.flatten()) / 4_000, 0.25, atol=0.04)

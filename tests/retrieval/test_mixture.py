"""What is looked up: a distribution at every place, which knows the past alone, however the text is cut."""

import time

import pytest
import torch

from newllm.retrieval.keys import Keys
from newllm.retrieval.lookup import STEPS
from newllm.retrieval.mixture import AT_ONCE, EXPERTS, Retrieval, network_opinion

VOCAB, WIDTH = 50, 12


def made_of(ids):
    """What stands in for the network: outputs and logits that depend on the current id alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(VOCAB, WIDTH, generator=generator)[ids.clamp_min(0)]
    return hidden, hidden @ torch.randn(WIDTH, VOCAB, generator=generator)


def retrieval_of(experts=EXPERTS, parts=("hidden", "tokens"), network=True, window=4096):
    """Built from 20 samples of 30 ids below 40, so that some ids are in no training text."""
    ids = torch.randint(40, (20, 31), generator=torch.Generator().manual_seed(1))
    hidden, _ = made_of(ids[:, :-1])
    keys = Keys(parts, VOCAB, {"hidden": WIDTH}).fit({"hidden": hidden.flatten(0, 1)})
    retrieval = Retrieval(experts, keys, VOCAB, network, window, neighbours=8)
    retrieval.ngram.fit(ids.numpy())
    made = keys(ids[:, :-1], hidden=hidden)
    retrieval.store.fill(ids[:, :-1].flatten(), ids[:, 1:].flatten(), made)
    torch.nn.init.normal_(retrieval.gate.weight, generator=torch.Generator().manual_seed(2))
    return retrieval


@torch.no_grad()
def read(retrieval, ids, pieces=(10**6,), targets=None):
    """Mixture [B, T, V] of texts read in pieces of these lengths, and the state after them."""
    past, mixed = retrieval.start(len(ids)), []
    for piece in ids.split(pieces[0] if len(pieces) == 1 else list(pieces), 1):
        hidden, logits = made_of(piece)
        evidence, past = retrieval.look_up(piece, past, hidden=hidden)
        mixed.append(retrieval(evidence, network_opinion(logits))[0])
    return torch.cat(mixed, 1), past


def texts(batch=3, length=40):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("experts", [(), ("ngram",), ("cache",), ("knn",), ("ngram", "cache"), EXPERTS])
@pytest.mark.parametrize("text", ["any", "one token", "one repeated", "never seen"])
def test_the_probabilities_of_all_ids_sum_to_one_everywhere(experts, text):
    """Also at the first token, which has no past, and behind ids that the training text does not have."""
    ids = {
        "any": texts(),
        "one token": texts(1, 1),
        "one repeated": torch.full((1, 30), 7),
        "never seen": torch.full((2, 5), 45),
    }[text]
    mixed, _ = read(retrieval_of(experts), ids)
    assert mixed.shape == (*ids.shape, VOCAB) and (mixed >= 0).all()
    assert (mixed.double().sum(-1) - 1).abs().max() < 1e-5


def test_one_id_has_the_probability_that_it_has_among_all():
    retrieval, ids = retrieval_of(), texts()
    hidden, logits = made_of(ids)
    evidence, _ = retrieval.look_up(ids, retrieval.start(3), hidden=hidden)
    targets = texts().roll(-1, 1)
    one, _ = retrieval(evidence, network_opinion(logits, targets), targets)
    mixed, _ = read(retrieval, ids)
    torch.testing.assert_close(one, mixed.gather(-1, targets[..., None])[..., 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("changed", [0, 1, 20, 39])
def test_what_comes_later_changes_nothing_before_it(changed):
    """To the bit, whatever other texts of the batch say."""
    retrieval, ids = retrieval_of(), texts()
    mixed, _ = read(retrieval, ids)
    ids[0, changed] = (ids[0, changed] + 1) % VOCAB
    other, _ = read(retrieval, ids)
    assert torch.equal(other[0, :changed], mixed[0, :changed]) and torch.equal(other[1:], mixed[1:])
    assert not torch.equal(other[0, changed], mixed[0, changed])


@pytest.mark.parametrize("window", [8, 4096])
@pytest.mark.parametrize("pieces", [(1,), (7,), (1, 30, 9)])
def test_a_text_read_in_pieces_is_the_text_read_at_once(window, pieces):
    retrieval = retrieval_of(window=window)
    whole, _ = read(retrieval, texts())
    mixed, past = read(retrieval, texts(), pieces)
    torch.testing.assert_close(mixed, whole, rtol=1e-5, atol=1e-7)
    assert past.ids.shape[1] == min(window, 40) and past.length.tolist() == [40] * 3


def test_padding_on_the_left_changes_nothing():
    retrieval, ids = retrieval_of(), texts()
    whole, _ = read(retrieval, ids)
    padded, past = read(retrieval, torch.nn.functional.pad(ids, (6, 0), value=-1))
    torch.testing.assert_close(padded[:, 6:], whole, rtol=1e-5, atol=1e-7)
    assert past.length.tolist() == [40] * 3


def test_an_expert_with_nothing_to_say_is_left_out():
    """The cache at the first token, and the neighbours of a token that the training text lacks."""
    retrieval, ids = retrieval_of(), torch.tensor([[45, 45, 3]])
    hidden, logits = made_of(ids)
    evidence, _ = retrieval.look_up(ids, retrieval.start(1), hidden=hidden)
    _, gate = retrieval(evidence, network_opinion(logits))
    gate = dict(zip(retrieval.names, gate[0].unbind(-1), strict=True))
    assert [weight == 0 for weight in gate["cache"]] == [True, False, False]
    assert [weight == 0 for weight in gate["knn"]] == [True, True, False]
    torch.testing.assert_close(sum(gate.values()), torch.ones(3))


def test_nearest_are_the_best_of_those_with_the_same_token():
    retrieval, ids = retrieval_of(), texts()
    keys = retrieval.keys(ids, hidden=made_of(ids)[0])
    finds = retrieval.store.nearest(ids, keys, 8)
    stored, starts = retrieval.store.rounded.float() / STEPS, retrieval.store.starts
    for text in range(3):
        for place in range(40):
            same = slice(starts[ids[text, place]], starts[ids[text, place] + 1])
            best = (stored[same] @ keys[text, place]).sort(descending=True).values[:8]
            torch.testing.assert_close(finds.cosine[text, place, : len(best)], best)
            assert finds.there[text, place].sum() == len(best)


def test_the_store_knows_its_keys_to_8_bits():
    """A place that asks with the key it has in the store finds itself, as alike as a rounded key can be."""
    retrieval, ids = retrieval_of(), texts()
    keys = retrieval.keys(ids, hidden=made_of(ids)[0])
    retrieval.store.fill(ids.flatten(), torch.arange(ids.numel()), [keys.flatten(0, 1)])
    finds = retrieval.store.nearest(ids, keys, 1)
    exact = (keys[..., None, :] @ keys.flatten(0, 1)[finds.following[..., 0].long()][..., None])[..., 0, 0]
    assert (exact > 0.999).all() and (finds.cosine[..., 0] - exact).abs().max() < 0.01
    assert retrieval.store.rounded.dtype == torch.int8


def test_a_long_text_takes_no_more_time_and_memory_a_token():
    """The state is bounded by the window, so the second half of 100,000 tokens costs what the first does."""
    retrieval = retrieval_of(("ngram", "cache"), window=512)
    ids = torch.randint(40, (1, 100_000), generator=torch.Generator().manual_seed(4))
    seconds = []
    past = retrieval.start(1)
    for half in ids.split(50_000, 1):
        begun = time.perf_counter()
        for piece in half.split(AT_ONCE, 1):
            evidence, past = retrieval.look_up(piece, past, hidden=made_of(piece)[0])
            retrieval(evidence, network_opinion(made_of(piece)[1], piece), piece)
        seconds.append(time.perf_counter() - begun)
    assert past.ids.shape[1] == 512 and past.keys.shape[1] == 512 and past.length.item() == 100_000
    assert seconds[1] < 1.5 * seconds[0]

"""What is fitted and what is reported: never on the same samples."""

from types import SimpleNamespace

import pytest
import torch

from newllm.phases.retrieval import (
    build,
    cross_fitted,
    fit,
    fit_fixed,
    gather,
    in_turn,
    measure,
    no_reading,
)
from newllm.retrieval.keys import Keys
from newllm.retrieval.mixture import Retrieval, network_opinion

VOCAB, LENGTH = 40, 20


def samples(count, seed):
    """Texts in which each id is often followed by the next one."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count, LENGTH + 1), generator=generator)
    return (steps.cumsum(1) + torch.randint(VOCAB, (count, 1), generator=generator)) % VOCAB


@pytest.fixture(scope="module")
def built():
    """A retrieval without a network over 12 samples."""
    keys = Keys(["tokens"], VOCAB, {})
    retrieval = Retrieval(["ngram", "cache", "knn"], keys, VOCAB, network=False, neighbours=8)
    return build(retrieval, samples(12, 0), no_reading)


def nats(retrieval, ids, held_back=None):
    held_back = held_back is not None and gather(retrieval, held_back, no_reading)
    found = cross_fitted(retrieval, gather(retrieval, ids, no_reading), held_back or None)
    return {step: values for step, (values, _) in found.items()}


@pytest.mark.parametrize("changed", [0, 5])
def test_a_sample_changes_nothing_that_its_own_half_gets(built, changed):
    """As each half is measured by the fit on the other; the retrieval itself stays as it was."""
    ids, begun = samples(8, 1), {name: value.clone() for name, value in built.state_dict().items()}
    before = nats(built, ids)
    ids[changed] = ids[changed].flip(0)
    after = nats(built, ids)
    own = [number for number in range(8) if number % 2 == changed % 2 and number != changed]
    other = [number for number in range(8) if number % 2 != changed % 2]
    for step in ("fixed", "gate"):
        assert torch.equal(after[step][own], before[step][own])
        assert (after[step][other] != before[step][other]).any()
    assert all(torch.equal(value, begun[name]) for name, value in built.state_dict().items())


def test_with_samples_held_back_no_measured_one_is_fitted_on(built):
    """Each gets the same whatever the others are, and something else by other samples held back."""
    ids, held_back = samples(6, 1), samples(5, 2)
    before = nats(built, ids, held_back)["gate"]
    ids[0] = ids[0].flip(0)
    assert torch.equal(nats(built, ids, held_back)["gate"][1:], before[1:])
    assert not torch.equal(nats(built, ids, samples(5, 3))["gate"][1:], before[1:])


def test_weights_without_features_are_those_of_em(built):
    """At the fixed point of EM each weight is the mean of its share in what came, but for the prior."""
    gathered = gather(built, samples(30, 1)[:, 1:], no_reading)
    begun = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    fit_fixed(built, *gathered)
    with torch.no_grad():
        opinions = built.opinions(*gathered)
        mixed, gate = built.mix(opinions)
        own = torch.stack([opinion.probability for opinion in opinions], -1)
        shares = gate * own / mixed[..., None]
    assert not built.gate.weight.any()
    prior = built.gate.bias.detach() / mixed.numel()
    torch.testing.assert_close(shares.mean((0, 1)), gate.mean((0, 1)) + prior, atol=1e-3, rtol=0)
    built.load_state_dict(begun, strict=False)


def test_a_gate_fits_better_than_the_weights_it_starts_from(built):
    """On what both are fitted to."""
    gathered = gather(built, samples(30, 1), no_reading)
    begun = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    fit_fixed(built, *gathered)
    fixed = -built(*gathered)[0].log().mean()
    built.load_state_dict(begun, strict=False)
    fit(built, gathered)
    assert -built(*gathered)[0].log().mean() < fixed
    built.load_state_dict(begun, strict=False)


def test_parts_in_turn_begin_with_the_network_and_miss_nothing_but_the_last(built):
    """The network's part is its own loss; each is that of a mixture which never had more experts."""
    ids = samples(8, 1)
    logits = torch.randn(8, LENGTH, VOCAB, generator=torch.Generator().manual_seed(4))
    evidence, _, targets = gather(built, ids, no_reading)
    gathered = evidence, network_opinion(logits, targets), targets
    data = SimpleNamespace(val=ids, token_bytes=torch.ones(VOCAB, dtype=torch.int32))
    whole = Retrieval(built.experts, built.keys, VOCAB, neighbours=8)
    whole.ngram = built.ngram
    found = in_turn(whole, gathered, data)
    assert list(found) == ["network", "ngram", "cache"]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert found["network"]["ppl"] == pytest.approx(loss.exp().item(), rel=1e-5)
    alone = Retrieval(["ngram"], built.keys, VOCAB)
    alone.ngram = built.ngram
    assert found["ngram"]["ppl"] == measure(alone, gathered, data)["ppl"]

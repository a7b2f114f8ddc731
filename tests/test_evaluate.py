"""From (model, data) to metrics: exact trajectories, plain arithmetic, the same numbers twice."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from config import ResidualConfig
from newllm import evaluate
from newllm.evaluate import evaluate_contexts, evaluate_prediction, text_bytes, trajectories
from newllm.fixed_point.solver import sequential
from newllm.models.network import LanguageModel

V, L = 30, 12
KEYS = {
    *("er_train", "er_val", "er_ceiling", "rank_tokens"),
    *("converged_ratio", "sweeps_to_convergence", "cold_start_error_10", "cold_start_curve", "contraction"),
    *("memory_horizon", "memory_curve", "past_capacity", "past_capacity_by_lag", "identity_r2", "spectrum"),
}


def settings(**changes):
    return ResidualConfig(**dict(context_dim=10, embed_dim=8, num_layers=2) | changes)


def samples(count, length=L, seed=0):
    """int32 [count, length + 1], as the data layer stores them."""
    return torch.randint(V, (count, length + 1), generator=torch.Generator().manual_seed(seed)).int()


def data(train=20, val=12, length=L):
    return SimpleNamespace(train=samples(train, length, 1), val=samples(val, length, 2))


@pytest.fixture
def model():
    return LanguageModel(settings(), V)


@pytest.fixture
def small_parts(monkeypatch):
    """Five sequences at a time, so that every set takes several parts and an uneven last one."""
    monkeypatch.setattr(evaluate, "SEQUENCES_AT_A_TIME", 5)


class Map(nn.Module):
    """A fixed map on one random vector per token: what evaluate_contexts asks of a model, and no more."""

    def __init__(self, step, context_dim, embed_dim=4):
        super().__init__()
        self.step, self.context_dim = step, context_dim
        self.table = torch.randn(V, embed_dim, generator=torch.Generator().manual_seed(0))

    def embed(self, ids):
        return self.table[ids]


def predict(model, ids, token_bytes=None, features=None, autocast=contextlib.nullcontext):
    token_bytes = torch.ones(V, dtype=torch.int32) if token_bytes is None else token_bytes
    return evaluate_prediction(model, ids, token_bytes, autocast, "cpu", features)


def plain_nll(model, ids):
    """Nats of every target [B, L] from the whole logits."""
    ids = ids.long()
    with torch.no_grad():
        logits = model.logits(*sequential(model.step, model.embed(ids[:, :-1]), model.context_dim))
    nll = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(ids), -1), logits.argmax(-1) == ids[:, 1:]


# Trajectories


def test_trajectories_are_the_sequential_ones(model, small_parts):
    """Contexts and streams of all samples but their last ids, in parts that do not show."""
    ids = samples(12)
    contexts, streams = trajectories(model, ids, contextlib.nullcontext, "cpu")
    expected = sequential(model.step, model.embed(ids[:, :-1].long()), model.context_dim)
    assert contexts.shape == (12, L, 10) and streams.shape == (12, L, 8)
    torch.testing.assert_close(contexts, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(streams, expected[1], rtol=0, atol=1e-5)
    assert not contexts.requires_grad


def test_trajectories_come_in_the_type_asked_for(model):
    """Stored features take two bytes a value."""
    exact, _ = trajectories(model, samples(2), contextlib.nullcontext, "cpu")
    contexts, streams = trajectories(model, samples(2), contextlib.nullcontext, "cpu", torch.bfloat16)
    assert contexts.dtype == streams.dtype == torch.bfloat16
    assert torch.equal(contexts, exact.bfloat16())


# Prediction


def test_the_metrics_are_those_of_the_whole_logits(model, small_parts):
    """Mean nats, its exponential, the share of right argmaxes, and bits over bytes."""
    ids, token_bytes = samples(12), torch.arange(1, V + 1, dtype=torch.int32)
    model.eval()
    nll, right = plain_nll(model, ids)
    got = predict(model, ids, token_bytes)
    assert got["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert got["ppl"] == pytest.approx(math.exp(got["loss"]))
    assert got["acc"] == pytest.approx(right.float().mean().item())
    num_bytes = sum(int(token) + 1 for sample in ids for token in sample[1:])
    assert got["bpb"] == pytest.approx(nll.sum().item() / math.log(2) / num_bytes, rel=1e-5)


def test_accuracy_counts_hits(model):
    """Samples made of the model's own predictions are all right."""
    model.eval()
    ids = samples(4)
    for t in range(L):
        contexts, streams = trajectories(model, ids, contextlib.nullcontext, "cpu")
        ids[:, t + 1] = model.logits(contexts, streams)[:, t].argmax(-1)
    assert predict(model, ids)["acc"] == 1


def test_features_at_hand_take_the_place_of_the_trajectories(model, small_parts):
    """With them F is not evaluated, and the numbers are the same."""
    ids = samples(12)
    features = trajectories(model, ids, contextlib.nullcontext, "cpu")
    expected = predict(model, ids)
    model.context_map = None
    assert predict(model, ids, features=lambda part: [f[part] for f in features]) == pytest.approx(
        expected, rel=1e-6
    )


def test_dropout_is_off(model):
    """Evaluation in the middle of training is an evaluation: the same number twice."""
    model = LanguageModel(settings(dropout=0.9), V)
    model.train()
    assert predict(model, samples(3)) == predict(model, samples(3))


def test_prediction_leaves_the_weights_and_the_random_state_alone(model):
    """Measuring more often changes no run."""
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    predict(model, samples(3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_is_close(model):
    """Under bf16 autocast the loss is within a hundredth."""
    ids = samples(12)
    half = predict(model, ids, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert half["loss"] == pytest.approx(predict(model, ids)["loss"], rel=1e-2)


def test_a_hopeless_loss_has_a_finite_perplexity(model):
    """The exponential does not overflow."""
    with torch.no_grad():
        model.embedding.weight.mul_(1e6)
    assert math.isfinite(predict(model, samples(3))["ppl"])


def test_bytes_of_targets_by_hand():
    """Two samples, targets of 1 + 2 and 3 + 1 bytes. First ids are no targets."""
    ids, token_bytes = torch.tensor([[3, 0, 1], [3, 2, 0]]).int(), torch.tensor([1, 2, 3, 100])
    assert text_bytes(ids, token_bytes) == 7


def test_bits_per_byte_are_nats_over_the_bytes_of_the_text(model):
    """bpb * bytes * ln 2 = loss * targets."""
    ids, token_bytes = samples(5), torch.arange(1, V + 1)
    found = predict(model, ids, token_bytes)
    bytes_of_text = (ids[:, 1:] + 1).sum().item()
    assert found["bpb"] * bytes_of_text * math.log(2) == pytest.approx(found["loss"] * 5 * L)


def test_a_cut_context_is_made_of_the_last_tokens_alone(model):
    """The point at k is what prediction gives when each context is computed from the last k tokens in a sample of their own."""
    model.eval()
    ids, token_bytes = samples(4), torch.ones(V)
    curve = evaluate.bpb_by_context(model, ids, token_bytes, contextlib.nullcontext, "cpu")
    assert list(curve) == [1, 2, 4, 8, L]
    assert curve[L] == pytest.approx(predict(model, ids)["bpb"], rel=1e-5)
    for k in (1, 4):
        nats = 0.0
        for t in range(L):
            window = model.embed(ids[:, max(0, t + 1 - k) : t + 1].long())
            contexts, streams = sequential(model.step, window, model.context_dim)
            logits = model.logits(contexts[:, -1], streams[:, -1])
            nats += functional.cross_entropy(logits, ids[:, t + 1].long(), reduction="sum").item()
        assert curve[k] == pytest.approx(nats / math.log(2) / (4 * L), rel=1e-5)


# Contexts


def test_context_metrics_have_their_names(model):
    """The documented keys, plain numbers and curves that JSON can hold."""
    got = evaluate_contexts(model, data(), settings(), "cpu")
    assert set(got) == KEYS
    assert len(got["cold_start_curve"]) == evaluate.MAX_SWEEPS
    assert got["cold_start_error_10"] == got["cold_start_curve"][9]
    assert got["past_capacity"] == pytest.approx(sum(got["past_capacity_by_lag"]))
    assert got["rank_tokens"] == 12 * L  # as many training as validation samples
    assert all(isinstance(v, int | float | list | dict | None) for v in got.values())
    for name in ("er_train", "er_val", "er_ceiling"):
        assert 0.1 <= got[name] <= 1
    assert list(got["spectrum"]) == list(range(1, 11)) and sum(got["spectrum"].values()) == pytest.approx(1)
    assert sorted(got["spectrum"].values(), reverse=True) == list(got["spectrum"].values())


def test_context_metrics_are_the_same_twice(model):
    """Untrained and trained are compared by the same probes; nothing is drawn from the global generator."""
    torch.manual_seed(1)
    first = evaluate_contexts(model, data(), settings(), "cpu")
    torch.manual_seed(2)
    assert evaluate_contexts(model, data(), settings(), "cpu") == first


def test_context_metrics_of_a_memoryless_map():
    """c_t = e_t: no horizon, no past, all of the token; exact after one sweep and seen to stand still in the second."""
    model = Map(lambda context, token: (token, token), context_dim=4)
    got = evaluate_contexts(model, data(60, 60), settings(), "cpu")
    assert got["memory_horizon"] == 0
    assert got["past_capacity"] < 0.1
    assert got["identity_r2"] == pytest.approx(1, abs=1e-4)
    assert got["contraction"] == 0 and got["cold_start_error_10"] == 0
    assert got["sweeps_to_convergence"] == 2 and got["converged_ratio"] == 1


def test_context_metrics_of_a_delay_line():
    """c_t = [e_t, e_{t-1}, e_{t-2}]: horizon 2, a past of two tokens, a third of it the current one."""
    model = Map(lambda context, token: (torch.cat([token, context], -1)[..., :12], token), context_dim=12)
    got = evaluate_contexts(model, data(60, 60), settings(), "cpu")
    assert got["memory_horizon"] == 2
    assert got["past_capacity"] == pytest.approx(2, abs=0.1)
    assert got["identity_r2"] == pytest.approx(1 / 3, abs=0.06)
    assert got["sweeps_to_convergence"] == 4


def test_a_chaotic_map_has_no_sweep_of_convergence():
    """It is None, and the error of cold sweeps does not fall."""
    model = Map(lambda context, token: (torch.sin(9 * context) + token, token), context_dim=4)
    got = evaluate_contexts(model, data(length=40), settings(), "cpu")
    assert got["sweeps_to_convergence"] is None
    assert got["converged_ratio"] < 0.5 and got["cold_start_error_10"] > 0.1
    assert got["contraction"] > 0.9


def test_rank_is_measured_on_equally_many_tokens_of_both_splits(monkeypatch):
    """Its ceiling is that of the same number, and more samples than RANK_TOKENS need are not touched."""
    monkeypatch.setattr(evaluate, "RANK_TOKENS", 30)
    model = Map(lambda context, token: (token, token), context_dim=4)
    few = evaluate_contexts(model, data(3, 3), settings(), "cpu")
    assert few["rank_tokens"] == 30
    assert evaluate_contexts(model, data(20, 20), settings(), "cpu")["rank_tokens"] == 30
    assert evaluate_contexts(model, data(1, 20), settings(), "cpu")["rank_tokens"] == L


def test_progress_of_the_evaluations_ends_at_its_total(model):
    """Tokens that the bars are told of are what they expected, but for sequences in which no token could be replaced."""
    bars = []

    class Bar:
        def __init__(self, label, total):
            self.total, self.done = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, tokens):
            self.done += tokens

    evaluate_contexts(model, data(5, 60), settings(), "cpu", Bar)
    evaluate.bpb_by_context(model, data().val, torch.ones(V), contextlib.nullcontext, "cpu", Bar)
    assert len(bars) == 2 and all(0.9 * bar.total < bar.done <= bar.total for bar in bars)

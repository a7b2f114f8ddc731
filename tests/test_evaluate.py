"""From (model, data) to metrics: exact trajectories, plain arithmetic, the same numbers twice."""

import contextlib
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from config import ResidualConfig
from newllm import evaluate
from newllm.evaluate import bpb_by_context, evaluate_contexts, evaluate_prediction, sample_nats, trajectories
from newllm.fixed_point.solver import sequential
from newllm.models.network import LanguageModel

V, L, C, E = 30, 12, 10, 8
EXACT = contextlib.nullcontext, torch.device("cpu")
BYTES = torch.arange(1, V + 1, dtype=torch.int32)


def settings(**changes):
    return ResidualConfig(**dict(context_dim=C, embed_dim=E, num_layers=2) | changes)


def samples(count, length=L, seed=0):
    """int32 [count, length + 1], as the data layer stores them."""
    return torch.randint(V, (count, length + 1), generator=torch.Generator().manual_seed(seed)).int()


def data(train=20, val=12, length=L):
    return SimpleNamespace(train=samples(train, length, 1), val=samples(val, length, 2))


@pytest.fixture
def model():
    return LanguageModel(settings(), V).eval()


def map_of(step, context_dim):
    """A fixed map on one random vector per token: what evaluate_contexts asks of a model, and no more."""
    made = nn.Module()
    table = torch.randn(V, 4, generator=torch.Generator().manual_seed(0))
    made.step, made.context_dim, made.embed = step, context_dim, lambda ids: table[ids]
    return made


def predict(model, ids, autocast=contextlib.nullcontext, features=None):
    return evaluate_prediction(model, ids, BYTES, autocast, torch.device("cpu"), features)


@pytest.mark.parametrize("at_once", [5, 256])
def test_the_metrics_are_those_of_the_whole_logits(model, monkeypatch, at_once):
    """Mean nats, its exponential, right argmaxes, bits over the targets' bytes; in uneven parts."""
    monkeypatch.setattr(evaluate, "SEQUENCES_AT_A_TIME", at_once)
    ids = samples(12)
    targets = ids[:, 1:].long()
    with torch.no_grad():
        features = sequential(model.step, model.embed(ids[:, :-1].long()), C)
        logits = model.logits(*features)
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(12, -1)
    metrics = predict(model, ids)
    assert metrics["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert metrics["ppl"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["acc"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    num_bytes = (targets + 1).sum().item()
    assert metrics["bpb"] == pytest.approx(nll.sum().item() / math.log(2) / num_bytes, rel=1e-5)
    torch.testing.assert_close(sample_nats(model, ids, *EXACT), nll.double().sum(-1), rtol=1e-5, atol=0)
    exact = trajectories(model, ids, *EXACT)
    for values, rounded, wanted in zip(
        exact, trajectories(model, ids, *EXACT, torch.bfloat16), features, strict=True
    ):
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5)
        assert torch.equal(rounded, values.bfloat16()) and not values.requires_grad
    model.context_map = None  # features at hand take the place of the trajectories
    again = predict(model, ids, features=lambda part: [feature[part] for feature in features])
    assert again == pytest.approx(metrics, rel=1e-6)


def test_prediction_changes_nothing_and_knows_no_dropout():
    """In the middle of training too: the same number twice; weights, gradients, random state as they were."""
    model = LanguageModel(settings(dropout=0.9), V).train()
    state = torch.get_rng_state()
    first = predict(model, samples(3))
    assert predict(model.train(), samples(3)) == first
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def test_half_precision_is_close_and_a_hopeless_loss_finite(model):
    """Under bf16 autocast the loss is within a hundredth; the exponential does not overflow."""
    half = predict(model, samples(12), functools.partial(torch.autocast, "cpu", torch.bfloat16))
    assert half["loss"] == pytest.approx(predict(model, samples(12))["loss"], rel=1e-2)
    model.embedding.weight.data.mul_(1e6)
    assert math.isfinite(predict(model, samples(3))["ppl"])


def test_a_cut_context_is_made_of_the_last_tokens_alone(model):
    """The point at k is what prediction gives when each context comes from its last k tokens alone."""
    ids = samples(4)
    curve = bpb_by_context(model, ids, BYTES, *EXACT)
    assert list(curve) == [1, 2, 4, 8, L]
    assert curve[L] == pytest.approx(predict(model, ids)["bpb"], rel=1e-5)
    for k in (1, 4):
        nats = 0.0
        for t in range(L):
            window = model.embed(ids[:, max(0, t + 1 - k) : t + 1].long())
            contexts, streams = sequential(model.step, window, C)
            logits = model.logits(contexts[:, -1], streams[:, -1])
            nats += functional.cross_entropy(logits, ids[:, t + 1].long(), reduction="sum").item()
        assert curve[k] == pytest.approx(nats / math.log(2) / (ids[:, 1:] + 1).sum().item(), rel=1e-5)


def test_context_metrics_are_plain_and_the_same_twice(model):
    """Numbers and curves that JSON can hold, of as many tokens of both splits; bars end at their totals."""
    bars = []

    @contextlib.contextmanager
    def progress(label, total):
        done = []
        yield SimpleNamespace(update=done.append)
        bars.append((sum(done), total))

    torch.manual_seed(1)
    first = evaluate_contexts(model, data(), settings(), "cpu", progress)
    torch.manual_seed(2)
    assert evaluate_contexts(model, data(), settings(), "cpu") == first
    assert all(isinstance(value, int | float | list | dict | None) for value in first.values())
    assert len(first["cold_start_curve"]) == evaluate.MAX_SWEEPS
    assert first["cold_start_error_10"] == first["cold_start_curve"][9]
    assert first["past_capacity"] == pytest.approx(sum(first["past_capacity_by_lag"]))
    assert all(0.1 <= first[name] <= 1 for name in ("er_train", "er_val", "er_ceiling"))
    assert first["rank_tokens"] == 12 * L
    shares = list(first["spectrum"].values())
    assert list(first["spectrum"]) == list(range(1, 11))
    assert sum(shares) == pytest.approx(1) and sorted(shares, reverse=True) == shares
    bpb_by_context(model, data().val, BYTES, *EXACT, progress)
    # Sequences in which no token could be replaced are not counted.
    assert len(bars) == 2 and all(0.9 * total < done <= total for done, total in bars)


def delayed(context, token):
    return torch.cat([token, context], -1)[..., :12], token


@pytest.mark.parametrize(
    ("step", "width", "horizon", "past", "current", "sweeps"),
    [(lambda context, token: (token, token), 4, 0, 0, 1, 2), (delayed, 12, 2, 2, 1 / 3, 4)],
    ids=["memoryless", "delay line"],
)
def test_context_metrics_of_maps_known_by_hand(step, width, horizon, past, current, sweeps):
    """c_t = e_t has no past and is all token; [e_t, e_{t-1}, e_{t-2}] has two."""
    metrics = evaluate_contexts(map_of(step, width), data(60, 60), settings(), "cpu")
    assert metrics["memory_horizon"] == horizon and metrics["sweeps_to_convergence"] == sweeps
    assert metrics["past_capacity"] == pytest.approx(past, abs=0.1)
    assert metrics["cold_start_error_10"] == 0 and metrics["converged_ratio"] == 1


def test_a_chaotic_map_has_no_sweep_of_convergence():
    """It is None, and the error of cold sweeps does not fall."""
    chaotic = map_of(lambda context, token: (torch.sin(9 * context) + token, token), 4)
    metrics = evaluate_contexts(chaotic, data(length=40), settings(), "cpu")
    assert metrics["sweeps_to_convergence"] is None
    assert metrics["converged_ratio"] < 0.5 and metrics["cold_start_error_10"] > 0.1
    assert metrics["contraction"] > 0.9
    assert metrics["lyapunov_exponent"] > 0.5 and metrics["sweeps_to_1_percent"] is None


@pytest.mark.parametrize(("factor", "sweeps"), [(0.3, 4), (0.5, 7)])
def test_sweeps_to_one_percent_are_as_many_as_the_exponent_says(factor, sweeps):
    """Of a leak: the first k with factor^k below 1 %."""
    leak = map_of(lambda context, token: (factor * context + token, token), 4)
    metrics = evaluate_contexts(leak, data(length=100), settings(), "cpu")
    assert metrics["lyapunov_exponent"] == pytest.approx(math.log(factor), abs=1e-4)
    assert metrics["sweeps_to_1_percent"] == sweeps == math.ceil(math.log(0.01) / math.log(factor))

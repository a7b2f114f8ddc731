"""Baselines: causal, of the sizes asked for, the same from the same seed, and one interface with the main model."""

import dataclasses

import pytest
import torch

from config import ResidualConfig
from newllm.errors import UserError
from newllm.models.baselines import BASELINES, KERNELS, Baseline, build_model
from newllm.models.network import LanguageModel, Window

V, T = 50, 12


def settings(kind, **changes):
    return ResidualConfig(
        model_type=kind, context_dim=24, embed_dim=16, num_layers=2, max_seq_length=T, dropout=0.0, **changes
    )


def ids(count=3, seed=0):
    return torch.randint(V, (count, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=BASELINES)
def baseline(request):
    return Baseline(settings(request.param), V).eval()


def logits(model, tokens):
    return model.logits(*model.encode(tokens))


@torch.no_grad()
def test_a_stream_has_read_what_came_before_and_nothing_else(baseline):
    """Changing token t changes the logits from t on, and no earlier one."""
    tokens, changed = ids(), ids()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = logits(baseline, tokens), logits(baseline, changed)
    assert before.shape == (3, T, V)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-7)
    assert (before[:, 5:] - after[:, 5:]).abs().amax() > 1e-5


def test_the_first_loss_is_that_of_a_guess(baseline):
    """ln V within a tenth: nothing is preferred before training."""
    tokens = ids(20)
    nll = torch.nn.functional.cross_entropy(
        logits(baseline, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert nll.item() == pytest.approx(torch.tensor(float(V)).log().item(), abs=0.1)


@pytest.mark.parametrize("kind", BASELINES)
def test_the_seed_alone_makes_the_weights(kind):
    """Whatever was drawn before; and drawing them disturbs nobody."""
    torch.manual_seed(5)
    one = Baseline(settings(kind), V).state_dict()
    state = torch.get_rng_state()
    two, other = Baseline(settings(kind), V).state_dict(), Baseline(settings(kind, seed=1), V).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_baseline_has_the_interface_of_the_model(baseline):
    """All trains in Phase 2, nothing in Phase 1; the two parts of the state are the whole; the logits are tied."""
    assert baseline.context_parameters() == []
    assert len(baseline.head_parameters()) == len(list(baseline.parameters()))
    state = baseline.state_dict()
    assert (baseline.frozen_state() | baseline.trained_state()).keys() == state.keys()
    assert baseline.output_weights()[0] is baseline.embedding.weight


def test_untied_and_pretrained():
    """An output of its own; given embeddings stay as they are."""
    model = Baseline(settings("gru", tie_weights=False), V, torch.ones(V, 16))
    assert model.output_weights() == (model.output.weight, model.output_bias)
    assert list(model.frozen_state()) == ["embedding.weight"] and not model.embedding.weight.requires_grad
    assert all(p is not model.embedding.weight for p in model.head_parameters())


def test_gradients_reach_every_parameter(baseline):
    """Nothing is left out of training."""
    logits(baseline, ids()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in baseline.head_parameters())


# Attention


@torch.no_grad()
def test_kernels_of_attention_agree():
    """Flash against the formula, in the same Transformer: logits differ by rounding alone."""
    flash, formula = (
        Baseline(settings("transformer", attention=name), V).eval() for name in ("flash", "math")
    )
    assert (logits(flash, ids()) - logits(formula, ids())).abs().max() < 1e-5


def test_the_kernel_in_effect_is_named_or_refused(recwarn):
    """What torch picks, what was asked for, and what the device does not have, in one sentence: on a CPU flash knows no dropout."""
    cpu, named = torch.device("cpu"), []
    for name in ("auto", "flash", "math"):
        named.append(
            Baseline(settings("transformer", attention=name), V).attention_in_effect(cpu, torch.float32)
        )
    assert named == ["flash_attention", "flash_attention", "math"]
    assert Baseline(settings("gru"), V).attention_in_effect(cpu, torch.float32) is None
    dropping = dataclasses.replace(settings("transformer", attention="flash"), dropout=0.1)
    with pytest.raises(UserError, match="take --attention auto"):
        Baseline(dropping, V).attention_in_effect(cpu, torch.float32)
    assert not recwarn


def test_the_kernel_asked_for_runs(monkeypatch):
    """A Transformer that must not use flash attention does not, also backward."""
    used = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, **options):
        used.append(torch._fused_sdp_choice(query, key, value, None, 0.0, True))
        return real(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    for name, kernel in KERNELS.items():
        used.clear()
        logits(Baseline(settings("transformer", attention=name), V), ids()).sum().backward()
        assert used and set(used) == {kernel.value}


# Controls


def test_a_window_holds_its_tokens_and_forgets_the_rest():
    """The lags are projections of the last Window.LAGS embeddings, to the bit; the averages reach further."""
    window = Window(32, 16, seed=0)
    tokens, context = torch.randn(30, 16), torch.zeros(32)
    for token in tokens:
        context, stream = window(context, token)
    expected = (tokens.flip(0)[:Window.LAGS] @ window.lag).flatten()
    assert torch.allclose(context[: len(expected)], expected, atol=1e-6) and torch.equal(stream, tokens[-1])
    other, start = torch.zeros(32), tokens.clone()
    start[0] += 10
    for token in start:
        other, _ = window(other, token)
    assert torch.equal(other[: len(expected)], context[: len(expected)])
    assert not torch.allclose(other[len(expected) :], context[len(expected) :])


def test_the_averages_keep_their_variance():
    """a <- l a + sqrt(1 - l^2) Q e of white tokens has the variance of Q e, for every time constant."""
    window, context = Window(64, 16, seed=0), torch.zeros(4000, 64)
    for _ in range(3 * max(Window.TIME_CONSTANTS)):
        context, _ = window(context, torch.randn(4000, 16))
    expected = window.slow.square().sum(0)
    assert torch.allclose(context[:, -len(expected) :].var(0), expected, rtol=0.15)


@pytest.mark.parametrize("kind", ["window", "token"])
def test_controls_train_nothing_of_the_context(kind):
    """There is no Phase 1 for them, and the head does not move what feeds the window."""
    model = LanguageModel(settings(kind), V)
    assert model.context_parameters() == []
    moved = {id(p) for p in model.head_parameters()}
    assert not moved & {id(p) for p in model.embed_norm.parameters()}


def test_no_context_is_none():
    """The head sees the current token and zeros."""
    model = LanguageModel(settings("token"), V)
    token = model.embed(torch.tensor([3]))
    context, stream = model.step(torch.ones(1, 24), token)
    assert not context.any() and torch.equal(stream, token)


def test_a_window_too_wide_for_its_context_is_refused():
    """One sentence, with the least that does."""
    with pytest.raises(UserError, match="context_dim of at least 12"):
        build_model(dataclasses.replace(settings("window"), context_dim=11), V)
    build_model(dataclasses.replace(settings("window"), context_dim=12), V)

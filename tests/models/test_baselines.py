"""Baselines: causal, of the sizes asked for, the same from the same seed, with the interface of the model."""

import math

import pytest
import torch
from torch.nn import functional

from config import ResidualConfig
from newllm.errors import UserError
from newllm.models.baselines import BASELINES, KERNELS, Baseline, build_model

V, T = 50, 12


def settings(kind, **changes):
    sizes = dict(context_dim=24, embed_dim=16, num_layers=2, max_seq_length=T, dropout=0.0)
    return ResidualConfig(model_type=kind, **sizes | changes)


def ids(count=3):
    return torch.randint(V, (count, T), generator=torch.Generator().manual_seed(0))


def logits(model, tokens):
    return model.logits(*model.encode(tokens))


@pytest.mark.parametrize("kind", BASELINES)
@torch.no_grad()
def test_a_stream_has_read_what_came_before_and_nothing_else(kind):
    """Changing token t changes the logits from t on, and no earlier one; token by token they are the same."""
    model, tokens, changed = Baseline(settings(kind), V).eval(), ids(), ids()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = logits(model, tokens), logits(model, changed)
    assert before.shape == (3, T, V)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-7)
    assert (before[:, 5:] - after[:, 5:]).abs().amax() > 1e-5
    state = None
    for t in range(T):
        *place, state = model.advance(tokens[:, t], state)
        last = model.logits(*place)
        torch.testing.assert_close(last, before[:, t], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_has_the_interface_of_the_model(kind):
    """All trains in Phase 2, from the loss of a guess on, nothing in Phase 1; logits are tied."""
    model = Baseline(settings(kind), V).eval()
    assert model.context_parameters() == []
    assert len(model.head_parameters()) == len(list(model.parameters()))
    assert (model.frozen_state() | model.trained_state()).keys() == model.state_dict().keys()
    assert model.output_weights()[0] is model.embedding.weight
    tokens = ids(20)
    loss = functional.cross_entropy(logits(model, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)
    logits(model, tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head_parameters())


def test_untied_and_pretrained():
    """An output of its own; given embeddings stay as they are."""
    model = Baseline(settings("gru", tie_weights=False), V, torch.ones(V, 16))
    assert model.output_weights() == (model.output.weight, model.output_bias)
    assert list(model.frozen_state()) == ["embedding.weight"] and not model.embedding.weight.requires_grad
    assert all(p is not model.embedding.weight for p in model.head_parameters())


def test_a_window_too_wide_for_its_context_is_refused():
    """One sentence, with the least that does."""
    with pytest.raises(UserError, match="context_dim of at least 12"):
        build_model(settings("window", context_dim=11), V)
    build_model(settings("window", context_dim=12), V)


# Attention


def test_the_kernel_asked_for_runs_and_kernels_agree(monkeypatch, recwarn):
    """It is the one that is named, backward too; logits differ by rounding alone."""
    used, made = [], []
    real = functional.scaled_dot_product_attention

    def watch(query, key, value, **options):
        used.append(torch._fused_sdp_choice(query, key, value, None, 0.0, True))
        return real(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    for name, kernel in {"auto": KERNELS["flash"], **KERNELS}.items():
        model = Baseline(settings("transformer", attention=name), V).eval()
        assert model.attention_in_effect(torch.device("cpu"), torch.float32) == kernel.name.lower()
        used.clear()
        made.append(logits(model, ids()))
        made[-1].sum().backward()
        assert set(used) == {kernel.value}
    torch.testing.assert_close(made[1], made[2], rtol=0, atol=1e-5)
    assert not recwarn


def test_a_kernel_that_is_not_there_is_one_sentence():
    """A CPU has no flash attention with dropout; a GRU has no attention."""
    dropping = Baseline(settings("transformer", attention="flash", dropout=0.1), V)
    with pytest.raises(UserError, match="take --attention auto"):
        dropping.attention_in_effect(torch.device("cpu"), torch.float32)
    assert Baseline(settings("gru"), V).attention_in_effect(torch.device("cpu"), torch.float32) is None

"""What all models share: logits that begin at the frequencies of tokens, and a state in two parts."""

import pytest
import torch
from torch.nn import functional

from config import ResidualConfig
from newllm.fixed_point.solver import truncated
from newllm.models.baselines import Baseline
from newllm.models.network import LanguageModel, TokenDropout

V = 40


@pytest.fixture(params=["context", "gru", "transformer"])
def model(request):
    config = ResidualConfig(
        model_type=request.param, context_dim=16, embed_dim=16, num_layers=1, max_seq_length=32
    )
    return (LanguageModel if request.param == "context" else Baseline)(config, V)


def streams(model, count):
    generator = torch.Generator().manual_seed(0)
    return torch.zeros(count, model.context_dim), torch.randn(count, 16, generator=generator)


def test_before_training_a_token_is_as_likely_as_it_is_frequent(model):
    """Whatever the head reads; ids that never occur are unlikely, not impossible; the first loss is that of a unigram."""
    ids = torch.tensor([[1] * 600 + [2] * 300 + [3] * 100]).int()
    model.start_at_frequencies(ids)
    shares = model.eval().logits(*streams(model, 200)).softmax(-1).mean(0)
    expected = (torch.bincount(ids[0].long(), minlength=V) + 1) / (1000 + V)
    torch.testing.assert_close(shares, expected, rtol=0.2, atol=1e-4)
    loss = functional.cross_entropy(model.logits(*streams(model, 1000)), ids[0].long())
    entropy = -(expected[ids[0].long()].log().mean())
    assert loss.item() == pytest.approx(entropy.item(), abs=0.05)


def test_the_bias_trains_and_is_part_of_the_state(model):
    """It starts at the frequencies and is not held there."""
    assert any(p is model.output_bias for p in model.head_parameters())
    assert "output_bias" in model.trained_state() and "output_bias" not in model.frozen_state()


def test_token_dropout_hides_whole_tokens_in_training_alone():
    """About the share asked for, all of a vector by the same other one; what is left is as it was; none in evaluation."""
    torch.manual_seed(0)
    drop, embeddings = TokenDropout(0.2, 8), 3 * torch.randn(40, 50, 8)
    seen = drop(embeddings)
    hidden = (seen != embeddings).all(-1)
    assert hidden.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(seen[~hidden], embeddings[~hidden]) and (seen[hidden] == seen[hidden][0]).all()
    assert seen[hidden][0].norm().item() == pytest.approx(3 * drop.blank.norm().item(), rel=0.05)
    assert drop.eval()(embeddings) is embeddings and not drop.state_dict()


def test_hidden_first_tokens_do_not_blow_up_the_gradient_of_a_deep_untrained_network():
    """Six layers through three sweeps, every first token hidden: a gradient of ordinary size."""
    config = ResidualConfig(context_dim=64, embed_dim=64, num_layers=6, token_dropout=0.95, dropout=0.0)
    model = LanguageModel(config, V).train()
    torch.manual_seed(0)
    tokens = model.token_dropout(model.embed(torch.randint(V, (8, 12))))
    contexts, streams = truncated(model.step, tokens, 64, 3)
    model.hidden(contexts, streams).square().sum(-1).mean().backward()
    gradients = [p.grad.norm() for p in model.context_parameters()]
    assert 0 < torch.stack(gradients).norm() < 1e3

"""The network: formulas, initialisation, causality, which parameters move what; untrained controls."""

import pytest
import torch
from torch.nn import functional

from config import ResidualConfig
from newllm.fixed_point.solver import sequential
from newllm.models.baselines import build_model
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.models.network import ALIGNED_LOGIT, ContextMap, LanguageModel, TokenDropout, Window

V, B, T, C, E = 50, 3, 8, 12, 8
HEADS = [dict(), dict(tie_weights=False), dict(token_layers=0), dict(token_layers=2, tie_weights=False)]


def small_model(pretrained=None, **changes):
    sizes = dict(context_dim=C, embed_dim=E, num_layers=2)
    return LanguageModel(ResidualConfig(**sizes | changes), V, pretrained).eval()


def random_ids(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def contexts_of(model, ids):
    return sequential(model.step, model.embed(ids), model.context_dim)


def loss_of(model, ids):
    contexts, streams = contexts_of(model, ids[:, :-1])
    return linear_cross_entropy(model.hidden(contexts, streams), *model.output_weights(), ids[:, 1:])


# The context map


def test_the_map_is_its_formula_on_any_leading_axes():
    """o = ReLU(W [c; e] + b); c <- LN(c + o_c); e <- LN(e + o_e); without stream the same context."""
    torch.manual_seed(0)
    step = ContextMap(C, E, 3).double()
    context, token = torch.randn(2, 3, C).double(), torch.randn(2, 3, E).double()
    got = step(context, token)
    alone, none = step(context, token, stream=False)
    for layer in step.layers:
        update = torch.relu(torch.cat([context, token], -1) @ layer.mix.weight.T + layer.mix.bias)
        context = functional.layer_norm(context + update[..., :C], (C,))
        token = functional.layer_norm(token + update[..., C:], (E,))
    torch.testing.assert_close(got, (context, token))
    torch.testing.assert_close(alone, context)
    assert none is None


def test_a_window_holds_its_tokens_and_forgets_the_rest():
    """The lags are projections of the last tokens, to the bit; the averages reach further."""
    window, tokens, contexts = Window(32, 16, seed=0), torch.randn(30, 16), []
    for first in (tokens[0], tokens[0] + 10):
        context = torch.zeros(32)
        for token in (first, *tokens[1:]):
            context, stream = window(context, token)
            assert torch.equal(stream, token)
        contexts.append(context)
    expected = (tokens.flip(0)[: Window.LAGS] @ window.lag).flatten()
    (lags, averages), (others, moved) = (context.tensor_split([len(expected)]) for context in contexts)
    torch.testing.assert_close(lags, expected, rtol=0, atol=1e-6)
    assert torch.equal(lags, others) and not torch.allclose(averages, moved)


def test_controls_train_nothing_of_the_context():
    """There is no Phase 1 for them, and the head does not move what feeds them; no context is zeros."""
    for kind in ("window", "token"):
        model = small_model(model_type=kind)
        assert model.context_parameters() == []
        moved = {id(p) for p in model.head_parameters()}
        assert not moved & {id(p) for p in model.embed_norm.parameters()}
    token = model.embed(torch.tensor([3]))
    context, stream = model.step(torch.ones(1, C), token)
    assert not context.any() and torch.equal(stream, token)


# Initialisation


def test_the_seed_preset_has_the_published_number_of_parameters():
    """GPT-2 vocabulary, 6 layers of 768 + 768, untied: 91,429,969."""
    with torch.device("meta"):
        model = LanguageModel(ResidualConfig(preset="seed"), 50257)
    assert sum(parameter.numel() for parameter in model.parameters()) == 91_429_969


@pytest.mark.parametrize("head", HEADS)
def test_initialisation_is_a_function_of_the_seed_alone(head):
    """Neither the global generator nor the head shifts the draw of embedding and F."""
    torch.manual_seed(1)
    state = small_model(**head).state_dict()
    torch.manual_seed(2)
    again, other = small_model(**head).state_dict(), small_model(seed=2, **head).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert not any(torch.equal(other[name], tensor) for name, tensor in state.items() if tensor.dim() > 1)
    plain = small_model().state_dict()
    assert all(torch.equal(plain[n], state[n]) for n in plain if n.startswith(("embed", "context_map")))


def test_init_scale_scales_the_matrices_of_the_context_map_alone():
    """std is init_scale / sqrt(fan-in); the head and the embedding keep theirs."""
    plain, doubled = small_model(init_scale=0.5), small_model(init_scale=1.0)
    in_map = {id(p) for p in doubled.context_map.parameters() if p.dim() > 1}
    for a, b in zip(plain.parameters(), doubled.parameters(), strict=True):
        torch.testing.assert_close(b, 2 * a if id(b) in in_map else a)
    weights = torch.cat([layer.mix.weight.flatten() for layer in plain.context_map.layers])
    assert weights.std().item() == pytest.approx(0.5 / (C + E) ** 0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["context", "gru", "transformer"])
def test_before_training_a_token_is_as_likely_as_it_is_frequent(kind):
    """Whatever the head reads; ids that never occur are unlikely, not impossible; the bias trains on."""
    sizes = dict(context_dim=16, embed_dim=16, num_layers=1, max_seq_length=32)
    model = build_model(ResidualConfig(model_type=kind, **sizes), V).eval()
    ids = torch.tensor([[1] * 600 + [2] * 300 + [3] * 100]).int()
    model.start_at_frequencies(ids)
    logits = model.logits(torch.zeros(1000, model.context_dim), torch.randn(1000, 16))
    expected = (torch.bincount(ids[0].long(), minlength=V) + 1) / (1000 + V)
    torch.testing.assert_close(logits.softmax(-1).mean(0), expected, rtol=0.2, atol=1e-4)
    assert any(p is model.output_bias for p in model.head_parameters())
    assert "output_bias" in model.trained_state() and "output_bias" not in model.frozen_state()


# Causality


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_nothing_before_a_token_depends_on_it(head):
    """Another token at t leaves contexts and logits before t bit-identical."""
    model, ids = small_model(**head), random_ids(B, T)
    others = ids.clone()
    others[:, 5] = (ids[:, 5] + 1) % V
    contexts, changed = contexts_of(model, ids), contexts_of(model, others)
    for before, after in zip(
        (*contexts, model.logits(*contexts)), (*changed, model.logits(*changed)), strict=True
    ):
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.equal(before[:, 5], after[:, 5])


# Parameters


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pretrained", [None, torch.ones(V, E)], ids=["random", "pretrained"])
def test_context_and_head_parameters_are_all_that_trains_each_once(head, pretrained, freeze):
    """An embedding trains if logits or moving contexts read it, and is not a given one."""
    model = small_model(pretrained=pretrained, freeze_context=freeze, **head)
    listed = [id(p) for p in [*model.context_parameters(), *model.head_parameters()]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    unread = freeze and not head.get("tie_weights", True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"embedding.weight"} if unread or pretrained is not None else set())


@pytest.mark.parametrize("head", HEADS)
def test_frozen_contexts_depend_on_every_context_parameter_and_on_no_other(head):
    """F reads a frozen copy of the embedding: training that and the head moves no context."""
    model, ids = small_model(freeze_context=True, **head), random_ids(B, T + 1)
    before = contexts_of(model, ids)
    (before[0].square().sum() + (before[1] * torch.arange(E)).sum()).backward()
    assert all(p.grad is not None for p in model.context_parameters())
    assert all(p.grad is None for p in model.head_parameters())
    with torch.no_grad():
        for parameter in model.head_parameters():
            parameter.add_(1)
    assert all(torch.equal(old, new) for old, new in zip(before, contexts_of(model, ids), strict=True))


def test_contexts_that_move_learn_to_read_the_embedding():
    """One embedding for F and the logits: its gradient has both; asked to keep it fixed, F adds none."""
    model, ids = small_model(tie_weights=False), random_ids(B, T + 1)
    (gradient,) = torch.autograd.grad(loss_of(model, ids), [model.embedding.weight])
    assert gradient.abs().sum() > 0 and "context_embedding" not in model.state_dict()
    assert torch.equal(model.embed(ids), model.embed(ids, fixed=True))
    model.embed(ids, fixed=True).square().sum().backward()
    assert model.embedding.weight.grad is None and model.embed_norm.weight.grad is not None


def test_a_kept_embedding_is_the_one_of_the_moment_and_travels_with_the_weights():
    """Contexts stay, whatever becomes of the embedding; another network given the state has the same."""
    model, ids = small_model(), random_ids(B, T)
    before = model.embed(ids)
    model.keep_context_embedding()
    model.embedding.weight.data.add_(torch.randn(V, E))
    assert torch.equal(model.embed(ids), before)
    other = small_model(seed=2, freeze_context=True)
    other.load_state_dict(model.frozen_state() | model.trained_state())
    assert torch.equal(other.logits(*contexts_of(other, ids)), model.logits(*contexts_of(model, ids)))


@pytest.mark.parametrize("head", HEADS)
def test_a_pretrained_embedding_is_copied_scaled_for_logits_and_frozen(head):
    """In fp32; nothing trains it, and the rest is as drawn and trains."""
    given = torch.randn(V, E, generator=torch.Generator().manual_seed(0)).double()
    model = small_model(pretrained=given, freeze_context=True, **head)
    weight = model.embedding.weight
    assert weight.dtype == torch.float32 and torch.equal(model.context_embedding, weight)
    torch.testing.assert_close(weight / weight.norm(), (given / given.norm()).float())
    aligned = functional.layer_norm(weight, [E]) * weight  # a normed stream along each vector
    assert 0.7 * ALIGNED_LOGIT < aligned.sum(1).mean() < 1.05 * ALIGNED_LOGIT
    loss_of(model, random_ids(B, T + 1)).backward()
    assert weight.grad is None and all(p.grad is not None for p in model.head_parameters())
    pairs = zip(small_model(**head).named_parameters(), model.named_parameters(), strict=True)
    assert [name for (name, a), (_, b) in pairs if not torch.equal(a, b)] == ["embedding.weight"]


# Head


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_linear_in_the_hidden_state_and_only_token_layers_read_the_context(head):
    """logits = h @ matrix.T + bias with what `output_weights` gives: the chunked loss sees the same model."""
    model, ids = small_model(**head), random_ids(B, T + 1)
    contexts, streams = contexts_of(model, ids[:, :-1])
    logits = model.logits(contexts, streams)
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss_of(model, ids).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(logits, model.logits(contexts + 1, streams)) == (head.get("token_layers") == 0)
    assert not torch.equal(logits, model.logits(contexts, streams + streams.roll(1, -1)))


def test_dropout_acts_on_the_head_in_training_only():
    """Contexts never see it, nor does evaluation; about the share asked for, and the mean is kept."""
    model, ids = small_model(dropout=0.5), random_ids(B, T)
    contexts, streams = contexts_of(model, ids)
    assert torch.equal(model.logits(contexts, streams), model.logits(contexts, streams))
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(contexts_of(model, ids), (contexts, streams), strict=True))
    assert not torch.equal(model.logits(contexts, streams), model.logits(contexts, streams))
    dropped = model.token_layers[0].mlp[0](torch.ones(301, 100))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1, abs=0.04)


def test_token_dropout_hides_whole_tokens_in_training_alone():
    """About the share asked for, all of a vector by the same other one; what is left is as it was."""
    torch.manual_seed(0)
    drop, embeddings = TokenDropout(0.2, 8), 3 * torch.randn(40, 50, 8)
    seen = drop(embeddings)
    hidden = (seen != embeddings).all(-1)
    assert hidden.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(seen[~hidden], embeddings[~hidden]) and (seen[hidden] == seen[hidden][0]).all()
    assert seen[hidden][0].norm().item() == pytest.approx(3 * drop.blank.norm().item(), rel=0.05)
    assert drop.eval()(embeddings) is embeddings and not drop.state_dict()


def test_hidden_first_tokens_do_not_blow_up_the_gradient_of_a_deep_untrained_network():
    """Six layers, every first token hidden: a gradient of ordinary size."""
    model = small_model(context_dim=64, embed_dim=64, num_layers=6, token_dropout=0.95, dropout=0.0).train()
    torch.manual_seed(0)
    tokens = model.token_dropout(model.embed(random_ids(8, 12)))
    model.hidden(*sequential(model.step, tokens, 64)).square().sum(-1).mean().backward()
    assert 0 < torch.stack([p.grad.norm() for p in model.context_parameters()]).norm() < 1e3

"""The language model: size, initialisation, causality, and which parameters move what."""

import math

import pytest
import torch
from torch.nn import functional

from config import ResidualConfig
from newllm.fixed_point.solver import sequential, sweep
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.models.network import ALIGNED_LOGIT, LanguageModel

V, B, T = 50, 3, 8
HEADS = [dict(), dict(tie_weights=False), dict(token_layers=0), dict(token_layers=2, tie_weights=False)]


def small_model(vocab_size=V, pretrained=None, **changes):
    sizes = dict(context_dim=12, embed_dim=8, num_layers=2)
    return LanguageModel(ResidualConfig(**sizes | changes), vocab_size, pretrained).eval()


def random_ids(*shape, vocab_size=V, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def contexts_of(model, ids):
    return sequential(model.step, model.embed(ids), model.context_dim)


def loss_of(model, ids):
    contexts, streams = contexts_of(model, ids[:, :-1])
    return linear_cross_entropy(model.hidden(contexts, streams), *model.output_weights(), ids[:, 1:])


def test_the_seed_preset_has_the_published_number_of_parameters():
    """GPT-2 vocabulary, 6 layers of 768 + 768, untied: 91,429,969."""
    with torch.device("meta"):
        model = LanguageModel(ResidualConfig(preset="seed"), 50257)
    assert sum(parameter.numel() for parameter in model.parameters()) == 91_429_969


# Initialisation


@pytest.mark.parametrize("head", HEADS)
def test_initialisation_is_a_function_of_the_seed_alone(head):
    """The global generator's state neither matters nor is any parameter left to it."""
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        states.append(small_model(**head).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_another_seed_is_another_network():
    """Every matrix differs."""
    first, second = small_model(seed=1), small_model(seed=2)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.dim() > 1)


def test_the_head_does_not_shift_the_draw_of_the_context_map():
    """Networks of one seed that differ in their heads have the same embedding and the same F."""
    plain = small_model()
    for head in HEADS:
        other = small_model(**head)
        pairs = zip(plain.context_parameters(), other.context_parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(plain.embedding.weight, other.embedding.weight)


def test_init_scale_scales_the_matrices_of_the_context_map_alone():
    """std is init_scale / sqrt(fan-in); the head and the embedding keep theirs."""
    plain, doubled = small_model(init_scale=0.5), small_model(init_scale=1.0)
    in_map = {id(p) for p in doubled.context_map.parameters() if p.dim() > 1}
    for a, b in zip(plain.parameters(), doubled.parameters(), strict=True):
        torch.testing.assert_close(b, 2 * a if id(b) in in_map else a)
    weights = torch.cat([layer.mix.weight.flatten() for layer in plain.context_map.layers])
    assert weights.std().item() == pytest.approx(0.5 / (12 + 8) ** 0.5, rel=0.1)


@pytest.mark.parametrize("head", HEADS)
def test_the_first_loss_is_the_logarithm_of_the_vocabulary(head):
    """An untrained network prefers no token: within 0.3 nats of ln V."""
    model = small_model(vocab_size=1000, context_dim=32, embed_dim=32, **head)
    with torch.no_grad():
        assert loss_of(model, random_ids(16, T + 1, vocab_size=1000)).item() == pytest.approx(
            math.log(1000), abs=0.3
        )


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_the_logarithm_of_the_vocabulary_at_full_width(tied):
    """The same at the default sizes, 6 layers of 768 + 768 and 4,096 tokens."""
    model = LanguageModel(ResidualConfig(tie_weights=tied), 4096).eval()
    with torch.no_grad():
        assert loss_of(model, random_ids(8, T + 1, vocab_size=4096)).item() == pytest.approx(
            math.log(4096), abs=0.3
        )


# Causality


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sweeps", [None, 3, T])
def test_nothing_before_a_token_depends_on_it(head, sweeps):
    """Another token at t leaves contexts and logits before t bit-identical, step by step and in sweeps."""

    def run(ids):
        embeddings = model.embed(ids)
        if sweeps is None:
            contexts, streams = sequential(model.step, embeddings, model.context_dim)
        else:
            contexts = torch.zeros(*ids.shape, model.context_dim)
            for _ in range(sweeps):
                contexts, streams = sweep(model.step, contexts, embeddings)
        return contexts, streams, model.logits(contexts, streams)

    model, ids, changed_at = small_model(**head), random_ids(B, T), 5
    others = ids.clone()
    others[:, changed_at] = (ids[:, changed_at] + 1) % V
    with torch.no_grad():
        for before, after in zip(run(ids), run(others), strict=True):
            assert torch.equal(before[:, :changed_at], after[:, :changed_at])
            assert not torch.equal(before[:, changed_at], after[:, changed_at])


# Parameters


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pretrained", [None, torch.ones(V, 8)], ids=["random", "pretrained"])
def test_context_and_head_parameters_are_all_that_trains_each_once(head, pretrained):
    """No parameter is in both lists, none twice, none forgotten."""
    model = small_model(pretrained=pretrained, **head)
    listed = [id(p) for p in [*model.context_parameters(), *model.head_parameters()]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_an_embedding_trains_if_logits_or_moving_contexts_read_it(head, freeze):
    """Untied beside contexts that stay it has no part in any loss, so it is frozen; every other parameter is not."""
    model = small_model(freeze_context=freeze, **head)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"embedding.weight"} if freeze and not head.get("tie_weights", True) else set())


@pytest.mark.parametrize("head", HEADS)
def test_the_contexts_depend_on_every_context_parameter_and_on_no_other(head):
    """Gradient of contexts and streams reaches `context_parameters` and stops there; that of fixed embeddings too."""
    model = small_model(freeze_context=True, **head)
    contexts, streams = contexts_of(model, random_ids(B, T))
    (contexts.square().sum() + (streams * torch.arange(8)).sum()).backward()
    assert all(p.grad is not None for p in model.context_parameters())
    assert all(p.grad is None for p in model.head_parameters())


@pytest.mark.parametrize("head", HEADS)
def test_training_the_head_and_the_embedding_does_not_move_the_contexts(head):
    """F reads a frozen copy of the embedding."""
    model, ids = small_model(freeze_context=True, **head), random_ids(B, T + 1)
    before = [part.detach() for part in contexts_of(model, ids)]
    weights = [p.detach().clone() for p in model.head_parameters()]
    optimizer = torch.optim.AdamW(model.head_parameters(), lr=0.1)
    loss_of(model, ids).backward()
    optimizer.step()
    assert any(not torch.equal(p, w) for p, w in zip(model.head_parameters(), weights, strict=True))
    for old, new in zip(before, contexts_of(model, ids), strict=True):
        assert torch.equal(old, new)


def test_contexts_that_move_learn_to_read_the_embedding():
    """One embedding for F and the logits: its gradient has both; asked to keep it fixed, F adds none."""
    model, ids = small_model(tie_weights=False), random_ids(B, T + 1)
    (gradient,) = torch.autograd.grad(loss_of(model, ids), [model.embedding.weight])
    assert gradient.abs().sum() > 0 and "context_embedding" not in model.state_dict()
    assert model.embed(ids).requires_grad and torch.equal(model.embed(ids), model.embed(ids, fixed=True))
    model.embed(ids, fixed=True).square().sum().backward()
    assert model.embedding.weight.grad is None and model.embed_norm.weight.grad is not None


def test_a_kept_embedding_is_the_one_of_the_moment():
    """From then on contexts stay, whatever becomes of the embedding."""
    model, ids = small_model(), random_ids(B, T)
    before = model.embed(ids)
    model.keep_context_embedding()
    with torch.no_grad():
        model.embedding.weight.add_(torch.randn_like(model.embedding.weight))
    assert torch.equal(model.embed(ids), before)


def test_a_tied_embedding_trains():
    """The step that leaves the contexts alone does move the tied matrix."""
    model, ids = small_model(), random_ids(B, T + 1)
    (gradient,) = torch.autograd.grad(loss_of(model, ids), [model.embedding.weight])
    assert gradient.abs().sum() > 0


def test_the_frozen_copy_travels_with_the_weights():
    """Another network given the state of this one has the same contexts and logits."""
    model, other, ids = small_model(seed=1), small_model(seed=2), random_ids(B, T)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.logits(*contexts_of(other, ids)), model.logits(*contexts_of(model, ids)))


# Head


@pytest.mark.parametrize(("token_layers", "reads"), [(0, False), (1, True)])
def test_token_layers_are_how_the_head_reads_the_context(token_layers, reads):
    """Without them the logits are a function of the token stream alone."""
    model = small_model(token_layers=token_layers)
    contexts, streams = contexts_of(model, random_ids(B, T))
    assert torch.equal(model.logits(contexts, streams), model.logits(contexts + 1, streams)) != reads
    assert not torch.equal(
        model.logits(contexts, streams), model.logits(contexts, streams + streams.roll(1, -1))
    )


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_linear_in_the_hidden_state(head):
    """logits = h @ matrix.T + bias with what `output_weights` gives: the chunked loss sees the same model."""
    model, ids = small_model(**head), random_ids(B, T + 1)
    contexts, streams = contexts_of(model, ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(
        model.logits(contexts, streams).flatten(0, 1), ids[:, 1:].flatten()
    )
    assert loss_of(model, ids).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_acts_on_the_head_in_training_only():
    """The contexts never see it; in evaluation the head does not either."""
    model, ids = small_model(dropout=0.5), random_ids(B, T)
    contexts, streams = contexts_of(model, ids)
    assert torch.equal(model.logits(contexts, streams), model.logits(contexts, streams))
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(contexts_of(model, ids), (contexts, streams), strict=True))
    assert not torch.equal(model.logits(contexts, streams), model.logits(contexts, streams))


# Pretrained embedding


@pytest.mark.parametrize("head", HEADS)
def test_a_pretrained_embedding_is_shared_by_value_and_frozen(head):
    """Both embeddings are the given matrix at a scale for logits, copied, in fp32, and nothing trains them."""
    given = torch.randn(V, 8, generator=torch.Generator().manual_seed(0)).double()
    model = small_model(pretrained=given, freeze_context=True, **head)
    expected = functional.normalize(given.float(), dim=None)
    given.zero_()
    weight = model.embedding.weight
    assert weight.dtype == torch.float32 and torch.equal(model.context_embedding, weight)
    torch.testing.assert_close(functional.normalize(weight, dim=None), expected)
    aligned = functional.layer_norm(weight, [8]) * weight  # a normed stream along each vector
    assert 0.7 * ALIGNED_LOGIT < aligned.sum(1).mean() < 1.05 * ALIGNED_LOGIT
    assert not model.embedding.weight.requires_grad
    assert id(model.embedding.weight) not in {id(p) for p in model.head_parameters()}


def test_a_pretrained_embedding_leaves_the_rest_of_the_network_as_drawn():
    """The network differs from the random one in its embedding alone."""
    random, pretrained = small_model(), small_model(pretrained=torch.ones(V, 8))
    for (name, a), (_, b) in zip(random.named_parameters(), pretrained.named_parameters(), strict=True):
        assert torch.equal(a, b) != (name == "embedding.weight"), name


def test_a_frozen_tied_embedding_gets_no_gradient():
    """The loss through frozen output weights still trains the rest."""
    model = small_model(pretrained=torch.randn(V, 8, generator=torch.Generator().manual_seed(0)))
    loss_of(model, random_ids(B, T + 1)).backward()
    assert model.embedding.weight.grad is None
    assert all(p.grad is not None for p in model.head_parameters())

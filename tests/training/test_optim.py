"""The optimizer: who decays, how the learning rate goes, and a step that is taken or stops the run."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import ResidualConfig
from newllm.errors import UserError
from newllm.fixed_point.losses import phase1_loss
from newllm.fixed_point.solver import sequential, sweep
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.models.language_model import LanguageModel
from newllm.training.device import open_runtime
from newllm.training.optim import (
    BETAS,
    SMALLEST_SCALE,
    copy_of,
    distance,
    make_optimizer,
    set_learning_rate,
    take_step,
    warmup_cosine,
)


@pytest.fixture(scope="module")
def runtime():
    return open_runtime(ResidualConfig(device="cpu", precision="fp32"))


@pytest.fixture
def model():
    return LanguageModel(ResidualConfig(context_dim=12, embed_dim=8, num_layers=2, tie_weights=False), 20)


def prediction_loss(model):
    ids = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))
    contexts, streams = sequential(model.step, model.embed(ids[:, :-1]), model.context_dim)
    return linear_cross_entropy(model.hidden(contexts, streams), *model.output_weights(), ids[:, 1:])


def changed(model, before):
    """Names of the parameters that differ from their copies."""
    return {name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)}


def names_of(model, parameters):
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


# Groups


def test_every_parameter_is_in_one_group(model):
    """Two parts at two rates: each parameter once, none forgotten."""
    optimizer = make_optimizer([(model.head_parameters(), 1.0), (model.context_parameters(), 0.1)], 1e-3, 0.1)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}


def test_matrices_decay_and_vectors_do_not(model):
    """Biases and norms are pulled nowhere."""
    optimizer = make_optimizer([(list(model.parameters()), 1.0)], 1e-3, 0.1)
    for group in optimizer.param_groups:
        assert group["betas"] == BETAS
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)


def test_a_part_has_its_share_of_the_learning_rate(model):
    """The context map learns at a tenth of the head's rate."""
    optimizer = make_optimizer([(model.head_parameters(), 1.0), (model.context_parameters(), 0.1)], 2e-3, 0.1)
    context = {id(p) for p in model.context_parameters()}
    for group in optimizer.param_groups:
        expected = 2e-4 if id(group["params"][0]) in context else 2e-3
        assert group["lr"] == group["peak_lr"] == pytest.approx(expected)


def test_frozen_parameters_are_left_out(model):
    """What needs no gradient is in no group, and a part of nothing else makes none."""
    for parameter in model.context_parameters():
        parameter.requires_grad_(False)
    optimizer = make_optimizer([(model.head_parameters(), 1.0), (model.context_parameters(), 0.1)], 1e-3, 0.1)
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in model.head_parameters()}
    assert all(group["params"] for group in optimizer.param_groups)


# Schedule


def test_the_rate_rises_linearly_to_the_peak_and_falls_to_nearly_zero():
    """100 steps, 10 of warm-up: 1/11 at step 0, equal increments, 1 at step 10, a thousandth at the last."""
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:11] == pytest.approx([(k + 1) / 11 for k in range(11)])
    assert max(factors) == factors[10] == 1
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))
    assert 0 < factors[-1] < 1e-3


def test_the_middle_of_the_cosine_is_half_the_peak():
    """Without warm-up: 1 at step 0, a half in the middle, symmetric about it."""
    assert warmup_cosine(0, 100, 0.0) == 1
    assert warmup_cosine(50, 100, 0.0) == pytest.approx(0.5)
    assert warmup_cosine(20, 100, 0.0) + warmup_cosine(80, 100, 0.0) == pytest.approx(1)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.33, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7, 50])
def test_every_step_of_every_schedule_learns(total, ratio):
    """No step has a rate of zero or above the peak, however short the run."""
    assert all(0 < warmup_cosine(step, total, ratio) <= 1 for step in range(total))


def test_the_factor_scales_every_group_from_its_peak(model):
    """Factors do not multiply up over the steps."""
    optimizer = make_optimizer([(model.head_parameters(), 1.0), (model.context_parameters(), 0.1)], 2e-3, 0.1)
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer, factor)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(factor * group["peak_lr"])


# Step


@pytest.mark.parametrize("trained", ["head", "context", "both"])
def test_a_step_changes_every_trained_parameter_and_no_other(runtime, model, trained):
    """The loss reaches them all; the optimizer's list decides."""
    parts = {"head": [model.head_parameters()], "context": [model.context_parameters()]}
    parts["both"] = parts["head"] + parts["context"]
    optimizer = make_optimizer([(part, 1.0) for part in parts[trained]], 1e-2, 0.1)
    before = copy_of(model.parameters())
    take_step(runtime, optimizer, prediction_loss(model), 1.0, "here")
    assert changed(model, before) == names_of(model, [p for part in parts[trained] for p in part])


def test_a_phase_1_step_changes_what_the_contexts_depend_on(runtime, model):
    """All of the context parameters but the last token norm, whose output is the stream that no context reads."""
    optimizer = make_optimizer([(model.context_parameters(), 1.0)], 1e-2, 0.0)
    tokens = model.embed(torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0)))
    old = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(1))
    before = copy_of(model.parameters())
    loss, _ = phase1_loss(sweep(model.step, old, tokens)[0], old, 0.5, "logdet", 0.0)
    take_step(runtime, optimizer, loss, 1.0, "here")
    unread = names_of(model, model.context_map.layers[-1].token_norm.parameters())
    assert changed(model, before) == names_of(model, model.context_parameters()) - unread


def test_steps_lower_the_loss(runtime, model):
    """Thirty steps on one batch."""
    model.eval()
    optimizer = make_optimizer([(list(model.parameters()), 1.0)], 1e-2, 0.0)
    first = prediction_loss(model).item()
    for _ in range(30):
        take_step(runtime, optimizer, prediction_loss(model), 1.0, "here")
    assert prediction_loss(model).item() < 0.8 * first


def test_gradients_do_not_add_up_over_steps(runtime):
    """Each step starts from no gradient."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-3, 0.0)
    norms = [take_step(runtime, optimizer, (3 * parameter).sum(), 100.0, "here") for _ in range(3)]
    assert norms == pytest.approx([3 * 2**0.5] * 3)


def test_the_gradient_is_clipped_and_its_norm_before_that_returned(runtime):
    """A gradient of norm 5 becomes one of norm 1 in the same direction."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-3, 0.0)
    norm = take_step(runtime, optimizer, (parameter * torch.tensor([3.0, 4.0])).sum(), 1.0, "here")
    assert norm == pytest.approx(5)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)


BAD = {
    "nan loss": lambda p: (p * float("nan")).sum(),
    "infinite loss": lambda p: (p * float("inf")).sum(),
    "infinite gradient": lambda p: p.sub(1).abs().sqrt().sum(),  # finite at 1, its slope is not
    "nan gradient": lambda p: (p.sub(1).square().sum()).sqrt(),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step(runtime, kind):
    """One sentence that says where; no bit of a parameter or of the optimizer's state has changed."""
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-2, 0.1)
    take_step(runtime, optimizer, parameter.square().sum(), 1.0, "the first batch")
    with torch.no_grad():
        parameter.fill_(1)
    state = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    with pytest.raises(UserError) as caught:
        take_step(runtime, optimizer, BAD[kind](parameter), 1.0, "batch 7 of Phase 1")
    message = str(caught.value)
    assert "at batch 7 of Phase 1" in message and "\n" not in message
    assert ("loss" if kind.endswith("loss") else "gradient") in message.split(" at ")[0]
    assert torch.equal(parameter, torch.ones(3, 2))
    assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())


@pytest.mark.parametrize(("scale", "stops"), [(2.0**16, False), (SMALLEST_SCALE, False), (SMALLEST_SCALE / 2, True)])
def test_with_a_loss_scaler_an_infinite_gradient_is_the_scalers_business(scale, stops):
    """fp16: the scaler leaves such a step out and lowers its scale; the run goes on until the scale itself is nothing."""
    accelerator = SimpleNamespace(
        backward=lambda loss: loss.backward(),
        clip_grad_norm_=lambda parameters, norm: torch.tensor(float("inf")),
        scaler=SimpleNamespace(get_scale=lambda: scale),
    )
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-2, 0.0)
    runtime = SimpleNamespace(accelerator=accelerator)
    if stops:
        with pytest.raises(UserError, match="gradient is inf at here"):
            take_step(runtime, optimizer, parameter.sum(), 1.0, "here")
        assert torch.equal(parameter, torch.ones(2))
    else:
        assert take_step(runtime, optimizer, parameter.sum(), 1.0, "here") == float("inf")


# Distance


def test_distance_is_that_of_all_entries_together():
    """Over tensors of any shapes: sqrt of the sum of squares."""
    first = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    second = [torch.tensor([1.0, 5.0]), torch.tensor([[-1.0]])]
    assert distance(first, second) == pytest.approx(5)
    assert distance(first, first) == 0


def test_a_copy_stays_when_the_parameter_moves():
    """It shares no memory and carries no gradient."""
    parameter = nn.Parameter(torch.ones(2))
    (copy,) = copy_of([parameter])
    with torch.no_grad():
        parameter.add_(1)
    assert torch.equal(copy, torch.ones(2)) and not copy.requires_grad

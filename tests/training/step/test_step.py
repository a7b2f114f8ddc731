"""A step changes what it should, on finite gradients alone; AdamW's groups, rates and state."""

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
from newllm.models.network import LanguageModel
from newllm.training.loop import State
from newllm.training.runtime import open_runtime
from newllm.training.step import (
    BETAS,
    SMALLEST_SCALE,
    OptimizerStep,
    make_optimizer,
    optimizer_state,
    prepare_optimizer,
    set_learning_rate,
    warmup_cosine,
)


@pytest.fixture(scope="module")
def runtime():
    return open_runtime(ResidualConfig(device="cpu", precision="fp32"))


@pytest.fixture
def model():
    return LanguageModel(ResidualConfig(context_dim=12, embed_dim=8, num_layers=2, tie_weights=False), 20)


def step_on(runtime, optimizer, loss_of, where="here"):
    """One step on a loss that is given as a function; the gradient's norm."""
    state = State()

    def gradients(parts):
        loss = loss_of()
        runtime.accelerator.backward(loss)
        return (loss.item(),)

    OptimizerStep(runtime, optimizer, SimpleNamespace(compiled=False), 1.0, pytest.fail)(
        gradients, 4, state, 0, where
    )
    return state.grad_norm


def phase1(model, ids):
    old = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1))
    return phase1_loss(sweep(model.step, old, model.embed(ids[:, :-1]))[0], old, 0.5, "logdet", 0.0)[0]


def prediction(model, ids):
    contexts, streams = sequential(model.step, model.embed(ids[:, :-1]), model.context_dim)
    return linear_cross_entropy(model.hidden(contexts, streams), *model.output_weights(), ids[:, 1:])


@pytest.mark.parametrize("trained", ["head", "context", "both", "phase1"])
def test_a_step_changes_every_trained_parameter_and_no_other(runtime, model, trained):
    """The optimizer's list decides. No context of Phase 1 reads what the last token norm puts out."""
    parts = {"head": [model.head_parameters()], "context": [model.context_parameters()]}
    parts["both"], parts["phase1"] = parts["head"] + parts["context"], parts["context"]
    wanted = {id(p) for part in parts[trained] for p in part}
    if trained == "phase1":
        wanted -= {id(p) for p in model.context_map.layers[-1].token_norm.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))
    loss = phase1 if trained == "phase1" else prediction
    optimizer = make_optimizer([(part, 1.0) for part in parts[trained]], 1e-2, 0.1 * (trained != "phase1"))
    step_on(runtime, optimizer, lambda: loss(model, ids))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == (id(parameter) not in wanted)


def test_the_gradient_is_that_of_one_step_clipped_and_its_norm_before_that_recorded(runtime):
    """A gradient of norm 5 becomes one of norm 1 in the same direction; steps do not add up."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-3, 0.0)
    for _ in range(2):
        norm = step_on(runtime, optimizer, lambda: (parameter * torch.tensor([3.0, 4.0])).sum())
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
    step_on(runtime, optimizer, lambda: parameter.square().sum())
    with torch.no_grad():
        parameter.fill_(1)
    state = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    with pytest.raises(UserError, match=f"^the {kind.split()[1]} is .* at batch 7 of Phase 1: [^\n]*$"):
        step_on(runtime, optimizer, lambda: BAD[kind](parameter), "batch 7 of Phase 1")
    assert torch.equal(parameter, torch.ones(3, 2))
    assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "scale, stops", [(2.0**16, False), (SMALLEST_SCALE, False), (SMALLEST_SCALE / 2, True)]
)
def test_with_a_loss_scaler_an_infinite_gradient_is_the_scalers_business(runtime, scale, stops):
    """The scaler leaves such a step out and lowers its scale; the run goes on until that is nothing."""
    accelerator = SimpleNamespace(
        backward=lambda loss: (loss * float("inf")).backward(),
        unscale_gradients=lambda optimizer: None,
        scaler=SimpleNamespace(get_scale=lambda: scale),
    )
    scaling = SimpleNamespace(accelerator=accelerator, group=runtime.group, device=runtime.device)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-2, 0.0)
    if stops:
        with pytest.raises(UserError, match="gradient is inf at here"):
            step_on(scaling, optimizer, lambda: parameter.sum())
        assert torch.equal(parameter, torch.ones(2))
    else:
        assert step_on(scaling, optimizer, lambda: parameter.sum()) == float("inf")


def test_each_trained_parameter_is_in_one_group_at_its_rate_and_only_matrices_decay(model):
    """Two parts at two rates; what is frozen is left out."""
    model.output_bias.requires_grad_(False)
    parts = [(model.head_parameters(), 1.0), (model.context_parameters(), 0.1)]
    optimizer = make_optimizer(parts, 2e-3, 0.1)
    context, listed = {id(p) for p in model.context_parameters()}, []
    for group in optimizer.param_groups:
        assert group["betas"] == BETAS and group["lr"] == group["peak_lr"]
        for parameter in group["params"]:
            listed.append(id(parameter))
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
            assert group["lr"] == pytest.approx(2e-4 if id(parameter) in context else 2e-3)
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for factor in (0.5, 0.25):  # factors do not multiply up
        set_learning_rate(optimizer, factor)
        assert all(group["lr"] == factor * group["peak_lr"] for group in optimizer.param_groups)


def test_the_schedule_rises_in_a_line_and_falls_in_a_half_cosine():
    """A tenth of the steps up to the peak, then down to nearly nothing; no step is without learning."""
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:11] == pytest.approx([(k + 1) / 11 for k in range(11)])
    assert max(factors) == factors[10] == 1 and 0 < factors[-1] < 1e-3
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))
    assert warmup_cosine(0, 100, 0.0) == 1 and warmup_cosine(50, 100, 0.0) == pytest.approx(0.5)
    for total in (1, 2, 7, 50):
        for ratio in (0.0, 0.1, 0.33, 1.0):
            assert all(0 < warmup_cosine(step, total, ratio) <= 1 for step in range(total))


def test_the_fp16_scale_is_saved_restored_and_begun_anew_with_a_stage():
    """A scaler serves all stages of a process; what it learned must not depend on where that began."""
    scaler = torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(scaler=scaler, prepare=lambda optimizer: optimizer)
    runtime = SimpleNamespace(accelerator=accelerator, device=torch.device("cpu"))
    optimizer = make_optimizer([([nn.Parameter(torch.ones(2))], 1.0)], 1e-2, 0.0)
    prepare_optimizer(runtime, optimizer, None)
    scaler.scale(torch.ones(1))  # it makes its scale at the first use
    scaler.update(256.0)
    saved = optimizer_state(runtime, optimizer)
    fresh = 2.0**16
    # The last: the earlier session was not fp16.
    for state, scale in ((saved, 256), (None, fresh), (saved, 256), (saved | {"scaler": None}, fresh)):
        prepare_optimizer(runtime, optimizer, state)
        assert scaler.get_scale() == scale


def test_the_settings_of_a_saved_optimizer_are_todays(runtime):
    """Moments come from the checkpoint; a changed learning rate or weight decay is in effect."""
    parameter = nn.Parameter(torch.ones(2, 2))
    before = make_optimizer([([parameter], 1.0)], 1e-2, 0.1)
    parameter.sum().backward()
    before.step()
    after = make_optimizer([([parameter], 1.0)], 1e-3, 0.5)
    prepare_optimizer(runtime, after, optimizer_state(runtime, before))
    (group,) = after.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.5)
    assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])

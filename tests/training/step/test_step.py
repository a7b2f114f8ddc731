"""A step changes what it should and nothing else, and is taken on finite gradients alone."""

from types import SimpleNamespace

import pytest
import torch
from steps import taker
from torch import nn

from newllm.errors import UserError
from newllm.fixed_point.losses import phase1_loss
from newllm.fixed_point.solver import sequential, sweep
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.training.optim import copy_of, make_optimizer
from newllm.training.step import SMALLEST_SCALE


def prediction_loss(model):
    ids = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))
    contexts, streams = sequential(model.step, model.embed(ids[:, :-1]), model.context_dim)
    return linear_cross_entropy(model.hidden(contexts, streams), *model.output_weights(), ids[:, 1:])


def changed(model, before):
    """Names of the parameters that differ from their copies."""
    return {
        name
        for (name, p), old in zip(model.named_parameters(), before, strict=True)
        if not torch.equal(p, old)
    }


def names_of(model, parameters):
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


# What a step changes


@pytest.mark.parametrize("trained", ["head", "context", "both"])
def test_a_step_changes_every_trained_parameter_and_no_other(runtime, model, trained):
    """The loss reaches them all; the optimizer's list decides."""
    parts = {"head": [model.head_parameters()], "context": [model.context_parameters()]}
    parts["both"] = parts["head"] + parts["context"]
    optimizer = make_optimizer([(part, 1.0) for part in parts[trained]], 1e-2, 0.1)
    before = copy_of(model.parameters())
    taker(runtime, optimizer)(lambda: prediction_loss(model))
    assert changed(model, before) == names_of(model, [p for part in parts[trained] for p in part])


def test_a_phase_1_step_changes_what_the_contexts_depend_on(runtime, model):
    """All of the context parameters but the last token norm, whose output is the stream that no context reads."""
    optimizer = make_optimizer([(model.context_parameters(), 1.0)], 1e-2, 0.0)
    tokens = model.embed(torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0)))
    old = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(1))
    before = copy_of(model.parameters())
    taker(runtime, optimizer)(
        lambda: phase1_loss(sweep(model.step, old, tokens)[0], old, 0.5, "logdet", 0.0)[0]
    )
    unread = names_of(model, model.context_map.layers[-1].token_norm.parameters())
    assert changed(model, before) == names_of(model, model.context_parameters()) - unread


def test_steps_lower_the_loss(runtime, model):
    """Thirty steps on one batch."""
    model.eval()
    take = taker(runtime, make_optimizer([(list(model.parameters()), 1.0)], 1e-2, 0.0))
    first = prediction_loss(model).item()
    for _ in range(30):
        take(lambda: prediction_loss(model))
    assert prediction_loss(model).item() < 0.8 * first


def test_gradients_do_not_add_up_over_steps(runtime):
    """Each step starts from no gradient."""
    parameter = nn.Parameter(torch.ones(2))
    take = taker(runtime, make_optimizer([([parameter], 1.0)], 1e-3, 0.0), 100.0)
    assert [take(lambda: (3 * parameter).sum()) for _ in range(3)] == pytest.approx([3 * 2**0.5] * 3)


def test_the_gradient_is_clipped_and_its_norm_before_that_recorded(runtime):
    """A gradient of norm 5 becomes one of norm 1 in the same direction."""
    parameter = nn.Parameter(torch.zeros(2))
    take = taker(runtime, make_optimizer([([parameter], 1.0)], 1e-3, 0.0))
    assert take(lambda: (parameter * torch.tensor([3.0, 4.0])).sum()) == pytest.approx(5)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)


# What is not finite


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
    take = taker(runtime, optimizer)
    take(lambda: parameter.square().sum())
    with torch.no_grad():
        parameter.fill_(1)
    state = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    with pytest.raises(UserError) as caught:
        take(lambda: BAD[kind](parameter), "batch 7 of Phase 1")
    message = str(caught.value)
    assert "at batch 7 of Phase 1" in message and "\n" not in message
    assert ("loss" if kind.endswith("loss") else "gradient") in message.split(" at ")[0]
    assert torch.equal(parameter, torch.ones(3, 2))
    assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("scale", "stops"), [(2.0**16, False), (SMALLEST_SCALE, False), (SMALLEST_SCALE / 2, True)]
)
def test_with_a_loss_scaler_an_infinite_gradient_is_the_scalers_business(runtime, scale, stops):
    """fp16: the scaler leaves such a step out and lowers its scale; the run goes on until the scale itself is nothing."""
    accelerator = SimpleNamespace(
        backward=lambda loss: (loss * float("inf")).backward(),
        unscale_gradients=lambda optimizer: None,
        scaler=SimpleNamespace(get_scale=lambda: scale),
    )
    parameter = nn.Parameter(torch.ones(2))
    take = taker(
        SimpleNamespace(accelerator=accelerator, group=runtime.group),
        make_optimizer([([parameter], 1.0)], 1e-2, 0.0),
    )
    if stops:
        with pytest.raises(UserError, match="gradient is inf at here"):
            take(lambda: parameter.sum())
        assert torch.equal(parameter, torch.ones(2))
    else:
        assert take(lambda: parameter.sum()) == float("inf")

"""The optimizer: who decays, how the learning rate goes, and what of it is saved."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import ResidualConfig
from newllm.models.network import LanguageModel
from newllm.training.optim import (
    BETAS,
    copy_of,
    distance,
    make_optimizer,
    optimizer_state,
    prepare_optimizer,
    set_learning_rate,
    warmup_cosine,
)
from newllm.training.runtime import open_runtime


@pytest.fixture(scope="module")
def runtime():
    return open_runtime(ResidualConfig(device="cpu", precision="fp32"))


@pytest.fixture
def model():
    return LanguageModel(ResidualConfig(context_dim=12, embed_dim=8, num_layers=2, tie_weights=False), 20)


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


# Saved state


def test_the_fp16_scale_is_saved_restored_and_begun_anew_with_a_stage():
    """A scaler serves all stages of a process; what it learned in one must not depend on whether the process was new."""
    scaler = torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(scaler=scaler, prepare=lambda optimizer: optimizer)
    runtime = SimpleNamespace(accelerator=accelerator, device=torch.device("cpu"))
    parameter = nn.Parameter(torch.ones(2))
    optimizer = prepare_optimizer(runtime, make_optimizer([([parameter], 1.0)], 1e-2, 0.0), None)
    scaler.scale(torch.ones(1))  # it makes its scale at the first use
    scaler.update(256.0)
    saved = optimizer_state(runtime, optimizer)
    assert saved["scaler"]["scale"] == 256
    prepare_optimizer(runtime, optimizer, None)
    assert scaler.get_scale() == 2.0**16
    prepare_optimizer(runtime, optimizer, saved)
    assert scaler.get_scale() == 256
    prepare_optimizer(runtime, optimizer, saved | {"scaler": None})  # the earlier session was not fp16
    assert scaler.get_scale() == 2.0**16


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

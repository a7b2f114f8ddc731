"""Losses of Phase 1: their formulas, their bounds, and which way they push."""

import numpy as np
import pytest
import torch
from maps import random_tokens

from newllm.fixed_point.losses import (
    REGULARIZERS,
    covariance,
    covariance_loss,
    dispersion_loss,
    logdet_loss,
    phase1_loss,
)

N, C = 400, 8
INPUTS = {
    "gaussian": random_tokens(N, C),
    "correlated": random_tokens(N, C) @ random_tokens(C, C, seed=2),
    "large": 30 * random_tokens(N, C),
    "small": 1e-3 * random_tokens(N, C),
    "rank one": random_tokens(N, 1) @ random_tokens(1, C, seed=2),
    "collapsed": torch.ones(N, C, dtype=torch.float64),
    "fewer tokens than dimensions": random_tokens(4, C),
}


def pair():
    """New and old contexts of a batch."""
    return random_tokens(4, 20, C), random_tokens(4, 20, C, seed=2)


def gradient_of(loss, contexts):
    return torch.autograd.grad(loss, contexts, retain_graph=True)[0]


# The loss of a sweep


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_phase1_loss_is_the_weighted_sum_of_its_parts(regularizer, weight):
    """(1 - w) CVFP + w regularizer, in value and gradient; a first sweep, from nothing, has no CVFP term."""
    new, old = (contexts.requires_grad_() for contexts in pair())
    total, parts = phase1_loss(new, old, weight, regularizer, 0.0)
    assert parts["cvfp"].item() == pytest.approx((new - old).square().mean().item(), rel=1e-6)
    assert parts["dist_reg"].item() == pytest.approx(REGULARIZERS[regularizer](new.flatten(0, 1)).item())
    expected = (1 - weight) * parts["cvfp"] + weight * parts["dist_reg"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient_of(total, new), gradient_of(expected, new))
    first, parts = phase1_loss(new, old, weight, regularizer, 0.0, consistency=False)
    assert first.item() == pytest.approx(weight * parts["dist_reg"].item()) and parts["cvfp"] > 0
    total.backward()
    assert old.grad is None  # what a sweep started from is pulled nowhere


def test_converged_tokens_ask_for_no_more():
    """Tokens below the margin have no gradient and count as converged; the others pay what is above it."""
    old = torch.zeros(1, 4, C, dtype=torch.float64)
    new = old + torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)[None, :, None]
    new.requires_grad_()
    total, parts = phase1_loss(new, old, 0.0, "dispersion", 0.05)
    assert parts["converged"].item() == 0.5
    assert parts["cvfp"].item() == pytest.approx((0.01 + 0.25 + 1) / 4)  # reported whole
    assert total.item() == pytest.approx(((0.25 - 0.05) + (1.0 - 0.05)) / 4, rel=1e-6)
    total.backward()
    assert (new.grad[0, :2] == 0).all() and (new.grad[0, 2:] != 0).all()


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_losses_are_computed_in_fp32_inside_bf16_autocast(regularizer):
    """Autocast changes no bit of them; bf16 contexts cost what the same numbers cost in fp64."""
    new, old = (contexts.bfloat16() for contexts in pair())
    outside, outside_parts = phase1_loss(new, old, 0.5, regularizer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside, inside_parts = phase1_loss(new, old, 0.5, regularizer, 0.1)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    assert all(torch.equal(inside_parts[name], outside_parts[name]) for name in ("cvfp", "dist_reg"))
    # The log-determinant rounds them once more, when centred.
    tolerance = 5e-3 if regularizer == "logdet" else 1e-5
    exact, exact_parts = phase1_loss(new.double(), old.double(), 0.5, regularizer, 0.1)
    assert inside.item() == pytest.approx(exact.item(), rel=tolerance)
    assert inside_parts["cvfp"].item() == pytest.approx(exact_parts["cvfp"].item(), rel=1e-5)


# Regularizers


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_regularizers_are_bounded_below_and_have_finite_gradients(regularizer, name):
    """The least value is 0: nothing is rewarded without end. The worst contexts must not end in a NaN, a
    small cloud is pushed outwards, a shift changes nothing."""
    contexts, loss = INPUTS[name].clone().requires_grad_(), REGULARIZERS[regularizer]
    value = loss(contexts)
    gradient = gradient_of(value, contexts)
    assert value.item() >= -1e-6 and gradient.isfinite().all()
    assert loss(contexts + 2).item() == pytest.approx(value.item(), rel=1e-3, abs=1e-4)
    if name == "small":
        assert covariance(contexts - 1e-3 * gradient / gradient.norm()).trace() > covariance(contexts).trace()


def test_covariance_and_its_loss_are_numpys():
    """Centred, divided by N - 1; mean relu(1 - std) + squared covariances / C."""
    mixing = torch.eye(C, dtype=torch.float64) + 0.2 * random_tokens(C, C, seed=2)
    contexts = 0.7 * random_tokens(N, C) @ mixing + 3
    cov = np.cov(contexts.numpy(), rowvar=False)
    np.testing.assert_allclose(covariance(contexts), cov, rtol=1e-4, atol=1e-4)
    hinge = np.maximum(0, 1 - np.sqrt(np.diag(cov) + 1e-4)).mean()
    off_diagonal = (cov**2).sum() - (np.diag(cov) ** 2).sum()
    assert covariance_loss(contexts).item() == pytest.approx(hinge + off_diagonal / C, rel=1e-4)


def stein(contexts):
    """(tr S - logdet S - C) / C, for autograd to differentiate."""
    centred = contexts - contexts.mean(0)
    cov = centred.T @ centred / (len(centred) - 1) + 1e-3 * torch.eye(len(contexts.T), dtype=contexts.dtype)
    return (cov.trace() - torch.logdet(cov) - len(cov)) / len(cov)


@pytest.mark.parametrize("name", INPUTS)
def test_logdet_loss_is_the_stein_loss_with_its_gradient(name):
    """Worked out by hand in the code, here by autograd, in double precision."""
    contexts = INPUTS[name].clone().requires_grad_()
    assert logdet_loss(contexts).item() == pytest.approx(stein(contexts).item(), rel=1e-6)
    expected = gradient_of(3 * stein(contexts), contexts)
    torch.testing.assert_close(
        gradient_of(3 * logdet_loss(contexts), contexts), expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("num_tokens", [4000, 600, 200])
def test_half_precision_contexts_keep_their_small_eigenvalues(num_tokens):
    """bf16 contexts give nearly the loss and gradient of the same values in double, however few tokens."""
    width = 256  # wide enough for the library's rounded products
    spread = torch.logspace(0, -1, width, dtype=torch.float64)
    rounded = (random_tokens(num_tokens, width) * spread).bfloat16().requires_grad_()
    exact = rounded.detach().double().requires_grad_()
    expected, loss = gradient_of(stein(exact), exact), logdet_loss(rounded)
    assert loss.item() == pytest.approx(stein(exact).item(), rel=5e-3)
    assert (gradient_of(loss, rounded).double() - expected).norm() < 0.03 * expected.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_contexts_without_a_covariance_have_no_loss(wrong):
    """No traceback of the factorization: a loss that is no number is what stops a run with a sentence."""
    contexts = torch.randn(40, 5)
    contexts[3, 2] = wrong
    loss = logdet_loss(contexts.requires_grad_())
    assert loss.isnan()
    loss.backward()


def test_dispersion_loss_is_the_exponential_of_the_mean_distance():
    """exp(-mean |c - mean| / sqrt(C)): 1 when collapsed."""
    points = random_tokens(N, C).numpy()
    expected = np.exp(-np.linalg.norm(points - points.mean(0), axis=1).mean() / C**0.5)
    assert dispersion_loss(random_tokens(N, C)).item() == pytest.approx(expected, rel=1e-5)
    assert dispersion_loss(INPUTS["collapsed"]).item() == pytest.approx(1)

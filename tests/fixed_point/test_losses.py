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
    "gaussian": lambda: random_tokens(N, C),
    "correlated": lambda: random_tokens(N, C) @ random_tokens(C, C, seed=2),
    "large": lambda: 30 * random_tokens(N, C),
    "small": lambda: 1e-3 * random_tokens(N, C),
    "shifted": lambda: random_tokens(N, C) + 5,
    "rank one": lambda: random_tokens(N, 1) @ random_tokens(1, C, seed=2),
    "collapsed": lambda: torch.ones(N, C, dtype=torch.float64),
    "fewer tokens than dimensions": lambda: random_tokens(4, C),
}


def whitened(num_tokens=N, width=C):
    """Contexts of mean zero and covariance exactly the identity."""
    centred = random_tokens(num_tokens, width)
    centred = centred - centred.mean(0)
    return torch.linalg.qr(centred)[0] * (num_tokens - 1) ** 0.5


def cvfp(new, old):
    return (new.double() - old.double()).square().mean()


def test_cvfp_is_the_mean_squared_change_per_dimension():
    """Over all tokens and dimensions; zero where nothing changes; reported whole, whatever the margin."""
    new, old = random_tokens(4, 20, C), random_tokens(4, 20, C, seed=2)
    for margin in (0.0, 0.5):
        _, parts = phase1_loss(new, old, 0.5, "logdet", margin)
        assert parts["cvfp"].item() == pytest.approx(cvfp(new, old).item(), rel=1e-6)
    assert phase1_loss(old, old, 0.5, "logdet", 0.0)[1]["cvfp"].item() == 0


def test_consistency_pulls_the_new_contexts_alone():
    """What a sweep started from gets no gradient."""
    new, old = random_tokens(4, 20, C).requires_grad_(), random_tokens(4, 20, C, seed=2).requires_grad_()
    phase1_loss(new, old, 0.0, "logdet", 0.0)[0].backward()
    torch.testing.assert_close(new.grad, 2 * (new - old).detach() / new.numel(), rtol=1e-5, atol=1e-8)
    assert old.grad is None


def test_converged_tokens_ask_for_no_more():
    """Tokens below the margin have no gradient and count as converged; the others pay what is above it."""
    old = torch.zeros(1, 4, C, dtype=torch.float64)
    new = (
        torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)[None, :, None]
        .expand(1, 4, C)
        .clone()
        .requires_grad_()
    )
    total, parts = phase1_loss(new, old, 0.0, "dispersion", 0.05)
    assert parts["converged"].item() == 0.5
    assert total.item() == pytest.approx(((0.25 - 0.05) + (1.0 - 0.05)) / 4, rel=1e-6)
    total.backward()
    assert (new.grad[0, :2] == 0).all() and (new.grad[0, 2:] != 0).all()


def test_covariance_is_numpys():
    """Centred, divided by N - 1."""
    contexts = random_tokens(N, C) @ random_tokens(C, C, seed=2) + 3
    np.testing.assert_allclose(
        covariance(contexts), np.cov(contexts.numpy(), rowvar=False), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_regularizers_are_bounded_below_and_finite(regularizer, name):
    """No distribution of contexts can be rewarded without end: the least value is 0."""
    value = REGULARIZERS[regularizer](INPUTS[name]())
    assert value.isfinite() and value.item() >= -1e-6


@pytest.mark.parametrize("name", ["collapsed", "rank one", "fewer tokens than dimensions"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_gradients_are_finite_where_contexts_have_collapsed(regularizer, name):
    """The worst contexts must not end the run with a NaN."""
    contexts = INPUTS[name]().requires_grad_()
    REGULARIZERS[regularizer](contexts).backward()
    assert contexts.grad.isfinite().all()


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_a_step_down_the_gradient_spreads_nearly_collapsed_contexts(regularizer):
    """From a small cloud every regularizer pushes outwards."""
    contexts = (0.1 * random_tokens(N, C)).requires_grad_()
    (gradient,) = torch.autograd.grad(REGULARIZERS[regularizer](contexts), contexts)
    moved = contexts.detach() - 0.1 * gradient / gradient.norm()
    assert covariance(moved).trace() > covariance(contexts.detach()).trace()


@pytest.mark.parametrize("loss", [covariance_loss, logdet_loss])
def test_whitened_contexts_are_the_optimum(loss):
    """Covariance I costs nothing, and every other scale costs more."""
    contexts = whitened()
    assert loss(contexts).item() == pytest.approx(0, abs=1e-5)
    assert loss(0.5 * contexts) > 0.1


@pytest.mark.parametrize("loss", [covariance_loss, logdet_loss])
def test_collapsed_is_worse_than_uniform_is_worse_than_gaussian(loss):
    """The loss ranks distributions by what they can tell apart."""
    uniform = torch.rand(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert loss(INPUTS["collapsed"]()) > loss(uniform) > loss(random_tokens(N, C))


def test_covariance_loss_is_hinge_plus_off_diagonal_squares():
    """mean relu(1 - std) + sum of squared covariances / C, computed by numpy."""
    contexts = (
        0.7 * random_tokens(N, C) @ (torch.eye(C, dtype=torch.float64) + 0.2 * random_tokens(C, C, seed=2))
    )
    cov = np.cov(contexts.numpy(), rowvar=False)
    hinge = np.maximum(0, 1 - np.sqrt(np.diag(cov) + 1e-4)).mean()
    off_diagonal = (cov**2).sum() - (np.diag(cov) ** 2).sum()
    assert covariance_loss(contexts).item() == pytest.approx(hinge + off_diagonal / C, rel=1e-4)


def test_covariance_loss_asks_for_no_more_than_unit_variance():
    """Uncorrelated dimensions cost 1 - std below a standard deviation of one and nothing above it."""
    for scale, expected in ((0.5, 0.5), (1.0, 0.0), (3.0, 0.0)):
        assert covariance_loss(scale * whitened()).item() == pytest.approx(expected, abs=1e-3)


def test_logdet_loss_is_the_stein_loss():
    """(tr S - logdet S - C) / C, computed by numpy."""
    contexts = random_tokens(N, C) @ random_tokens(C, C, seed=2)
    cov = np.cov(contexts.numpy(), rowvar=False) + 1e-3 * np.eye(C)
    expected = (np.trace(cov) - np.linalg.slogdet(cov)[1] - C) / C
    assert logdet_loss(contexts).item() == pytest.approx(expected, rel=1e-3)


def stein(contexts):
    """The definition, for autograd to differentiate."""
    centred = contexts - contexts.mean(0)
    cov = centred.T @ centred / (len(centred) - 1) + 1e-3 * torch.eye(len(contexts.T), dtype=contexts.dtype)
    return (cov.trace() - torch.logdet(cov) - len(cov)) / len(cov)


@pytest.mark.parametrize("name", INPUTS)
def test_the_gradient_of_logdet_is_that_of_its_definition(name):
    """Worked out by hand in the code, here by autograd, in double precision."""
    contexts = INPUTS[name]().double().requires_grad_()
    (expected,) = torch.autograd.grad(3 * stein(contexts), contexts)
    (found,) = torch.autograd.grad(3 * logdet_loss(contexts), contexts)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [4000, 600, 200])
def test_half_precision_contexts_keep_their_small_eigenvalues(num_tokens):
    """bf16 contexts give nearly the loss and gradient of the same values in double, with fewer tokens than dimensions too."""
    width = 256  # wide enough for the library's rounded products
    spread = torch.logspace(0, -1, width, dtype=torch.float64)
    contexts = (random_tokens(num_tokens, width).double() * spread).bfloat16()
    exact, rounded = contexts.double().requires_grad_(), contexts.clone().requires_grad_()
    (expected,) = torch.autograd.grad(stein(exact), exact)
    (found,) = torch.autograd.grad(logdet_loss(rounded), rounded)
    assert logdet_loss(rounded).item() == pytest.approx(stein(exact).item(), rel=5e-3)
    assert (found.double() - expected).norm() < 0.03 * expected.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("scale", [0.25, 2.0, 5.0])
def test_logdet_loss_grows_with_the_distance_from_unit_scale_both_ways(scale):
    """For S = s^2 I it is s^2 - log s^2 - 1."""
    assert logdet_loss(scale * whitened()).item() == pytest.approx(scale**2 - np.log(scale**2) - 1, rel=2e-2)


def test_dispersion_loss_is_the_exponential_of_the_mean_distance():
    """exp(-mean |c - mean| / sqrt(C)): 1 when collapsed, falling with the scale, blind to rank."""
    contexts = random_tokens(N, C)
    points = contexts.numpy()
    expected = np.exp(-np.linalg.norm(points - points.mean(0), axis=1).mean() / C**0.5)
    assert dispersion_loss(contexts).item() == pytest.approx(expected, rel=1e-5)
    assert dispersion_loss(INPUTS["collapsed"]()).item() == pytest.approx(1)
    assert 0 < dispersion_loss(2 * contexts) < dispersion_loss(contexts)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_only_spread_counts_not_the_mean(regularizer):
    """A shift of all contexts changes no regularizer."""
    contexts = random_tokens(N, C)
    shifted, original = (REGULARIZERS[regularizer](c).item() for c in (contexts + 2, contexts))
    assert shifted == pytest.approx(original, abs=1e-4)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_losses_are_computed_in_fp32_inside_bf16_autocast(regularizer):
    """Autocast around the loss changes no bit of it."""
    new, old = random_tokens(4, 20, C).bfloat16(), random_tokens(4, 20, C, seed=2).bfloat16()
    outside, outside_parts = phase1_loss(new, old, 0.5, regularizer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside, inside_parts = phase1_loss(new, old, 0.5, regularizer, 0.1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert all(torch.equal(inside_parts[name], outside_parts[name]) for name in ("cvfp", "dist_reg"))


def test_losses_agree_in_half_and_full_precision():
    """What bf16 contexts cost is what the same numbers cost in fp64; the log-determinant rounds them once more, when centred."""
    new = random_tokens(4, 50, C).bfloat16()
    for loss in REGULARIZERS.values():
        flat, exactness = new.flatten(0, 1), 5e-3 if loss is logdet_loss else 1e-5
        assert loss(flat).item() == pytest.approx(loss(flat.double()).item(), rel=exactness)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_phase1_loss_is_the_weighted_sum_of_its_parts(regularizer, weight):
    """(1 - w) CVFP + w regularizer over all tokens of the batch."""
    new, old = random_tokens(4, 20, C), random_tokens(4, 20, C, seed=2)
    total, parts = phase1_loss(new, old, weight, regularizer, 0.0)
    assert parts["cvfp"].item() == pytest.approx(cvfp(new, old).item())
    assert parts["dist_reg"].item() == pytest.approx(REGULARIZERS[regularizer](new.flatten(0, 1)).item())
    assert total.item() == pytest.approx(
        (1 - weight) * parts["cvfp"].item() + weight * parts["dist_reg"].item(), rel=1e-6
    )


@pytest.mark.parametrize(("weight", "absent"), [(0.0, "dist_reg"), (1.0, "cvfp")])
def test_a_term_of_weight_zero_has_no_gradient(weight, absent):
    """w = 0 is consistency alone, w = 1 spread alone."""
    new, old = random_tokens(4, 20, C).requires_grad_(), random_tokens(4, 20, C, seed=2)
    total, parts = phase1_loss(new, old, weight, "logdet", 0.0)
    (present,) = {"cvfp", "dist_reg"} - {absent}
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (total, parts[present]))
    )


def test_the_first_sweep_has_no_consistency_term():
    """With `consistency` False the total does not depend on the old contexts, but CVFP is still reported."""
    new, old = random_tokens(4, 20, C).requires_grad_(), random_tokens(4, 20, C, seed=2)
    total, parts = phase1_loss(new, old, 0.3, "logdet", 0.0, consistency=False)
    assert total.item() == pytest.approx(0.3 * parts["dist_reg"].item())
    assert parts["cvfp"].item() == pytest.approx(cvfp(new, old).item())
    torch.testing.assert_close(
        torch.autograd.grad(total, new, retain_graph=True)[0],
        0.3 * torch.autograd.grad(parts["dist_reg"], new)[0],
    )


def test_contexts_without_a_covariance_have_no_loss():
    """Neither do they end in a traceback of the factorization: a loss that is no number is what stops a run with a sentence."""
    for wrong in (float("nan"), float("inf")):
        contexts = torch.randn(40, 5)
        contexts[3, 2] = wrong
        contexts.requires_grad_()
        loss = logdet_loss(contexts)
        assert loss.isnan()
        loss.backward()

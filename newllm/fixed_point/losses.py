"""Losses of Phase 1: fixed-point consistency and three distribution regularizers. All are bounded below.

Everything is accumulated in fp32, because covariances summed in half precision lose their small eigenvalues.
Shapes: B sequences, T tokens, N = B * T, C context width.
"""

import contextlib
import math

import torch


def squared_change(new_BTC, old_BTC):
    """Squared difference per token and dimension, in fp32 [B, T]: the CVFP residual of each token."""
    return (new_BTC.float() - old_BTC.float()).square().mean(-1)


def covariance(contexts_NC):
    """Centred covariance [C, C] of contexts [N, C], in fp32 or the contexts' own wider type."""
    with torch.autocast(contexts_NC.device.type, enabled=False):
        contexts_NC = contexts_NC.to(torch.promote_types(contexts_NC.dtype, torch.float32))
        centred = contexts_NC - contexts_NC.mean(0)
        return centred.T @ centred / (len(centred) - 1)


def covariance_loss(contexts_NC):
    """Variance hinge at 1 plus squared off-diagonal covariance (VICReg, arXiv 2105.04906, eq. 1, 3-4)."""
    cov = covariance(contexts_NC)
    variance = cov.diagonal()
    hinge = torch.relu(1 - (variance + 1e-4).sqrt()).mean()
    off_diagonal = (cov.square().sum() - variance.square().sum()) / len(cov)
    return hinge + off_diagonal


class _SteinLoss(torch.autograd.Function):
    """Loss and gradient 2 (c - mean) (I - S^-1) / ((N - 1) C) in one pass: half of autograd's products."""

    @staticmethod
    def forward(ctx, contexts_NC):
        dtype, device = contexts_NC.dtype, contexts_NC.device.type
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device, enabled=False):
            wide = contexts_NC.to(torch.promote_types(dtype, torch.float32))
            # Rounded as the contexts are, so that products at that precision make no further error.
            centred = (wide - wide.mean(0)).to(dtype).to(wide.dtype)
            tokens, size = centred.shape
            identity = torch.eye(size, device=wide.device, dtype=wide.dtype)
            with _rounded_products(device, half):
                cov = centred.T @ centred / (tokens - 1) + 1e-3 * identity
            # The checked Cholesky would make the host wait for the device; a NaN loss stops the run as well.
            factor, failed = torch.linalg.cholesky_ex(cov)
            factor = factor.masked_fill(failed > 0, math.nan)
            loss = (cov.trace() - 2 * factor.diagonal().log().sum() - size) / size
            if ctx.needs_input_grad[0]:
                pull = (identity - torch.cholesky_inverse(factor)) * (2 / (tokens - 1) / size)
                # With fewer tokens than dimensions the inverse is large, and cancels, off their span.
                with _rounded_products(device, half and tokens >= 2 * size):
                    gradient = centred @ pull
                # fp16 would lose numbers like 1e-7 before the loss scale, a factor of grad_output, comes.
                ctx.save_for_backward(gradient.to(wide.dtype if dtype == torch.float16 else dtype))
                ctx.dtype = dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        return (ctx.saved_tensors[0] * grad_output).to(ctx.dtype)


@contextlib.contextmanager
def _rounded_products(device, rounded):
    """Let fp32 products round their inputs to half precision; they still accumulate in fp32.

    Contexts have that rounding already, and the sums are what small eigenvalues need; it is much faster.
    """
    if not rounded:
        yield
        return
    backend, precision = torch.backends.mkldnn, "bf16"
    if device == "cuda":
        backend, precision = torch.backends.cuda, "tf32"
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def logdet_loss(contexts_NC):
    """Stein loss (tr S - logdet S - C) / C of the covariance S: divergence of N(0, S) from N(0, I)."""
    return _SteinLoss.apply(contexts_NC)


def dispersion_loss(contexts_NC):
    """exp(-mean distance from the mean / sqrt(C)): plain spread, made bounded; blind to rank."""
    contexts = contexts_NC.float()
    distance = (contexts - contexts.mean(0)).norm(dim=-1).mean()
    return torch.exp(-distance / contexts.shape[-1] ** 0.5)


REGULARIZERS = {"covariance": covariance_loss, "logdet": logdet_loss, "dispersion": dispersion_loss}


def phase1_loss(new_BTC, old_BTC, weight, regularizer, margin, consistency=True):
    """(1 - w) mean(max(0, squared change - margin)) + w regularizer.

    Tokens that have converged ask for no more: without the margin every further step buys convergence with
    memory. The first sweep starts from nothing and has no consistency term (`consistency` False).

    Returns:
        (total, {"cvfp": ..., "dist_reg": ..., "converged": share of tokens below the margin}), scalars.
    """
    change_BT = squared_change(new_BTC, old_BTC.detach())  # the gradient goes through G alone
    distribution = REGULARIZERS[regularizer](new_BTC.flatten(0, -2))
    total = weight * distribution
    if consistency:
        total = total + (1 - weight) * torch.relu(change_BT - margin).mean()
    return total, {
        "cvfp": change_BT.mean(),
        "dist_reg": distribution,
        "converged": (change_BT < margin).double().mean(),
    }

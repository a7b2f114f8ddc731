"""Losses of Phase 1: fixed-point consistency and three distribution regularizers. All are bounded below.

Everything is computed in fp32, because covariances of thousands of half-precision tokens lose their small eigenvalues.
Shapes: N tokens, C context width.
"""

import torch

from newllm.fixed_point.solver import squared_change


def covariance(contexts_NC):
    """Centred covariance [C, C] of contexts [N, C], in fp32 or the contexts' own wider type."""
    with torch.autocast(contexts_NC.device.type, enabled=False):
        contexts_NC = contexts_NC.to(torch.promote_types(contexts_NC.dtype, torch.float32))
        centred = contexts_NC - contexts_NC.mean(0)
        return centred.T @ centred / (len(centred) - 1)


def covariance_loss(contexts_NC):
    """Variance hinge at 1 plus squared off-diagonal covariance per dimension (VICReg, arXiv 2105.04906, eq. 1 and 3-4)."""
    cov = covariance(contexts_NC)
    variance = cov.diagonal()
    hinge = torch.relu(1 - (variance + 1e-4).sqrt()).mean()
    off_diagonal = (cov.square().sum() - variance.square().sum()) / len(cov)
    return hinge + off_diagonal


def logdet_loss(contexts_NC):
    """Stein loss (tr S - logdet S - C) / C of the covariance S: the divergence of N(0, S) from N(0, I), zero at S = I."""
    cov = covariance(contexts_NC)
    size = len(cov)
    cov = cov + 1e-3 * torch.eye(size, device=cov.device)
    logdet = 2 * torch.linalg.cholesky(cov).diagonal().log().sum()
    return (cov.diagonal().sum() - logdet - size) / size


def dispersion_loss(contexts_NC):
    """exp(-mean distance from the mean / sqrt(C)): the ancestor's term, made bounded. It says nothing about rank."""
    contexts = contexts_NC.float()
    distance = (contexts - contexts.mean(0)).norm(dim=-1).mean()
    return torch.exp(-distance / contexts.shape[-1] ** 0.5)


REGULARIZERS = {"covariance": covariance_loss, "logdet": logdet_loss, "dispersion": dispersion_loss}


def phase1_loss(new_BTC, old_BTC, weight, regularizer, margin, consistency=True):
    """(1 - w) mean(max(0, squared change - margin)) + w regularizer.

    Tokens that have converged ask for no more: without the margin every further step buys convergence with memory.
    The first sweep starts from nothing and has no consistency term (`consistency` False).

    Returns:
        (total, {"cvfp": ..., "dist_reg": ..., "converged": share of tokens below the margin}), scalars.
    """
    change_BT = squared_change(new_BTC, old_BTC.detach())
    distribution = REGULARIZERS[regularizer](new_BTC.flatten(0, -2))
    total = weight * distribution
    if consistency:
        total = total + (1 - weight) * torch.relu(change_BT - margin).mean()
    return total, {
        "cvfp": change_BT.mean(),
        "dist_reg": distribution,
        "converged": (change_BT < margin).double().mean(),
    }

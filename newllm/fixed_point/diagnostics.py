"""What a context is worth: rank, convergence, memory. Pure functions of contexts and a step callable.

None of these means anything alone: an untrained network has a high rank too, and a map that converges in k
sweeps remembers k tokens. Callers show each figure beside its untrained value. Shapes: B sequences, T tokens,
C context width, E embedding width, N = B * T.
"""

import math

import torch
from einops import rearrange

from newllm.fixed_point.losses import covariance, squared_change
from newllm.fixed_point.solver import sequential, sweep

ROUNDING = 1e-5  # relative error of contexts that says no more about the map
HORIZON_LEVEL = 1e-2  # relative change of a later context that still counts as remembering
PROBE_LAGS = 40  # tokens back that the past capacity looks
PROBE_DIMS = 64  # random projections of an embedding that a probe predicts
BURN_IN = 4  # one token in so many passes before a random direction is the one that grows most
VANISHED = 1e-12  # growth of a difference that is no more; its logarithm is finite
RIDGE = 1e-3  # ridge strength relative to the mean variance of a context dimension


def spectrum(contexts_NC):
    """Singular values of the centred contexts as shares of their sum [C], largest first, fp64 on the CPU."""
    # By the covariance's eigenvalues: C x C, however many tokens. Small GPUs have next to no fp64, and
    # eigenvalues are many dependent steps, hence the CPU.
    values = torch.linalg.eigvalsh(covariance(contexts_NC.double()).cpu()).clamp(min=0).sqrt().flip(0)
    return values / values.sum().clamp(min=1e-30)


def rank_of(shares):
    """Effective rank of a spectrum, exp(entropy of its shares), 1 ... C (Roy & Vetterli 2007)."""
    return torch.special.entr(shares).sum().exp().item()


def effective_rank(contexts_NC):
    return rank_of(spectrum(contexts_NC))


def effective_rank_ceiling(num_tokens, context_dim):
    """Effective rank of an isotropic Gaussian of the same N and C: what N tokens can show at best."""
    generator = torch.Generator().manual_seed(0)
    return effective_rank(torch.randn(num_tokens, context_dim, generator=generator))


def cold_start(step, tokens_BTE, trajectory_BTC, sweeps, threshold=0.0, until=0.0):
    """Sweep from nothing, K = 0, with fixed weights. A chaotic map does not come near; the figures say so.

    Args:
        sweeps: at most; the last is the first whose error is below `until`.

    Returns:
        For each sweep k, |G^k(0) - trajectory| / |trajectory| over all tokens, and the share of tokens whose
        squared change in it is below the threshold: two lists.
    """
    errors, converged = [], []
    contexts = torch.zeros_like(trajectory_BTC)
    for _ in range(sweeps):
        new, _ = sweep(step, contexts, tokens_BTE)
        error = (new - trajectory_BTC).norm() / trajectory_BTC.norm()
        share = (squared_change(new, contexts) < threshold).double().mean()
        error, share = torch.stack([error.double(), share]).tolist()  # one wait for the device a sweep
        errors.append(error)
        converged.append(share)
        if error < until:
            break
        contexts = new
    return errors, converged


def contraction_factor(errors):
    """Per-sweep decay of a cold-start curve: exp of the least-squares slope of log error above rounding."""
    logs = [math.log(e) for e in errors if e > ROUNDING]
    if len(logs) < 2:
        return 0.0
    centre = (len(logs) - 1) / 2
    rise = sum((k - centre) * e for k, e in enumerate(logs))
    slope = rise / sum((k - centre) ** 2 for k in range(len(logs)))
    return math.exp(slope)


def lyapunov_exponent(step, tokens_BTE, contexts_BTC):
    """The largest Lyapunov exponent of the map along a trajectory, in nats a token (Benettin et al. 1980).

    A small difference of contexts grows by its exponential a token, whatever it was: from a random direction,
    each token moves the context beside the trajectory, and the difference is made small again. Below zero
    the trajectory is predictable and sweeps converge, their number independent of the length; above zero they
    take as many as there are tokens (Gonzalez et al., NeurIPS 2025, arXiv 2508.16817).

    Returns:
        The mean over sequences and tokens; log(VANISHED) of a map that forgets at once.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(contexts_BTC[:, 0].shape, generator=generator).to(contexts_BTC)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    # Of the size whose curvature costs as little as rounding does.
    size = torch.finfo(contexts_BTC.dtype).eps ** 0.5 * contexts_BTC.norm(dim=-1).mean().clamp(min=VANISHED)
    before, logs = torch.zeros_like(direction), []
    for token, after in zip(tokens_BTE.unbind(1), contexts_BTC.unbind(1), strict=True):
        beside, _ = step(torch.cat([before, before + size * direction]), torch.cat([token, token]))
        alone, moved = beside.chunk(2)
        difference = (moved - alone) / size
        growth = difference.norm(dim=-1, keepdim=True).clamp(min=VANISHED)
        logs.append(growth.log())
        direction, before = difference / growth, after
    return torch.stack(logs[len(logs) // BURN_IN :]).double().mean().item()


def memory_curve(step, tokens_BTE, trajectory_BTC):
    """Relative change of c_{t+k} after token t is replaced by another sequence's, averaged over sequences.

    Returns:
        {k: change} for k = 0, 1, 2, 4, 8, ... up to half of the sequence.
    """
    position = tokens_BTE.shape[1] // 2 - 1
    lags = [0] + [2**i for i in range(16) if position + 2**i < tokens_BTE.shape[1]]
    replaced = tokens_BTE[:, position:].clone()
    replaced[:, 0] = replaced[:, 0].roll(1, 0)
    # The rest of each sequence is evaluated again, but where the other token happens to be the same.
    differs = (replaced[:, 0] != tokens_BTE[:, position]).any(-1)
    start = trajectory_BTC[:, position - 1] if position > 0 else torch.zeros_like(trajectory_BTC[:, 0])
    changed, _ = sequential(step, replaced[differs], trajectory_BTC.shape[-1], start[differs])
    original = trajectory_BTC[differs, position:]
    change_BT = (changed - original).norm(dim=-1) / original.norm(dim=-1).clamp(min=1e-12)
    return {k: change_BT[:, k].mean().item() if len(change_BT) else 0.0 for k in lags}


def memory_horizon(curve):
    """Largest measured lag at which a replaced token still changes the context by more than HORIZON_LEVEL."""
    return max((k for k, change in curve.items() if change > HORIZON_LEVEL), default=0)


def ridge_r2(fit_inputs, fit_targets, inputs, targets):
    """Held-out R^2 of a ridge regression, over all target dimensions together, per target group.

    Args:
        fit_inputs, inputs: [N, C], [M, C].
        fit_targets, targets: [N, G, D], [M, G, D]: G groups of D dimensions.

    Returns:
        R^2 of each group [G]; at most 1, negative when worse than the mean.
    """
    mean_x, mean_y = fit_inputs.mean(0), fit_targets.mean(0)
    x, y = fit_inputs - mean_x, rearrange(fit_targets - mean_y, "n g d -> n (g d)")
    gram = x.T @ x
    # A ridge relative to the variance: the figure does not depend on the contexts' scale.
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=1e-12))
    weights = torch.linalg.solve(gram, x.T @ y)
    predicted = rearrange((inputs - mean_x) @ weights, "n (g d) -> n g d", d=targets.shape[-1]) + mean_y
    residual = (targets - predicted).square().sum((0, 2))
    return 1 - residual / (targets - targets.mean(0)).square().sum((0, 2)).clamp(min=1e-12)


def past_capacity(fit, held_out):
    """Held-out R^2 of linear probes from c_t to the embedding of token t - j, for j = 1 ... PROBE_LAGS.

    The embedding is seen through PROBE_DIMS fixed random projections; negative R^2 counts as zero.

    Args:
        fit, held_out: pairs (contexts [B, T, C], embeddings [B, T, E]).

    Returns:
        R^2 by lag; their sum is the past capacity (Dambre et al. 2012).
    """
    embed_dim, length = fit[1].shape[-1], fit[1].shape[1]
    max_lag = min(PROBE_LAGS, length // 2)  # every lag is probed on as many tokens
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(embed_dim, min(PROBE_DIMS, embed_dim), generator=generator).to(fit[1].device)

    def probe(contexts, embeddings):
        targets = embeddings @ projection / embed_dim**0.5
        lagged = [targets[:, max_lag - j : length - j] for j in range(1, max_lag + 1)]
        return rearrange(contexts[:, max_lag:], "b t c -> (b t) c"), rearrange(lagged, "j b t d -> (b t) j d")

    return ridge_r2(*probe(*fit), *probe(*held_out)).clamp(min=0).tolist()

"""The trajectory of a recurrence, step by step and as the fixed point of parallel sweeps. Knows a callable, not a model.

`step(context [..., C], token [..., E]) -> (context [..., C], stream [..., E])` is one step of F. A step that makes no
streams gives None in their place, and so do the functions here.
Shapes: B sequences, T tokens, C context width, E embedding width.

The sweep is Jacobi iteration over time (Song et al. 2021, arXiv 2002.03629): sweep k is exact for the first k tokens,
and from a cold start it makes every context a function of the last k tokens alone.
"""

from dataclasses import dataclass, field

import torch


def sequential(step, tokens_BTE, context_dim, start_BC=None):
    """The reference: T dependent steps, from c_0 = 0 unless a start is given.

    Returns:
        (contexts [B, T, C], streams [B, T, E]).
    """
    context = tokens_BTE.new_zeros(tokens_BTE.shape[0], context_dim) if start_BC is None else start_BC
    contexts, streams = [], []
    for token_BE in tokens_BTE.unbind(1):
        context, stream = step(context, token_BE)
        contexts.append(context)
        streams.append(stream)
    return torch.stack(contexts, 1), None if streams[-1] is None else torch.stack(streams, 1)


def shift(contexts_BTC, start_BC=None):
    """Contexts one token later, led by c_0 (default: 0): what each token's step starts from."""
    first = torch.zeros_like(contexts_BTC[:, :1]) if start_BC is None else start_BC[:, None]
    return torch.cat([first, contexts_BTC[:, :-1]], dim=1)


def sweep(step, contexts_BTC, tokens_BTE, start_BC=None):
    """G(K)_t = F(K_{t-1}, e_t) for all tokens at once, from c_0 = 0 unless a start is given.

    Returns:
        (G(K) [B, T, C], streams [B, T, E]).
    """
    return step(shift(contexts_BTC, start_BC), tokens_BTE)


def squared_change(new_BTC, old_BTC):
    """Squared difference per token and dimension, in fp32 [B, T]: the CVFP residual of each token."""
    return (new_BTC.float() - old_BTC.float()).square().mean(-1)


def truncated(step, tokens_BTE, context_dim, sweeps, context_step=None, trajectory=None):
    """The trajectory, exact in value, with gradient through the last `sweeps` steps of time.

    The trajectory is computed without gradient; sweeping on from it changes nothing, but each sweep's gradient reaches one
    token further back, and all tokens' matrix products are one product (phantom gradient, arXiv 2111.05177, in time).

    Args:
        context_step: the step without streams, which only the last sweep needs; default: the same step.
        trajectory: function (tokens, start [B, C]) -> contexts that does what `sequential` does, faster.

    Returns:
        (contexts [B, T, C], streams [B, T, E]).
    """
    context_step = context_step or step
    with torch.no_grad():
        if trajectory:
            contexts = trajectory(tokens_BTE, tokens_BTE.new_zeros(len(tokens_BTE), context_dim))
        else:
            contexts, _ = sequential(context_step, tokens_BTE, context_dim)
    for _ in range(sweeps - 1):
        contexts, _ = sweep(context_step, contexts, tokens_BTE)
    return sweep(step, contexts, tokens_BTE)


@dataclass
class SweepStats:
    """What each sweep of a solve did, one entry a sweep."""

    residual: list = field(default_factory=list)  # mean squared change per dimension
    converged: list = field(default_factory=list)  # share of tokens whose squared change is below the threshold

    @property
    def sweeps(self):
        return len(self.residual)


def solve(step, tokens_BTE, context_dim, max_sweeps, threshold, ratio=1.0, start_BTC=None):
    """Sweep from a start (default: cold, K = 0) until a share `ratio` of tokens changes less than `threshold`.

    A chaotic map does not converge; the stats say so, nothing is raised.

    Returns:
        (contexts [B, T, C], SweepStats).
    """
    contexts = start_BTC
    if contexts is None:
        contexts = tokens_BTE.new_zeros(*tokens_BTE.shape[:2], context_dim)
    stats = SweepStats()
    for _ in range(max_sweeps):
        new, _ = sweep(step, contexts, tokens_BTE)
        change_BT = squared_change(new, contexts)
        stats.residual.append(change_BT.mean().item())
        stats.converged.append((change_BT < threshold).double().mean().item())
        contexts = new
        if stats.converged[-1] >= ratio:
            break
    return contexts, stats


@dataclass
class PrefillStats:
    """What a prefill did, one entry a piece."""

    tokens: list = field(default_factory=list)  # length of the piece
    sweeps: list = field(default_factory=list)
    change: list = field(default_factory=list)  # relative change by its last sweep
    converged: list = field(default_factory=list)  # whether that was below the tolerance, or the piece is exact anyhow

    @property
    def mean_sweeps(self):
        """Sweeps over an average token: the work, in passes over the whole sequence."""
        return sum(n * k for n, k in zip(self.tokens, self.sweeps, strict=True)) / sum(self.tokens)


@torch.no_grad()
def prefill(step, tokens_BTE, context_dim, tolerance, max_sweeps, piece=4096, start_BC=None, guess_BTC=None):
    """The trajectory of a long sequence by parallel sweeps instead of T dependent steps, without gradient.

    Piece after piece: each is swept until a sweep changes it by |new - old| / |new| < tolerance, and the next one starts
    from its last context (block Gauss-Seidel). So what a sweep holds does not grow with T, no token is swept more often
    than its piece needs, and the pieces change the result only within the tolerance. Where each sweep shrinks the error
    by a factor g < 1, the error left in a piece is at most its last change * g / (1 - g), beside what its start brings.

    A map that does not converge costs max_sweeps a piece and is reported, not raised. After as many sweeps as it has tokens
    a piece is exact, whatever the map, so it never gets more.

    Args:
        tolerance: relative change, over all tokens of a piece. max_sweeps: a piece's, at most.
        piece: tokens swept at once: enough to keep the device busy, few enough for memory.
        start_BC: context before the first token, default 0. guess_BTC: contexts to sweep from, default 0 (cold).

    Returns:
        (contexts [B, T, C], streams [B, T, E] of the last sweeps, PrefillStats).
    """
    shape = *tokens_BTE.shape[:2], context_dim
    contexts = tokens_BTE.new_zeros(shape) if guess_BTC is None else guess_BTC.to(tokens_BTE.dtype, copy=True)
    streams, stats, start = [], PrefillStats(), start_BC
    for tokens, old in zip(tokens_BTE.split(piece, 1), contexts.split(piece, 1), strict=True):
        held, length, sweeps, change = old, tokens.shape[1], 0, float("inf")
        while sweeps < min(max_sweeps, length) and not change < tolerance:  # NaN is below nothing
            new, stream = sweep(step, old, tokens, start)
            change = ((new - old).float().norm() / new.float().norm().clamp(min=1e-30)).item()
            old, sweeps = new, sweeps + 1
        held.copy_(new)
        start = new[:, -1]
        streams.append(stream)
        stats.tokens.append(length)
        stats.sweeps.append(sweeps)
        stats.change.append(change)
        stats.converged.append(change < tolerance or sweeps == length)
    return contexts, None if streams[-1] is None else torch.cat(streams, 1), stats

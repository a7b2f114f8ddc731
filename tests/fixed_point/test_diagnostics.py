"""What a context is worth: each figure against maps and spectra where it is known by hand."""

import math

import numpy as np
import pytest
import torch
from maps import chaotic, delay_line, leaky, memoryless, network, random_tokens

from newllm.fixed_point.diagnostics import (
    cold_start,
    contraction_factor,
    effective_rank,
    effective_rank_ceiling,
    lyapunov_exponent,
    memory_curve,
    memory_horizon,
    past_capacity,
    ridge_r2,
)
from newllm.fixed_point.solver import sequential


def trajectory(step, tokens, context_dim):
    return sequential(step, tokens, context_dim)[0]


# Effective rank


@pytest.mark.parametrize(
    ("num_tokens", "rank", "width"), [(20, 24, 24), (1000, 24, 24), (500, 8, 256), (300, 1, 16)]
)
def test_effective_rank_is_that_of_the_singular_values(num_tokens, rank, width):
    """Numpy's decomposition of the centred contexts; mean, scale and rotation do not matter."""
    contexts = random_tokens(num_tokens, rank) * torch.logspace(0, -1.5, rank, dtype=torch.float64)
    contexts = contexts @ random_tokens(rank, width, seed=2) + 1
    points = contexts.numpy()
    s = np.linalg.svd(points - points.mean(0), compute_uv=False)
    share = s[s > 0] / s.sum()
    assert effective_rank(contexts.float()) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-2)
    rotation = torch.linalg.qr(random_tokens(width, width, seed=3))[0]
    for other in (contexts + 7, 0.01 * contexts, contexts @ rotation):
        assert effective_rank(other) == pytest.approx(effective_rank(contexts), rel=1e-4)


def test_the_ceiling_grows_with_the_number_of_tokens():
    """Few tokens cannot show full rank: 1,280 of width 768 show 90.7 % at best. It is always the same."""
    ceilings = [effective_rank_ceiling(n, 64) for n in (32, 64, 128, 1024, 8192)]
    assert ceilings == sorted(ceilings)
    assert ceilings[0] < 32 and ceilings[-1] > 0.99 * 64
    assert effective_rank_ceiling(32, 64) == ceilings[0]
    assert effective_rank_ceiling(1280, 768) / 768 == pytest.approx(0.907, abs=0.002)


# Convergence


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_the_cold_start_of_a_linear_map_decays_by_its_factor(factor):
    """c = a c + 1: G^k(0) lacks a^k of the trajectory k tokens earlier, and sweep k moves all tokens from k
    on by a^(k-1); below the threshold, not at it, is converged."""
    tokens = torch.ones(2, 600, 1, dtype=torch.float64)
    path = trajectory(leaky(factor), tokens, 1)
    errors, converged = cold_start(leaky(factor), tokens, path, 8, threshold=1e-9)
    shifted = [path[:, :-k].norm().item() / path.norm().item() for k in range(1, 9)]
    assert errors == pytest.approx([factor**k * s for k, s in enumerate(shifted, 1)], rel=1e-6)
    assert contraction_factor(errors) == pytest.approx(factor, rel=1e-2)
    assert converged == pytest.approx([k / 600 for k in range(8)])
    assert cold_start(leaky(factor), tokens, path, 1, threshold=1.0)[1] == [0]
    assert cold_start(leaky(factor), tokens, path, 1, threshold=1.0 + 1e-6)[1] == [1]
    assert len(cold_start(leaky(factor), tokens, path, 99, until=errors[2] + 1e-9)[0]) == 3


def test_the_contraction_factor_of_a_geometric_curve_is_its_ratio():
    """Also when the curve ends in rounding errors, and when it grows; one that is exact at once has none."""
    assert contraction_factor([0.0, 0.0]) == 0
    assert contraction_factor([0.8 * 0.3**k for k in range(8)]) == pytest.approx(0.3)
    assert contraction_factor([0.3**k for k in range(8)] + [1e-8, 3e-8, 2e-8]) == pytest.approx(0.3)
    assert contraction_factor([0.1 * 1.5**k for k in range(6)]) == pytest.approx(1.5)


def linear(matrix):
    """c_t = A c_{t-1} + e_t."""
    return lambda context, token: (context @ matrix.T + token, token)


ROTATION = torch.linalg.qr(random_tokens(6, 6))[0]
SHEAR = torch.triu(random_tokens(6, 6, seed=4), 1)


@pytest.mark.parametrize("factor", [0.5, 0.98, 1.1])
@pytest.mark.parametrize("kind", ["leak", "rotation", "one direction", "shear"])
def test_the_exponent_of_a_linear_map_is_the_log_of_its_largest_eigenvalue(kind, factor):
    """Of a rotation scaled by g it is ln g at every token; where directions differ, that of the one that
    shrinks least, whatever the map does to a difference at first."""
    matrix = {
        "leak": factor * torch.eye(6, dtype=torch.float64),
        "rotation": factor * ROTATION,
        "one direction": factor * ROTATION @ torch.diag(0.8 ** torch.arange(6).double()) @ ROTATION.T,
        "shear": factor * torch.diag(0.7 ** torch.arange(6).double()) + SHEAR,
    }[kind]
    tokens = random_tokens(3, 200, 6).repeat_interleave(2, 0)  # two directions each
    exponent = lyapunov_exponent(linear(matrix), tokens, trajectory(linear(matrix), tokens, 6))
    exact = kind in ("leak", "rotation")
    assert exponent == pytest.approx(math.log(factor), abs=1e-9 if exact else 0.01)


def test_the_exponent_tells_chaos_from_forgetting():
    """ln 2 of the logistic map, the one chaotic map that is known by hand; a map without memory has none."""
    start = torch.full((1, 2000, 1), 0.0, dtype=torch.float64)
    start[0, 0] = 0.3

    def logistic(context, token):
        return 4 * context * (1 - context) + token, token

    assert lyapunov_exponent(logistic, start, trajectory(logistic, start, 1)) == pytest.approx(
        math.log(2), rel=0.02
    )
    tokens = random_tokens(2, 40, 3)
    assert lyapunov_exponent(chaotic, tokens, trajectory(chaotic, tokens, 3)) > 0.5
    assert lyapunov_exponent(memoryless, tokens, tokens) < -20


# Memory


@pytest.mark.parametrize(("held", "horizon"), [(1, 0), (3, 2), (5, 4), (16, 8)])
def test_the_horizon_of_a_delay_line_is_what_it_holds(held, horizon):
    """A token among the last m is k <= m - 1 back. The last lag above one percent counts, whatever dips."""
    tokens = random_tokens(4, 40, 3)
    curve = memory_curve(delay_line, tokens, trajectory(delay_line, tokens, 3 * held))
    assert list(curve) == [0, 1, 2, 4, 8, 16]
    assert [k for k, change in curve.items() if change > 0] == [k for k in curve if k < held]
    assert memory_horizon(curve) == horizon
    assert memory_horizon({0: 1.0, 1: 0.5, 2: 0.005, 4: 0.02, 8: 0.01}) == 4


def test_the_memory_curve_is_that_of_trajectories_with_one_token_replaced():
    """As the whole trajectory with another's token; one that is the same token is no evidence."""
    step, tokens = network(6, 5), random_tokens(4, 16, 5)
    path = trajectory(step, tokens, 6)
    replaced = tokens.clone()
    replaced[:, 7] = tokens[[3, 0, 1, 2], 7]
    change = (trajectory(step, replaced, 6) - path).norm(dim=-1) / path.norm(dim=-1)
    curve = memory_curve(step, tokens, path)
    assert curve == pytest.approx({k: change[:, 7 + k].mean().item() for k in (0, 1, 2, 4, 8)}, rel=1e-9)
    tokens[1:3, 7] = tokens[0, 7]  # only sequences 0 and 3 get another token
    curve = memory_curve(memoryless, tokens, trajectory(memoryless, tokens, 5))
    change = (tokens[0, 7] - tokens[3, 7]).norm() * (1 / tokens[0, 7].norm() + 1 / tokens[3, 7].norm()) / 2
    assert curve[0] == pytest.approx(change.item())


# Linear probes


def test_ridge_is_one_for_a_linear_target_and_nothing_for_noise():
    """R^2 of each group on held-out data: all, none or half explained; negative where a rule costs."""
    x, noise = random_tokens(8000, 6), random_tokens(8000, 1, seed=2)
    signal = x @ random_tokens(6, 1, seed=3)
    signal = signal / signal.std()
    targets = torch.stack([signal + 3, noise, signal + noise], 1)
    got = ridge_r2(x[:4000], targets[:4000], x[4000:], targets[4000:]).tolist()
    assert got == pytest.approx([1, 0, 0.5], abs=0.04)
    wrong = ridge_r2(x[:, :1], x[:, :1, None], x[:, :1], -x[:, :1, None])
    assert wrong.item() == pytest.approx(-3, abs=0.05)


def probe_pair(step, context_dim, seed):
    tokens = random_tokens(60, 40, 4, seed=seed, dtype=torch.float32)
    return trajectory(step, tokens, context_dim), tokens


@pytest.mark.parametrize("lags", [0, 1, 6])
def test_past_capacity_of_a_delay_line_counts_its_tokens(lags):
    """The current token and m before it: R^2 of 1 for the first m lags, none after."""
    pairs = [probe_pair(delay_line, 4 * (lags + 1), seed) for seed in (1, 2)]
    capacity = past_capacity(*pairs)
    assert capacity[:lags] == pytest.approx([1] * lags, abs=1e-2) and len(capacity) == 20
    assert max(capacity[lags:]) < 0.02

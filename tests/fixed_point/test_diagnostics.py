"""What a context is worth: each figure against maps and spectra where it is known by hand."""

import math

import numpy as np
import pytest
import torch
from maps import delay_line, leaky, memoryless, network, random_tokens

from newllm.fixed_point.diagnostics import (
    cold_start_curve,
    contraction_factor,
    effective_rank,
    effective_rank_ceiling,
    identity_r2,
    memory_curve,
    memory_horizon,
    past_capacity,
    ridge_r2,
)
from newllm.fixed_point.solver import sequential


def numpy_rank(contexts):
    """exp(entropy of s / sum(s)) of the singular values of the centred contexts."""
    points = contexts.double().numpy()
    s = np.linalg.svd(points - points.mean(0), compute_uv=False)
    share = s[s > 0] / s.sum()
    return np.exp(-(share * np.log(share)).sum())


def trajectory(step, tokens, context_dim):
    return sequential(step, tokens, context_dim)[0]


# Effective rank


def test_effective_rank_of_an_orthogonal_design_is_its_width():
    """+e_i and -e_i for every i: mean zero, all singular values equal, so C exactly."""
    eye = torch.eye(12)
    assert effective_rank(torch.cat([eye, -eye])) == pytest.approx(12, rel=1e-5)


def test_effective_rank_of_a_line_is_one():
    """All contexts on one line, through the origin or not."""
    line = random_tokens(300, 1) @ random_tokens(1, 16, seed=2)
    assert effective_rank(line) == pytest.approx(1, abs=0.02)
    assert effective_rank(line + 3) == pytest.approx(1, abs=0.02)


def test_effective_rank_of_equal_contexts_is_one():
    """Collapse to a point is the lowest rank, not an error."""
    assert effective_rank(torch.full((50, 8), 2.0)) == pytest.approx(1, abs=1e-6)


def test_effective_rank_of_two_known_singular_values():
    """Shares 3/4 and 1/4: exp(0.75 ln 4/3 + 0.25 ln 4)."""
    contexts = torch.zeros(4, 5)
    contexts[0, 0], contexts[1, 0], contexts[2, 3], contexts[3, 3] = 3, -3, 1, -1
    assert effective_rank(contexts) == pytest.approx(
        math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)), rel=1e-3
    )


@pytest.mark.parametrize("num_tokens", [20, 100, 1000])
def test_effective_rank_is_that_of_the_singular_values(num_tokens):
    """The covariance's eigenvalues give what a singular value decomposition of the centred contexts gives."""
    contexts = random_tokens(num_tokens, 24) * torch.logspace(0, -2, 24, dtype=torch.float64) + 1
    assert effective_rank(contexts) == pytest.approx(numpy_rank(contexts), rel=5e-3)


def test_effective_rank_of_wide_contexts_of_low_rank():
    """Eight directions among 768, the width of the default network."""
    contexts = random_tokens(2000, 8) @ random_tokens(8, 768, seed=2)
    assert effective_rank(contexts.float()) == pytest.approx(numpy_rank(contexts.float()), rel=1e-2)


def test_effective_rank_ignores_mean_scale_and_rotation():
    """It is a property of the centred spectrum's shape."""
    contexts = random_tokens(200, 12) * torch.linspace(1, 3, 12, dtype=torch.float64)
    rotation = torch.linalg.qr(random_tokens(12, 12, seed=2))[0]
    for other in (contexts + 7, 0.01 * contexts, contexts @ rotation):
        assert effective_rank(other) == pytest.approx(effective_rank(contexts), rel=1e-4)


def test_the_ceiling_grows_with_the_number_of_tokens():
    """Few tokens cannot show full rank, whatever the network."""
    ceilings = [effective_rank_ceiling(n, 64) for n in (32, 64, 128, 1024, 8192)]
    assert ceilings == sorted(ceilings)
    assert ceilings[0] < 32 and ceilings[-1] > 0.99 * 64


def test_the_ceiling_of_the_smallest_budget():
    """1,280 tokens of width 768 show 90.7 % at best."""
    assert effective_rank_ceiling(1280, 768) / 768 == pytest.approx(0.907, abs=0.002)


def test_the_ceiling_is_one_number():
    """It is drawn from a fixed seed, so that two reports agree."""
    torch.manual_seed(1)
    first = effective_rank_ceiling(100, 16)
    torch.manual_seed(2)
    assert effective_rank_ceiling(100, 16) == first


# Convergence


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_the_cold_start_error_of_a_linear_map_decays_by_its_factor(factor):
    """c = a c + e on a long sequence: G^k(0) lacks a^k of the trajectory k tokens earlier."""
    tokens = torch.ones(2, 600, 1, dtype=torch.float64)
    path = trajectory(leaky(factor), tokens, 1)
    curve = cold_start_curve(leaky(factor), tokens, path, 8)
    shifted = [path[:, :-k].norm().item() / path.norm().item() for k in range(1, 9)]
    assert curve == pytest.approx([factor**k * s for k, s in enumerate(shifted, 1)], rel=1e-6)
    assert contraction_factor(curve) == pytest.approx(factor, rel=1e-2)


def test_the_cold_start_curve_reaches_zero_at_the_length_of_the_sequence():
    """Whatever the map, T sweeps are exact; fewer are not."""
    tokens = random_tokens(3, 6, 5)
    curve = cold_start_curve(network(6, 5), tokens, trajectory(network(6, 5), tokens, 6), 8)
    assert len(curve) == 8
    assert min(curve[:5]) > 1e-6 and max(curve[5:]) < 1e-12


def test_the_contraction_factor_of_a_geometric_curve_is_its_ratio():
    """Also when the curve ends in rounding errors, and when it grows."""
    assert contraction_factor([0.8 * 0.3**k for k in range(8)]) == pytest.approx(0.3)
    assert contraction_factor([0.3**k for k in range(8)] + [1e-8, 3e-8, 2e-8]) == pytest.approx(0.3)
    assert contraction_factor([0.1 * 1.5**k for k in range(6)]) == pytest.approx(1.5)


def test_a_map_that_converges_at_once_contracts_to_zero():
    """No decay can be fitted to a curve that is zero from the first sweep."""
    tokens = random_tokens(2, 10, 4)
    curve = cold_start_curve(memoryless, tokens, trajectory(memoryless, tokens, 4), 4)
    assert curve == [0, 0, 0, 0]
    assert contraction_factor(curve) == 0


# Memory


@pytest.mark.parametrize(("held", "horizon"), [(1, 0), (2, 1), (3, 2), (5, 4), (9, 8), (16, 8)])
def test_the_horizon_of_a_delay_line_is_what_it_holds(held, horizon):
    """A token among the last m is k <= m - 1 back; the horizon is the largest measured lag within."""
    tokens = random_tokens(4, 40, 3)
    curve = memory_curve(delay_line, tokens, trajectory(delay_line, tokens, 3 * held))
    assert list(curve) == [0, 1, 2, 4, 8, 16]
    assert [k for k, change in curve.items() if change > 0] == [k for k in curve if k < held]
    assert memory_horizon(curve) == horizon


def test_a_leaky_map_forgets_by_its_factor():
    """c = a c + e: the change decays by a per token."""
    tokens = torch.cat([torch.ones(1, 64, 1), 2 * torch.ones(1, 64, 1)]).double()
    tokens[:, :, 0] += 100  # the context's own size is then nearly the same at every lag
    curve = memory_curve(leaky(0.5), tokens, trajectory(leaky(0.5), tokens, 1))
    for k in (1, 2, 4):
        assert curve[k] / curve[0] == pytest.approx(0.5**k, rel=1e-3)


def test_the_memory_curve_is_that_of_trajectories_with_one_token_replaced():
    """The same as computing the whole trajectory again with another sequence's token in the middle."""
    step, tokens = network(6, 5), random_tokens(4, 16, 5)
    path = trajectory(step, tokens, 6)
    replaced = tokens.clone()
    replaced[:, 7] = tokens[[3, 0, 1, 2], 7]
    change = (trajectory(step, replaced, 6) - path).norm(dim=-1) / path.norm(dim=-1)
    curve = memory_curve(step, tokens, path)
    assert curve == pytest.approx({k: change[:, 7 + k].mean().item() for k in (0, 1, 2, 4, 8)}, rel=1e-9)


def test_a_replacement_by_the_same_token_does_not_count():
    """Sequences whose token is what it was before are no evidence of forgetting."""
    tokens = random_tokens(4, 16, 3)
    tokens[1:3, 7] = tokens[0, 7]  # only sequences 0 and 3 get another token
    curve = memory_curve(memoryless, tokens, trajectory(memoryless, tokens, 3))
    change = (tokens[0, 7] - tokens[3, 7]).norm() * (1 / tokens[0, 7].norm() + 1 / tokens[3, 7].norm()) / 2
    assert curve[0] == pytest.approx(change.item())


def test_the_horizon_is_the_last_lag_above_one_percent():
    """A dip on the way does not end it; a map that keeps nothing has horizon 0."""
    assert memory_horizon({0: 1.0, 1: 0.5, 2: 0.005, 4: 0.02, 8: 0.01}) == 4
    assert memory_horizon({0: 0.0, 1: 0.0}) == 0


# Linear probes


def test_ridge_explains_a_linear_target_wholly():
    """Targets that are a linear function plus a constant: R^2 = 1 in each group."""
    x, weights = random_tokens(500, 6), random_tokens(6, 4, seed=2)
    targets = (x @ weights + 3).view(500, 2, 2)
    got = ridge_r2(x[:300], targets[:300], x[300:], targets[300:])
    assert got.shape == (2,)
    assert got.tolist() == pytest.approx([1, 1], abs=1e-4)


def test_ridge_explains_nothing_of_an_independent_target():
    """Held out, noise is predicted no better than by the mean."""
    x, targets = random_tokens(2000, 6), random_tokens(2000, 1, 3, seed=2)
    assert -0.05 < ridge_r2(x[:1000], targets[:1000], x[1000:], targets[1000:]).item() < 0.01


def test_ridge_reports_half_of_a_half_explained_target():
    """Signal and noise of equal variance; each group has its own figure."""
    x = random_tokens(8000, 1)
    targets = torch.stack([x, x + random_tokens(8000, 1, seed=2)], dim=1)
    got = ridge_r2(x[:4000], targets[:4000], x[4000:], targets[4000:])
    assert got.tolist() == pytest.approx([1, 0.5], abs=0.04)


def test_ridge_is_negative_when_worse_than_the_mean():
    """It is measured on held-out data, where a wrong rule costs."""
    x = random_tokens(200, 1)
    assert ridge_r2(x, x.unsqueeze(1), x, -x.unsqueeze(1)).item() == pytest.approx(-3, abs=0.05)


def probe_pair(step, context_dim, seed):
    tokens = random_tokens(60, 40, 4, seed=seed, dtype=torch.float32)
    return trajectory(step, tokens, context_dim), tokens


def test_past_capacity_of_a_memoryless_map_is_nothing():
    """The current token says nothing about independent earlier ones."""
    capacity = past_capacity(probe_pair(memoryless, 4, 1), probe_pair(memoryless, 4, 2), max_lag=10)
    assert len(capacity) == 10
    assert sum(capacity) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("lags", [1, 3, 6])
def test_past_capacity_of_a_delay_line_counts_its_tokens(lags):
    """The current token and m before it: R^2 of 1 for the first m lags, none after."""
    pairs = [probe_pair(delay_line, 4 * (lags + 1), seed) for seed in (1, 2)]
    capacity = past_capacity(*pairs, max_lag=10)
    assert capacity[:lags] == pytest.approx([1] * lags, abs=1e-2)
    assert max(capacity[lags:]) < 0.02
    assert sum(capacity) == pytest.approx(lags, abs=0.1)


def test_past_capacity_looks_back_half_a_sequence_at_most():
    """So that every lag is probed on as many tokens."""
    pair = probe_pair(memoryless, 4, 1)
    assert len(past_capacity(*[(contexts[:, :9], tokens[:, :9]) for contexts, tokens in (pair, pair)])) == 4


def test_identity_r2_of_a_linear_function_of_the_token_is_one():
    """Such a context is the current token and nothing else."""

    def linear(context, token):
        return token @ random_tokens(4, 6, seed=5, dtype=torch.float32) + 1, token

    assert identity_r2(probe_pair(linear, 6, 1), probe_pair(linear, 6, 2)) == pytest.approx(1, abs=1e-4)


def test_identity_r2_of_a_delayed_token_is_nothing():
    """A context made of the token before knows nothing of the current one; made of both, it is half explained."""
    pairs = [probe_pair(delay_line, 8, seed) for seed in (1, 2)]
    only_earlier = [(contexts[..., 4:], tokens) for contexts, tokens in pairs]
    assert identity_r2(*only_earlier) == pytest.approx(0, abs=0.02)
    assert identity_r2(*pairs) == pytest.approx(0.5, abs=0.03)

"""The trajectory and its sweeps: one recurrence, evaluated two ways, and what a sweep knows of the past."""

import pytest
import torch
from maps import chaotic, cosine, leaky, memoryless, network, random_tokens, swept

from newllm.fixed_point.solver import SweepStats, sequential, shift, solve, squared_change, sweep, truncated

B, T, C, E = 3, 7, 6, 5


def test_sequential_is_the_recurrence_from_zero():
    """c_1 = F(0, e_1), c_t = F(c_{t-1}, e_t), token by token and sequence by sequence."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    contexts, streams = sequential(step, tokens, C)
    assert contexts.shape == (B, T, C) and streams.shape == (B, T, E)
    for b in range(B):
        context = torch.zeros(C, dtype=torch.float64)
        for t in range(T):
            context, stream = step(context, tokens[b, t])
            torch.testing.assert_close(contexts[b, t], context, rtol=0, atol=1e-12)
            torch.testing.assert_close(streams[b, t], stream, rtol=0, atol=1e-12)


def test_sequential_goes_on_from_a_given_context():
    """A trajectory cut in two, the second part started from the last context of the first, is the whole one."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    whole, _ = sequential(step, tokens, C)
    rest, _ = sequential(step, tokens[:, 3:], C, whole[:, 2])
    torch.testing.assert_close(rest, whole[:, 3:], rtol=0, atol=0)


def test_as_many_sweeps_as_tokens_give_the_trajectory():
    """Contexts and token streams after T cold sweeps are those of the T dependent steps."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    for got, expected in zip(swept(step, tokens, C, T), sequential(step, tokens, C), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradients_through_the_sweeps_are_those_through_time():
    """T sweeps and T steps give the same gradient for every parameter of the map and every input."""
    step = network(C, E)
    gradients = []
    for evaluate in (lambda tokens: swept(step, tokens, C, T), lambda tokens: sequential(step, tokens, C)):
        tokens = random_tokens(B, T, E).requires_grad_()
        contexts, streams = evaluate(tokens)
        loss = (contexts * random_tokens(B, T, C, seed=2)).sum() + (
            streams * random_tokens(B, T, E, seed=3)
        ).sum()
        gradients.append(torch.autograd.grad(loss, [tokens, *step.parameters()]))
    for got, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", range(1, T + 1))
def test_sweep_k_is_exact_for_the_first_k_tokens_and_no_more(count):
    """Jacobi iteration: after k cold sweeps tokens 1 ... k stand on the trajectory and the others do not yet."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    difference = (swept(step, tokens, C, count)[0] - sequential(step, tokens, C)[0]).abs().amax((0, 2))
    assert difference[:count].max() < 1e-12
    assert (difference[count:] > 1e-6).all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_after_k_cold_sweeps_a_context_is_a_function_of_k_tokens(count):
    """Another token at s changes the contexts s ... s+k-1 and, to the last bit, no other."""
    step, tokens, changed_at = network(C, E), random_tokens(B, T, E), 2
    others = tokens.clone()
    others[:, changed_at] += 1
    before, after = swept(step, tokens, C, count)[0], swept(step, others, C, count)[0]
    changed = [t for t in range(T) if not torch.equal(before[:, t], after[:, t])]
    assert changed == list(range(changed_at, min(T, changed_at + count)))


@pytest.mark.parametrize(
    "evaluate", [sequential, lambda *args: swept(*args, 4)], ids=["sequential", "sweeps"]
)
def test_no_context_knows_a_later_token(evaluate):
    """Another token at t leaves everything before t bit-identical."""
    step, tokens, changed_at = network(C, E), random_tokens(B, T, E), 4
    others = tokens.clone()
    others[:, changed_at] += 1
    for before, after in zip(evaluate(step, tokens, C), evaluate(step, others, C), strict=True):
        assert torch.equal(before[:, :changed_at], after[:, :changed_at])
        assert not torch.equal(before[:, changed_at], after[:, changed_at])


def test_no_sequence_knows_another():
    """Another sequence in the batch leaves the rest of the batch bit-identical."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    others = tokens.clone()
    others[1] += 1
    before, after = swept(step, tokens, C, 3)[0], swept(step, others, C, 3)[0]
    assert [torch.equal(before[b], after[b]) for b in range(B)] == [True, False, True]


def test_shift_moves_contexts_one_token_later_behind_a_zero():
    """[k1, k2, k3] becomes [0, k1, k2]; the argument stays as it was."""
    contexts = random_tokens(2, 3, 4)
    original = contexts.clone()
    shifted = shift(contexts)
    assert torch.equal(shifted[:, 0], torch.zeros(2, 4, dtype=torch.float64))
    assert torch.equal(shifted[:, 1:], contexts[:, :-1])
    assert torch.equal(contexts, original)


def test_the_trajectory_is_the_fixed_point_of_the_sweep():
    """G(trajectory) = trajectory."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    trajectory, _ = sequential(step, tokens, C)
    torch.testing.assert_close(sweep(step, trajectory, tokens)[0], trajectory, rtol=0, atol=1e-12)


def test_squared_change_is_the_mean_over_dimensions_in_fp32():
    """Half-precision contexts are subtracted in fp32."""
    new, old = (random_tokens(2, 3, 4, seed=s).bfloat16() for s in (1, 2))
    got = squared_change(new, old)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), (new.double() - old.double()).square().mean(-1), rtol=1e-6, atol=0
    )


def test_solve_finds_the_fixed_point_of_a_contraction():
    """c = cos(c): the late tokens reach 0.739085..., in fewer sweeps than tokens, and the rest is the trajectory."""
    tokens = torch.zeros(2, 150, 1, dtype=torch.float64)
    contexts, stats = solve(cosine, tokens, 1, max_sweeps=150, threshold=1e-14)
    assert stats.sweeps < 60 and stats.converged[-1] == 1
    torch.testing.assert_close(
        contexts[:, -1], torch.full((2, 1), 0.7390851332, dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(contexts, sequential(cosine, tokens, 1)[0], rtol=0, atol=1e-6)


def test_solve_records_residual_and_share_of_every_sweep():
    """For c = a c + 1, sweep k moves the tokens from k on by a^(k-1) and leaves the k-1 before them."""
    _, stats = solve(leaky(0.5), torch.ones(2, 10, 1, dtype=torch.float64), 1, max_sweeps=4, threshold=1e-9)
    assert stats.sweeps == 4
    assert stats.residual == pytest.approx([(10 - k) / 10 * 0.25**k for k in range(4)])
    assert stats.converged == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_token_converges_below_the_threshold_not_at_it():
    """A squared change equal to the threshold is no convergence; any less is."""
    tokens = torch.ones(2, 8, 1, dtype=torch.float64)
    assert solve(memoryless, tokens, 1, max_sweeps=1, threshold=1.0)[1].converged == [0]
    assert solve(memoryless, tokens, 1, max_sweeps=1, threshold=1.0 + 1e-6)[1].converged == [1]


@pytest.mark.parametrize(("ratio", "expected"), [(0.1, 2), (0.5, 6), (1.0, 11)])
def test_solve_stops_at_the_ratio(ratio, expected):
    """The first sweep after which a share `ratio` of tokens has converged is the last one."""
    tokens = torch.ones(1, 10, 1, dtype=torch.float64)
    _, stats = solve(leaky(0.9), tokens, 1, max_sweeps=20, threshold=1e-9, ratio=ratio)
    assert stats.sweeps == expected
    assert all(share < ratio for share in stats.converged[:-1])


def test_a_share_of_exactly_the_ratio_is_enough():
    """19 of 20 tokens are 95 %."""
    tokens = torch.ones(1, 20, 1, dtype=torch.float64)
    assert solve(leaky(0.9), tokens, 1, max_sweeps=30, threshold=1e-9, ratio=0.95)[1].sweeps == 20


def test_solve_never_exceeds_its_sweeps():
    """`max_sweeps` bounds a solve that has not converged, and what it had by then comes back."""
    tokens = random_tokens(B, T, E)
    contexts, stats = solve(network(C, E), tokens, C, max_sweeps=2, threshold=1e-20)
    assert stats.sweeps == 2
    assert torch.equal(contexts, swept(network(C, E), tokens, C, 2)[0])


def test_a_chaotic_map_is_reported_as_not_converged():
    """Nothing is raised; the residual does not fall and most tokens stay unconverged."""
    tokens = random_tokens(2, 100, 3)
    contexts, stats = solve(chaotic, tokens, 3, max_sweeps=20, threshold=0.05, ratio=0.95)
    assert stats.sweeps == 20 and contexts.isfinite().all()
    assert stats.converged[-1] < 0.5
    assert stats.residual[-1] > 0.1


def test_a_map_that_gives_nan_has_not_converged():
    """A change that is not a number is below no threshold."""
    nan = float("nan")
    _, stats = solve(lambda c, e: (c + nan, e), torch.ones(1, 4, 1), 1, max_sweeps=3, threshold=1.0)
    assert stats.converged == [0, 0, 0]


def test_a_start_at_the_trajectory_needs_one_sweep():
    """`start_BTC` takes the place of the cold start, and is left as it was."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    trajectory, _ = sequential(step, tokens, C)
    original = trajectory.clone()
    contexts, stats = solve(step, tokens, C, max_sweeps=10, threshold=1e-20, start_BTC=trajectory)
    assert stats.sweeps == 1 and stats.residual[0] < 1e-24
    torch.testing.assert_close(contexts, trajectory, rtol=0, atol=1e-12)
    assert torch.equal(trajectory, original)


def test_stats_of_two_solves_are_apart():
    """A new record is empty."""
    SweepStats().residual.append(1.0)
    assert SweepStats().sweeps == 0


# Gradient through the last sweeps


@pytest.mark.parametrize("sweeps", [1, 3, T])
@pytest.mark.parametrize("step", [leaky(0.9), network(C, C)], ids=["linear", "network"])
def test_truncated_has_the_values_of_the_reference(step, sweeps):
    """Sweeping on from the trajectory changes nothing, neither contexts nor streams."""
    tokens = random_tokens(2, T, C)
    for got, wanted in zip(truncated(step, tokens, C, sweeps), sequential(step, tokens, C), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sweeps", [T, T + 2])
def test_truncated_through_all_sweeps_has_the_gradient_through_time(sweeps):
    """T sweeps reach back to the first token: the sequential evaluation's gradient of every parameter and input."""
    step = network(C, E)
    gradients = []
    for evaluate in (lambda t: truncated(step, t, C, sweeps), lambda t: sequential(step, t, C)):
        tokens = random_tokens(B, T, E).requires_grad_()
        contexts, streams = evaluate(tokens)
        loss = (contexts * random_tokens(B, T, C, seed=2)).sum() + (
            streams * random_tokens(B, T, E, seed=3)
        ).sum()
        gradients.append(torch.autograd.grad(loss, [tokens, *step.parameters()]))
    for got, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sweeps", [1, 2, 4])
@pytest.mark.parametrize("step", [leaky(0.9), network(C, C)], ids=["linear", "network"])
def test_truncated_gradient_reaches_as_many_tokens_as_sweeps(step, sweeps):
    """c_t depends, in gradient, on tokens t-k+1 ... t as through time, and on t-k and all before it not at all."""
    gradients = []
    for evaluate in (lambda t: truncated(step, t, C, sweeps), lambda t: sequential(step, t, C)):
        tokens = random_tokens(1, T, C).requires_grad_()
        contexts, _ = evaluate(tokens)
        weights = random_tokens(C, seed=2)  # the sum of a normalised context has no gradient
        gradients.append(torch.autograd.grad((contexts[0, T - 1] * weights).sum(), tokens)[0][0])
    got, through_time = gradients
    assert (got[: T - sweeps] == 0).all()
    assert (got[T - sweeps :].abs().sum(-1) > 0).all() and (through_time.abs().sum(-1) > 0).all()
    torch.testing.assert_close(got[T - sweeps :], through_time[T - sweeps :], rtol=1e-10, atol=1e-12)


def test_truncated_sweeps_on_from_the_trajectory_it_is_given():
    """A faster evaluation takes the place of the reference: asked once, from a start of zeros."""
    step, tokens, asked = network(C, E), random_tokens(B, T, E), []

    def trajectory(given, start):
        asked.append((given is tokens, start.shape, start.abs().sum().item()))
        return sequential(step, given, C, start)[0]

    got = truncated(step, tokens, C, 2, trajectory=trajectory)
    for values, expected in zip(got, truncated(step, tokens, C, 2), strict=True):
        assert torch.equal(values, expected)
    assert asked == [(True, (B, C), 0)]

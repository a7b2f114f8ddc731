"""The trajectory and its sweeps: one recurrence, evaluated two ways, and what a sweep knows of the past."""

import pytest
import torch
from maps import chaotic, cosine, leaky, memoryless, network, random_tokens, swept

from newllm.fixed_point.solver import sequential, shift, solve, squared_change, sweep, truncated

B, T, C, E = 3, 7, 6, 5


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def assert_same_gradients(step, one, other):
    """Two evaluations have the same gradient of every parameter of the map and every input."""
    gradients = []
    for evaluate in (one, other):
        tokens = random_tokens(B, T, E).requires_grad_()
        contexts, streams = evaluate(tokens)
        loss = (contexts * random_tokens(B, T, C, seed=2)).sum()
        loss = loss + (streams * random_tokens(B, T, E, seed=3)).sum()
        gradients.append(torch.autograd.grad(loss, [tokens, *step.parameters()]))
    for got, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_sequential_is_the_recurrence_from_zero_or_a_given_context():
    """c_1 = F(0, e_1), c_t = F(c_{t-1}, e_t), sequence by sequence; cut in two it is the whole one."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    contexts, streams = sequential(step, tokens, C)
    assert contexts.shape == (B, T, C) and streams.shape == (B, T, E)
    for b in range(B):
        context = torch.zeros(C, dtype=torch.float64)
        for t in range(T):
            context, stream = step(context, tokens[b, t])
            close(contexts[b, t], context)
            close(streams[b, t], stream)
    rest, _ = sequential(step, tokens[:, 3:], C, contexts[:, 2])
    close(rest, contexts[:, 3:], 0)


def test_as_many_sweeps_as_tokens_are_the_trajectory_in_values_and_gradients():
    """T cold sweeps and T dependent steps: contexts, token streams, the gradient of every parameter and
    input."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    close(swept(step, tokens, C, T), sequential(step, tokens, C))
    assert_same_gradients(
        step, lambda tokens: swept(step, tokens, C, T), lambda tokens: sequential(step, tokens, C)
    )


@pytest.mark.parametrize("count", range(1, T + 1))
def test_sweep_k_is_exact_for_the_first_k_tokens_and_a_function_of_the_last_k(count):
    """Jacobi iteration: the others are not exact yet. Another token at s changes s ... s+k-1 and, to the
    bit, no other."""
    step, tokens, changed_at = network(C, E), random_tokens(B, T, E), 2
    before = swept(step, tokens, C, count)[0]
    difference = (before - sequential(step, tokens, C)[0]).abs().amax((0, 2))
    assert difference[:count].max() < 1e-12
    assert (difference[count:] > 1e-6).all()
    others = tokens.clone()
    others[:, changed_at] += 1
    after = swept(step, others, C, count)[0]
    changed = [t for t in range(T) if not torch.equal(before[:, t], after[:, t])]
    assert changed == list(range(changed_at, min(T, changed_at + count)))


@pytest.mark.parametrize(
    "evaluate", [sequential, lambda *args: swept(*args, 4)], ids=["sequential", "sweeps"]
)
def test_no_context_knows_a_later_token_or_another_sequence(evaluate):
    """Another token at t leaves everything before t bit-identical, another sequence the rest of the batch."""
    step, tokens, changed_at = network(C, E), random_tokens(B, T, E), 4
    others = tokens.clone()
    others[1, changed_at] += 1
    for before, after in zip(evaluate(step, tokens, C), evaluate(step, others, C), strict=True):
        assert torch.equal(before[:, :changed_at], after[:, :changed_at])
        assert [torch.equal(before[b, changed_at], after[b, changed_at]) for b in range(B)] == [
            True,
            False,
            True,
        ]
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_the_trajectory_is_the_fixed_point_of_the_sweep():
    """G(trajectory) = trajectory; a sweep starts from contexts one token later, behind a zero."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    trajectory, _ = sequential(step, tokens, C)
    original = trajectory.clone()
    close(sweep(step, trajectory, tokens)[0], trajectory)
    shifted = shift(trajectory)
    assert not shifted[:, 0].any() and torch.equal(shifted[:, 1:], trajectory[:, :-1])
    assert torch.equal(trajectory, original)


def test_squared_change_is_the_mean_over_dimensions_in_fp32():
    """Half-precision contexts are subtracted in fp32."""
    new, old = (random_tokens(2, 3, 4, seed=s).bfloat16() for s in (1, 2))
    change = squared_change(new, old)
    assert change.dtype == torch.float32
    expected = (new.double() - old.double()).square().mean(-1)
    torch.testing.assert_close(change.double(), expected, rtol=1e-6, atol=0)


# Solve


def ones(length, batch=1):
    return torch.ones(batch, length, 1, dtype=torch.float64)


def test_solve_finds_the_fixed_point_of_a_contraction():
    """c = cos(c): the late tokens reach 0.739085..., in fewer sweeps than tokens, and the rest is the
    trajectory."""
    tokens = torch.zeros(2, 150, 1, dtype=torch.float64)
    contexts, stats = solve(cosine, tokens, 1, max_sweeps=150, threshold=1e-14)
    assert stats.sweeps < 60 and stats.converged[-1] == 1
    close(contexts[:, -1], torch.full((2, 1), 0.7390851332, dtype=torch.float64), 1e-6)
    close(contexts, sequential(cosine, tokens, 1)[0], 1e-6)


def test_solve_records_residual_and_share_of_every_sweep():
    """For c = a c + 1, sweep k moves the tokens from k on by a^(k-1); below the threshold, not at it, is
    converged."""
    _, stats = solve(leaky(0.5), ones(10, 2), 1, max_sweeps=4, threshold=1e-9)
    assert stats.sweeps == 4
    assert stats.residual == pytest.approx([(10 - k) / 10 * 0.25**k for k in range(4)])
    assert stats.converged == pytest.approx([0, 0.1, 0.2, 0.3])
    assert solve(memoryless, ones(8), 1, max_sweeps=1, threshold=1.0)[1].converged == [0]
    assert solve(memoryless, ones(8), 1, max_sweeps=1, threshold=1.0 + 1e-6)[1].converged == [1]


@pytest.mark.parametrize(
    ("ratio", "length", "sweeps"), [(0.1, 10, 2), (0.5, 10, 6), (1.0, 10, 11), (0.95, 20, 20)]
)
def test_solve_stops_at_the_ratio(ratio, length, sweeps):
    """The first sweep after which a share `ratio` of tokens has converged is the last one; 19 of 20 are 95
    %."""
    _, stats = solve(leaky(0.9), ones(length), 1, max_sweeps=30, threshold=1e-9, ratio=ratio)
    assert stats.sweeps == sweeps
    assert all(share < ratio for share in stats.converged[:-1])


def test_what_does_not_converge_is_reported_and_not_raised():
    """Never more than `max_sweeps`, and what there was by then; a chaotic map; a change that is not a
    number."""
    tokens = random_tokens(B, T, E)
    contexts, stats = solve(network(C, E), tokens, C, max_sweeps=2, threshold=1e-20)
    assert stats.sweeps == 2 and torch.equal(contexts, swept(network(C, E), tokens, C, 2)[0])
    contexts, stats = solve(chaotic, random_tokens(2, 100, 3), 3, max_sweeps=20, threshold=0.05, ratio=0.95)
    assert stats.sweeps == 20 and contexts.isfinite().all()
    assert stats.converged[-1] < 0.5 and stats.residual[-1] > 0.1
    _, stats = solve(lambda c, e: (c + float("nan"), e), ones(4), 1, max_sweeps=3, threshold=1.0)
    assert stats.converged == [0, 0, 0]


def test_a_start_at_the_trajectory_needs_one_sweep():
    """`start_BTC` takes the place of the cold start, and is left as it was."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    trajectory, _ = sequential(step, tokens, C)
    original = trajectory.clone()
    contexts, stats = solve(step, tokens, C, max_sweeps=10, threshold=1e-20, start_BTC=trajectory)
    assert stats.sweeps == 1 and stats.residual[0] < 1e-24
    close(contexts, trajectory)
    assert torch.equal(trajectory, original)


# Gradient through the last sweeps


@pytest.mark.parametrize("sweeps", [1, 2, 4, T])
@pytest.mark.parametrize("step", [leaky(0.9), network(C, C)], ids=["linear", "network"])
def test_truncated_has_the_reference_s_values_and_a_gradient_over_as_many_tokens_as_sweeps(step, sweeps):
    """c_t depends, in gradient, on tokens t-k+1 ... t as through time, and on t-k and all before it not at
    all."""
    gradients, values = [], []
    for evaluate in (lambda t: truncated(step, t, C, sweeps), lambda t: sequential(step, t, C)):
        tokens = random_tokens(1, T, C).requires_grad_()
        values.append(evaluate(tokens))
        weights = random_tokens(C, seed=2)  # the sum of a normalised context has no gradient
        gradients.append(torch.autograd.grad((values[-1][0][0, T - 1] * weights).sum(), tokens)[0][0])
    close(*values)
    got, through_time = gradients
    assert (got[: T - sweeps] == 0).all()
    assert (got[T - sweeps :].abs().sum(-1) > 0).all() and (through_time.abs().sum(-1) > 0).all()
    torch.testing.assert_close(got[T - sweeps :], through_time[T - sweeps :], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sweeps", [T, T + 2])
def test_truncated_through_all_sweeps_has_the_gradient_through_time(sweeps):
    """T sweeps reach back to the first token: the sequential evaluation's gradient of every parameter and
    input."""
    step = network(C, E)
    assert_same_gradients(step, lambda t: truncated(step, t, C, sweeps), lambda t: sequential(step, t, C))


def test_truncated_sweeps_on_from_the_trajectory_it_is_given():
    """A faster evaluation takes the place of the reference: asked once, from a start of zeros."""
    step, tokens, asked = network(C, E), random_tokens(B, T, E), []

    def trajectory(given, start):
        asked.append((given is tokens, start.shape, start.abs().sum().item()))
        return sequential(step, given, C, start)[0]

    close(truncated(step, tokens, C, 2, trajectory=trajectory), truncated(step, tokens, C, 2), 0)
    assert asked == [(True, (B, C), 0)]

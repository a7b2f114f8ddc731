"""The trajectory, its sweeps and its prefill: one recurrence, evaluated in several ways."""

import pytest
import torch
from maps import chaotic, delay_line, leaky, memoryless, network, random_tokens

from newllm.fixed_point.solver import prefill, sequential, sweep, truncated

B, T, C, E = 3, 7, 6, 5


def swept(step, tokens, context_dim, count):
    """Contexts and streams after `count` cold sweeps."""
    contexts = tokens.new_zeros(*tokens.shape[:2], context_dim)
    for _ in range(count):
        contexts, streams = sweep(step, contexts, tokens)
    return contexts, streams


def through(step, tokens, context_dim, sweeps):
    """The trajectory, with gradient through the last sweeps."""
    return truncated(step, tokens, sequential(step, tokens, context_dim)[0].detach(), sweeps, step)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def gradients(step, evaluate):
    """Gradients of the inputs and of every parameter of the map, of a weighted sum of all that comes out."""
    tokens = random_tokens(B, T, E).requires_grad_()
    contexts, streams = evaluate(tokens)
    loss = (contexts * random_tokens(B, T, C, seed=2)).sum() + (
        streams * random_tokens(B, T, E, seed=3)
    ).sum()
    return torch.autograd.grad(loss, [tokens, *step.parameters()])


def test_sequential_is_the_recurrence_from_zero_or_a_given_context():
    """c_1 = F(0, e_1), c_t = F(c_{t-1}, e_t); cut in two it is the whole one."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    contexts, streams = sequential(step, tokens, C)
    assert contexts.shape == (B, T, C) and streams.shape == (B, T, E)
    context = torch.zeros(B, C, dtype=torch.float64)
    for t in range(T):
        context, stream = step(context, tokens[:, t])
        close((contexts[:, t], streams[:, t]), (context, stream))
    rest, _ = sequential(step, tokens[:, 3:], C, contexts[:, 2])
    close(rest, contexts[:, 3:], 0)


def test_the_trajectory_is_the_fixed_point_of_the_sweep_and_t_sweeps_reach_it():
    """G(trajectory) = trajectory; T cold sweeps give its contexts, streams and gradients."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    trajectory = sequential(step, tokens, C)
    close(sweep(step, trajectory[0], tokens), trajectory)
    close(swept(step, tokens, C, T), trajectory)
    reference = gradients(step, lambda tokens: sequential(step, tokens, C))
    assert all(gradient.abs().max() > 0 for gradient in reference)
    close(gradients(step, lambda tokens: swept(step, tokens, C, T)), reference, 1e-10)


@pytest.mark.parametrize("count", [1, 2, 5, T])
def test_sweep_k_is_exact_for_the_first_k_tokens_and_a_function_of_the_last_k(count):
    """The others are not exact yet. Another token at s changes s ... s+k-1 of its sequence and no other."""
    step, tokens, changed_at = network(C, E), random_tokens(B, T, E), 2
    before = swept(step, tokens, C, count)[0]
    difference = (before - sequential(step, tokens, C)[0]).abs().amax((0, 2))
    assert difference[:count].max() < 1e-12
    assert (difference[count:] > 1e-6).all()
    others = tokens.clone()
    others[1, changed_at] += 1
    changed = (before != swept(step, others, C, count)[0]).any(-1)
    assert changed[1].nonzero().flatten().tolist() == list(range(changed_at, min(T, changed_at + count)))
    assert not changed[[0, 2]].any()


@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_truncated_has_the_reference_s_values_and_a_gradient_over_as_many_tokens_as_sweeps(sweeps):
    """c_t depends, in gradient, on tokens t-k+1 ... t as through time, and on those before not at all."""
    step, tokens = network(C, E), random_tokens(1, T, E).requires_grad_()
    values = through(step, tokens, C, sweeps), sequential(step, tokens, C)
    close(*values)
    weights = random_tokens(C, seed=2)  # the sum of a normalised context has no gradient
    losses = [(contexts[0, T - 1] * weights).sum() for contexts, _ in values]
    truncation, through_time = (torch.autograd.grad(loss, tokens)[0][0] for loss in losses)
    assert (truncation[: T - sweeps] == 0).all() and (through_time.abs().sum(-1) > 0).all()
    close(truncation[T - sweeps :], through_time[T - sweeps :], 1e-10)


@pytest.mark.parametrize("sweeps", [T, T + 2])
def test_truncated_through_all_sweeps_has_the_gradient_through_time(sweeps):
    """They reach back to the first token: every parameter's and input's gradient is the reference's."""
    step = network(C, E)
    reference = gradients(step, lambda tokens: sequential(step, tokens, C))
    close(gradients(step, lambda tokens: through(step, tokens, C, sweeps)), reference, 1e-10)


# Prefill


def worst(contexts, others):
    """Largest relative difference of a token."""
    return ((contexts - others).norm(dim=-1) / others.norm(dim=-1)).max().item()


@pytest.mark.parametrize("piece", [1, 64, 1000])
def test_prefill_comes_within_the_tolerance_whatever_the_pieces(piece):
    """Contexts obey the recurrence to within the tolerance, and a contraction by 0.5 errs by twice that."""
    step, tokens, tolerance = leaky(0.5), random_tokens(2, 150, 30), 1e-3
    contexts, streams, stats = prefill(step, tokens, 30, tolerance, 40, piece)
    reference, _ = sequential(step, tokens, 30)
    assert worst(sweep(step, contexts, tokens)[0], contexts) <= tolerance * 1.01
    assert worst(contexts, reference) < 2 * tolerance * 1.5
    assert all(stats.converged) and len(stats.sweeps) == -(-150 // piece) and torch.equal(streams, tokens)


@pytest.mark.parametrize("piece", [1, 3, T, 100])
@pytest.mark.parametrize("step", [chaotic, network(C, C)], ids=["chaotic", "network"])
def test_prefill_to_the_end_is_exact(step, piece):
    """A piece of n tokens ends within n sweeps, whatever the map; from a given context it is the rest."""
    tokens = random_tokens(B, T, C)
    reference = sequential(step, tokens, C)
    *got, stats = prefill(step, tokens, C, 0.0, T + 5, piece)
    close(got, list(reference))
    assert all(stats.converged) and max(stats.sweeps) <= min(piece, T)
    rest, _, _ = prefill(step, tokens[:, 3:], C, 0.0, T, piece, start_BC=reference[0][:, 2])
    close(rest, reference[0][:, 3:])


def test_prefill_makes_cold_sweeps_or_goes_on_from_a_guess():
    """Few sweeps, no tolerance: the contexts of as many sweeps over the whole."""
    step, tokens = network(C, E), random_tokens(B, 30, E)
    *got, stats = prefill(step, tokens, C, 0.0, 4)
    close(got, list(swept(step, tokens, C, 4)))
    assert stats.sweeps == [4] and stats.converged == [False]
    close(prefill(step, tokens, C, 0.0, 1, guess_BTC=swept(step, tokens, C, 3)[0])[0], got[0])


def test_prefill_evaluates_a_token_again_only_if_the_context_before_it_moved():
    """In c_t = e_t the second sweep finds nothing new; in a delay line of three tokens the fourth does."""
    tokens = random_tokens(2, 40, 3)
    _, _, stats = prefill(memoryless, tokens, 3, 1e-9, 40, 10)
    assert stats.sweeps == [2, 2, 2, 2] and stats.passes == (40 + 36) / 40  # a piece's first is right at once
    _, _, stats = prefill(delay_line, random_tokens(1, 40, 1), 3, 1e-9, 40)
    assert stats.sweeps == [4] and stats.passes == (40 + 39 + 38 + 37) / 40
    still = prefill(leaky(0.9), tokens, 3, 1e-9, 40, guess_BTC=sequential(leaky(0.9), tokens, 3)[0])[2]
    assert still.sweeps == [1] and still.passes == 1


def test_no_sequence_of_a_prefill_knows_another():
    """Beside a sequence of zeros, whose contexts are zero at once, the work is that of the other alone."""
    one = random_tokens(1, 50, 3)
    contexts, _, stats = prefill(leaky(0.9), torch.cat([torch.zeros_like(one), one]), 3, 1e-6, 60)
    alone, _, alone_stats = prefill(leaky(0.9), one, 3, 1e-6, 60)
    close(contexts[1:], alone)
    assert 2 * stats.passes == pytest.approx(alone_stats.passes + 1) and not contexts[0].any()


def test_what_does_not_converge_ends_and_is_said():
    """Each piece of a chaotic map gets its sweeps and no more; a NaN is within no tolerance."""
    contexts, _, stats = prefill(chaotic, random_tokens(1, 205, 3), 3, 1e-2, 20, 100)
    assert stats.sweeps[:2] == [20, 20] and stats.sweeps[2] <= 5 and stats.converged == [False, False, True]
    assert 15 < stats.passes < 20 and contexts.isfinite().all()
    assert prefill(lambda c, e: (c + float("nan"), e), torch.ones(1, 4, 1), 1, 1.0, 2)[2].converged == [False]


def test_prefill_sees_as_many_tokens_at_a_time_as_a_piece_has():
    """What a sweep holds does not grow with the sequence, no gradient is kept, there may be no streams."""
    seen = []

    def step(context, token):
        seen.append(len(token))
        return 0.5 * context + token, None

    contexts, streams, _ = prefill(step, random_tokens(2, 1000, 2).requires_grad_(), 2, 1e-3, 50, 64)
    assert max(seen) == 2 * 64 and streams is None and not contexts.requires_grad

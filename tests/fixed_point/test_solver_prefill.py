"""Long sequences, piece by piece: the trajectory within a tolerance, without evaluating what stands still."""

import pytest
import torch
from maps import chaotic, delay_line, leaky, memoryless, network, random_tokens, swept

from newllm.fixed_point.solver import prefill, sequential, sweep

B, T, C, E = 3, 7, 6, 5


def relative(difference, values):
    """Largest over tokens."""
    return (difference.norm(dim=-1) / values.norm(dim=-1)).max().item()


@pytest.mark.parametrize("piece", [1, 20, 64, 1000])
def test_prefill_comes_within_the_tolerance_whatever_the_pieces(piece):
    """Every token's context obeys the recurrence to within the tolerance, and a contraction by 0.5 errs by
    twice that."""
    step, tokens, tolerance = leaky(0.5), random_tokens(2, 150, 30), 1e-3
    contexts, streams, stats = prefill(step, tokens, 30, tolerance, 40, piece)
    reference, _ = sequential(step, tokens, 30)
    assert relative(sweep(step, contexts, tokens)[0] - contexts, contexts) <= tolerance * 1.01
    assert relative(contexts - reference, reference) < 2 * tolerance * 1.5
    assert all(stats.converged) and len(stats.sweeps) == -(-150 // piece) and torch.equal(streams, tokens)


@pytest.mark.parametrize("piece", [1, 3, T, 100])
def test_prefill_to_the_end_is_exact(piece):
    """A piece of n tokens ends within n sweeps, of a chaotic map too, with the contexts and streams of the
    loop."""
    tokens = random_tokens(B, T, C)
    for step in (chaotic, network(C, C)):
        contexts, streams, stats = prefill(step, tokens, C, 0.0, T + 5, piece)
        for got, expected in zip((contexts, streams), sequential(step, tokens, C), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        assert all(stats.converged) and max(stats.sweeps) <= min(piece, T)


def test_prefill_makes_the_sweeps_of_solve():
    """Few sweeps, no tolerance: the contexts of as many cold sweeps over the whole, from a guess as well as
    from zero."""
    step, tokens = network(C, E), random_tokens(B, 30, E)
    contexts, streams, stats = prefill(step, tokens, C, 0.0, 4)
    for got, expected in zip((contexts, streams), swept(step, tokens, C, 4), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert stats.sweeps == [4] and stats.converged == [False]
    guess = swept(step, tokens, C, 3)[0]
    original = guess.clone()
    torch.testing.assert_close(
        prefill(step, tokens, C, 0.0, 1, guess_BTC=guess)[0], contexts, rtol=0, atol=1e-12
    )
    assert torch.equal(guess, original)


def test_prefill_evaluates_a_token_again_only_if_the_context_before_it_moved():
    """In c_t = e_t the second sweep finds nothing new; in a delay line of three tokens the fourth does."""
    tokens = random_tokens(2, 40, 3)
    _, _, stats = prefill(memoryless, tokens, 3, 1e-9, 40, 10)
    assert stats.sweeps == [2, 2, 2, 2] and stats.evaluations == 2 * (
        40 + 36
    )  # the first of a piece is right at once
    narrow = random_tokens(1, 40, 1)
    _, _, stats = prefill(delay_line, narrow, 3, 1e-9, 40)
    assert stats.sweeps == [4] and stats.evaluations == 40 + 39 + 38 + 37
    still = prefill(leaky(0.9), tokens, 3, 1e-9, 40, guess_BTC=sequential(leaky(0.9), tokens, 3)[0])[2]
    assert still.sweeps == [1] and still.passes == 1


def test_prefill_goes_on_from_a_given_context():
    """The rest of a sequence, started from the last context before it, is the rest of the trajectory."""
    step, tokens = network(C, E), random_tokens(B, T, E)
    whole, _ = sequential(step, tokens, C)
    rest, _, _ = prefill(step, tokens[:, 3:], C, 0.0, T, 2, start_BC=whole[:, 2])
    torch.testing.assert_close(rest, whole[:, 3:], rtol=0, atol=1e-12)


def test_no_sequence_of_a_prefill_knows_another():
    """One that is done costs nothing while another goes on: beside zeros, whose contexts are zero, work is
    that of one."""
    one = random_tokens(1, 50, 3)
    contexts, _, stats = prefill(leaky(0.9), torch.cat([torch.zeros_like(one), one]), 3, 1e-6, 60)
    alone, _, alone_stats = prefill(leaky(0.9), one, 3, 1e-6, 60)
    torch.testing.assert_close(contexts[1:], alone, rtol=0, atol=1e-12)
    assert stats.evaluations == alone_stats.evaluations + 50 and not contexts[0].any()


def test_what_does_not_converge_ends_and_is_said():
    """Every piece of a chaotic map gets its sweeps and no more; a change that is not a number is within no
    tolerance."""
    contexts, _, stats = prefill(chaotic, random_tokens(1, 205, 3), 3, 1e-2, 20, 100)
    assert stats.sweeps[:2] == [20, 20] and stats.sweeps[2] <= 5 and stats.converged == [False, False, True]
    assert 15 < stats.passes < 20 and contexts.isfinite().all()
    assert prefill(lambda c, e: (c + float("nan"), e), torch.ones(1, 4, 1), 1, 1.0, 2)[2].converged == [False]


def test_prefill_sees_as_many_tokens_at_a_time_as_a_piece_has():
    """What a sweep holds does not grow with the sequence, no gradient is kept, and there may be no
    streams."""
    seen = []

    def step(context, token):
        seen.append(len(token))
        return 0.5 * context + token, None

    contexts, streams, _ = prefill(step, random_tokens(2, 1000, 2).requires_grad_(), 2, 1e-3, 50, 64)
    assert max(seen) == 2 * 64 and streams is None and not contexts.requires_grad

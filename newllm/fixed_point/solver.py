"""The trajectory of a recurrence, step by step and by parallel sweeps. Knows a callable, not a model.

`step(context [..., C], token [..., E]) -> (context [..., C], stream [..., E])` is one step of F. A step that
makes no streams gives None in their place, and so do the functions here.
Shapes: B sequences, T tokens, C context width, E embedding width.

A sweep is Jacobi iteration over time (Song et al. 2021, arXiv 2002.03629): sweep k is exact for the first k
tokens, and from a cold start, K = 0, it makes every context a function of the last k tokens alone.
"""

import math
from dataclasses import dataclass

import torch

SHORTEST_TRIAL = 128  # tokens: fewer do not keep a device busy
TRIAL = 4  # one token in so many of a text is swept on trial ...
LOOK = 4  # ... and after so many sweeps how far they came counts, in place of the exponent
MARGIN = 1.25  # by which sweeps must be ahead: their last few tokens take longer than the rest


def sequential(step, tokens_BTE, context_dim, start_BC=None):
    """The reference: T dependent steps, from c_0 = 0 unless a start is given.

    Returns:
        (contexts [B, T, C], streams [B, T, E]).
    """
    context = tokens_BTE.new_zeros(len(tokens_BTE), context_dim) if start_BC is None else start_BC
    contexts, streams = [], []
    for token_BE in tokens_BTE.unbind(1):
        context, stream = step(context, token_BE)
        contexts.append(context)
        streams.append(stream)
    return torch.stack(contexts, 1), None if stream is None else torch.stack(streams, 1)


def sweep(step, contexts_BTC, tokens_BTE):
    """G(K)_t = F(K_{t-1}, e_t) for all tokens at once, with K_0 = 0.

    Returns:
        (G(K) [B, T, C], streams [B, T, E]).
    """
    before = torch.cat([torch.zeros_like(contexts_BTC[:, :1]), contexts_BTC[:, :-1]], dim=1)
    return step(before, tokens_BTE)


def truncated(step, tokens_BTE, trajectory_BTC, sweeps, context_step):
    """The trajectory, exact in value, with gradient through the last `sweeps` steps of time.

    Sweeping on from the trajectory changes nothing, but each sweep's gradient reaches one token further back,
    and all tokens' matrix products are one product (phantom gradient, arXiv 2111.05177, in time).

    Args:
        context_step: the step without streams, which only the last sweep needs.

    Returns:
        (contexts [B, T, C], streams [B, T, E]).
    """
    contexts = trajectory_BTC
    for _ in range(sweeps - 1):
        contexts, _ = sweep(context_step, contexts, tokens_BTE)
    return sweep(step, contexts, tokens_BTE)


@dataclass
class PrefillStats:
    """What a prefill did."""

    passes: float  # evaluations of F for an average token: the work, where the loop's is 1
    sweeps: list  # of each piece
    converged: list  # whether each piece did


@torch.no_grad()
def prefill(
    step, tokens_BTE, context_dim, tolerance, max_sweeps, piece=4096, start_BC=None, guess_BTC=None,
    give_up=lambda *progress: False,
):  # fmt: skip
    """The trajectory of long sequences by parallel sweeps instead of T dependent steps, without gradient.

    A sweep evaluates only the tokens before which the context has moved in the last one, and a context moves
    only by more than the tolerance. So each token costs as many evaluations as it needs, and where sweeps end
    by themselves every context obeys |F(c_{t-1}, e_t) - c_t| <= tolerance * |F(c_{t-1}, e_t)|; if F shrinks
    differences by a factor g < 1, no context is further from the trajectory's than about tolerance / (1 - g).
    They do end: a sequence of n tokens is exact after n sweeps, whatever the map. Stopped before that by
    max_sweeps or give_up it is reported as not converged, not raised.

    A long sequence goes piece by piece, each from the last context of the one before (block Gauss-Seidel):
    what a sweep holds does not grow with T, and the cuts change contexts only within the tolerance.

    Args:
        tolerance: relative change of one token's context. max_sweeps: of a piece, at most.
        piece: tokens swept at once: enough to keep the device busy, few enough for memory.
        start_BC: context before the first token, default 0. guess_BTC: to sweep from, default 0 (cold).
        give_up: function that says after each sweep whether to stop, by its number, the evaluations so far
            of the piece, and how much its contexts have changed, relative to their norm.

    Returns:
        (contexts [B, T, C], streams [B, T, E], PrefillStats).
    """
    batch, length, _ = tokens_BTE.shape
    contexts = tokens_BTE.new_zeros(batch, length + 1, context_dim)  # [:, t] is what token t starts from
    if start_BC is not None:
        contexts[:, 0] = start_BC
    if guess_BTC is not None:
        contexts[:, 1:] = guess_BTC
    streams = None  # allocated when the first ones tell their width
    evaluations, sweeps_of_pieces, converged = 0, [], []
    for first in range(0, length, piece):
        last, sweeps, before = min(first + piece, length), 0, evaluations
        # Pairs (b, t) to evaluate: at first all tokens of the piece, then those whose start has moved.
        b, t = tokens_BTE.new_ones(batch, last - first).nonzero().T
        t = t + first
        while len(t) and sweeps < max_sweeps:
            old = contexts[b, t + 1]
            new, stream = step(contexts[b, t], tokens_BTE[b, t])
            new = new.to(contexts.dtype)  # autocast gives types by its own rules on each device
            if stream is not None:
                streams = stream.new_empty(batch, length, stream.shape[-1]) if streams is None else streams
                streams[b, t] = stream.to(streams.dtype)
            evaluations += len(t)
            sweeps += 1
            change, size = (new - old).norm(dim=-1), new.norm(dim=-1)
            moved = ~(change <= tolerance * size)  # NaN counts as moved
            # What moved less is not written, so that the tokens after it stand as they are.
            b, t = b[moved], t[moved] + 1
            contexts[b, t] = new[moved]
            b, t = b[t < last], t[t < last]
            if len(t) and give_up(sweeps, evaluations - before, (change.norm() / size.norm()).item()):
                break
        sweeps_of_pieces.append(sweeps)
        converged.append(not len(t))
    stats = PrefillStats(evaluations / (batch * length), sweeps_of_pieces, converged)
    return contexts[:, 1:], streams, stats


@dataclass
class Choice:
    """How a text was read: by sweeps from beginning to end, or by the loop; and why."""

    by_sweeps: bool
    why: str


def read_text(length, loop, sweeps, exponent, tolerance, max_sweeps, loop_seconds, clock, piece=4096):
    """Read a text by sweeps where they are faster, else by the loop.

    By the loop at once where the exponent says that sweeps would not converge. Else sweeps begin with a piece
    on trial. They stop, and the loop reads on, as soon as the time of an evaluation, times the sweeps that
    the exponent asks for, or those that the first few have shown to be needed, is not below the loop's for a
    token. So a trial that is lost costs a few sweeps over a part of the text.

    Args:
        length: tokens. piece: tokens that are swept at once, at most.
        loop: function (first, last) that reads these tokens, after those before them.
        sweeps: function (first, last, give_up) that does so too, and returns whether they converged; give_up
            as of prefill.
        exponent: the map's Lyapunov exponent, nats a token. tolerance: as of prefill.
        max_sweeps: expected ones, beyond which none is tried.
        loop_seconds: that the loop takes for a token. clock: function that gives seconds.

    Returns:
        Choice.
    """
    expected = sweeps_expected(exponent, tolerance)
    known = f"Lyapunov exponent {exponent:+.3f}, so {expected:.0f} sweeps to {tolerance:g}"
    if expected > max_sweeps or length < 2 * SHORTEST_TRIAL:
        loop(0, length)
        if exponent >= 0:
            known = f"Lyapunov exponent {exponent:+.3f}: sweeps do not converge"
        return Choice(False, known if expected > max_sweeps else f"{length:,} tokens are too few to try")
    done, begun = 0, clock()
    size = min(piece, max(SHORTEST_TRIAL, length // TRIAL))
    while done < length:
        last, before = min(done + size, length), clock()

        def give_up(count, evaluations, change, tokens=last - done, before=before):
            needed, spent = expected, clock() - before
            if count >= LOOK and evaluations == count * tokens:  # else some are there already
                needed = count * sweeps_expected(math.log(change), tolerance) if change > 0 else 0
            return MARGIN * needed * spent / evaluations > loop_seconds or spent > loop_seconds * tokens

        if not sweeps(done, last, give_up):
            loop(done, length)
            return Choice(False, f"{known}; sweeps of {last - done:,} tokens are slower")
        done, size = last, piece
    times = loop_seconds * length / max(clock() - begun, 1e-9)
    return Choice(True, f"{known}; {times:.1f} times as fast")


def sweeps_expected(exponent, tolerance):
    """Cold sweeps until the error is below a relative tolerance, as a map's exponent alone has it."""
    return math.log(tolerance) / exponent if exponent < 0 else math.inf

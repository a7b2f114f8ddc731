"""Which way a text is read: sweeps where they win, and never more than a few per cent behind the loop."""

import pytest

from newllm.fixed_point.solver import read_text, sweeps_expected


class Reader:
    """A network on a clock of its own: the loop takes a second a token, a sweep what it is given.

    Args:
        ratio: tokens of a sweep in the time of one of the loop. needed: sweeps to the tolerance.
        bad_from: token from which on no sweep comes nearer.
    """

    def __init__(self, ratio, needed, bad_from=10**9):
        self.ratio, self.needed, self.bad_from = ratio, needed, bad_from
        self.now, self.done, self.pieces = 0.0, 0, []

    def loop(self, first, last):
        assert first == self.done, "tokens are read once, in their order"
        self.now, self.done = self.now + last - first, last

    def sweeps(self, first, last, give_up):
        assert first == self.done
        tokens = last - first
        self.pieces.append(tokens)
        needed = self.needed if last <= self.bad_from else 10**6
        for count in range(1, needed + 1):
            self.now += tokens / self.ratio
            change = 0.01 ** (count / needed) if last <= self.bad_from else 1.1
            if count < needed and give_up(count, count * tokens, change):
                return False
        self.done = last
        return True

    def read(self, length, exponent=-0.2, tolerance=0.01):
        limits = 256, 1.0, lambda: self.now
        choice = read_text(length, self.loop, self.sweeps, exponent, tolerance, *limits, 4096)
        assert self.done == length
        return choice


@pytest.mark.parametrize("length", [300, 1000, 10_000, 100_000])
@pytest.mark.parametrize("needed", [3, 20, 30, 60, 10**5])
@pytest.mark.parametrize("bad_from", [10**9, 0, 5000])
@pytest.mark.parametrize("ratio", [20, 45, 1000])
def test_a_reading_is_never_more_than_five_per_cent_slower_than_the_loop(length, needed, bad_from, ratio):
    """Whether sweeps need as many as the exponent says (23), fewer or far more, or turn bad in the middle."""
    reader = Reader(ratio, needed, bad_from)
    choice = reader.read(length)
    assert reader.now <= 1.05 * length
    if choice.by_sweeps:
        assert reader.now == pytest.approx(length * needed / ratio)
        assert choice.why.endswith(f"; {length / reader.now:.1f} times as fast")
    else:
        assert choice.why.endswith("tokens are slower") or length < 256


@pytest.mark.parametrize(("ratio", "wins"), [(200, True), (45, True), (25, False), (2, False)])
def test_sweeps_read_where_they_are_faster(ratio, wins):
    """By a margin, and after a piece on trial; where they are not, they cost one sweep over it."""
    reader = Reader(ratio, 23)
    assert reader.read(10_000).by_sweeps is wins
    assert reader.pieces == ([2500, 4096, 3404] if wins else [2500])
    assert reader.now == pytest.approx(10_000 * 23 / ratio if wins else 10_000 + 2500 / ratio)


def test_without_hope_nothing_is_tried():
    """A map that does not contract, or too slowly for the tolerance, and a text of a few tokens."""
    for exponent, tolerance, length, why in (
        (0.01, 0.01, 10_000, "Lyapunov exponent +0.010: sweeps do not converge"),
        (-0.01, 0.01, 10_000, "Lyapunov exponent -0.010, so 461 sweeps to 0.01"),
        (-0.2, 0.01, 255, "255 tokens are too few to try"),
    ):
        reader = Reader(60, 3)
        choice = reader.read(length, exponent, tolerance)
        assert not choice.by_sweeps and choice.why == why
        assert reader.now == length and not reader.pieces


def test_sweeps_are_expected_by_the_exponent():
    """An error falls by its exponential a sweep, from 1."""
    assert sweeps_expected(-0.5, 0.01) == pytest.approx(9.21, abs=0.01)
    assert sweeps_expected(0.0, 0.01) == sweeps_expected(0.3, 0.01) == float("inf")

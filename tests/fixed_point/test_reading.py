"""Which way a text is read: sweeps where they win, and never more than a few per cent behind the loop."""

import pytest

from newllm.fixed_point.solver import read_text, sweeps_expected


class Reader:
    """A network on a clock of its own: the loop takes a second a token, a sweep what it is given.

    Args:
        sweep_seconds: of a token in a sweep. needed: sweeps that a piece takes. bad_from: token from which on
            pieces never converge.
    """

    def __init__(self, sweep_seconds, needed, bad_from=10**9):
        self.sweep_seconds, self.needed, self.bad_from = sweep_seconds, needed, bad_from
        self.now, self.done, self.pieces = 0.0, 0, []

    def loop(self, first, last):
        assert first == self.done, "tokens are read once, in their order"
        self.now, self.done = self.now + last - first, last

    def sweeps(self, first, last, give_up):
        assert first == self.done
        self.pieces.append(last - first)
        for _ in range(self.needed if last <= self.bad_from else 10**6):
            if give_up():
                return False
            self.now += self.sweep_seconds * (last - first)
        self.done = last
        return True

    def read(self, length, exponent=-0.2, tolerance=0.01):
        choice = read_text(
            length, self.loop, self.sweeps, exponent, tolerance, 64, 1.0, lambda: self.now, piece=4096
        )
        assert self.done == length
        return choice


@pytest.mark.parametrize("length", [300, 1000, 10_000, 100_000])
@pytest.mark.parametrize("needed", [3, 30, 70, 10**5])
@pytest.mark.parametrize("bad_from", [10**9, 0, 5000])
def test_a_reading_is_never_more_than_five_per_cent_slower_than_the_loop(length, needed, bad_from):
    """Whether sweeps win ten times or by a hair, never end, or turn bad in the middle of a text."""
    reader = Reader(1 / 60, needed, bad_from)
    choice = reader.read(length)
    assert reader.now <= 1.05 * length
    if choice.by_sweeps:
        assert "on trial came" in choice.why and reader.now < length
        assert reader.now == pytest.approx(length * needed / 60)
    else:
        assert "took too long" in choice.why


@pytest.mark.parametrize(("needed", "wins"), [(6, True), (13, True), (29, True), (66, False)])
def test_sweeps_read_where_they_are_faster(needed, wins):
    """Ten, five and two times; pieces grow from the trial on, at most twofold, up to the largest."""
    reader = Reader(1 / 60, needed)
    assert reader.read(100_000).by_sweeps is wins
    if wins:
        assert reader.pieces[0] == 4000 and max(reader.pieces) == 4096
    else:
        assert reader.pieces == [4000]
    short = Reader(1 / 60, 6)
    assert short.read(10_000).by_sweeps and short.pieces == [400, 800, 1600, 3200, 4000]


def test_without_hope_nothing_is_tried():
    """A map that does not contract, or too slowly for the tolerance, and a text of a few tokens."""
    for exponent, tolerance, length, why in (
        (0.01, 0.01, 10_000, "Lyapunov exponent +0.010: sweeps do not converge"),
        (-0.05, 0.01, 10_000, "Lyapunov exponent -0.050, so 92 sweeps to 0.01"),
        (-0.2, 0.01, 255, "255 tokens are too few to try"),
    ):
        reader = Reader(1 / 60, 3)
        choice = reader.read(length, exponent, tolerance)
        assert not choice.by_sweeps and choice.why == why
        assert reader.now == length and not reader.pieces


def test_sweeps_are_expected_by_the_exponent():
    """An error falls by its exponential a sweep, from 1."""
    assert sweeps_expected(-0.5, 0.01) == pytest.approx(9.21, abs=0.01)
    assert sweeps_expected(0.0, 0.01) == sweeps_expected(0.3, 0.01) == float("inf")

"""Pictures hold what they are given; the fit beside them is the line that the points lie on."""

import math
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import pytest
from helpers import ROOT
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from newllm.report import pictures
from newllm.report.compare import crossing, growth, scale_lines
from newllm.report.pictures import (
    COUNTED,
    REFERENCE,
    TRAINED,
    TRAINING_DATA,
    UNTRAINED,
    prefill_speed,
    scale_ladder,
)
from scripts import report


def ladder(*thousands):
    """Invented summaries: 20 s and 8 s per 1,000 tokens, 900 MB and 2 MB per 1,000 tokens."""
    return [
        dict(
            train_tokens=1000 * k, seconds=20 + 8 * k, peak_memory_mb=900 + 2 * k, er_train=0.9, er_val=0.85,
            val_ppl=4000 / k, val_ppl_kn=1200 / k**0.5, val_ppl_retrieval=300 / k**0.5,
            val_ppl_retrieval_counting=600 / k**0.5, tok_per_s_phase1=900.0, tok_per_s_phase2=200.0,
            seconds_retrieval=2.0 * k,
        )
        for k in thousands
    ]  # fmt: skip


def drawn(path, rows, columns):
    """A function of a style that says whether its colour is in the picture, which has so many panels."""
    image = imread(path)
    width, height = pictures.PANEL
    assert image.shape[:2] == pytest.approx((rows * height * pictures.DPI, columns * width * pictures.DPI))
    return lambda style: (abs(image[..., :3] - to_rgb(style["color"])).max(-1) < 0.01).sum() > 100


@pytest.mark.filterwarnings("error:Data has no positive values")
@pytest.mark.parametrize("heights", [[0, 0], [0, 1], [1, 10]])
def test_a_logarithmic_axis_takes_what_is_zero(heights, tmp_path):
    """As a network that remembers nothing has it; matplotlib would warn where nothing is above zero."""
    with pictures.figure(tmp_path / "zero.png", 1, 1) as [[panel]]:
        pictures.draw(panel, "memory", "tokens", "capacity", [([1, 2], heights, "it", TRAINED)], log="xy")
        assert panel.get_yscale() == ("log" if any(heights) else "linear")


def test_a_fit_recovers_the_line_and_says_how_much_it_explains():
    """Points on y = 3 - 2x; +1, -1, -1, +1 around it, which no line explains: 4 of 4 + 4 * 5; a flat line."""
    for added, r_squared in (((0, 0, 0, 0), 1), ((1, -1, -1, 1), 1 - 4 / 24)):
        points = [{"train_tokens": 1000 * x, "y": 3 - 2 * x + added[x]} for x in range(4)]
        assert growth(points, "y", "s") == f"3.0 s - 2 s per 1,000 tokens, R^2 {r_squared:.4f}"
    assert growth(ladder(1, 2, 3), "er_train", "").startswith("0.9  + 0 ")
    assert scale_lines(ladder(10, 30, 100)) == [
        "time = 20.0 s + 8 s per 1,000 tokens, R^2 1.0000",
        "peak memory = 900.0 MB + 2 MB per 1,000 tokens, R^2 1.0000",
        "the network alone is below counting (Kneser-Ney) from about 11,111 tokens on",
    ]


@pytest.mark.parametrize(
    "ours, theirs, tokens",
    [
        ((400, 100), (200, 200), 2000),  # half-way, on logarithmic axes
        ((100, 400, 100), (200, 200, 200), 8000),  # below, above, and below for good
        ((100, 100), (200, 200), 1000),
        ((100, 300), (200, 200), None),
        ((400, math.inf, 100), (200, 200, 200), 4000),
        ((None, None), (200, 200), None),
    ],
)
def test_two_curves_cross_where_one_stays_below_the_other(ours, theirs, tokens):
    """At budgets of 1, 4 and 16 thousand; never, from the first on, and with a figure that is none."""
    pairs = zip((1000, 4000, 16000), ours, theirs, strict=False)
    summaries = [dict(train_tokens=size, val_ppl=a, val_ppl_kn=b) for size, a, b in pairs]
    found = crossing(summaries)
    assert found is tokens is None or found == pytest.approx(tokens)


@pytest.mark.parametrize("thousands", [(6.4, 10, 25, 50, 100), (50, 100), (6.4, 1000)], ids=str)
def test_the_picture_of_a_ladder_has_every_line(tmp_path, thousands):
    """In a folder made for it, over small and large ranges; a figure that is not finite leaves a gap."""
    path, before = tmp_path / "outputs" / "plots" / "scale_ladder_r.png", dict(matplotlib.rcParams)
    summaries = ladder(*thousands)
    if len(summaries) > 2:
        summaries[1]["val_ppl"] = float("inf")
        summaries[2]["val_ppl_kn"] = float("nan")
    scale_ladder(summaries, path)
    assert all(map(drawn(path, 1, 3), (TRAINED, TRAINING_DATA, UNTRAINED, COUNTED, REFERENCE)))
    for summary in summaries:  # as of a baseline that looks nothing up
        del summary["seconds_retrieval"], summary["val_ppl_retrieval"]
        summary["tok_per_s_phase1"] = 0.0  # no Phase 1 has no speed
    scale_ladder(summaries, path)
    assert dict(matplotlib.rcParams) == before  # a notebook's own figures look as before


@pytest.mark.parametrize("experts", [("ngram", "cache", "knn"), ("cache",)], ids=str)
def test_the_picture_of_retrieval_has_a_line_for_each_expert_that_there_is(tmp_path, experts):
    """And for the same without a network; as a record gives curves back, whose positions are text."""
    losses = dict(network=6.0, ngram=5.0, cache=4.0, knn=3.0, counting=3.5)
    curves = {
        name: {str(end): loss + 1 / end for end in (1, 2, 4, 128)}
        for name, loss in losses.items()
        if name in (*experts, "network", "counting")
    }
    record = SimpleNamespace(curves=dict(retrieval_by_position=curves))
    pictures.by_position(record, tmp_path / "plots" / "retrieval.png")
    there = drawn(tmp_path / "plots" / "retrieval.png", 1, 2)
    styles = dict(network=REFERENCE, ngram=UNTRAINED, cache=TRAINING_DATA, knn=TRAINED, counting=COUNTED)
    assert {name for name, style in styles.items() if there(style)} == set(curves)


def test_the_picture_of_exponents_has_a_point_for_each_network_that_was_measured(tmp_path):
    """Untrained, after Phase 1 if it trained, after training through time; rows of before it give none."""

    def row(steps, **measured):
        figures = {"phase1_steps": steps}
        for end, (exponent, sweeps) in measured.items():
            figures |= {f"lyapunov_exponent{end}": exponent, f"sweeps_to_1_percent{end}": sweeps}
        return figures

    path = tmp_path / "plots" / "exponents.png"
    assert pictures.predictability([{"phase1_steps": 3}], path) == 0 and not path.exists()
    end_to_end = row(0, _untrained=(0.01, None), **{"": (0.01, None)}, _finetuned=(-0.13, 37))
    frozen = row(9, _untrained=(0.01, None), **{"": (-0.9, 6)})
    assert pictures.predictability([end_to_end, frozen, {"phase1_steps": 3}], path) == 4
    assert pictures.predictability([end_to_end, frozen] * 21, path) == 84  # as many as a table has
    there = drawn(path, 1, 1)
    assert [there(style) for style in (UNTRAINED, TRAINED, COUNTED)] == [True] * 3
    assert not there(TRAINING_DATA)


def test_a_panel_of_nothing_says_so(tmp_path):
    """Not an empty one whose axes look like figures; one with lines says nothing."""
    with pictures.figure(tmp_path / "panels.png", 1, 2) as ((empty, full),):
        pictures.draw(empty, "title", "x", "y", [], "xy")
        pictures.draw(full, "title", "x", "y", [(None, [1.0, 2.0], "line", TRAINED)], "y")
    assert [text.get_text() for text in empty.texts] == ["not measured"] and not full.texts
    assert not len(empty.get_xticks()) and len(full.get_xticks())


@pytest.mark.parametrize("trained", [True, False])
def test_the_picture_of_a_prefill_shows_both_networks(tmp_path, trained):
    """Curves of both, speeds where sweeps converged; drawn too without any that converged."""
    curves = {"untrained": [1.0, 0.98, 0.97]} | ({"trained": [0.5, 0.1, 0.0]} if trained else {})
    rows = [
        dict(weights=name, tokens=tokens, tolerance=tolerance, by_sweeps=name == "trained", speed_up=5.0)
        for name in curves
        for tokens in (1000, 10000)
        for tolerance in (1e-2, 1e-4)
    ]
    prefill_speed(rows, curves, {name: -0.1 for name in curves}, tmp_path / "prefill.png")
    there = drawn(tmp_path / "prefill.png", 1, 2)
    assert [there(style) for style in (UNTRAINED, TRAINED, TRAINING_DATA)] == [True, trained, trained]


def test_the_drawings_of_the_documents_are_those_of_the_command(tmp_path):
    """Drawn again they show the same."""
    report.main(["--draw_docs", str(tmp_path)])
    for name in ("idea.png", "architecture.png"):
        assert abs(imread(tmp_path / name) - imread(ROOT / "docs" / name)).mean() < 0.01


def test_a_command_without_plots_does_not_load_matplotlib():
    """Nor what pages are made with: their import takes longer than a small run's first steps."""
    code = "import sys, test; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

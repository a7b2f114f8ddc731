"""Pictures hold what they are given; the fit beside them is the line that the points lie on."""

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from newllm.report.compare import linear_fit, scale_lines
from newllm.report.plots import prefill_speed, scale_ladder
from newllm.report.style import COUNTED, DPI, PANEL, TRAINED, TRAINING_DATA, UNTRAINED
from scripts import draw_docs

ROOT = Path(__file__).parents[2]


def ladder(*thousands):
    """Invented summaries: 20 s and 8 s per 1,000 tokens, 900 MB and 2 MB per 1,000 tokens."""
    return [
        dict(
            train_tokens=1000 * k, seconds=20 + 8 * k, peak_memory_mb=900 + 2 * k, er_train=0.9, er_val=0.85,
            er_val_untrained=0.75, er_ceiling=0.96, val_ppl=400 - k, val_ppl_untrained_context=450 - k, val_ppl_bigram=380 - k,
        )
        for k in thousands
    ]  # fmt: skip


def test_a_fit_recovers_the_line_and_says_how_much_it_explains():
    """Points on y = 3 - 2x; then +1, -1, -1, +1 around it, which no line explains: 4 of a variance of 4 + 4 * 5."""
    xs = (0, 1, 2, 3)
    fit = linear_fit(xs, [3 - 2 * x for x in xs])
    assert (fit.intercept, fit.slope, fit.r_squared) == pytest.approx((3, -2, 1)) and fit(
        10
    ) == pytest.approx(-17)
    fit = linear_fit(xs, [3 - 2 * x + off for x, off in zip(xs, (1, -1, -1, 1), strict=True)])
    assert (fit.intercept, fit.slope, fit.r_squared) == pytest.approx((3, -2, 1 - 4 / 24))
    assert fit.text("s") == "3.0 s - 2 s per 1,000 tokens"


def test_points_that_do_not_grow_are_a_line_too():
    """Memory that stays the same has no variance to explain."""
    fit = linear_fit((1, 2, 3), (7.0, 7.0, 7.0))
    assert (fit.intercept, fit.slope, fit.r_squared) == (7.0, 0.0, 1.0)


def test_the_lines_say_how_time_and_memory_grow():
    """Intercept, slope, R^2 and the factors between the ends."""
    assert scale_lines(ladder(10, 30, 100)) == [
        "time = 20.0 s + 8 s per 1,000 tokens, R^2 1.0000",
        "peak memory = 900.0 MB + 2 MB per 1,000 tokens, R^2 1.0000",
        "from the smallest budget to the largest: tokens x10.0, time x8.2, peak memory x1.20",
    ]


@pytest.mark.parametrize(
    "thousands", [(6.4, 10, 25, 50, 100), (25, 250, 500), (50, 100), (6.4, 1000)], ids=str
)
def test_the_picture_has_its_size_and_every_line(tmp_path, thousands):
    """It opens, in a folder made for it, and the colour of each kind of line is there, on linear and logarithmic axes."""
    path = tmp_path / "outputs" / "plots" / "scale_ladder_r.png"
    scale_ladder(ladder(*thousands), path)
    image = imread(path)
    assert image.shape[:2] == (2 * PANEL[1] * DPI, 2 * PANEL[0] * DPI)
    for style in (TRAINED, TRAINING_DATA, UNTRAINED, COUNTED):
        assert (abs(image[..., :3] - to_rgb(style["color"])).max(-1) < 0.01).sum() > 100, style


def test_a_figure_that_is_not_finite_is_left_out(tmp_path):
    """A budget without a finite perplexity does not keep the rest from being drawn."""
    summaries = ladder(10, 20, 30)
    summaries[1]["val_ppl"] = float("inf")
    summaries[2]["val_ppl_bigram"] = float("nan")
    scale_ladder(summaries, tmp_path / "x.png")
    assert imread(tmp_path / "x.png").std() > 0.05


def test_nothing_of_the_style_leaks_into_other_figures(tmp_path):
    """A notebook's own figures look as before."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    scale_ladder(ladder(10, 20), tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before


def test_a_command_without_plots_does_not_load_matplotlib():
    """Its import takes longer than a small run's first steps."""
    code = "import sys, test; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def prefill_rows(weights, speed_up):
    """Two lengths at two tolerances."""
    return [
        dict(weights=weights, tokens=n, tolerance=t, speed_up=speed_up)
        for n in (1000, 10000)
        for t in (1e-2, 1e-4)
    ]


@pytest.mark.parametrize("trained", [True, False])
def test_the_picture_of_a_prefill_shows_both_networks(tmp_path, trained):
    """Curves of both, speeds where sweeps converged; without a trained network, or any that converged, it is drawn too."""
    rows, curves = prefill_rows("untrained", None), {"untrained": [1.0, 0.98, 0.97]}
    if trained:
        rows, curves = rows + prefill_rows("trained", 5.0), curves | {"trained": [0.5, 0.1, 0.0]}
    path = tmp_path / "outputs" / "prefill.png"
    prefill_speed(rows, curves, path)
    image = imread(path)
    assert image.shape[:2] == (PANEL[1] * DPI, 2 * PANEL[0] * DPI)
    for style, there in ((UNTRAINED, True), (TRAINED, trained), (TRAINING_DATA, trained)):
        assert ((abs(image[..., :3] - to_rgb(style["color"])).max(-1) < 0.01).sum() > 100) == there, style


def test_the_drawings_of_the_documents_are_those_of_the_command(tmp_path):
    """Drawn again they show the same."""
    draw_docs.main(["--folder", str(tmp_path)])
    for name in ("idea.png", "architecture.png"):
        assert abs(imread(tmp_path / name) - imread(ROOT / "docs" / name)).mean() < 0.01

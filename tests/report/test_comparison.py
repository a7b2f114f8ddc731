"""Rows that survive any end; intervals, differences and pictures of them."""

import math
import multiprocessing
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from made_rows import LENGTH, looked_up, row, rows
from matplotlib.image import imread

from newllm.errors import UserError
from newllm.report import compare
from newllm.report.compare import Comparison, append_row, mean_interval, paired_difference, read_results
from newllm.report.pictures import context_curves, perplexities
from newllm.report.series import make_series, read_series


def test_writers_side_by_side_leave_whole_rows(tmp_path):
    """Four of them, 200 rows; of a run made twice the last row counts."""
    path = tmp_path / "results.jsonl"
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(lambda seed: append_row(path, row("a", seed, 5.0)), range(200)))
    append_row(path, row("a", 7, 4.0))
    losses = [made["val_loss"] for made in read_results(path)]
    assert len(losses) == 200 and losses.count(4.0) == 1


@pytest.mark.parametrize("content", ['{"arm": "token"}\n', "3\n", "[]\n"])
def test_what_is_no_file_of_results_is_refused(tmp_path, content):
    """Rows of something else are a sentence."""
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"results\.jsonl cannot be read as results"):
        read_results(tmp_path / "results.jsonl")


def make_many(folder):
    """Thirty short runs, each of which says when it begins."""

    def work(name):
        with open(folder / "begun", "a") as begun:
            begun.write(name + " ")
        made = row("a", 0, 5.0) | {"run": name, "seconds": 1.0}
        append_row(folder / "rows.jsonl", made)
        return made

    runs = {f"run_{number}": {"size": 1, "folder": "."} for number in range(30)}
    make_series(folder, runs, work, {made["run"]: made for made in read_results(folder / "rows.jsonl")})


def test_killed_at_any_moment_no_run_is_lost_and_none_that_is_done_is_made_again(tmp_path):
    """SIGKILL twice: at most the run in hand is made twice, and the status finds valid JSON."""
    source, path = random.Random(0), tmp_path / "rows.jsonl"
    for kills in range(3):
        process = multiprocessing.get_context("fork").Process(target=make_many, args=(tmp_path,))
        process.start()
        enough = len(read_results(path)) + source.randrange(3, 9) if kills < 2 else 31
        while process.is_alive() and len(read_results(path)) < enough:
            read_series(tmp_path)
            time.sleep(source.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kills < 2 else 0)
        begun = (tmp_path / "begun").read_text().split()
        assert {made["run"] for made in read_results(path)} <= set(begun)
        assert len(begun) - len(set(begun)) <= kills
    assert len(read_results(path)) == 30


def test_the_interval_of_a_mean_is_students():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t(2) = 4.30."""
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=1e-2)
    assert mean_interval([7.0])[0] == 7 and math.isnan(mean_interval([7.0])[1])


def test_pairs_find_a_difference_that_means_would_not():
    """Samples vary by 1 nat a token, arms by 0.05: the interval of the pairs still excludes zero."""
    ours, theirs = (
        {made["seed"]: made["val_sample_nats"] for made in rows(arm)} for arm in (("a", 5.0), ("b", 5.05))
    )
    gap, low, high = paired_difference(ours, theirs, LENGTH)
    assert gap == pytest.approx(-0.05, abs=0.02) and low < gap < high < 0
    assert paired_difference(ours, ours, LENGTH) == (0, 0, 0)
    assert paired_difference(ours, {9: theirs[0]}, LENGTH) is None


def test_an_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    """No difference, 200 draws: it claims one in no more than 12 % of them."""
    monkeypatch.setattr(compare, "RESAMPLES", 400)
    wrong = 0
    for draw in range(200):
        source = np.random.default_rng(draw)
        ours, theirs = ({seed: source.normal(0, 1, 60) for seed in range(5)} for _ in range(2))
        _, low, high = paired_difference(ours, theirs, 1)
        wrong += not low < 0 < high
    assert wrong <= 24


def with_curves(arm, seed=0):
    """A row with curves as JSON gives them back: keys as text, sorted as text."""
    return row(
        arm, seed, 5.0, contexts="frozen", er_val=0.5, memory_horizon=4,
        cold_start_curve=[(1 + 2 * seed) * 0.5**k for k in range(1, 17)], past_capacity_by_lag=[0.3, 0.1],
        memory_curve={"0": 1.0, "1": 0.3, "16": 0.001, "2": 0.02},
        bpb_by_context={"1": 3.0, "10": 2.7, "2": 2.8}, spectrum={str(k): 0.1 / k for k in range(1, 30)},
    )  # fmt: skip


def test_points_and_curves_are_pictures(tmp_path):
    """Curves are means over seeds in the order of their points; arms without contexts have none."""
    arms = [with_curves(arm, seed) for arm in ("untrained_frozen", "phase1_frozen") for seed in range(2)]
    comparison = Comparison(arms + rows(("gru", 5.1)) + looked_up("gru", 90.0, tokens=500))
    assert comparison.curve(1000, "phase1_frozen", "cold_start_curve")[3.0] == pytest.approx(2 * 0.5**3)
    assert list(comparison.curve(1000, "phase1_frozen", "memory_curve")) == [0, 1, 2, 16]
    assert comparison.curve(1000, "gru", "cold_start_curve") is None
    perplexities(comparison, tmp_path / "points.png")
    context_curves(comparison, 1000, tmp_path / "plots" / "curves.png")
    assert imread(tmp_path / "points.png").shape[:2] == (540, 1500)
    assert imread(tmp_path / "plots" / "curves.png").shape[:2] == (1080, 2250)

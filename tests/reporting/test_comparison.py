"""Tables and verdicts from results that are known to be better, worse or the same."""

import csv
import json
import math

import numpy as np
import pytest

from newllm.errors import UserError
from newllm.reporting.comparison import Comparison, mean_interval, paired_difference, read_results, write_report
from newllm.reporting.plots import comparison_points

LENGTH = 10


def result(arm, seed, loss, tokens=1000, samples=40):
    """A run whose samples differ among each other far more than arms do, as dialogues do."""
    source = np.random.default_rng(0)
    dialogues = source.normal(0, 10, samples)
    nats = (loss * LENGTH + dialogues - dialogues.mean() + np.random.default_rng(seed).normal(0, 0.2, samples)).tolist()
    return dict(
        arm=arm, seed=seed, train_tokens=tokens, val_loss=loss, val_ppl=math.exp(loss), val_bpb=loss / 3, parameters=10,
        seconds_training=5.0 + seed, settings={"max_seq_length": LENGTH}, val_sample_nats=nats, val_ppl_unigram=600.0,
        val_ppl_bigram=200.0, val_ppl_kn=150.0,
    )  # fmt: skip


def results(*losses, seeds=3, **more):
    return [result(arm, seed, loss + 0.001 * seed, **more) for arm, loss in losses for seed in range(seeds)]


def test_the_interval_of_a_mean_is_students():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t(2) = 4.30."""
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=1e-2)
    assert mean_interval([7.0])[0] == 7 and math.isnan(mean_interval([7.0])[1])


def test_pairs_find_a_difference_that_means_would_not():
    """Samples vary by 1 nat a token, arms by 0.05: the interval of the paired difference still excludes zero."""
    ours, theirs = (
        {r["seed"]: r["val_sample_nats"] for r in results((arm, loss))} for arm, loss in (("a", 5.0), ("b", 5.05))
    )
    gap, low, high = paired_difference(ours, theirs, LENGTH)
    assert gap == pytest.approx(-0.05, abs=0.02) and low < gap < high < 0
    same, low, high = paired_difference(ours, ours, LENGTH)
    assert same == low == high == 0
    assert paired_difference(ours, {9: theirs[0]}, LENGTH) is None


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """No difference, 200 draws: it claims one in no more than 12 % of them."""
    wrong = 0
    for draw in range(200):
        source = np.random.default_rng(draw)
        ours, theirs = ({seed: source.normal(0, 1, 60) for seed in range(5)} for _ in range(2))
        _, low, high = paired_difference(ours, theirs, 1)
        wrong += not low < 0 < high
    assert wrong <= 24


def test_verdicts_say_what_the_numbers_say():
    """A clear win holds, a clear loss is refuted, the same is undecided; the rival is the best of the rivals."""
    found = list(
        Comparison(
            results(
                ("phase1_frozen", 5.0), ("untrained_frozen", 5.3), ("untrained_whitened", 5.2), ("window", 4.7),
                ("phase1_shuffled", 5.0), ("phase1_finetuned", 4.6),
            )
        ).verdicts()
    )  # fmt: skip
    assert len(found) == 3
    assert "untrained network: holds. phase1_frozen against untrained_whitened: perplexity -18" in found[0]
    assert "window of tokens: is refuted. phase1_frozen against window" in found[1]
    assert "order of tokens: is undecided" in found[2]


def test_the_table_is_sorted_and_complete(tmp_path):
    """Best first at each budget, counting rows at the end; the CSV has the same cells."""
    comparison = Comparison(
        results(("gru", 5.1), ("phase1_finetuned", 5.0)) + results(("gru", 6.0), tokens=500), "phase1_finetuned"
    )
    lines = write_report(comparison, tmp_path)
    assert (tmp_path / "comparison.md").read_text().splitlines() == lines
    with open(tmp_path / "comparison.csv") as file:
        rows = list(csv.reader(file))
    assert [row[:3] for row in rows[1:]] == [
        ["500", "gru", "3"], ["500", "(unigram)", ""], ["500", "(bigram)", ""], ["500", "(kn)", ""],
        ["1,000", "phase1_finetuned", "3"], ["1,000", "gru", "3"], ["1,000", "(unigram)", ""], ["1,000", "(bigram)", ""],
        ["1,000", "(kn)", ""],
    ]  # fmt: skip
    against = rows[6][8]
    assert against == "+10.5%" or against.startswith("+1")


def test_results_are_read_or_refused(tmp_path):
    """No file, a torn file: a sentence each."""
    with pytest.raises(UserError, match="there are no results"):
        read_results(tmp_path)
    (tmp_path / "gru-5-0.json").write_text(json.dumps(result("gru", 0, 5.0)))
    assert read_results(tmp_path)[0]["arm"] == "gru"
    (tmp_path / "gru-5-1.json").write_text("{")
    with pytest.raises(UserError, match=r"gru-5-1\.json cannot be read"):
        read_results(tmp_path)


def test_the_points_are_a_picture(tmp_path):
    """A PNG of two panels at 150 DPI."""
    from PIL import Image

    path = tmp_path / "plots" / "points.png"
    comparison_points(Comparison(results(("gru", 5.1), ("phase1_finetuned", 5.0))), 1000, path)
    with Image.open(path) as image:
        assert image.size == (1500, 540) and round(image.info["dpi"][0]) == 150

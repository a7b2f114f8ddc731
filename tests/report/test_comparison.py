"""Tables and verdicts from results that are known to be better, worse or the same."""

import csv
import json
import math

import numpy as np
import pytest

from newllm.errors import UserError
from newllm.report.comparison import Comparison, mean_interval, paired_difference, read_results, write_report
from newllm.report.pictures import TRAINED, UNTRAINED, comparison_points, context_curves

LENGTH = 10


def result(arm, seed, loss, tokens=1000, samples=40):
    """A run whose samples differ among each other far more than arms do, as dialogues do."""
    source = np.random.default_rng(0)
    dialogues = source.normal(0, 10, samples)
    nats = (
        loss * LENGTH + dialogues - dialogues.mean() + np.random.default_rng(seed).normal(0, 0.2, samples)
    ).tolist()
    return dict(
        arm=arm, seed=seed, changes={}, tokenizer="bpe", vocab_size=300, train_tokens=tokens, val_loss=loss, val_ppl=math.exp(loss), val_bpb=loss / 3, parameters=10,
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
        {r["seed"]: r["val_sample_nats"] for r in results((arm, loss))}
        for arm, loss in (("a", 5.0), ("b", 5.05))
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
        results(("gru", 5.1), ("phase1_finetuned", 5.0)) + results(("gru", 6.0), tokens=500),
        "phase1_finetuned",
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


def with_curves(found):
    """The result with curves as JSON gives them back, keys as text."""
    weight = float(found["arm"].partition("_w")[2] or 0.05)
    curves = {
        "cold_start_curve": [0.5**k for k in range(1, 17)], "memory_curve": {"0": 1.0, "1": 0.3, "2": 0.02, "4": 0.001},
        "past_capacity_by_lag": [0.3 / k for k in range(1, 41)], "spectrum": {str(k): 0.1 / k for k in range(1, 30)},
        "bpb_by_context": {"1": 3.0, "2": 2.8, "4": 2.7, "10": 2.7},
    }  # fmt: skip
    settings = found["settings"] | {"dist_reg_weight": weight, "phase1_shuffle": False}
    return (
        found | curves | dict(settings=settings, contexts="frozen", er_val=0.5 + weight / 2, memory_horizon=4)
    )


def test_another_vocabulary_is_not_paired():
    """Its nats are of other tokens: a row without a difference, no verdict; the counted rows are those of the reference."""
    runs = results(("phase1_finetuned", 5.0), ("gru", 4.0))
    for run in runs:
        if run["arm"] == "gru":
            run |= {"tokenizer": "gpt2", "val_ppl_kn": 1.0}
    comparison = Comparison(runs)
    rows = list(comparison.rows())
    assert rows[0][1] == "gru" and rows[0][-2:] == ("", "") and rows[-1][1:4] == ("(kn)", "", "150.0")
    assert not list(comparison.verdicts())


def test_a_run_that_was_disturbed_does_not_count_for_the_time():
    """The fastest seed does."""
    runs = results(("gru", 4.0))
    runs[1]["seconds_training"] = 1000.0
    assert next(Comparison(runs).rows())[7] == "5"


def test_contexts_are_those_that_the_arm_predicts_from():
    """Of frozen ones the measured, of trained ones those after training; an arm without any has no row."""
    measured = dict(er_val=0.5, cold_start_error_10=0.25, memory_horizon=4, peak_memory_mb=1000.0)
    trained = {f"{key}_finetuned": 2 * value for key, value in measured.items()}
    runs = results(("gru", 4.0), ("phase1_frozen", 5.0), ("end_to_end", 4.5), seeds=1)
    runs[1] |= measured | {"contexts": "frozen"}
    runs[2] |= measured | trained | {"contexts": "fine-tuned"}
    assert list(Comparison(runs).context_rows()) == [
        ("1,000", "end_to_end", "100.0%", "0.5", "8", "1,000"),
        ("1,000", "phase1_frozen", "50.0%", "0.25", "4", "1,000"),
    ]


def test_curves_are_means_over_seeds():
    """Point by point, lists counted from one; an arm without the curve has none."""
    runs = [with_curves(result("phase1_frozen", seed, 5.0)) for seed in range(2)]
    runs[1]["cold_start_curve"] = [3 * 0.5**k for k in range(1, 17)]
    comparison = Comparison([*runs, result("gru", 0, 5.1)])
    assert comparison.curve(1000, "phase1_frozen", "cold_start_curve")[3.0] == pytest.approx(2 * 0.5**3)
    assert comparison.curve(1000, "phase1_frozen", "memory_curve")[4.0] == pytest.approx(0.001)
    assert comparison.curve(1000, "gru", "cold_start_curve") is None


def test_the_curves_are_a_picture(tmp_path):
    """Six panels; arms with contexts are drawn in their colours, those without are left out."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    arms = ("untrained_frozen", "phase1_frozen", "phase1_w0", "phase1_w0.5", "phase1_w1")
    runs = [with_curves(result(arm, 0, 5.0)) for arm in arms] + [result("gru", 0, 5.1)]
    comparison, path = Comparison(runs), tmp_path / "plots" / "curves.png"
    assert [weight for weight, _ in sorted(comparison.by_setting(1000, "dist_reg_weight", "phase1_"))] == [
        0,
        0.05,
        0.5,
        1,
    ]
    context_curves(comparison, 1000, path)
    image = imread(path)[..., :3]
    assert image.shape[:2] == (1080, 2250)
    for style in (TRAINED, UNTRAINED):
        assert (abs(image - np.array(to_rgb(style["color"]))) < 0.02).all(-1).sum() > 200


def test_the_points_are_a_picture(tmp_path):
    """A PNG of two panels at 150 DPI."""
    from PIL import Image

    path = tmp_path / "plots" / "points.png"
    comparison_points(Comparison(results(("gru", 5.1), ("phase1_finetuned", 5.0))), 1000, path)
    with Image.open(path) as image:
        assert image.size == (1500, 540) and round(image.info["dpi"][0]) == 150

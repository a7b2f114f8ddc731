"""Rows that survive any end, tables and verdicts from rows that are known to be better, worse or the same."""

import json
import math
import multiprocessing
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib.image import imread

from newllm.errors import UserError
from newllm.report import compare
from newllm.report.compare import Comparison, append_row, mean_interval, paired_difference, read_results
from newllm.report.pictures import comparison_points, context_curves
from newllm.report.series import make_series, read_series

LENGTH, SAMPLES = 10, 40


def row(arm, seed, loss, tokens=1000, **more):
    """A run whose samples differ among each other far more than arms do, as dialogues do."""
    dialogues = np.random.default_rng(0).normal(0, 10, SAMPLES)
    noise = np.random.default_rng(seed).normal(0, 0.2, SAMPLES)
    nats = (loss * LENGTH + dialogues - dialogues.mean() + noise).tolist()
    settings = {"max_seq_length": LENGTH, "phase1_shuffle": False}
    return dict(
        run=f"{arm}-{tokens}-{seed}", arm=arm, seed=seed, changes={}, settings=settings, tokenizer="bpe",
        vocab_size=300, train_tokens=tokens, model_type="context", contexts="none", parameters=10,
        peak_memory_mb=1000.0, seconds_training=5.0 + seed, val_loss=loss, val_ppl=math.exp(loss),
        val_bpb=loss / 3, val_sample_nats=nats, val_ppl_unigram=600.0, val_ppl_bigram=200.0, val_ppl_kn=150.0,
    ) | more  # fmt: skip


def rows(*losses, seeds=3, **more):
    return [row(arm, seed, loss + 0.001 * seed, **more) for arm, loss in losses for seed in range(seeds)]


def cells(lines):
    """Cells of a Markdown table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_cut_after_any_byte_a_file_keeps_its_rows_and_takes_more(tmp_path):
    """An unfinished last row is none, and the next one stands on a line of its own; keys are sorted."""
    path = tmp_path / "results.jsonl"
    bare = dict(arm="a", seed=0, changes={}, settings={}, val_sample_nats=[])
    assert read_results(path) == []
    for name in ("first", "second"):
        append_row(path, {"run": name} | bare)
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = ["first", "second"][: (length >= first) + (length >= len(whole) - 1)]
        append_row(path, {"run": "third"} | bare)
        assert [made["run"] for made in read_results(path)] == [*kept, "third"]
    assert list(json.loads(whole[:first])) == sorted(json.loads(whole[:first]))


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


def test_verdicts_say_what_the_numbers_say():
    """A clear win holds, a clear loss is refuted, the same is open; the rival is the best of the rivals."""
    losses = dict(
        phase1_frozen=5.0, untrained_frozen=5.3, untrained_whitened=5.2, window=4.7, phase1_shuffled=5.0
    )
    found = cells(compare.claims_table(Comparison(rows(*losses.items(), ("phase1_finetuned", 4.6)))))
    assert [verdict.split("**")[1] for _, verdict in found] == ["holds", "refuted", "open"]
    assert ": -18" in found[0][1] and found[0][1].endswith("against untrained_whitened, seeds: 3")
    assert found[1][1].endswith("against window, seeds: 3")


def test_tables_are_sorted_and_complete():
    """Best first at each budget, counts among the arms, a column a budget; the time of the fastest seed."""
    comparison = Comparison(rows(("gru", 5.1), ("phase1_finetuned", 5.0)) + rows(("gru", 6.0), tokens=500))
    found = cells(compare.budget_table(comparison, 1000))
    assert [line[:2] for line in found] == [
        ["phase1_finetuned", "3"], ["(kn)", ""], ["gru", "3"], ["(bigram)", ""], ["(unigram)", ""],
    ]  # fmt: skip
    assert found[2][-2].startswith("+10.5 % (") and found[0][-2] == "" and found[0][5] == "5"
    found = cells(compare.perplexity_table(comparison, {"gru": "a GRU"}))
    assert [line[:3] for line in found[:2]] == [
        ["phase1_finetuned", "", ""],
        ["gru", "a GRU", "403.8 +- 1.0"],
    ]
    assert found[1][3].startswith("164.2 +- ") and found[2][2:] == ["150.0", "150.0"]


def test_retrieval_stands_beside_what_the_network_gives_alone():
    """Where rows have it; an arm of older rows has a blank, and tables of none stay without the column."""
    old = rows(("gru", 5.1)) + rows(("phase1_finetuned", 6.0), tokens=500)
    looked = rows(("phase1_finetuned", 5.0), val_ppl_retrieval=90.0, val_ppl_retrieval_counting=100.0)
    comparison = Comparison(looked + old)
    lines = compare.perplexity_table(comparison, {})
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[2:] == ["500 tokens", "1,000 tokens", "1,000 with retrieval"]
    found = {line[0]: line[2:] for line in cells(lines)}
    assert found["phase1_finetuned"] == ["403.8 +- 1.0", "148.6 +- 0.4", "90.0 +- 0.0"]
    assert found["gru"][2] == "" and found["(retrieval)"] == ["", "", "100.0"]
    assert found["(kn)"] == ["150.0", "150.0", ""]
    found = {line[0]: line[3] for line in cells(compare.budget_table(comparison, 1000))}
    assert found["phase1_finetuned"] == "90.0 +- 0.0" and found["(retrieval)"] == "100.0"
    assert found["gru"] == found["(kn)"] == ""
    for line in (compare.budget_table(comparison, 500)[0], compare.perplexity_table(Comparison(old), {})[0]):
        assert "retrieval" not in line


def test_another_vocabulary_is_not_paired():
    """Its nats are of other tokens: a row without a difference, no verdict; counts are the reference's."""
    other = rows(("gru", 4.0), tokenizer="gpt2", val_ppl_kn=1.0)
    comparison = Comparison(rows(("phase1_finetuned", 5.0)) + other)
    found = cells(compare.budget_table(comparison, 1000))
    assert found[0][0] == "gru" and found[0][-2:] == ["", ""]
    assert [line[2] for line in found if line[0] == "(kn)"] == ["150.0"]
    assert compare.claims_table(comparison) == []


def test_contexts_are_those_that_the_arm_predicts_from():
    """Of frozen ones the measured, of trained ones those after training; an arm without any has blanks."""
    measured = dict(er_val=0.5, cold_start_error_10=0.25, memory_horizon=4)
    trained = {f"{key}_finetuned": 2 * value for key, value in measured.items()} | {"contexts": "fine-tuned"}
    runs = [row("gru", 0, 4.0), row("phase1_frozen", 0, 5.0, contexts="frozen", **measured)]
    comparison = Comparison([*runs, row("end_to_end", 0, 4.5, **measured | trained)])
    found = {line[0]: line[7:10] for line in cells(compare.budget_table(comparison, 1000))}
    assert found["end_to_end"] == ["100.0%", "0.5", "8"] and found["phase1_frozen"] == ["50.0%", "0.25", "4"]
    assert found["gru"] == ["", "", ""]


def with_curves(arm, weight, seed=0):
    """A row with curves as JSON gives them back: keys as text, sorted as text."""
    return row(
        arm, seed, 5.0, contexts="frozen", er_val=0.5 + weight / 2, memory_horizon=4,
        cold_start_curve=[(1 + 2 * seed) * 0.5**k for k in range(1, 17)], past_capacity_by_lag=[0.3, 0.1],
        memory_curve={"0": 1.0, "1": 0.3, "16": 0.001, "2": 0.02},
        bpb_by_context={"1": 3.0, "10": 2.7, "2": 2.8}, spectrum={str(k): 0.1 / k for k in range(1, 30)},
        settings={"dist_reg_weight": weight, "phase1_shuffle": False},
    )  # fmt: skip


def test_points_and_curves_are_pictures(tmp_path):
    """Curves are means over seeds in the order of their points; arms without contexts have none."""
    weights = {"untrained_frozen": 0.05, "phase1_frozen": 0.05, "phase1_w0": 0.0, "phase1_w1": 1.0}
    arms = [with_curves(arm, weight, seed) for arm, weight in weights.items() for seed in range(2)]
    comparison = Comparison(arms + rows(("gru", 5.1)))
    assert comparison.curve(1000, "phase1_frozen", "cold_start_curve")[3.0] == pytest.approx(2 * 0.5**3)
    assert list(comparison.curve(1000, "phase1_frozen", "memory_curve")) == [0, 1, 2, 16]
    assert comparison.curve(1000, "gru", "cold_start_curve") is None
    assert comparison.weights(1000) == [(0.0, "phase1_w0"), (0.05, "phase1_frozen"), (1.0, "phase1_w1")]
    comparison_points(comparison, 1000, tmp_path / "points.png")
    context_curves(comparison, 1000, tmp_path / "plots" / "curves.png")
    assert imread(tmp_path / "points.png").shape[:2] == (540, 1500)
    assert imread(tmp_path / "plots" / "curves.png").shape[:2] == (1080, 2250)

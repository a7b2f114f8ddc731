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
from newllm.report import compare, evidence
from newllm.report.compare import Comparison, append_row, mean_interval, paired_difference, read_results
from newllm.report.pictures import context_curves, perplexities
from newllm.report.series import make_series, read_series

LENGTH, SAMPLES = 10, 40


def row(arm, seed, loss, tokens=1000, **more):
    """A run whose samples differ among each other far more than arms do, as dialogues do."""
    dialogues = np.random.default_rng(0).normal(0, 10, SAMPLES)
    noise = np.random.default_rng(seed).normal(0, 0.2, SAMPLES)
    nats = (loss * LENGTH + dialogues - dialogues.mean() + noise).tolist()
    settings = {"max_seq_length": LENGTH}
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


def looked_up(arm, ppl, counting=100.0, seeds=3, **more):
    """Rows with retrieval, whose perplexity that is, and of counting with the same."""
    made = rows((arm, 5.0), seeds=seeds, **more)
    for own in made:
        for key, value in (("retrieval", ppl), ("counting", counting)):
            own[f"val_sample_nats_{key}"] = row("", own["seed"], math.log(value))["val_sample_nats"]
        own |= dict(val_ppl_retrieval=ppl, val_ppl_retrieval_counting=counting)
    return made


def words(comparison, tokens=1000):
    """{sentence of a claim: its verdict in a word}."""
    found = {claim.sentence: evidence.verdict(comparison, tokens, claim) for claim in evidence.CLAIMS}
    return {sentence: said.split("**")[1] for sentence, said in found.items() if said}


def test_verdicts_say_what_the_numbers_say():
    """A clear win holds, a clear loss is refuted, the same is open; the rival is the best of the rivals."""
    losses = dict(phase1_frozen=5.0, untrained_frozen=5.2, window=4.7, phase1_shuffled=5.0)
    losses |= dict(phase1_w0=5.3, phase1_w1=5.1)
    comparison = Comparison(rows(*losses.items(), ("phase1_finetuned", 4.6)))
    assert [*words(comparison).values()] == ["holds", "refuted", "open", "holds"]
    found = cells(evidence.claims_table(comparison))
    assert found[0][1].startswith("**holds**: -18")
    assert found[0][1].endswith("`phase1_frozen-1000-*` against `untrained_frozen-1000-*`")
    assert found[3][1].endswith("`phase1_w1-1000-*`") and len(found) == 4


@pytest.mark.parametrize(
    ("ours", "gru", "said"),
    [
        (70.0, 75.0, ["holds", "holds", "holds", "holds", "holds"]),
        (79.0, 80.0, ["holds", "refuted", "holds", "refuted", "holds"]),
        (85.0, 80.0, ["refuted", "refuted", "holds", "refuted", "refuted"]),
        (100.0, 97.0, ["refuted", "refuted", "open", "refuted", "refuted"]),
    ],
)
def test_with_retrieval_a_goal_is_reached_or_not(ours, gru, said):
    """The best of our arms counts; a goal is spoken of only at the budget for which it was set."""
    text, goal = evidence.GOAL
    for source, tokens, verdicts in ((text, goal, said), (text, 1000, said[:3:2]), ("b", goal, said[:3:2])):
        made = looked_up("end_to_end", ours, tokens=tokens) + looked_up("gru", gru, tokens=tokens)
        made += looked_up("phase1_frozen", 2 * ours, tokens=tokens)
        for own in made:
            own["settings"]["data_source"] = source
        found = words(Comparison(made), tokens)
        assert [found[claim] for claim in found if "retrieval" in claim or "..." in claim] == verdicts


def table_of(lines):
    """{first cell: the others} of a Markdown table, and its header."""
    return {line[0]: line[1:] for line in cells(lines)} | {"": lines[0].strip("| ").split(" | ")}


def test_a_budget_is_a_table_best_first_with_counting_among_the_arms():
    """Alone and with retrieval, differences to the best, time of the fastest seed."""
    made = looked_up("gru", 90.0) + looked_up("end_to_end", 80.0) + rows(("lstm", 4.0), ("old", 6.0))
    labels = dict(gru="a GRU", end_to_end="ours", lstm="an LSTM", counting="no network")
    found = table_of(evidence.budget_table(Comparison(made), 1000, labels))
    assert list(found)[:-1] == ["end_to_end", "gru", "counting", "lstm"]
    assert found["end_to_end"] == ["ours", "3", "148.6 +- 0.4", "80.0", "", "0.0", "5", "1,000"]
    assert found["gru"][4].startswith("+12.5 % (") and found["counting"][4].startswith("+25.0 % (")
    assert found["counting"][2:4] == ["150.0", "100.0"] and found["lstm"][3:5] == ["", ""]
    assert found[""][5] == "with retrieval, against end_to_end"
    plain = table_of(evidence.budget_table(Comparison(rows(("gru", 5.0))), 1000, labels))
    assert not any("against" in name for name in plain[""]) and list(plain)[:-1] == ["gru", "counting"]
    text, goal = evidence.GOAL
    outside = looked_up("gru", 90.0, tokens=goal)
    for own in outside:
        own["settings"]["data_source"] = text
    assert table_of(evidence.budget_table(Comparison(outside), goal, labels))["(outside)"][2] == "225.0"


def test_parts_and_keys_stand_one_by_one():
    """What each expert adds, what all are worth without the network, and arms that look up something else."""
    weights = {f"retrieval_weight_{name}": 0.2 for name in ("network", "ngram", "cache", "knn")}
    parts = dict(val_ppl_network_ngram=120.0, val_ppl_network_ngram_cache=95.0, val_ppl_retrieval_fixed=99.0)
    made = looked_up("end_to_end", 80.0, **weights, **parts)
    made += looked_up("end_to_end_by_contexts", 88.0) + looked_up("phase1_frozen", 90.0)
    for own in made:
        if own["arm"] == "phase1_frozen":
            own |= dict(val_ppl_retrieval_phase1_contexts=91.0, val_ppl_retrieval_untrained_contexts=96.0)
    comparison = Comparison(made)
    found = cells(evidence.parts_table(comparison))
    assert found[0] == ["(rows)", "`end_to_end-1000-*`"] and found[-1][1].startswith("-20.0 % (")
    assert [line[1] for line in found[1:-1]] == ["148.6 +- 0.4"] + [
        f"{value:.1f}" for value in (120, 95, 80, 99, 100, 91, 96)
    ]
    variants = dict(end_to_end_by_contexts="end_to_end", end_to_end_with_cache="end_to_end")
    found = table_of(
        evidence.variants_table(comparison, variants, dict.fromkeys(variants, "") | {"end_to_end": "ours"})
    )
    assert found["end_to_end"] == ["ours", "80.0"] and "end_to_end_with_cache" not in found
    assert found["end_to_end_by_contexts"][1].startswith("88.0, +10.0 % (")


def test_a_page_shows_what_rows_have_and_nothing_else():
    """Samples of the best arm's first seed, in one line each; sections without rows are left out."""
    samples = [dict(prompt="User: a\n`b`", network="c", retrieval=None)]
    made = looked_up("end_to_end", 80.0) + looked_up("gru", 90.0, samples=[dict(prompt="x", network="y")])
    made[0]["samples"] = samples
    others = rows(("gru", 5.0))
    for own in made + others:
        own["settings"] |= dict(data_source="d", val_samples=1, num_layers=2, context_dim=3, embed_dim=4)
    labels = dict(end_to_end="ours", gru="a GRU")
    pictures = {"results": ["![a](b.png)"]}
    lines = evidence.page_lines(Comparison(made), labels, {}, [], pictures)
    assert lines[0] == "# Results" and "![a](b.png)" in lines
    at = lines.index("`end_to_end-1000-0`, 1,000 tokens:")
    assert lines[at + 2 : at + 4] == ["    prompt    | User: a / `b`", "    network   | c"]
    text = "\n".join(lines)
    assert "## Contexts" not in text and "tuned to\n" not in text and "| y" not in text
    assert "`end_to_end` 80.0, counting 100.0, a GRU 90.0." in text
    assert "| gru |" in "\n".join(evidence.page_lines(Comparison(others), labels, {}, [], pictures))


def test_another_vocabulary_is_not_paired():
    """Its nats are of other tokens: a row without a difference, no verdict."""
    other = rows(("gru", 4.0), tokenizer="gpt2")
    comparison = Comparison(rows(("phase1_finetuned", 5.0)) + other)
    lines = evidence.budget_table(comparison, 1000, dict(gru="", phase1_finetuned=""))
    assert "| gru |" in lines[2] and "against" not in lines[0]
    assert evidence.claims_table(comparison) == []


def test_contexts_are_those_that_the_arm_predicts_from():
    """Of frozen ones the measured, of trained ones those after training; an arm without any is left out."""
    measured = dict(er_val=0.5, cold_start_error_10=0.25, memory_horizon=4)
    trained = {f"{key}_finetuned": 2 * value for key, value in measured.items()} | {"contexts": "fine-tuned"}
    runs = [row("gru", 0, 4.0), row("phase1_frozen", 0, 5.0, contexts="frozen", **measured)]
    comparison = Comparison([*runs, row("end_to_end", 0, 4.5, **measured | trained)])
    labels = dict.fromkeys(("gru", "phase1_frozen", "end_to_end"), "")
    found = table_of(evidence.contexts_table(comparison, 1000, labels))
    assert found["end_to_end"][:2] == ["100.0%", "0.5"] and found["end_to_end"][-1] == "8"
    assert found["phase1_frozen"][:2] == ["50.0%", "0.25"] and "gru" not in found


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

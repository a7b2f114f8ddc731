"""The page of results from rows that are known to be better, worse or the same: verdicts, tables, samples."""

import pytest
from made_rows import looked_up, row, rows

from newllm.report import evidence
from newllm.report.compare import Comparison


def cells(lines):
    """Cells of a Markdown table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


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
    assert found[0][1].endswith("seeds: 3, `phase1_frozen-1000-*` against `untrained_frozen-1000-*`")
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
    assert "ours (`end_to_end`) 80.0, counting 100.0, a GRU 90.0." in text
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

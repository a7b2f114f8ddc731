"""The page of results, docs/results.md, from rows alone: result, what was done, claims, tables, samples."""

import itertools
import math
from typing import NamedTuple

from newllm.report.compare import COUNTING, as_percent, markdown
from newllm.report.summary import CONTEXTS, end_of, parts_of

FROZEN, FINETUNED, END_TO_END = "phase1_frozen", "phase1_finetuned", "end_to_end"
OURS = FROZEN, FINETUNED, END_TO_END
ALONE, WITH_ALL = ("val_ppl", "val_sample_nats"), ("val_ppl_retrieval", "val_sample_nats_retrieval")
GOAL = "ultrachat_860.jsonl", 99_968  # the text and the tokens for which goals were set
PEER = (  # measured elsewhere, there
    "[nanoGPT](https://github.com/karpathy/nanoGPT), 2 layers, 512 wide, dropout 0.2, rate 1e-3, best of 300 "
    "steps of 32 samples; measured elsewhere on the same tokens and split",
    225.0,
)
OF_CONTEXTS = "er_val", "cold_start_error_10", "lyapunov_exponent", "memory_horizon"


class Claim(NamedTuple):
    """That the best of our arms has a lower perplexity than the best of its rivals; goals: at GOAL alone."""

    sentence: str
    ours: tuple
    rivals: tuple = ()
    kind: tuple = ALONE  # the figures that are meant
    gain: float = 0.0  # a goal: lower by such a share of it
    at_most: float = 0.0  # a goal instead of rivals: the perplexity itself


CLAIMS = (
    Claim("Phase 1's contexts beat an untrained network's", (FROZEN,), ("untrained_frozen",)),
    Claim("Phase 1's contexts beat a window of tokens", (FROZEN,), ("window",)),
    Claim("Phase 1 learns from the order of tokens", (FROZEN,), ("phase1_shuffled",)),
    Claim("Both terms of Phase 1 are needed", (FROZEN,), ("phase1_w0", "phase1_w1")),
    Claim("Phase 1 and fine-tuning beat the same network end to end", (FINETUNED,), (END_TO_END,)),
    Claim(
        "Phase 1 and fine-tuning beat GRU, LSTM, Transformer", (FINETUNED,), ("gru", "lstm", "transformer")
    ),
    Claim("Alone, our best network beats a GRU", OURS, ("gru",)),
    Claim("With retrieval, our best network beats a GRU with the same", OURS, ("gru",), WITH_ALL),
    Claim("... by 3 % or more", OURS, ("gru",), WITH_ALL, 0.03),
    Claim("With retrieval, our best network beats counting with the same", OURS, (COUNTING,), WITH_ALL),
    Claim("... by 28 % or more", OURS, (COUNTING,), WITH_ALL, 0.28),
    Claim("... and has a perplexity of at most 80", OURS, (), WITH_ALL, at_most=80.0),
)


def best_of(comparison, tokens, arms, key="val_ppl_retrieval"):
    """The best of some arms at a budget by a figure, or else by the network alone; "" without any."""
    ordered = [*comparison.arms(tokens, key), *comparison.arms(tokens, "val_ppl")]
    return next((arm for arm in ordered if arm in arms), "")


def at_goal(comparison, tokens):
    """Whether a budget, of this text, is GOAL."""
    return (comparison.by[tokens, COUNTING][0]["settings"].get("data_source"), tokens) == GOAL


def runs_of(comparison, tokens, arm):
    """Names of an arm's rows at a budget, in short."""
    if arm == COUNTING:
        return "counting in the same rows"
    return f"`{comparison.by[tokens, arm][0]['run'].rpartition('-')[0]}-*`"


def verdict(comparison, tokens, claim):
    """Whether a claim holds at a budget, by which figures and rows; "" where they are missing."""
    ppl, nats = claim.kind
    known = [arm for arm in comparison.arms(tokens, ppl) if comparison.has(tokens, arm, nats)]
    sides = [[arm for arm in known if arm in arms] for arms in (claim.ours, claim.rivals)]
    best = [side[0] for side in sides if side]  # ours, and the best of the rivals
    is_goal = claim.gain or claim.at_most
    if (is_goal and not at_goal(comparison, tokens)) or len(best) < (1 if claim.at_most else 2):
        return ""
    if claim.at_most:
        mean, half = comparison.mean(tokens, best[0], ppl)
        said, limit = comparison.text(tokens, best[0], ppl), claim.at_most
        low, high = mean - half, mean + half
        holds = high < limit
    else:
        difference = comparison.difference(tokens, *best, nats)
        if difference is None:
            return ""
        middle, low, high = difference
        said, limit = as_percent(difference), math.log1p(-claim.gain)
        holds = high < 0 and middle <= limit
    word = "holds" if holds else "refuted" if low > limit else "open"
    seeds = [{row["seed"] for row in comparison.by[tokens, arm]} for arm in best]
    rows = " against ".join(runs_of(comparison, tokens, arm) for arm in best)
    return f"**{word}**: {said}, seeds: {len(set.intersection(*seeds))}, {rows}"


def by_budget(comparison, header, rows):
    """Markdown: rows that say something of a budget, a column for each behind those of the header."""
    said = [row for row in rows if any(row[len(header) :])]
    return markdown([*header, *(f"{tokens:,} tokens" for tokens in comparison.budgets)], said)


def claims_table(comparison):
    """Markdown: a row a claim, a column a budget."""
    budgets = comparison.budgets
    rows = [[claim.sentence, *(verdict(comparison, tokens, claim) for tokens in budgets)] for claim in CLAIMS]
    return by_budget(comparison, ["claim"], rows)


def budget_table(comparison, tokens, labels):
    """Markdown: the arms of `labels`, {arm: what it is}, at a budget, the best first, counting among them."""
    order = [arm for key in (WITH_ALL[0], ALONE[0]) for arm in comparison.arms(tokens, key)]
    arms = [arm for arm in dict.fromkeys(order) if arm in labels]
    # Rows of older versions have no nats with retrieval.
    nats = next(key for _, key in (WITH_ALL, ALONE) if any(comparison.has(tokens, arm, key) for arm in arms))
    best = next(arm for arm in arms if comparison.has(tokens, arm, nats))
    rows = []
    for arm in arms:
        made, costs = comparison.by[tokens, arm], ["", "", ""]
        if arm != COUNTING:
            fastest = min(row["seconds_training"] for row in made)  # the one that others disturbed least
            peak = comparison.mean_text(tokens, arm, "peak_memory_mb", ",.0f")
            costs = [f"{made[0]['parameters'] / 1e6:.1f}", f"{fastest:.0f}", peak]
        figures = [comparison.text(tokens, arm, kind[0]) for kind in (ALONE, WITH_ALL)]
        against = as_percent(comparison.difference(tokens, arm, best, nats)) if arm != best else ""
        rows.append([arm, labels[arm], len(made), *figures, against, *costs])
    if at_goal(comparison, tokens):
        what, perplexity = PEER
        rows.append(["(outside)", what, "", f"{perplexity:.1f}", "", "", "", "", ""])
    against = f"{'alone' if nats == ALONE[1] else 'with retrieval'}, against {best}"
    costs = ["million parameters", "training s", "peak MB"]
    return markdown(["arm", "what it is", "seeds", "alone", "with retrieval", against, *costs], rows)


def parts_table(comparison):
    """Markdown: what each part of retrieval adds to our best arm, and what it is without the network."""
    columns = []
    for tokens in comparison.budgets:
        arm, by = (best_of(comparison, tokens, arms) for arms in (OURS, (FROZEN, FINETUNED)))
        parts = parts_of(lambda key, at=(tokens, arm): comparison.has(*at, key))
        column = {"(rows)": runs_of(comparison, tokens, arm)} if parts else {}
        for what, (key, _) in parts.items():
            column[what] = comparison.text(tokens, by if key.endswith("_contexts") else arm, key)
        against = comparison.difference(tokens, arm, COUNTING, WITH_ALL[1])
        column["with the network, against without"] = as_percent(against)
        columns.append(column)
    labels = dict.fromkeys(itertools.chain(*columns))
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    return by_budget(comparison, ["perplexity"], rows)


def variants_table(comparison, variants, labels):
    """Markdown: arms that differ in what is looked up alone, under the one they differ from, {arm: that}."""
    rows = []
    for base in dict.fromkeys(variants.values()):
        mine = [arm for arm in variants if variants[arm] == base]
        compared = [n for n in comparison.budgets if any((n, arm) in comparison.by for arm in mine)]
        for arm in [base, *mine]:
            cells = []
            for tokens in comparison.budgets:
                text = comparison.text(tokens, arm, WITH_ALL[0]) if tokens in compared else ""
                against = comparison.difference(tokens, arm, base, WITH_ALL[1]) if arm != base else None
                cells.append(", ".join(filter(None, (text, as_percent(against)))))
            rows.append([arm, labels.get(arm, ""), *cells])
    return by_budget(comparison, ["arm", "what it is"], rows)


def contexts_table(comparison, tokens, labels):
    """Markdown: what the contexts are like from which arms predict; arms without any are left out."""
    rows = []
    for arm in [arm for arm in labels if comparison.has(tokens, arm, "er_val")]:
        end = end_of(comparison.by[tokens, arm][0])
        forms = {key + end: CONTEXTS[key][1] for key in OF_CONTEXTS}
        rows.append([arm, *(comparison.mean_text(tokens, arm, *of) for of in forms.items())])
    return markdown(["arm", *(CONTEXTS[key][0] for key in OF_CONTEXTS)], rows)


def samples_lines(comparison):
    """What our best network writes at each budget, at its first seed; [] where no row has any."""
    lines = []
    for tokens in reversed(comparison.budgets):
        row = comparison.by.get((tokens, best_of(comparison, tokens, OURS)), [{}])[0]
        samples = row.get("samples") or ()
        if samples:
            lines += [f"`{row['run']}`, {tokens:,} tokens:", ""]
        for sample in samples:
            known = [name for name in ("prompt", "network", "retrieval") if sample[name] is not None]
            lines += [*(f"    {name:9} | {' / '.join(sample[name].splitlines())}" for name in known), ""]
    return lines


def done_lines(comparison):
    """What was done, in five lines."""
    row = next(iter(comparison.by.values()))[0]
    s, budgets = row["settings"], ", ".join(f"{tokens:,}" for tokens in comparison.budgets)
    return [
        f"- **Text**: `{s['data_source']}`, dialogues ([LOG.md](../LOG.md) says where from). {budgets} "
        f"tokens to train on; {s['val_samples']} samples of {s['max_seq_length']} tokens of others to "
        f"measure on. Tokenizer: {row['tokenizer']}, {row['vocab_size']:,} ids.",
        f"- **Networks**: {s['num_layers']} layers, contexts {s['context_dim']} and embeddings "
        f"{s['embed_dim']} wide. Learning rate, dropout and weight decay of each arm were chosen on "
        "training dialogues held back ([where](#what-each-arm-was-tuned-to)); a budget without a choice of "
        "its own takes that of the next smaller, or the defaults.",
        "- **Retrieval**: the network's prediction mixed with counts, the text so far and the training text "
        "([how](theory.md)); each half of the measured dialogues by a gate fitted on the other.",
        "- **Figures**: means over seeds +- their 95 % interval; differences are of perplexity, paired by "
        "seed and dialogue, in brackets a bootstrap's 95 % (of a single seed: over dialogues alone). Time is "
        "the fastest seed's, in training alone. Which network is our best is found by these very figures.",
        "- **Rows**: `results/results.jsonl`, one a run, named ARM-SAMPLES-SEED. `python3 -m scripts.compare "
        "--report` makes this page of them; `--repeat RUN` makes a run again and compares.",
    ]


def result_lines(comparison, labels):
    """The result at the largest budget, in three lines; labels: {arm: what it is}."""
    tokens, lines = comparison.budgets[-1], []
    for title, (key, _) in (("With all that is looked up", WITH_ALL), ("Alone", ALONE)):
        best = best_of(comparison, tokens, OURS, key)
        words = {best: f"{labels.get(best)} (`{best}`)", COUNTING: "counting", "gru": "a GRU"}
        known = {arm: comparison.text(tokens, arm, key) for arm in words}
        said = ", ".join(f"{words[arm]} {known[arm]}" for arm in words if known[arm])
        if known[best]:
            lines.append(f"- **{title}**, perplexity at {tokens:,} tokens: {said}.")
    worth = []
    for what, (ours, theirs) in {
        "its contexts, left as they are, against untrained ones": (FROZEN, "untrained_frozen"),
        "as a start for fine-tuning, against the same network end to end": (FINETUNED, END_TO_END),
    }.items():
        if difference := comparison.difference(tokens, ours, theirs):
            worth.append(f"{what}: {as_percent(difference)}")
    return lines + ([f"- **What Phase 1 is worth** there, alone: {'; '.join(worth)}."] if worth else [])


def page_lines(comparison, labels, variants, tuned, pictures):
    """The page.

    Args:
        labels: {arm: what it is} of all arms. variants: {arm: the one it differs from in what is looked up}.
        tuned: lines of a table. pictures: {name: lines that show it}.
    """
    main = {arm: label for arm, label in labels.items() if arm not in variants}
    main[COUNTING] = "no network: Kneser-Ney of order 5; with retrieval its mixture with what is copied"
    largest = comparison.budgets[-1]
    budgets = [(f"{n:,} tokens", budget_table(comparison, n, main)) for n in reversed(comparison.budgets)]
    sections = [
        ("The result", [*result_lines(comparison, labels), "", *pictures["results"]]),
        ("What was done", done_lines(comparison)),
        ("Claims", claims_table(comparison)),
        *budgets,
        ("Retrieval, part by part", parts_table(comparison)),
        ("What else could be looked up", variants_table(comparison, variants, labels)),
        ("Contexts", [*contexts_table(comparison, largest, main), "", *pictures.get("contexts", [])]),
        ("When sweeps work", pictures.get("sweeps", [])),
        ("What they write", samples_lines(comparison)),
        ("What each arm was tuned to", tuned),
    ]
    lines = ["# Results", ""]
    for title, content in sections:
        if any(content):
            lines += [f"## {title}", "", *content, ""]
    return lines

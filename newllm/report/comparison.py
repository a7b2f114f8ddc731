"""From the results of many runs to a table, a CSV and verdicts: means over seeds, intervals, paired differences. No torch.

A result is a dict: what train.main returns, with arm, seed and the settings. Its val_sample_nats are the nats of each
validation sample; a sample has the same place in all runs, and starts with a dialogue of its own.
"""

import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np

from newllm.errors import UserError
from newllm.report.record import as_curve

COUNTED = ("unigram", "bigram", "kn")  # rows that only count n-grams, the same for every seed
RESAMPLES = 2000
T_975 = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
)  # Student's t, two-sided 95 %, 1 ... 10 degrees
COLUMNS = (
    "tokens",
    "arm",
    "seeds",
    "val ppl",
    "95 %",
    "bits/byte",
    "parameters",
    "training s, fastest seed",
    "against reference",
    "95 %",
)
CONTEXT_COLUMNS = (
    "tokens",
    "arm",
    "val ER",
    "cold-start error, 10 sweeps",
    "memory horizon, tokens",
    "peak MB",
)
CLAIMS = (  # sentence, the arm it is about, the arms of which it must beat the best
    ("Phase 1 gives better contexts than an untrained network", "phase1_frozen", ("untrained_frozen", "untrained_whitened")),
    ("Phase 1 gives better contexts than a window of tokens", "phase1_frozen", ("window", "window_whitened", "token")),
    ("Phase 1 learns from the order of tokens", "phase1_frozen", ("phase1_shuffled",)),
    ("Both terms of Phase 1 are needed", "phase1_frozen", ("phase1_w0", "phase1_w1")),
    ("Phase 1 and fine-tuning beat the same network end to end", "phase1_finetuned", ("end_to_end",)),
    ("Phase 1 and fine-tuning beat a GRU, an LSTM and a Transformer", "phase1_finetuned", ("gru", "lstm", "transformer")),
)  # fmt: skip


def read_results(folder):
    """All results in a folder, one JSON file each, in the order of their names.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    results = [read_result(path) for path in sorted(Path(folder).glob("*-*.json"))]
    if not results:
        raise UserError(f"there are no results in {folder}: run scripts.compare without --report first.")
    return results


def read_result(path):
    """One of them.

    Raises:
        UserError: it cannot be read, or is no result.
    """
    found = read_json(path)
    if not {"arm", "seed", "changes", "settings", "val_sample_nats"} <= found.keys():
        raise UserError(f"{path} is no result of this version: move it away and run the comparison again.")
    return found


def read_json(path):
    """The object in a file.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and run the command again.") from error


def mean_interval(values):
    """(mean, half width of its 95 % interval over seeds; nan for a single seed)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = T_975[min(len(values) - 1, len(T_975)) - 1]
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(ours, theirs, length, seed=0):
    """Difference of mean loss, ours minus theirs, over the seeds and samples that both have, with its 95 % interval.

    Bootstrap that draws seeds and dialogues, both with replacement; the same draw for both arms.

    Args:
        ours, theirs: {seed: nats of each sample}. length: targets of a sample.

    Returns:
        (difference, low, high) in nats per token; None when they have no seed in common.
    """
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    gap = np.array([np.subtract(ours[s], theirs[s]) for s in common]) / length  # [seeds, samples]
    generator = np.random.default_rng(seed)
    seeds = generator.integers(gap.shape[0], size=(RESAMPLES, gap.shape[0]))
    samples = generator.integers(gap.shape[1], size=(RESAMPLES, gap.shape[1]))
    means = [gap[np.ix_(s, d)].mean() for s, d in zip(seeds, samples, strict=True)]
    return gap.mean(), *np.quantile(means, (0.025, 0.975))


class Comparison:
    """Results of several arms, by budget.

    Args:
        results: list of dicts as above. reference: the arm that the others are compared with.
    """

    def __init__(self, results, reference="phase1_finetuned"):
        self.reference, self.by = reference, {}
        for result in results:
            self.by.setdefault((result["train_tokens"], result["arm"]), []).append(result)
        self.budgets = sorted({tokens for tokens, _ in self.by})

    def arms(self, tokens):
        """Arms at a budget, fewest bits per byte first: losses of different tokenizers do not compare."""
        found = [arm for budget, arm in self.by if budget == tokens]
        return sorted(found, key=lambda arm: self.mean(tokens, arm, "val_bpb")[0])

    def mean(self, tokens, arm, key):
        """(mean, half width of the interval) over seeds."""
        return mean_interval([result[key] for result in self.by[tokens, arm]])

    def seconds(self, tokens, arm):
        """Training time of the seed that was fastest: the one that other work on the machine disturbed least."""
        return min(result["seconds_training"] for result in self.by[tokens, arm])

    def curve(self, tokens, arm, key):
        """{x: mean over seeds of y} of a curve that each run has, a list counting from 1; None for an arm without it."""
        curves = [as_curve(result[key]) for result in self.by.get((tokens, arm), []) if result.get(key)]
        return {x: statistics.mean(curve[x] for curve in curves) for x in curves[0]} if curves else None

    def by_setting(self, tokens, name, prefix):
        """(value of a setting, arm) of all frozen arms at a budget whose names begin so, without the shuffled one."""
        return [
            (results[0]["settings"][name], arm)
            for (budget, arm), results in self.by.items()
            if budget == tokens and arm.startswith(prefix) and results[0]["contexts"] == "frozen"
            and not results[0]["settings"]["phase1_shuffle"]
        ]  # fmt: skip

    def comparable(self, tokens, ours, theirs):
        """Whether both arms are there with a common seed and the same tokens to predict: nats of other ones are of others."""
        sides = [self.by.get((tokens, arm), []) for arm in (ours, theirs)]
        seeds, vocabularies = ([{r[key] for r in side} for side in sides] for key in ("seed", "vocab_size"))
        tokenizers = [{r["tokenizer"] for r in side} for side in sides]
        return (
            bool(seeds[0] & seeds[1])
            and vocabularies[0] == vocabularies[1]
            and tokenizers[0] == tokenizers[1]
        )

    def difference(self, tokens, ours, theirs):
        """paired_difference of two arms at a budget; None unless they are comparable."""
        if not self.comparable(tokens, ours, theirs):
            return None
        nats = [{r["seed"]: r["val_sample_nats"] for r in self.by[tokens, arm]} for arm in (ours, theirs)]
        return paired_difference(*nats, self.by[tokens, ours][0]["settings"]["max_seq_length"])

    def rows(self):
        """The table: a row for each budget and arm."""
        for tokens in self.budgets:
            for arm in self.arms(tokens):
                ppl, half = self.mean(tokens, arm, "val_ppl")
                against = self.difference(tokens, arm, self.reference) if arm != self.reference else None
                yield (
                    f"{tokens:,}", arm, len(self.by[tokens, arm]), f"{ppl:.1f}",
                    "" if math.isnan(half) else f"+- {half:.1f}",
                    f"{self.mean(tokens, arm, 'val_bpb')[0]:.3f}", f"{self.by[tokens, arm][0]['parameters']:,}",
                    f"{self.seconds(tokens, arm):.0f}",
                    f"{math.expm1(against[0]):+.1%}" if against else "",
                    f"{math.expm1(against[1]):+.1%} ... {math.expm1(against[2]):+.1%}" if against else "",
                )  # fmt: skip
            any_run = self.by.get((tokens, self.reference), self.by[tokens, self.arms(tokens)[0]])[0]
            for name in COUNTED:
                ppl = any_run[f"val_ppl_{name}"]
                bpb = any_run["val_bpb"] * math.log(ppl) / any_run["val_loss"]
                yield f"{tokens:,}", f"({name})", "", f"{ppl:.1f}", "", f"{bpb:.3f}", "", "", "", ""

    def context_rows(self):
        """What the contexts that an arm predicts from are like, as means over seeds: a row for each budget and arm with such."""
        keys = ("er_val", "cold_start_error_10", "memory_horizon")
        for tokens, arm in sorted(self.by):
            results = self.by[tokens, arm]
            suffix = "" if results[0].get("contexts") == "frozen" else "_finetuned"
            if any(result.get(key + suffix) is None for key in keys for result in results):
                continue
            er, error, horizon = (self.mean(tokens, arm, key + suffix)[0] for key in keys)
            peak = self.mean(tokens, arm, "peak_memory_mb")[0]
            yield f"{tokens:,}", arm, f"{er:.1%}", f"{error:.2g}", f"{horizon:.3g}", f"{peak:,.0f}"

    def verdicts(self):
        """A sentence for each claim and budget: it holds, is refuted, or is undecided, and by which row."""
        for tokens in self.budgets:
            for claim, ours, others in CLAIMS:
                there = [arm for arm in others if self.comparable(tokens, ours, arm)]
                if not there:
                    continue
                best = min(there, key=lambda arm: self.mean(tokens, arm, "val_loss")[0])
                gap, low, high = (math.expm1(value) for value in self.difference(tokens, ours, best))
                verdict = "holds" if high < 0 else "is refuted" if low > 0 else "is undecided"
                seeds = min(len(self.by[tokens, arm]) for arm in (ours, best))
                yield (
                    f"{tokens:,} tokens: {claim}: {verdict}. {ours} against {best}: perplexity {gap:+.1%} "
                    f"({low:+.1%} ... {high:+.1%}), {seeds} seed{'s' * (seeds > 1)}."
                )


def markdown(header, rows):
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def write_report(comparison, folder):
    """comparison.md and comparison.csv in the folder.

    Returns:
        The lines of comparison.md.
    """
    rows = list(comparison.rows())
    contexts = markdown(CONTEXT_COLUMNS, comparison.context_rows())
    lines = [
        *markdown(COLUMNS, rows),
        "",
        *contexts,
        "",
        *(f"- {sentence}" for sentence in comparison.verdicts()),
    ]
    folder = Path(folder)
    (folder / "comparison.md").write_text(
        "\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace"
    )
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return lines

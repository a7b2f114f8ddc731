"""Many runs side by side: rows, means over seeds, paired differences, verdicts, tables, growth. No torch.

A row is what train.main returns, with run (its name), arm, seed, changes and the settings that shape its
figures: one JSON object a line. Its val_sample_nats are the nats of each validation sample; a sample has the
same place in all rows, and starts with a dialogue of its own.
"""

import json
import math
import statistics

import numpy as np

from newllm.errors import UserError
from newllm.report.record import append_line, as_curve, read_rows
from newllm.report.summary import COUNTED
from newllm.saving.files import sync

NEEDED = {"run", "arm", "seed", "changes", "settings", "val_sample_nats"}
RESAMPLES = 2000
# Student's t, two-sided 95 %, 1 ... 10 degrees of freedom
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
FROZEN, FINETUNED = "phase1_frozen", "phase1_finetuned"
CLAIMS = (  # sentence, the arm it is about, the arms of which it must beat the best
    ("Phase 1's contexts beat an untrained network's", FROZEN, ("untrained_frozen", "untrained_whitened")),
    ("Phase 1's contexts beat a window of tokens", FROZEN, ("window", "window_whitened", "token")),
    ("Phase 1 learns from the order of tokens", FROZEN, ("phase1_shuffled",)),
    ("Both terms of Phase 1 are needed", FROZEN, ("phase1_w0", "phase1_w1")),
    ("Phase 1 and fine-tuning beat the same network end to end", FINETUNED, ("end_to_end",)),
    ("Phase 1 and fine-tuning beat GRU, LSTM, Transformer", FINETUNED, ("gru", "lstm", "transformer")),
)


def append_row(path, row):
    """Add a row, which is on the disk when this returns; several processes may append to one file.

    UserError where the disk refuses.
    """
    try:
        append_line(path, json.dumps(row, sort_keys=True))
        sync(path)
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror})"
        raise UserError(f"{reason}: free the disk and run again.") from error


def read_results(path):
    """The rows of a file, the last of each run; [] without a file. What a crash left unfinished is no row.

    UserError where the file cannot be read, or holds something else.
    """
    rows = {}
    try:
        for row in read_rows(path):
            if not row.keys() >= NEEDED:
                raise KeyError("run")
            rows[row["run"]] = row
    except FileNotFoundError:
        return []
    except (OSError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as results ({error!r}): choose another --results.") from error
    return list(rows.values())


def mean_interval(values):
    """(mean, half width of its 95 % interval over seeds; nan for a single seed)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = T_975[min(len(values) - 1, len(T_975)) - 1]
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(ours, theirs, length, seed=0):
    """Difference of mean loss, ours minus theirs, over seeds and samples of both, with its 95 % interval.

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
    means = gap[seeds[:, :, None], samples[:, None, :]].mean(axis=(1, 2))
    return gap.mean(), *np.quantile(means, (0.025, 0.975))


class Comparison:
    """Rows of several arms, in `by` by number of training tokens and arm."""

    def __init__(self, rows):
        self.by = {}
        for row in rows:
            self.by.setdefault((row["train_tokens"], row["arm"]), []).append(row)
        self.budgets = sorted({tokens for tokens, _ in self.by})

    def arms(self, tokens):
        """Arms at a budget, fewest bits per byte first: losses of different tokenizers do not compare."""
        present = [arm for budget, arm in self.by if budget == tokens]
        return sorted(present, key=lambda arm: self.mean(tokens, arm, "val_bpb")[0])

    def mean(self, tokens, arm, key):
        """(mean, half width of the interval) over seeds."""
        return mean_interval([row[key] for row in self.by[tokens, arm]])

    def seconds(self, tokens, arm):
        """Training time of the fastest seed: the one that other work on the machine disturbed least."""
        return min(row["seconds_training"] for row in self.by[tokens, arm])

    def counted(self, tokens):
        """{name: (perplexity, bits per byte)} of n-gram counts, which are the same for every seed."""
        row = self.by.get((tokens, FINETUNED), self.by[tokens, self.arms(tokens)[0]])[0]
        bits_a_nat = row["val_bpb"] / row["val_loss"]
        perplexities = {name: row[f"val_ppl_{name}"] for name in COUNTED}
        return {name: (ppl, bits_a_nat * math.log(ppl)) for name, ppl in perplexities.items()}

    def curve(self, tokens, arm, key):
        """{x: mean over seeds of y}, x ascending, of a curve of each run; None for an arm without it."""
        curves = [as_curve(row[key]) for row in self.by.get((tokens, arm), []) if row.get(key)]
        if not curves:
            return None
        return {x: statistics.mean(curve[x] for curve in curves) for x in sorted(curves[0])}

    def is_frozen(self, tokens, arm):
        """Whether the arm's contexts stay as Phase 1, or nobody, has made them."""
        row = self.by[tokens, arm][0]
        return row["contexts"] == "frozen" or row["model_type"] in ("window", "token")

    def weights(self, tokens):
        """(dist_reg_weight, arm), ascending, of the frozen arms of Phase 1 on tokens in their order."""
        arms = [arm for arm in self.arms(tokens) if arm.startswith("phase1_") and self.is_frozen(tokens, arm)]
        settings = {arm: self.by[tokens, arm][0]["settings"] for arm in arms}
        ordered = [arm for arm in arms if not settings[arm]["phase1_shuffle"]]
        return sorted((settings[arm]["dist_reg_weight"], arm) for arm in ordered)

    def difference(self, tokens, ours, theirs):
        """paired_difference of two arms at a budget; None where one is missing, or their tokens differ."""
        sides = [self.by.get((tokens, arm), []) for arm in (ours, theirs)]
        tokenizers = [{(row["tokenizer"], row["vocab_size"]) for row in side} for side in sides]
        if tokenizers[0] != tokenizers[1] or not sides[0]:
            return None
        nats = [{row["seed"]: row["val_sample_nats"] for row in side} for side in sides]
        return paired_difference(*nats, sides[0][0]["settings"]["max_seq_length"])

    def verdict(self, tokens, ours, rivals):
        """Whether an arm beats its best rival at a budget, and by which figures; "" where one is missing."""
        rivals = [arm for arm in rivals if self.difference(tokens, ours, arm)]
        if not rivals:
            return ""
        best = min(rivals, key=lambda arm: self.mean(tokens, arm, "val_loss")[0])
        difference = self.difference(tokens, ours, best)
        _, low, high = difference
        word = "holds" if high < 0 else "refuted" if low > 0 else "open"
        seeds = min(len(self.by[tokens, arm]) for arm in (ours, best))
        return f"**{word}**: {as_percent(difference)} against {best}, seeds: {seeds}"

    def perplexity(self, tokens, arm, key="val_ppl"):
        """Mean and half width, as `175.8 +- 0.9`; "" for an arm that is not there, or lacks the figure."""
        rows = self.by.get((tokens, arm), [])
        if not rows or any(row.get(key) is None for row in rows):
            return ""
        mean, half = self.mean(tokens, arm, key)
        return f"{mean:,.1f}" if math.isnan(half) else f"{mean:,.1f} +- {half:.1f}"

    def looks_up(self, tokens):
        """Whether an arm at a budget has figures with retrieval."""
        return any("val_ppl_retrieval" in row for arm in self.arms(tokens) for row in self.by[tokens, arm])

    def counting(self, tokens):
        """Perplexity of retrieval without any network, the same for every seed; "" where no row has it."""
        rows = [row for arm in self.arms(tokens) for row in self.by[tokens, arm]]
        found = [row["val_ppl_retrieval_counting"] for row in rows if "val_ppl_retrieval_counting" in row]
        return f"{found[0]:,.1f}" if found else ""

    def context_cell(self, tokens, arm, key, form):
        """The mean of a figure of the contexts that an arm predicts from; "" for an arm without any."""
        key = key if self.is_frozen(tokens, arm) else f"{key}_finetuned"
        if any(row.get(key) is None for row in self.by[tokens, arm]):
            return ""
        return format(self.mean(tokens, arm, key)[0], form)


def as_percent(difference):
    """A difference in nats with its interval, as one of perplexity; "" of None."""
    if difference is None:
        return ""
    middle, low, high = (100 * math.expm1(nats) for nats in difference)
    return f"{middle:+.1f} % ({low:+.1f} ... {high:+.1f})"


def claims_table(comparison):
    """Markdown: a row a claim, a column a budget."""
    rows = []
    for sentence, ours, rivals in CLAIMS:
        verdicts = [comparison.verdict(tokens, ours, rivals) for tokens in comparison.budgets]
        if any(verdicts):
            rows.append([sentence, *verdicts])
    return markdown(["claim", *(f"{tokens:,} tokens" for tokens in comparison.budgets)], rows)


def perplexity_table(comparison, labels):
    """Markdown: a row an arm, a column a budget; fewest bits per byte at the largest budget first.

    Args:
        labels: {arm: what it is, in words}.
    """
    budgets, rows = comparison.budgets, []
    columns = [(tokens, key) for tokens in budgets for key in figures_shown(comparison, tokens)]
    for arm in dict.fromkeys(arm for tokens in reversed(budgets) for arm in comparison.arms(tokens)):
        cells = [comparison.perplexity(tokens, arm, key) for tokens, key in columns]
        rows.append([arm, labels.get(arm, ""), *cells])
    if any(map(comparison.looks_up, budgets)):
        cells = [comparison.counting(tokens) if key != "val_ppl" else "" for tokens, key in columns]
        rows.append(["(retrieval)", "retrieval without a network: counting and copying", *cells])
    for name, label in COUNTED.items():
        cells = []
        for tokens, key in columns:
            cells.append(f"{comparison.counted(tokens)[name][0]:,.1f}" if key == "val_ppl" else "")
        rows.append([f"({name})", label, *cells])
    header = [f"{tokens:,} {'tokens' if key == 'val_ppl' else 'with retrieval'}" for tokens, key in columns]
    return markdown(["arm", "what it is", *header], rows)


def figures_shown(comparison, tokens):
    """Which perplexities of the arms stand side by side at a budget."""
    return ("val_ppl", "val_ppl_retrieval") if comparison.looks_up(tokens) else ("val_ppl",)


def budget_table(comparison, tokens):
    """Markdown: all arms and counts at a budget, fewest bits per byte first; contexts as means over seeds."""
    rows = []
    for arm in comparison.arms(tokens):
        against = against_frozen = None
        if arm != FINETUNED:
            against = comparison.difference(tokens, arm, FINETUNED)
        if arm != FROZEN and comparison.is_frozen(tokens, arm):
            against_frozen = comparison.difference(tokens, FROZEN, arm)
        rows.append(
            {
                "arm": arm,
                "seeds": len(comparison.by[tokens, arm]),
                "val perplexity": comparison.perplexity(tokens, arm),
                "with retrieval": comparison.perplexity(tokens, arm, "val_ppl_retrieval"),
                "bits per byte": f"{comparison.mean(tokens, arm, 'val_bpb')[0]:.3f}",
                "parameters": f"{comparison.by[tokens, arm][0]['parameters']:,}",
                "training s": f"{comparison.seconds(tokens, arm):.0f}",
                "peak MB": f"{comparison.mean(tokens, arm, 'peak_memory_mb')[0]:,.0f}",
                "effective rank": comparison.context_cell(tokens, arm, "er_val", ".1%"),
                "cold-start error": comparison.context_cell(tokens, arm, "cold_start_error_10", ".2g"),
                "memory horizon": comparison.context_cell(tokens, arm, "memory_horizon", ".3g"),
                f"against {FINETUNED}": as_percent(against),
                f"{FROZEN} against it": as_percent(against_frozen),
            }
        )
    header = [name for name in rows[0] if name != "with retrieval" or comparison.looks_up(tokens)]
    for name, (perplexity, bits) in comparison.counted(tokens).items():
        counts = {"arm": f"({name})", "val perplexity": f"{perplexity:,.1f}", "bits per byte": f"{bits:.3f}"}
        rows.append(counts)
    rows.sort(key=lambda row: float(row["bits per byte"]))
    if comparison.looks_up(tokens):
        rows.append({"arm": "(retrieval)", "with retrieval": comparison.counting(tokens)})
    return markdown(header, [[row.get(name, "") for name in header] for row in rows])


def markdown(header, rows):
    """Lines of a Markdown table; none without rows."""
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def table(header, rows):
    """Lines of a plain-text table; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(" | ".join([first.ljust(widths[0]), *aligned]))
    return [lines[0], "-|-".join("-" * width for width in widths), *lines[1:]]


def growth(summaries, key, unit):
    """Least squares of a figure over thousands of training tokens: (intercept, slope, the line in words)."""
    thousands = [summary["train_tokens"] / 1000 for summary in summaries]
    values = [summary[key] for summary in summaries]
    slope, intercept = statistics.linear_regression(thousands, values)
    # Without any variance there is none to explain.
    r_squared = statistics.correlation(thousands, values) ** 2 if len(set(values)) > 1 else 1.0
    sign = "-" if slope < 0 else "+"
    line = f"{intercept:,.1f} {unit} {sign} {abs(slope):.3g} {unit} per 1,000 tokens, R^2 {r_squared:.4f}"
    return intercept, slope, line


def crossing(summaries, key="val_ppl", other="val_ppl_kn"):
    """Training tokens from which on one perplexity stays below another, on straight lines between budgets.

    The lines are of logarithms. The smallest budget, where it is below at all of them; None, where it is not
    at the largest. A budget without both, or with one that is not finite, does not count.
    """
    points = []
    for summary in summaries:
        ours, theirs = summary.get(key), summary.get(other)
        if ours and theirs and math.isfinite(ours * theirs):
            points.append((math.log(summary["train_tokens"]), math.log(ours / theirs)))
    above = [place for place, (_, gap) in enumerate(points) if gap >= 0]
    if not points or (above and above[-1] == len(points) - 1):
        return None
    if not above:
        return math.exp(points[0][0])
    (before, too_much), (after, too_little) = points[above[-1] : above[-1] + 2]
    return math.exp(before + (after - before) * too_much / (too_much - too_little))


def scale_lines(summaries):
    """How time and memory grow over budgets, and where the network passes counting, as lines."""
    lines = [
        f"time = {growth(summaries, 'seconds', 's')[2]}",
        f"peak memory = {growth(summaries, 'peak_memory_mb', 'MB')[2]}",
    ]
    if all(summary.get(key) for summary in summaries for key in ("val_ppl", "val_ppl_kn")):
        crossed = crossing(summaries)
        where = f"from about {crossed:,.0f} tokens on" if crossed else "at none of the larger budgets"
        lines.append(f"the network alone is below counting (Kneser-Ney) {where}")
    return lines

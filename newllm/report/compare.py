"""Many runs side by side: rows, means over seeds, paired differences, growth, tables of text. No torch.

A row is what train.main returns, with run (its name), arm, seed, changes and the settings that shape its
figures: one JSON object a line. Its val_sample_nats are the nats of each validation sample, those ending in
_retrieval and _counting with what is looked up; a sample has the same place in all rows, and starts with a
dialogue of its own.
"""

import itertools
import json
import math
import statistics

import numpy as np

from newllm.errors import UserError
from newllm.report.record import append_line, as_curve, read_rows, shown
from newllm.saving.files import sync

NEEDED = {"run", "arm", "seed", "changes", "settings", "val_sample_nats"}
RESAMPLES = 2000
# Student's t, two-sided 95 %, 1 ... 10 degrees of freedom
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
COUNTING = "counting"  # an arm that every run has beside its own: no network, alone and with what it looks up
COUNTED_AS = {
    "val_ppl": "val_ppl_kn",
    "val_ppl_retrieval": "val_ppl_retrieval_counting",
    "val_sample_nats_retrieval": "val_sample_nats_counting",
}


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

    Bootstrap that draws seeds and dialogues, both with replacement; the same draw for both arms. ours and
    theirs: {seed: nats of each sample}, of `length` targets. Returns (difference, low, high) in nats per
    token; None when they have no seed in common.
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
    """Rows of several arms, in `by` by number of training tokens and arm; with them those of counting."""

    def __init__(self, rows):
        self.by = {}
        # Of the runs of a seed, one with all that is looked up counts as all others that have it.
        for row in sorted(rows, key=lambda row: -len(row["settings"].get("retrieval", ""))):
            self.by.setdefault((row["train_tokens"], row["arm"]), []).append(row)
            counted = self.by.setdefault((row["train_tokens"], COUNTING), [])
            if all(row["seed"] != made["seed"] for made in counted):
                same = {key: row[key] for key in ("seed", "settings", "tokenizer", "vocab_size")}
                figures = {key: row[name] for key, name in COUNTED_AS.items() if name in row}
                counted.append({"run": row["run"]} | same | figures)
        for made in self.by.values():
            made.sort(key=lambda row: row["seed"])
        self.budgets = sorted({tokens for tokens, _ in self.by})

    def has(self, tokens, arm, key):
        """Whether all rows of an arm at a budget have a figure."""
        rows = self.by.get((tokens, arm), [])
        return bool(rows) and all(row.get(key) is not None for row in rows)

    def arms(self, tokens, key):
        """Arms at a budget that have a figure, the lowest mean first."""
        present = [arm for budget, arm in self.by if budget == tokens and self.has(tokens, arm, key)]
        return sorted(present, key=lambda arm: self.mean(tokens, arm, key)[0])

    def mean(self, tokens, arm, key):
        """(mean, half width of the interval) over seeds."""
        return mean_interval([row[key] for row in self.by[tokens, arm]])

    def curve(self, tokens, arm, key):
        """{x: mean over seeds of y}, x ascending, of a curve of each run; None for an arm without it."""
        curves = [as_curve(row[key]) for row in self.by.get((tokens, arm), []) if row.get(key)]
        if not curves:
            return None
        return {x: statistics.mean(curve[x] for curve in curves) for x in sorted(curves[0])}

    def difference(self, tokens, ours, theirs, key="val_sample_nats"):
        """paired_difference of two arms at a budget; None where one lacks it, or their tokens differ."""
        sides = [self.by.get((tokens, arm), []) for arm in (ours, theirs)]
        tokenizers = [{(row["tokenizer"], row["vocab_size"]) for row in side} for side in sides]
        if tokenizers[0] != tokenizers[1] or not sides[0]:
            return None
        nats = [{row["seed"]: row[key] for row in side if row.get(key)} for side in sides]
        return paired_difference(*nats, sides[0][0]["settings"]["max_seq_length"])

    def mean_text(self, tokens, arm, key, form):
        """Mean of a figure; "" where the arm lacks it."""
        return format(self.mean(tokens, arm, key)[0], form) if self.has(tokens, arm, key) else ""

    def text(self, tokens, arm, key):
        """Mean and half width of a figure, as `175.8 +- 0.9`; "" where the arm lacks it."""
        mean = self.mean_text(tokens, arm, key, ",.1f")
        half = f"{self.mean(tokens, arm, key)[1]:.1f}" if mean else "nan"
        return mean if half in ("nan", "0.0") else f"{mean} +- {half}"


def as_percent(difference):
    """A difference in nats with its interval, as one of perplexity; "" of None."""
    if difference is None:
        return ""
    middle, low, high = (100 * math.expm1(nats) for nats in difference)
    return f"{middle:+.1f} % ({low:+.1f} ... {high:+.1f})"


def markdown(header, rows):
    """Lines of a Markdown table, without columns in which no row says anything; none without rows."""
    said = [any(str(row[at]) for row in rows) for at in range(len(header))]
    lines = [list(itertools.compress(line, said)) for line in (header, ["---"] * len(header), *rows)]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] if rows else []


def table(header, rows):
    """Lines of a plain-text table; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(" | ".join([first.ljust(widths[0]), *aligned]))
    return [lines[0], "-|-".join("-" * width for width in widths), *lines[1:]]


def figures_table(columns, rows):
    """Lines of a plain-text table of dicts; columns: (title, key, form as `shown` takes it) of each."""
    cells = [[shown(row.get(key), form) for _, key, form in columns] for row in rows]
    return table([title for title, *_ in columns], cells)


def growth(summaries, key, unit):
    """Least squares of a figure over thousands of training tokens, in words."""
    thousands = [summary["train_tokens"] / 1000 for summary in summaries]
    values = [summary[key] for summary in summaries]
    slope, intercept = statistics.linear_regression(thousands, values)
    # Without any variance there is none to explain.
    r_squared = statistics.correlation(thousands, values) ** 2 if len(set(values)) > 1 else 1.0
    sign = "-" if slope < 0 else "+"
    return f"{intercept:,.1f} {unit} {sign} {abs(slope):.3g} {unit} per 1,000 tokens, R^2 {r_squared:.4f}"


def crossing(summaries):
    """Training tokens from which on the network stays below counting, on straight lines of logarithms.

    The smallest budget, where it is below at all of them; None, where it is not at the largest. A budget
    without both perplexities, or with one that is not finite, does not count.
    """
    points = []
    for summary in summaries:
        ours, theirs = summary.get("val_ppl"), summary.get("val_ppl_kn")
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
        f"time = {growth(summaries, 'seconds', 's')}",
        f"peak memory = {growth(summaries, 'peak_memory_mb', 'MB')}",
    ]
    if all(summary.get(key) for summary in summaries for key in ("val_ppl", "val_ppl_kn")):
        crossed = crossing(summaries)
        where = f"from about {crossed:,.0f} tokens on" if crossed else "at none of the larger budgets"
        lines.append(f"the network alone is below counting (Kneser-Ney) {where}")
    return lines

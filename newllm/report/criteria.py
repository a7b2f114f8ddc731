"""What a run must show to pass, the guide's gates and those that an untrained network fails, and how a ladder grows."""

from dataclasses import dataclass
from statistics import fmean, linear_regression

GUIDE_PEAK_MB = 5441  # the guide's memory table for 100k tokens at full size


GATES = (  # name, figure, untrained figure, side, limit: numbers or keys of a summary
    ("Phase 1 optimizer steps", "phase1_steps", 0, ">", 0),
    ("Phase 1 relative parameter change", "phase1_param_change", 0, ">", 0),
    ("effective rank, training", "er_train", "er_train_untrained", ">", 0.85),
    ("effective rank, validation", "er_val", "er_val_untrained", ">", 0.75),
    ("effective rank above untrained", "er_val", "er_val_untrained", ">", "er_val_untrained"),
    ("tokens converged after 10 cold sweeps", "converged_ratio", "converged_ratio_untrained", ">", 0.95),
    ("cold-start error after 10 sweeps", "cold_start_error_10", "cold_start_error_10_untrained", "<", 0.05),
    ("val perplexity below untrained contexts", "val_ppl", "val_ppl_untrained_context", "<", "val_ppl_untrained_context"),
    ("val perplexity below the bigram", "val_ppl", "val_ppl_untrained_context", "<", "val_ppl_bigram"),
    ("peak memory, MB", "peak_memory_mb", None, "<", GUIDE_PEAK_MB),
)  # fmt: skip
FINAL_DIFF = (
    "final_diff: the guide's gate on the change of the last sweep is left out, because contexts that change little may still "
    "lie far from the trajectory; the cold-start error, the distance to it, stands for that gate"
)
MEANING = (
    "FAIL: at least one figure misses its gate, so what this run shows is not what the method promises; nothing is broken.\n"
    "What helps: perplexity: more tokens (--num_samples 781; below 25k tokens counting beats most networks); rank, convergence, "
    "cold start: more --phase1_max_iterations or another --dist_reg_weight (docs/troubleshooting.md)"
)


@dataclass(frozen=True)
class Criterion:
    """One row of the check: a value, its untrained value (None where there is none), and the gate."""

    name: str
    value: float
    untrained: float | None
    limit: float
    above: bool = False

    @property
    def gate(self):
        return f"{'>' if self.above else '<'} {self.limit:.4g}"

    @property
    def passed(self):
        return self._passes(self.value)

    @property
    def verdict(self):
        """In words; a gate that the untrained network passes as well says nothing about training."""
        if not self.passed:
            return "FAIL"
        return "PASS" if self.untrained is None or not self._passes(self.untrained) else "PASS, untrained too"

    def _passes(self, value):
        return value > self.limit if self.above else value < self.limit


def check(summary):
    """Criteria for the summary of a complete run: those whose figures it has.

    Args:
        summary: what train.main returns.

    Returns:
        List of Criterion.
    """

    def figure(of):
        return summary.get(of) if isinstance(of, str) else of

    return [
        Criterion(name, figure(key), figure(untrained), figure(limit), sign == ">")
        for name, key, untrained, sign, limit in GATES
        if figure(key) is not None and figure(limit) is not None
    ]


def table(header, rows):
    """Lines of a plain-text table; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(" | ".join([first, *others]))
    return [lines[0], "-|-".join("-" * width for width in widths), *lines[1:]]


def criteria_table(criteria):
    """The check as lines: value | untrained | gate | PASS or FAIL."""
    rows = [
        (c.name, f"{c.value:.4g}", "" if c.untrained is None else f"{c.untrained:.4g}", c.gate, c.verdict)
        for c in criteria
    ]
    return table(("criterion", "value", "untrained", "gate", ""), rows)


LADDER_COLUMNS = ("tokens", "seconds", "Phase 1 tok/s", "Phase 2 tok/s", "peak MB", "ER train", "ER val", "untrained", "ceiling", "sweeps", "cold error", "horizon", "val ppl", "untrained", "bigram", "check")  # fmt: skip


def ladder_row(summary):
    """One budget as a row of the ladder's table; empty where the run has no such figure."""

    def cell(key, form):
        return "" if summary.get(key) is None else format(summary[key], form)

    return (
        cell("train_tokens", ","), cell("seconds", ".0f"), cell("tok_per_s_phase1", ",.0f"), cell("tok_per_s_phase2", ",.0f"),
        cell("peak_memory_mb", ",.0f"), cell("er_train", ".1%"), cell("er_val", ".1%"), cell("er_val_untrained", ".1%"), cell("er_ceiling", ".1%"),
        cell("sweeps_to_convergence", "") or "never" * ("er_val" in summary), cell("cold_start_error_10", ".2g"), cell("memory_horizon", ""),
        cell("val_ppl", ".1f"), cell("val_ppl_untrained_context", ".1f"), cell("val_ppl_bigram", ".1f"),
        "PASS" if all(c.passed for c in check(summary)) else "FAIL",
    )  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """The line y = intercept + slope * x through points, and the share of the variance of y that it explains."""

    intercept: float
    slope: float
    r_squared: float

    def __call__(self, x):
        return self.intercept + self.slope * x

    def text(self, unit):
        """The line in words, where x counts thousands of tokens and y has the unit."""
        sign = "-" if self.slope < 0 else "+"
        return f"{self.intercept:,.1f} {unit} {sign} {abs(self.slope):.3g} {unit} per 1,000 tokens"


def linear_fit(xs, ys):
    """Least squares through two points or more."""
    slope, intercept = linear_regression(xs, ys)
    mean = fmean(ys)
    total = sum((y - mean) ** 2 for y in ys)
    missed = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return Fit(intercept, slope, 1 - missed / total if total else 1.0)


def scale_fits(summaries):
    """(fit of seconds, fit of peak memory in MB), both against thousands of training tokens, over a ladder's budgets."""
    thousands = [s["train_tokens"] / 1000 for s in summaries]
    return tuple(linear_fit(thousands, [s[key] for s in summaries]) for key in ("seconds", "peak_memory_mb"))


def scale_lines(summaries):
    """How time and memory grow over a ladder's budgets, which ascend, as lines."""
    time, memory = scale_fits(summaries)
    grown = {
        key: summaries[-1][key] / summaries[0][key] for key in ("train_tokens", "seconds", "peak_memory_mb")
    }
    return [
        f"time = {time.text('s')}, R^2 {time.r_squared:.4f}",
        f"peak memory = {memory.text('MB')}, R^2 {memory.r_squared:.4f}",
        f"from the smallest budget to the largest: tokens x{grown['train_tokens']:.1f}, time x{grown['seconds']:.1f}, "
        f"peak memory x{grown['peak_memory_mb']:.2f}",
    ]

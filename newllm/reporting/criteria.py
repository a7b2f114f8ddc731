"""What a run must show to pass, the guide's gates and those that an untrained network fails, and how a ladder grows."""

from dataclasses import dataclass
from statistics import fmean, linear_regression

GUIDE_PEAK_MB = 5441  # the guide's memory table for 100k tokens at full size


@dataclass(frozen=True)
class Criterion:
    """One row of the check: a value, its untrained value, the gate, and whether the value passes it."""

    name: str
    value: float
    untrained: float | None
    gate: str
    passed: bool


def check(summary):
    """Criteria for the summary of a complete run.

    Args:
        summary: what train.main returns.

    Returns:
        List of Criterion.
    """
    s = summary

    def above(name, key, limit, untrained):
        return Criterion(name, s[key], untrained, f"> {limit:.4g}", s[key] > limit)

    def below(name, key, limit, untrained):
        return Criterion(name, s[key], untrained, f"< {limit:.4g}", s[key] < limit)

    return [
        above("Phase 1 optimizer steps", "phase1_steps", 0, 0),
        above("Phase 1 relative parameter change", "phase1_param_change", 0, 0.0),
        above("effective rank, training", "er_train", 0.85, s["er_train_untrained"]),
        above("effective rank, validation", "er_val", 0.75, s["er_val_untrained"]),
        above("effective rank above untrained", "er_val", s["er_val_untrained"], s["er_val_untrained"]),
        above("tokens converged after 10 cold sweeps", "converged_ratio", 0.95, s["converged_ratio_untrained"]),
        below("cold-start error after 10 sweeps", "cold_start_error_10", 0.05, s["cold_start_error_10_untrained"]),
        below("val perplexity below untrained contexts", "val_ppl", s["val_ppl_untrained_context"], s["val_ppl_untrained_context"]),
        below("val perplexity below the bigram", "val_ppl", s["val_ppl_bigram"], s["val_ppl_untrained_context"]),
        below("peak memory, MB", "peak_memory_mb", GUIDE_PEAK_MB, None),
    ]  # fmt: skip


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
        (
            c.name,
            f"{c.value:.4g}",
            "" if c.untrained is None else f"{c.untrained:.4g}",
            c.gate,
            "PASS" if c.passed else "FAIL",
        )
        for c in criteria
    ]
    return table(("criterion", "value", "untrained", "gate", ""), rows)


LADDER_COLUMNS = ("tokens", "seconds", "Phase 1 tok/s", "Phase 2 tok/s", "peak MB", "ER train", "ER val", "untrained", "ceiling", "sweeps", "cold error", "horizon", "val ppl", "untrained", "bigram", "check")  # fmt: skip


def ladder_row(summary):
    """One budget as a row of the ladder's table."""
    s = summary
    return (
        f"{s['train_tokens']:,}", f"{s['seconds']:.0f}", f"{s['tok_per_s_phase1']:,.0f}", f"{s['tok_per_s_phase2']:,.0f}",
        f"{s['peak_memory_mb']:,.0f}", f"{s['er_train']:.1%}", f"{s['er_val']:.1%}", f"{s['er_val_untrained']:.1%}", f"{s['er_ceiling']:.1%}",
        s["sweeps_to_convergence"] or "never", f"{s['cold_start_error_10']:.2g}", s["memory_horizon"], f"{s['val_ppl']:.1f}",
        f"{s['val_ppl_untrained_context']:.1f}", f"{s['val_ppl_bigram']:.1f}",
        "PASS" if all(c.passed for c in check(s)) else "FAIL",
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
    grown = {key: summaries[-1][key] / summaries[0][key] for key in ("train_tokens", "seconds", "peak_memory_mb")}
    return [
        f"time = {time.text('s')}, R^2 {time.r_squared:.4f}",
        f"peak memory = {memory.text('MB')}, R^2 {memory.r_squared:.4f}",
        f"from the smallest budget to the largest: tokens x{grown['train_tokens']:.1f}, time x{grown['seconds']:.1f}, "
        f"peak memory x{grown['peak_memory_mb']:.2f}",
    ]

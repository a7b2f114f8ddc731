"""Scale check: train at one budget, or at each of a ladder, and hold the figures against the gates.

    python3 test.py                       # the budget of config.py
    python3 test.py --num_samples 78      # every setting is a flag, as in train.py
    python3 test.py --ladder              # 50, 78, 195, 390 and 781 samples, each in a process of its own
    python3 test.py --ladder 195,1953     # other numbers of samples

Each budget is a run like those of train.py, in the same checkpoint_dir: one that is complete reports at
once, one that was cut off goes on. A ladder also says how time and memory grow with the tokens, and draws it
in outputs/plots of checkpoint_dir. The exit status is 0 when every criterion passes and 1 otherwise.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.errors import exit_on_user_error
from newllm.flags import parse_args
from newllm.report.compare import scale_lines, table
from newllm.report.pictures import scale_ladder
from newllm.report.record import new_run_id
from newllm.report.series import make_series, whole_numbers
from newllm.saving.files import usable_folder
from newllm.saving.stop import Interrupt

LADDER = (50, 78, 195, 390, 781)  # samples
GUIDE_PEAK_MB = 5441  # the guide's memory table for 100k tokens at full size


@dataclass(frozen=True)
class Gate:
    """A figure that must lie on one side of a limit, beside its untrained value.

    Attributes:
        figure: its key in a run's summary. limit: a number or another key.
        untrained: a number or a key likewise; None: `FIGURE_untrained`, if there is such a one.
    """

    label: str
    figure: str
    side: str
    limit: float | str
    untrained: float | str | None = None

    def row(self, summary):
        """(label, value, untrained value, gate, verdict) as text; None for a run that has no such figure."""
        beside = f"{self.figure}_untrained" if self.untrained is None else self.untrained
        value, limit, untrained = (number(summary, key) for key in (self.figure, self.limit, beside))
        if value is None or limit is None:
            return None
        verdict = "PASS" if self.passes(value, limit) else "FAIL"
        if verdict == "PASS" and untrained is not None and self.passes(untrained, limit):
            verdict = "PASS, untrained too"  # so it says nothing about training
        return self.label, shown(value), shown(untrained), f"{self.side} {shown(limit)}", verdict

    def passes(self, value, limit):
        return value > limit if self.side == ">" else value < limit


def number(summary, key):
    return summary.get(key) if isinstance(key, str) else key


def shown(value):
    return "" if value is None else f"{value:.4g}"


CONTROL = "val_ppl_untrained_context"
GATES = (
    Gate("Phase 1 optimizer steps", "phase1_steps", ">", 0, untrained=0),
    Gate("Phase 1 relative parameter change", "phase1_param_change", ">", 0, untrained=0),
    Gate("effective rank, training", "er_train", ">", 0.85),
    Gate("effective rank, validation", "er_val", ">", 0.75),
    Gate("effective rank above untrained", "er_val", ">", "er_val_untrained"),
    Gate("tokens converged after 10 cold sweeps", "converged_ratio", ">", 0.95),
    Gate("cold-start error after 10 sweeps", "cold_start_error_10", "<", 0.05),
    Gate("val perplexity below untrained contexts", "val_ppl", "<", CONTROL, CONTROL),
    Gate("val perplexity below the bigram", "val_ppl", "<", "val_ppl_bigram", CONTROL),
    Gate("peak memory, MB", "peak_memory_mb", "<", GUIDE_PEAK_MB),
)
LADDER_COLUMNS = (  # header, key of the summary, format
    ("tokens", "train_tokens", ","),
    ("seconds", "seconds", ".0f"),
    ("Phase 1 tok/s", "tok_per_s_phase1", ",.0f"),
    ("Phase 2 tok/s", "tok_per_s_phase2", ",.0f"),
    ("peak MB", "peak_memory_mb", ",.0f"),
    ("ER train", "er_train", ".1%"),
    ("ER val", "er_val", ".1%"),
    ("untrained", "er_val_untrained", ".1%"),
    ("ceiling", "er_ceiling", ".1%"),
    ("sweeps", "sweeps_to_convergence", ""),
    ("cold error", "cold_start_error_10", ".2g"),
    ("horizon", "memory_horizon", ""),
    ("val ppl", "val_ppl", ".1f"),
    ("untrained", "val_ppl_untrained_context", ".1f"),
    ("bigram", "val_ppl_bigram", ".1f"),
)
FINAL_DIFF = (
    "final_diff: the guide's gate on the change of the last sweep is left out, because contexts that change "
    "little may still lie far from the trajectory; the cold-start error, the distance to it, stands for "
    "that gate"
)
MEANING = (
    "FAIL: at least one figure misses its gate, so what this run shows is not what the method promises; "
    "nothing is broken.\nWhat helps: perplexity: more tokens (--num_samples 781; below 25k tokens counting "
    "beats most networks); rank, convergence, cold start: more --phase1_max_iterations or another "
    "--dist_reg_weight (docs/running.md)"
)


def main(config, ladder=()):
    """Train and check.

    Args:
        ladder: numbers of samples, ascending; without any the budget of the configuration alone.

    Returns:
        Whether every criterion passed.
    """
    summaries = climb(config, ladder) if ladder else [train.main(config)]
    for summary in summaries:
        print(f"\n== {summary['train_tokens']:,} tokens, {summary['data_source']}, {summary['tokenizer']} ==")
        print("\n".join(table(("criterion", "value", "untrained", "gate", ""), check(summary))))
    header = [*(name for name, _, _ in LADDER_COLUMNS), "check"]
    print("\n" + "\n".join(table(header, map(ladder_row, summaries))))
    if len(summaries) > 1:
        print("\n" + "\n".join(scale_lines(summaries)))
        draw(
            summaries, Path(config.checkpoint_dir) / "outputs" / "plots" / f"scale_ladder_{new_run_id()}.png"
        )
    if any("cold_start_error_10" in summary for summary in summaries):
        print(f"\n{FINAL_DIFF}")
    passed = all(passes(summary) for summary in summaries)
    print("\nPASS" if passed else f"\n{MEANING}\n\nFAIL")
    return passed


def check(summary):
    """Rows of the gates whose figures a complete run's summary has."""
    rows = [gate.row(summary) for gate in GATES]
    return [row for row in rows if row]


def passes(summary):
    """Whether a run passes all gates that it has figures for."""
    return all(verdict != "FAIL" for *_, verdict in check(summary))


def ladder_row(summary):
    """One budget as a row of the ladder's table; empty where the run has no such figure."""
    cells = []
    for _, key, form in LADDER_COLUMNS:
        missing = "never" if key == "sweeps_to_convergence" and key in summary else ""
        cells.append(missing if summary.get(key) is None else format(summary[key], form))
    return [*cells, "PASS" if passes(summary) else "FAIL"]


def draw(summaries, path):
    """A folder that refuses costs the picture, not the verdict."""
    try:
        scale_ladder(summaries, path)
        print(f"plot: {path}")
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror or error})")


def climb(config, ladder):
    """The summaries of all budgets, each trained by a process of its own, so that peak memory is its own.

    Raises:
        UserError: a budget failed.
        Stopped: a signal or max_minutes ended the ladder early.
    """
    for name in sorted({"num_samples", "num_tokens"} & set(config.given)):
        print(f"note: {name} {config.given[name]} has no effect: --ladder gives each budget its own")
    folder = usable_folder(config.checkpoint_dir, "checkpoint_dir")
    budgets = {f"samples_{samples}": {"size": samples, "folder": "."} for samples in ladder}

    def work(name):
        # The time limit is the ladder's: a stop is passed on to the run.
        own = dataclasses.replace(config, num_samples=budgets[name]["size"], max_minutes=0.0)
        return call_apart(train.main, own)

    with Interrupt(config.max_minutes):
        return make_series(folder, budgets, work)


def flags(parser):
    """The command's own flag."""
    default = ",".join(map(str, LADDER))
    options = dict(nargs="?", const=LADDER, default=(), type=whole_numbers("--ladder"), metavar="SAMPLES,...")
    parser.add_argument("--ladder", **options, help=f"several budgets, by default {default} samples")


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags)
        sys.exit(0 if main(config, arguments.ladder) else 1)

"""Scale check: train at one budget, or at each of a ladder, and hold the figures against the gates.

    python3 test.py                       # the budget of config.py
    python3 test.py --num_samples 78      # every setting is a flag, as in train.py
    python3 test.py --ladder              # 50, 78, 195, 390 and 781 samples, each in a process of its own
    python3 test.py --ladder 195,1953     # other numbers of samples

Each budget is a run like those of train.py, in the same checkpoint_dir: one that is complete reports at
once, one that was cut off goes on. A ladder also says how time and memory grow with the tokens and where the
network passes counting, and draws both in outputs/plots of checkpoint_dir. A bpe tokenizer is another one at
each budget, so perplexities of one budget compare, and bits per byte of several. The exit status is 0 when
every criterion passes and 1 otherwise.
"""

import dataclasses
import math
import operator
import sys
from pathlib import Path

import numpy as np

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.errors import exit_on_user_error
from newllm.flags import numbers, parse_args
from newllm.report.compare import figures_table, scale_lines, table
from newllm.report.pictures import scale_ladder
from newllm.report.record import new_run_id, shown
from newllm.report.series import make_series
from newllm.saving.files import usable_folder
from newllm.saving.stop import Interrupt

LADDER = (50, 78, 195, 390, 781)  # samples
CONTROL = "val_ppl_untrained_context"
COUNTING, UNTRAINED_TOO = "val_ppl_retrieval_counting", "val_ppl_retrieval_untrained"
KEYS = "val_ppl_retrieval_untrained_contexts"
EARNED = ((6_400, 0.02), (25_000, 0.08), (100_000, 0.20))  # training tokens, share of perplexity


def earned(summary):
    """Perplexity that retrieval must reach with the network: so far below the same without any network.

    The share grows with the logarithm of the training tokens, from the first of EARNED to the last.
    """
    if COUNTING not in summary:
        return None
    tokens, shares = zip(*EARNED, strict=True)
    return summary[COUNTING] * (1 - np.interp(math.log(summary["train_tokens"]), np.log(tokens), shares))


def good_keys(summary):
    """Perplexity that retrieval by Phase 1's contexts alone must reach: a tenth below untrained contexts."""
    return 0.9 * summary[KEYS] if KEYS in summary else None


# Criterion, figure, side, limit, untrained value: numbers, keys of a run's summary, or functions of it.
GATES = (
    ("Phase 1 optimizer steps", "phase1_steps", ">", 0, 0),
    ("Phase 1 relative parameter change", "phase1_param_change", ">", 0, 0),
    ("effective rank, training", "er_train", ">", 0.85, "er_train_untrained"),
    ("effective rank, validation", "er_val", ">", 0.75, "er_val_untrained"),
    ("effective rank above untrained", "er_val", ">", "er_val_untrained", "er_val_untrained"),
    ("tokens converged after 10 cold sweeps", "converged_ratio", ">", 0.95, "converged_ratio_untrained"),
    # Not by how little a sweep changes contexts: such contexts may still lie far from the trajectory.
    ("cold-start error after 10 sweeps", "cold_start_error_10", "<", 0.05, "cold_start_error_10_untrained"),
    ("val perplexity below untrained contexts", "val_ppl", "<", CONTROL, CONTROL),
    ("val perplexity below the bigram", "val_ppl", "<", "val_ppl_bigram", CONTROL),
    ("with retrieval, below counting by 2 to 20 %", "val_ppl_retrieval", "<", earned, UNTRAINED_TOO),
    ("Phase 1's contexts as keys, 10 % better", "val_ppl_retrieval_phase1_contexts", "<", good_keys, KEYS),
    ("peak memory, MB", "peak_memory_mb", "<", 5441, None),  # of 100k tokens at full size
)
LADDER_COLUMNS = (  # title, key of the summary, format
    ("tokens", "train_tokens", ","),
    ("seconds", "seconds", ".0f"),
    ("Phase 1 tok/s", "tok_per_s_phase1", ",.0f"),
    ("Phase 2 tok/s", "tok_per_s_phase2", ",.0f"),
    ("retrieval s", "seconds_retrieval", ".0f"),
    ("peak MB", "peak_memory_mb", ",.0f"),
    ("ER train", "er_train", ".1%"),
    ("ER val", "er_val", ".1%"),
    ("ER untrained", "er_val_untrained", ".1%"),
    ("ceiling", "er_ceiling", ".1%"),
    ("sweeps", "sweeps_to_convergence", ""),
    ("cold error", "cold_start_error_10", ".2g"),
    ("horizon", "memory_horizon", ""),
    ("val ppl", "val_ppl", ".1f"),
    ("counting", "val_ppl_kn", ".1f"),
    ("with retrieval", "val_ppl_retrieval", ".1f"),
    ("counting with retrieval", COUNTING, ".1f"),
    ("bits per byte", "val_bpb_retrieval", ".3f"),
    ("untrained contexts", CONTROL, ".1f"),
    ("bigram", "val_ppl_bigram", ".1f"),
    ("check", "check", ""),
)
MEANING = (
    "FAIL: at least one figure misses its gate, so what this run shows is not what the method promises; "
    "nothing is broken.\nWhat helps: perplexity: more tokens (--num_samples 781; below 25k tokens counting "
    "beats most networks); rank, convergence, cold start: more --phase1_max_iterations or another "
    "--dist_reg_weight (docs/running.md)"
)


def main(config, ladder=()):
    """Train and check; whether every criterion passed.

    ladder: numbers of samples, ascending; without any the budget of the configuration alone.
    """
    summaries = climb(config, ladder) if ladder else [train.main(config)]
    for summary in summaries:
        print(f"\n== {summary['train_tokens']:,} tokens, {summary['data_source']}, {summary['tokenizer']} ==")
        print("\n".join(table(("criterion", "value", "untrained", "gate", ""), check(summary))))
    print("", *figures_table(LADDER_COLUMNS, map(ladder_row, summaries)), sep="\n")
    if len(summaries) > 1:
        print("\n" + "\n".join(scale_lines(summaries)))
        path = Path(config.checkpoint_dir, "outputs", "plots", f"scale_ladder_{new_run_id()}.png")
        scale_ladder(summaries, path)
        print(f"plot: {path}")
    passed = all(passes(summary) for summary in summaries)
    print("\nPASS" if passed else f"\n{MEANING}\n\nFAIL")
    return passed


def check(summary):
    """(criterion, value, untrained value, gate, verdict) of each gate whose figure a run's summary has."""
    rows = []
    for criterion, figure, side, *others in GATES:
        value = summary.get(figure)
        limit, untrained = (figure_of(summary, other) for other in others)
        if value is None or limit is None:
            continue
        beyond = operator.gt if side == ">" else operator.lt
        verdict = "PASS" if beyond(value, limit) else "FAIL"
        if verdict == "PASS" and untrained is not None and beyond(untrained, limit):
            verdict = "PASS, untrained too"  # so it says nothing about training
        value, untrained, limit = (shown(number, ".4g") for number in (value, untrained, limit))
        rows.append((criterion, value, untrained, f"{side} {limit}", verdict))
    return rows


def figure_of(summary, what):
    """A number as it is, that of a key, or what a function makes of a run's summary; None: it has none."""
    if callable(what):
        return what(summary)
    return summary.get(what) if isinstance(what, str) else what


def passes(summary):
    """Whether a run passes all gates that it has figures for."""
    return all(verdict != "FAIL" for *_, verdict in check(summary))


def ladder_row(summary):
    """A budget's summary as the ladder's table shows it."""
    row = summary | {"check": "PASS" if passes(summary) else "FAIL"}
    if "sweeps_to_convergence" in row:
        row["sweeps_to_convergence"] = row["sweeps_to_convergence"] or "never"
    return row


def climb(config, ladder):
    """The summaries of all budgets, each trained by a process of its own, so that peak memory is its own.

    UserError where a budget failed.
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
    options = dict(nargs="?", const=LADDER, default=(), type=numbers("ladder"), metavar="SAMPLES,...")
    parser.add_argument("--ladder", **options, help=f"several budgets, by default {default} samples")


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags)
        sys.exit(0 if main(config, arguments.ladder) else 1)

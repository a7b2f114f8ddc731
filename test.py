"""Scale check: train from scratch at one budget, or at each of the ladder, and hold the figures against the gates.

    python3 test.py                       # the budget of config.py
    python3 test.py --num_samples 78      # every setting is a flag, as in train.py
    python3 test.py --ladder              # 50, 78, 195, 390 and 781 samples, each from scratch in a process of its own
    python3 test.py --ladder 195,1953     # other numbers of samples

A ladder also says how time and memory grow with the tokens, and draws it in outputs/plots of checkpoint_dir. One that was
cut off is continued by the same command: sweep_state.json in checkpoint_dir holds what is done, and the budget in hand goes
on from its own checkpoint. The exit status is 0 when every criterion passes and 1 otherwise. What one budget leaves lies in
scale_check in checkpoint_dir, so that a trained run's status, report and export stay what they are.
"""

import dataclasses
import sys
from pathlib import Path

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import parse_args
from newllm.errors import UserError, exit_on_user_error
from newllm.report.criteria import (
    FINAL_DIFF,
    LADDER_COLUMNS,
    MEANING,
    check,
    criteria_table,
    ladder_row,
    scale_lines,
    table,
)
from newllm.report.plots import scale_ladder
from newllm.report.runlog import new_run_id
from newllm.report.summary import plain
from newllm.report.sweep import Sweep
from newllm.saving.files import usable_folder
from newllm.saving.guard import FolderLock
from newllm.saving.runs import shaping
from newllm.saving.stop import Interrupt

LADDER = (50, 78, 195, 390, 781)  # samples


def main(config, ladder=False):
    """Train and check.

    Args:
        ladder: numbers of samples, ascending, True for those of LADDER; else the budget of the configuration alone.

    Returns:
        Whether every criterion passed.
    """
    if ladder:
        summaries = climb(config, LADDER if ladder is True else ladder)
    else:
        own = dict(checkpoint_dir=str(Path(config.checkpoint_dir) / "scale_check"), backup_dir="")
        summaries = [
            train.main(dataclasses.replace(config, save_checkpoint=False, load_checkpoint=False, **own))
        ]
    for summary in summaries:
        print(f"\n== {summary['train_tokens']:,} tokens, {summary['data_source']}, {summary['tokenizer']} ==")
        print("\n".join(criteria_table(check(summary))))
    print("\n" + "\n".join(table(LADDER_COLUMNS, map(ladder_row, summaries))))
    if len(summaries) > 1:
        print("\n" + "\n".join(scale_lines(summaries)))
        draw(
            summaries, Path(config.checkpoint_dir) / "outputs" / "plots" / f"scale_ladder_{new_run_id()}.png"
        )
    if any("cold_start_error_10" in summary for summary in summaries):
        print(f"\n{FINAL_DIFF}")
    passed = all(criterion.passed for summary in summaries for criterion in check(summary))
    print("\nPASS" if passed else f"\n{MEANING}\n\nFAIL")
    return passed


def draw(summaries, path):
    """A folder that refuses costs the picture, not the verdict."""
    try:
        scale_ladder(summaries, path)
        print(f"plot: {path}")
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror or error})")


def climb(config, ladder):
    """The summaries of all budgets; what an earlier, interrupted ladder has done is not done again.

    Raises:
        UserError: the folder holds another ladder, or a budget failed.
        Stopped: a signal or max_minutes ended the ladder early.
    """
    for name in sorted({"num_samples", "num_tokens", "keep_last", "backup_dir"} & set(config.given)):
        print(f"note: {name} {config.given[name]} has no effect: --ladder gives each budget its own")
    folder = usable_folder(config.checkpoint_dir, "checkpoint_dir")
    settings = shaping(config.to_dict(), "budget")

    def work(run):
        # One backup_dir cannot mirror several runs; the time limit is the ladder's, and a stop is passed on to the run.
        own = dict(
            num_samples=run["size"], checkpoint_dir=run["folder"], keep_last=0, backup_dir="", max_minutes=0.0
        )
        return plain(call_apart(train.main, dataclasses.replace(config, **own)))

    with Interrupt(config.max_minutes), FolderLock(folder, "ladder"):
        sizes = {f"samples_{size}": size for size in ladder}
        return Sweep(folder, settings, sizes, fresh=not config.load_checkpoint).finish(work)


def sizes(text):
    """`195,1953` -> (195, 1953), ascending.

    Raises:
        UserError: something else than different positive integers.
    """
    try:
        found = sorted(int(part) for part in text.split(","))
    except ValueError:
        found = []
    if not found or found[0] < 1 or len(set(found)) < len(found):
        raise UserError(
            f"--ladder takes numbers of samples, positive and each once, like 195,1953,3906, not '{text}'."
        )
    return tuple(found)


def add_ladder(parser):
    parser.add_argument(
        "--ladder",
        nargs="?",
        const=True,
        default=False,
        type=sizes,
        metavar="SAMPLES,...",
        help=f"several budgets, by default {','.join(map(str, LADDER))} samples",
    )


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=add_ladder)
        sys.exit(0 if main(config, arguments.ladder) else 1)

"""Scale check: train from scratch at one budget, or at each of the ladder, and hold the figures against the gates.

    python3 test.py                       # the budget of config.py
    python3 test.py --num_samples 78      # every setting is a flag, as in train.py
    python3 test.py --ladder              # 50, 78, 195, 390 and 781 samples, each from scratch in a process of its own

The exit status is 0 when every criterion passes and 1 otherwise.
"""

import dataclasses
import multiprocessing
import sys

import train
from config import ResidualConfig
from newllm.config import parse_args
from newllm.errors import exit_on_user_error
from newllm.reporting.criteria import LADDER_COLUMNS, check, criteria_table, ladder_row, table

LADDER = (50, 78, 195, 390, 781)


def main(config, ladder=False):
    """Train and check.

    Returns:
        Whether every criterion passed.
    """
    scratch = dataclasses.replace(config, save_checkpoint=False, load_checkpoint=False, phase="both")
    if ladder:
        configs = [dataclasses.replace(scratch, num_samples=size) for size in LADDER]
        # A process of its own gives each budget its own peak memory.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            summaries = pool.map(train.main, configs, chunksize=1)
    else:
        summaries = [train.main(scratch)]
    for summary in summaries:
        print(f"\n== {summary['train_tokens']:,} tokens, {summary['data_source']}, {summary['tokenizer']} ==")
        print("\n".join(criteria_table(check(summary))))
    print("\n" + "\n".join(table(LADDER_COLUMNS, map(ladder_row, summaries))))
    passed = all(criterion.passed for summary in summaries for criterion in check(summary))
    print("\nPASS" if passed else "\nFAIL")
    return passed


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(
            ResidualConfig,
            description=__doc__.splitlines()[0],
            extra=lambda parser: parser.add_argument("--ladder", action="store_true", help="all budgets of the ladder"),
        )
        sys.exit(0 if main(config, arguments.ladder) else 1)

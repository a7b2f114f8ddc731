"""What a folder of runs holds, how a run went, how fast, and how two runs differ.

    python3 -m scripts.report                        # the latest run, so far or complete, and what lies in the folder
    python3 -m scripts.report RUN                    # another one: its id, its metrics_*.jsonl, or another folder of runs
    python3 -m scripts.report RUN OTHER              # two side by side, also of two folders
    python3 -m scripts.report --remake               # tables, pictures and page once more, from the record
    python3 -m scripts.report --runs                 # the runs whose checkpoints lie in the folder; --remove RUN_ID: without one

All but the list of checkpoints comes from the records that runs write; no model is loaded.
"""

from pathlib import Path

from config import ResidualConfig
from newllm.config import Parser, expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.report.artifacts import (
    complete,
    find_run,
    runs_in,
    so_far_lines,
    speed_lines,
    summary_lines,
    write_artifacts,
)
from newllm.report.criteria import table
from newllm.report.runlog import format_value
from newllm.report.status import read_status
from newllm.saving.files import Corrupt, verify_seal
from newllm.saving.runs import remove, run_rows

PATTERNS = {
    "model checkpoints": "models/*.pth",
    "training plots": "outputs/plots/*.png",
    "pages": "outputs/*.html",
    "training summaries": "logs/training_summary_*.txt",
}


def main(arguments=None):
    """Print what is asked for."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id of a run, or of two; none: the latest")
    parser.add_argument(
        "--checkpoint_dir", type=expanded, default=ResidualConfig().checkpoint_dir, help="folder of the runs"
    )
    parser.add_argument("--remake", action="store_true", help="make the artefacts of the run again")
    parser.add_argument(
        "--runs", dest="list", action="store_true", help="list the runs whose checkpoints lie in the folder"
    )
    parser.add_argument(
        "--remove", metavar="RUN_ID", help="delete the checkpoints of a run beside the one in use"
    )
    options = parser.parse_args(arguments)
    if options.list or options.remove:
        list_runs(options.checkpoint_dir, options.remove)
        return
    if len(options.runs) > 2:
        raise UserError("name one run, or two to compare.")
    folder = options.checkpoint_dir
    chosen = [find_run(folder, run) for run in options.runs] or runs_in(folder)[-1:]
    if len(chosen) == 2:
        print("\n".join(compare(*(complete([record], record.path)[0] for record in chosen))))
        return
    if options.remake:
        try:
            written = write_artifacts(chosen[0])
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{error.filename} cannot be written ({reason}): make room and run it again."
            ) from error
        print("\n".join(f"{name}: {path}" for name, path in written.items()))
        return
    folder = chosen[0].folder.parent
    records = [record for record in runs_in(folder) if record.summary]
    blocks = [so_far(chosen[0], folder, records)] * (not chosen[0].summary)
    for record in chosen if chosen[0].summary else records[-1:] * (not options.runs):
        blocks += [summary_lines(record), speed_lines(record)]
    for lines in (*blocks, listing(folder, records)):
        print("\n".join(lines) + "\n")


def list_runs(folder, removed):
    """The runs of a folder in a table, after one of them has been deleted."""
    if removed:
        print(f"run {removed} is deleted, its record is kept: {remove(folder, removed) / 1e6:.1f} MB freed")
    columns = "run", "state", "val ppl", "MB", "last save", "settings that differ from the run at the top"
    print("\n".join(table(columns, run_rows(folder))))


def so_far(record, folder, complete_runs):
    """Lines about a run that is under way or was cut off."""
    try:
        status = read_status(folder)
    except UserError:  # the record alone says something too
        status = {}
    mine = status if status.get("run_id") == record.run else {}
    return so_far_lines(record, mine, complete_runs[-1] if complete_runs else None)


def listing(folder, records):
    """Artefacts below a folder: how many of each kind, models with their size and whether they are whole, and all the room."""
    folder, lines = Path(folder), ["ARTEFACTS IN " + str(folder)]
    for kind, pattern in PATTERNS.items():
        paths = sorted(
            [*folder.glob(f"*/{pattern}"), *folder.glob(pattern)]
        )  # ladders and prefill have no data's folder
        lines.append(f"Found {len(paths)} {kind}")
        if pattern.endswith(".pth"):
            lines += [f"  {path} {path.stat().st_size / 1e6:.1f} MB {digest(path)}" for path in paths]
    lines.append(f"Complete runs: {', '.join(record.run for record in records) or 'none'}")
    sizes = {
        (stat.st_dev, stat.st_ino): stat.st_size
        for stat in map(Path.stat, folder.rglob("*"))
        if stat.st_nlink
    }
    lines.append(f"Size of the folder: {sum(sizes.values()) / 1e6:.1f} MB")
    return lines


def digest(path):
    """What a file's checksum says: its beginning where it is right, else that the file is damaged."""
    try:
        return f"sha256 {verify_seal(path)[:12]}"
    except (Corrupt, OSError):
        return "DAMAGED: it does not match its checksum"


def compare(one, other):
    """Two runs beside each other: settings that differ, then every figure with the ratio of the second to the first."""
    settings = [
        (name, format_value(one.config.get(name)), format_value(other.config.get(name)))
        for name in one.config | other.config
        if one.config.get(name) != other.config.get(name)
    ]
    figures = []
    for name in one.summary | other.summary:
        pair = one.summary.get(name), other.summary.get(name)
        if name not in one.config and all(isinstance(value, int | float) for value in pair):
            figures.append((name, *map(format_value, pair), f"{pair[1] / pair[0]:.3f}" if pair[0] else ""))
    names = (one.run, other.run) if one.run != other.run else (str(one.path), str(other.path))
    lines = table(("settings that differ", *names), settings) if settings else ["the settings are the same"]
    return [*lines, "", *table(("figure", *names, "ratio"), figures)]


if __name__ == "__main__":
    with exit_on_user_error():
        main()

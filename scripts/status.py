"""Where a run or a series of runs is: phase, epoch, batch, best loss, last checkpoint, speed, ETA.

    python3 -m scripts.status [--checkpoint_dir DIR] [--json]

Reads a small file; works while training runs, on any machine that sees the folder. Of a ladder or a
comparison it tells the runs done and remaining, the time, and where the run in hand is.
"""

import json
from pathlib import Path

from config import ResidualConfig
from newllm.config import expanded
from newllm.errors import exit_on_user_error
from newllm.flags import Parser
from newllm.report.record import STATUS_NAME, read_status, status_lines
from newllm.report.series import progress_line, read_series


def main(arguments=None):
    """Print the status of the run or the series of runs in a folder."""
    parser = Parser(description=__doc__.splitlines()[0])
    default = ResidualConfig().checkpoint_dir
    parser.add_argument("--checkpoint_dir", type=expanded, default=default, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    folder, series, lines = Path(options.checkpoint_dir), read_series(options.checkpoint_dir), []
    if series:
        lines = [f"{progress_line(series)} ({series['state']})"]
        for run in series["runs"]:
            lines.append(f"  {run['name']}: {run['status']}")
            if run["status"] == "running":
                folder = folder / run["folder"]
    fields = read_status(folder) if not series or (folder / STATUS_NAME).exists() else {}
    if options.json:
        print(json.dumps(fields | ({"series": series} if series else {})))
    else:
        print("\n".join(lines + (status_lines(fields) if fields else [])))


if __name__ == "__main__":
    with exit_on_user_error():
        main()

"""Where a run or a sweep is: phase, epoch, batch, progress, best loss, age of the last checkpoint, speed, ETA.

    python3 -m scripts.status [--checkpoint_dir DIR] [--json]

Reads a small file; works while training runs, on any machine that sees the folder. Of a sweep (`test.py --ladder`) it
tells the runs done and remaining, the time, and where the run in hand is.
"""

import json
from pathlib import Path

from config import ResidualConfig
from newllm.config import expanded
from newllm.errors import exit_on_user_error
from newllm.flags import Parser
from newllm.report.record import STATUS_NAME, read_status, status_lines
from newllm.report.sweep import read_sweep, sweep_lines


def main(arguments=None):
    """Print the status of the run or the sweep in a folder."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint_dir", type=expanded, default=ResidualConfig().checkpoint_dir, help="folder of the run"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    folder, sweep = Path(options.checkpoint_dir), read_sweep(options.checkpoint_dir)
    if sweep:
        folder = next((folder / run["name"] for run in sweep["runs"] if run["status"] == "running"), folder)
    fields = read_status(folder) if not sweep or (folder / STATUS_NAME).exists() else {}
    if options.json:
        print(json.dumps(fields | ({"sweep": sweep} if sweep else {})))
    else:
        print("\n".join((sweep_lines(sweep) if sweep else []) + (status_lines(fields) if fields else [])))


if __name__ == "__main__":
    with exit_on_user_error():
        main()

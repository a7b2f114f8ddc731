"""Where a run is: phase, epoch, batch, progress, best loss, age of the last checkpoint, speed, ETA.

    python3 -m scripts.status [--checkpoint_dir DIR] [--json]

Reads a small file; works while training runs, on any machine that sees the folder.
"""

import argparse
import json

from config import ResidualConfig
from newllm.errors import exit_on_user_error
from newllm.reporting.status import read_status, status_lines


def main(arguments=None):
    """Print the status of the run in a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_dir", default=ResidualConfig.checkpoint_dir, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    fields = read_status(options.checkpoint_dir)
    print(json.dumps(fields) if options.json else "\n".join(status_lines(fields)))


if __name__ == "__main__":
    with exit_on_user_error():
        main()

"""The record of a run: one JSON object a line in metrics_{run}.jsonl. What the console shows is a view of it."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

from newllm.reporting.status import StatusFile
from newllm.storage import usable_folder


def new_run_id():
    return datetime.now(UTC).strftime("%Y%m%d_%H%M%S")


class RunLog:
    """Appends rows to `<checkpoint_dir>/<dataset>/logs/metrics_{run}.jsonl` and prints lines.

    Args:
        checkpoint_dir: root of everything a run writes.
        dataset: short name of the data source.
        run_id: a new id, or that of the run being continued.
        writes: whether this process keeps the record; of several that train together one does.

    Attributes:
        follow: function of (stage, values) that gets every row too.
    """

    def __init__(self, checkpoint_dir, dataset, run_id, writes=True):
        self.run_id, self.writes = run_id, writes
        self.folder = usable_folder(Path(checkpoint_dir) / dataset / "logs", "logs")
        self.path = self.folder / f"metrics_{run_id}.jsonl"
        self._status = StatusFile(checkpoint_dir, run_id=run_id)
        self.follow = lambda stage, values: None
        self._warned = False

    def log(self, stage, **values):
        """Append one row; NaN and infinity become null, so that any JSON reader takes the file.

        A disk that refuses costs rows, not the run: the first time is said, and rows are written again when it allows.
        """
        if not self.writes:
            return
        row = dict(time=datetime.now(UTC).isoformat(timespec="seconds"), stage=stage, **values)
        try:
            _append_line(self.path, json.dumps(_plain(row)).encode())
        except OSError as error:
            if not self._warned:
                reason = error.strerror or error
                self.say(f"warning: {self.path} cannot be written ({reason}); training goes on, its record has a gap")
            self._warned = True
        self.follow(stage, values)

    def status(self, progress, **position):
        """Tell the status file where a loop is.

        Args:
            progress: the loop's Progress; position: stage, epoch, epochs, batch, batches, saved_at, best_val_loss.
        """
        if not self.writes:
            return
        left = (progress.total - progress.done) / max(progress.speed, 1e-9)
        counts = {
            "tokens_done": progress.done,
            "tokens_total": progress.total,
            "tok_per_s": progress.speed,
            "eta_s": left,
        }
        self._status.update(**counts, **position)

    def warn(self, line):
        """Print a line about something survived, and keep it in the record."""
        self.say(line)
        self.log("warning", message=line)

    @staticmethod
    def say(line=""):
        print(line, flush=True)

    def finish(self, summary):
        """Print the summary as the closing `---` block of `key: value` lines."""
        if self.writes:
            self._status.update(now=True, state="complete")
        self.say("---")
        for key, value in summary.items():
            self.say(f"{key}: {format_value(value)}")


def read_rows(path):
    """Rows of a record in order; a line that a crash or a full disk left unfinished is skipped."""
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield row


def format_value(value):
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _append_line(path, line):
    """Add a line, on a line of its own even where a crash or a full disk left the last one unfinished."""
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        unfinished = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * unfinished + line + b"\n")


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

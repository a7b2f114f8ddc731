"""The record of a run: one JSON object a line in metrics_{run}.jsonl. What the console shows is a view of it."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from newllm.report.status import StatusFile
from newllm.saving.files import usable_folder

STAGES = {"untrained": "epoch", "phase1": "iteration", "phase2": "epoch"}  # and what counts their rows


def new_run_id():
    return datetime.now(UTC).strftime("%Y%m%d_%H%M%S")


class RunLog:
    """Appends rows to `<checkpoint_dir>/<dataset>/logs/metrics_{run}.jsonl` and prints lines.

    Args:
        checkpoint_dir: root of everything a run writes.
        dataset: short name of the data source.
        run_id: a new id, or that of the run being continued.
        writes: whether this process keeps the record; of several that train together one does.
        owns: function that says whether this process owns the folder: else it keeps away from its status file.
        gauge: function that returns the GPU's load of the last moments in per cent, or None; rows of epochs hold its mean.

    As a context manager it leaves word in the status file of why the run ended early.

    Attributes:
        follow: function of (stage, values) that gets every row too.
    """

    def __init__(self, checkpoint_dir, dataset, run_id, writes=True, owns=lambda: True, gauge=None):
        self.run_id, self.writes, self._gauge, self._loads = run_id, writes, gauge, []
        self.folder = usable_folder(Path(checkpoint_dir) / dataset / "logs", "logs")
        self.path = self.folder / f"metrics_{run_id}.jsonl"
        self._status = StatusFile(checkpoint_dir, owns, run_id=run_id)
        self.follow = lambda stage, values: None
        self._warned, self._lines = False, []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self.writes and kind:
            reason = " ".join(str(error).split()) or kind.__name__
            goes_on = "continues it" if self._status.owns() else "begins anew"
            self._status.update(now=True, state=f"stopped: {reason}; the same command {goes_on}")

    def _load(self):
        """[the GPU's load of the last moments], [] where nobody can say."""
        load = self._gauge and self._gauge()
        return [] if load is None else [load]

    def plan(self, stages):
        """Tell the status file what the run will do, as newllm.report.status.remaining takes it."""
        self._status.fields["plan"] = stages

    def log(self, stage, **values):
        """Append one row; NaN and infinity become null, so that any JSON reader takes the file.

        A disk that refuses costs rows, not the run: the first time is said, and rows are written again when it allows.
        """
        if not self.writes:
            return
        if stage in STAGES and (loads := self._loads or self._load()):
            values |= {"gpu_utilization": fmean(loads)}
            self._loads = []
        row = dict(time=datetime.now(UTC).isoformat(timespec="seconds"), stage=stage, **values)
        self._lines.append(json.dumps(_plain(row)))
        self._write(self._lines[-1])
        self.follow(stage, values)
        if stage in STAGES and "val_loss" in values:
            best = self._status.fields.get("best_val_loss")
            best = values["val_loss"] if best is None else min(best, values["val_loss"])
            self._status.update(now=True, best_val_loss=best)

    def _write(self, line):
        try:
            _append_line(self.path, line.encode())
        except OSError as error:
            if not self._warned:
                reason = error.strerror or error
                self.say(
                    f"warning: {self.path} cannot be written ({reason}); training goes on, its record has a gap"
                )
            self._warned = True

    def mend(self, lines):
        """Make the record whole: write those of a run's lines that it lacks, which were lost with a machine or a full disk.

        Args:
            lines: a list that checkpoints carry; each row of this session is added to it.
        """
        self._lines = lines
        try:
            present = set(self.path.read_text("utf-8", "replace").splitlines())
        except OSError:  # none yet, or none that can be read: writing says so
            present = set()
        missing = [line for line in lines if line not in present] if self.writes else []
        for line in missing:
            self._write(line)
        if missing:
            self.say(f"the record lacked {len(missing)} of its rows: they are back, from the checkpoint")

    def status(self, progress, **position):
        """Tell the status file where a loop is.

        Args:
            progress: the loop's Progress; position: stage, epoch, epochs, batch, batches, step, saved_at, best_val_loss.
        """
        if not self.writes:
            return
        if self._status.due and (loads := self._load()):
            self._loads += loads
            position["gpu_utilization"] = loads[0]
        left = (progress.total - progress.done) / max(progress.speed, 1e-9)
        counts = {
            "tokens_done": progress.done,
            "tokens_total": progress.total,
            "tok_per_s": progress.speed,
            "eta_s": left,
        }
        begins = position.get("stage") != self._status.fields.get("stage")
        self._status.update(begins, **{"best_val_loss": None} | counts | position)

    def warn(self, line):
        """Print a line about something survived, and keep it in the record."""
        self.say(line)
        self.log("warning", message=line)

    @staticmethod
    def say(line=""):
        print(line, flush=True)

    def finish(self, summary, **position):
        """Print the summary as the closing `---` block of `key: value` lines.

        Args:
            position: where the run is at its end, as in `status`.
        """
        if self.writes:
            self._status.update(now=True, state="complete", **position)
        self.say("---")
        for key, value in summary.items():
            self.say(f"{key}: {format_value(value)}")


def read_rows(path):
    """Rows of a record in order; a line that a crash or a full disk left unfinished is skipped."""
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
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

"""What a run writes down and what is read back: rows of JSON in metrics_RUN.jsonl, and status.json.

Console, tables, pictures and pages are views of it.
"""

import contextlib
import json
import math
import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import psutil

from newllm.errors import UserError
from newllm.saving.files import usable_folder, write_text

STAGES = {"untrained": "epoch", "phase1": "iteration", "phase2": "epoch"}  # and what counts their rows
STATUS_NAME = "status.json"
SECONDS_BETWEEN_WRITES = 2.0
SILENT = 600  # seconds without a word after which a run on another machine may be gone
CUT_OFF = "cut off; the same command continues it"
NOTHING_SAVED = "cut off before anything was saved; the same command begins anew"


def new_run_id():
    return datetime.now(UTC).strftime("%Y%m%d_%H%M%S")


class RunLog:
    """Appends rows to `<checkpoint_dir>/<dataset>/logs/metrics_{run}.jsonl` and prints lines.

    As a context manager it leaves word in the status file of why the run ended early. `follow`, a function of
    (stage, values), gets every row too.

    Args:
        run_id: a new id, or that of the run being continued.
        writes: whether this process keeps the record; of several that train together one does.
        owns: function that says whether this process owns the folder.
        gauge: function that returns the GPU's load in per cent, or None; rows of epochs hold its mean.
    """

    def __init__(self, checkpoint_dir, dataset, run_id, writes=True, owns=lambda: True, gauge=lambda: None):
        self.run_id = run_id
        self.writes = writes
        self.folder = usable_folder(Path(checkpoint_dir) / dataset / "logs", "logs")
        self.path = self.folder / f"metrics_{run_id}.jsonl"
        self.follow = lambda stage, values: None
        self._gauge = gauge
        self._loads = []
        self._lines = []
        self._warned = False
        self._status = StatusFile(checkpoint_dir, owns, run_id=run_id)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self.writes and kind:
            reason = " ".join(str(error).split()) or kind.__name__
            goes_on = "continues it" if self._status.owns() else "begins anew"
            self._status.update(now=True, state=f"stopped: {reason}; the same command {goes_on}")

    def plan(self, stages):
        """Tell the status file what the run will do, as `remaining` takes it."""
        self._status.fields["plan"] = stages

    def log(self, stage, **values):
        """Append one row; NaN and infinity become null, so that any JSON reader takes the file.

        A disk that refuses costs rows, not the run: that is said once, and later rows are written.
        """
        if not self.writes:
            return
        if stage in STAGES:
            loads = self._loads or [self._gauge()]
            self._loads = []
            if None not in loads:
                values["gpu_utilization"] = fmean(loads)
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "stage": stage, **values}
        finite = json.loads(json.dumps(row), parse_constant=lambda name: None)
        line = json.dumps(finite)
        self._lines.append(line)
        self._write(line)
        self.follow(stage, values)
        if stage in STAGES and "val_loss" in values:
            best = self._status.fields.get("best_val_loss")
            best = values["val_loss"] if best is None else min(best, values["val_loss"])
            self._status.update(now=True, best_val_loss=best)

    def _write(self, line):
        """Add a line, on a line of its own even where a crash or a full disk left the last one unfinished."""
        try:
            with open(self.path, "ab+") as file:
                file.seek(max(0, file.tell() - 1))
                start = b"" if file.read(1) in (b"", b"\n") else b"\n"
                file.write(start + line.encode() + b"\n")
        except OSError as error:
            if not self._warned:
                refused = f"{self.path} cannot be written ({error.strerror or error})"
                self.say(f"warning: {refused}; training goes on, its record has a gap")
            self._warned = True

    def mend(self, lines):
        """Write those of the lines that the record lacks, lost with a machine or by a full disk.

        Checkpoints carry this list; each row of this session is added to it.
        """
        self._lines = lines
        present = set()
        with contextlib.suppress(OSError):  # none yet, or none that can be read: writing says so
            present.update(self.path.read_text("utf-8", "replace").splitlines())
        missing = [line for line in lines if line not in present]
        if missing and self.writes:
            for line in missing:
                self._write(line)
            self.say(f"the record lacked {len(missing)} of its rows: they are back, from the checkpoint")

    def status(self, progress, **position):
        """Tell the status file where a loop is.

        Args:
            progress: the loop's Progress.
            position: stage, epoch, epochs, batch, batches, step, saved_at, best_val_loss.
        """
        if not self.writes:
            return
        load = self._gauge() if self._status.due else None
        if load is not None:
            self._loads.append(load)
            position["gpu_utilization"] = load
        begins = position.get("stage") != self._status.fields.get("stage")
        counts = {
            "tokens_done": progress.done,
            "tokens_total": progress.total,
            "tok_per_s": progress.speed,
            "eta_s": (progress.total - progress.done) / max(progress.speed, 1e-9),
        }
        self._status.update(begins, **{"best_val_loss": None} | counts | position)

    def warn(self, line):
        """Print a line about something survived, and keep it in the record."""
        self.say(line)
        self.log("warning", message=line)

    @staticmethod
    def say(line=""):
        print(line, flush=True)

    def finish(self, summary, **position):
        """Print the summary as the closing `---` block; `position` is where the run is at its end."""
        if self.writes:
            self._status.update(now=True, state="complete", **position)
        self.say("---")
        for key, value in summary.items():
            self.say(f"{key}: {format_value(value)}")


def format_value(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Record:
    """A run as its record tells it.

    Attributes:
        folder: of all artefacts of its data source.
        start: first row: device, data, versions, commit; config and plan as when something was last trained.
        untrained, phase1, phase2: {name: values by epoch or iteration}.
        summary, curves, times: the closing block, curves of contexts, seconds of all parts; {} until the end.
        sessions: how often it was started.
        warnings: what it survived.
    """

    run: str
    kind: str
    path: Path
    folder: Path
    start: dict
    config: dict
    untrained: dict
    phase1: dict
    phase2: dict
    summary: dict
    curves: dict
    times: dict
    sessions: int
    warnings: list


def read_rows(path):
    """Rows of a record in order; a line that a crash or a full disk left unfinished is skipped."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                yield json.loads(line)


def read_record(path):
    """A record; of rows that a run wrote twice, as it was cut off and did an epoch again, the last counts.

    UserError where the file cannot be read, or is none.
    """
    path = Path(path)
    starts, warnings, in_effect = [], [], {}
    rows = {stage: {} for stage in STAGES}
    last = {"summary": {}, "curves": {}, "times": {}}
    try:
        for row in read_rows(path):
            stage = row.pop("stage")
            if stage == "start":
                starts.append(row)
            elif stage == "warning":
                warnings.append(row["message"])
            elif stage in STAGES:
                rows[stage][row[STAGES[stage]]] = row
                in_effect = starts[-1] if starts else {}
            elif stage in last:
                last[stage] = row
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as the record of a run ({error!r}).") from error
    if not starts or "plan" not in starts[0]:
        raise UserError(f"{path} is no record of a run of this version: it does not say how the run began.")
    start = starts[0] | {
        name: in_effect[name] for name in ("config", "plan", "attention") if name in in_effect
    }
    columns = {}
    for stage, numbered in rows.items():
        names = next(iter(numbered.values()), {})
        columns[stage] = {name: [row.get(name) for _, row in sorted(numbered.items())] for name in names}
    return Record(
        run=path.stem.removeprefix("metrics_"),
        kind=start["config"]["model_type"],
        path=path,
        folder=path.parent.parent,
        start=start,
        config=start["config"],
        sessions=len(starts),
        warnings=warnings,
        **columns,
        **last,
    )


def as_curve(curve):
    """{x: y} of numbers, from a list that counts from 1 or a dict whose keys may be text; None of nothing."""
    if not curve:
        return None
    pairs = curve.items() if isinstance(curve, dict) else enumerate(curve, 1)
    return {float(x): y for x, y in pairs}


def find_records(folder):
    """Paths of all records below a checkpoint_dir, the newest run last."""
    return sorted(Path(folder).glob("*/logs/metrics_*.jsonl"), key=lambda path: (path.stem, path.as_posix()))


def runs_in(folder):
    """Records of the runs below a checkpoint_dir, the newest last; UserError where there is none."""
    records = []
    for path in find_records(folder):
        try:
            records.append(read_record(path))
        except UserError as error:
            print(f"warning: {error}")
    if not records:
        raise _no_run(folder)
    return records


def find_run(folder, run):
    """A run by its id below a folder, by its record's path, or as the latest complete of another folder.

    UserError where there is none.
    """
    if Path(run).is_file():
        return read_record(run)
    if Path(run).is_dir():
        return complete(runs_in(run), run)[-1]
    records = {record.run: record for record in runs_in(folder)}
    if run not in records:
        others = f"there are {', '.join(records)}; a folder of runs or a metrics_*.jsonl will do as well"
        raise UserError(f"there is no run '{run}' in {folder}: {others}.")
    return records[run]


def complete(records, folder):
    """Those of the records that say how their run ended; UserError where none does."""
    ended = [record for record in records if record.summary]
    if not ended:
        last = f"the same train.py command goes on with run {records[-1].run}"
        raise UserError(f"no run has been completed in {folder}: {last}; scripts.report says how far it is.")
    return ended


def _no_run(folder):
    """The error of a folder where nothing has run; names those that lie in it."""
    remedy = "start one with train.py"
    if deeper := sorted(str(path.parent) for path in Path(folder).glob(f"*/{STATUS_NAME}")):
        remedy = f"give one of these by --checkpoint_dir: {', '.join(deeper)}"
    return UserError(f"no run has begun in {folder}: {remedy}.")


class StatusFile:
    """`<checkpoint_dir>/status.json`, replaced at most every SECONDS_BETWEEN_WRITES.

    Args:
        owns: function that says whether this process owns the folder; where it does not, the file is left
            to a run that trains there or has saved there.
        fixed: fields that stay, such as the run's id. What the file says of the same run stays too.
    """

    def __init__(self, checkpoint_dir, owns=lambda: True, **fixed):
        self.path = Path(checkpoint_dir) / STATUS_NAME
        self.owns = owns
        self.written = -math.inf
        self.fields = {"saved_at": None}
        earlier = _read(self.path)
        if earlier.get("run_id") == fixed.get("run_id"):
            self.fields |= earlier
        self.fields |= fixed | this_process() | {"state": "running"}

    @property
    def due(self):
        """Whether the next update is written."""
        return time.monotonic() - self.written >= SECONDS_BETWEEN_WRITES

    def update(self, now=False, **fields):
        """Take over the fields; write them if it is time or `now`. A disk that refuses stops no run."""
        self.fields |= fields
        if (now or self.due) and (self.owns() or not self._is_of_another()):
            self.written = time.monotonic()
            with contextlib.suppress(OSError):
                write_text(self.path, json.dumps(self.fields | {"updated_at": time.time()}) + "\n")

    def _is_of_another(self):
        there = _read(self.path)
        if not there or there.get("run_id") == self.fields.get("run_id"):
            return False
        trains = there.get("state") == "running" and not is_gone(there)
        return trains or self.path.with_name("model_latest.pt").exists()


def this_process():
    """What tells this process from all others, as plain values."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}


def is_gone(fields):
    """Whether the process that wrote a file (with the fields of `this_process`) is known to have ended."""
    if fields.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(fields["pid"])
        same = abs(process.create_time() - fields["started"]) < 1  # the clock may have been set since
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True


def read_status(checkpoint_dir):
    """The fields of a folder's status file, with `minutes_since_checkpoint` and the state as it is now.

    `restart` says in words where the run goes on from its last save: stage, epoch or iteration, batch, step.
    UserError where there is no run in the folder, or the file is not readable.
    """
    path = Path(checkpoint_dir) / STATUS_NAME
    if not path.exists():
        raise _no_run(checkpoint_dir)
    fields = _read(path)
    if not fields:
        raise UserError(f"{path} cannot be read: move it away; the next run writes another.")
    saved = _read(path.with_name("manifest.json"))
    if saved and saved.get("run_id") == fields.get("run_id"):
        fields["saved_at"] = datetime.fromisoformat(saved["saved_at"]).timestamp()
        fields["restart"] = saved.get("restart", "from its last save")
    saved_at = fields.pop("saved_at", None)
    fields["minutes_since_checkpoint"] = None if saved_at is None else (time.time() - saved_at) / 60
    if fields.get("state") == "running":
        ended = CUT_OFF if "restart" in fields else NOTHING_SAVED
        silent = time.time() - fields.get("updated_at", 0)
        if is_gone(fields):
            fields["state"] = ended
        elif fields.get("host") != socket.gethostname() and silent > SILENT:
            quiet = f"no word from {fields.get('host')} for {silent / 60:.0f} minutes"
            fields["state"] = f"{quiet}; if it is gone: {ended}"
    return fields


def _read(path):
    """The object in a small file, {} where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def remaining(plan, stage, tokens_done, speed):
    """{stage: seconds} that this stage and those after it take, by the speed of this one, in tokens a second.

    Args:
        plan: {stage: {"tokens": to process at most, "work": operations a token}} in order.
    """
    if stage not in plan or not speed:
        return {}
    seconds = {stage: max(0.0, plan[stage]["tokens"] - tokens_done) / speed}
    stages = list(plan)
    for later in stages[stages.index(stage) + 1 :]:
        seconds[later] = plan[later]["tokens"] / speed * plan[later]["work"] / plan[stage]["work"]
    return seconds


def status_lines(fields):
    """What a person reads: `Key: value` lines."""
    complete = fields.get("state") == "complete"
    stage = fields.get("stage", "preparing")
    saved, best = fields["minutes_since_checkpoint"], fields.get("best_val_loss")
    tokens, speed = fields.get("tokens_done", 0), fields.get("tok_per_s", 0)
    share = tokens / max(1, fields.get("tokens_total", 1))
    lines = [
        f"Run: {fields.get('run_id')} ({fields.get('state')})",
        f"Phase: {stage}",
        f"Epoch: {fields.get('epoch', 0)}/{fields.get('epochs', 0)}",
        f"Batch: {fields.get('batch', 0)}/{fields.get('batches', 0)}",
        f"Step: {fields.get('step', 0)}",
        f"Progress: {'100.0%' if complete else f'{share:.1%} of this phase'}",
        f"Best val loss: {'none yet' if best is None else f'{best:.4f}'}",
        f"Last checkpoint: {'none yet' if saved is None else f'{saved:.1f} minutes ago'}",
        f"Speed: {speed:.0f} tok/s",
    ]
    if fields.get("gpu_utilization") is not None:
        lines.append(f"GPU utilisation: {fields['gpu_utilization']:.0f}%")
    if complete:
        return lines
    if fields.get("restart"):
        lines.append(f"A restart goes on: {fields['restart']}")
    eta = f"ETA: {fields.get('eta_s', 0):.0f} s for this phase"
    if left := remaining(fields.get("plan", {}), stage, tokens, speed):
        eta += f", at most about {sum(left.values()):.0f} s for all phases (estimate by this one's speed)"
    return [*lines, eta]

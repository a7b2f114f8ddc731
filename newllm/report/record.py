"""What a run writes down and what is read back: rows of JSON in metrics_RUN.jsonl, and status.json.

The record holds all that happened; status.json, replaced every few seconds, where the run is now.
"""

import json
import math
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from newllm.errors import UserError
from newllm.saving.files import usable_folder, write_text

STAGES = {"untrained": "epoch", "phase1": "iteration", "phase2": "epoch"}  # and what counts their rows
STATUS_NAME = "status.json"
SECONDS_BETWEEN_WRITES = 2.0
CUT_OFF = "cut off; the same command continues it"
STATUS_LINES = (
    "Run: {run_id} ({state})",
    "Phase: {stage}",
    "Epoch: {epoch}/{epochs}",
    "Batch: {batch}/{batches}",
    "Step: {step}",
    "Progress: {progress}",
    "Best val loss: {best}",
    "Last checkpoint: {saved}",
    "Last word: {heard:.1f} minutes ago, from {host}",
    "Speed: {tok_per_s:.0f} tok/s",
    "GPU utilisation: {gpu_utilization:.0f}%",
    "A restart goes on: {restart}",
    "ETA: at most about {eta_s:.0f} s for all phases, by the speed of this one",
)


def new_run_id():
    return datetime.now(UTC).strftime("%Y%m%d_%H%M%S")


def as_json(value):
    """One line, in which NaN and infinity are null, so that any JSON reader takes it."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))


def write_fields(path, fields):
    """Replace a small file by which others watch; a disk that refuses stops nothing."""
    with suppress(OSError):
        write_text(path, as_json(fields) + "\n")


def append_line(path, line):
    """Add a line, on a line of its own even where a crash or a full disk left the last one unfinished."""
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + line.encode() + b"\n")


class RunLog:
    """Appends rows to `<checkpoint_dir>/<dataset>/logs/metrics_{run}.jsonl`, keeps status.json, prints lines.

    As a context manager it leaves word in the status of why the run ended early. `follow`, a function of
    (stage, values), gets every row too.

    Args:
        run_id: a new id, or that of the run being continued.
        writes: whether this process keeps the record; of several that train together one does.
        owns: function that says whether this process saves in the folder. One that does not leaves the
            status of a folder with checkpoints alone.
        gauge: function that returns the GPU's load in per cent, or None.
    """

    def __init__(self, checkpoint_dir, dataset, run_id, writes=True, owns=lambda: True, gauge=lambda: None):
        self.run_id = run_id
        self.writes = writes
        self.owns = owns
        self.gauge = gauge
        self.follow = lambda stage, values: None
        self.folder = usable_folder(Path(checkpoint_dir) / dataset / "logs", "logs")
        self.path = self.folder / f"metrics_{run_id}.jsonl"
        self.status_path = Path(checkpoint_dir) / STATUS_NAME
        self._plan = {}
        self._place = {"run_id": run_id, "state": "running", **this_process()}
        self._written = -math.inf
        self._lines = []
        self._refused = False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind:
            self._place["state"] = f"stopped: {' '.join(str(error).split()) or kind.__name__}"
            self._write_status()

    def log(self, stage, **values):
        """Append one row. A disk that refuses costs rows, not the run: that is said once."""
        if not self.writes:
            return
        load = self._place.get("gpu_utilization")
        if stage in STAGES and load is not None:
            values["gpu_utilization"] = load
        now = datetime.now(UTC).isoformat(timespec="milliseconds")  # so that no two sessions begin alike
        line = as_json({"time": now, "stage": stage, **values})
        self._lines.append(line)
        self._write(line)
        self.follow(stage, values)
        if stage == "start":
            self._plan = values.get("plan", {})
            self._write_status()

    def _write(self, line):
        try:
            append_line(self.path, line)
        except OSError as error:
            if not self._refused:
                reason = f"{self.path} cannot be written ({error.strerror or error})"
                self.say(f"warning: {reason}; training goes on, its record has a gap")
            self._refused = True

    def mend(self, lines):
        """Write those of the lines that the record lacks, lost with a machine or by a full disk.

        Checkpoints carry this list; each row of this session is added to it.
        """
        self._lines = lines
        present = set()
        with suppress(OSError):  # none yet, or none that can be read: writing says so
            present.update(self.path.read_text("utf-8", "replace").splitlines())
        missing = [line for line in lines if line not in present]
        if missing and self.writes:
            for line in missing:
                self._write(line)
            self.say(f"the record gets {len(missing)} rows that it lacked, from a checkpoint")

    def status(self, progress, **place):
        """Tell where a loop is: its Progress, and stage, epoch, batch and so on, as the status shows them."""
        begins = place["stage"] != self._place.get("stage")
        place |= {"tokens_done": progress.done, "tokens_total": progress.total, "tok_per_s": progress.speed}
        self._place |= place
        if begins or time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._written = time.monotonic()
            self._place["gpu_utilization"] = self.gauge()
            self._place["eta_s"] = seconds_left(self._plan, **place)
            self._write_status()

    def enter(self, stage):
        """Tell that a stage has begun which makes no passes over the samples."""
        kept = {"run_id", "state", "step", "saved_at", "best_val_loss", "gpu_utilization", *this_process()}
        self._place = {name: value for name, value in self._place.items() if name in kept}
        self._place["stage"] = stage
        self._write_status()

    def _write_status(self):
        """Replace the file; a disk that refuses stops no run."""
        of_others = self.status_path.with_name("manifest.json").exists() and not self.owns()
        if self.writes and not of_others:
            write_fields(self.status_path, self._place | {"updated_at": time.time()})

    def warn(self, line):
        """Print a line about something survived, and keep it in the record."""
        self.say(line)
        self.log("warning", message=line)

    @staticmethod
    def say(line=""):
        print(line, flush=True)

    def finish(self, summary, **place):
        """Print the summary as the closing `---` block; `place` is where the run is at its end."""
        self._place |= place | {"state": "complete"}
        self._write_status()
        self.say("---")
        for key, value in summary.items():
            self.say(f"{key}: {format_value(value)}")


def format_value(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shown(value, form="", missing=""):
    """A figure as text; form: a format, or a function of the value. missing: the text of None."""
    if value is None:
        return missing
    return form(value) if callable(form) else format(value, form)


def seconds_left(plan, stage, tokens_done, tok_per_s, **_):
    """What the rest of a stage and all later ones take, by the speed of this one; None: not known.

    Args:
        plan: {stage: {"tokens": to process at most, "work": operations a token}} in order.
    """
    if stage not in plan or not tok_per_s:
        return None
    later = list(plan.values())[list(plan).index(stage) + 1 :]
    tokens = plan[stage]["tokens"] - tokens_done
    tokens += sum(planned["tokens"] * planned["work"] for planned in later) / plan[stage]["work"]
    return tokens / tok_per_s


class Record:
    """A run as its record tells it; of rows written twice, after an epoch was done again, the last counts.

    Attributes:
        run, kind, folder: its id, its model type, the folder of all artefacts of its data source.
        start: first row: device, data, versions, commit; config and plan as when something was last trained.
        untrained, phase1, phase2: {name: values by epoch or iteration}.
        summary, curves, times: the closing block, curves of contexts, seconds of all parts; {} until the end.
        sessions, warnings: how often it was started, what it survived.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.run = self.path.stem.removeprefix("metrics_")
        self.folder = self.path.parent.parent
        self.sessions, self.warnings = 0, []
        self.start, self.summary, self.curves, self.times = {}, {}, {}, {}
        rows, in_effect = {stage: {} for stage in STAGES}, {}
        for row in read_rows(path):
            stage = row.pop("stage")
            if stage == "start":
                self.sessions += 1
                self.start = self.start or row
                in_effect = {name: row[name] for name in ("config", "plan", "attention")}
            elif stage == "warning":
                self.warnings.append(row["message"])
            elif stage in STAGES:
                rows[stage][row[STAGES[stage]]] = row
                self.start |= in_effect
            elif stage in ("summary", "curves", "times"):
                setattr(self, stage, row)
        for stage, numbered in rows.items():
            names = next(iter(numbered.values()), {})
            columns = {name: [row.get(name) for _, row in sorted(numbered.items())] for name in names}
            setattr(self, stage, columns)
        self.config = self.start["config"]
        self.kind = self.config["model_type"]


def read_rows(path):
    """Rows of a record in order; a line that a crash or a full disk left unfinished is skipped."""
    with open(path, "rb") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                yield json.loads(line)


def read_record(path):
    """The Record of a file; UserError where it cannot be read, or is none."""
    try:
        return Record(path)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as the record of a run ({error!r}): name another.") from error


def as_curve(curve):
    """{x: y} of numbers, from a list that counts from 1 or a dict whose keys may be text; None of nothing."""
    if not curve:
        return None
    pairs = curve.items() if isinstance(curve, dict) else enumerate(curve, 1)
    return {float(x): y for x, y in pairs}


def find_records(folder):
    """Paths of all records below a checkpoint_dir, the newest run last."""
    return sorted(Path(folder).glob("*/logs/metrics_*.jsonl"), key=lambda path: (path.stem, path.as_posix()))


def read_records(paths):
    """Those of some files that can be read; one of an earlier version stays, and is left out."""
    for path in paths:
        with suppress(UserError):
            yield read_record(path)


def runs_in(folder):
    """Records of the runs below a checkpoint_dir, the newest last; UserError where there is none."""
    records = list(read_records(find_records(folder)))
    if not records:
        raise _no_run(folder)
    return records


def find_run(folder, run):
    """A run by its id below a folder; UserError where there is none."""
    records = {record.run: record for record in runs_in(folder)}
    if run not in records:
        raise UserError(f"there is no run '{run}' in {folder}: there are {', '.join(records)}.")
    return records[run]


def complete(records, folder):
    """Those of the records that say how their run ended; UserError where none does."""
    ended = [record for record in records if record.summary]
    if not ended:
        run = records[-1].run
        raise UserError(f"no run has been completed in {folder}: the same train.py command continues {run}.")
    return ended


def _no_run(folder):
    return UserError(f"no run has begun in {folder}: start one, or give another folder by --checkpoint_dir.")


def this_process():
    """What tells this process from all others, as plain values."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}


def is_gone(fields):
    """Whether the process that wrote a file (with the fields of `this_process`) is known to have ended."""
    if fields["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(fields["pid"])
        same = abs(process.create_time() - fields["started"]) < 1  # the clock may have been set since
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_status(checkpoint_dir):
    """The fields of a folder's status file, with the state as it is now and what its manifest adds.

    That is `minutes_since_checkpoint`, and `restart`: where the run goes on from its last save, in words.
    UserError where there is no run in the folder, or the file is not readable.
    """
    path = Path(checkpoint_dir) / STATUS_NAME
    if not path.exists():
        raise _no_run(checkpoint_dir)
    fields = {"restart": "from the start"} | _read(path)
    saved = _read(path.with_name("manifest.json"))
    if "run_id" not in fields:
        raise UserError(f"{path} cannot be read: move it away; the next run writes another.")
    saved_at = fields.pop("saved_at", None)
    if saved.get("run_id") == fields["run_id"]:
        fields["restart"] = saved["restart"]
        saved_at = datetime.fromisoformat(saved["saved_at"]).timestamp()
    fields["minutes_since_checkpoint"] = None if saved_at is None else (time.time() - saved_at) / 60
    if fields["state"] == "running" and is_gone(fields):
        fields["state"] = CUT_OFF
    return fields


def _read(path):
    """The object in a small file, {} where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def status_lines(fields):
    """What a person reads: `Key: value` lines of what is known."""
    known = {name: value for name, value in fields.items() if value is not None}
    share = known.get("tokens_done", 0) / max(1, known.get("tokens_total", 1))
    known["progress"] = f"{share:.1%} of this phase"
    if known.get("stage") == "retrieval":
        known["progress"] = "all is trained, what was read is taken in and fitted"
    if known["state"] == "complete":
        known = {name: value for name, value in known.items() if name not in ("restart", "eta_s")}
        known["progress"] = "100.0%"
    known["best"] = shown(known.get("best_val_loss"), ".4f", "none yet")
    saved = known.get("minutes_since_checkpoint")
    known["saved"] = shown(saved, "{:.1f} minutes ago".format, "none yet")
    known["heard"] = (time.time() - known["updated_at"]) / 60
    lines = []
    for line in STATUS_LINES:
        with suppress(KeyError):
            lines.append(line.format(**known))
    return lines

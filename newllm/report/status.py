"""The small file that says where a run is: written while it trains, read by `scripts.status` without loading anything."""

import contextlib
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from newllm.errors import UserError
from newllm.saving.files import write_text

STATUS_NAME, MANIFEST_NAME, LATEST_NAME = "status.json", "manifest.json", "model_latest.pt"
SECONDS_BETWEEN_WRITES = 2.0
SILENT = 600  # seconds without a word after which a run on another machine may be gone
CUT_OFF = "cut off; the same command continues it"
NOTHING_SAVED = "cut off before anything was saved; the same command begins anew"


class StatusFile:
    """`<checkpoint_dir>/status.json`, rewritten atomically at most every SECONDS_BETWEEN_WRITES.

    Args:
        owns: function that says whether this process owns the folder. One that does not leaves the file to a run that
            trains there or has saved there.
        fixed: fields that stay, such as the run's id. What the file says of the same run stays too.
    """

    def __init__(self, checkpoint_dir, owns=lambda: True, **fixed):
        self.path, self.owns = Path(checkpoint_dir) / STATUS_NAME, owns
        found = _read(self.path)
        earlier = found if found.get("run_id") == fixed.get("run_id") else {}
        self.fields = {"saved_at": None} | earlier | fixed | this_process() | {"state": "running"}
        self.written = -SECONDS_BETWEEN_WRITES

    @property
    def due(self):
        """Whether the next update is written."""
        return time.monotonic() - self.written >= SECONDS_BETWEEN_WRITES

    def update(self, now=False, **fields):
        """Take over the fields; write them if it is time or `now`. A disk that refuses is no reason to stop a run."""
        self.fields |= fields
        if (now or self.due) and (self.owns() or not self._is_of_another()):
            self.written = time.monotonic()
            with contextlib.suppress(OSError):
                write_text(self.path, json.dumps(self.fields | {"updated_at": time.time()}) + "\n")

    def _is_of_another(self):
        found = _read(self.path)
        if not found or all(found.get(name) == value for name, value in this_process().items()):
            return False
        trains = found.get("state") == "running" and not is_gone(found)
        return trains or self.path.with_name(LATEST_NAME).exists()


def read_status(checkpoint_dir):
    """The fields of a folder's status file, with `minutes_since_checkpoint`, the state as it is now, and `restart`.

    `restart` says in words where the run goes on from its last save: stage, epoch or iteration, batch, step.

    Raises:
        UserError: there is no run in the folder, or the file is not readable.
    """
    path = Path(checkpoint_dir) / STATUS_NAME
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        deeper = ", ".join(sorted(str(found.parent) for found in path.parent.glob(f"*/{STATUS_NAME}")))
        remedy = f"give one of these by --checkpoint_dir: {deeper}" if deeper else "start one with train.py"
        raise UserError(f"no run has begun in {checkpoint_dir}: there is no {path.name}; {remedy}.") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): move it away; the next run writes another."
        ) from error
    saved = _read(path.with_name(MANIFEST_NAME))
    if saved and saved.get("run_id") == fields.get("run_id"):
        fields["saved_at"] = datetime.fromisoformat(saved["saved_at"]).timestamp()
        fields["restart"] = saved.get("restart", f"at {saved['epoch']}")
    saved_at = fields.pop("saved_at", None)
    fields["minutes_since_checkpoint"] = None if saved_at is None else (time.time() - saved_at) / 60
    if fields.get("state") == "running":
        silent = time.time() - fields.get("updated_at", 0)
        ended = CUT_OFF if "restart" in fields else NOTHING_SAVED
        if is_gone(fields):
            fields["state"] = ended
        elif fields.get("host") != socket.gethostname() and silent > SILENT:
            fields["state"] = (
                f"no word from {fields.get('host')} for {silent / 60:.0f} minutes; if it is gone: {ended}"
            )
    return fields


def this_process():
    """What tells this process from all others, as plain values."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def is_gone(fields):
    """Whether the process that wrote a state file (with the fields of `this_process`) is known to have ended."""
    if fields.get("host") != socket.gethostname() or not Path("/proc").exists():
        return False
    started = _started(fields.get("pid"))
    return started is None or fields.get("started") not in (
        None,
        started,
    )  # another process has its number by now


def _started(pid):
    """When a process of this machine started, in ticks since boot; None where that cannot be known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def remaining(plan, stage, tokens_done, speed):
    """Seconds that the stages from this one on take, by the speed of this one; of the later ones an estimate.

    Args:
        plan: {stage: {"tokens": to process at most, "work": operations a token}} in order. speed: tokens a second.

    Returns:
        {stage: seconds}; {} where the speed or the stage is not known.
    """
    if stage not in plan or not speed:
        return {}
    stages = list(plan)[list(plan).index(stage) :]
    seconds = {
        name: plan[name]["tokens"] / speed * plan[name]["work"] / plan[stage]["work"] for name in stages
    }
    return seconds | {stage: max(0.0, plan[stage]["tokens"] - tokens_done) / speed}


def status_lines(fields):
    """What a person reads: `Key: value` lines."""
    saved, best, restart = (
        fields["minutes_since_checkpoint"],
        fields.get("best_val_loss"),
        fields.get("restart"),
    )
    complete, stage = fields.get("state") == "complete", fields.get("stage", "preparing")
    done = 1.0 if complete else fields.get("tokens_done", 0) / max(1, fields.get("tokens_total", 1))
    eta = remaining(fields.get("plan", {}), stage, fields.get("tokens_done", 0), fields.get("tok_per_s"))
    lines = [
        f"Run: {fields.get('run_id')} ({fields.get('state')})",
        f"Phase: {stage}",
        f"Epoch: {fields.get('epoch', 0)}/{fields.get('epochs', 0)}",
        f"Batch: {fields.get('batch', 0)}/{fields.get('batches', 0)}",
        f"Step: {fields.get('step', 0)}",
        f"Progress: {done:.1%}" + " of this phase" * (not complete),
        f"Best val loss: {'none yet' if best is None else f'{best:.4f}'}",
        f"Last checkpoint: {'none yet' if saved is None else f'{saved:.1f} minutes ago'}",
        f"Speed: {fields.get('tok_per_s', 0):.0f} tok/s",
    ]
    if fields.get("gpu_utilization") is not None:
        lines.append(f"GPU utilisation: {fields['gpu_utilization']:.0f}%")
    if complete:
        return lines
    if restart:
        lines.append(f"A restart goes on: {restart}")
    return [*lines, f"ETA: {fields.get('eta_s', 0):.0f} s for this phase" + whole(eta)]


def whole(eta):
    return (
        f", at most about {sum(eta.values()):.0f} s for all phases (estimate by this one's speed)"
        if eta
        else ""
    )


def _read(path):
    """The object in a small file, {} where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}

"""The small file that says where a run is: written while it trains, read by `scripts.status` without loading anything."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from newllm.errors import UserError
from newllm.storage import write_text

STATUS_NAME = "status.json"
SECONDS_BETWEEN_WRITES = 2.0
CUT_OFF = "cut off; the same command continues it"


class StatusFile:
    """`<checkpoint_dir>/status.json`, rewritten atomically at most every SECONDS_BETWEEN_WRITES.

    Args:
        fixed: fields that stay, such as the run's id.
    """

    def __init__(self, checkpoint_dir, **fixed):
        self.path = Path(checkpoint_dir) / STATUS_NAME
        self.fields = fixed | {"pid": os.getpid(), "host": socket.gethostname(), "state": "running", "saved_at": None}
        self.written = -SECONDS_BETWEEN_WRITES

    def update(self, now=False, **fields):
        """Take over the fields; write them if it is time or `now`. A disk that refuses is no reason to stop a run."""
        self.fields |= fields
        if now or time.monotonic() - self.written >= SECONDS_BETWEEN_WRITES:
            self.written = time.monotonic()
            with contextlib.suppress(OSError):
                write_text(self.path, json.dumps(self.fields | {"updated_at": time.time()}) + "\n")


def read_status(checkpoint_dir):
    """The fields of a folder's status file, with `minutes_since_checkpoint` and the state as it is now.

    Raises:
        UserError: there is no run in the folder, or the file is not readable.
    """
    path = Path(checkpoint_dir) / STATUS_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no run has begun in {checkpoint_dir}: there is no {path.name}; start one with train.py."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    saved_at = fields.pop("saved_at")
    fields["minutes_since_checkpoint"] = None if saved_at is None else (time.time() - saved_at) / 60
    if fields["state"] == "running" and is_gone(fields):
        fields["state"] = CUT_OFF
    return fields


def is_gone(fields):
    """Whether the process that wrote a state file (its pid and host are in the fields) is known to have ended."""
    here = fields["host"] == socket.gethostname() and Path("/proc").exists()
    return here and not Path(f"/proc/{fields['pid']}").exists()


def status_lines(fields):
    """What a person reads: `Key: value` lines."""
    saved = fields["minutes_since_checkpoint"]
    best = fields.get("best_val_loss")
    done = fields.get("tokens_done", 0) / max(1, fields.get("tokens_total", 1))
    return [
        f"Run: {fields['run_id']} ({fields['state']})",
        f"Phase: {fields.get('stage', 'preparing')}",
        f"Epoch: {fields.get('epoch', 0)}/{fields.get('epochs', 0)}",
        f"Batch: {fields.get('batch', 0)}/{fields.get('batches', 0)}",
        f"Progress: {done:.1%}",
        f"Best val loss: {'none yet' if best is None else f'{best:.4f}'}",
        f"Last checkpoint: {'none yet' if saved is None else f'{saved:.1f} minutes ago'}",
        f"Speed: {fields.get('tok_per_s', 0):.0f} tok/s",
        f"ETA: {fields.get('eta_s', 0):.0f} s for this phase",
    ]

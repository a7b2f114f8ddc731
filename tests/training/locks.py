"""Locks to meet: taken with a short pause, or written as another machine would."""

import json
import time

from newllm.saving.guard import FolderLock


def quick(folder, run_id="second", **settings):
    return FolderLock(folder, run_id, **{"settle_seconds": 0.01, **settings})


def foreign(folder, age=0.0, **changes):
    """Write a lock as another machine would, whose last heartbeat is `age` seconds old. Returns its content."""
    content = {
        "host": "elsewhere", "boot_id": "b", "pid_namespace": "p", "pid": 1, "started": "5", "run_id": "theirs",
        "token": "t", "beat": 3, "time": time.time() - age, **changes,
    }  # fmt: skip
    (folder / "run.lock").write_text(json.dumps(content))
    return content


def wait_for(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)

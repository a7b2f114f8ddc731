"""Which machine, which boot, which process: enough to say for certain that a process has ended."""

import math
import os
import socket
import time
from pathlib import Path


def here():
    """What must agree before a process number means anything: machine, boot, and the container's own numbering."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        pid_namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot_id = pid_namespace = ""
    return {"host": socket.gethostname(), "boot_id": boot_id, "pid_namespace": pid_namespace}


def boot_time():
    """Wall time at which this machine started; minus infinity where it is not known."""
    try:
        return time.time() - float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError):
        return -math.inf


def start_time(pid):
    """When the process started, in clock ticks since boot; "" if it has ended; None where nothing tells.

    With it a process number that was given out again is not mistaken for the old process.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "" if state in "ZX" else fields[18]


def is_alive(pid, started):
    """Whether that very process of this machine lives; None where the system does not tell."""
    if os.name != "posix":
        return None  # signal 0 is Ctrl-C there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = start_time(pid)
    return None if now is None else now == started != ""

"""A process of one's own: answers and errors come back, and it does not outlive its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from newllm.apart import call_apart
from newllm.config import check_value
from newllm.errors import UserError
from newllm.saving.stop import EXIT_STATUS, Interrupt, Stopped

ROOT = Path(__file__).parent.parent

PARENT = """
import os, sys, time
from pathlib import Path
from newllm.apart import call_apart
from newllm.errors import exit_on_user_error
from newllm.saving.stop import Interrupt, poll

def wait(folder):
    with Interrupt():
        (folder / "new").write_text(str(os.getpid()))
        (folder / "new").rename(folder / "child")
        while not (folder / "done").exists():
            try:
                poll()
            except BaseException:
                time.sleep(0.5)
                (folder / "saved").touch()
                raise
            time.sleep(0.01)

if __name__ == "__main__":
    with exit_on_user_error(), Interrupt():
        call_apart(wait, Path(sys.argv[1]))
"""


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def family(tmp_path):
    """(parent, pid of its child, folder): a parent in its own group whose child works until stopped."""
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    own = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **own)
    wait_for((tmp_path / "child").exists, 60)
    yield parent, int((tmp_path / "child").read_text()), tmp_path
    (tmp_path / "done").touch()
    parent.kill()
    parent.communicate()


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_answers_and_sentences_come_from_another_process():
    """What it returns, the exception for the user that it raises, and that it has died without any."""
    assert call_apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match="num_samples must be >= 1, not 0"):
        call_apart(check_value, "num_samples", 0)
    with pytest.raises(UserError, match="ended with status -9"):
        call_apart(signal.raise_signal, signal.SIGKILL)


def test_the_time_limit_reaches_it():
    """Whatever it does: it is asked to stop, and the parent says why."""
    began = time.monotonic()
    with Interrupt(max_minutes=1e-6), pytest.raises(Stopped, match="max_minutes"):
        call_apart(time.sleep, 60)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "send, number", [(os.kill, signal.SIGTERM), (os.kill, signal.SIGINT), (os.killpg, signal.SIGINT)]
)
def test_a_signal_stops_both_in_good_order(family, send, number):
    """The child saves and the parent waits for it; Ctrl-C in a terminal, to all, does not cut it off."""
    parent, child, folder = family
    send(parent.pid, number)
    assert parent.wait(timeout=30) == EXIT_STATUS
    assert (folder / "saved").exists() and is_gone(child)
    assert parent.stderr.read().startswith("stopped: ")


def test_a_child_does_not_outlive_a_killed_parent(family):
    """Else it would go on writing where the next start wants to."""
    parent, child, _ = family
    parent.kill()
    parent.wait()
    wait_for(lambda: is_gone(child), 5)

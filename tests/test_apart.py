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
import sys, time
from pathlib import Path
from newllm.apart import call_apart
from newllm.errors import exit_on_user_error
from newllm.saving.stop import Interrupt, poll

def wait(folder):
    with Interrupt():
        Path(folder, "child").write_text(str(__import__("os").getpid()))
        while not Path(folder, "done").exists():
            try:
                poll()
            except BaseException:
                time.sleep(0.5)
                Path(folder, "saved").touch()
                raise
            time.sleep(0.01)

if __name__ == "__main__":
    with exit_on_user_error(), Interrupt():
        call_apart(wait, sys.argv[1])
"""


@pytest.fixture
def family(tmp_path):
    """(parent, pid of its child, folder): a parent in its own group whose child works until stopped."""
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    parent = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield parent, int((tmp_path / "child").read_text()), tmp_path
    (tmp_path / "done").touch()
    parent.kill()
    parent.communicate()


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_the_answer_comes_from_another_process():
    """What the function returns, whatever it is."""
    assert call_apart(os.getpid) != os.getpid()
    assert call_apart(divmod, 7, 2) == (3, 1)


def test_a_sentence_for_the_user_comes_through():
    """The same exception as without a process."""
    with pytest.raises(UserError, match="num_samples must be >= 1, not 0"):
        call_apart(check_value, "num_samples", 0)


def test_a_process_that_dies_is_an_error_and_no_endless_wait():
    """As when the system takes its memory away; also one that ends without an answer."""
    with pytest.raises(UserError, match="ended with status 3"):
        call_apart(os._exit, 3)
    with pytest.raises(UserError, match="ended with status -9"):
        call_apart(signal.raise_signal, signal.SIGKILL)


def test_the_time_limit_reaches_it():
    """Whatever it does: it is asked to stop, and the parent says why."""
    began = time.monotonic()
    with Interrupt(max_minutes=1e-6), pytest.raises(Stopped, match="max_minutes"):
        call_apart(time.sleep, 60)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_stops_both_in_good_order(family, number):
    """The child saves and the parent waits for it; exit status EXIT_STATUS."""
    parent, child, folder = family
    parent.send_signal(number)
    assert parent.wait(timeout=30) == EXIT_STATUS
    assert (folder / "saved").exists() and is_gone(child)
    assert parent.stderr.read().startswith("stopped: ")


def test_ctrl_c_in_a_terminal_does_not_cut_the_child_off(family):
    """A terminal signals the whole group; the child must not get that signal and the parent's."""
    parent, child, folder = family
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=30) == EXIT_STATUS
    assert (folder / "saved").exists() and is_gone(child)


def test_a_child_does_not_outlive_a_killed_parent(family):
    """Else it would go on writing where the next start wants to."""
    parent, child, _ = family
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while not is_gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)

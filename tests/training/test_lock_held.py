"""Holding a lock: the heartbeat goes on through errors, and a run that lost its lock learns it before it saves."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from locks import foreign, quick, wait_for

from newllm.saving import guard as lock_module
from newllm.saving.guard import LockLost, read_lock

ROOT = Path(__file__).parents[2]

SLEEP = """
import sys
from newllm.saving.guard import FolderLock
lock = FolderLock(sys.argv[1], "zombie", heartbeat_seconds=0.05, stale_seconds=60).acquire()
print("held", flush=True)
sys.stdin.readline()
lock.check()
"""


def test_the_heartbeat_advances_and_carries_the_run_id(tmp_path):
    """Counter and time grow; a run id that is known only later arrives."""
    with quick(tmp_path, heartbeat_seconds=0.02, stale_seconds=1) as lock:
        before = read_lock(lock.path)
        lock.run_id = "continued"
        wait_for(lambda: read_lock(lock.path)["beat"] >= before["beat"] + 3)
        after = read_lock(lock.path)
        assert after["time"] > before["time"]
        assert (after["run_id"], after["token"]) == ("continued", before["token"])
        lock.check()
        assert lock.error is None


def test_a_zombie_learns_of_its_successor_and_leaves_its_lock_alone(tmp_path):
    """Another run took over: check raises from then on, no heartbeat touches the new lock, release keeps it."""
    with quick(tmp_path, "zombie", heartbeat_seconds=0.02, stale_seconds=1) as lock:
        content = foreign(tmp_path)
        with pytest.raises(LockLost, match=r"theirs.*elsewhere.*zombie"):
            lock.check()
        time.sleep(0.1)
        assert read_lock(lock.path) == content
        lock.path.unlink()  # the successor finishes; the zombie must not believe that it may write again
        with pytest.raises(LockLost, match="theirs"):
            lock.check()
    foreign(tmp_path)
    lock.release()
    assert read_lock(lock.path)["run_id"] == "theirs"


def test_a_process_that_slept_through_its_succession_stops(tmp_path):
    """A stopped process whose lock was taken (as after a suspended machine) raises LockLost when it goes on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    with subprocess.Popen([sys.executable, "-c", SLEEP, str(tmp_path)], **pipes) as zombie:
        assert zombie.stdout.readline() == "held\n"
        zombie.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        content = foreign(tmp_path)
        zombie.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        _, errors = zombie.communicate("go\n")
    assert zombie.returncode == 2
    assert errors.startswith("error: run theirs") and len(errors.splitlines()) == 1
    assert read_lock(tmp_path / "run.lock") == content


def test_a_lock_that_vanished_counts_as_lost(tmp_path):
    """A successor may have come, saved, and gone; the heartbeat does not make the file anew."""
    with quick(tmp_path, heartbeat_seconds=0.02, stale_seconds=1) as lock:
        wait_for(lambda: read_lock(lock.path)["beat"] > 0)
        with lock._writing:
            lock.path.unlink()
        time.sleep(0.1)
        with pytest.raises(LockLost, match="gone"):
            lock.check()
        assert not lock.path.exists()


def test_a_file_that_shows_up_late_is_no_loss(tmp_path):
    """A network folder hides the file for a moment: check looks again."""
    with quick(tmp_path) as lock:
        away = tmp_path / "away"
        lock.path.rename(away)
        timer = threading.Timer(0.05, away.rename, [lock.path])
        timer.start()
        lock.check()
        timer.join()


def test_a_garbled_heartbeat_is_mended_by_the_next(tmp_path):
    """Damage is no sign of another run: check passes, and the thread writes the file again."""
    with quick(tmp_path, heartbeat_seconds=0.2, stale_seconds=1) as lock:
        with lock._writing:
            lock.path.write_text("")
        lock.check()
        wait_for(lambda: read_lock(lock.path))
        assert read_lock(lock.path)["token"] == lock.token


def test_errors_of_the_heartbeat_are_remembered_and_tried_again(tmp_path, monkeypatch):
    """A flaky folder neither ends the thread nor the training."""
    real = os.replace
    failures = iter([5, 107])

    def flaky(*arguments):
        if number := next(failures, None):
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    with quick(tmp_path, heartbeat_seconds=0.02, stale_seconds=1) as lock:
        monkeypatch.setattr(os, "replace", flaky)
        wait_for(lambda: lock.error and lock.error.errno == 107)
        seen = read_lock(lock.path)["beat"]
        wait_for(lambda: read_lock(lock.path)["beat"] > seen)
        lock.check()
    assert os.listdir(tmp_path) == []


def test_check_passes_the_error_of_an_unreadable_folder_on(tmp_path, monkeypatch):
    """A dropped mount is an OSError, as a save there would be; it is not a lost lock."""
    with quick(tmp_path) as lock, monkeypatch.context() as patch:

        def unmounted(_):
            raise OSError(107, "Transport endpoint is not connected")

        patch.setattr(lock_module, "read_lock", unmounted)
        with pytest.raises(OSError, match="not connected"):
            lock.check()


def test_a_folder_that_is_gone_is_a_dropped_mount_not_a_lost_lock(tmp_path):
    """No save would work there now; back again, the lock is still ours."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    with quick(folder) as lock:
        folder.rename(tmp_path / "away")
        with pytest.raises(OSError, match="is Drive still mounted"):
            lock.check()
        (tmp_path / "away").rename(folder)
        lock.check()


def test_a_forked_child_does_not_release(tmp_path):
    """A data worker that exits through the same code leaves its parent's lock."""
    with quick(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        lock.check()

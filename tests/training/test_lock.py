"""One run per folder: a live run's lock is respected, a dead one's is free, and of several takers one wins."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from locks import foreign, quick, wait_for

from newllm.errors import UserError
from newllm.saving import drive
from newllm.saving import guard as lock_module
from newllm.saving.guard import FolderLock, holder, read_lock

ROOT = Path(__file__).parents[2]

HOLD = """
import sys, time
from newllm.saving.guard import FolderLock
with FolderLock(sys.argv[1], "first", heartbeat_seconds=0.05, stale_seconds=60):
    print("held", flush=True)
    time.sleep(60)
"""

RACE = """
import sys, time
from newllm.errors import UserError
from newllm.saving.guard import FolderLock
while time.time() < float(sys.argv[2]):
    pass
try:
    with FolderLock(sys.argv[1], "racer", settle_seconds=0.1):
        print("won", flush=True)
        time.sleep(1.5)
except UserError as error:
    print(error, flush=True)
"""


def start(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def first(tmp_path):
    """A process that holds the lock of tmp_path and writes heartbeats."""
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_lock_is_there_while_held_and_gone_afterwards(tmp_path):
    """Enter, check, leave: the file is whole while held; the folder is empty afterwards."""
    with quick(tmp_path) as lock:
        assert read_lock(lock.path)["pid"] == os.getpid()
        if sys.platform == "linux":
            assert read_lock(lock.path)["pid_namespace"] == os.readlink("/proc/self/ns/pid")
        lock.check()
        assert lock.note is None
    assert os.listdir(tmp_path) == []


def test_an_exception_releases_the_lock(tmp_path):
    """A training that fails leaves no lock."""
    with pytest.raises(KeyboardInterrupt), quick(tmp_path):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_the_second_of_two_processes_is_refused(tmp_path, first):
    """The sentence names process, machine and folder; the first goes on undisturbed."""
    content = read_lock(tmp_path / "run.lock")
    with pytest.raises(
        UserError, match=rf"process {first.pid} .*{content['host']}.*run first.*{tmp_path}.*stop"
    ):
        quick(tmp_path).acquire()
    assert str(first.pid) in holder(tmp_path)
    assert first.poll() is None
    assert read_lock(tmp_path / "run.lock")["token"] == content["token"]


def test_a_stopped_process_is_still_alive(tmp_path, first):
    """Ctrl-Z is not death: on one machine the process table counts, not the heartbeat."""
    first.send_signal(signal.SIGSTOP)
    content = read_lock(tmp_path / "run.lock")
    (tmp_path / "run.lock").write_text(json.dumps({**content, "time": 1.0}))
    with pytest.raises(UserError, match=str(first.pid)):
        quick(tmp_path).acquire()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, first, reaped):
    """kill -9 leaves the lock; the next run takes it and says so, even while the dead process is still in the table."""
    first.kill()
    wait_for(lambda: lock_module.start_time(first.pid) == "")
    if reaped:
        assert first.wait() == -signal.SIGKILL
    with quick(tmp_path) as lock:
        assert "run first" in lock.note and str(first.pid) in lock.note
        lock.check()
    assert first.wait() == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_reused_process_number_is_not_the_old_process(tmp_path):
    """A live process with the recorded number but another start time holds nothing."""
    with quick(tmp_path) as lock:
        content = read_lock(lock.path)
        (tmp_path / "other").mkdir()
        foreign(tmp_path / "other", **content)
        assert holder(tmp_path / "other")
        foreign(tmp_path / "other", **{**content, "started": "1"})
        quick(tmp_path / "other").acquire().release()


def test_a_reboot_frees_the_lock_but_a_namesake_does_not(tmp_path, monkeypatch):
    """Same host name, other boot: free if the heartbeat is from before this boot, else another machine of that name beats."""
    host = lock_module.here()["host"]
    foreign(tmp_path, age=20, host=host)
    monkeypatch.setattr(lock_module, "boot_time", lambda: time.time() - 60)
    with pytest.raises(UserError, match="theirs"):
        quick(tmp_path).acquire()
    monkeypatch.setattr(lock_module, "boot_time", lambda: time.time() - 10)
    quick(tmp_path).acquire().release()


def test_a_process_of_another_container_is_not_looked_up_here(tmp_path):
    """Equal machine and boot, other process numbering: only the heartbeat counts."""
    mine = {**lock_module.here(), "pid_namespace": "pid:[1]", "pid": 2**22 + 1}
    foreign(tmp_path, age=10, **mine)
    with pytest.raises(UserError, match=r"wait (289|290) s"):
        quick(tmp_path).acquire()
    foreign(tmp_path, age=301, **mine)
    quick(tmp_path).acquire().release()


def test_another_machine_is_respected_until_its_heartbeat_is_stale(tmp_path):
    """Refused with the seconds that are left; taken when none are."""
    foreign(tmp_path, age=100)
    with pytest.raises(UserError, match=r"theirs .*elsewhere.* 100 s ago.*wait (199|200) s"):
        quick(tmp_path).acquire()
    content = foreign(tmp_path, age=300.5)
    with quick(tmp_path) as lock:
        assert read_lock(lock.path)["token"] != content["token"]
        assert "elsewhere" in lock.note


def test_staleness_follows_the_cadence_of_the_writer(tmp_path):
    """Who beats slowly is not dead after the reader's 300 s, and who beats fast is dead sooner; `holder` sees it alike."""
    foreign(tmp_path, age=400, stale_seconds=600)
    with pytest.raises(UserError, match=r"theirs .* 400 s ago.*wait (199|200) s"):
        quick(tmp_path).acquire()
    assert "theirs" in holder(tmp_path)
    foreign(tmp_path, age=61, stale_seconds=60)
    assert holder(tmp_path) is None
    with quick(tmp_path, heartbeat_seconds=1, stale_seconds=1000) as lock:
        assert "theirs" in lock.note
        assert read_lock(lock.path)["stale_seconds"] == 1000


@pytest.mark.parametrize(
    "given",
    [{}, *({"stale_seconds": it} for it in ("600", None, True, [600], -1, 0, float("nan"), float("inf")))],
)
def test_a_lock_that_does_not_say_its_cadence_is_judged_by_the_readers(tmp_path, given):
    """Absent, or no number of seconds."""
    foreign(tmp_path, age=250, **given)
    with pytest.raises(UserError, match=r"wait (49|50) s"):
        quick(tmp_path).acquire()
    quick(tmp_path, heartbeat_seconds=1, stale_seconds=200).acquire().release()
    foreign(tmp_path, age=301, **given)
    assert holder(tmp_path) is None


def test_the_cadence_is_slow_on_drive_only(tmp_path, monkeypatch):
    """Drive counts operations; a link into it counts as Drive, a namesake beside it does not."""
    mounted = tmp_path / "drive"
    (mounted / "MyDrive").mkdir(parents=True)
    (tmp_path / "drive2").mkdir()
    (tmp_path / "link").symlink_to(mounted / "MyDrive")
    (tmp_path / "mount").symlink_to(mounted)
    for place in (mounted, tmp_path / "mount"):  # the mount point may be reached through a link as well
        monkeypatch.setattr(drive, "COLAB_DRIVE", place)
        for folder in (mounted, mounted / "MyDrive", tmp_path / "link"):
            lock = FolderLock(folder, "x")
            assert (lock.heartbeat_seconds, lock.stale_seconds) == (120, 600)
            assert drive.lies_on_drive(folder)
        for folder in (tmp_path, tmp_path / "drive2"):
            lock = FolderLock(folder, "x")
            assert (lock.heartbeat_seconds, lock.stale_seconds) == (30, 300)
    foreign(mounted, age=400)
    assert "wait" in holder(mounted)
    lock = FolderLock(mounted, "x", heartbeat_seconds=1, stale_seconds=2)
    assert (lock.heartbeat_seconds, lock.stale_seconds) == (1, 2)


def test_a_heartbeat_from_the_future_counts_as_now(tmp_path):
    """The other machine's clock is ahead: refused, never taken for stale; the wait includes the difference."""
    foreign(tmp_path, age=-50)
    with pytest.raises(UserError, match=r" 0 s ago.*wait (349|350) s"):
        quick(tmp_path).acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"host": 1}', b'{"token": "t"}'])
def test_a_damaged_lock_is_refused_while_young_and_taken_when_old(tmp_path, content):
    """Its age is that of the file."""
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged.*wait (299|300) s"):
        quick(tmp_path).acquire()
    assert path.read_bytes() == content
    os.utime(path, (time.time() - 301,) * 2)
    with quick(tmp_path) as lock:
        assert "unknown run" in lock.note
        lock.check()


def test_a_lock_that_is_just_being_written_is_read_again(tmp_path):
    """Between creation and first write it is empty; its owner is named, not damage."""
    (tmp_path / "run.lock").touch()
    timer = threading.Timer(0.05, foreign, [tmp_path])
    timer.start()
    with pytest.raises(UserError, match="theirs"):
        quick(tmp_path).acquire()
    timer.join()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_takers_exactly_one_wins(tmp_path, stale):
    """Five processes at the same instant, on a free folder and on a dead run's lock."""
    if stale:
        foreign(tmp_path, age=1000)
    racers = [start(RACE, tmp_path, time.time() + 1.0) for _ in range(5)]
    said = [racer.communicate()[0] for racer in racers]
    assert sum(text == "won\n" for text in said) == 1, said
    assert all(text == "won\n" or "is using" in text for text in said), said
    assert os.listdir(tmp_path) == []


def test_without_file_locks_the_later_of_two_takers_wins(tmp_path, monkeypatch):
    """A network folder without flock: who finds another's token after the pause gives up."""
    monkeypatch.setattr(lock_module, "fcntl", None)
    foreign(tmp_path, age=1000)
    timer = threading.Timer(0.1, foreign, [tmp_path], {"token": "rival"})
    timer.start()
    with pytest.raises(UserError, match="same moment"):
        quick(tmp_path, settle_seconds=0.3).acquire()
    timer.join()
    assert read_lock(tmp_path / "run.lock")["token"] == "rival"


def test_a_decision_that_hangs_is_not_waited_for_forever(tmp_path, monkeypatch):
    """Another process sits in the middle of its decision: a sentence, not a hang."""
    monkeypatch.setattr(lock_module, "GUARD_SECONDS", 0.1)
    with lock_module._one_taker(tmp_path), pytest.raises(UserError, match="stop it first"):
        quick(tmp_path).acquire()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    """Missing folder, read-only disk."""
    with pytest.raises(UserError, match=r"cannot lock .*none"):
        quick(tmp_path / "none").acquire()
    monkeypatch.setattr(
        FolderLock, "_content", lambda _: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    with pytest.raises(UserError, match="Read-only"):
        quick(tmp_path).acquire()
    assert os.listdir(tmp_path) == []


def test_holder_of_a_free_folder_is_none(tmp_path):
    """No lock, a dead one, and what read_lock calls damaged but old."""
    assert holder(tmp_path) is None
    foreign(tmp_path, age=1000)
    assert holder(tmp_path) is None


def test_a_heartbeat_slower_than_death_is_a_programming_error(tmp_path):
    """stale_seconds must leave room for a missed heartbeat."""
    with pytest.raises(ValueError):
        FolderLock(tmp_path, "x", heartbeat_seconds=200, stale_seconds=300)

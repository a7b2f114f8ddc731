"""One run per target: a second is refused, a dead one's lock is free, and who lost the lock copies no more."""

import contextlib
import errno
import json
import os
import signal
import time

import pytest
from mirror_fakes import ALL, assert_equal, content, do_round, wait_for

from newllm.errors import UserError
from newllm.saving import guard as lock_module
from newllm.saving.backup import Mirror
from newllm.saving.guard import read_lock


def test_a_second_run_with_the_same_target_is_refused(folders, mirror, tmp_path):
    """Before it trains and before it copies, with the lock's sentence; free when the first has closed."""
    copy = folders[1]
    do_round(mirror, ["model_latest.pt"])
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(
        UserError, match=rf"run mine\) is using {copy}: stop that process first, or use another folder"
    ):
        Mirror(other, copy, "theirs")
    assert content(copy) == ["model_latest.pt"]
    mirror.close()
    assert not mirror.lock.path.exists()
    with contextlib.closing(Mirror(other, copy, "theirs")) as second:
        assert read_lock(second.lock.path)["run_id"] == "theirs"
        assert second.lock.note is None


def test_a_killed_run_leaves_its_target_to_the_next_one_at_once(folders):
    """The same machine, any folder: while it lives it is respected; after kill -9 the process table decides, no clock."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Mirror(*folders, "killed")
            os.write(writing, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"x"
        with pytest.raises(UserError, match=f"process {child} on this machine"):
            Mirror(*folders, "next")
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with contextlib.closing(Mirror(*folders, "next")) as mirror:
        assert f"run killed (process {child}" in mirror.lock.note
        mirror.request(ALL)
        wait_for(lambda: mirror.copied == 3)
    assert_equal(folders)


def test_the_lock_of_a_target_beats_slowly_wherever_it_lies(mirror):
    """It may be a Drive that is mounted anywhere, and Drive counts operations."""
    assert (mirror.lock.heartbeat_seconds, mirror.lock.stale_seconds) == (120, 600)
    assert read_lock(mirror.lock.path)["stale_seconds"] == 600


@pytest.mark.parametrize("taken", [True, False])
def test_a_lost_lock_stops_the_mirror_for_good_and_is_reported(folders, mirror, taken):
    """Another run took the target, or came and went: nothing is copied any more, and the line says why and what is there."""
    copy = folders[1]
    do_round(mirror, ["model_latest.pt"], step=100)
    path, theirs = mirror.lock.path, {"token": "t", "run_id": "theirs", "host": "elsewhere"}
    if taken:
        path.write_text(json.dumps(read_lock(path) | theirs))
    else:
        path.unlink()
    do_round(mirror, step=200)
    mirror._thread.join(5)
    assert not mirror._thread.is_alive()
    mirror.request(ALL, step=300)
    mirror.close()
    assert content(copy) == ["model_latest.pt"]
    line = mirror.report()
    assert line.startswith("mirror STOPPED for good: ") and "\n" not in line and ".;" not in line
    assert line.endswith(f"; newest copy is step 100 in {copy}")
    assert (
        rf"run theirs (process {os.getpid()} on elsewhere) has taken over" if taken else "run.lock is gone"
    ) in line
    assert path.exists() == taken
    assert not taken or read_lock(path)["run_id"] == "theirs"


def test_a_lock_lost_in_the_middle_of_a_round_spares_the_rest(folders, mirror, target):
    """The lock is looked at before every copy, not only before the first."""

    def steal(operation, path):
        if operation == "write":
            found = read_lock(mirror.lock.path)
            mirror.lock.path.write_text(json.dumps(found | {"token": "t"}))

    target.before = steal
    do_round(mirror, ["model_latest.pt", "logs/a.csv", "manifest.json"])
    assert content(folders[1]) == ["model_latest.pt"]
    assert "STOPPED" in mirror.report()


def test_a_lock_that_cannot_be_read_is_an_error_like_any_other(folders, mirror, monkeypatch):
    """Drive dropped out: the round fails and is tried again; nobody is said to have taken anything."""

    def unmounted(path):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "read_lock", unmounted)
        do_round(mirror)
    assert content(folders[1]) == []
    assert "mirror FAILED: [Errno 107]" in mirror.report()
    assert mirror.retries > 0
    do_round(mirror, [])
    assert_equal(folders)
    assert mirror.report().startswith("mirror: 3 files")

"""Whatever the target does, the training never waits and never fails; what was not copied is reported and made good."""

import errno
import os
import threading
import time

import pytest
from mirror_fakes import ALL, assert_equal, content, do_round, fails, wait_for

from newllm.saving import drive


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENOTCONN, 116, 122])
def test_two_failed_writes_are_tried_again(folders, mirror, target, number):
    """A flaky target: the copies are complete, the pauses double, the report counts."""
    target.before = fails(number, times=2)
    do_round(mirror)
    assert_equal(folders)
    assert content(folders[1]) == sorted(ALL)
    assert mirror._clock.pauses == [1.0, 2.0]
    assert (mirror.copied, mirror.retries, mirror.failures) == (3, 2, 0)
    assert mirror.report() == "mirror: 3 files, 2 retries, last copy 0 s ago"


@pytest.mark.parametrize("operation", ["open wb", "write", "open rb", "replace"])
def test_a_target_that_always_fails_is_reported_and_the_old_copy_stays(folders, mirror, target, operation):
    """The run goes on; the line names the error and the newest good copy; a later round catches up."""
    source, copy = folders
    do_round(mirror, step=100)
    old = (copy / "model_latest.pt").read_bytes()
    (source / "model_latest.pt").write_text("new")
    (source / "manifest.json").write_text("new manifest")
    target.before = fails(errno.EIO, operation=operation)
    do_round(mirror, step=200)
    assert (copy / "model_latest.pt").read_bytes() == old
    assert (copy / "manifest.json").read_bytes() != b"new manifest"
    assert mirror._clock.pauses == [1.0, 2.0, 4.0]
    assert mirror.failures == 1
    assert mirror.report().startswith("mirror FAILED: [Errno 5]")
    assert "newest copy is step 100" in mirror.report()
    target.before = lambda *_: None
    do_round(mirror, [])  # nothing new: what failed is still pending
    assert_equal(folders)
    assert content(copy) == sorted(ALL)
    assert mirror.report().startswith("mirror: 5 files")
    assert mirror.newest_step == 200


def test_a_failing_target_from_the_start(folders, mirror, target):
    """No copy ever: the report says so, after close as well."""
    target.before = fails(errno.ENOSPC)
    mirror.request(ALL)
    mirror.close()
    assert not mirror._thread.is_alive()
    assert "FAILED: [Errno 28]" in mirror.report() and "no copy yet" in mirror.report()
    assert content(folders[1]) == []


def test_what_failed_before_the_end_is_tried_once_more_at_the_end(folders, mirror, target):
    """Pending files of a failed round belong to the flush."""
    target.before = fails(errno.EIO, times=4)
    do_round(mirror, ["model_latest.pt"])
    assert mirror.failures == 1
    mirror.close()
    assert_equal(folders, ["model_latest.pt"])
    assert "FAILED" not in mirror.report()


def test_a_round_that_fails_while_the_run_ends_is_tried_once_more(folders, mirror, target):
    """close comes in the middle of a round that then fails: its files belong to the flush too."""
    started, closing = threading.Event(), threading.Event()
    left = [4]

    def fault(operation, path):
        if operation == "write":
            started.set()
            closing.wait(5)
            if left[0]:
                left[0] -= 1
                raise OSError(errno.EIO, "Input/output error", path)

    target.before = fault
    mirror.request(["model_latest.pt"])
    assert started.wait(5)
    closer = threading.Thread(target=mirror.close)
    closer.start()
    wait_for(lambda: mirror._closing)
    closing.set()
    closer.join(5)
    assert_equal(folders, ["model_latest.pt"])
    assert "FAILED" not in mirror.report()


def test_a_bad_request_is_reported_and_does_not_end_the_thread(folders, mirror):
    """A folder for a file fails alone, and nonsense fails its round; the thread lives on and ends when told."""
    do_round(mirror, ["logs", "logs/a.csv"])
    assert "FAILED: [Errno 21]" in mirror.report()
    assert_equal(folders, ["logs/a.csv"])
    do_round(mirror, [None])
    assert "FAILED" in mirror.report() and "NoneType" in mirror.report()
    assert mirror._thread.is_alive()
    mirror.close()
    assert not mirror._thread.is_alive()


@pytest.mark.parametrize("arrives", [0, 100])
def test_a_rename_that_copies_only_a_part_is_detected(folders, mirror, target, arrives):
    """Checked under the final name: reported while it goes on, mended when the rename works again; no manifest meanwhile."""
    target.copying_rename = arrives
    do_round(mirror)
    assert "reads back differently" in mirror.report()
    assert "manifest.json" not in content(folders[1])
    target.copying_rename = None
    do_round(mirror, [])
    assert_equal(folders)


def test_a_truncated_write_never_takes_the_name(folders, mirror, target):
    """A disk that drops the tail of what was written: seen before the rename, the old copy stays."""
    source, copy = folders
    do_round(mirror)
    old = (copy / "model_latest.pt").read_bytes()
    (source / "model_latest.pt").write_text("new" * 100)

    def truncating(operation, path):
        if operation == "open rb" and str(path).endswith(".tmp"):
            os.truncate(path, 10)

    target.before = truncating
    do_round(mirror)
    assert (copy / "model_latest.pt").read_bytes() == old
    assert "reads back differently" in mirror.report()


def test_request_does_not_wait_for_a_slow_target(folders, mirror, target):
    """Half a second a write: a hundred requests take next to no time, before, during and after a copy."""
    slow = threading.Event()

    def wait(operation, _):
        if operation == "write":
            slow.set()
            time.sleep(0.5)

    target.before = wait
    mirror.request(ALL)
    assert slow.wait(5)
    started = time.monotonic()
    for step in range(100):
        mirror.request(ALL, step=step)
    assert time.monotonic() - started < 0.1
    assert mirror.copied == 0
    mirror.close()
    assert_equal(folders)


def test_close_does_not_wait_longer_than_told(folders, mirror, target):
    """A target that hangs: close returns, the report says so, and the lock stays while something may yet be written."""
    hang = threading.Event()
    target.before = lambda operation, _: hang.wait(10) if operation == "write" else None
    mirror.request(ALL)
    started = time.monotonic()
    mirror.close(time_limit=0.2)
    assert time.monotonic() - started < 2
    assert "FAILED: not finished within 0.2 s" in mirror.report()
    assert mirror.lock.path.exists()
    hang.set()
    mirror._thread.join(5)
    assert not mirror._thread.is_alive()
    assert not mirror.lock.path.exists()


def test_a_copy_that_takes_too_long_is_given_up(folders, mirror, target):
    """copy_timeout counts on the injected clock, between blocks."""
    (folders[0] / "model_latest.pt").write_bytes(bytes(3 * drive.BLOCK))

    def slow(operation, _):
        if operation == "write":
            mirror._clock.now += 400

    target.before = slow
    do_round(mirror, ["model_latest.pt"])
    assert "took too long" in mirror.report()
    assert content(folders[1]) == []


def test_a_target_that_vanishes_is_not_made_anew(folders, mirror, tmp_path):
    """A dropped mount: writing below the mount point would fill the local disk. Back again, it is served."""
    do_round(mirror, ["model_latest.pt"])
    folders[1].rename(tmp_path / "away")
    do_round(mirror)
    assert not folders[1].exists()
    assert "is Drive still mounted?" in mirror.report()
    (tmp_path / "away").rename(folders[1])
    do_round(mirror)
    assert_equal(folders)


def test_a_dead_mount_is_survived(folders, mirror, monkeypatch):
    """ENOTCONN already when looking at the folder."""
    real = os.stat

    def disconnected(path, *args, **kwargs):
        if str(path).startswith(str(folders[1])):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", disconnected)
        do_round(mirror)
    assert "FAILED" in mirror.report()
    do_round(mirror)
    assert_equal(folders)


def test_a_folder_that_cannot_sync_is_served(folders, mirror, monkeypatch):
    """fsync answers EINVAL on some network folders; reading back is proof enough."""

    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    do_round(mirror)
    assert_equal(folders)
    assert mirror.retries == 0

"""Second copies arrive whole or are reported; whatever the target does, the training never waits and never fails."""

import builtins
import errno
import os
import threading
import time
from pathlib import Path

import pytest

from newllm.errors import UserError
from newllm.training import drive
from newllm.training.mirror import Mirror


class Clock:
    """Time that moves when told; pauses are recorded and take no time."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)


class Target:
    """Faults for everything below one folder: `before(operation, path)` is called ahead of open, write and replace."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.before, self.log = str(folder), lambda operation, path: None, []
        self.copying_rename = None  # bytes that arrive when a rename copies only a part
        self._open, self._replace = builtins.open, os.replace
        monkeypatch.setattr(builtins, "open", self.open)
        monkeypatch.setattr(os, "replace", self.replace)

    def at(self, operation, path):
        self.log.append((operation, Path(path).name))
        self.before(operation, path)

    def open(self, path, mode="r", *args, **kwargs):
        if not str(path).startswith(self.folder):
            return self._open(path, mode, *args, **kwargs)
        self.at(f"open {mode}", path)
        file = self._open(path, mode, *args, **kwargs)
        return Written(file, self) if "w" in mode else file

    def replace(self, source, target):
        if str(target).startswith(self.folder):
            self.at("replace", target)
            if self.copying_rename is not None:
                content = Path(source).read_bytes()[: self.copying_rename]
                os.unlink(source)
                Path(target).write_bytes(content)
                return
        self._replace(source, target)

    def renames(self):
        return [name for operation, name in self.log if operation == "replace"]


class Written:
    """File object that asks the target before each write."""

    def __init__(self, file, target):
        self.file, self.target = file, target

    def write(self, data):
        self.target.at("write", self.file.name)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def fails(number, times=None, operation="write"):
    """A fault: this errno at the first `times` operations of that kind (None: always)."""
    left = [times]

    def fault(now, path):
        if now.startswith(operation) and left[0] != 0:
            left[0] = left[0] and left[0] - 1
            raise OSError(number, os.strerror(number), path)

    return fault


@pytest.fixture
def folders(tmp_path):
    """(source, target): the source holds three files."""
    source, target = tmp_path / "local", tmp_path / "drive"
    for folder in (source, target, source / "logs"):
        folder.mkdir()
    for name in ("model_latest.pt", "manifest.json", "logs/a.csv"):
        (source / name).write_bytes(name.encode() * 1000)
    return source, target


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def mirror(folders, clock):
    made = Mirror(*folders, clock=clock, sleep=clock.sleep)
    yield made
    made.close(flush=False, time_limit=5)


@pytest.fixture
def target(folders, monkeypatch):
    return Target(folders[1], monkeypatch)


ALL = ("manifest.json", "model_latest.pt", "logs/a.csv")


def wait_for(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def idle(mirror):
    """Whether no round is under way."""
    with mirror._changed:
        return mirror._next_round > mirror._clock()


def do_round(mirror, paths=ALL, **options):
    """One request, and wait until its round is over, well or not."""
    mirror._clock.now += 1000
    mirror.request(paths, **options)
    wait_for(lambda: idle(mirror))


def assert_equal(folders, names=ALL):
    source, target = folders
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_copies_are_equal_and_nothing_else_is_left(folders, mirror, target):
    """Relative names are kept, absolute paths work, the manifest comes last, no temporary file stays."""
    source, copy = folders
    do_round(mirror, ["manifest.json", source / "model_latest.pt", "logs/a.csv"], step=100)
    assert_equal(folders)
    assert content(copy) == sorted(ALL)
    assert target.renames() == ["model_latest.pt", "a.csv", "manifest.json"]
    mirror._clock.now += 12
    assert mirror.report() == "mirror: 3 files, 0 retries, last copy 12 s ago"


def test_copies_are_throttled_and_the_newest_content_wins(folders, mirror):
    """Between rounds lie min_seconds; what was asked for meanwhile is copied once, as it is then."""
    source, copy = folders
    do_round(mirror, ["model_latest.pt"])
    for number in range(5):
        mirror._clock.now += 100
        (source / "model_latest.pt").write_text(f"save {number}")
        mirror.request(["model_latest.pt", f"model_{number}.pt"])
    mirror.request(["logs/a.csv"])
    time.sleep(0.1)
    assert content(copy) == ["model_latest.pt"]
    assert mirror.copied == 1
    mirror._clock.now += 100
    mirror.request([])
    wait_for(lambda: mirror.copied == 3)
    assert_equal(folders, ["model_latest.pt", "logs/a.csv"])
    assert (copy / "model_latest.pt").read_text() == "save 4"


def test_the_throttle_ends_by_itself(folders):
    """No further request is needed when the time has come."""
    mirror = Mirror(*folders, min_seconds=0.2)
    mirror.request(["logs/a.csv"])
    wait_for(lambda: mirror.copied == 1)
    mirror.request(["model_latest.pt"])
    wait_for(lambda: mirror.copied == 2)
    mirror.close()


def test_an_unchanged_file_is_not_copied_again_unless_it_is_gone(folders, mirror):
    """Drive counts operations."""
    do_round(mirror)
    do_round(mirror)
    assert mirror.copied == 3
    (folders[1] / "model_latest.pt").unlink()
    do_round(mirror)
    assert mirror.copied == 4
    assert_equal(folders)


def test_close_copies_what_is_pending(folders, mirror):
    """The end of a run does not wait for the throttle."""
    do_round(mirror, ["model_latest.pt"])
    mirror.request(ALL)
    mirror.close()
    assert_equal(folders)
    assert not mirror._thread.is_alive()
    mirror.request(ALL)  # too late, and harmless
    mirror.close()


def test_close_without_flush_copies_nothing(folders, mirror):
    """As after a lost lock."""
    do_round(mirror, ["model_latest.pt"])
    mirror.request(ALL)
    mirror.close(flush=False)
    assert content(folders[1]) == ["model_latest.pt"]
    assert not mirror._thread.is_alive()


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
        mirror.request(ALL, keep=["x"], step=step)
    assert time.monotonic() - started < 0.1
    assert mirror.copied == 0
    mirror.close()
    assert_equal(folders)


def test_close_does_not_wait_longer_than_told(folders, mirror, target):
    """A target that hangs: close returns, and the report says that the copy is not finished."""
    hang = threading.Event()
    target.before = lambda operation, _: hang.wait(10) if operation == "write" else None
    mirror.request(ALL)
    started = time.monotonic()
    mirror.close(time_limit=0.2)
    assert time.monotonic() - started < 2
    assert "FAILED: not finished within 0.2 s" in mirror.report()
    hang.set()
    mirror._thread.join(5)
    assert not mirror._thread.is_alive()


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


def test_what_is_copied_was_there_at_one_moment(folders, mirror, target):
    """Training replaces files while they are copied: model and manifest of the mirror still belong together."""
    source, copy = folders
    for name in ("model_latest.pt", "manifest.json"):
        (source / name).write_text("save 1")

    def save_again(operation, _):
        if operation == "write":
            for name in ("model_latest.pt", "manifest.json"):
                (source / "new").write_text("save 2")
                target._replace(source / "new", source / name)

    target.before = save_again
    do_round(mirror, ["model_latest.pt", "manifest.json"])
    assert (copy / "model_latest.pt").read_text() == (copy / "manifest.json").read_text() == "save 1"


def test_rotation_deletes_old_steps_only_after_the_new_copies_are_there(folders, mirror, target):
    """`keep` names the step files that stay, other files are never touched, deleted ones were emptied first."""
    source, copy = folders
    for name in ("model_step_1.pt", "model_step_1 (1).pt", "model_step_2.pt", "model_best.pt", "my_step_1.pt"):
        (copy / name).write_text("old")
    (source / "model_step_3.pt").write_text("new")
    target.before = fails(errno.EIO)
    do_round(mirror, ["model_step_3.pt"], keep={"model_step_2.pt", "model_step_3.pt"})
    assert "model_step_1.pt" in content(copy)
    target.before = lambda *_: None
    emptied = []
    real = os.truncate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "truncate", lambda path, size: (emptied.append(Path(path).name), real(path, size)))
        do_round(mirror, [])
        wait_for(lambda: not mirror._failing)
    assert content(copy) == ["model_best.pt", "model_step_2.pt", "model_step_3.pt", "my_step_1.pt"]
    assert sorted(emptied) == ["model_step_1 (1).pt", "model_step_1.pt"]


def test_files_that_are_gone_are_left_out_and_foreign_ones_reported(folders, mirror, tmp_path):
    """A step file rotated away before its turn is no failure; a path outside the source is."""
    do_round(mirror, ["model_step_1.pt", "logs/a.csv"])
    assert mirror.report().startswith("mirror: 1 files")
    (tmp_path / "secret").write_text("x")
    do_round(mirror, ["../secret"])
    assert "secret does not lie in" in mirror.report()
    assert content(folders[1]) == ["logs/a.csv"]


def test_nothing_requested_nothing_said(mirror):
    """The report of a run without saves."""
    assert mirror.report() == "mirror: 0 files, 0 retries, no copy yet"


def test_bad_folders_are_refused_at_the_start(folders, tmp_path):
    """In each other, without parent (Drive not mounted), a file: a sentence before training, and nothing created."""
    source, copy = folders
    for inside in (source, source / "mirror", tmp_path):
        with pytest.raises(UserError, match="must not lie in each other"):
            Mirror(source, inside)
    with pytest.raises(UserError, match="mount Drive first"):
        Mirror(source, tmp_path / "none" / "copy")
    with pytest.raises(UserError, match="not a folder"):
        Mirror(copy, source / "model_latest.pt")
    assert not (tmp_path / "none").exists()
    assert content(source) == sorted(ALL)


def test_an_unmounted_drive_is_refused(folders, tmp_path, monkeypatch):
    """A folder where Drive should be mounted is not Drive."""
    monkeypatch.setattr(drive, "COLAB_DRIVE", folders[1])
    (folders[1] / "MyDrive").mkdir()
    with pytest.raises(UserError, match="mount Drive first"):
        Mirror(folders[0], folders[1] / "MyDrive")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == folders[1])
    Mirror(folders[0], folders[1] / "MyDrive").close()


def test_a_folder_that_cannot_sync_is_served(folders, mirror, monkeypatch):
    """fsync answers EINVAL on some network folders; reading back is proof enough."""

    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    do_round(mirror)
    assert_equal(folders)
    assert mirror.retries == 0

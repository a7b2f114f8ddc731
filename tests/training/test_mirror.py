"""Second copies arrive whole or are reported; whatever the target does, the training never waits and never fails."""

import builtins
import contextlib
import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from newllm.errors import UserError
from newllm.storage import Corrupt, load_sealed, save_sealed
from newllm.training import drive
from newllm.training import lock as lock_module
from newllm.training.lock import read_lock
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
        self.copying_rename = None  # bytes that arrive when the rename of a finished copy copies only a part
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
            if self.copying_rename is not None and str(source).endswith(".tmp"):
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


@pytest.fixture(autouse=True)
def no_second_look_later(monkeypatch):
    """A network folder may show the lock late; these never do."""
    monkeypatch.setattr(lock_module, "READ_PAUSE", 0)


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
    made = Mirror(*folders, "mine", clock=clock, sleep=clock.sleep)
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
    """Names of the files, but for the lock."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"
    )


def save(source, number):
    save_sealed({"save_number": number}, source / "model_latest.pt")


def slots(folder):
    """Numbers of the whole states in a folder, by slot."""
    found = {}
    for slot in ("latest", "prev"):
        with contextlib.suppress(Corrupt, FileNotFoundError):
            found[slot] = load_sealed(folder / f"model_{slot}.pt")["save_number"]
    return found


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
    mirror = Mirror(*folders, "mine", min_seconds=0.2)
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


def test_the_target_holds_the_latest_state_and_the_one_before(folders, mirror, target):
    """Each new copy moves the old one to the second slot; an unchanged one moves nothing."""
    source, copy = folders
    for number, expected in ((1, {"latest": 1}), (2, {"latest": 2, "prev": 1}), (3, {"latest": 3, "prev": 2})):
        save(source, number)
        for _ in range(2):
            do_round(mirror, ["model_latest.pt", "manifest.json"])
            assert slots(copy) == expected
    assert content(copy) == ["manifest.json", "model_latest.pt", "model_prev.pt"]
    assert target.renames()[-2:] == ["model_prev.pt", "model_latest.pt"]


def test_a_kill_at_any_instant_leaves_a_whole_state(folders, clock, target, monkeypatch):
    """From one operation on nothing works, not even tidying up: the old or the new state is there; the next run mends."""
    source, copy = folders
    between, left, number = 0, 0, 1

    def kill(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "killed")

    save(source, number)
    for operations in range(100):
        mirror = Mirror(*folders, "mine", attempts=1, clock=clock, sleep=clock.sleep)
        do_round(mirror, ["model_latest.pt"])
        assert slots(copy)["latest"] == number  # whatever the one before left behind
        number, left, target.before = number + 1, operations, kill
        save(source, number)
        with monkeypatch.context() as patch:
            patch.setattr(os, "truncate", kill)
            do_round(mirror, ["model_latest.pt"])
        mirror.close(flush=False)
        target.before = lambda *_: None
        found = slots(copy)
        assert {number - 1, number} & set(found.values()), f"nothing whole after {operations} operations"
        between += found == {"prev": number - 1} and not (copy / "model_latest.pt").exists()
        if left >= 0:
            break
    assert operations == 7  # read the old one, open, write, read back, rename, rename, read back
    assert between == 1  # the kill between the renames
    assert found == {"latest": number, "prev": number - 1}
    assert content(copy) == ["model_latest.pt", "model_prev.pt"]


@pytest.mark.parametrize("arrives", [0, 100])
def test_a_torn_latest_never_takes_the_place_of_the_whole_one_before(folders, clock, target, arrives):
    """Neither in the further attempts, nor in the next round, nor in the next session; then it is mended."""
    source, copy = folders
    for session in range(2):
        mirror = Mirror(*folders, "mine", clock=clock, sleep=clock.sleep)
        if session == 0:
            for number in (1, 2):
                save(source, number)
                do_round(mirror, ["model_latest.pt"])
            target.copying_rename = arrives
            save(source, 3)
        for _ in range(2):
            do_round(mirror, ["model_latest.pt"])
            assert "reads back differently" in mirror.report()
            assert slots(copy) == {"prev": 2}
            assert (copy / "model_latest.pt").stat().st_size == arrives
        mirror.close(flush=False)
    target.copying_rename = None
    mirror = Mirror(*folders, "mine", clock=clock, sleep=clock.sleep)
    do_round(mirror, ["model_latest.pt"])
    mirror.close()
    assert slots(copy) == {"latest": 3, "prev": 2}


def test_a_copy_that_the_target_damages_later_is_made_again(folders, mirror):
    """Drive loses the tail of what it had: noticed, and the state before stays in its slot."""
    source, copy = folders
    for number in (1, 2):
        save(source, number)
        do_round(mirror)
    os.truncate(copy / "model_latest.pt", 100)
    do_round(mirror)
    assert slots(copy) == {"latest": 2, "prev": 1}


def test_an_old_copy_that_cannot_be_read_is_not_replaced(folders, mirror, target):
    """Perhaps it is the only whole one: an error of the target, tried again."""
    source, copy = folders
    save(source, 1)
    do_round(mirror, ["model_latest.pt"])
    save(source, 2)
    fault = fails(errno.EIO, operation="open rb")
    target.before = lambda operation, path: fault(operation, path) if path == copy / "model_latest.pt" else None
    do_round(mirror, ["model_latest.pt"])
    assert "FAILED: [Errno 5]" in mirror.report()
    target.before = lambda *_: None
    assert slots(copy) == {"latest": 1}
    do_round(mirror, [])
    assert slots(copy) == {"latest": 2, "prev": 1}


def test_a_second_run_with_the_same_target_is_refused(folders, mirror, tmp_path):
    """Before it trains and before it copies, with the lock's sentence; free when the first has closed."""
    copy = folders[1]
    do_round(mirror, ["model_latest.pt"])
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match=rf"run mine\) is using {copy}: stop that process first, or use another folder"):
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
    assert (rf"run theirs (process {os.getpid()} on elsewhere) has taken over" if taken else "run.lock is gone") in line
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


def test_files_that_are_gone_are_left_out_and_foreign_ones_reported(folders, mirror, tmp_path):
    """A file that was renamed before its turn is no failure; a path outside the source is."""
    do_round(mirror, ["model_best.pt", "logs/a.csv"])
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
            Mirror(source, inside, "mine")
    with pytest.raises(UserError, match="mount Drive first"):
        Mirror(source, tmp_path / "none" / "copy", "mine")
    with pytest.raises(UserError, match="not a folder"):
        Mirror(copy, source / "model_latest.pt", "mine")
    assert not (tmp_path / "none").exists()
    assert content(source) == sorted(ALL)


def test_an_unmounted_drive_is_refused(folders, tmp_path, monkeypatch):
    """A folder where Drive should be mounted is not Drive."""
    monkeypatch.setattr(drive, "COLAB_DRIVE", folders[1])
    (folders[1] / "MyDrive").mkdir()
    with pytest.raises(UserError, match="mount Drive first"):
        Mirror(folders[0], folders[1] / "MyDrive", "mine")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == folders[1])
    Mirror(folders[0], folders[1] / "MyDrive", "mine").close()


def test_a_folder_that_cannot_sync_is_served(folders, mirror, monkeypatch):
    """fsync answers EINVAL on some network folders; reading back is proof enough."""

    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    do_round(mirror)
    assert_equal(folders)
    assert mirror.retries == 0

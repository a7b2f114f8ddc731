"""Second copies are whole, of one moment, and never in the way, whatever their folder does."""

import contextlib
import errno
import json
import os
import threading
import time
from types import SimpleNamespace

import pytest
from left_behind import Faults, refuse

from newllm.errors import UserError
from newllm.saving import backup as backup_module
from newllm.saving.backup import Backup
from newllm.saving.files import Corrupt, load_sealed, save_sealed
from newllm.saving.guard import read_manifest

ALL = ["model_best.pt", "model_latest.pt", "manifest.json"]


@pytest.fixture
def folders(tmp_path):
    """(source, target): the source holds three files."""
    source, target = tmp_path / "local", tmp_path / "drive"
    source.mkdir()
    target.mkdir()
    for name in ALL:
        (source / name).write_bytes(b'{"x": 1}')
    return source, target


@pytest.fixture
def start(folders, monkeypatch):
    """Function that opens a Backup between the folders; all are closed at the end."""
    monkeypatch.setattr(backup_module, "PAUSE", 0.01)
    monkeypatch.setattr(backup_module, "LAST_SECONDS", 5)
    with contextlib.ExitStack() as stack:

        def begin(every_seconds=0.0):
            backup = Backup(*folders, SimpleNamespace(token="t"), every_seconds, begin.said.append)
            stack.callback(backup.close, flush=False)
            return backup

        begin.said = []
        yield begin


@pytest.fixture
def target(folders, monkeypatch):
    return Faults(folders[1], monkeypatch)


def do_round(backup, names=ALL, save=1):
    """One request, until its round is over, well or not."""
    backup.request(names, save)
    assert backup._idle.wait(10)


def assert_equal(folders):
    for name in ALL:
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()


def save(folder, number):
    save_sealed({"number": number}, folder / "model_latest.pt")


def slots(folder):
    """Numbers of the whole states in a folder, by slot."""
    found = {}
    for slot in ("latest", "prev"):
        with contextlib.suppress(Corrupt, FileNotFoundError):
            found[slot] = load_sealed(folder / f"model_{slot}.pt")["number"]
    return found


def test_copies_are_equal_and_made_once(folders, start, target):
    """In the order asked for, nothing else is left; an unchanged file is copied again only if it is gone."""
    (folders[0] / "runs").mkdir()
    (folders[0] / "runs" / "old.pt").write_text("of another run")
    made, backup = [], start()
    target.before = lambda operation, path, _: made.append(path.name) if operation == "name" else None
    do_round(backup, [*ALL, "model_gone.pt", "runs/old.pt"], save=7)
    assert_equal(folders)
    assert {path.name for path in folders[1].iterdir()} == {*ALL, "runs", "run.lock"}
    assert backup.report() == f"mirror: the newest of save 7 in {folders[1]}" and made == [*ALL, "old.pt"]
    do_round(backup)
    (folders[1] / "model_best.pt").unlink()
    do_round(backup)
    assert_equal(folders)
    assert made == [*ALL, "old.pt", "model_best.pt"]


def test_rounds_are_throttled_but_for_the_last(folders, start):
    """Between them lie every_seconds; what is asked for meanwhile is copied at the end, if at all."""
    backup = start(every_seconds=1000.0)
    do_round(backup, ["model_best.pt"])
    for flush in (False, True):
        do_round(backup, ALL, 2)
        do_round(backup, ["model_best.pt"], 2)  # takes nothing from what waits already
        assert not (folders[1] / "model_latest.pt").exists()
        backup.close(flush)
    assert_equal(folders)


def test_copies_are_of_one_moment(folders, start, target):
    """Training replaces files while they are copied: all are of the time when the round began."""
    backup = start()
    before = {name: (folders[0] / name).read_bytes() for name in ALL}

    def save_again(operation, *_):
        if operation == "write":
            for name in ALL:
                (folders[0] / "new").write_text("new")
                (folders[0] / "new").replace(folders[0] / name)

    target.before = save_again
    do_round(backup)
    assert {name: (folders[1] / name).read_bytes() for name in ALL} == before


@pytest.mark.parametrize(
    ("operation", "number"),
    [("write", errno.ENOSPC), ("write", errno.ENOTCONN), ("open wb", errno.EROFS), ("name", errno.EIO)],
)
def test_a_failing_target_keeps_its_copies_and_is_told_once(folders, start, target, operation, number):
    """A line when it begins, another at the end; the round after the next save catches up."""
    backup = start()
    save(folders[0], 1)
    do_round(backup, save=1)
    save(folders[0], 2)
    target.before = lambda now, path, _: now.startswith(operation) and refuse(number, path)
    for _ in range(2):
        do_round(backup, save=2)
    assert len(start.said) == 1 and f"no second copy in {folders[1]} ([Errno {number}]" in start.said[0]
    assert backup.report().startswith(f"mirror FAILED: [Errno {number}]")
    assert backup.report().endswith(f"; the newest of save 1 in {folders[1]}")
    target.before = lambda *_: None
    assert slots(folders[1])["latest"] == 1
    do_round(backup, save=3)
    assert_equal(folders)
    assert "the newest of save 3" in backup.report()


def test_a_flaky_target_at_the_end_of_a_run_is_tried_again(folders, start, target):
    """Two failures in a row lose nothing."""
    backup, left = start(), iter([True, True])
    target.before = lambda now, path, _: now == "write" and next(left, False) and refuse(errno.EIO, path)
    backup.request(ALL, 1)
    backup.close()
    assert_equal(folders)
    assert next(left, False) is False and "FAILED" not in backup.report()


def test_a_slow_target_keeps_nobody_waiting(folders, start, target, monkeypatch):
    """A hundred requests take no time; the end waits as long as told, and keeps the target's lock."""
    backup, go_on = start(), threading.Event()
    target.before = lambda operation, *_: go_on.wait(10) if operation == "write" else None
    monkeypatch.setattr(backup_module, "LAST_SECONDS", 0.2)
    began = time.monotonic()
    for number in range(100):
        backup.request(ALL, number)
    backup.close()
    assert time.monotonic() - began < 2 and "FAILED: not finished within 0.2 s" in backup.report()
    with pytest.raises(UserError, match="is using"):
        start()
    go_on.set()


def test_a_target_that_vanishes_is_not_made_anew(folders, start, tmp_path):
    """A dropped mount: writing below its mount point would fill the local disk. Back again, it is served."""
    backup = start()
    do_round(backup, ["model_best.pt"])
    folders[1].rename(tmp_path / "away")
    do_round(backup)
    assert not folders[1].exists() and "FAILED" in backup.report()
    (tmp_path / "away").rename(folders[1])
    do_round(backup)
    assert_equal(folders)


def test_a_kill_at_any_instant_leaves_a_whole_state(folders, start, target):
    """From one operation on nothing works: the old or the new state is there, and the next run mends it."""
    between, left, number = 0, 0, 1

    def kill(operation, path, _):
        nonlocal left
        left -= 1
        if left < 0:
            refuse(errno.EIO, path)

    save(folders[0], number)
    for operations in range(100):
        backup = start()
        do_round(backup, ["model_latest.pt"])
        assert slots(folders[1])["latest"] == number  # whatever the one before left behind
        number, left, target.before = number + 1, operations, kill
        save(folders[0], number)
        do_round(backup, ["model_latest.pt"])
        target.before = lambda *_: None
        backup.close(flush=False)
        found = slots(folders[1])
        assert {number - 1, number} & set(found.values()), f"nothing whole after {operations} operations"
        between += found == {"prev": number - 1}
        if left >= 0:
            break
    assert operations > 5 and between >= 1  # the kill between the renames
    assert found == {"latest": number, "prev": number - 1}


def test_a_torn_rename_never_costs_the_whole_state_before(folders, start, monkeypatch):
    """Neither in the next round nor in the next session; then it is mended."""
    backup, replace = start(), os.replace

    def tearing(source, target):
        replace(source, target)
        if source.name == ".model_latest.pt.copy.tmp":
            os.truncate(target, 100)

    for number in (1, 2, 3):
        monkeypatch.setattr(os, "replace", tearing if number == 3 else replace)
        save(folders[0], number)
        do_round(backup)
    for _ in range(2):
        for _ in range(2):
            do_round(backup)
            assert "reads back differently" in backup.report() and slots(folders[1]) == {"prev": 2}
        backup.close(flush=False)
        backup = start()
    monkeypatch.setattr(os, "replace", replace)
    do_round(backup)
    assert slots(folders[1]) == {"latest": 3, "prev": 2}


def test_two_runs_never_mix_in_one_target(folders, start, target):
    """On one machine the second is refused; by another's token the first stops before its next file."""
    backup, other = start(), "process 7 on elsewhere"
    with pytest.raises(UserError, match=rf"is using {folders[1]}: stop that process first"):
        start()
    do_round(backup, ["model_best.pt"])

    def steal(operation, path, _):
        if path.name.startswith(".model_latest") and operation == "write":
            (folders[1] / "manifest.json").write_text(json.dumps({"writer": other}))

    target.before = steal
    for number in (2, 3):
        (folders[0] / "model_best.pt").write_text(f"mine {number}")
        do_round(backup, ["model_latest.pt", "model_best.pt"], number)
    backup.close()
    assert (folders[1] / "model_best.pt").read_text() == '{"x": 1}'
    assert read_manifest(folders[1])["writer"] == other and len(start.said) == 1
    assert backup.report().startswith(f"mirror FAILED: {other} has taken over {folders[1]}")


def test_bad_folders_are_refused_at_the_start(folders, tmp_path):
    """In each other, or without parent, as where Drive is not mounted: a sentence, and nothing is made."""
    missing, before = tmp_path / "none" / "copy", set(tmp_path.rglob("*"))
    for folder, match in ((folders[0] / "mirror", "must not lie in each other"), (missing, "mount Drive")):
        with pytest.raises(UserError, match=match):
            Backup(folders[0], folder, SimpleNamespace(token="t"), 0.0, print)
    assert set(tmp_path.rglob("*")) == before

"""Second copies are whole, throttled, of one moment and of the right files, between folders that are checked."""

import os
import time

import pytest
from mirror_fakes import ALL, assert_equal, content, do_round, wait_for

from newllm.errors import UserError
from newllm.saving import drive
from newllm.saving.backup import Mirror


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

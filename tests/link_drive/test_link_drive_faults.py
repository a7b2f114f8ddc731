"""Linking to Drive loses nothing: not when Drive fails, not when a file changes meanwhile, not when killed anywhere."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from linking import fill, link, state

from newllm.errors import UserError
from scripts import link_drive

ROOT = Path(__file__).parents[2]

# Dies by SIGKILL just before the n-th operation on the file system; exits with 0 if there are fewer.
KILLED = """
import builtins, io, os, signal, sys
left = int(sys.argv[1])
def deadly(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
from scripts import link_drive
for name in ("mkdir", "symlink", "replace", "fsync", "unlink", "rmdir", "truncate"):
    setattr(os, name, deadly(getattr(os, name)))
builtins.open = io.open = deadly(open)
link_drive.main(sys.argv[2], ["cache", "checkpoints"], sys.argv[3], relink="relink" in sys.argv, say=lambda line: None)
"""


def killed_at(n, drive, project, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(n), str(drive), str(project), *options]
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode


def test_a_file_changed_during_the_move_is_not_deleted(project, drive, monkeypatch):
    """Something writes into the folder after the copy: a sentence, and the newer content is still there."""
    fill(project / "cache", {"a": "1"})
    real = link_drive.copy_verified

    def copy(file, target):
        real(file, target)
        (project / "cache" / "a").write_text("newer")

    monkeypatch.setattr(link_drive, "copy_verified", copy)
    with pytest.raises(UserError, match="changed while it was moved"):
        link(drive, project, "cache")
    assert (project / "cache" / "a").read_text() == "newer"


@pytest.mark.parametrize("fault", ["full", "partial rename", "altered"])
def test_a_failing_drive_loses_nothing_and_the_next_run_finishes(project, drive, monkeypatch, fault):
    """Disk full, a rename that copies half, bytes that read back differently: all local files stay, then all arrive."""
    fill(project / "cache", {"a": "first" * 10, "b": "second" * 10})
    before = state(project)
    real_replace, real_sync = os.replace, os.fsync

    def full(_):
        raise OSError(28, "No space left on device")

    def altered(handle):
        real_sync(handle)
        os.ftruncate(handle, 3)

    def partial(source, target):
        real_replace(source, target)
        os.truncate(target, 3)

    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            *(
                ("replace", partial)
                if fault == "partial rename"
                else ("fsync", full if fault == "full" else altered)
            ),
        )
        with pytest.raises(UserError, match="nothing is lost, run the same command again"):
            link(drive, project, "cache")
    assert state(project) == before
    assert os.listdir(drive / "cache") == []
    link(drive, project, "cache")
    assert sorted(os.listdir(drive / "cache")) == ["a", "b"]
    assert (project / "cache" / "a").read_text() == "first" * 10


def test_a_link_that_leads_nowhere_useful_is_noticed(project, drive, monkeypatch):
    """The probe: what is written here must arrive there."""
    (drive / "cache").mkdir(parents=True)
    (project / "elsewhere").mkdir()
    (project / "cache").symlink_to(project / "elsewhere")
    (drive / "cache" / ".link_probe").write_text("of a killed run")
    with pytest.raises(UserError, match="does not arrive"):
        link_drive.probe(project / "cache", drive / "cache")


def test_killed_before_any_operation_the_same_command_finishes(tmp_path):
    """SIGKILL at the 1st, 2nd, ... operation until a run survives: no content is ever lost, the next run completes."""
    local = {"cache/tokens.pt": "tokens", "checkpoints/model.pt": "model", "checkpoints/logs/a.csv": "1,2"}
    on_drive = {"checkpoints/model.pt": "model", "cache/old": "old"}
    expected = sorted((name, text) for name, text in {**on_drive, **local}.items())
    for n in range(1, 200):
        project, drive = tmp_path / str(n) / "project", tmp_path / str(n) / "MyDrive" / "newllm"
        fill(project, local)
        fill(drive, on_drive)
        code = killed_at(n, drive, project)
        whole = {
            path.read_text() for folder in (project, drive) for path in folder.rglob("*") if path.is_file()
        }
        assert {"tokens", "model", "1,2", "old"} <= whole, f"operation {n}"
        if code == 0:
            break
        assert code == -signal.SIGKILL
        link(drive, project)
        found = [
            (str(path.relative_to(drive)), path.read_text()) for path in drive.rglob("*") if path.is_file()
        ]
        assert sorted(found) == expected, f"operation {n}"
        assert sorted(os.listdir(project)) == ["cache", "checkpoints"]
        assert all((project / name).is_symlink() for name in ("cache", "checkpoints"))
    assert n > 25, "the fault was never reached"
    assert code == 0


def test_killed_while_relinking(tmp_path):
    """The old link or the new one, never none; the next run leaves no trace of the first."""
    for n in range(1, 60):
        project, drive = tmp_path / str(n) / "project", tmp_path / str(n) / "drive"
        fill(tmp_path / str(n) / "old", {"a": "1"})
        project.mkdir()
        drive.mkdir()
        for name in ("cache", "checkpoints"):
            (project / name).symlink_to(tmp_path / str(n) / "old")
        code = killed_at(n, drive, project, "relink")
        assert all((project / name).exists() for name in ("cache", "checkpoints"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        link(drive, project, relink=True)
        assert sorted(os.listdir(project)) == ["cache", "checkpoints"]
        assert all(os.readlink(project / name) == str(drive / name) for name in ("cache", "checkpoints"))
    assert n > 8
    assert code == 0

"""Links to Drive: made once, never nested, moving what is there, losing nothing by kill or full disk."""

import builtins
import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from newllm.errors import UserError
from newllm.saving import files as files_module
from newllm.saving.guard import Guard
from scripts import link_drive

ROOT = Path(__file__).parents[2]
NAMES = ("cache", "checkpoints")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.fixture
def drive(tmp_path):
    (tmp_path / "MyDrive").mkdir()
    return tmp_path / "MyDrive" / "newllm"


def fill(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def texts(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def state(*folders):
    """All names with their content or target, to compare before and after."""
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        else:
            found[path] = path.read_bytes() if path.is_file() else None
    return found


def link(drive, project, *names, **options):
    said = []
    link_drive.main(drive, names or NAMES, project, say=said.append, **options)
    return said


def refused(drive, project, match, *names, **options):
    """It stops with a sentence and changes nothing at all."""
    before = state(project, drive.parent)
    with pytest.raises(UserError, match=match) as caught:
        link(drive, project, *names, **options)
    assert "\n" not in str(caught.value) and state(project, drive.parent) == before


def test_a_fresh_project_is_linked_once(project, drive):
    """What is written through the links lies on Drive; the second run says so and changes nothing."""
    assert f"cache -> {drive / 'cache'}: linked" in link(drive, project)
    for name in NAMES:
        assert os.readlink(project / name) == str(drive / name)
        (project / name / "x").write_text(name)
        assert (drive / name / "x").read_text() == name
    before = state(project, drive)
    assert link(drive, project) == [
        f"{name} -> {drive / name}: already linked, nothing to do" for name in NAMES
    ]
    assert state(project, drive) == before


def test_local_content_is_moved(project, drive):
    """Files, folders in folders and empty ones arrive; what Drive had stays; identical files are fine."""
    local = {"model_latest.pt": "new", "ultrachat/logs/a.csv": "1,2", "same": "same", ".hidden": "h"}
    fill(project / "checkpoints", local)
    (project / "checkpoints" / "empty" / "below").mkdir(parents=True)
    fill(drive / "checkpoints", {"same": "same", "theirs": "t", "ultrachat/other": "o"})
    link(drive, project, "checkpoints")
    assert (project / "checkpoints").is_symlink() and os.listdir(project) == ["checkpoints"]
    assert texts(drive / "checkpoints") == {**local, "theirs": "t", "ultrachat/other": "o"}
    assert (drive / "checkpoints" / "empty" / "below").is_dir()


@pytest.mark.parametrize(
    ("local", "on_drive", "match"),
    [
        (
            {"b/model.pt": "mine", "a": "a"},
            {"b/model.pt": "ours"},
            r"checkpoints/b/model.pt and .*/b/model.pt differ",
        ),
        ({"x/a": "1"}, {"x": "file"}, "checkpoints/x and .* differ"),
        ({"x": "file"}, {"x/a": "1"}, "checkpoints/x and .* differ"),
    ],
)
def test_what_differs_stops_it_before_anything_is_moved(project, drive, local, on_drive, match):
    """A file of another content, or against a folder; in whichever folder; the sentence names both."""
    fill(project / "cache", {"a": "1"})
    fill(project / "checkpoints", local)
    fill(drive / "checkpoints", on_drive)
    refused(drive, project, match)


def test_what_drive_cannot_hold_is_refused(project, drive):
    """A link or a pipe in a local folder; one inside the folder of its own name, as by a repeated `ln -s`."""
    (project / "cache").mkdir()
    (project / "cache" / "cache").symlink_to(drive / "cache")
    refused(drive, project, r"cache/cache is a link", "cache")
    (project / "cache" / "cache").unlink()
    os.mkfifo(project / "cache" / "pipe")
    with pytest.raises(UserError, match="pipe is a link or no plain file"):
        link(drive, project, "cache")
    (drive / "checkpoints").mkdir(parents=True)
    (drive / "checkpoints" / "checkpoints").symlink_to(drive / "checkpoints")
    with pytest.raises(UserError, match="has one in it by its own name"):
        link(drive, project, "checkpoints")


def test_a_link_to_another_place_or_to_nothing_needs_relink(project, drive, tmp_path):
    """Refused with both places; with --relink it is replaced, and what lies there stays there."""
    fill(tmp_path / "elsewhere", {"a": "1"})
    (project / "cache").symlink_to(tmp_path / "elsewhere")
    (project / "checkpoints").symlink_to(drive / "checkpoints")
    for name, target in (("cache", tmp_path / "elsewhere"), ("checkpoints", drive / "checkpoints")):
        refused(drive, project, rf"{name} is a link to {target}.*mount Drive first", name)
    link(drive, project, relink=True)
    assert os.readlink(project / "cache") == str(drive / "cache") and (drive / "checkpoints").is_dir()
    assert (tmp_path / "elsewhere" / "a").read_text() == "1" and os.listdir(drive / "cache") == []
    assert sorted(os.listdir(project)) == ["cache", "checkpoints"]
    (project / "loop").symlink_to(project / "loop")
    refused(drive, project, "loop", "loop")


def test_what_is_in_the_way_is_refused(project, drive, monkeypatch, tmp_path):
    """A file here or on Drive, an unmounted Drive, a project on it, one in the other, names that lead out."""
    (project / "cache").write_text("mine")
    refused(drive, project, "cache .* is a file", "cache")
    fill(drive, {"checkpoints": "theirs"})
    refused(drive, project, "checkpoints .* is a file", "checkpoints")
    refused(drive / "checkpoints", project, "is a file", "other")
    refused(drive / "not" / "there", project, "mount Drive first")
    (tmp_path / "alias").symlink_to(project)
    for wrong in (project, project / "drive", tmp_path, tmp_path / "alias" / "drive"):
        refused(wrong, project, "must not lie in each other")
    for name in ("a/b", "..", ".", "", "/etc"):
        refused(drive, project, "plain names", "other", name)
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "COLAB_DRIVE", drive.parent)
        refused(drive, project, "not mounted: mount Drive first", "other")
    monkeypatch.setattr(link_drive, "COLAB_DRIVE", project.parent)
    refused(drive, project, "cannot hold links")


def test_a_folder_in_use_is_refused_and_its_lock_not_moved(project, drive):
    """A running training would go on writing to the deleted folder; a killed one's lock is no content."""
    fill(project / "checkpoints", {"model_latest.pt": "x"})
    with Guard(project / "checkpoints", "live"):
        refused(drive, project, "is using")
    fill(project / "checkpoints", {"run.lock": ""})
    link(drive, project)
    assert sorted(os.listdir(drive / "checkpoints")) == ["manifest.json", "model_latest.pt"]


def test_a_file_changed_during_the_move_is_not_deleted(project, drive, monkeypatch):
    """Something writes into the folder after the copy, also a new file: a sentence; all is still there."""
    fill(project / "cache", {"a": "1"})
    real = link_drive.copy

    def copy(source, target):
        real(source, target)
        fill(project / "cache", written)

    monkeypatch.setattr(link_drive, "copy", copy)
    for written in ({"a": "newer"}, {"b": "new"}):
        fill(project / "cache", {"a": "1"})
        with pytest.raises(UserError, match=r"differ: .*nothing was deleted"):
            link(drive, project, "cache")
        assert texts(project / "cache") == {"a": "1"} | written
        (drive / "cache" / "a").unlink()


@pytest.mark.parametrize("fault", ["full", "torn rename", "altered"])
def test_a_failing_drive_loses_nothing_and_the_next_run_finishes(project, drive, monkeypatch, fault):
    """Disk full, a torn rename, bytes that read back differently: all local files stay, then all arrive."""
    local = {"a": "first" * 10, "b": "second" * 10}
    fill(project / "cache", local)
    replace = os.replace

    def full(_):
        raise OSError(28, "No space left on device")

    def altered(written):
        os.truncate(written, 3)

    def torn(source, target):
        replace(source, target)
        os.truncate(target, 3)

    with monkeypatch.context() as patch:
        if fault == "torn rename":
            patch.setattr(os, "replace", torn)
        else:
            patch.setattr(files_module, "sync", full if fault == "full" else altered)
        with pytest.raises(UserError, match="nothing is lost, run the same command again"):
            link(drive, project, "cache")
    assert texts(project / "cache") == local
    link(drive, project, "cache")
    assert {name: text for name, text in texts(drive / "cache").items() if name in local} == local


def killed_at(n, drive, project, relink=False):
    """Exit status of the command in a process that dies by SIGKILL before its n-th operation on files."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = itertools.count(n - 1, -1)

    def deadly(real):
        def call(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    try:
        for name in ("mkdir", "symlink", "replace", "fsync", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        builtins.open = io.open = deadly(open)
        link(drive, project, relink=relink)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_before_any_operation_the_same_command_finishes(tmp_path):
    """SIGKILL at the 1st, 2nd, ... operation until a run survives: nothing is lost, the next completes it."""
    local = {"cache/tokens.pt": "tokens", "checkpoints/model.pt": "model", "checkpoints/logs/a.csv": "1,2"}
    on_drive = {"checkpoints/model.pt": "model", "cache/old": "old"}
    for n in range(1, 200):
        project, drive = tmp_path / str(n) / "project", tmp_path / str(n) / "MyDrive" / "newllm"
        fill(project, local)
        fill(drive, on_drive)
        code = killed_at(n, drive, project)
        whole = {*texts(project).values(), *texts(drive).values()}
        assert {"tokens", "model", "1,2", "old"} <= whole, f"operation {n}"
        if code == 0:
            break
        assert code == -signal.SIGKILL
        link(drive, project)
        assert texts(drive) == {**on_drive, **local}, f"operation {n}"
        assert all((project / name).is_symlink() for name in NAMES)
    assert n > 25 and code == 0, "the fault was never reached"


def test_killed_while_relinking(tmp_path):
    """The old link or the new one, never none; the next run leaves no trace of the first."""
    for n in range(1, 60):
        project, drive = tmp_path / str(n) / "project", tmp_path / str(n) / "drive"
        fill(tmp_path / str(n) / "old", {"a": "1"})
        project.mkdir()
        drive.mkdir()
        for name in NAMES:
            (project / name).symlink_to(tmp_path / str(n) / "old")
        code = killed_at(n, drive, project, relink=True)
        assert all((project / name).exists() for name in NAMES)
        if code == 0:
            break
        link(drive, project, relink=True)
        assert sorted(os.listdir(project)) == ["cache", "checkpoints"]
        assert all(os.readlink(project / name) == str(drive / name) for name in NAMES)
    assert n > 6 and code == 0


def test_as_a_command(project, drive):
    """A refusal is one line on stderr and status 2."""
    command = [sys.executable, "-m", "scripts.link_drive", "--drive", str(drive), "--root", str(project)]
    done = subprocess.run([*command, "--names", "a/b"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --names takes plain names")

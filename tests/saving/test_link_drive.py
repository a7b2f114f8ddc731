"""Links to Drive: made once, never nested, moving what is there, losing nothing by kill or full disk."""

import builtins
import contextlib
import io
import itertools
import os
import signal

import pytest

from newllm.errors import UserError
from newllm.saving import files as files_module
from newllm.saving.guard import Guard
from scripts import link_drive

NAMES = link_drive.NAMES


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


def state(folder):
    """All names below it with their content or target, to compare before and after."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def link(drive, project):
    with contextlib.chdir(project):
        link_drive.main(drive)


def refused(drive, project, match):
    """It stops with a sentence and changes nothing at all."""
    before = state(project.parent)
    with pytest.raises(UserError, match=match) as caught:
        link(drive, project)
    assert "\n" not in str(caught.value) and state(project.parent) == before


def test_a_fresh_project_is_linked_once(project, drive, capsys):
    """What is written through the links lies on Drive; the second run says so and changes nothing."""
    link(drive, project)
    for name in NAMES:
        (project / name / "x").write_text(name)
        assert (drive / name / "x").read_text() == name
    before = state(project.parent)
    link(drive, project)
    assert capsys.readouterr().out.count("already linked, nothing to do\n") == 2
    assert state(project.parent) == before


def test_local_content_is_moved(project, drive):
    """Files, folders in folders and empty ones arrive, but no lock; what Drive had stays."""
    local = {"model_latest.pt": "new", "ultrachat/logs/a.csv": "1,2", "same": "same", ".hidden": "h"}
    fill(project / "checkpoints", local | {"run.lock": ""})
    (project / "checkpoints" / "empty" / "below").mkdir(parents=True)
    fill(drive / "checkpoints", {"same": "same", "theirs": "t", "ultrachat/other": "o"})
    link(drive, project)
    assert all((project / name).is_symlink() for name in NAMES) and len(os.listdir(project)) == 2
    assert texts(drive / "checkpoints") == {**local, "theirs": "t", "ultrachat/other": "o"}
    assert (drive / "checkpoints" / "empty" / "below").is_dir()


@pytest.mark.parametrize(
    ("local", "on_drive"), [({"x": "mine", "a": "a"}, {"x": "ours"}), ({"x/a": "1"}, {"x": "file"})]
)
def test_what_differs_stops_it_before_anything_is_moved(project, drive, local, on_drive):
    """A file of another content, or against a folder; the sentence names both."""
    fill(project / "cache", {"a": "1"})
    fill(project / "checkpoints", local)
    fill(drive / "checkpoints", on_drive)
    refused(drive, project, "checkpoints/x and .*newllm/checkpoints/x differ")


def test_what_is_in_the_way_is_refused(project, drive, monkeypatch, tmp_path):
    """Links in a folder or elsewhere, files for folders, a Drive that is not there, a project on it."""
    cache = project / "cache"
    for target, match in ((tmp_path, "is a link to"), (drive / "cache", "link to nothing.*mount Drive")):
        cache.symlink_to(target)
        refused(drive, project, match)
        cache.unlink()
    cache.mkdir()
    (cache / "cache").symlink_to(drive / "cache")
    refused(drive, project, "cache/cache is a link")
    (cache / "cache").unlink()
    cache.rmdir()
    cache.write_text("mine")
    refused(drive, project, "cache .* is a file")
    cache.unlink()
    fill(drive, {"checkpoints": "theirs"})
    refused(drive, project, "checkpoints .* is a file")
    refused(drive / "not" / "there", project, "mount Drive first")
    (tmp_path / "alias").symlink_to(project)
    for wrong in (project, project / "drive", tmp_path, tmp_path / "alias" / "drive"):
        refused(wrong, project, "must not lie in each other")
    monkeypatch.setattr(files_module, "COLAB_DRIVE", drive.parent)
    refused(drive, project, "not mounted: mount Drive first")
    monkeypatch.setattr(link_drive, "COLAB_DRIVE", project.parent)
    refused(drive, project, "cannot hold links")


def test_a_folder_in_use_is_refused(project, drive):
    """A running training would go on writing to the deleted folder."""
    (project / "checkpoints").mkdir()
    guard = Guard(project / "checkpoints")
    refused(drive, project, "is using")
    guard.release()


def test_a_file_changed_during_the_move_is_not_deleted(project, drive, monkeypatch):
    """Something writes into the folder after the copy, also a new file: a sentence; all is still there."""
    fill(project / "cache", {"a": "1"})
    real = link_drive.copy

    def copy(source, target):
        real(source, target)
        fill(project / "cache", {"b": "new"})

    monkeypatch.setattr(link_drive, "copy", copy)
    with pytest.raises(UserError, match=r"differ: .*nothing was deleted"):
        link(drive, project)
    assert texts(project / "cache") == {"a": "1", "b": "new"}


def full(path):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", [full, lambda path: os.truncate(path, 3)], ids=["full", "altered"])
def test_a_failing_drive_loses_nothing_and_the_next_run_finishes(project, drive, monkeypatch, fault):
    """Disk full, bytes that read back differently: all local files stay, then all arrive."""
    local = {"a": "first" * 10, "b": "second" * 10}
    fill(project / "cache", local)
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "sync", fault)
        with pytest.raises(UserError, match="nothing is lost, run the same command again"):
            link(drive, project)
    assert texts(project / "cache") == local
    link(drive, project)
    assert texts(drive / "cache") == local


def killed_at(n, drive, project):
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
        link(drive, project)
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

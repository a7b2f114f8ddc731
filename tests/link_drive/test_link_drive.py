"""Linking to Drive moves what is there, once, and refuses what is in the way without touching it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from linking import fill, link, state

from newllm.errors import UserError
from newllm.saving import drive as drive_module
from newllm.saving.guard import FolderLock
from scripts import link_drive

ROOT = Path(__file__).parents[2]


def refused(drive, project, match, *names, **options):
    """It stops with a sentence and changes nothing at all."""
    before = state(project, drive.parent)
    with pytest.raises(UserError, match=match):
        link(drive, project, *names, **options)
    assert state(project, drive.parent) == before


def test_fresh_project(project, drive):
    """Both become links to folders made on Drive; what is written through them lies there."""
    said = link(drive, project)
    for name in ("cache", "checkpoints"):
        assert os.readlink(project / name) == str(drive / name)
        assert f"{name} -> {drive / name}: linked" in said
        (project / name / "x").write_text(name)
        assert (drive / name / "x").read_text() == name
    assert sorted(os.listdir(drive / "cache")) == ["x"]


def test_the_second_run_changes_nothing_and_says_so(project, drive):
    """Idempotent, and no link appears inside the folder."""
    fill(project / "cache", {"a": "1"})
    link(drive, project)
    before = state(project, drive)
    for _ in range(2):
        said = link(drive, project)
        assert said == [
            f"{name} -> {drive / name}: already linked, nothing to do" for name in ("cache", "checkpoints")
        ]
        assert state(project, drive) == before


def test_local_content_is_moved(project, drive):
    """Files, folders in folders and empty ones arrive; what Drive had stays; identical files are fine."""
    local = {"model_latest.pt": "new", "ultrachat/logs/a.csv": "1,2", "same": "same", ".hidden": "h"}
    fill(project / "checkpoints", local)
    (project / "checkpoints" / "empty" / "below").mkdir(parents=True)
    fill(drive / "checkpoints", {"same": "same", "theirs": "t", "ultrachat/other": "o"})
    said = link(drive, project, "checkpoints")
    assert (project / "checkpoints").is_symlink()
    expected = {**local, "theirs": "t", "ultrachat/other": "o"}
    files = [path for path in (drive / "checkpoints").rglob("*") if path.is_file()]
    assert {str(path.relative_to(drive / "checkpoints")): path.read_text() for path in files} == expected
    assert (drive / "checkpoints" / "empty" / "below").is_dir()
    assert any("is on Drive already" in line for line in said)
    assert os.listdir(project) == ["checkpoints"]


def test_a_differing_file_stops_it_before_anything_is_moved(project, drive):
    """In whichever folder it lies; the sentence names both files."""
    fill(project / "cache", {"a": "1"})
    fill(project / "checkpoints", {"b/model.pt": "mine", "a": "a"})
    fill(drive / "checkpoints", {"b/model.pt": "ours"})
    refused(drive, project, r"project/checkpoints/b/model.pt and .*newllm/checkpoints/b/model.pt differ")


def test_a_folder_against_a_file_of_the_same_name(project, drive):
    """Both ways round."""
    fill(project / "cache", {"x/a": "1"})
    fill(drive / "cache", {"x": "file"})
    refused(drive, project, "is a folder, but", "cache")
    fill(project / "checkpoints", {"x": "file"})
    fill(drive / "checkpoints", {"x/a": "1"})
    refused(drive, project, "differ", "checkpoints")


def test_the_nested_link_trap(project, drive):
    """`ln -s` on an existing folder put a link inside it, here or on Drive: refused, neither followed nor deleted."""
    (drive / "checkpoints").mkdir(parents=True)
    (project / "checkpoints").mkdir()
    (project / "checkpoints" / "checkpoints").symlink_to(drive / "checkpoints")
    refused(drive, project, r"checkpoints/checkpoints is a link to .*MyDrive", "checkpoints")
    (project / "checkpoints" / "checkpoints").unlink()
    (drive / "checkpoints" / "checkpoints").symlink_to(drive / "checkpoints")
    refused(drive, project, "link inside its own folder", "checkpoints")


def test_links_and_pipes_in_a_local_folder_are_refused(project, drive):
    """Drive cannot hold them."""
    fill(project / "cache", {"a": "1"})
    (project / "cache" / "b").symlink_to("a")
    refused(drive, project, "cache/b is a link to a", "cache")
    (project / "cache" / "b").unlink()
    os.mkfifo(project / "cache" / "pipe")
    with pytest.raises(UserError, match="no plain file"):
        link(drive, project, "cache")


def test_a_link_to_another_place_needs_relink(project, drive, tmp_path):
    """Refused with both places; with --relink it is replaced, and what lies in the other place stays there."""
    fill(tmp_path / "elsewhere", {"a": "1"})
    (project / "cache").symlink_to(tmp_path / "elsewhere")
    refused(drive, project, rf"cache is a link to {tmp_path}/elsewhere, not to {drive}/cache", "cache")
    said = link(drive, project, "cache", relink=True)
    assert os.readlink(project / "cache") == str(drive / "cache")
    assert "elsewhere" in said[1] and "stays there" in said[1]
    assert (tmp_path / "elsewhere" / "a").read_text() == "1"
    assert os.listdir(drive / "cache") == []
    assert os.listdir(project) == ["cache"]


def test_a_dangling_link_is_refused(project, drive):
    """To this place or another; --relink makes the folder."""
    (project / "cache").symlink_to(drive / "cache")
    refused(drive, project, "does not exist: mount Drive first", "cache")
    link(drive, project, "cache", relink=True)
    assert (drive / "cache").is_dir()
    (project / "checkpoints").symlink_to("/gone/checkpoints")
    refused(drive, project, "link to /gone/checkpoints", "checkpoints")
    (project / "loop").symlink_to(project / "loop")
    refused(drive, project, "loop", "loop")


def test_a_file_in_the_way_is_refused(project, drive):
    """Here, on Drive, and as the Drive folder itself."""
    (project / "cache").write_text("mine")
    refused(drive, project, "cache is a file", "cache")
    fill(drive, {"checkpoints": "theirs"})
    refused(drive, project, "plain folder belongs", "checkpoints")
    refused(drive / "checkpoints", project, "not a folder", "other")


def test_an_unmounted_drive_is_refused(project, drive, monkeypatch):
    """No parent folder; or a plain folder where the mount point should be."""
    with pytest.raises(UserError, match="mount Drive first"):
        link(drive / "not" / "there", project)
    assert not drive.exists()
    monkeypatch.setattr(drive_module, "COLAB_DRIVE", drive.parent.parent / "MyDrive")
    refused(drive, project, r"not mounted at .*drive.mount")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == drive.parent)
    link(drive, project)


def test_a_project_on_drive_is_refused(project, drive, monkeypatch):
    """Drive cannot hold links."""
    monkeypatch.setattr(link_drive, "COLAB_DRIVE", project.parent)
    refused(drive, project, "cannot hold links")


def test_drive_and_project_must_not_lie_in_each_other(project, drive, tmp_path):
    """Also through a link, and not the same folder."""
    (tmp_path / "alias").symlink_to(project)
    for wrong in (project, project / "drive", project / "cache", tmp_path, tmp_path / "alias" / "drive"):
        with pytest.raises(UserError, match="must not lie in each other"):
            link(wrong, project)
    assert os.listdir(project) == []


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "/etc", "../x"])
def test_names_are_plain(project, drive, name):
    """No name leads out of the project."""
    refused(drive, project, "plain names", "cache", name)


def test_a_folder_in_use_is_refused_and_a_dead_lock_not_moved(project, drive):
    """A running training would go on writing to the deleted folder; a lock left by a killed one is no content."""
    fill(project / "checkpoints", {"model_latest.pt": "x"})
    with FolderLock(project / "checkpoints", "live"), pytest.raises(UserError, match="is using"):
        link(drive, project)
    assert not drive.exists()
    fill(project / "checkpoints", {"run.lock": ""})
    os.utime(project / "checkpoints" / "run.lock", (time.time() - 1000,) * 2)
    link(drive, project)
    assert os.listdir(drive / "checkpoints") == ["model_latest.pt"]


def test_as_a_command(project, drive):
    """Lines on stdout and status 0; a refusal is one line on stderr and status 2."""
    command = [sys.executable, "-m", "scripts.link_drive", "--drive", str(drive), "--root", str(project)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"checkpoints -> {drive}/checkpoints: linked" in done.stdout
    done = subprocess.run([*command, "--names", "a/b"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --names takes plain names")
    assert done.stderr.count("\n") == 1

"""A folder to write into is made, found behind a link, or refused by name."""

import os

import pytest

from newllm.errors import UserError
from newllm.saving.files import usable_folder


def test_usable_folder_creates_and_resolves(tmp_path):
    """A missing folder is made with its parents; an existing one and a link to one are returned resolved."""
    made = usable_folder(tmp_path / "a" / "b", "cache")
    assert made.is_dir()
    assert usable_folder(made, "cache") == made
    link = tmp_path / "link"
    link.symlink_to(made)
    assert usable_folder(link, "cache") == made.resolve()
    assert usable_folder(str(link / "c"), "cache") == made.resolve() / "c"
    assert link.is_symlink()


def test_usable_folder_refuses_a_dangling_link(tmp_path):
    """An unmounted Drive is named with the link, its target and the purpose; nothing is created."""
    link = tmp_path / "checkpoints"
    link.symlink_to(tmp_path / "drive")
    with pytest.raises(UserError, match=r"checkpoints.*purpose.*drive.*does not exist"):
        usable_folder(link, "purpose")
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_usable_folder_refuses_below_a_dangling_link_and_a_link_to_itself(tmp_path):
    """Neither can become a folder: UserError that names the path."""
    (tmp_path / "gone").symlink_to(tmp_path / "drive")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "gone" / "run", tmp_path / "loop"):
        with pytest.raises(UserError, match=path.name):
            usable_folder(path, "purpose")
    assert not (tmp_path / "drive").exists()


def test_usable_folder_refuses_a_file_in_the_way(tmp_path):
    """A file at the path, linked, or among its parents: UserError that names the path, and the file is unharmed."""
    file = tmp_path / "occupied"
    file.write_text("mine")
    (tmp_path / "link").symlink_to(file)
    for path in (file, tmp_path / "link", file / "below"):
        with pytest.raises(UserError, match=path.name):
            usable_folder(path, "purpose")
    assert file.read_text() == "mine"

"""Make ./cache and ./checkpoints links to folders on a mounted Drive, so that they outlive the machine.

python3 -m scripts.link_drive --drive /content/drive/MyDrive/newllm      # again: changes nothing, says so

What lies in a local folder is copied and compared first, only then deleted here. A file that differs from one
of the same name on Drive stops it before anything is changed. Killed anywhere, the same command finishes.
"""

import argparse
import filecmp
import os
import shutil
from pathlib import Path

from newllm.config import expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser
from newllm.saving.files import COLAB_DRIVE, copy_verified, second_folder, usable_folder
from newllm.saving.guard import LOCK_NAME, holder

NAMES = ("cache", "checkpoints")


def main(drive):
    """Link each of NAMES in this folder to `drive/NAME`. All are checked before the first is touched.

    Raises:
        UserError: something is in the way; nothing is lost, and the sentence says what to do.
    """
    root = Path.cwd()
    if COLAB_DRIVE in root.parents:
        raise UserError(f"{root} lies on Drive, which cannot hold links: keep the project on the local disk.")
    drive = second_folder(drive, root, "--drive")
    try:
        for name in NAMES:
            check(root / name, drive / name)
        for name in NAMES:
            link(root / name, drive / name)
    except OSError as error:  # also of shutil
        remedy = "nothing is lost, run the same command again"
        raise UserError(f"linking to {drive} stopped ({error}): {remedy}.") from error


def check(here, there):
    """Raises UserError if `here` cannot become a link to `there` without loss. Changes nothing."""
    usable_folder(there, "--drive", make=False)
    usable_folder(here, "to link", make=False)
    if here.is_symlink():
        if here.resolve() != there.resolve():
            raise UserError(f"{here} is a link to {os.readlink(here)}: remove it to have one to {there}.")
    elif in_use := holder(here):
        raise UserError(in_use)
    else:
        compare(here, there)


def compare(here, there, moved=False):
    """Raises UserError where `here` holds what cannot be moved, or is not moved, or other than `there`."""
    for path in here.rglob("*"):
        other = there / path.relative_to(here)
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise UserError(f"{path} is a link or no plain file: delete it or move it away.")
        if path.name == LOCK_NAME or (not moved and not other.exists()):
            continue
        folders = path.is_dir() and other.is_dir()
        files = path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)
        if not (folders or files):
            raise UserError(f"{path} and {other} differ: move one of the two away; nothing was deleted.")


def link(here, there):
    """Make `here` a link to `there`, moving what is in the way first."""
    if here.is_symlink():
        print(f"{here.name} -> {there}: already linked, nothing to do")
        return
    there.mkdir(parents=True, exist_ok=True)
    if here.exists():
        lock = shutil.ignore_patterns(LOCK_NAME)
        shutil.copytree(here, there, copy_function=copy, ignore=lock, dirs_exist_ok=True)
        compare(here, there, moved=True)  # what was written here meanwhile is not deleted
        shutil.rmtree(here)
        print(f"{here}: moved to {there}")
    here.symlink_to(there, target_is_directory=True)
    print(f"{here.name} -> {there}: linked")


def copy(source, target):
    """For copytree: a file that is there is the same, as `check` has found."""
    if not os.path.exists(target):
        with open(source, "rb") as file:
            copy_verified(file, Path(target))


def parse(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drive", type=expanded, required=True, help="folder on Drive that holds them")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse().drive)

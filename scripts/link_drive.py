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


def main(drive, names=NAMES, root=".", relink=False, say=print):
    """Link `root/NAME` to `drive/NAME` for each name. All names are checked before the first is touched.

    Args:
        relink: replace a link to another place; what lies there stays there.
        say: takes a line for each action.

    Raises:
        UserError: something is in the way; nothing is lost, and the sentence says what to do.
    """
    root = usable_folder(root, "--root", make=False)
    if COLAB_DRIVE in root.parents:
        raise UserError(f"{root} lies on Drive, which cannot hold links: keep the project on the local disk.")
    drive = second_folder(drive, root, "--drive", make=False)
    try:
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name:
                raise UserError(f"--names takes plain names of folders in {root}, not {name!r}.")
            check(root / name, drive / name, relink)
        for name in names:
            link(root / name, drive / name, say)
    except (OSError, shutil.Error) as error:
        raise UserError(
            f"linking to {drive} stopped ({error}): nothing is lost, run the same command again."
        ) from error


def check(here, there, relink):
    """Raise UserError if `here` cannot become a link to `there` without loss. Changes nothing."""
    usable_folder(there, "--drive", make=False)
    if there.is_symlink() or (there / there.name).is_symlink():  # as a repeated `ln -s` makes it
        raise UserError(f"{there} is a link, or has one in it by its own name: delete that link.")
    if here.is_symlink():
        if not relink and not (here.exists() and there.exists() and here.samefile(there)):
            raise UserError(
                f"{here} is a link to {os.readlink(here)}, which is not {there}, or does not exist: "
                "mount Drive first, or add --relink to replace the link."
            )
    elif usable_folder(here, "--names", make=False).exists():
        if in_use := holder(here):
            raise UserError(in_use)
        compare(here, there)


def compare(here, there, moved=False):
    """Raise UserError where `here` holds what cannot be moved, or other than what lies `there`."""
    for path in here.rglob("*"):
        other = there / path.relative_to(here)
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise UserError(
                f"{path} is a link or no plain file: delete it or move it away; nothing was moved."
            )
        if path.name == LOCK_NAME or (not moved and not os.path.lexists(other)):
            continue
        folders = path.is_dir() and other.is_dir()
        files = path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)
        if other.is_symlink() or not (folders or files):
            raise UserError(f"{path} and {other} differ: move one of the two away; nothing was deleted.")


def link(here, there, say):
    """Make `here` a link to `there`, moving what is in the way first."""
    there.mkdir(parents=True, exist_ok=True)
    if here.is_symlink() and here.exists() and here.samefile(there):
        say(f"{here.name} -> {there}: already linked, nothing to do")
        return
    if here.is_dir() and not here.is_symlink():
        lock = shutil.ignore_patterns(LOCK_NAME)
        shutil.copytree(here, there, copy_function=copy, ignore=lock, dirs_exist_ok=True)
        compare(here, there, moved=True)  # what was written here meanwhile is not deleted
        shutil.rmtree(here)
        say(f"{here}: moved to {there}")
    new = here.with_name(f".{here.name}.link.tmp")
    new.unlink(missing_ok=True)
    new.symlink_to(there, target_is_directory=True)
    os.replace(new, here)  # the old link or the new one, never none
    say(f"{here.name} -> {there}: linked")


def copy(source, target):
    if not os.path.exists(target):
        try:
            with open(source, "rb") as file:
                copy_verified(file, Path(target))
        except OSError:  # a rename that tore it: the next run must not take it for another's file
            Path(target).unlink(missing_ok=True)
            raise


def parse(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--drive", type=expanded, required=True, metavar="DIR", help="folder on Drive that holds them"
    )
    parser.add_argument(
        "--names", nargs="+", default=list(NAMES), metavar="NAME", help="default: %(default)s"
    )
    parser.add_argument(
        "--root", type=expanded, default=".", metavar="DIR", help="the project's folder (default: here)"
    )
    parser.add_argument("--relink", action="store_true", help="replace links that lead to another place")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with exit_on_user_error():
        main(**vars(parse()))

"""Make ./cache and ./checkpoints links to folders on a mounted Drive, so that they outlive the machine.

python3 -m scripts.link_drive --drive /content/drive/MyDrive/newllm      # run it again: changes nothing, says so

What already lies in a local folder is moved first: everything is copied and read back, only then deleted here. A file that
differs from one of the same name on Drive stops it before anything is changed. Killed anywhere, the same command finishes.
"""

import argparse
import contextlib
import filecmp
import os
from pathlib import Path

from newllm.config import expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser
from newllm.saving.drive import COLAB_DRIVE, check_target, copy_verified, refuse_overlap
from newllm.saving.guard import LOCK_NAME, holder

NAMES = ("cache", "checkpoints")
PROBE = ".link_probe"


def main(drive, names=NAMES, root=".", relink=False, say=print):
    """Link `root/NAME` to `drive/NAME` for each name. All names are checked before the first is touched.

    Args:
        drive: folder for them, in an existing one.
        names: plain names in `root`.
        root: the project's folder.
        relink: replace a link to another place; what lies there stays there.
        say: takes a line for each action.

    Raises:
        UserError: something is in the way; nothing is lost, and the sentence says what to do.
    """
    try:
        root, drive = Path(root).resolve(), Path(drive).resolve()
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: give the project's folder as --root.")
        if COLAB_DRIVE in root.parents:
            raise UserError(
                f"{root} lies on Drive, which cannot hold links: keep the project on the local disk."
            )
        refuse_overlap(root, "the project", drive, "--drive")
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name:
                raise UserError(f"--names takes plain names of folders in {root}, not {name!r}.")
        check_target(drive)
        for name in names:
            check(root / name, drive / name, relink)
        drive.mkdir(exist_ok=True)
        for name in names:
            link(root / name, drive / name, say)
    except OSError as error:
        raise UserError(
            f"linking to {drive} stopped ({error}): nothing is lost, run the same command again."
        ) from error


def check(here, there, relink):
    """Raise UserError if `here` cannot become a link to `there` without loss or guesswork. Changes nothing."""
    if there.is_symlink() or (there.exists() and not there.is_dir()):
        raise UserError(f"{there} is a link or a file where a plain folder belongs: move it away.")
    if (there / there.name).is_symlink():
        raise UserError(
            f"{there / there.name} is a link inside its own folder (as a repeated `ln -s` makes it): delete that link."
        )
    if here.is_symlink():
        if os.path.realpath(here) != os.path.realpath(there) and not relink:
            raise UserError(
                f"{here} is a link to {os.readlink(here)}, not to {there}: remove it, or add --relink to replace it."
            )
        if not here.exists() and not relink:
            raise UserError(
                f"{here} is a link to {os.readlink(here)}, which does not exist: mount Drive first, or add --relink to make an "
                "empty folder there."
            )
    elif here.is_dir():
        check_contents(here, there)
    elif here.exists():
        raise UserError(f"{here} is a file, not a folder: move it away.")


def check_contents(here, there):
    """Raise UserError if the local folder is in use, or holds what cannot be moved without replacing something else."""
    if in_use := holder(here):
        raise UserError(in_use)
    folders, files = walk(here)
    for relative in folders:
        target = there / relative
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise UserError(
                f"{here / relative} is a folder, but {target} is not: move one of the two away; nothing was moved."
            )
    for relative in files:
        source, target = here / relative, there / relative
        if source.is_symlink() or not source.is_file():
            kind = f"a link to {os.readlink(source)}" if source.is_symlink() else "no plain file"
            raise UserError(
                f"{source} is {kind} and cannot be moved to Drive: delete it or move it away; nothing was moved."
            )
        if os.path.lexists(target) and not same(source, target):
            raise UserError(f"{source} and {target} differ: move one of the two away; nothing was moved.")


def link(here, there, say):
    """Make `here` a link to `there`, moving what is in the way first, and prove it by writing and reading through it."""
    if not there.exists():
        there.mkdir()
        say(f"{there}: created")
    if here.is_symlink():
        if os.path.realpath(here) == os.path.realpath(there):
            probe(here, there)
            say(f"{here.name} -> {there}: already linked, nothing to do")
            return
        old, new = os.readlink(here), here.with_name(f".{here.name}.link.tmp")
        new.unlink(missing_ok=True)
        new.symlink_to(there, target_is_directory=True)
        os.replace(new, here)
        say(f"{here.name}: no longer a link to {old}; what lies there stays there")
    else:
        if here.exists():
            move(here, there, say)
        here.symlink_to(there, target_is_directory=True)
    probe(here, there)
    say(f"{here.name} -> {there}: linked")


def move(here, there, say):
    """Move the content of a checked folder and the folder itself: first copy all, then delete all.

    Raises:
        UserError: a file was changed by somebody else after it was copied; it is still there.
    """
    folders, files = walk(here)
    for relative in folders:
        (there / relative).mkdir(exist_ok=True)
    copied = {}
    for relative in files:
        source, target = here / relative, there / relative
        copied[relative] = identity(source)
        if target.exists():
            if not same(source, target):
                raise UserError(
                    f"{source} and {target} differ: move one of the two away; nothing was deleted."
                )
            say(f"{source}: is on Drive already")
        else:
            try:
                with open(source, "rb") as file:
                    copy_verified(file, target)
            except OSError:
                with contextlib.suppress(
                    OSError
                ):  # a rename that damaged it; the next run must not take it for yours
                    target.unlink(missing_ok=True)
                raise
            say(f"{source}: copied to {target}")
    for relative, copy in copied.items():
        if identity(here / relative) != copy:
            raise UserError(
                f"{here / relative} was changed while it was moved: stop what writes there, then run this again."
            )
        (here / relative).unlink()
    (here / LOCK_NAME).unlink(missing_ok=True)  # of a dead run: `holder` said so
    for relative in reversed(folders):
        (here / relative).rmdir()
    here.rmdir()
    say(f"{here}: {len(files)} files moved")


def walk(folder):
    """(folders, files) below it as sorted relative paths, a folder before what it holds; links to folders count as files."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    plain = {path for path in paths if (folder / path).is_dir() and not (folder / path).is_symlink()}
    files = [path for path in paths if path not in plain and path != Path(LOCK_NAME)]
    return sorted(plain), files


def same(one, other):
    return not other.is_symlink() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def identity(path):
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def probe(here, there):
    """Write through the link and read at the target.

    Raises:
        UserError: what was written did not arrive.
    """
    text = os.fsencode(f"written through {here}")
    (here / PROBE).write_bytes(text)
    arrived = (there / PROBE).read_bytes()
    (here / PROBE).unlink()
    if arrived != text:
        raise UserError(
            f"what is written to {here} does not arrive in {there}: is Drive mounted and writable?"
        )


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

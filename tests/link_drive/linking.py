"""Folders filled, linked to Drive, and everything that lies in them afterwards."""

import os

from scripts import link_drive


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def link(drive, project, *names, **options):
    """Run it. Returns the lines said."""
    said = []
    link_drive.main(drive, names or ("cache", "checkpoints"), project, say=said.append, **options)
    return said


def state(*folders):
    """Everything below the folders: path -> content, link target, or None for a folder."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            found[path] = (
                os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            )
    return found

"""Latest, previous, step files and manifest: what is kept, what is believed, and that nothing whole is ever lost."""

import errno
import json
import os
import random

import pytest
import torch

from newllm.errors import UserError
from newllm.saving import checkpoint_files
from newllm.saving.checkpoint_files import CheckpointFiles
from newllm.saving.files import load_sealed


def content(number):
    """A state as small as one can be, with what the manifest names."""
    return {
        "run_id": "r", "epoch": f"phase1_iteration_{number}", "stage": "phase1", "step": number, "restart": "here", "save_number": number,
        "saved_at": "now", "weights": torch.full((50,), float(number)),
    }  # fmt: skip


@pytest.fixture
def files(tmp_path):
    files = CheckpointFiles(tmp_path, keep_last=2)
    for number in range(1, 6):
        files.write(content(number))
    return files


def flip(path, source=random.Random(0)):  # noqa: B008
    """Change one bit in a file of its own: step files may be further names of the same one."""
    data = bytearray(path.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.unlink()
    path.write_bytes(data)


def number_of(path):
    return load_sealed(path)["save_number"]


def test_latest_previous_and_the_last_steps_are_kept(files):
    """Each file holds the state its name says; older ones are gone, and so are temporary ones."""
    assert number_of(files.latest) == 5 and number_of(files.previous) == 4
    assert [number_of(path) for path in files.steps()] == [5, 4]
    names = {path.name for path in files.folder.iterdir()}
    assert names == {
        "model_latest.pt", "model_prev.pt", "model_step_00000005.pt", "model_step_00000004.pt", "manifest.json",
    }  # fmt: skip


def test_the_manifest_names_the_latest_state_and_its_checksum(files):
    """Readable without torch: step, label, bytes, digest of the archive."""
    manifest = json.loads(files.manifest.read_text())
    assert manifest["save_number"] == 5 and manifest["epoch"] == "phase1_iteration_5"
    assert manifest["bytes"] == files.latest.stat().st_size and len(manifest["sha256"]) == 64


@pytest.mark.parametrize("damaged", range(1, 4))
def test_a_damaged_file_is_set_aside_and_the_next_one_is_used(files, damaged):
    """The newest whole state is used; the damaged files are kept as .corrupt, said aloud, and never loaded."""
    every = [files.latest, files.previous, *files.steps()]
    order = every[:damaged]
    expected = max(number_of(path) for path in every[damaged:])
    for path in order:
        flip(path)
    notes = []
    assert files.read_newest(notes)["save_number"] == expected
    assert len(notes) == damaged and all("kept as" in note for note in notes)
    assert all(path.with_name(path.name + ".corrupt").exists() for path in order)
    assert number_of(files.latest) == expected and not any(path.exists() for path in order[1:])


def test_when_no_file_is_whole_the_run_stops_and_all_are_kept(files):
    """Never a silent fresh start over files that exist."""
    every = [files.latest, files.previous, *files.steps()]
    for path in every:
        flip(path)
    before = [path.read_bytes() for path in every]
    with pytest.raises(UserError, match=r"no checkpoint .* can be read"):
        files.read_newest([])
    assert [path.read_bytes() for path in every] == before


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    """No file at all means that nothing has been saved yet."""
    assert CheckpointFiles(tmp_path, 2).read_newest([]) is None


@pytest.mark.parametrize("length", ["0", "1", "3", "22", "half", "n-73", "n-1"])
def test_a_truncated_latest_falls_back(files, length):
    """A torn write of any length is found before anything is unpickled."""
    data = files.latest.read_bytes()
    cut = {"half": len(data) // 2, "n-73": len(data) - 73, "n-1": len(data) - 1}.get(length) or int(
        length if length.isdigit() else 0
    )
    files.latest.unlink()
    files.latest.write_bytes(data[:cut])
    notes = []
    assert (
        files.read_newest(notes)["save_number"] == 5 and "continuing from model_step_00000005.pt" in notes[0]
    )


def test_200_bit_flips_of_the_latest_never_load(files):
    """Whatever bit turns, it is found, and the same state is read from its other file."""
    source, whole = random.Random(1), files.latest.read_bytes()
    for _ in range(200):
        files.latest.unlink(missing_ok=True)
        files.latest.write_bytes(whole)
        flip(files.latest, source)
        notes = []
        assert files.read_newest(notes)["save_number"] == 5 and len(notes) == 1


def test_a_second_damaged_file_does_not_replace_the_first_that_was_set_aside(files):
    """Both are kept."""
    for _ in range(2):
        flip(files.latest)
        files.read_newest([])
        files.write(content(9))
    assert len(list(files.folder.glob("model_latest.pt.corrupt*"))) == 2


def test_a_write_that_fails_for_a_moment_is_tried_again(files, monkeypatch):
    """Two I/O errors, then success: the state is written."""
    real, failures = checkpoint_files.save_sealed, iter([errno.EIO, errno.ENOTCONN])

    def flaky(value, path, previous):
        if number := next(failures, None):
            raise OSError(number, os.strerror(number))
        return real(value, path, previous)

    monkeypatch.setattr(checkpoint_files, "save_sealed", flaky)
    monkeypatch.setattr(checkpoint_files, "WAIT", 0.0)
    files.write(content(6))
    assert number_of(files.latest) == 6


def test_a_full_disk_leaves_every_file_as_it_was(files, monkeypatch):
    """The write is given up after its tries; latest is byte-identical and no temporary file stays."""

    def full(value, path, previous):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files.latest.read_bytes()
    monkeypatch.setattr(checkpoint_files, "save_sealed", full)
    monkeypatch.setattr(checkpoint_files, "WAIT", 0.0)
    with pytest.raises(OSError, match="No space left"):
        files.write(content(6))
    assert files.latest.read_bytes() == before
    assert not list(files.folder.glob(".*.tmp"))


def test_without_hard_links_names_are_copies(tmp_path, monkeypatch):
    """Drive has no hard links; the same files come out, by copying."""

    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    files = CheckpointFiles(tmp_path, keep_last=1)
    for number in (1, 2):
        files.write(content(number))
    assert (number_of(files.latest), number_of(files.previous), number_of(files.steps()[0])) == (2, 1, 2)
    assert files.latest.stat().st_nlink == 1


def test_order_is_by_stored_number_not_by_clock(files):
    """Copied files with shuffled times are still read in the order they were saved."""
    for age, path in enumerate([files.latest, files.previous, *files.steps()]):
        os.utime(path, (age * 1000, age * 1000))
    assert files.read_newest([])["save_number"] == 5

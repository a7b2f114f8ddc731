"""Latest, previous, step files and manifest: what is kept, what is believed, and that nothing whole is ever lost."""

import errno
import itertools
import json
import os
import random

import pytest
import torch

from newllm.errors import UserError
from newllm.saving import checkpoint
from newllm.saving.checkpoint import mended, write_state
from newllm.saving.files import load_sealed
from newllm.saving.runs import newest, states

NAMES = "model_latest.pt", "model_prev.pt", "model_step_00000005.pt", "model_step_00000004.pt"


def content(number):
    """A state as small as one can be, with what the manifest names."""
    return {
        "run_id": "r", "epoch": f"phase1_iteration_{number}", "stage": "phase1", "step": number, "restart": "here", "save_number": number,
        "saved_at": "now", "weights": torch.full((50,), float(number)),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for number in range(1, 6):
        write_state(tmp_path, content(number), keep_last=2)
    return tmp_path


def flip(path, source=random.Random(0)):  # noqa: B008
    """Change one bit in a file of its own: step files may be further names of the same one."""
    data = bytearray(path.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.unlink()
    path.write_bytes(data)


def number_of(path):
    return load_sealed(path)["save_number"]


def test_latest_previous_the_last_steps_and_a_manifest_are_kept(folder):
    """Each holds the state its name says, older and temporary ones are gone; the manifest tells people, without torch."""
    assert [number_of(folder / name) for name in NAMES] == [5, 4, 5, 4]
    assert {path.name for path in folder.iterdir()} == {*NAMES, "manifest.json"}
    assert [path.name for path in states(folder)][:4] == list(NAMES)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["save_number"] == 5 and manifest["epoch"] == "phase1_iteration_5"
    assert manifest["bytes"] == (folder / NAMES[0]).stat().st_size and len(manifest["sha256"]) == 64


def test_the_first_state_of_a_run_keeps_no_other_runs_as_its_previous_one(folder):
    """What lies at the top then is a second name of a run that is kept elsewhere."""
    (folder / "model_prev.pt").unlink()
    write_state(folder, content(1))
    assert number_of(folder / NAMES[0]) == 1 and not (folder / "model_prev.pt").exists()


@pytest.mark.parametrize("damaged", range(1, 4))
def test_a_damaged_file_is_set_aside_and_the_next_one_is_used(folder, damaged):
    """The newest whole state, whatever the times of the files; the damaged are kept as .corrupt, said aloud, never loaded."""
    every = [folder / name for name in NAMES]
    for age, path in enumerate(every):
        os.utime(path, (age * 1000, age * 1000))
    expected = max(number_of(path) for path in every[damaged:])
    for path in every[:damaged]:
        flip(path)
    notes = []
    assert newest(folder)[0]["save_number"] == expected  # who only reads changes nothing
    assert not list(folder.glob("*.corrupt"))
    assert mended(folder, notes)["save_number"] == expected
    assert len(notes) == damaged and all("kept as" in note for note in notes)
    assert all(path.with_name(path.name + ".corrupt").exists() for path in every[:damaged])
    assert number_of(every[0]) == expected and not any(path.exists() for path in every[1:damaged])


def test_when_no_file_is_whole_the_run_stops_and_all_are_kept(folder):
    """Never a silent fresh start over files that exist; a link to nowhere is one too, and no file at all is a start."""
    for name in NAMES:
        flip(folder / name)
    before = [(folder / name).read_bytes() for name in NAMES]
    with pytest.raises(UserError, match=r"no checkpoint .* can be read"):
        mended(folder, [])
    assert [(folder / name).read_bytes() for name in NAMES] == before
    for name in NAMES:
        (folder / name).unlink()
    assert mended(folder, []) is None
    (folder / NAMES[0]).symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match="is a link to nowhere"):
        mended(folder, [])


@pytest.mark.parametrize("length", ["0", "1", "22", "half", "n-73", "n-1"])
def test_a_truncated_latest_falls_back(folder, length):
    """A torn write of any length is found before anything is unpickled."""
    latest = folder / NAMES[0]
    data = latest.read_bytes()
    lengths = {"half": len(data) // 2, "n-73": len(data) - 73, "n-1": len(data) - 1}
    latest.unlink()
    latest.write_bytes(data[: lengths.get(length) or int(length)])
    notes = []
    assert mended(folder, notes)["save_number"] == 5
    assert "continuing from model_step_00000005.pt" in notes[0]


def test_200_bit_flips_of_the_latest_never_load(folder):
    """Whatever bit turns, it is found, and the same state is read from its other file; each damaged one is kept."""
    source, whole = random.Random(1), (folder / NAMES[0]).read_bytes()
    loaded = 0
    for _ in range(200):
        (folder / NAMES[0]).unlink(missing_ok=True)
        (folder / NAMES[0]).write_bytes(whole)
        flip(folder / NAMES[0], source)
        notes = []
        assert mended(folder, notes)["save_number"] == 5
        loaded += not notes
    assert len(list(folder.glob("model_latest.pt.corrupt*"))) == 200 - loaded
    print(f"\n{loaded}/200 flipped bits loaded")
    assert loaded == 0


def test_a_write_that_fails_for_a_moment_is_tried_again_and_a_full_disk_changes_nothing(folder, monkeypatch):
    """Two I/O errors, then success; where it is given up the latest is byte-identical and no temporary file stays."""
    real, failures = checkpoint.save_sealed, iter([errno.EIO, errno.ENOTCONN])

    def flaky(value, path, previous):
        if number := next(failures, None):
            raise OSError(number, os.strerror(number))
        return real(value, path, previous)

    monkeypatch.setattr(checkpoint, "save_sealed", flaky)
    monkeypatch.setattr(checkpoint, "WAIT", 0.0)
    write_state(folder, content(6))
    assert number_of(folder / NAMES[0]) == 6
    before, failures = (folder / NAMES[0]).read_bytes(), itertools.repeat(errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        write_state(folder, content(7))
    assert (folder / NAMES[0]).read_bytes() == before and not list(folder.glob(".*.tmp"))


def test_without_hard_links_names_are_copies(tmp_path, monkeypatch):
    """Drive has no hard links; the same files come out, by copying."""

    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    for number in (1, 2):
        write_state(tmp_path, content(number), keep_last=1)
    names = "model_latest.pt", "model_prev.pt", "model_step_00000002.pt"
    assert [number_of(tmp_path / name) for name in names] == [2, 1, 2]
    assert (tmp_path / "model_latest.pt").stat().st_nlink == 1

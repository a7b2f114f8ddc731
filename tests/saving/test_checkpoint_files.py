"""Latest, previous and step files, changes of runs: what is kept and believed, that nothing is ever lost."""

import errno
import itertools
import json
import os
import random
import shutil

import pytest
import torch

from newllm.errors import UserError
from newllm.saving import checkpoint
from newllm.saving.checkpoint import write_state
from newllm.saving.files import load_sealed, save_sealed
from newllm.saving.runs import FORMAT, TOLD, change, mended, newest_state

NAMES = "model_latest.pt", "model_prev.pt", "model_step_00000005.pt", "model_step_00000004.pt"


def content(number):
    """A state as small as one can be, with what the manifest names."""
    state = dict.fromkeys(TOLD, "here") | {"format": FORMAT, "step": number, "save_number": number}
    return state | {"weights": torch.full((50,), float(number))}


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


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_what_is_kept(tmp_path, monkeypatch, links):
    """Each file holds the state its name says, older ones are gone; without hard links names are copies."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    for number in range(1, 6):
        write_state(tmp_path, content(number), keep_last=2)
    assert [number_of(tmp_path / name) for name in NAMES] == [5, 4, 5, 4]
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, "manifest.json"}
    assert (tmp_path / NAMES[0]).stat().st_nlink == (2 if links else 1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["save_number"] == 5 and len(manifest["sha256"]) == 64
    assert manifest["bytes"] == (tmp_path / NAMES[0]).stat().st_size
    (tmp_path / NAMES[1]).unlink()
    write_state(tmp_path, content(1))  # of a new run: what has the name is one that is kept elsewhere
    assert number_of(tmp_path / NAMES[0]) == 1 and not (tmp_path / NAMES[1]).exists()


@pytest.mark.parametrize("damaged", range(1, 4))
def test_a_damaged_file_is_set_aside_and_the_next_one_is_used(folder, damaged):
    """The newest whole state, whatever the times of the files; the damaged are kept, said, never loaded."""
    every = [folder / name for name in NAMES]
    for age, path in enumerate(every):
        os.utime(path, (age * 1000, age * 1000))
    expected = max(number_of(path) for path in every[damaged:])
    for path in every[:damaged]:
        flip(path)
    notes = []
    assert newest_state(folder)["save_number"] == expected  # who only reads changes nothing
    assert not list(folder.glob("*.corrupt"))
    assert mended(folder, notes)["save_number"] == expected
    assert len(notes) == damaged and all("kept as" in note for note in notes)
    assert all(path.with_name(path.name + ".corrupt").exists() for path in every[:damaged])
    assert number_of(every[0]) == expected and not any(path.exists() for path in every[1:damaged])


def test_when_no_file_is_whole_the_run_stops_and_all_are_kept(folder):
    """Never a silent fresh start over files that exist; a link to nowhere is one too."""
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
    with pytest.raises(UserError, match=r"model_latest\.pt cannot be read \(No such file"):
        mended(folder, [])


def test_200_bit_flips_and_torn_writes_of_the_latest_never_load(folder):
    """Whatever bit turns, wherever it is cut: it is found, and the same state is read from its other file."""
    source, latest = random.Random(1), folder / NAMES[0]
    whole = latest.read_bytes()
    lengths = [0, 1, 22, len(whole) // 2, len(whole) - 73, len(whole) - 1]
    loaded = 0
    for length in [len(whole)] * 200 + lengths:
        latest.unlink(missing_ok=True)
        latest.write_bytes(whole[:length])
        if length == len(whole):
            flip(latest, source)
        notes = []
        assert mended(folder, notes)["save_number"] == 5
        loaded += "continuing from model_step_00000005.pt" not in "".join(notes)
    print(f"\n{loaded} of 200 flipped bits and {len(lengths)} torn writes loaded")
    assert loaded == 0


def test_a_write_that_fails_is_tried_again_and_a_full_disk_changes_nothing(folder, monkeypatch):
    """Two I/O errors, then success; given up, the latest is byte-identical and no temporary file stays."""
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


class Killed(BaseException):
    """Stands for a kill."""


def state_of(run, number, folder):
    """A small whole run in a folder, with files beside its states."""
    folder.mkdir()
    for save in (number, number + 1):
        write_state(folder, content(save) | {"run_id": run}, 2, ["model_phase1.pt"])
    save_sealed({"run_id": run}, folder / "model_best.pt")
    (folder / "contexts_0_0_fp32.bin").write_text(run)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(("mod", "con"))}


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("back", [True, False], ids=["back", "new"])
def test_a_change_of_runs_killed_at_any_operation_loses_nothing(tmp_path, monkeypatch, back, links):
    """Before each operation on a file: the top is whole, and the next start has both runs, byte for byte."""
    state_of("A", 5, tmp_path / "A")
    state_of("B", 3, tmp_path / "B")
    whole = {run: files_of(tmp_path / run) for run in "AB"}
    operations = ["replace", "mkdir", "rmdir", "unlink", "link" if links else "fsync"]
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links")))

    def begin(folder):
        change(folder, mended(folder, []), folder / "runs" / "B" if back else None, [])

    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "A", folder)
        shutil.copytree(tmp_path / "B", folder / "runs" / "B")
        left = iter(range(number, 0, -1))

        def dying(real, left=left):
            def operation(*arguments, **named):
                if next(left, 0) == 1:
                    raise Killed
                return real(*arguments, **named)

            return operation

        with monkeypatch.context() as patch:
            for name in operations:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                begin(folder)
                ended = next(left, 0) > 0
            except Killed:
                ended = False
        top = load_sealed(folder / "model_latest.pt")["run_id"]
        assert mended(folder, [])["run_id"] == top
        if ended:
            assert top == ("B" if back else "A") and number > 10
            break
        for stray in folder.rglob(".*.tmp"):
            stray.unlink()
        for run in "AB":
            assert files_of(folder if run == top else folder / "runs" / run) == whole[run], (number, run)

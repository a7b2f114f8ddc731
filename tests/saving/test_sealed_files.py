"""Sealed files are whole or refused, a failed write changes nothing, folders are usable or refused."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers import Evil, seal, write_evil
from left_behind import Faults, refuse

from newllm.errors import UserError
from newllm.report.record import read_record, read_status
from newllm.report.series import read_series
from newllm.saving import files
from newllm.saving.files import Corrupt, load_sealed, save_sealed, usable_folder, verify_seal
from newllm.saving.guard import read_manifest

VALUE = {"weights": torch.arange(300.0).reshape(3, 100), "step": 7, "rates": [0.1, None], "done": False}


@pytest.fixture
def sealed(tmp_path):
    """(path, bytes) of a sealed file; afterwards the folder holds nothing else."""
    path = tmp_path / "model.pt"
    save_sealed(VALUE, path)
    yield path, path.read_bytes()
    assert os.listdir(tmp_path) == [path.name]


def assert_refused_untouched(path, content):
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        load_sealed(path)
    assert path.read_bytes() == content


def test_what_was_saved_is_loaded(tmp_path):
    """Tensors of several types and empty ones, plain values; torch alone opens it, zipfile finds no fault."""
    path, kinds = tmp_path / "x.pt", (torch.float16, torch.bfloat16, torch.float64, torch.uint8)
    tensors = [*(torch.tensor([1, 2]).to(kind) for kind in kinds), torch.zeros(0, 3)]
    plain = {"a": [1, 2.5, None, True, "text", (3, b"raw")], "big": 2**100}
    save_sealed({"tensors": tensors, "plain": plain}, path)
    for got in (load_sealed(path), torch.load(path, weights_only=True)):
        assert got["plain"] == plain
        for one, other in zip(got["tensors"], tensors, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment == b"sha256:" + verify_seal(path).encode()


def test_no_single_bit_flip_loads(sealed):
    """200 flips at random places and one in every byte of the seal: Corrupt, and the file stays as it is."""
    path, whole = sealed
    rng = np.random.default_rng(0)
    for place in [*rng.choice(len(whole), 200, replace=False), *range(len(whole) - 73, len(whole))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        assert_refused_untouched(path, bytes(flipped))
    path.write_bytes(whole)
    assert load_sealed(path, mmap=True)["step"] == 7


def test_nothing_but_the_whole_file_loads(sealed):
    """Cut anywhere, with bytes after the end, or never sealed: Corrupt, which is not the same as missing."""
    path, whole = sealed
    for length in (0, 1, 71, 73, 74, len(whole) // 2, len(whole) - 64, len(whole) - 1):
        assert_refused_untouched(path, whole[:length])
    assert_refused_untouched(path, whole + b"\0")
    assert_refused_untouched(path, whole + whole)
    torch.save(VALUE, path)
    assert_refused_untouched(path, path.read_bytes())
    with pytest.raises(FileNotFoundError):
        load_sealed(path.with_name("none.pt"))


def test_a_correct_seal_proves_wholeness_not_good_will(tmp_path):
    """An evil pickle, an archive that is not torch's, a pickle that is none: refused, nothing executed."""
    harm, path = tmp_path / "harm", tmp_path / "x.pt"
    write_evil(path, harm)
    verify_seal(path)
    with pytest.raises(Corrupt):
        load_sealed(path)
    assert not harm.exists()
    pickle.loads(pickle.dumps(Evil(harm)))
    assert harm.exists()  # the trap itself works
    for record, content in (("other/file", b"x"), ("archive/data.pkl", b"garbage")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(record, content)
            archive.writestr("archive/byteorder", "little")
        assert_refused_untouched(path, seal(buffer.getvalue()))


def test_a_failed_write_at_any_point_leaves_the_old_file(sealed, monkeypatch):
    """The disk fills up at the first, ... last write: OSError that says so, old bytes, no temporary file."""
    path, whole = sealed
    faults = Faults(path.parent, monkeypatch)

    def full(operation, path, _):
        nonlocal room
        room -= operation == "write"
        if room < 0:
            refuse(28, path)

    for writes in range(1000):
        room, faults.before = writes, full
        try:
            save_sealed(VALUE | {"step": 8}, path)
            break
        except OSError as error:
            assert error.errno == 28
        faults.before = lambda *_: None
        assert path.read_bytes() == whole and len(os.listdir(path.parent)) == 1
    assert writes > 3 and load_sealed(path)["step"] == 8


@pytest.mark.parametrize("fault", ["fsync", "replace", "altered", "unpicklable"])
def test_whatever_else_fails_on_the_way_leaves_the_old_file(sealed, monkeypatch, fault):
    """Flushing, naming, a disk that alters bytes (they are read back), a value that cannot be saved."""
    path, whole = sealed
    value, sync = VALUE | {"step": 8}, files.sync

    def full(*_):
        raise OSError(28, "No space left on device")

    def alter(written):
        sync(written)
        with open(written, "r+b") as file:
            file.seek(100)
            file.write(b"\xff")

    with monkeypatch.context() as patch:
        if fault == "unpicklable":
            value = {"x": lambda: 0}
        elif fault == "altered":
            patch.setattr(files, "sync", alter)
        else:
            patch.setattr(os, fault, full)
        with pytest.raises((OSError, AttributeError, pickle.PicklingError)):
            save_sealed(value, path)
    assert path.read_bytes() == whole


def test_what_a_killed_process_left_costs_no_file(sealed):
    """A temporary name, of a process of the same number, that is one more name of a good file."""
    path, whole = sealed
    kept = path.parent.parent / f"{path.parent.name}_kept.pt"
    for name in (path.with_name(f".{path.name}.{os.getpid()}.tmp"), kept):
        os.link(path, name)
    save_sealed(VALUE | {"step": 8}, path)
    assert kept.read_bytes() == whole and load_sealed(path)["step"] == 8


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "9" * 5000, "\ufffd{", "", "[1]" * 2])
def test_small_files_that_are_damaged_in_odd_ways_are_one_sentence(tmp_path, text):
    """Nested beyond the parser's depth, a number beyond Python's, no JSON: every small file read back."""
    for name in ("status.json", "series.json", "manifest.json", "metrics_1.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for read, path in (
        (read_status, tmp_path),
        (read_series, tmp_path),
        (read_record, tmp_path / "metrics_1.jsonl"),
    ):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert read_manifest(tmp_path) == {}


def test_text_files_are_utf8_and_take_any_name(tmp_path):
    """Half a character, as in a path that is not UTF-8, is written escaped."""
    files.write_text(tmp_path / "a.html", "\u6771 \udcff")
    assert (tmp_path / "a.html").read_bytes() == "\u6771 \\udcff".encode()


def test_a_usable_folder_is_made_and_resolved(tmp_path):
    """With its parents, or found behind a link, which stays one and leads what is saved there."""
    made, link = usable_folder(tmp_path / "a" / "b", "cache"), tmp_path / "link"
    link.symlink_to(made)
    assert made.is_dir() and usable_folder(link, "cache") == made.resolve()
    assert not usable_folder(link / "none", "cache", make=False).exists()
    save_sealed(VALUE, link / "x.pt")
    assert link.is_symlink() and os.listdir(made) == ["x.pt"]


def test_an_unusable_folder_is_a_sentence_that_names_it(tmp_path, monkeypatch):
    """A link to nothing or to itself, a file, what lies below these, an unmounted Drive: nothing is made."""
    (tmp_path / "occupied").write_text("mine")
    for link, target in (("gone", "drive"), ("loop", "loop"), ("to_file", "occupied")):
        (tmp_path / link).symlink_to(tmp_path / target)
    for name in ("gone", "loop", "to_file", "occupied"):
        for path in (tmp_path / name, tmp_path / name / "below"):
            with pytest.raises(UserError, match=rf"{path} \(purpose\)"):
                usable_folder(path, "purpose")
    with pytest.raises(UserError, match=r"gone.*link to nothing.*drive.*: mount Drive first"):
        usable_folder(tmp_path / "gone", "purpose")
    with pytest.raises(UserError, match=r"occupied \(purpose\) is a file, not a folder: move it away"):
        usable_folder(tmp_path / "occupied", "purpose")
    monkeypatch.setattr(files, "COLAB_DRIVE", tmp_path / "content")
    with pytest.raises(UserError, match="not mounted"):
        usable_folder(tmp_path / "content" / "MyDrive", "purpose")
    assert sorted(os.listdir(tmp_path)) == ["gone", "loop", "occupied", "to_file"]

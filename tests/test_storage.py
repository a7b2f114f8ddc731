"""Sealed files are whole or refused, and a failed write changes nothing."""

import builtins
import io
import os
import pickle
import resource
import zipfile

import numpy as np
import pytest
import torch
from helpers import Evil, seal, write_evil

from newllm.errors import UserError
from newllm.report.record import read_record
from newllm.report.series import read_series
from newllm.report.status import read_status
from newllm.saving import files as storage
from newllm.saving.files import Corrupt, load_sealed, save_sealed, usable_folder, verify_seal
from newllm.saving.guard import read_lock

VALUE = {
    "weights": torch.arange(300.0).reshape(3, 100),
    "step": 7,
    "name": "x",
    "rates": [0.1, None],
    "done": False,
}


def assert_same(got, expected=VALUE):
    assert got.keys() == expected.keys()
    assert torch.equal(got["weights"], expected["weights"])
    assert {k: v for k, v in got.items() if k != "weights"} == {
        k: v for k, v in expected.items() if k != "weights"
    }


@pytest.fixture
def sealed(tmp_path):
    """(path, bytes) of a sealed file."""
    path = tmp_path / "model.pt"
    save_sealed(VALUE, path)
    return path, path.read_bytes()


def assert_refused_untouched(path, content):
    """The file with this content raises Corrupt and is still the same file afterwards."""
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        load_sealed(path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_round_trip(tmp_path):
    """What was saved is loaded: tensors of several types and empty ones, plain values, nesting."""
    value = {
        "tensors": [
            torch.tensor([1.5], dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.float64)
        ],
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "plain": {"a": [1, 2.5, None, True, "text", (3, b"raw")]},
        "big": 2**100,
    }
    save_sealed(value, tmp_path / "x.pt")
    got = load_sealed(tmp_path / "x.pt")
    assert got["plain"] == value["plain"]
    assert got["big"] == value["big"]
    pairs = zip(
        [*got["tensors"], got["bytes"], got["empty"]],
        [*value["tensors"], value["bytes"], value["empty"]],
        strict=True,
    )
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_the_returned_digest_is_the_one_in_the_file(tmp_path):
    """save_sealed, verify_seal and the last 64 bytes agree."""
    path = tmp_path / "x.pt"
    digest = save_sealed(VALUE, path)
    assert verify_seal(path) == digest == path.read_bytes()[-64:].decode()


def test_plain_torch_load_opens_a_sealed_file(sealed):
    """No need of this package to read a checkpoint."""
    assert_same(torch.load(sealed[0], weights_only=True))


def test_a_sealed_file_is_a_sound_zip_archive(sealed):
    """Other zip readers accept it, and its comment is the seal."""
    with zipfile.ZipFile(sealed[0]) as archive:
        assert archive.testzip() is None
        assert archive.comment == sealed[1][-storage.SEAL_LENGTH :]


def test_saving_replaces_the_old_file_and_leaves_nothing_else(sealed):
    """After a second save the file holds the second value, and the folder holds the file alone."""
    save_sealed({**VALUE, "step": 8}, sealed[0])
    assert load_sealed(sealed[0])["step"] == 8
    assert os.listdir(sealed[0].parent) == [sealed[0].name]


def test_no_single_bit_flip_loads(sealed):
    """200 flips at random places and one in every byte of the seal: each raises Corrupt, the file stays as it is."""
    path, whole = sealed
    rng = np.random.default_rng(0)
    tail = storage.SEAL_LENGTH + len(storage.SEAL_COMMENT)
    places = [*rng.choice(len(whole), 200, replace=False), *range(len(whole) - tail, len(whole))]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        assert_refused_untouched(path, bytes(flipped))
    path.write_bytes(whole)
    assert_same(load_sealed(path))


def test_no_truncation_or_extension_loads(sealed):
    """Cut anywhere, or with bytes after the end: Corrupt."""
    path, whole = sealed
    n = len(whole)
    for length in (
        0,
        1,
        storage.SEAL_LENGTH,
        storage.SEAL_LENGTH + 2,
        storage.SEAL_LENGTH + 3,
        n // 2,
        n - 64,
        n - 1,
    ):
        assert_refused_untouched(path, whole[:length])
    assert_refused_untouched(path, whole + b"\0")
    assert_refused_untouched(path, whole + whole)


def test_a_file_without_seal_is_corrupt(tmp_path):
    """A foreign torch.save file may be fine, but nothing proves it."""
    path = tmp_path / "foreign.pt"
    torch.save(VALUE, path)
    assert_refused_untouched(path, path.read_bytes())


def test_a_missing_file_is_file_not_found(tmp_path):
    """Absent is not corrupt: callers start afresh on the one and stop on the other."""
    with pytest.raises(FileNotFoundError):
        load_sealed(tmp_path / "none.pt")


def test_an_evil_pickle_in_a_correct_seal_never_executes(tmp_path):
    """The seal proves wholeness, not good will: unpickling is restricted as well."""
    harm = tmp_path / "harm"
    path = tmp_path / "evil.pt"
    write_evil(path, harm)
    verify_seal(path)
    with pytest.raises(Corrupt):
        load_sealed(path)
    assert not harm.exists()
    pickle.loads(pickle.dumps(Evil(harm)))
    assert harm.exists()  # the trap itself works


def test_garbage_in_a_correct_seal_is_corrupt(tmp_path):
    """An archive that torch did not write, or a pickle that is none."""
    path = tmp_path / "x.pt"
    for record, content in (("other/file", b"x"), ("archive/data.pkl", b"garbage")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(record, content)
            archive.writestr("archive/byteorder", "little")
        assert_refused_untouched(path, seal(buffer.getvalue()))


class FullDisk:
    """File object that refuses every write after the first few."""

    def __init__(self, file, writes_left):
        self.file, self.writes_left = file, writes_left

    def write(self, data):
        if self.writes_left == 0:
            raise OSError(28, "No space left on device")
        self.writes_left -= 1
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def count_writes(monkeypatch, path):
    """Number of write calls in one save."""
    used = []
    real = builtins.open

    def counting(name, *args, **kwargs):
        used.append(FullDisk(real(name, *args, **kwargs), -1))
        return used[-1]

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", counting)
        save_sealed(VALUE, path)
    return -1 - used[0].writes_left


def test_a_failed_write_at_any_point_leaves_the_old_file(sealed, monkeypatch):
    """The disk fills up at the first, second, ... last write: OSError, old bytes, no temporary file."""
    path, whole = sealed
    real = builtins.open
    writes = count_writes(monkeypatch, path)
    assert writes > 3
    for allowed in range(writes):

        def full(name, *args, allowed=allowed, **kwargs):
            return FullDisk(real(name, *args, **kwargs), allowed)

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", full)
            with pytest.raises(OSError):
                save_sealed({**VALUE, "step": 8}, path)
        assert path.read_bytes() == whole
        assert os.listdir(path.parent) == [path.name]


def test_a_file_size_limit_leaves_the_old_file(sealed):
    """The kernel itself refuses, in the middle of a large tensor."""
    path, whole = sealed
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError):
            save_sealed({"x": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_sync_or_rename_leaves_the_old_file(sealed, monkeypatch, call):
    """Errors that come only when the data is flushed or the name is taken."""
    path, whole = sealed

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError):
            save_sealed({**VALUE, "step": 8}, path)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_alters_bytes_is_noticed_before_the_rename(sealed, monkeypatch):
    """Written bytes are read back: a flipped one raises OSError and the old file stays."""
    path, whole = sealed
    real_sync = os.fsync

    def corrupting(handle):
        real_sync(handle)
        os.pwrite(handle, b"\xff", 100)
        assert os.fstat(handle).st_size > 100

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", corrupting)
        with pytest.raises((OSError, Corrupt)):
            save_sealed({**VALUE, "step": 8}, path)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]


def test_a_value_that_cannot_be_pickled_leaves_the_old_file(sealed):
    """Any exception on the way, not only the disk's."""
    path, whole = sealed
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_sealed({"x": lambda: 0}, path)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]


def test_saving_through_a_linked_folder_keeps_the_link(tmp_path):
    """The file lands in the folder that the link names (a mounted Drive), and the link stays a link."""
    (tmp_path / "drive").mkdir()
    link = tmp_path / "checkpoints"
    link.symlink_to(tmp_path / "drive")
    for folder in (link, usable_folder(link, "checkpoints")):
        save_sealed(VALUE, folder / "x.pt")
        assert link.is_symlink()
        assert os.listdir(tmp_path / "drive") == ["x.pt"]
        assert_same(load_sealed(link / "x.pt"))


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "9" * 5000, "\ufffd{", "", "[1]" * 2])
def test_small_files_that_are_damaged_in_odd_ways_are_one_sentence(tmp_path, text):
    """Nested beyond the parser's depth, a number beyond Python's, no JSON: every small file the project reads back."""
    names = ("status.json", "series.json", "run.lock", "metrics_1.jsonl")
    for name in names:
        (tmp_path / name).write_text(text, encoding="utf-8")
    for read in (
        lambda: read_status(tmp_path),
        lambda: read_series(tmp_path),
        lambda: read_record(tmp_path / "metrics_1.jsonl"),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert read_lock(tmp_path / "run.lock") is None


def test_text_files_are_utf8_and_take_any_name(tmp_path):
    """Half a character, as in a path that is not UTF-8, is written escaped."""
    storage.write_text(tmp_path / "a.html", "\u6771 \udcff")
    assert (tmp_path / "a.html").read_bytes() == "\u6771 \\udcff".encode()

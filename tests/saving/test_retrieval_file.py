"""The file of what a model looks up: gone, damaged or of other weights, on full disks, in second copies."""

import errno
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from left_behind import Faults, refuse
from looking_up import OFF, ON, assert_equal, copy_of, kept, latest, retrieval_file, train_nothing

import train
from newllm.errors import UserError
from newllm.saving import runs
from newllm.saving.checkpoint import require_space
from newllm.saving.files import load_sealed, save_sealed
from newllm.saving.trained import retrieval_bytes
from newllm.training.memory_estimate import sketch
from scripts import generate, report


@pytest.fixture
def config(looking_up, tmp_path):
    """A copy of a complete run."""
    return copy_of(looking_up.complete(ON)[0], tmp_path / "checkpoints")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_other_weights(path):
    save_sealed(load_sealed(path) | {"model": "another"}, path)


HARM = {
    "No such file": Path.unlink,
    "does not match its checksum": flipped,
    "torn: does not match": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty: does not match": lambda path: path.write_bytes(b""),
    "is of other weights": of_other_weights,
    "foreign: is of other weights": lambda path: save_sealed([1, 2], path),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_file_that_does_not_serve_is_made_anew_and_nobody_uses_it(config, monkeypatch, capsys, harm):
    """train.py says so in a line and trains nothing; who only reads says that the network answers alone."""
    before, figures = kept(config), train.main(config)
    HARM[harm](retrieval_file(config))
    said = harm.rpartition(": ")[2]
    capsys.readouterr()
    prompt = ["--model_path", config.checkpoint_dir, "--prompt", "ban", "--max_tokens", "5"]
    generate.main(prompt)
    alone = capsys.readouterr()
    assert alone.err.startswith("note: the network answers alone, as ") and alone.err.count("\n") == 1
    assert said in alone.err and "run train.py to its end" in alone.err
    generate.main([*prompt, "--retrieval", "none"])
    assert capsys.readouterr() == (alone.out, "")
    train_nothing(monkeypatch)
    again = train.main(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("it is made anew")]
    assert len(lines) == 1 and said in lines[0]
    assert again["val_ppl_retrieval"] == figures["val_ppl_retrieval"]
    for name, tensor in kept(config)["state"].items():
        assert tensor.equal(before["state"][name]), name
    generate.main(prompt)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("change", [{"unknown": 1}, {"format": 0}], ids=str)
def test_a_file_of_another_version_is_a_sentence(config, capsys, change):
    """Its seal and its model are right, its parts or what they mean are not."""
    content = load_sealed(retrieval_file(config))
    save_sealed(content | {"description": content["description"] | change}, retrieval_file(config))
    generate.main(["--model_path", config.checkpoint_dir, "--max_tokens", "3"])
    assert "is of another version: give" in capsys.readouterr().err


def test_a_run_that_looks_nothing_up_has_nothing_to_say(looking_up, capsys):
    folder = looking_up.complete(OFF)[0].checkpoint_dir
    capsys.readouterr()
    generate.main(["--model_path", folder, "--max_tokens", "3"])
    assert not capsys.readouterr().err


# Disks


@pytest.mark.parametrize(
    ("operation", "number"), [("write", errno.ENOSPC), ("open", errno.EROFS), ("name", errno.EIO)]
)
def test_a_disk_that_refuses_the_file_costs_a_line(
    looking_up, tmp_path, monkeypatch, capsys, operation, number
):
    """The run ends with its figures; the next start makes the file, and nothing else."""
    expected, _ = looking_up.complete(ON)
    config = copy_of(looking_up.cut(), tmp_path / "checkpoints")

    def before(now, path, _):
        if now.startswith(operation) and now != "open rb" and "model_retrieval" in path.name:
            refuse(number, path)

    with monkeypatch.context() as patch:
        Faults(config.checkpoint_dir, patch).before = before
        train.main(config)
    out = capsys.readouterr().out
    assert out.count("cannot be written") == 1 and "val_ppl_retrieval: " in out
    names = {path.name for path in Path(config.checkpoint_dir).iterdir()}
    assert "model_retrieval.pt" not in names and not any(name.endswith(".tmp") for name in names)
    train_nothing(monkeypatch)
    train.main(config)
    assert_equal(config, expected)


def test_its_room_is_counted_before_anything_trains(config, tmp_path, monkeypatch):
    """What is predicted is at least what the file takes, and hardly more, and it is asked for twice."""
    size = retrieval_file(config).stat().st_size
    assert size <= retrieval_bytes(config, 300, config.train_tokens) + 20_000 <= 1.5 * size  # the archive's
    needed = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=-1e12))
    for setting in (OFF, ON):
        own = dict(checkpoint_dir=str(tmp_path / setting), num_tokens=900_000, retrieval=setting)
        with pytest.raises(UserError, match="make room") as caught:
            require_space(tmp_path, sketch(config, 300), replace(config, **own), torch.float32)
        needed[setting] = float(re.search(r"need about ([\d.]+) GB", str(caught.value))[1])
    places = retrieval_bytes(config, 300, 900_000) / 1e9
    assert needed[ON] - needed[OFF] == pytest.approx(2 * places, abs=0.02) and places > 0.1


# Second copies, and several runs


def test_second_copies_bring_it_back(looking_up, tmp_path, monkeypatch, capsys):
    """A lost folder comes back with it: nothing is trained, and nothing made anew."""
    config = copy_of(looking_up.cut(), tmp_path / "checkpoints", backup_dir=str(tmp_path / "drive"))
    train.main(config)
    copy, whole = tmp_path / "drive" / "model_retrieval.pt", retrieval_file(config).read_bytes()
    assert copy.read_bytes() == whole
    shutil.rmtree(config.checkpoint_dir)
    capsys.readouterr()
    train_nothing(monkeypatch)
    train.main(config)
    assert retrieval_file(config).read_bytes() == whole and "made anew" not in capsys.readouterr().out
    # A damaged copy is not taken; what is made anew here goes there, too.
    shutil.rmtree(config.checkpoint_dir)
    flipped(copy)
    train.main(config)
    assert "made anew" in capsys.readouterr().out and copy.read_bytes() == retrieval_file(config).read_bytes()


def test_each_run_of_a_folder_has_its_own(config, capsys):
    """Listed with its size, moved with its run, deleted with it."""
    first, before = latest(config)["run_id"], retrieval_file(config).read_bytes()
    other = replace(config, retrieval_keys="tokens")
    train.main(other)
    second = latest(other)["run_id"]
    assert retrieval_file(config, "runs", first).read_bytes() == before
    assert load_sealed(retrieval_file(other))["run_id"] == second
    where = ["--checkpoint_dir", config.checkpoint_dir]
    capsys.readouterr()
    report.main(["--runs", *where])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(first))
    assert f" {runs.bytes_of(Path(config.checkpoint_dir, 'runs', first)) / 1e6:.1f} " in line
    assert retrieval_file(config, "runs", first) in runs.files_of(Path(config.checkpoint_dir, "runs", first))
    report.main(["--remove", first, *where])
    assert not list(Path(config.checkpoint_dir, "runs").iterdir()) and retrieval_file(other).exists()

"""What a run makes of disks that refuse, links, clocks that lie, files that do harm, and checkpoints of something else."""

import builtins
import dataclasses
import errno
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import as_flags, write_evil

from config import ResidualConfig
from newllm.errors import UserError
from newllm.reporting.runlog import RunLog
from newllm.storage import load_sealed, save_sealed
from train import main

ROOT = Path(__file__).parent.parent


def weights(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["model_state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def content(config):
    """Bytes of each checkpoint file by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(config.checkpoint_dir).glob("model_*.pt"))}


def temporary_files(config):
    return [path.name for path in Path(config.checkpoint_dir).iterdir() if path.name.endswith(".tmp")]


@pytest.fixture
def after_phase_1(tiny_settings):
    """Configuration of a run that has ended after Phase 1 and has few saves before it."""
    config = ResidualConfig(**tiny_settings | {"phase2_epochs": 1, "save_every_n_batches": 10**6}, phase="1")
    main(config)
    return dataclasses.replace(config, phase="both")


class Disk:
    """While `number` is set, `folder` refuses with that error: files beyond `room` bytes, other names if `names`."""

    def __init__(self, monkeypatch, folder, room, names=True):
        self.folder, self.room, self.names, self.number, self.refused = Path(folder).resolve(), room, names, None, 0
        self.open = builtins.open
        monkeypatch.setattr(builtins, "open", self._open)
        for name in ("replace", "link"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))

    def _refuse(self, path):
        self.refused += 1
        raise OSError(self.number, os.strerror(self.number), str(path))

    def _meant(self, path):
        return self.number and isinstance(path, str | os.PathLike) and self.folder in Path(path).absolute().parents

    def _open(self, path, mode="r", *args, **kwargs):
        if self._meant(path) and mode != "rb" and set(mode) & set("wax+"):
            if not self.room:
                self._refuse(path)
            return FullFile(self, self.open(path, mode, *args, **kwargs), path)
        return self.open(path, mode, *args, **kwargs)

    def _naming(self, real):
        def name(source, target, **kwargs):
            if self.names and self._meant(target):
                self._refuse(target)
            return real(source, target, **kwargs)

        return name


class FullFile:
    """A file that takes as many bytes as the disk has room for."""

    def __init__(self, disk, file, path):
        self.disk, self.file, self.path, self.left = disk, file, path, disk.room

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.disk._refuse(self.path)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


# Disks


@pytest.mark.parametrize(
    ("number", "room", "names"),
    [(errno.ENOSPC, 4000, False), (errno.EROFS, 0, True), (errno.EIO, 10**9, True)],
    ids=["full", "read-only", "failing"],
)
def test_a_disk_that_refuses_every_save_leaves_the_old_files_and_the_run_goes_on(
    after_phase_1, monkeypatch, capsys, number, room, names
):
    """Trained to the end, each file is what it was, no temporary one stays; the error is the last word, not the first."""
    before, real, stages = content(after_phase_1), RunLog.log, []
    disk = Disk(monkeypatch, after_phase_1.checkpoint_dir, room, names)

    def log(self, stage, **values):
        if stage == "start":
            disk.number = number
        stages.append(stage)
        real(self, stage, **values)

    monkeypatch.setattr(RunLog, "log", log)
    with pytest.raises(UserError, match=f"the last checkpoint could not be written.*{os.strerror(number)}"):
        main(after_phase_1)
    out = capsys.readouterr().out
    assert f"warning: checkpoint not saved ({os.strerror(number)}); training goes on" in out
    assert "phase2" in stages and "val_ppl: " in out.split("\n---\n")[1]
    after = content(after_phase_1)
    assert after["model_latest.pt"] == before["model_latest.pt"] and disk.refused > 3
    assert all(data in before.values() for data in after.values()) and not temporary_files(after_phase_1)
    monkeypatch.undo()
    assert main(after_phase_1)["phase2_steps"] == 3


def test_a_disk_that_refuses_for_a_while_changes_nothing_but_the_saves(after_phase_1, monkeypatch, capsys):
    """Full at first, free again before the last save: no error, and the weights of an undisturbed run."""
    disturbed = dataclasses.replace(after_phase_1, checkpoint_dir=after_phase_1.checkpoint_dir + "_disturbed")
    main(after_phase_1)
    disk, real = Disk(monkeypatch, disturbed.checkpoint_dir, 4000, names=False), RunLog.log

    def log(self, stage, **values):
        disk.number = None if stage == "phase2" else errno.ENOSPC
        real(self, stage, **values)

    monkeypatch.setattr(RunLog, "log", log)
    main(disturbed)
    assert "warning: checkpoint not saved (No space left on device)" in capsys.readouterr().out
    assert same(weights(disturbed), weights(after_phase_1)) and not temporary_files(disturbed)


def test_the_command_ends_with_a_sentence_when_the_kernel_refuses_the_last_save(tiny_settings, after_phase_1):
    """A real limit on the size of files, no stand-in: exit status 2, one line, the old state byte for byte."""
    before = content(after_phase_1)
    limit = len(before["model_latest.pt"]) // 2
    settings = tiny_settings | {"phase2_epochs": 1, "save_every_n_batches": 10**6}
    done = subprocess.run(
        [sys.executable, "train.py", *as_flags(settings)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2 and "\n---\n" in done.stdout, done.stderr
    (line,) = done.stderr.splitlines()
    assert line == "error: the last checkpoint could not be written (File too large): free the disk and run again."
    assert content(after_phase_1)["model_latest.pt"] == before["model_latest.pt"]
    assert not temporary_files(after_phase_1)


def test_a_read_only_folder_is_refused_before_anything_is_trained(after_phase_1, monkeypatch):
    """One sentence that names the folder and the reason; every file is as it was. Root may write anywhere: no chmod here."""
    before, disk = content(after_phase_1), Disk(monkeypatch, after_phase_1.checkpoint_dir, 0)
    disk.number = errno.EROFS
    with pytest.raises(UserError, match=f"{after_phase_1.checkpoint_dir}.*Read-only file system") as caught:
        main(after_phase_1)
    assert "\n" not in str(caught.value)
    assert content(after_phase_1) == before and not temporary_files(after_phase_1)


def test_a_read_only_cache_costs_time_and_not_the_run(tiny_settings, monkeypatch, capsys):
    """The data is used although it cannot be kept, and a line says so."""
    Path(tiny_settings["cache_dir"]).mkdir()
    Disk(monkeypatch, tiny_settings["cache_dir"], 0).number = errno.EROFS
    main(ResidualConfig(**tiny_settings, phase="1"))
    assert "could not be written" in capsys.readouterr().out
    assert not os.listdir(tiny_settings["cache_dir"])


# Links


@pytest.mark.parametrize("name", ["cache_dir", "checkpoint_dir"])
def test_a_link_that_leads_to_no_folder_is_refused(tiny_settings, tmp_path, name):
    """To nothing, to a file, to itself, or a folder below one of these: a sentence that names it, and nothing is made."""
    (tmp_path / "file").write_text("keep me")
    links = {"dangling": tmp_path / "gone", "to_file": tmp_path / "file", "loop": tmp_path / "loop"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
        for path in (tmp_path / link, tmp_path / link / "below"):
            with pytest.raises(UserError, match=link) as caught:
                main(ResidualConfig(**tiny_settings | {name: str(path)}))
            assert "\n" not in str(caught.value) and (tmp_path / link).is_symlink()
    assert (tmp_path / "file").read_text() == "keep me" and not (tmp_path / "gone").exists()


def test_folders_below_a_linked_folder_are_used_through_the_link(tiny_settings, tmp_path):
    """`drive/checkpoints` where `drive` is a link: the files lie where it leads, and it stays a link."""
    (tmp_path / "mounted").mkdir()
    (tmp_path / "drive").symlink_to(tmp_path / "mounted")
    folders = {name: str(tmp_path / "drive" / name) for name in ("cache_dir", "checkpoint_dir")}
    main(ResidualConfig(**tiny_settings | folders, phase="1"))
    assert (tmp_path / "drive").is_symlink() and (tmp_path / "mounted/checkpoint_dir/model_latest.pt").exists()
    assert list((tmp_path / "mounted/cache_dir").glob("*.pt"))


def test_a_dangling_link_inside_the_checkpoint_folder_is_refused(tiny_settings):
    """Where the record of the run should go."""
    Path(tiny_settings["checkpoint_dir"]).mkdir()
    (Path(tiny_settings["checkpoint_dir"]) / "dialogues").symlink_to("gone")
    with pytest.raises(UserError, match="dialogues"):
        main(ResidualConfig(**tiny_settings))


def test_a_checkpoint_that_is_a_link_to_a_file_is_continued_and_its_target_unharmed(after_phase_1, tmp_path):
    """The state is read through the link; what is written takes the link's place, not the file elsewhere."""
    latest, elsewhere = Path(after_phase_1.checkpoint_dir) / "model_latest.pt", tmp_path / "elsewhere.pt"
    latest.rename(elsewhere)
    latest.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert main(after_phase_1)["phase1_steps"] == 9
    assert elsewhere.read_bytes() == before
    assert load_sealed(latest)["epoch"] == "phase2_complete"


def test_a_checkpoint_that_is_a_dangling_link_is_refused(after_phase_1):
    """The state lies elsewhere and is out of reach: no fresh start, and the link stays."""
    folder = Path(after_phase_1.checkpoint_dir)
    for path in folder.glob("model_*.pt"):
        path.unlink()
    (folder / "model_latest.pt").symlink_to("gone.pt")
    with pytest.raises(UserError, match=r"model_latest\.pt") as caught:
        main(after_phase_1)
    assert "\n" not in str(caught.value) and (folder / "model_latest.pt").is_symlink()


# Clocks


def test_files_with_shuffled_times_are_read_in_the_order_they_were_saved(tiny_settings):
    """As after a copy: with the latest damaged, the newest of the others by its stored number is continued, to the same bits."""
    whole = ResidualConfig(**tiny_settings)
    main(whole)
    config = dataclasses.replace(whole, checkpoint_dir=whole.checkpoint_dir + "_copied", phase="1")
    main(config)
    folder = Path(config.checkpoint_dir)
    (folder / "model_latest.pt").unlink()
    (folder / "model_latest.pt").write_bytes(b"damaged")
    numbers = {}
    for path in folder.glob("model_*.pt"):
        if path.name != "model_latest.pt" and "stage_state" in (found := load_sealed(path)):
            numbers[path] = found["save_number"]
    ages = sorted(numbers, key=numbers.get)  # the older the state, the younger the file
    for age, path in enumerate(ages):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (10**9 - 1000 * age,) * 2)
    main(dataclasses.replace(config, phase="both"))
    assert same(weights(config), weights(whole))


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_clock_that_was_set_changes_no_result(after_phase_1, tiny_settings, monkeypatch, hours):
    """Two days back or forth between the sessions: the run goes on, and its seconds stay sensible."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    summary = main(after_phase_1)
    assert 0 < summary["seconds"] < 600
    monkeypatch.setattr(time, "time", real)
    alone = dataclasses.replace(after_phase_1, checkpoint_dir=after_phase_1.checkpoint_dir + "_alone")
    assert main(alone)["val_loss"] == summary["val_loss"]


# Files that do harm


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "bare"])
def test_evil_pickles_in_place_of_every_state_are_never_executed(after_phase_1, tmp_path, sealed):
    """With the right checksum or without: refused, kept, nothing done; in the latest alone the state before it is used."""
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        path.unlink()
        write_evil(path, tmp_path / "harm", sealed)
    before = content(after_phase_1)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        main(after_phase_1)
    assert content(after_phase_1) == before and not (tmp_path / "harm").exists()


def test_an_evil_pickle_in_the_latest_alone_is_set_aside(after_phase_1, tmp_path, capsys):
    """The run goes on from the state before, and the file is kept as .corrupt."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    latest.unlink()
    write_evil(latest, tmp_path / "harm")
    evil = latest.read_bytes()
    assert main(after_phase_1)["phase1_steps"] == 9
    assert "kept as model_latest.pt.corrupt" in capsys.readouterr().out
    assert latest.with_name("model_latest.pt.corrupt").read_bytes() == evil and not (tmp_path / "harm").exists()


def test_an_evil_pickle_in_the_cache_is_never_executed(after_phase_1, tmp_path, capsys):
    """The data is built again, and is the same, or the checkpoint would be refused."""
    (path,) = Path(after_phase_1.cache_dir).glob("*.pt")
    write_evil(path, tmp_path / "harm")
    main(after_phase_1)
    assert "has been rebuilt" in capsys.readouterr().out and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("harm", ["evil", "damaged", "missing"])
def test_best_weights_that_cannot_be_trusted_stop_the_run_with_a_sentence(tiny_settings, tmp_path, monkeypatch, harm):
    """A run cut off in Phase 2 needs its model_best.pt: an evil one is not executed, none is replaced by something else."""

    class Cut(Exception):
        pass

    def cut(self, stage, **values):
        if stage == "phase2" and values["epoch"] == 2:
            raise Cut

    config, real = ResidualConfig(**tiny_settings), RunLog.log
    monkeypatch.setattr(RunLog, "log", cut)
    with pytest.raises(Cut):
        main(config)
    monkeypatch.setattr(RunLog, "log", real)
    best, latest = (Path(config.checkpoint_dir) / name for name in ("model_best.pt", "model_latest.pt"))
    before = latest.read_bytes()
    data = bytearray(best.read_bytes())
    best.unlink()
    if harm == "evil":
        write_evil(best, tmp_path / "harm")
    elif harm == "damaged":
        data[random.Random(0).randrange(len(data))] ^= 1
        best.write_bytes(data)
    with pytest.raises(UserError, match=r"best weights.*model_best\.pt") as caught:
        main(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists() and latest.read_bytes() == before


# Checkpoints of something else


def test_a_checkpoint_with_tensors_of_another_shape_is_refused(after_phase_1):
    """The settings agree and the weights do not, as with a file from another version: the sentence names the tensor."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    state = load_sealed(latest)
    name, tensor = next((n, t) for n, t in state["model_state_dict"].items() if t.dim() == 2)
    state["model_state_dict"][name] = torch.cat([tensor, tensor])
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        path.unlink()
    save_sealed(state, latest)
    before = latest.read_bytes()
    with pytest.raises(UserError, match=name) as caught:
        main(after_phase_1)
    assert "\n" not in str(caught.value) and latest.read_bytes() == before


def test_a_refused_checkpoint_is_one_line_and_exit_status_2(tiny_settings, after_phase_1):
    """As a command: another vocabulary names both sizes, and the files are as they were."""
    before = content(after_phase_1)
    settings = tiny_settings | {"phase2_epochs": 1, "save_every_n_batches": 10**6, "vocab_size": 280}
    done = subprocess.run(
        [sys.executable, "train.py", *as_flags(settings)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "vocab_size 300 -> 280" in line
    assert content(after_phase_1) == before


def test_batches_of_one_sample_work(tiny_settings):
    """The smallest batch there is, in both phases, as a command."""
    settings = tiny_settings | {"phase1_batch_size": 1, "phase2_batch_size": 1}
    done = subprocess.run(
        [sys.executable, "train.py", *as_flags(settings)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    block = dict(line.split(": ", 1) for line in done.stdout.split("\n---\n")[1].splitlines())
    assert (block["phase1_steps"], block["phase2_steps"]) == ("36", "36")

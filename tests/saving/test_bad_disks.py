"""What a run makes of disks that are full, read-only or failing."""

import builtins
import dataclasses
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import as_flags
from left_behind import SHORT, Watched, content, same_weights, temporary_files

from newllm.errors import UserError
from newllm.report.record import RunLog
from train import main

ROOT = Path(__file__).parents[2]


class Disk:
    """While `number` is set, `folder` refuses with it: files beyond `room` bytes, other names if `names`."""

    def __init__(self, monkeypatch, folder, room, names=True):
        self.folder, self.room, self.names = Path(folder).resolve(), room, names
        self.number, self.refused = None, 0
        self.open = builtins.open
        monkeypatch.setattr(builtins, "open", self._open)
        for name in ("replace", "link"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))

    def refuse(self, path):
        self.refused += 1
        raise OSError(self.number, os.strerror(self.number), str(path))

    def _meant(self, path):
        named = isinstance(path, str | os.PathLike)
        return self.number and named and self.folder in Path(path).absolute().parents

    def _open(self, path, mode="r", *args, **kwargs):
        if not self._meant(path) or mode == "rb" or not set(mode) & set("wax+"):
            return self.open(path, mode, *args, **kwargs)
        if not self.room:
            self.refuse(path)
        left = [self.room]

        def before(data):
            left[0] -= len(data)
            if left[0] < 0:
                self.refuse(path)

        return Watched(self.open(path, mode, *args, **kwargs), before)

    def _naming(self, real):
        def name(source, target, **kwargs):
            if self.names and self._meant(target):
                self.refuse(target)
            return real(source, target, **kwargs)

        return name


def refuse_until(monkeypatch, disk, number, until=None):
    """The disk refuses from the first row of the record on, but no more from that of a stage on."""
    real, stages = RunLog.log, []

    def log(self, stage, **values):
        stages.append(stage)
        disk.number = None if until in stages else number
        real(self, stage, **values)

    monkeypatch.setattr(RunLog, "log", log)
    return stages


@pytest.mark.parametrize(
    ("number", "room", "names"),
    [(errno.ENOSPC, 4000, False), (errno.EROFS, 0, True), (errno.EIO, 10**9, True)],
    ids=["full", "read-only", "failing"],
)
def test_a_disk_that_refuses_every_save_leaves_the_old_files_and_the_run_goes_on(
    after_phase_1, monkeypatch, capsys, number, room, names
):
    """Trained to the end, each file is what it was, no temporary one stays; the error is the last word."""
    before = content(after_phase_1)
    disk = Disk(monkeypatch, after_phase_1.checkpoint_dir, room, names)
    stages = refuse_until(monkeypatch, disk, number)
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
    disk = Disk(monkeypatch, disturbed.checkpoint_dir, 4000, names=False)
    refuse_until(monkeypatch, disk, errno.ENOSPC, "phase2")
    main(disturbed)
    assert "warning: checkpoint not saved (No space left on device)" in capsys.readouterr().out
    assert same_weights(disturbed, after_phase_1) and not temporary_files(disturbed)


def test_the_command_ends_with_a_sentence_when_the_kernel_refuses_the_last_save(tiny_settings, after_phase_1):
    """A real limit on the size of files: exit status 2, one line, the old state byte for byte."""
    before = content(after_phase_1)
    limit = len(before["model_latest.pt"]) // 2
    done = subprocess.run(
        [sys.executable, "train.py", *as_flags(tiny_settings | SHORT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and "\n---\n" in done.stdout, done.stderr
    sentence = "the last checkpoint could not be written (File too large): free the disk and run again."
    assert done.stderr == f"error: {sentence}\n"
    assert content(after_phase_1)["model_latest.pt"] == before["model_latest.pt"]
    assert not temporary_files(after_phase_1)


def test_a_read_only_folder_is_refused_before_anything_is_trained(after_phase_1, monkeypatch):
    """One sentence with folder and reason; every file is as it was. Root may write anywhere: no chmod."""
    before, disk = content(after_phase_1), Disk(monkeypatch, after_phase_1.checkpoint_dir, 0)
    disk.number = errno.EROFS
    with pytest.raises(UserError, match=f"{after_phase_1.checkpoint_dir}.*Read-only file system") as caught:
        main(after_phase_1)
    assert "\n" not in str(caught.value)
    assert content(after_phase_1) == before and not temporary_files(after_phase_1)

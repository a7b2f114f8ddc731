"""What a run makes of disks that are full, read-only or failing."""

import dataclasses
import errno
import os
import resource

import pytest
from left_behind import Faults, content, refuse, same_weights, temporary_files

from newllm.errors import UserError, exit_on_user_error
from newllm.report.record import RunLog
from train import main


class Disk:
    """While `number` is set, a folder refuses with it: files beyond `room` bytes, and names if `names`."""

    def __init__(self, monkeypatch, folder, room, names=True):
        self.room, self.names, self.left = room, names, {}
        self.number, self.refused = None, 0
        Faults(folder, monkeypatch).before = self.before

    def before(self, operation, path, size):
        if operation.startswith("open"):
            self.left[path] = self.room
        full = operation == "write" and self.left[path] < size
        self.left[path] = self.left.get(path, 0) - size
        closed = operation.startswith("open") and operation != "open rb" and not self.room
        if self.number and (full or closed or (operation == "name" and self.names)):
            self.refused += 1
            refuse(self.number, path)


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


def test_the_command_ends_with_a_sentence_when_the_kernel_refuses_the_last_save(after_phase_1, capsys):
    """A real limit on the size of files: exit status 2, one line, the old state byte for byte."""
    before = content(after_phase_1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model_latest.pt"]) // 2, hard))
    try:
        with pytest.raises(SystemExit) as end, exit_on_user_error():
            main(after_phase_1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence = "the last checkpoint could not be written (File too large): free the disk and run again."
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {sentence}\n"
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

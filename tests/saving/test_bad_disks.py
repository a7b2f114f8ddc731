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


def refuse_in_training(monkeypatch, config, operation, number, until=None):
    """The disk refuses an operation from the first row of the record on, but no more from a stage's on."""
    stages, real = [], RunLog.log

    def before(now, path, size):
        if stages and until not in stages and now.startswith(operation) and now != "open rb":
            refuse(number, path)

    def log(self, stage, **values):
        stages.append(stage)
        real(self, stage, **values)

    Faults(config.checkpoint_dir, monkeypatch).before = before
    monkeypatch.setattr(RunLog, "log", log)
    return stages


@pytest.mark.parametrize(
    ("operation", "number"), [("write", errno.ENOSPC), ("open", errno.EROFS), ("name", errno.EIO)]
)
def test_a_disk_that_refuses_every_save_leaves_the_old_files_and_the_run_goes_on(
    after_phase_1, monkeypatch, capsys, operation, number
):
    """Trained to the end, each file is what it was, no temporary one stays; the error is the last word."""
    before = content(after_phase_1)
    stages = refuse_in_training(monkeypatch, after_phase_1, operation, number)
    with pytest.raises(UserError, match=f"the last checkpoint could not be written.*{os.strerror(number)}"):
        main(after_phase_1)
    out = capsys.readouterr().out
    assert f"warning: checkpoint not saved ({os.strerror(number)}); training goes on" in out
    assert "phase2" in stages and "val_ppl: " in out.split("\n---\n")[1]
    after = content(after_phase_1)
    assert after["model_latest.pt"] == before["model_latest.pt"]
    assert all(data in before.values() for data in after.values()) and not temporary_files(after_phase_1)
    monkeypatch.undo()
    assert main(after_phase_1)["phase2_steps"] == 3


def test_a_disk_that_refuses_for_a_while_changes_nothing_but_the_saves(after_phase_1, monkeypatch, capsys):
    """Full at first, free again before the last save: no error, and the weights of an undisturbed run."""
    disturbed = dataclasses.replace(after_phase_1, checkpoint_dir=after_phase_1.checkpoint_dir + "_disturbed")
    main(after_phase_1)
    refuse_in_training(monkeypatch, disturbed, "write", errno.ENOSPC, until="phase2")
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
    before, faults = content(after_phase_1), Faults(after_phase_1.checkpoint_dir, monkeypatch)
    faults.before = lambda operation, path, _: operation == "open rb" or refuse(errno.EROFS, path)
    with pytest.raises(UserError, match=f"{after_phase_1.checkpoint_dir}.*Read-only file system") as caught:
        main(after_phase_1)
    assert "\n" not in str(caught.value)
    assert content(after_phase_1) == before and not temporary_files(after_phase_1)

"""Two processes and one folder, a machine that dies, and the second copies that bring a run back."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import as_flags, stop_after
from left_behind import same_weights

from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import find_records, read_record, read_rows
from newllm.saving import backup
from newllm.saving.checkpoint import Checkpointer
from newllm.saving.guard import LockLost
from train import main

ROOT = Path(__file__).parents[2]


def start_and_wait_for_a_checkpoint(settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "train.py", *as_flags(settings)]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    latest = Path(settings["checkpoint_dir"]) / "model_latest.pt"
    deadline = time.monotonic() + 60
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_a_second_process_is_refused_and_takes_over_when_the_first_is_killed(tiny_settings):
    """While one is in the middle of training, another is refused; after kill -9 it continues exactly."""
    config = ResidualConfig(**tiny_settings)
    process = start_and_wait_for_a_checkpoint(tiny_settings)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=str(process.pid)):
        main(config)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    main(config)
    alone = dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_alone")
    main(alone)
    assert same_weights(config, alone)


def test_a_run_comes_back_from_its_mirror_when_the_machine_is_gone(tiny_settings, tmp_path):
    """Local files lost after Phase 1: the mirror's state is fetched, and continued to the same bits."""
    config = ResidualConfig(**tiny_settings, backup_dir=str(tmp_path / "drive"), backup_every_minutes=0.0)
    main(dataclasses.replace(config, phase="1"))
    shutil.rmtree(config.checkpoint_dir)
    main(config)
    alone = ResidualConfig(**tiny_settings | {"checkpoint_dir": tiny_settings["checkpoint_dir"] + "_alone"})
    main(alone)
    assert same_weights(config, alone)
    assert (tmp_path / "drive" / "model_best.pt").read_bytes() == (
        Path(config.checkpoint_dir) / "model_best.pt"
    ).read_bytes()


def test_the_record_comes_back_with_the_weights(tiny_settings, tmp_path, capsys):
    """Lost twice with its machine, the record has every epoch, warning and session; the arrays are whole."""
    own = tiny_settings | dict(phase2_epochs=5, patience=5, artifacts=True)
    config = ResidualConfig(**own, backup_dir=str(tmp_path / "drive"), backup_every_minutes=0.0)
    for batches in (9 + 4, 5 + 9 + 7):  # in Phase 1, and in the third epoch of Phase 2
        stop_after(config, batches)
        shutil.rmtree(config.checkpoint_dir)
    capsys.readouterr()
    main(config)
    assert "rows: they are back, from the checkpoint" in capsys.readouterr().out
    alone = ResidualConfig(**own | {"checkpoint_dir": own["checkpoint_dir"] + "_alone"})
    main(alone)
    (path,), (other,) = find_records(config.checkpoint_dir), find_records(alone.checkpoint_dir)
    found, whole = read_record(path), read_record(other)
    assert (found.sessions, whole.sessions) == (3, 1)
    for stage in ("untrained", "phase1", "phase2"):
        columns, expected = getattr(found, stage), getattr(whole, stage)
        assert columns.keys() == expected.keys()
        for name, values in expected.items():
            assert len(columns[name]) == len(values) and None not in columns[name]
            if not name.startswith(("time", "seconds", "tok_per_s", "memory")):
                assert columns[name] == values, name
    (losses,) = path.parent.glob("train_losses_*.npy")
    assert np.load(losses).tolist() == whole.phase2["train_loss"]
    times = [row["time"] for row in read_rows(path)]
    assert found.start["time"] == min(times)


def test_a_gap_that_a_full_disk_left_is_closed(tiny_settings):
    """What the record lacks in its middle comes back at the next start; what it has is not written again."""
    config = ResidualConfig(**tiny_settings)
    stop_after(config, 9 + 9 + 2)
    (path,) = find_records(config.checkpoint_dir)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2] + lines[5:]) + "\n")
    main(config)
    after = path.read_text().splitlines()
    assert set(after) >= set(lines) and len(after) == len(set(after))
    assert len(read_record(path).phase1["cvfp"]) == 3


def test_a_mirror_older_than_the_local_state_is_left_alone(tiny_settings, tmp_path):
    """The newest valid state wins, wherever it lies."""
    config = ResidualConfig(
        **tiny_settings, phase="1", backup_dir=str(tmp_path / "drive"), backup_every_minutes=0.0
    )
    main(config)
    first = main(dataclasses.replace(config, phase="both", backup_dir=""))
    again = main(dataclasses.replace(config, phase="both"))
    assert again["val_loss"] == first["val_loss"]


def test_a_mirror_that_fails_does_not_stop_training_and_is_reported(
    tiny_settings, tmp_path, monkeypatch, capsys
):
    """Every copy fails: the run ends as ever, a line says so when it begins, and the last one."""

    def broken(*_):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(backup, "copy_verified", broken)
    config = ResidualConfig(**tiny_settings, phase="1", backup_dir=str(tmp_path / "drive"))
    assert main(config)["phase1_steps"] == 9
    out = capsys.readouterr().out
    assert out.count("warning: no second copy in") == 1 and "mirror FAILED: [Errno 107]" in out


def test_a_run_whose_folder_another_machine_took_stops_and_spares_the_second_copies(tiny_settings, tmp_path):
    """The token in the manifest changes while it trains: a sentence; neither folder is written any more."""
    config = ResidualConfig(**tiny_settings, backup_dir=str(tmp_path / "drive"), backup_every_minutes=0.0)
    folder, real, before = Path(config.checkpoint_dir), Checkpointer.due, {}

    def due(self, steps):
        if self.stage == "phase1" and not before:
            self.wait()
            manifest = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps(manifest | {"writer": "process 7 on elsewhere"}))
            before.update({path: path.read_bytes() for path in folder.glob("m*.*")})
        return real(self, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "due", due)
        with pytest.raises(LockLost, match=f"process 7 on elsewhere has taken over {folder} from this run"):
            main(config)
    assert {path: path.read_bytes() for path in folder.glob("m*.*")} == before
    manifest = json.loads((tmp_path / "drive" / "manifest.json").read_text())
    assert manifest["save_number"] <= json.loads((folder / "manifest.json").read_text())["save_number"]
    main(config)  # who starts last goes on

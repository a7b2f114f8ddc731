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
from helpers import ROOT, as_flags, stop_after
from left_behind import same_weights

from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import find_records, read_record, read_rows
from newllm.saving import backup
from newllm.saving.checkpoint import Checkpointer
from newllm.saving.files import write_text
from newllm.saving.guard import LockLost
from train import main


@pytest.fixture
def config(tiny_settings, tmp_path):
    """A run with second copies in `drive`."""
    copies = dict(backup_dir=str(tmp_path / "drive"), backup_every_minutes=0.0)
    return ResidualConfig(**tiny_settings, **copies, untrained_control=False)


def alone(config, **changes):
    """The same run without second copies in a folder of its own, complete."""
    folder = config.checkpoint_dir + "_alone"
    other = dataclasses.replace(config, checkpoint_dir=folder, backup_dir="", **changes)
    main(other)
    return other


def test_a_second_process_is_refused_and_takes_over_when_the_first_is_killed(config, tiny_settings):
    """While one is in the middle of training, another is refused; after kill -9 it continues exactly."""
    settings = tiny_settings | dict(untrained_control=False)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "train.py", *as_flags(settings)]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (Path(config.checkpoint_dir) / "model_latest.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=str(process.pid)):
        main(config)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    main(config)
    assert same_weights(config, alone(config))


def test_a_run_comes_back_from_its_mirror_when_the_machine_is_gone(config, tmp_path):
    """Local files lost after Phase 1: the mirror's state is fetched, and continued to the same bits."""
    main(dataclasses.replace(config, phase="1"))
    shutil.rmtree(config.checkpoint_dir)
    main(config)
    assert same_weights(config, alone(config))
    best = Path(config.checkpoint_dir) / "model_best.pt"
    assert (tmp_path / "drive" / "model_best.pt").read_bytes() == best.read_bytes()


def test_the_record_comes_back_with_the_weights(config, capsys):
    """Lost twice with its machine, then cut by a full disk: every epoch once; the arrays are whole."""
    config = dataclasses.replace(config, phase2_epochs=5, patience=5, artifacts=True)
    for batches in (4, 5 + 7):  # in Phase 1, and in the third epoch of Phase 2
        stop_after(config, batches)
        shutil.rmtree(config.checkpoint_dir)
    stop_after(config, 2)
    (path,) = find_records(config.checkpoint_dir)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2] + lines[5:]) + "\n")
    capsys.readouterr()
    main(config)
    assert "rows that it lacked, from a checkpoint" in capsys.readouterr().out
    after = path.read_text().splitlines()
    assert set(after) >= set(lines) and len(after) == len(set(after))
    (other,) = find_records(alone(config).checkpoint_dir)
    found, whole = read_record(path), read_record(other)
    assert (found.sessions, whole.sessions) == (4, 1)
    for stage in ("phase1", "phase2"):
        columns, expected = getattr(found, stage), getattr(whole, stage)
        assert columns.keys() == expected.keys()
        for name, values in expected.items():
            assert len(columns[name]) == len(values) and None not in columns[name]
            if not name.startswith(("time", "seconds", "tok_per_s", "memory")):
                assert columns[name] == values, name
    (losses,) = path.parent.glob("train_losses_*.npy")
    assert np.load(losses).tolist() == whole.phase2["train_loss"]
    assert found.start["time"] == min(row["time"] for row in read_rows(path))


def test_a_mirror_older_than_the_local_state_is_left_alone(config):
    """The newest valid state wins, wherever it lies."""
    main(dataclasses.replace(config, phase="1"))
    first = main(dataclasses.replace(config, backup_dir=""))
    assert main(config)["val_loss"] == first["val_loss"]


def test_a_mirror_that_fails_does_not_stop_training_and_is_reported(config, monkeypatch, capsys):
    """Every copy fails: the run ends as ever, a line says so when it begins, and the last one."""

    def broken(*_):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(backup, "copy_verified", broken)
    monkeypatch.setattr(backup, "PAUSE", 0.0)
    assert main(dataclasses.replace(config, phase="1"))["phase1_steps"] == 9
    out = capsys.readouterr().out
    assert out.count("warning: no second copy in") == 1 and "mirror FAILED: [Errno 107]" in out


def test_a_run_whose_folder_another_machine_took_stops_and_spares_the_second_copies(config, tmp_path):
    """The token in the manifest changes while it trains: a sentence; neither folder is written any more."""
    folder, real, before = Path(config.checkpoint_dir), Checkpointer.due, {}

    def due(self, steps):
        if self.stage == "phase1" and not before:
            self.wait()
            manifest = json.loads((folder / "manifest.json").read_text())
            taken = json.dumps(manifest | {"writer": "process 7 on elsewhere"})
            write_text(folder / "manifest.json", taken)  # whole at each moment: a copy of it is under way
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

"""Two processes and one folder, a machine that dies, and the second copies that bring a run back."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import as_flags, stop_after

from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import find_records, read_record, read_rows
from train import main

ROOT = Path(__file__).parent.parent


def weights(folder):
    return torch.load(Path(folder) / "model_latest.pt")["model_state_dict"]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


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
    """While one trains, another stops with a sentence; after kill -9 it continues, to the same end."""
    settings = tiny_settings | dict(phase1_max_iterations=150, phase1_convergence_threshold=1e-12)
    config = ResidualConfig(**settings)
    process = start_and_wait_for_a_checkpoint(settings)
    with pytest.raises(UserError, match=str(process.pid)):
        main(config)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    main(config)
    alone = dataclasses.replace(config, checkpoint_dir=settings["checkpoint_dir"] + "_alone")
    main(alone)
    assert same(weights(config.checkpoint_dir), weights(alone.checkpoint_dir))


def test_a_run_comes_back_from_its_mirror_when_the_machine_is_gone(tiny_settings, tmp_path):
    """Local files lost after Phase 1: the mirror's state is fetched, verified, and continued to the same bits."""
    config = ResidualConfig(**tiny_settings, backup_dir=str(tmp_path / "drive"), backup_every_minutes=0.0)
    main(dataclasses.replace(config, phase="1"))
    shutil.rmtree(config.checkpoint_dir)
    main(config)
    alone = ResidualConfig(**tiny_settings | {"checkpoint_dir": tiny_settings["checkpoint_dir"] + "_alone"})
    main(alone)
    assert same(weights(config.checkpoint_dir), weights(alone.checkpoint_dir))
    assert (tmp_path / "drive" / "model_best.pt").read_bytes() == (
        Path(config.checkpoint_dir) / "model_best.pt"
    ).read_bytes()


def test_the_record_comes_back_with_the_weights(tiny_settings, tmp_path, capsys):
    """Lost twice with its machine, the record has every epoch of every stage, its warnings and sessions; the arrays are whole."""
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
    """Every copy fails: the run ends as ever, and its last line says so."""
    from newllm.saving import backup as mirror

    def broken(*_):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(mirror, "copy_verified", broken)
    monkeypatch.setattr(
        mirror.Mirror.__init__, "__defaults__", (600, 2, 0.0, 600, time.monotonic, time.sleep)
    )
    config = ResidualConfig(**tiny_settings, phase="1", backup_dir=str(tmp_path / "drive"))
    assert main(config)["phase1_steps"] == 9
    assert "mirror FAILED: " in capsys.readouterr().out

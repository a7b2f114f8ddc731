"""The epoch loop: its state in checkpoints, what it says within an epoch, and whom it needs."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import stop_after

import train
from config import ResidualConfig
from newllm.data.samples import load_data
from newllm.models.baselines import build_model
from newllm.phases.phase2 import Phase2
from newllm.report import record as status_file
from newllm.report.record import find_records, read_rows
from newllm.saving.checkpoint import place
from newllm.saving.files import load_sealed
from newllm.training import loop
from newllm.training.loop import EpochLoop, State
from newllm.training.runtime import open_runtime
from scripts import status


@pytest.fixture
def config(tiny_settings):
    return ResidualConfig(**tiny_settings, untrained_control=False)


def state_of(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")


def quick_rows(config):
    (path,) = find_records(config.checkpoint_dir)
    return [row for row in read_rows(path) if row["stage"] == "phase2_quick"]


def test_what_a_run_says_within_an_epoch(config, capsys, monkeypatch):
    """First loss, quick checks, the place where a restart goes on: the same after one, to the bit."""
    without = dataclasses.replace(
        config, val_quick_every_n_batches=0, checkpoint_dir=config.checkpoint_dir + "_without"
    )
    expected = train.main(without)
    assert not quick_rows(without)
    monkeypatch.setattr(status_file, "SECONDS_BETWEEN_WRITES", 0.0)
    capsys.readouterr()
    stop_after(config, 9 + 4)
    saved, out = state_of(config), capsys.readouterr().out
    where = "in Phase 2, epoch 2, batch 2 of 3 (sample 4 of 12), step 13"
    status.main(["--json", "--checkpoint_dir", config.checkpoint_dir])
    fields = json.loads(capsys.readouterr().out)
    places = {"stage": "phase2", "step": 13, "epoch": 2, "batch": 1, "sample": 4, "restart": where}
    assert fields.items() >= places.items() and saved["restart"] == where

    summary = train.main(config)
    out += capsys.readouterr().out
    assert f"{where} (save " in out
    rows, subset = quick_rows(config), saved["stage_state"]["quick_subset"]
    assert [row["steps"] for row in rows] == [2, 5, 8] and {row["samples"] for row in rows} == {1}
    assert {row["subset"] for row in rows} == {subset} and len(subset) == 12
    assert rows[0]["seconds_full"] is None and all(row["seconds_full"] > 0 for row in rows[1:])
    assert out.count(f"quick validation (1/6 samples, subset {subset}") == 3
    assert "the full one ends the epoch" in out
    first, size = saved["stage_state"]["first_loss"], load_data(config).vocab_size
    assert summary["phase2_first_loss"] == first == expected["phase2_first_loss"]
    assert summary["phase2_uniform_loss"] == math.log(size)
    assert summary["val_loss"] < first < 1.1 * math.log(size)
    end, weights = state_of(config), state_of(without)["model_state_dict"]
    assert end["results"]["phase2"]["head"]["quick_subset"] == subset
    assert all(torch.equal(weights[name], tensor) for name, tensor in end["model_state_dict"].items())


@pytest.mark.parametrize(
    "stage, position, words",
    [
        ("untrained", None, "at the beginning of the untrained row, step 7"),
        ("phase1", (2, 3, 4, 12), "in Phase 1, iteration 3, batch 2 of 3 (sample 4 of 12), step 7"),
        ("phase2", (2, 3, 12, 12), "in Phase 2, epoch 3, its validation, step 7"),
        ("phase2", (3, 3, 0, 12), "in Phase 2, after epoch 3, step 7"),
        ("complete", None, "at its end, step 7"),
    ],
)
def test_a_place_in_words(stage, position, words):
    """Between stages, within an epoch, in its validation, behind the last one, and at the end."""
    if position:
        epoch, epochs, done, count = position
        position = State(epoch=epoch, samples=done).position(epochs, count, batches=3)
    assert place({"stage": stage, "position": position, "step": 7}) == words


def test_a_phase_trains_without_record_and_disk(config, tmp_path, capsys):
    """The loop alone gives the run's losses, prints and writes nothing, and tells who watches."""
    config = dataclasses.replace(config, phase1_max_iterations=0)
    train.main(config)
    history = state_of(config)["phase2_history"]
    capsys.readouterr()
    data, runtime, seen = load_data(config), open_runtime(config), []
    model = build_model(config, data.vocab_size)
    model.start_at_frequencies(data.train[:, 1:])
    phase = Phase2(model, data, config, runtime, tmp_path / "nowhere", "phase2", False)
    epochs = EpochLoop(phase, config, runtime, watch=lambda *place: seen.append(place))
    results = epochs.run()
    assert epochs.history == history and results["loss"] == min(history["val_loss"])
    assert seen == [(step // 3, (step + 1) * 4 * config.max_seq_length) for step in range(9)]
    assert capsys.readouterr().out == "" and not (tmp_path / "nowhere").exists()


def test_validation_takes_the_room_of_a_step_not_more_beside_it(config, monkeypatch):
    """What a step has freed is given back before each whole validation."""
    events, validate = [], Phase2.validate

    def validating(phase, samples):
        events.append("validation")
        return validate(phase, samples)

    monkeypatch.setattr(Phase2, "validate", validating)
    monkeypatch.setattr(loop, "trim", lambda: events.append("trim"))
    train.main(dataclasses.replace(config, val_quick_every_n_batches=0))
    assert events == ["trim", "validation"] * config.phase2_epochs


def test_step_files_are_named_after_the_step_of_the_run(tiny_settings):
    """Every n-th step over all stages, whatever else is saved; two stages do not share a name."""
    config = ResidualConfig(**tiny_settings | dict(save_every_n_batches=4), keep_last=100)
    train.main(config)
    paths = Path(config.checkpoint_dir).glob("model_step_*.pt")
    files = {int(path.stem[-8:]): load_sealed(path) for path in paths}
    assert all(found["step"] == number for number, found in files.items())
    assert set(files) >= {4, 8, 12, 16, 20, 24, 27} and files[27]["epoch"] == "phase2_complete"
    assert [files[step]["stage"] for step in (4, 12, 20)] == ["untrained", "phase1", "phase2"]
    assert json.loads((Path(config.checkpoint_dir) / "manifest.json").read_text())["step"] == 27

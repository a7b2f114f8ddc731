"""What a run says of itself before its first epoch is over: the first loss, quick validations, the step and the restart."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import stop_after

import train
from config import ResidualConfig
from newllm.data.order import quick_subset
from newllm.data.samples import load_data
from newllm.report import record
from newllm.report.record import find_records, read_rows
from newllm.saving.checkpoint import place
from newllm.saving.files import load_sealed
from scripts import status


@pytest.fixture
def config(tiny_settings):
    return ResidualConfig(**tiny_settings, untrained_control=False)


def state_of(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")


def rows_of(config, stage):
    (path,) = find_records(config.checkpoint_dir)
    return [row for row in read_rows(path) if row["stage"] == stage]


def test_quick_validation_happens_at_small_budgets_and_changes_no_bit(config, capsys):
    """Half-way through each epoch, on the same samples before and after a restart, beside the time that all samples took."""
    without = dataclasses.replace(
        config, val_quick_every_n_batches=0, checkpoint_dir=config.checkpoint_dir + "_without"
    )
    train.main(without)
    assert not rows_of(without, "phase2_quick")
    stop_after(config, 9 + 4)
    subset = state_of(config)["stage_state"]["quick_subset"]
    train.main(config)
    rows = rows_of(config, "phase2_quick")
    assert [row["steps"] for row in rows] == [2, 5, 8] and {row["samples"] for row in rows} == {1}
    assert {row["subset"] for row in rows} == {subset} and len(subset) == 12
    assert rows[0]["seconds_full"] is None and all(row["seconds_full"] > 0 for row in rows[1:])
    out = capsys.readouterr().out
    assert (
        out.count("quick validation (1/6 samples, subset " + subset) == 3
        and "the full one ends the epoch" in out
    )
    state = state_of(config)
    assert state["results"]["phase2"]["head"]["quick_subset"] == subset
    weights = state_of(without)["model_state_dict"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in state["model_state_dict"].items())


def test_another_subset_has_another_digest(config):
    """The digest is of the samples' numbers; one more or other ones show."""
    from newllm.data.order import order_digest

    found = {
        order_digest("", quick_subset(50, share, seed))[:12] for share, seed in ((0.1, 1), (0.1, 2), (0.2, 1))
    }
    assert len(found) == 3


def test_the_loss_of_the_first_batch_is_kept(config, capsys):
    """Once a run, also over a restart: in the results and the summary, with ln V beside it."""
    stop_after(config, 9 + 1)
    first = state_of(config)["stage_state"]["first_loss"]
    summary = train.main(config)
    vocab_size = load_data(config).vocab_size
    assert summary["phase2_first_loss"] == first and summary["phase2_uniform_loss"] == math.log(vocab_size)
    assert summary["val_loss"] < first < 1.1 * math.log(vocab_size)
    assert capsys.readouterr().out.count(f"phase2 | loss of the first batch {first:.4f}") == 1


def test_the_status_has_the_step_of_the_run_and_where_a_restart_goes_on(config, capsys, monkeypatch):
    """Phase, epoch, batch, sample and step in one line, the same that the next session prints."""
    monkeypatch.setattr(record, "SECONDS_BETWEEN_WRITES", 0.0)
    stop_after(config, 9 + 4)
    capsys.readouterr()
    status.main(["--json", "--checkpoint_dir", config.checkpoint_dir])
    fields = json.loads(capsys.readouterr().out)
    assert (fields["stage"], fields["step"], fields["epoch"], fields["batch"], fields["sample"]) == (
        "phase2",
        13,
        2,
        1,
        4,
    )
    assert (
        fields["restart"]
        == state_of(config)["restart"]
        == "in Phase 2, epoch 2, batch 2 of 3 (sample 4 of 12), step 13"
    )
    train.main(config)
    assert "in Phase 2, epoch 2, batch 2 of 3 (sample 4 of 12), step 13 (save " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "position", "words"),
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
    from newllm.saving.checkpoint import position_of

    assert place({"stage": stage, "position": position and position_of(*position, 3), "step": 7}) == words


def test_step_files_are_named_after_the_step_of_the_run(tiny_settings):
    """Every n-th step over all stages, whatever else is saved; two stages do not share a name."""
    config = ResidualConfig(**tiny_settings | dict(save_every_n_batches=4), keep_last=100)
    train.main(config)
    files = {
        int(path.stem[-8:]): load_sealed(path) for path in Path(config.checkpoint_dir).glob("model_step_*.pt")
    }
    assert all(found["step"] == number for number, found in files.items())
    assert set(files) >= {4, 8, 12, 16, 20, 24, 27} and files[27]["epoch"] == "phase2_complete"
    assert [files[step]["stage"] for step in (4, 12, 20)] == ["untrained", "phase1", "phase2"]
    assert json.loads((Path(config.checkpoint_dir) / "manifest.json").read_text())["step"] == 27

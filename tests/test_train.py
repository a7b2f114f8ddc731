"""train.py as a user runs it, and what a run leaves behind."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import run

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.phases import phase1
from newllm.report.record import read_rows

KEYS = {
    "phase1_steps", "phase1_param_change", "phase1_iterations", "converged_ratio", "er_train", "er_val",
    "er_val_untrained", "er_ceiling", "cold_start_error_10", "contraction", "lyapunov_exponent",
    "sweeps_to_1_percent", "memory_horizon", "val_loss", "val_ppl", "val_bpb", "val_acc",
    "val_ppl_untrained_context", "val_ppl_bigram", "val_ppl_kn",
    "tok_per_s_phase1",
    "peak_memory_mb", "peak_memory_mb_predicted", "seconds",
}  # fmt: skip
TIMES = {
    "run_id", "date", "seconds", "tok_per_s_phase1", "tok_per_s_phase2", "peak_memory_mb",
    "peak_memory_mb_predicted", "seconds_phase1", "seconds_phase2", "seconds_training", "seconds_retrieval",
    "saving_share", "saving_share_background",
}  # fmt: skip


def weights(folder):
    return torch.load(Path(folder) / "model_latest.pt", map_location="cpu")["model_state_dict"]


def differences(one, other):
    """Figures of a summary, times aside, that another does not have."""
    return {key for key in one if one[key] != other[key]} - TIMES


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_command_ends_with_the_block_and_the_same_settings_give_the_same_bits(tiny_settings):
    """Exit status 0, every key of the block, a record, a checkpoint as guides read it.

    In a notebook the same seed gives the same figures and weights, another one others; the run is reported
    again without a change of its files.
    """
    done = run("train.py", tiny_settings)
    assert done.returncode == 0, done.stderr
    block = dict(line.split(": ", 1) for line in done.stdout.split("\n---\n")[1].splitlines())
    assert set(block) >= KEYS and "differs from config.py: " in done.stdout
    folder = Path(tiny_settings["checkpoint_dir"])
    checkpoint = torch.load(folder / "model_latest.pt", map_location="cpu")
    assert checkpoint["epoch"] == "phase2_complete"
    assert len(checkpoint["phase2_history"]["train_loss"]) == 3
    (log,) = folder.glob("dialogues/logs/metrics_*.jsonl")
    stages = [row["stage"] for row in read_rows(log)]
    assert stages.count("start") == stages.count("summary") == 1
    assert stages.count("phase1") == len(checkpoint["phase1_history"]["cvfp"])

    before, expected = (folder / "model_latest.pt").read_bytes(), weights(folder)
    config = ResidualConfig(**tiny_settings)
    reported = train.main(config)
    assert (folder / "model_latest.pt").read_bytes() == before
    again = dataclasses.replace(config, checkpoint_dir=f"{folder}_again")
    assert not differences(reported, train.main(again))
    assert same(weights(again.checkpoint_dir), expected)
    other = dataclasses.replace(config, seed=2, checkpoint_dir=f"{folder}_other")
    assert train.main(other)["val_loss"] != reported["val_loss"]


@pytest.mark.parametrize("freeze", [True, False])
def test_phase_1_alone_then_both_equals_both_and_frozen_contexts_do_not_move(tiny_settings, freeze):
    """With freeze_context the context map after Phase 2 is that of Phase 1; without it is not."""
    both = train.main(ResidualConfig(**tiny_settings, freeze_context=freeze))
    folder = tiny_settings["checkpoint_dir"] + "_apart"
    apart = ResidualConfig(**tiny_settings | {"checkpoint_dir": folder}, freeze_context=freeze, phase="1")
    assert "val_loss" not in train.main(apart)
    before = weights(folder)
    assert train.main(dataclasses.replace(apart, phase="both"))["val_loss"] == both["val_loss"]
    after = weights(folder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    in_context = {name for name in before if name.startswith(("context_map", "embed_norm"))}
    assert "embedding.weight" in moved and "context_embedding" not in moved
    assert bool(moved & in_context) != freeze


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_good_checkpoint(
    tiny_settings, monkeypatch
):
    """One sentence; what is on disk is finite and continues."""
    real, calls = phase1.phase1_loss, []

    def poisoned(*arguments, **named):
        calls.append(1)
        total, parts = real(*arguments, **named)
        return (total * float("nan") if len(calls) == 6 else total), parts

    config = ResidualConfig(**tiny_settings, untrained_control=False)
    monkeypatch.setattr(phase1, "phase1_loss", poisoned)
    with pytest.raises(UserError, match="loss is nan at iteration 2, batch 3 of Phase 1"):
        train.main(config)
    assert all(value.isfinite().all() for value in weights(config.checkpoint_dir).values())
    assert train.main(config)["phase1_steps"] == 9


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(num_samples=500), "dialogues"),
        (dict(data_source="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(embeddings="nowhere"), "nowhere"),
        (dict(precision="fp16"), "fp16"),
        (dict(whiten_context=True), "use --freeze_context too"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(tiny_settings, change, sentence):
    """What cannot be had, or does not fit; nothing is trained."""
    with pytest.raises(UserError, match=f"^[^\n]*{sentence}[^\n]*$"):
        train.main(ResidualConfig(**tiny_settings | change))
    assert not (Path(tiny_settings["checkpoint_dir"]) / "model_latest.pt").exists()


def test_bad_input_of_the_command_is_exit_status_2(tiny_settings):
    """No traceback reaches the user."""
    done = run("train.py", tiny_settings | dict(data_source="nowhere.jsonl"))
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "nowhere.jsonl" in line


def test_batches_of_one_sample_work(tiny_settings):
    """The smallest batch there is, in both phases."""
    summary = train.main(ResidualConfig(**tiny_settings | dict(phase1_batch_size=1, phase2_batch_size=1)))
    assert (summary["phase1_steps"], summary["phase2_steps"]) == (36, 36)

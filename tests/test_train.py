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
    "er_val_untrained", "er_ceiling", "cold_start_error_10", "contraction", "memory_horizon", "val_loss",
    "val_ppl", "val_bpb", "val_acc", "val_ppl_untrained_context", "val_ppl_bigram", "val_ppl_kn",
    "tok_per_s_phase1",
    "peak_memory_mb", "peak_memory_mb_predicted", "seconds",
}  # fmt: skip
TIMES = {
    "run_id", "date", "seconds", "tok_per_s_phase1", "tok_per_s_phase2", "peak_memory_mb",
    "peak_memory_mb_predicted", "seconds_phase1", "seconds_phase2", "seconds_training",
    "saving_share", "saving_share_background",
}  # fmt: skip


def weights(folder):
    return torch.load(Path(folder) / "model_latest.pt", map_location="cpu")["model_state_dict"]


def differences(one, other):
    """Figures of a summary, times aside, that another does not have."""
    return {key for key in one if one[key] != other[key]} - TIMES


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_train_as_a_command_ends_with_the_block_and_leaves_a_checkpoint(tiny_settings):
    """It exits 0 and prints every key of the block; the guide's snippet works on its file."""
    done = run("train.py", tiny_settings)
    assert done.returncode == 0, done.stderr
    block = dict(line.split(": ", 1) for line in done.stdout.split("\n---\n")[1].splitlines())
    assert set(block) >= KEYS
    assert "differs from config.py: " in done.stdout
    checkpoint = torch.load(Path(tiny_settings["checkpoint_dir"]) / "model_latest.pt", map_location="cpu")
    assert checkpoint["epoch"] == "phase2_complete"
    assert len(checkpoint["phase2_history"]["train_loss"]) == 3
    assert checkpoint["phase2_history"]["val_loss"][-1] > 0
    (log,) = (Path(tiny_settings["checkpoint_dir"]) / "dialogues" / "logs").glob("metrics_*.jsonl")
    rows = list(read_rows(log))
    assert [row["stage"] for row in rows if row["stage"] in ("start", "summary")] == ["start", "summary"]
    assert sum(row["stage"] == "phase1" for row in rows) == checkpoint["phase1_history"]["cvfp"].__len__()


def test_runs_of_one_seed_are_identical_and_a_complete_one_is_reported_again(tiny_settings):
    """Every metric and weight agrees; the same command after the end changes nothing; other seeds differ."""
    summaries, states = [], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tiny_settings["checkpoint_dir"] + name
        config = ResidualConfig(**tiny_settings | {"checkpoint_dir": folder, "seed": seed})
        summaries.append(train.main(config))
        states.append(weights(folder))
    assert not differences(summaries[0], summaries[1]) and same(states[0], states[1])
    assert summaries[0]["val_loss"] != summaries[2]["val_loss"] and not same(states[0], states[2])
    before = (Path(folder) / "model_latest.pt").read_bytes()
    assert not differences(summaries[2], train.main(config))
    assert (Path(folder) / "model_latest.pt").read_bytes() == before


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_cut_at_any_save_continues_to_the_same_bits(tiny_settings, monkeypatch, freeze):
    """Whatever save was the last, the run ends with the weights and metrics of an uninterrupted one."""
    config = ResidualConfig(**tiny_settings, freeze_context=freeze)
    whole = train.main(config)
    expected = weights(config.checkpoint_dir)

    class Cut(Exception):
        pass

    from newllm.saving import checkpoint

    real = checkpoint.save_sealed

    def cut_after(number):
        saves = iter(range(1, number + 1))

        def save(value, path, *previous):
            digest = real(value, path, *previous)
            if next(saves) == number:
                raise Cut
            return digest

        return save

    number, uncut = 1, False
    while not uncut:
        number += 4
        cut = dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{number}")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_sealed", cut_after(number))
            try:
                train.main(cut)
                uncut = True
            except Cut:
                pass
        resumed = train.main(cut)
        assert same(weights(cut.checkpoint_dir), expected), f"cut at save {number}"
        assert not differences(whole, resumed), f"cut at save {number}"
    assert number > 9


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


def test_a_changed_schedule_warns_and_continues(tiny_settings, capsys):
    """Settings that only change what comes next are named and taken."""
    config = ResidualConfig(**tiny_settings, phase="1", untrained_control=False)
    train.main(config)
    train.main(dataclasses.replace(config, phase="both", phase2_learning_rate=0.001))
    assert "warning: settings changed" in capsys.readouterr().out


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


@pytest.mark.parametrize("name", ["cache_dir", "checkpoint_dir"])
def test_folders_may_be_links_to_folders_and_nothing_else(tiny_settings, tmp_path, name):
    """The sentence says what is in the way; for a dangling link, that Drive is not mounted."""
    in_the_way, link = tmp_path / "file", tmp_path / "link"
    in_the_way.write_text("keep me")
    with pytest.raises(UserError, match="is a file"):
        train.main(ResidualConfig(**tiny_settings | {name: str(in_the_way)}))
    assert in_the_way.read_text() == "keep me"
    link.symlink_to(tmp_path / "drive")
    config = ResidualConfig(**tiny_settings | {name: str(link)}, phase="1", untrained_control=False)
    with pytest.raises(UserError, match="mount Drive first"):
        train.main(config)
    (tmp_path / "drive").mkdir()
    train.main(config)
    assert link.is_symlink() and any((tmp_path / "drive").iterdir())


def test_an_interrupted_download_of_pretrained_embeddings_is_no_random_matrix(tiny_settings, monkeypatch):
    """`--embeddings gpt2` without the hub stops with a sentence."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    def unreachable(*arguments, **named):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", unreachable)
    with pytest.raises(UserError, match="embeddings 'gpt2' cannot be had"):
        train.main(ResidualConfig(**tiny_settings, embeddings="gpt2"))


def test_batches_of_one_sample_work(tiny_settings):
    """The smallest batch there is, in both phases."""
    summary = train.main(ResidualConfig(**tiny_settings | dict(phase1_batch_size=1, phase2_batch_size=1)))
    assert (summary["phase1_steps"], summary["phase2_steps"]) == (36, 36)
